"""`/` and `/steps`: the live batch page and the feed that it polls."""

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from . import live
from .errors import ApiError, invalid, json_response
from .service import Service

STEPS_MAX = 512  # of one answer
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)


async def index(service: Service, request: Request) -> Response:
    """The live batch page."""
    _need_page(service)
    return HTMLResponse(live.page(), headers={"Content-Security-Policy": POLICY})


async def steps(service: Service, request: Request) -> Response:
    """The last steps, those that began after `since` (ms on the clock of `at`)."""
    _need_page(service)
    given = request.query_params.get("since", "-1")
    try:
        since = float(given)
    except ValueError:
        raise invalid("since", given, "must be a number") from None
    engine = service.engine
    trace = engine.trace(STEPS_MAX)
    new = trace[trace["t_start_ns"] / 1e6 > since + 5e-4]  # `at` is rounded
    stats = engine.stats()
    return json_response(
        {
            "server": service.id,
            "steps": live.steps_of(new),
            "n_slots": engine.n_seq_max,
            "n_cells": stats.kv_total,
            "stats": {
                "running": stats.running,
                "waiting": stats.waiting,
                "preemptions": stats.preemptions,
                "kv_cached": stats.kv_cached,
                "prefix_hit_rate": stats.prefix_hit_rate,
                "itl_ms": service.metrics.itl_ms(),
            },
        }
    )


def _need_page(service: Service) -> None:
    if not service.options.page:
        raise ApiError(404, "this server has no page")
