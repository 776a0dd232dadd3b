// node client.js URL: what OpenAI's client for Node gets of a server, as one line of JSON.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const model = "m", temperature = 0;
const messages = [{ role: "user", content: "What is 17 + 25?" }];

const whole = await client.chat.completions.create({ model, messages, temperature });
let streamed = "", usage = null;
const stream = await client.chat.completions.create({
  model, messages, temperature, stream: true, stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
const format = { type: "json_schema", json_schema: { name: "sum", schema: {
  type: "object", properties: { sum: { type: "integer" } }, required: ["sum"],
} } };
const structured = await client.chat.completions.create({
  model, messages, temperature, response_format: format, max_tokens: 40,
});
const text = await client.completions.create({
  model, prompt: "What is 17 + 25?", max_tokens: 3, logprobs: 1, ignore_eos: true,
});
const response = await client.responses.create({
  model, input: "What is 17 + 25?", temperature, store: false,
});
const models = [];
for await (const one of client.models.list()) models.push(one.id);
let refused = null;
try {
  await client.chat.completions.create({ model, messages, temperature: -1 });
} catch (error) {
  refused = { kind: error.constructor.name, status: error.status, param: error.param };
}
const leaving = new AbortController();
let left = null;
try {
  const endless = await client.completions.create(
    { model, prompt: "a", stream: true, max_tokens: 2000, ignore_eos: true },
    { signal: leaving.signal },
  );
  for await (const _ of endless) leaving.abort();
  left = "ended";
} catch (error) {
  left = error.constructor.name;
}
console.log(JSON.stringify({
  whole: whole.choices[0].message.content, streamed, completion_tokens: usage.completion_tokens,
  structured: structured.choices[0].message.content, logprobs: text.choices[0].logprobs.tokens.length,
  response: response.output_text, models, refused, left,
}));
