"""Which of several replicas a request goes to. Pure Python, without a clock: the simulator's fleet
and the live one (`pyllamabatch.cluster`) ask the very same objects.

A prompt is an array of int32: token ids, or the bytes of a text where there is no tokenizer."""

import itertools
from abc import abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple, Protocol, TypeVar

from ..errors import ArgumentError
from ..kv.radix_tree import RadixTree, Tokens
from ..kv.sharing import MIN_PREFIX
from .scheduler import Scheduler

BYTES_PER_TOKEN = 4  # of a text, about
REPORT_SECONDS = 1.0  # between two words of a replica about itself

Name = TypeVar("Name", bound=Hashable)


class ReplicaView(NamedTuple):
    """What a router knows of a replica.

    - n_open: requests that it has got and that have not ended.
    - wait: seconds until a request that comes now begins to be computed, see `expected_wait`.
      row_seconds: of a prompt row, 0 where that is not known. The replica has said both, up to
      `REPORT_SECONDS` ago."""

    n_open: int = 0
    wait: float = 0.0
    row_seconds: float = 0.0


class Router(Protocol):
    """Called once for each request, when it arrives."""

    @abstractmethod
    def choose(
        self, prompt: Callable[[], Tokens], replicas: Mapping[Name, ReplicaView], key: str = ""
    ) -> Name:
        """The name of the replica that takes it, of at least one. `prompt()` is not changed
        afterwards. `key`: requests with the same one belong together."""


class RoundRobin(Router):
    """One after the other."""

    def __init__(self) -> None:
        self._turns = itertools.count()

    def choose(
        self, prompt: Callable[[], Tokens], replicas: Mapping[Name, ReplicaView], key: str = ""
    ) -> Name:
        names = list(replicas)
        return names[next(self._turns) % len(names)]


class LeastOutstanding(Router):
    """The one with the fewest requests that have not ended; the first of several."""

    def choose(
        self, prompt: Callable[[], Tokens], replicas: Mapping[Name, ReplicaView], key: str = ""
    ) -> Name:
        return min(replicas, key=lambda name: replicas[name].n_open)


