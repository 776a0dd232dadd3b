"""Deployments on Ray Serve, by `pyllamabatch serve --replicas` or `serve run`.

Settings that belong to Ray (autoscaling, rolling updates, placement) stay Ray's: `serve run FILE`
takes them by the names of the deployments, `engine` and `front`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from starlette.requests import Request
from starlette.responses import Response

from ..errors import ArgumentError, integer, number
from ..llama.host import usable_cores
from ..scheduler.router import DEFAULT_ROUTER, REPORT_SECONDS, make_router
from ..server.options import ServerOptions
from .front import Front
from .replica import OpenApp, Replica
from .router import FleetRouter

APPLICATION = "pyllamabatch"
LOOPBACK = "127.0.0.1"
HEALTH_SECONDS = 5.0
SILENT_SECONDS = 10.0  # Ray's own 30: three of them, and a replica that hangs is replaced
REPLICAS_MAX = 10_000


@dataclass(frozen=True, kw_only=True)
class FleetOptions:
    """- min_replicas, max_replicas: engines. Between the two Ray scales by open requests, so that
      there are `n_seq_max` of them for each.
    - gpus_per_replica: GPUs, or a share of one; 0: none. n_gpus: those of a cluster of this machine
      alone, None: as many as Ray finds.
    - router: one of `pyllamabatch.scheduler.router.ROUTERS`.
    - n_seq_max: requests that an engine runs at once. max_open: those that it takes, waiting ones
      included."""

    min_replicas: int
    max_replicas: int
    gpus_per_replica: float = 0.0
    n_gpus: int | None = None
    router: str = DEFAULT_ROUTER
    n_seq_max: int = 16
    max_open: int = 1040

    def __post_init__(self) -> None:
        integer("min_replicas", self.min_replicas, 1, REPLICAS_MAX)
        integer("max_replicas", self.max_replicas, self.min_replicas, REPLICAS_MAX)
        number("gpus_per_replica", self.gpus_per_replica, 0)
        make_router(self.router)

    @classmethod
    def of(cls, replicas: str, **more: Any) -> FleetOptions:
        """`replicas`: "4", or "1-4" for one to four. ArgumentError."""
        first, _, last = replicas.partition("-")
        n_min, n_max = (int(n) if n.isdecimal() else 0 for n in (first, last or first))
        if not 1 <= n_min <= n_max <= REPLICAS_MAX:
            limit = f'a number of 1 to {REPLICAS_MAX}, or two as in "1-4"'
            raise ArgumentError("replicas", replicas, limit)
        return cls(min_replicas=n_min, max_replicas=n_max, **more)


def engines(open_app: OpenApp, options: FleetOptions, server: ServerOptions) -> serve.Application:
    """The deployment `engine`: replicas with an engine each."""
    settings: dict[str, Any] = {
        "name": "engine",
        "max_ongoing_requests": options.max_open,
        "ray_actor_options": {"num_cpus": 1, "num_gpus": options.gpus_per_replica},
        "graceful_shutdown_timeout_s": server.drain_timeout,
        "health_check_period_s": HEALTH_SECONDS,
        "health_check_timeout_s": SILENT_SECONDS,
        "request_router_config": RequestRouterConfig(
            request_router_class=FleetRouter,
            request_router_kwargs={"router": options.router},
            request_routing_stats_period_s=REPORT_SECONDS,
        ),
    }
    if options.min_replicas < options.max_replicas:
        settings["autoscaling_config"] = {
            "min_replicas": options.min_replicas,
            "max_replicas": options.max_replicas,
            "target_ongoing_requests": options.n_seq_max,
        }
    else:
        settings["num_replicas"] = options.min_replicas
    return serve.deployment(Replica).options(**settings).bind(open_app)


def application(
    open_app: OpenApp, options: FleetOptions, server: ServerOptions
) -> serve.Application:
    """The deployments `front` and `engine`, behind Ray's own HTTP proxies."""
    front = serve.deployment(Ingress).options(name="front", max_ongoing_requests=100_000)
    return front.bind(engines(open_app, options, server), server)


class Ingress:
    """The deployment `front`."""

    def __init__(self, handle: Any, options: ServerOptions) -> None:
        self._front = Front(handle, options)

    async def __call__(self, request: Request) -> Response:
        return Passed(self._front)


class Passed(Response):
    """The answer of another ASGI application."""

    def __init__(self, app: Any) -> None:
        super().__init__()
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._app(scope, receive, send)


@contextmanager
def running(open_app: OpenApp, options: FleetOptions, server: ServerOptions) -> Iterator[Front]:
    """Replicas that run, on the Ray cluster of `RAY_ADDRESS` or one of this machine, and a front
    for an event loop of this process. Afterwards they are gone."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # else all others go before replicas
    if options.n_gpus is not None:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # would name other GPUs
    here = not os.environ.get("RAY_ADDRESS")
    own: dict[str, Any] = {}
    if here:  # not one that `ray start` has made on this machine
        cpus = max(options.max_replicas, usable_cores())
        own = {
            "address": "local", "num_cpus": cpus, "num_gpus": options.n_gpus,
            "include_dashboard": False, "_node_ip_address": LOOPBACK,
        }  # fmt: skip
    ray.init(log_to_driver=False, **own)
    try:
        serve.start(proxy_location="Disabled")
        app = engines(open_app, options, server)
        handle = serve.run(app, name=APPLICATION, route_prefix=None)
        yield Front(handle, server)
    finally:
        if here:
            serve.shutdown()
        else:
            serve.delete(APPLICATION)
        ray.shutdown()
