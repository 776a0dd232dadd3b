"use strict";
// Steps come from RECORDED, or from /steps while the page is open. Nothing else is asked for but
// the chat at the bottom.

const STEPS_MAX = 20000, POLL_MS = 100, GUTTER = 46, TOP = 70, CELLS = 46;
const byId = (id) => document.getElementById(id);
const canvas = byId("canvas"), pen = canvas.getContext("2d");
const style = getComputedStyle(document.documentElement);
const color = (name) => style.getPropertyValue(`--${name}`).trim();

const state = {
  steps: [], requests: new Map(), out: new Map(), // slots of preempted requests, by id
  nSlots: 1, nCells: 1, first: 0, // steps that were forgotten
  paused: false, back: 0, zoom: 7, chosen: null, changed: true, frames: 0, stats: null, server: null,
};
window.batch = state; // for tests and the console

// -- data

function addSteps(steps) {
  for (const step of steps) {
    const number = state.first + state.steps.length;
    state.steps.push(step);
    state.nSlots = Math.max(state.nSlots, ...step.padded.map((slot) => slot + 1));
    for (const [slot, id] of step.preempted) {
      state.out.set(id, slot);
      const request = state.requests.get(id);
      if (request) request.preempted++;
    }
    for (const lane of step.lanes) {
      const [slot, id, prompt] = lane;
      state.out.delete(id);
      for (const [other, its] of state.out) if (its === slot) state.out.delete(other);
      state.nSlots = Math.max(state.nSlots, slot + 1);
      let request = state.requests.get(id);
      if (!request) {
        request = { id, slots: new Set(), chunks: [], times: [], first: number, reasons: [], cells: 0,
          preempted: 0, speculates: false };
        state.requests.set(id, request);
      }
      request.slots.add(slot);
      request.last = number;
      if (step.drafted && !prompt) request.speculates = true; // how many tokens it had is not known
      if (prompt && request.decoding) request.cells = 0; // preempted, and computed again
      request.decoding = !prompt;
      request.cells += prompt || 1;
      lane[3] = request.cells; // that it has behind this step, those that it found cached aside
      if (prompt) request.chunks.push(prompt);
      else request.times.push(step.at + step.ms);
    }
    step.out = [...state.out];
    for (const [id, text] of Object.entries(step.reasons)) {
      const request = state.requests.get(Number(id));
      if (request) request.reasons.push([number, text]);
    }
    state.nCells = Math.max(state.nCells, step.kv_used);
  }
  const excess = RECORDED ? 0 : state.steps.length - STEPS_MAX;
  if (excess > 0) {
    state.steps.splice(0, excess);
    state.first += excess;
    for (const [id, request] of state.requests)
      if (request.last < state.first) state.requests.delete(id);
  }
  if (state.paused) state.back += steps.length;
  byId("back").max = Math.max(0, state.steps.length - 1);
  state.changed = true;
}

function forget() {
  const empty = { steps: [], nSlots: 1, nCells: 1, first: 0, back: 0, chosen: null, changed: true };
  Object.assign(state, empty);
  state.requests.clear();
  state.out.clear();
}

async function poll() {
  let since = -1;
  for (;;) {
    try {
      const response = await fetch(`steps?since=${since}`, { headers: headers() });
      if (response.status === 401) {
        const key = prompt("API key");
        if (key === null) return note("a key is needed");
        sessionStorage.setItem("key", key);
        continue;
      }
      const news = await response.json();
      if (!response.ok) throw new Error(news.error.message);
      if (state.server !== null && news.server !== state.server) { // its requests and clock differ
        forget();
        since = -1;
        news.steps = []; // asked for again, all of them
      }
      state.server = news.server;
      state.nSlots = Math.max(state.nSlots, news.n_slots);
      state.nCells = news.n_cells;
      state.stats = news.stats;
      if (news.steps.length) {
        since = news.steps[news.steps.length - 1].at;
        addSteps(news.steps);
      }
      if (!news.stats.waiting) state.out.clear(); // they run, or have ended
      note("");
    } catch (error) {
      note(`${error.message}: trying again`);
      await sleep(1000);
    }
    figures();
    await sleep(POLL_MS);
  }
}

const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
function headers() {
  const key = sessionStorage.getItem("key");
  return key ? { Authorization: `Bearer ${key}` } : {};
}
function note(text) { byId("note").textContent = text; byId("note").hidden = !text; }

// -- drawing

const columns = () => Math.max(1, Math.floor((canvas.clientWidth - GUTTER) / state.zoom));
function shown() {
  const end = Math.max(0, state.steps.length - state.back);
  return [Math.max(0, end - columns()), end];
}
const laneHeight = () => Math.max(4, Math.min(16, Math.floor(640 / state.nSlots)));