class PrefixAffinity(Router):
    """The replica of the request with the longest common prefix, of the last `memory` requests; or
    else of the last one with the same key. The least busy replica where to wait for that one takes
    over `patience` times as long as the prefix saves: what is computed twice holds up others, and
    takes cells from their prefixes. None that has over `slack` requests more than another.

    The least busy one is without requests, or else, of those where to wait takes up to `patience`
    times as long as to compute the prompt, has got the fewest elements that were new to it: where
    all prefixes of some users meet, they have no room.

    `unit`: elements of a prompt that make a token. `reach`: elements that are looked at."""

    slack, patience = 8, 3.0

    def __init__(self, memory: int = 4096, unit: int = 1, reach: int = 2**15) -> None:
        self.memory = memory
        self.unit = unit
        self.reach = reach
        self._ids = itertools.count()
        self._tree = RadixTree()
        self._went: OrderedDict[int, tuple[Hashable, int]] = OrderedDict()
        """By request: the replica, and elements that were new to it."""
        self._held: Counter[Hashable] = Counter()  # elements by replica
        self._keys: OrderedDict[str, Hashable] = OrderedDict()

    def choose(
        self, prompt: Callable[[], Tokens], replicas: Mapping[Name, ReplicaView], key: str = ""
    ) -> Name:
        elements = prompt()[: self.reach]
        most = min(view.n_open for view in replicas.values()) + self.slack
        near = {name: view for name, view in replicas.items() if view.n_open <= most}
        common = self._common(elements, near)
        least = self._least(near, len(elements))
        home = self._home(common, near, key)
        if home is None or not self._is_worth(near, home, least, common[home]):
            home = least
        self._remember(elements, home, len(elements) - common[home], key)
        return home

    def _least(self, replicas: Mapping[Name, ReplicaView], n: int) -> Name:
        """The least busy one, for a prompt of `n` elements."""
        idle = [name for name, view in replicas.items() if not view.n_open]
        first = min(replicas, key=lambda name: replicas[name].wait)
        soon = idle or [name for name in replicas if self._is_worth(replicas, name, first, n)]
        return min(soon, key=lambda name: (self._held[name], replicas[name].n_open))

    def _is_worth(
        self, replicas: Mapping[Name, ReplicaView], name: Name, other: Name, n: int
    ) -> bool:
        """Whether to compute `n` elements there takes long enough to wait for it, not the other."""
        one = replicas[name]
        saved = n / self.unit * one.row_seconds
        return one.wait - replicas[other].wait <= self.patience * saved

    def _common(self, elements: Tokens, replicas: Mapping[Name, ReplicaView]) -> Counter[Name]:
        """Elements of the longest common prefix that each replica has got."""
        names: dict[Hashable, Name] = {name: name for name in replicas}
        found: Counter[Name] = Counter()
        for id, n in self._tree.matches(elements):
            name = names.pop(self._went[id][0], None)
            if name is not None:
                found[name] = n
                if not names:
                    break
        return found

    def _home(
        self, common: Counter[Name], replicas: Mapping[Name, ReplicaView], key: str
    ) -> Name | None:
        """Where its prefix is, or what belongs to it; None where no replica has it."""
        for name, n in common.most_common(1):
            if n >= MIN_PREFIX * self.unit:
                return name
        names: dict[Hashable, Name] = {name: name for name in replicas}
        return names.get(self._keys.get(key))

    def _remember(self, elements: Tokens, name: Hashable, n_new: int, key: str) -> None:
        id = next(self._ids)
        self._tree.insert(id, elements)
        self._went[id] = name, n_new
        self._held[name] += n_new
        if len(self._went) > self.memory:
            oldest, (its, n) = self._went.popitem(last=False)
            self._tree.remove(oldest)
            self._held[its] -= n
            if not self._held[its]:
                del self._held[its]
        if key:
            self._keys.pop(key, None)
            self._keys[key] = name
            if len(self._keys) > self.memory:
                self._keys.popitem(last=False)


ROUTERS: dict[str, Callable[[], Router]] = {
    "round-robin": RoundRobin,
    "least-outstanding": LeastOutstanding,
    "prefix-affinity": PrefixAffinity,
}

DEFAULT_ROUTER = "prefix-affinity"


def make_router(name: str) -> Router:
    """ArgumentError names those that there are."""
    if name not in ROUTERS:
        raise ArgumentError("router", name, f"one of {', '.join(ROUTERS)}")
    return ROUTERS[name]()


# -- what a replica says of itself


def row_seconds(scheduler: Scheduler) -> float:
    """Of a prompt row in a full ubatch, by the cost model; 0 without one."""
    cost, n = scheduler.cost, scheduler.limits.n_ubatch
    return cost.predict(n, n, float(scheduler.accounting.used), 1) / n if cost else 0.0


def expected_wait(scheduler: Scheduler, n_open: int) -> float:
    """Seconds until one more request begins to be computed, where `n_open` have not ended: prompts
    that wait, and generations that must end before a slot is free. Prompts and answers are taken
    to be as long as those before. 0 without a cost model."""
    cost, counters = scheduler.cost, scheduler.counters
    n_slots, n_waiting = scheduler.limits.n_seq_max, max(0, n_open - scheduler.n_running)
    n_admitted = counters.admissions
    if cost is None or not n_admitted or not n_waiting:
        return 0.0
    n_rows = n_waiting * counters.prefill_rows / n_admitted
    n_ahead = max(0, n_open + 1 - n_slots)
    step = cost.predict(n_slots, 0, float(scheduler.accounting.used), n_slots)
    n_steps = n_ahead / n_slots * counters.tokens / n_admitted
    return n_rows * row_seconds(scheduler) + n_steps * step
