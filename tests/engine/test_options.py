"""What requests may ask for beside their tokens: deadlines, room in the line, priorities."""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import pytest

from pyllamabatch.errors import ArgumentError, EngineClosed, QueueFull
from pyllamabatch.llama.model import Model
from pyllamabatch.llama.vocab import Vocab
from pyllamabatch.scheduler import Plan, Policy, StepView, device_aware, fcfs
from pyllamabatch.step.sampling_params import SamplingParams
from tests.support.engines import check_idle, engine_on, greedy, held, stopped_clock

PROMPT = [1, 20, 30, 40, 50]
small = partial(engine_on, n_seq_max=2)


class Gate:
    """A policy that plans nothing until it is opened; from then on FCFS, or another."""

    def __init__(self, policy: Policy | None = None) -> None:
        self.policy = policy or fcfs()
        self.opened = False
        self.asked = threading.Event()
        self.admitted: list[int] = []

    def plan(self, view: StepView) -> Plan:
        if not self.opened:
            self.asked.set()
            return Plan(wake=view.now + 0.005)
        plan = self.policy.plan(view)
        running = {seq.id for seq in view.running}
        self.admitted += [id for id in plan.tokens if id not in running]
        return plan


def test_a_deadline_ends_a_running_request_with_what_it_has(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = stopped_clock(monkeypatch)
    with small(model) as engine:
        whole = engine.submit(PROMPT, greedy(50)).result(60).tokens
        with held(engine):  # so the deadline comes first
            stream = engine.submit(PROMPT, greedy(2000), timeout=0.5)
            other = engine.submit(PROMPT, greedy(50))
            next(iter(stream))
            begun.set()
            result = stream.result(60)
        assert result.finish_reason == "deadline"
        assert result.error is None
        assert result.e2el_s >= 0.5
        n = min(50, len(result.tokens))
        assert n > 0
        assert result.tokens[:n] == whole[:n]
        assert other.result(60).tokens == whole
        check_idle(engine)


def test_a_deadline_ends_one_that_waits(model: Model) -> None:
    gate = Gate()
    with small(model, policy=gate) as engine:
        late = engine.submit(PROMPT, greedy(), deadline=time.perf_counter() + 0.02)
        gone = engine.submit(PROMPT, greedy(), timeout=0)
        fine = engine.submit(PROMPT, greedy(), timeout=1000)
        for stream in (late, gone):
            result = stream.result(60)
            assert (result.finish_reason, result.tokens, result.ttft_s) == ("deadline", [], None)
        gate.opened = True
        assert fine.result(60).finish_reason == "length"
        assert engine.stats().finished["deadline"] == 2
        check_idle(engine)


@pytest.mark.parametrize(
    "options",
    [
        {"timeout": -1}, {"timeout": float("nan")}, {"timeout": "1"},
        {"timeout": 1.0, "deadline": 5.0}, {"deadline": float("inf")}, {"itl_target": -1.0},
        {"ttft_target": -1.0}, {"priority": 1.5}, {"priority": 2**40}, {"tenant": 7},
        {"queue_timeout": -1},
    ],
)  # fmt: skip
def test_bad_options_start_nothing(model: Model, options: dict[str, Any]) -> None:
    with small(model) as engine:
        with pytest.raises(ArgumentError):
            engine.submit(PROMPT, greedy(), **options)
        with pytest.raises(ArgumentError, match="did you mean priority"):
            engine.submit(PROMPT, greedy(), prioritty=3)  # type: ignore[call-arg]
        assert engine.stats().submitted == 0


class Urgent:
    def plan(self, view: StepView) -> Plan:
        if view.running:
            (seq,) = view.running
        else:
            seq = max(view.waiting, key=lambda seq: (seq.priority, seq.tenant))
        return Plan({seq.id: seq.remaining})


def test_policies_see_priority_and_tenant(model: Model) -> None:
    gate = Gate(Urgent())
    with small(model, policy=gate) as engine:
        first = engine.submit(PROMPT, greedy())
        streams = [
            engine.submit(PROMPT, greedy(), priority=1, tenant="a"),
            engine.submit(PROMPT, greedy(), priority=5),
            engine.submit(PROMPT, greedy(), priority=1, tenant="b"),
        ]
        gate.opened = True
        for stream in (first, *streams):
            stream.result(60)
    low, high, tenant_b = (stream.id for stream in streams)
    assert gate.admitted == [high, tenant_b, low, first.id]


def test_the_default_policy_goes_by_the_first_token_that_is_due(model: Model) -> None:
    gate = Gate(device_aware())
    with small(model, policy=gate, n_seq_max=1) as engine:
        targets: list[dict[str, Any]] = [{}, {"ttft_target": 9}, {"ttft_target": 5.5}]
        some, late, soon = (engine.submit(PROMPT, greedy(), **target) for target in targets)
        gate.opened = True
        for stream in (some, late, soon):
            stream.result(60)
    assert gate.admitted == [soon.id, late.id, some.id]


WAYS: dict[str, Callable[..., Any]] = {
    "submit": lambda engine, **options: engine.submit(PROMPT, greedy(), **options).result(60),
    "generate": lambda engine, **options: engine.generate([PROMPT], greedy(), **options)[0],
    "agenerate": lambda engine, **options: asyncio.run(
        engine.agenerate([PROMPT], greedy(), **options)
    )[0],
}


@pytest.mark.parametrize("way", WAYS)
def test_a_deadline_ends_the_wait_for_room(model: Model, way: str) -> None:
    gate = Gate()
    with small(model, policy=gate, max_waiting=1) as engine:
        waits = engine.submit(PROMPT, greedy())
        result = WAYS[way](engine, timeout=0.02)
        assert (result.finish_reason, result.tokens, result.queue_s) == ("deadline", [], None)
        assert not waits.done
        gate.opened = True
        assert WAYS[way](engine, timeout=1000).tokens == waits.result(60).tokens
        check_idle(engine)


@pytest.mark.parametrize("n", [2, 3])
def test_a_full_line_refuses_or_waits(model: Model, n: int) -> None:
    """Also one that more have come into than there is room for: they came together."""
    gate = Gate()
    with small(model, policy=gate, max_waiting=2) as engine:
        streams = engine.submit_n(PROMPT, greedy(), n)
        with pytest.raises(QueueFull):
            engine.submit(PROMPT, greedy(), queue_timeout=0, timeout=1000)
        with pytest.raises(QueueFull):
            engine.submit(PROMPT, greedy(), queue_timeout=0.01)
        with pytest.raises(QueueFull):
            engine.submit_all([PROMPT] * 3, greedy(), queue_timeout=0)
        assert engine.stats().submitted == n
        late: list[Any] = []
        thread = threading.Thread(
            target=lambda: late.append(engine.submit(PROMPT, greedy()).result(60))
        )
        thread.start()
        gate.opened = True
        thread.join()
        assert [stream.result(60).tokens for stream in streams] == [late[0].tokens] * n
        check_idle(engine)


def test_a_callback_does_not_wait_for_room(model: Model) -> None:
    """The thread that calls it brings what others need to end, and so to make room."""
    gate, told = Gate(), Future[BaseException | None]()

    def again(stream: Any) -> None:
        try:
            engine.submit(PROMPT, greedy())
            told.set_result(None)
        except QueueFull as error:
            told.set_result(error)

    with small(model, policy=gate, max_waiting=1) as engine:
        waits = engine.submit(PROMPT, greedy())
        with engine._core.state:  # it does not end before it has a callback
            engine.submit(PROMPT, greedy(), timeout=0).add_done_callback(again)
        assert isinstance(told.result(60), QueueFull)
        gate.opened = True
        assert waits.result(60).finish_reason == "length"
        check_idle(engine)


def test_a_cancelled_request_makes_room(model: Model) -> None:
    gate = Gate()
    with small(model, policy=gate, max_waiting=1) as engine:
        first = engine.submit(PROMPT, greedy())
        first.cancel()
        second = engine.submit(PROMPT, greedy(), queue_timeout=60)
        gate.opened = True
        assert second.result(60).finish_reason == "length"
        check_idle(engine)


def test_generate_waits_for_room(model: Model) -> None:
    with small(model, max_waiting=2) as engine:
        results = engine.generate([PROMPT] * 20, greedy())
        assert len({tuple(result.tokens) for result in results}) == 1
        check_idle(engine)


def test_closing_wakes_who_waits_for_room(model: Model) -> None:
    engine = small(model, policy=Gate(), max_waiting=1)
    engine.submit(PROMPT, greedy())
    caught: list[BaseException] = []

    def submit() -> None:
        try:
            engine.submit(PROMPT, greedy())
        except EngineClosed as error:
            caught.append(error)

    thread = threading.Thread(target=submit)
    thread.start()
    time.sleep(0.01)
    engine.close(wait=False)
    thread.join()
    assert len(caught) == 1


@pytest.mark.parametrize("early", [{"min_tokens": 12}, {"ignore_eog": True}])
def test_a_complete_grammar_ends_the_text(embedded_model: Model, early: dict[str, Any]) -> None:
    """It allows nothing else. One that may go on does."""
    with engine_on(embedded_model) as engine:
        for grammar, text in (('root ::= "yes"', "yes"), ('root ::= "y"+', 12 * "y")):
            for temperature in (0.0, 1.0):
                params = SamplingParams(
                    temperature=temperature, max_tokens=12, grammar=grammar, **early
                )
                result = engine.submit("Really? ", params).result(60)
                assert result.text == text
                assert result.finish_reason == ("stop" if text == "yes" else "length")
        check_idle(engine)


def test_nothing_ends_a_text_before_min_tokens(embedded_model: Model) -> None:
    prompt = "Copy: abcdefgh. Copy: abcdefgh."
    with small(embedded_model) as engine:
        whole = engine.submit(prompt, greedy(24)).result(60)
        character, token = whole.text[0], whole.tokens[0]
        for n in (1, 5, 20):
            for ends in ({"stop": (character,)}, {"stop_token_ids": (token,)}):
                result = engine.submit(prompt, greedy(24, min_tokens=n, **ends)).result(60)
                assert result.n_generated >= n
                if "stop" in ends and result.finish_reason == "stop":
                    assert result.tokens == whole.tokens[: result.n_generated]
            always = greedy(24, min_tokens=n, stop=tuple(set(whole.text)))
            result = engine.submit(prompt, always).result(60)
            assert (result.finish_reason, result.n_generated) == ("stop", n + 1)
            assert whole.text.startswith(result.text)


def test_a_prompt_of_many_samples_is_tokenized_once(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenized, tokenize = list[str](), Vocab.tokenize

    def counted(vocab: Vocab, text: str, **options: Any) -> Any:
        tokenized.append(text)
        return tokenize(vocab, text, **options)

    with engine_on(model) as engine:
        (expected,) = engine.generate(["a text"], greedy(), add_special=False)
        monkeypatch.setattr(Vocab, "tokenize", counted)
        streams = engine.submit_n("a text", greedy(), 5, add_special=False)
        assert tokenized == ["a text"]
        assert {tuple(stream.result(60).tokens) for stream in streams} == {tuple(expected.tokens)}
