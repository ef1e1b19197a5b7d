"""The published tools: one for each operation of the catalogue, through the handler of its REST route."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal

from fastapi import Response
from pydantic import BaseModel, Field

from emberbox.api import lifecycle, sandboxes, snapshots
from emberbox.api.capabilities.catalogue import OPERATIONS, Operation
from emberbox.api.fields import UnixMilliseconds, UnixSeconds
from emberbox.api.mcp.tool import Call, Input, Tool
from emberbox.api.sandbox_models import (
    ConnectRequest,
    ListedSandbox,
    NewSandbox,
    PauseRequest,
    RefreshRequest,
    ResumeRequest,
    Sandbox,
    SandboxDetail,
    SandboxesWithMetrics,
    SandboxLogs,
    SandboxMetric,
    SnapshotInfo,
    SnapshotRequest,
    TimeoutRequest,
    TimeoutSeconds,
    sandbox_detail,
)

SandboxID = Annotated[str, Field(max_length=64, description="Identifier of the sandbox")]

# ---- arguments: the models of the REST bodies, with the parameters of path and query beside their fields


class ListSandboxes(Input):
    metadata: str | None = None


class CreateSandbox(Input, NewSandbox):
    # 15 seconds, the default of the REST operation, are over before an agent has thought.
    timeout: TimeoutSeconds = 300
    secure: bool | None = True


class OneSandbox(Input):
    sandboxID: SandboxID


class PauseSandbox(OneSandbox, PauseRequest):
    pass


class ResumeSandbox(OneSandbox, ResumeRequest):
    pass


class ConnectSandbox(OneSandbox, ConnectRequest):
    pass


class SnapshotSandbox(OneSandbox, SnapshotRequest):
    pass


class SetSandboxTimeout(OneSandbox, TimeoutRequest):
    pass


class RefreshSandbox(OneSandbox, RefreshRequest):
    pass


class GetSandboxMetrics(OneSandbox):
    start: UnixSeconds | None = None
    end: UnixSeconds | None = None


class GetSandboxLogs(OneSandbox):
    start: UnixMilliseconds | None = None
    limit: Annotated[int, Field(ge=0, le=1000)] = 1000


class GetFleetMetrics(Input):
    sandbox_ids: str


# ---- answers: the REST operations' own; structured content has to be an object, so lists and silence get one


class SandboxList(BaseModel):
    sandboxes: list[ListedSandbox]


class SandboxMetrics(BaseModel):
    metrics: list[SandboxMetric]


class Done(BaseModel):
    """For operations whose REST answer is empty."""

    sandboxID: str
    done: Literal["killed", "paused", "timeout set", "refreshed"]


# ---- what they do


async def _list_sandboxes(call: Call, asked: ListSandboxes) -> SandboxList:
    return SandboxList(sandboxes=await sandboxes.list_running(call.plane, call.team, asked.metadata))


async def _create_sandbox(call: Call, asked: CreateSandbox) -> Sandbox:
    return await sandboxes.create(asked, call.plane, call.who)


async def _get_sandbox(call: Call, asked: OneSandbox) -> SandboxDetail:
    record = await call.plane.sandboxes.get(call.team, asked.sandboxID)
    return sandbox_detail(record, call.plane, call.who)


async def _kill_sandbox(call: Call, asked: OneSandbox) -> Done:
    await sandboxes.kill(asked.sandboxID, call.plane, call.team)
    return Done(sandboxID=asked.sandboxID, done="killed")


async def _pause_sandbox(call: Call, asked: PauseSandbox) -> Done:
    await lifecycle.pause(asked.sandboxID, call.plane, call.team, asked)
    return Done(sandboxID=asked.sandboxID, done="paused")


async def _resume_sandbox(call: Call, asked: ResumeSandbox) -> Sandbox:
    return await lifecycle.resume(asked.sandboxID, call.plane, call.who, asked)


async def _connect_sandbox(call: Call, asked: ConnectSandbox) -> Sandbox:
    return await lifecycle.connect(asked.sandboxID, asked, Response(), call.plane, call.who)


async def _snapshot_sandbox(call: Call, asked: SnapshotSandbox) -> SnapshotInfo:
    return await snapshots.create(asked.sandboxID, asked, call.plane, call.team)


async def _set_sandbox_timeout(call: Call, asked: SetSandboxTimeout) -> Done:
    await lifecycle.set_timeout(asked.sandboxID, asked, call.plane, call.team)
    return Done(sandboxID=asked.sandboxID, done="timeout set")


async def _refresh_sandbox(call: Call, asked: RefreshSandbox) -> Done:
    await lifecycle.refresh(asked.sandboxID, call.plane, call.team, asked)
    return Done(sandboxID=asked.sandboxID, done="refreshed")


async def _get_sandbox_metrics(call: Call, asked: GetSandboxMetrics) -> SandboxMetrics:
    found = await sandboxes.metrics(asked.sandboxID, call.plane, call.team, asked.start, asked.end)
    return SandboxMetrics(metrics=found)


async def _get_sandbox_logs(call: Call, asked: GetSandboxLogs) -> SandboxLogs:
    return await sandboxes.logs(asked.sandboxID, call.plane, call.team, asked.start, asked.limit)


async def _get_fleet_metrics(call: Call, asked: GetFleetMetrics) -> SandboxesWithMetrics:
    return await sandboxes.metrics_of_many(call.plane, call.team, [asked.sandbox_ids])


_Run = Callable[[Call, Any], Awaitable[BaseModel]]
_PARTS: dict[str, tuple[type[BaseModel], type[BaseModel], _Run]] = {
    "list-sandboxes": (ListSandboxes, SandboxList, _list_sandboxes),
    "create-sandbox": (CreateSandbox, Sandbox, _create_sandbox),
    "get-sandbox": (OneSandbox, SandboxDetail, _get_sandbox),
    "kill-sandbox": (OneSandbox, Done, _kill_sandbox),
    "pause-sandbox": (PauseSandbox, Done, _pause_sandbox),
    "resume-sandbox": (ResumeSandbox, Sandbox, _resume_sandbox),
    "connect-sandbox": (ConnectSandbox, Sandbox, _connect_sandbox),
    "snapshot-sandbox": (SnapshotSandbox, SnapshotInfo, _snapshot_sandbox),
    "set-sandbox-timeout": (SetSandboxTimeout, Done, _set_sandbox_timeout),
    "refresh-sandbox": (RefreshSandbox, Done, _refresh_sandbox),
    "get-sandbox-metrics": (GetSandboxMetrics, SandboxMetrics, _get_sandbox_metrics),
    "get-sandbox-logs": (GetSandboxLogs, SandboxLogs, _get_sandbox_logs),
    "get-fleet-metrics": (GetFleetMetrics, SandboxesWithMetrics, _get_fleet_metrics),
}


def _published(operation: Operation) -> Tool:
    arguments, answer, run = _PARTS[operation.name]
    return Tool(
        name=operation.tool,
        title=operation.title,
        description=operation.description,
        input=arguments,
        output=answer,
        run=run,
        read_only=operation.read_only,
        destructive=operation.destructive,
        idempotent=operation.idempotent,
        scope="sandboxes:read" if operation.read_only else "sandboxes:write",
        descriptions={parameter.name: parameter.description for parameter in operation.parameters},
    )


PUBLISHED = tuple(_published(operation) for operation in OPERATIONS)