function draw() {
  requestAnimationFrame(draw);
  state.frames++;
  if (!state.changed) return;
  state.changed = false;
  const lane = laneHeight(), width = canvas.clientWidth, ratio = devicePixelRatio || 1;
  const height = TOP + lane * state.nSlots + CELLS;
  if (canvas.width !== width * ratio || canvas.height !== height * ratio) {
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    canvas.style.height = `${height}px`;
  }
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  const [start, end] = shown(), z = state.zoom, gap = z > 4 ? 1 : 0, lanes = TOP + lane * state.nSlots;
  let mostMs = 1, mostRows = 1, mostCells = 1;
  for (let i = start; i < end; i++) {
    mostMs = Math.max(mostMs, state.steps[i].ms);
    mostRows = Math.max(mostRows, state.steps[i].rows + paddingOf(state.steps[i]));
    mostCells = Math.max(mostCells, state.steps[i].kv_used);
  }
  const names = ["decode", "accepted", "rejected", "prompt", "filled", "preempted", "cells", "other",
    "reason"], paths = { chosen: new Path2D() };
  for (const name of names) paths[name] = new Path2D();
  const half = TOP / 2 - 4, scale = half / mostRows, cell = (CELLS - 8) / mostCells;
  const held = new Map(); // by request, as far as was seen
  for (let i = start; i < end; i++) {
    const step = state.steps[i], x = GUTTER + (i - start) * z, w = z - gap;
    let y = half; // row on row
    for (const [name, n] of rowsOf(step)) paths[name].rect(x, y -= n * scale, w, n * scale);
    const ms = (half * step.ms) / mostMs;
    paths.cells.rect(x, TOP - 6 - ms, w, ms);
    for (const one of step.lanes) {
      const [slot, id, n, cells] = one, y = TOP + slot * lane;
      held.set(id, cells);
      (n ? paths.prompt : paths.decode).rect(x, y, w, lane - 1);
      if (id === state.chosen) paths.chosen.rect(x, y, w, lane - 1);
      if (step.reasons[id]) paths.reason.rect(x, y, Math.min(w, 3), lane - 1);
    }
    for (const [slot, n] of step.prompt_filled) { // the part of its lane
      const [, , prompt] = step.lanes.find(([at]) => at === slot), part = n / (n + prompt);
      paths.filled.rect(x, TOP + slot * lane, w, (lane - 1) * part);
    }
    for (const slot of step.padded) paths.filled.rect(x, TOP + slot * lane, w, lane - 1);
    for (const [, slot] of step.out) paths.preempted.rect(x, TOP + slot * lane, w, lane - 1);
    for (const [slot] of step.preempted)
      paths.preempted.rect(x, TOP + slot * lane, Math.min(w, 3), lane - 1);
    let top = lanes + CELLS, left = step.kv_used; // request on request
    for (const [id, seen] of held) {
      if (state.requests.get(id).last < state.first + i) { held.delete(id); continue; }
      const cells = Math.min(seen, left);
      left -= cells;
      top -= cells * cell;
      (id % 2 ? paths.cells : paths.other).rect(x, top, w, cells * cell);
    }
    paths.filled.rect(x, top - left * cell, w, left * cell); // cached, or held by older requests
  }
  for (const name of names) {
    pen.fillStyle = color(name);
    pen.fill(paths[name]);
  }
  pen.strokeStyle = color("ink");
  pen.stroke(paths.chosen);
  pen.fillStyle = color("soft");
  pen.font = "10px system-ui";
  pen.fillText(`${mostRows} rows`, 2, 12);
  pen.fillText(`${mostMs.toFixed(1)} ms`, 2, TOP / 2 + 12);
  const every = Math.ceil(12 / lane);
  for (let slot = 0; slot < state.nSlots; slot += every)
    pen.fillText(String(slot), 24, TOP + slot * lane + Math.min(lane, 10));
  pen.fillText(`${mostCells} cells`, 2, lanes + 10);
}

// Rows that are no sequence's, but for those beside drafts.
function paddingOf(step) {
  return step.prompt_filled.reduce((sum, [, n]) => sum + n, step.filled);
}

// Of a step, by color. Rows that decode and are none of these fill up beside drafts.
function rowsOf(step) {
  const { decode, drafted, accepted } = step;
  const own = drafted ? step.sampled - accepted : decode;
  return [["decode", own], ["accepted", accepted], ["rejected", drafted - accepted],
    ["prompt", step.prefill], ["filled", decode - own - drafted + paddingOf(step)]];
}

// -- figures and what was clicked

