"""Whether the process is well, and its numbers."""

from __future__ import annotations

from dataclasses import asdict

from fastapi import Response
from prometheus_client import CONTENT_TYPE_LATEST, Gauge, generate_latest

from emberbox.api.auth import Control
from emberbox.api.errors import declared
from emberbox.api.router import Router
from emberbox.control.states import State
from emberbox.store import sandboxes as rows

router = Router()

_SANDBOXES = Gauge("emberbox_sandboxes", "Sandboxes that have not ended", ["state"])
_BUILDS = Gauge("emberbox_builds", "Builds that this process has queued or follows", ["state"])
_NODES = Gauge("emberbox_nodes_connected", "Nodes whose event stream is up")


@router.get("/health", status_code=204, responses=declared(401))
async def health() -> None:
    """The process answers."""


@router.get("/startup", include_in_schema=False)
async def startup(plane: Control) -> dict[str, dict[str, object]]:
    """How far the `base` template is, for `emberbox up`."""
    return {"base": asdict(plane.shipped.base.startup)}


@router.get("/metrics", include_in_schema=False)
async def metrics(plane: Control) -> Response:
    """Prometheus' text format."""
    counts = await rows.counts_by_state(plane.store)
    for state in State:
        if state is not State.ENDED:
            _SANDBOXES.labels(state.value).set(counts.get(state.value, 0))
    waiting, running = plane.builds.load
    _BUILDS.labels("waiting").set(waiting)
    _BUILDS.labels("building").set(running)
    _NODES.set(sum(node.connected.is_set() for node in plane.plane.nodes))
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)
