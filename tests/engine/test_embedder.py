"""Embedder: what a text gives does not depend on the texts that are computed with it."""

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pyllamabatch import Context, Embedder, Engine, Model
from pyllamabatch.engine.embedding_core import EmbeddingCore, Text, Vectors
from pyllamabatch.errors import (
    ArgumentError,
    ClosedError,
    EngineClosed,
    FatalDecodeError,
    UnsupportedOperation,
)
from pyllamabatch.llama import runtime
from pyllamabatch.raw import lib
from tests.support.models_gguf import gguf_path
from tests.support.models_special import N_POSITIONS, write_bert
from tests.support.served import until

TEXTS = [[10 + (i * j) % 200 for j in range(1, 3 + i % 23)] for i in range(40)]
EXACT: dict[str, Any] = {
    "n_threads": 1, "n_threads_batch": 1, "flash_attn_type": "disabled", "type_k": "f32",
    "type_v": "f32",
}  # fmt: skip
KINDS = ("llama", "gemma3", "mamba", "jamba", "bert")


@pytest.fixture(scope="module")
def special(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The file of a kind of model."""
    folder = tmp_path_factory.mktemp("embedder")
    write_bert(folder / "bert.gguf")
    write_bert(folder / "reranker.gguf", reranker=True)

    def path(kind: str) -> Path:
        own = folder / f"{kind}.gguf"
        return own if own.is_file() else gguf_path(kind)

    return path


@pytest.fixture(scope="module")
def embedder(embedded_model: Model) -> Iterator[Embedder]:
    with Embedder(embedded_model, n_threads=1, n_threads_batch=1) as embedder:
        yield embedder


def alone(model: Model, tokens: list[int], pooling: str) -> npt.NDArray[np.float32]:
    """The vector of a text in a context of its own, pooled here from its tokens' vectors."""
    options: dict[str, Any] = {"n_ctx": 64, "n_ubatch": 64, "embeddings": True}
    with Context(model, pooling_type="none", **options, **EXACT) as context:
        batch = context.batch(64)
        batch.extend(tokens, 0, 0, [True] * len(tokens))
        (context.decode if context.capabilities.has_memory else context.encode)(batch)
        rows = context.embeddings_all().copy()
    pooled: dict[str, npt.NDArray[np.float32]] = {
        "mean": rows.mean(axis=0), "cls": rows[0], "last": rows[-1]
    }  # fmt: skip
    return pooled[pooling]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_texts_give_what_they_give_alone(
    special: Callable[[str], Path], kind: str, pooling: Any
) -> None:
    with Model(special(kind)) as model, Embedder(model, pooling, **EXACT) as embedder:
        vectors = embedder.embed(TEXTS, normalize=False)
        assert vectors.shape == (len(TEXTS), model.n_embd_out)
        for i in (0, 7, 22, 39):
            expected = alone(model, TEXTS[i], pooling)
            np.testing.assert_allclose(vectors[i], expected, rtol=0, atol=2e-4)
        lengths = np.linalg.norm(embedder.embed(TEXTS[:5]), axis=1)
        np.testing.assert_allclose(lengths, 1, atol=1e-5)


def test_documents_by_their_scores(special: Callable[[str], Path]) -> None:
    documents = ["a b", "cd", "a", "query", "b a c", "dd"]
    with Model(special("reranker")) as model, Embedder(model) as ranker:
        assert ranker.ranks
        ranked = ranker.rerank("ab", documents)
        assert sorted(one.index for one in ranked) == list(range(6))
        scores = [one.score for one in ranked]
        assert scores == sorted(scores, reverse=True)
        assert len(set(scores)) == 6
        for one in ranked:
            (again,) = ranker.rerank("ab", [documents[one.index]])
            assert again.score == pytest.approx(one.score, abs=1e-4)
        assert ranker.rerank("ab", documents, top_n=2) == pytest.approx(ranked[:2])
        assert asyncio.run(ranker.arerank("ab", documents, top_n=1))[0].index == ranked[0].index
        with pytest.raises(UnsupportedOperation, match="scores only"):
            ranker.embed(["a"])
        ranker.submit = None  # type: ignore[assignment,method-assign]  # nothing is computed
        with pytest.raises(ArgumentError, match="top_n"):
            ranker.rerank("ab", documents, top_n=0)


def test_a_template_of_the_file_puts_a_pair_together(
    embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "<q>{query}</q><d>{document}</d>"
    monkeypatch.setattr(Model, "chat_template", lambda self, name=None: template)
    (pair,) = embedder.pairs("one", ["two"])
    assert embedder.model.vocab.detokenize(pair) == "<q>one</q><d>two</d>"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.embed("a text"), "texts"),
        (lambda e: e.embed(["a", ""]), r"texts\[1\].*1 to 2048"),
        (lambda e: e.embed([[40] * 2049]), r"texts\[0\].*2049 tokens"),
        (lambda e: e.embed([[40], [-1]]), "texts"),
        (lambda e: e.pairs("a", "b"), "documents"),
        (lambda e: Embedder(e.model, "none"), "pooling.*mean"),
        (lambda e: Embedder(e.model, n_seq_max=12), "n_seq_max.*power of two"),
        (lambda e: Embedder(e.model, n_batch=-1), "n_batch"),
        (lambda e: Embedder(e.model, n_ctx=512), "n_ctx=512: the embedder sets it itself"),
        (lambda e: Embedder(e.model, pooling_type="none"), "pooling_type='none': .* by pooling"),
        (
            lambda e: Embedder("model.gguf"),  # type: ignore[arg-type]
            "must be a Model",
        ),
    ],
)
def test_what_is_refused(embedder: Embedder, call: Callable[[Embedder], Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call(embedder)


def test_no_texts_and_long_ones(embedder: Embedder) -> None:
    assert embedder.embed([]).shape == (0, embedder.model.n_embd_out)
    long, short = [40 + i % 50 for i in range(600)], [50, 60]
    both = embedder.embed([short, long, short])
    np.testing.assert_allclose(both[0], both[2], atol=1e-6)
    np.testing.assert_allclose(both[1], embedder.embed([long])[0], atol=1e-2)


def test_a_table_of_positions_is_the_limit(special: Callable[[str], Path]) -> None:
    with Model(special("bert")) as model, Embedder(model) as embedder:
        assert embedder.n_tokens_max == N_POSITIONS
        with pytest.raises(ArgumentError, match=f"1 to {N_POSITIONS}"):
            embedder.embed([[40] * (N_POSITIONS + 1)])
        assert len(embedder.embed([[40] * N_POSITIONS] * 3)) == 3


class Batches:
    """What an embedder computes, batch by batch, each when `go` is set."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        fails: int = -1,
        error: Exception | None = None,
    ) -> None:
        self.sizes: list[int] = []
        self.go = threading.Event()
        self.begun = threading.Semaphore(0)
        decode = EmbeddingCore._decode

        def noted(core: EmbeddingCore, taken: list[Text]) -> list[Vectors]:
            self.sizes.append(len(taken))
            self.begun.release()
            assert self.go.wait(60)
            if any(embedding.texts[i][0] == fails for embedding, i in taken):
                raise error or FatalDecodeError(-3)
            return decode(core, taken)

        monkeypatch.setattr(EmbeddingCore, "_decode", noted)


def test_calls_that_wait_share_batches(
    embedded_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = Batches(monkeypatch)
    with Embedder(embedded_model) as embedder:
        tokens = [embedder.tokens([text])[0] for text in TEXTS]
        first = embedder.submit(tokens[:1])
        assert batches.begun.acquire(timeout=60)
        long = embedder.submit(tokens[:30] * 4)
        others = [embedder.submit([one]) for one in tokens[30:]]
        batches.go.set()
        for embedding in (first, long, *others):
            assert len(embedding.future.result(60)) == len(embedding.texts)
        assert batches.sizes[1] > len(others)  # one of each call, not the long one first
        assert sum(batches.sizes) == 1 + 120 + 10


@pytest.mark.parametrize(
    "error", [FatalDecodeError(-3, "made to fail"), MemoryError("made to fail")], ids=type
)
def test_a_text_that_fails_does_so_alone(
    embedded_model: Model, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Whatever it fails with: the thread goes on."""
    batches = Batches(monkeypatch, fails=77, error=error)
    with Embedder(embedded_model) as embedder, ThreadPoolExecutor(3) as threads:
        first = threads.submit(embedder.embed, [[40, 41]])
        assert batches.begun.acquire(timeout=60)
        texts = [[[50, 51], [52]], [[60], [77, 1], [61]]]
        good, bad = (embedder.submit(embedder.tokens(each)) for each in texts)
        batches.go.set()
        assert len(first.result(60)) == 1
        assert len(good.future.result(60)) == 2
        with pytest.raises(type(error), match="made to fail"):
            bad.future.result(60)
        assert len(embedder.embed([[40]])) == 1


@pytest.mark.parametrize("n", [1, 3])
def test_a_context_whose_device_has_failed_is_made_again(
    embedded_model: Model, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    """As Metal does: it fails behind the call that computes, and so does each call until then."""
    texts = [[50 + i, 51] for i in range(n)]
    with Embedder(embedded_model) as embedder:
        expected = embedder.embed(texts)
        context, logged, failed = embedder._core._context, runtime.logged, [True]
        renew = context.renew

        def renewed() -> None:
            renew()
            failed.clear()

        def as_metal(call: Any, *arguments: Any) -> tuple[Any, str]:
            value, log = logged(call, *arguments)
            waits = call == lib.llama_get_embeddings_seq and failed
            return value, "command buffer 0 failed with status 5" if waits else log

        monkeypatch.setattr(runtime, "logged", as_metal)
        monkeypatch.setattr(context, "renew", renewed)
        if n == 1:
            with pytest.raises(FatalDecodeError, match="command buffer"):
                embedder.embed(texts)
        assert (embedder.embed(texts) == expected).all()
        assert not failed


def test_what_is_cancelled_is_not_computed(
    embedded_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = Batches(monkeypatch)
    with Embedder(embedded_model) as embedder:
        first = embedder.submit(embedder.tokens([[40]]))
        assert batches.begun.acquire(timeout=60)
        given_up = embedder.submit(embedder.tokens([[41]] * 40))
        given_up.cancel()
        batches.go.set()
        assert len(first.future.result(60)) == 1
        with pytest.raises(ClosedError, match="given up"):
            given_up.future.result(60)
        assert len(embedder.embed([[42]])) == 1
        assert batches.sizes == [1, 1]


def test_cancelled_tasks_and_closed_embedders(
    embedded_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches, own = Batches(monkeypatch), Embedder(embedded_model)
    batches.go.set()

    async def cancelled() -> None:
        task = asyncio.create_task(own.aembed([[40]] * 2000))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert asyncio.run(own.aembed([[40], [41]])).shape == (2, embedded_model.n_embd_out)
    batches.go.clear()
    waiting = own.submit(own.tokens([[40]] * 2000))
    with ThreadPoolExecutor(1) as threads:
        closing = threads.submit(own.close)
        until(lambda: own._core._closed)
        batches.go.set()
        closing.result(60)
    own.close()
    with pytest.raises(ClosedError, match="given up"):
        waiting.future.result(60)
    with pytest.raises(ClosedError, match="is closed"):
        own.embed([[40]])
    assert "closed" in repr(own)


def test_an_embedder_that_is_forgotten_ends_its_thread(embedded_model: Model) -> None:
    embedder = Embedder(embedded_model)
    thread = embedder._core._thread
    assert thread.is_alive()
    del embedder
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()


def test_an_engine_makes_vectors_too(embedded_model: Model, special: Callable[[str], Path]) -> None:
    with Engine(embedded_model, n_seq_max=2, n_ctx=512, cost=None) as engine:
        vectors = engine.embed(["one text", "another"])
        assert vectors.shape == (2, embedded_model.n_embd_out)
        np.testing.assert_allclose(
            asyncio.run(engine.aembed(["one text"]))[0], vectors[0], atol=0.01
        )
        with pytest.raises(UnsupportedOperation, match="no reranker"):
            engine.rerank("a", ["b"])
        (result,) = engine.generate(["one text"])
        assert result.n_generated > 0
    with pytest.raises(EngineClosed):
        engine.embed(["one text"])
    with (
        Model(special("bert")) as bert,
        pytest.raises(UnsupportedOperation, match=r"Embedder\(model\)"),
    ):
        Engine(bert)
    with (
        Engine(machine="nvidia-h200-gemma-3-1b-q4_k_m") as machine,
        pytest.raises(UnsupportedOperation, match="profile machine"),
    ):
        machine.embed(["a"])