function figures() {
  const steps = state.steps.slice(-200), last = steps[steps.length - 1], values = [];
  if (last) {
    const seconds = (last.at + last.ms - steps[0].at) / 1000;
    const sum = (name) => steps.reduce((n, step) => n + step[name], 0);
    const ms = steps.map((step) => step.ms).sort((a, b) => a - b);
    values.push(["tokens/s", (sum("sampled") / seconds).toFixed(0)],
      ["step p50", `${ms[ms.length >> 1].toFixed(1)} ms`], ["rows", last.rows],
      ["cells", `${last.kv_used} of ${state.nCells}`]);
    if (sum("drafted"))
      values.push(["drafted rows", `${sum("drafted")}, ${sum("accepted")} right`]);
  }
  if (state.stats)
    values.push(["running", state.stats.running], ["waiting", state.stats.waiting],
      ["ITL p50", state.stats.itl_ms === null ? "-" : `${state.stats.itl_ms.toFixed(1)} ms`],
      ["prefix hits", `${(100 * state.stats.prefix_hit_rate).toFixed(0)}%`],
      ["cached cells", state.stats.kv_cached], ["preemptions", state.stats.preemptions]);
  byId("figures").replaceChildren(...values.map(([name, value]) => {
    const pair = document.createElement("div");
    for (const [tag, text] of [["dt", name], ["dd", value]])
      pair.appendChild(document.createElement(tag)).textContent = text;
    return pair;
  }));
}

function about(step, id) {
  const names = ["build", "decode", "sync", "sample", "Python before"];
  const rows = Object.fromEntries(rowsOf(step));
  const lines = [`step: ${step.rows + paddingOf(step)} rows (${rows.decode} decode, ` +
    `${step.drafted} drafted, of which ${step.accepted} right, ${step.prefill} of prompts, ` +
    `${rows.filled} padding), ${step.sampled} tokens, ${step.ms.toFixed(2)} ms (` +
    step.phases.map((ms, i) => `${names[i]} ${ms.toFixed(2)}`).join(", ") +
    `), ${step.kv_used} cells${step.code ? `, failed with code ${step.code}` : ""}`];
  for (const [other, text] of Object.entries(step.reasons)) lines.push(`request ${other}: ${text}`);
  const request = state.requests.get(id);
  if (request) {
    const gaps = request.times.slice(1).map((t, i) => t - request.times[i]).sort((a, b) => a - b);
    const gap = gaps.length ? `, between them p50 ${gaps[gaps.length >> 1].toFixed(1)} ms` : "";
    lines.push(`request ${id}: slot ${[...request.slots].join(", ")}; prompt rows ` +
      `${request.chunks.join(" + ") || "none seen"}; ${request.times.length} decode steps${gap}, ` +
      `${request.speculates ? "at least " : ""}${request.cells} cells of its own` +
      (request.preempted ? `; preempted ${request.preempted} times` : ""));
    for (const [number, text] of request.reasons) lines.push(`  step ${number}: ${text}`);
  }
  byId("about").textContent = lines.join("\n");
}

canvas.addEventListener("click", (event) => {
  const [start, end] = shown(), i = start + Math.floor((event.offsetX - GUTTER) / state.zoom);
  if (event.offsetX < GUTTER || i >= end) return;
  const slot = Math.floor((event.offsetY - TOP) / laneHeight()), step = state.steps[i];
  const lane = step.lanes.find(([at]) => at === slot);
  const out = step.out.find(([, at]) => at === slot);
  state.chosen = lane ? lane[1] : out ? out[0] : null;
  state.changed = true;
  pause(true);
  about(step, state.chosen);
});

function pause(on) {
  state.paused = on;
  if (!on) state.back = 0;
  byId("pause").textContent = on ? "Go on" : "Pause";
  state.changed = true;
}
function look(back) {
  state.back = Math.max(0, Math.min(state.steps.length - 1, back));
  byId("back").value = state.back;
  state.changed = true;
}
byId("pause").addEventListener("click", () => pause(!state.paused));
byId("zoom").addEventListener("input", (e) => { state.zoom = +e.target.value; state.changed = true; });
byId("back").addEventListener("input", (e) => { pause(true); look(+e.target.value); });
canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  pause(true);
  look(state.back - Math.sign(event.deltaY || event.deltaX) * Math.ceil(columns() / 20));
}, { passive: false });
addEventListener("resize", () => { state.changed = true; });
addEventListener("keydown", (event) => {
  if (event.target.tagName === "INPUT") return;
  if (event.key === " ") { event.preventDefault(); pause(!state.paused); }
  const move = { ArrowLeft: 1, ArrowRight: -1 }[event.key];
  if (move) { pause(true); look(state.back + move); }
});

// -- the chat

byId("chat").addEventListener("submit", async (event) => {
  event.preventDefault();
  const answer = byId("answer"), content = byId("question").value;
  answer.textContent = "";
  const body = { messages: [{ role: "user", content }], stream: true, max_tokens: 512 };
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST", headers: { "Content-Type": "application/json", ...headers() },
      body: JSON.stringify(body),
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = ""; ;) {
      const { value, done } = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data: {")) continue;
        const data = JSON.parse(line.slice(6));
        if (data.error) throw new Error(data.error.message);
        const delta = data.choices[0]?.delta;
        answer.textContent += delta?.reasoning_content ?? "";
        answer.textContent += delta?.content ?? "";
      }
    }
  } catch (error) {
    answer.textContent += ` [${error.message}]`;
  }
});

if (RECORDED) {
  document.title = RECORDED.title;
  addSteps(RECORDED.steps);
  pause(true);
  figures();
} else {
  byId("chat").hidden = false;
  poll();
}
draw();
