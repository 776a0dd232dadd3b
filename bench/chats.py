"""Chats of users: 32 of 8 users. All chats of a user begin with the user's own long prefix, as a
system prompt and its tools are. Eight clients have four chats each, of four users, and ask one
after the other; then they begin anew, with other questions and in another order, so often as there
are rounds. As requests over HTTP, and as a trace for the simulator."""

import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import httpx

from pyllamabatch.sim import TraceRequest

USERS, CHATS, CLIENTS, TURNS = 8, 32, 8, 4
N_QUESTION = 12  # tokens
N_SLOTS = 4  # of a replica


class Sizes(NamedTuple):
    """Tokens of a user's prefix and of an answer; how often there are all chats."""

    n_prefix: int = 800
    n_answer: int = 16
    n_rounds: int = 3

    @property
    def n_turn(self) -> int:
        return N_QUESTION + self.n_answer

    @property
    def n_cells(self) -> int:
        """Of a replica: the prefixes of half of the users, so that those of all fit into two
        replicas once, not twice; half of the chats, and those that run."""
        n_chat = TURNS * self.n_turn
        return (USERS // 2) * self.n_prefix + (CHATS // 2) * n_chat + N_SLOTS * n_chat

    @property
    def n_requests(self) -> int:
        return self.n_rounds * CHATS * TURNS

    @property
    def n_prompts(self) -> int:
        """Tokens of all prompts."""
        first = self.n_prefix + N_QUESTION
        return sum(first + i * self.n_turn for i in range(TURNS)) * CHATS * self.n_rounds


class Asked(NamedTuple):
    """A turn of a chat of a user. Chats of later rounds are other ones."""

    user: int
    chat: int
    turn: int


def order(seed: int, n_rounds: int) -> list[list[Asked]]:
    """What each client asks, one after the other: turn by turn, its chats in another order."""
    rng = random.Random(seed)
    found: list[list[Asked]] = []
    for client in range(CLIENTS):
        chats = [client + CLIENTS * i for i in range(CHATS // CLIENTS)]
        found.append([
            Asked((chat + chat // CLIENTS) % USERS, chat + CHATS * i, turn)
            for i in range(n_rounds)
            for turn in range(TURNS)
            for chat in rng.sample(chats, len(chats))
        ])  # fmt: skip
    return found


def trace(
    asked: Sequence[Sequence[Asked]], sizes: Sizes, way: Callable[[], float] = float
) -> list[TraceRequest]:
    """The same requests; pieces of users, questions and answers are numbers of their own. `way()`:
    seconds that the next request takes from its client to a replica and back, beside the
    replica's own."""
    found: list[TraceRequest] = []
    for ones in asked:
        after: int | None = None
        for one in ones:
            id = len(found)
            content = [(one.user, sizes.n_prefix)]
            for turn in range(one.turn + 1):
                piece = USERS + 2 * (one.chat * TURNS + turn)
                content += [(piece, N_QUESTION), (piece + 1, sizes.n_answer)]
            *content, (answer, n_answer) = content
            n_prompt = sum(n for _, n in content)
            pieces = tuple(content)
            found.append(TraceRequest(id, way(), n_prompt, n_answer, pieces, answer, after))
            after = id
    return found


def talk(client: httpx.Client, asked: Sequence[Sequence[Asked]], seed: int, sizes: Sizes) -> None:
    """Every client to its end. Prompts are random tokens, and the answers that came."""
    rng = random.Random(seed)
    prefixes = [drawn(rng, sizes.n_prefix) for _ in range(USERS)]
    n_questions = CHATS * sizes.n_rounds
    questions = [[drawn(rng, N_QUESTION) for _ in range(TURNS)] for _ in range(n_questions)]
    chats: dict[int, list[int]] = {}

    def ask(ones: Sequence[Asked]) -> None:
        for one in ones:
            tokens = chats.setdefault(one.chat, list(prefixes[one.user]))
            tokens += questions[one.chat][one.turn]
            tokens += complete(client, tokens, sizes.n_answer)["tokens"]

    with ThreadPoolExecutor(len(asked)) as pool:
        list(pool.map(ask, asked))


def drawn(rng: random.Random, n: int) -> list[int]:
    """Tokens that every vocabulary has."""
    return [rng.randrange(32, 127) for _ in range(n)]


def complete(client: httpx.Client, tokens: list[int], n_answer: int) -> dict[str, Any]:
    body = {"prompt": tokens, "n_predict": n_answer, "ignore_eos": True, "return_tokens": True}
    answer = client.post("/completion", json=body)
    answer.raise_for_status()
    found: dict[str, Any] = answer.json()
    return found
