"""FleetRouter: a router of the scheduler's as Ray Serve's `RequestRouter`."""

from collections import Counter
from collections.abc import Mapping
from typing import Any
from weakref import ref

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from ..scheduler.router import (
    BYTES_PER_TOKEN,
    DEFAULT_ROUTER,
    PrefixAffinity,
    ReplicaView,
    Router,
    make_router,
)
from .call import RoutedCall


def seen_of(n_open: int, said: Mapping[str, Any]) -> ReplicaView:
    """`said`: by a replica, maybe of another version of this package."""
    return ReplicaView(n_open, said.get("wait", 0.0), said.get("row_seconds", 0.0))


class FleetRouter(RequestRouter):  # type: ignore[misc,unused-ignore]
    """Its calls have a `RoutedCall` as their first argument. `initialize_state(router)`: the name
    of one of `pyllamabatch.scheduler.router.ROUTERS`. For one event loop."""

    def initialize_state(self, **kwargs: Any) -> None:
        name = kwargs.get("router", DEFAULT_ROUTER)
        self._router: Router = (
            PrefixAffinity(unit=BYTES_PER_TOKEN) if name == DEFAULT_ROUTER else make_router(name)
        )
        self._open: Counter[ReplicaID] = Counter()
        self._routed: dict[str, ReplicaID] = {}  # the requests that are open
        self._on_the_way: dict[str, tuple[ReplicaID, ref[PendingRequest]]] = {}
        """Those that no replica has taken yet. Of one that is given up before it is sent Ray does
        not tell: it forgets it."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The router's choice, and behind it the others, for when it is full or gone."""
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas]
        id = pending_request.metadata.internal_request_id
        self._on_the_way.pop(id, None)
        n_open = self._n_open()
        replicas = {replica.replica_id: replica for replica in candidate_replicas}
        seen = {
            name: seen_of(n_open[name], replica.routing_stats or {})
            for name, replica in replicas.items()
        }
        call: RoutedCall = pending_request.args[0]
        chosen = self._router.choose(call.prompt, seen, call.key)
        self._on_the_way[id] = chosen, ref(pending_request)
        others = sorted(seen.keys() - {chosen}, key=lambda name: n_open[name])
        return [[replicas[name]] for name in (chosen, *others)]

    def _n_open(self) -> Counter[ReplicaID]:
        """Requests by replica, those included that were not sent yet."""
        for id, (_, pending) in [*self._on_the_way.items()]:
            if (one := pending()) is None or one.future.cancelled():
                del self._on_the_way[id]
        return self._open + Counter(name for name, _ in self._on_the_way.values())

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        self._on_the_way.pop(pending_request.metadata.internal_request_id, None)
        self._routed[pending_request.metadata.internal_request_id] = replica_id
        self._open[replica_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._on_the_way.pop(internal_request_id, None)  # no replica has taken it, and none will
        if self._routed.get(internal_request_id) != replica_id:
            return  # of what all replicas are asked, or what this one has refused
        del self._routed[internal_request_id]
        self._open[replica_id] -= 1
        if self._open[replica_id] <= 0:
            del self._open[replica_id]
