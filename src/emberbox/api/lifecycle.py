"""What happens to a sandbox after its creation: pause, resume, connect, deadlines, network, snapshots, forks."""

from __future__ import annotations

from typing import Any

from fastapi import Response

from emberbox.api.auth import Control, Team, Who
from emberbox.api.errors import declared
from emberbox.api.fields import SandboxID
from emberbox.api.router import Router
from emberbox.api.sandbox_models import (
    ConnectRequest,
    ConnectRequestV2,
    NetworkUpdate,
    PauseRequest,
    RefreshRequest,
    ResumeRequest,
    Sandbox,
    TimeoutRequest,
    sandbox,
)
from emberbox.control.accounts import Principal
from emberbox.control.service import ControlPlane

router = Router(tags=["sandboxes"])

_CONNECT: dict[int | str, dict[str, Any]] = {
    200: {"model": Sandbox, "description": "It was running"},
    201: {"model": Sandbox, "description": "It was resumed"},
}


@router.post("/sandboxes/{sandboxID}/pause", status_code=204, responses=declared(400, 401, 404, 409, 500, 503, 504))
async def pause(sandboxID: SandboxID, plane: Control, team: Team, body: PauseRequest | None = None) -> None:
    """Stop a sandbox; its deadline does not count meanwhile."""
    await plane.lifecycle.pause(team, sandboxID, memory=body.memory if body else True)


@router.post(
    "/sandboxes/{sandboxID}/resume",
    status_code=201,
    responses=declared(400, 401, 404, 409, 500, 503, 504),
    deprecated=True,
)
async def resume(sandboxID: SandboxID, plane: Control, who: Who, body: ResumeRequest | None = None) -> Sandbox:
    """Let a paused sandbox run again."""
    asked = body or ResumeRequest()
    record = await plane.lifecycle.resume(
        who.team, sandboxID, timeout=asked.timeout, auto_pause=asked.autoPause, memory=asked.memory
    )
    return sandbox(record, plane, who)


@router.post(
    "/sandboxes/{sandboxID}/connect",
    responses={**_CONNECT, **declared(400, 401, 404, 409, 500, 503, 504)},
)
async def connect(sandboxID: SandboxID, body: ConnectRequest, response: Response, plane: Control, who: Who) -> Sandbox:
    """A running sandbox: its deadline extended (200), or resumed (201)."""
    return await _connect(plane, who, sandboxID, body.timeout, body.memory, response)


@router.post(
    "/v2/sandboxes/{sandboxID}/connect",
    responses={**_CONNECT, **declared(400, 401, 404, 409, 500, 503, 504)},
)
async def connect_v2(
    sandboxID: SandboxID,
    response: Response,
    plane: Control,
    who: Who,
    body: ConnectRequestV2 | None = None,
) -> Sandbox:
    """A running sandbox: its deadline extended (200), or resumed (201)."""
    asked = body or ConnectRequestV2()
    return await _connect(plane, who, sandboxID, asked.timeout, asked.memory, response)


@router.post("/sandboxes/{sandboxID}/timeout", status_code=204, responses=declared(400, 401, 404, 409, 500, 503))
async def set_timeout(sandboxID: SandboxID, body: TimeoutRequest, plane: Control, team: Team) -> None:
    """Let a sandbox end this many seconds from now."""
    await plane.lifecycle.set_timeout(team, sandboxID, body.timeout)


@router.post("/sandboxes/{sandboxID}/refreshes", status_code=204, responses=declared(400, 401, 404, 409, 500, 503))
async def refresh(sandboxID: SandboxID, plane: Control, team: Team, body: RefreshRequest | None = None) -> None:
    """Keep a sandbox for at least this many seconds from now."""
    await plane.lifecycle.refresh(team, sandboxID, body.duration if body else None)


@router.put("/sandboxes/{sandboxID}/network", status_code=204, responses=declared(400, 401, 404, 409, 500, 503))
async def set_network(sandboxID: SandboxID, body: NetworkUpdate, plane: Control, team: Team) -> None:
    """Replace what a running sandbox may reach; a field that is left out is cleared."""
    egress = body.model_dump(exclude_none=True, exclude={"allow_internet_access"})
    await plane.lifecycle.set_network(team, sandboxID, egress=egress, allow_internet=body.allow_internet_access)


async def _connect(
    plane: ControlPlane, who: Principal, sandbox_id: str, timeout: int, memory: bool, response: Response
) -> Sandbox:
    connected = await plane.lifecycle.connect(who.team, sandbox_id, timeout=timeout, memory=memory)
    response.status_code = 201 if connected.resumed else 200
    return sandbox(connected.sandbox, plane, who)
