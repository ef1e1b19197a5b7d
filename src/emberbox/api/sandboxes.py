"""Sandboxes: create, list, get, kill, their logs and metrics."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Literal
from urllib.parse import parse_qsl, unquote

from fastapi import Header, Query, Request, Response

from emberbox.api.auth import Control, Team, Who
from emberbox.api.errors import declared
from emberbox.api.fields import SandboxID, UnixMilliseconds, UnixSeconds
from emberbox.api.linked import linked, wants_linked
from emberbox.api.logs import log_entry, log_line
from emberbox.api.paging import NEXT_TOKEN_HEADER, Limit, NextToken, decode, encode
from emberbox.api.router import Router
from emberbox.api.sandbox_models import (
    ListedSandbox,
    NewSandbox,
    NewSandboxV2,
    Sandbox,
    SandboxDetail,
    SandboxesWithMetrics,
    SandboxLogs,
    SandboxLogsV2,
    SandboxMetric,
    SandboxState,
    listed_sandbox,
    sandbox,
    sandbox_detail,
    sandbox_metric,
)
from emberbox.control import sandboxes as control
from emberbox.control.errors import Invalid
from emberbox.control.sandboxes import IdempotencyKey

router = Router(tags=["sandboxes"])

MetadataFilter = Annotated[
    str | None,
    Query(description='Metadata that must match, e.g. "user=abc&app=prod", keys and values URL-encoded'),
]
LogLevel = Literal["debug", "info", "warn", "error"]
Start = Annotated[UnixSeconds | None, Query(description="Start of the interval, unix seconds")]
End = Annotated[UnixSeconds | None, Query(description="End of the interval, unix seconds")]


@router.post("/sandboxes", status_code=201, responses=declared(400, 401, 403, 404, 500, 503, 504))
async def create(body: NewSandbox, plane: Control, who: Who) -> Sandbox:
    """Start a sandbox."""
    if not body.secure:
        # Anybody may run commands in it, and so may whoever made it.
        who.check("sandboxes:exec")
    record = await plane.sandboxes.create(who.team, _wanted(body, secure=bool(body.secure)), key=who.key_limit)
    return sandbox(record, plane, who)


@router.post("/v2/sandboxes", status_code=201, responses=declared(400, 401, 403, 404, 409, 422, 500, 503, 504))
async def create_v2(
    body: NewSandboxV2,
    plane: Control,
    who: Who,
    idempotency_key: Annotated[str | None, Header(alias="Idempotency-Key")] = None,
) -> Sandbox:
    """Start a secured sandbox. The same `Idempotency-Key` and body give the same sandbox."""
    idempotency = (
        IdempotencyKey.of(idempotency_key, body.model_dump(exclude_unset=True)) if idempotency_key is not None else None
    )
    record = await plane.sandboxes.create(who.team, _wanted(body, secure=True), idempotency, key=who.key_limit)
    return sandbox(record, plane, who)


@router.get("/sandboxes", responses=declared(400, 401, 500), deprecated=True)
async def list_running(plane: Control, team: Team, metadata: MetadataFilter = None) -> list[ListedSandbox]:
    """Every running sandbox, newest first."""
    page = await plane.sandboxes.page(
        team,
        states=("running",),
        metadata=_metadata(metadata),
        template=None,
        started_after=None,
        descending=True,
        limit=None,
        after=None,
    )
    return [listed_sandbox(record) for record in page.sandboxes]


@router.get("/v2/sandboxes", responses=declared(400, 401, 500))
async def list_page(
    response: Response,
    plane: Control,
    team: Team,
    metadata: MetadataFilter = None,
    state: Annotated[list[str] | None, Query(description="running, paused or both, comma-separated")] = None,
    order: Annotated[Literal["asc", "desc"], Query(description="By start time")] = "desc",
    startedAfter: Annotated[datetime | None, Query(description="Started at or after this time")] = None,
    template: Annotated[str | None, Query(max_length=300, description="Template ID or alias")] = None,
    nextToken: NextToken = None,
    limit: Limit = 100,
) -> list[ListedSandbox]:
    """Sandboxes that run or are paused, by page."""
    states = _states(state)
    filters = _metadata(metadata)
    started_after = _milliseconds(startedAfter)
    page = await plane.sandboxes.page(
        team,
        states=states,
        metadata=filters,
        template=template,
        started_after=started_after,
        descending=order == "desc",
        limit=limit,
        after=decode(nextToken),
    )
    if page.more:
        last = page.sandboxes[-1]
        response.headers[NEXT_TOKEN_HEADER] = encode((last.started_at, last.id))
    if "running" in states:
        total = await plane.sandboxes.count_running(
            team, metadata=filters, template=template, started_after=started_after
        )
        response.headers["X-Total-Running"] = str(total)
    return [listed_sandbox(record) for record in page.sandboxes]


@router.get("/sandboxes/metrics", responses=declared(400, 401, 500))
async def metrics_of_many(
    plane: Control,
    team: Team,
    sandbox_ids: Annotated[list[str], Query(description="Comma-separated list of sandbox IDs")],
) -> SandboxesWithMetrics:
    """The newest metrics of each sandbox that has some."""
    ids = [part.strip() for entry in sandbox_ids for part in entry.split(",") if part.strip()]
    if len(ids) > 100:
        raise Invalid(f"sandbox_ids has {len(ids)} entries; 100 are allowed")
    newest = await plane.metrics.newest(team, ids)
    return SandboxesWithMetrics(sandboxes={record.sandbox_id: sandbox_metric(record) for record in newest})


@router.get("/sandboxes/{sandboxID}", responses=declared(401, 404, 500), response_model=SandboxDetail)
async def get(sandboxID: SandboxID, plane: Control, who: Who, request: Request) -> SandboxDetail | Response:
    """A sandbox that runs or is paused; as JSON-LD where that is asked for."""
    record = await plane.sandboxes.get(who.team, sandboxID)
    detail = sandbox_detail(record, plane, who)
    return linked(request, "Sandbox", detail) if wants_linked(request) else detail


@router.delete("/sandboxes/{sandboxID}", status_code=204, responses=declared(401, 404, 500, 503))
async def kill(sandboxID: SandboxID, plane: Control, team: Team) -> None:
    """End a sandbox, whatever its state."""
    await plane.lifecycle.kill(team, sandboxID)


@router.get("/sandboxes/{sandboxID}/metrics", responses=declared(400, 401, 404, 500))
async def metrics(
    sandboxID: SandboxID, plane: Control, team: Team, start: Start = None, end: End = None
) -> list[SandboxMetric]:
    """Metrics of an interval, oldest first; without one, of the last 24 hours."""
    found = await plane.metrics.of_sandbox(team, sandboxID, start=start, end=end)
    return [sandbox_metric(record) for record in found]


@router.get("/sandboxes/{sandboxID}/logs", responses=declared(400, 401, 404, 500), deprecated=True)
async def logs(
    sandboxID: SandboxID,
    plane: Control,
    team: Team,
    start: Annotated[UnixMilliseconds | None, Query(description="From this time on, unix milliseconds")] = None,
    limit: Annotated[int, Query(ge=0, lt=2**31)] = 1000,
) -> SandboxLogs:
    """Log entries, oldest first."""
    entries = await plane.logs.read(team, sandboxID, cursor_ms=start, limit=min(limit, 1000))
    return SandboxLogs(logs=[log_line(entry) for entry in entries], logEntries=[log_entry(entry) for entry in entries])


@router.get("/v2/sandboxes/{sandboxID}/logs", responses=declared(400, 401, 404, 500))
async def logs_v2(
    sandboxID: SandboxID,
    plane: Control,
    team: Team,
    cursor: Annotated[UnixMilliseconds | None, Query(description="From this time, unix milliseconds")] = None,
    limit: Annotated[int, Query(ge=0, le=1000)] = 1000,
    direction: Literal["forward", "backward"] = "forward",
    level: Annotated[LogLevel | None, Query(description="The lowest level wanted")] = None,
    search: Annotated[str | None, Query(max_length=256, description="Substring of the message")] = None,
) -> SandboxLogsV2:
    """Log entries in the asked direction."""
    entries = await plane.logs.read(
        team,
        sandboxID,
        cursor_ms=cursor,
        limit=limit,
        backward=direction == "backward",
        level=level or "",
        search=search or "",
    )
    return SandboxLogsV2(logs=[log_entry(entry) for entry in entries])


def _wanted(body: NewSandboxV2, *, secure: bool) -> control.NewSandbox:
    return control.NewSandbox(
        template=body.templateID,
        timeout=body.timeout,
        secure=secure,
        auto_pause=body.autoPause,
        auto_pause_memory=body.autoPauseMemory,
        auto_resume=body.autoResume is not None and body.autoResume.enabled,
        allow_internet=body.allow_internet_access,
        network=body.network.model_dump(exclude_none=True) if body.network else {},
        metadata=body.metadata or {},
        env_vars=body.envVars or {},
        volume_mounts=tuple((mount.name, mount.path) for mount in body.volumeMounts or ()),
        iam=bool(body.iam and body.iam.tokens),
    )


def _metadata(text: str | None) -> tuple[tuple[str, str], ...]:
    """`a=b&c=d` as pairs. Clients encode keys and values twice; once is understood too."""
    if not text:
        return ()
    try:
        pairs = parse_qsl(text, keep_blank_values=True, strict_parsing=True, max_num_fields=100)
    except ValueError as error:
        raise Invalid(f"metadata {text[:200]!r} is not a list of key=value pairs joined by '&'") from error
    found = tuple((unquote(key), unquote(value)) for key, value in pairs)
    if any("\0" in part for pair in found for part in pair):
        raise Invalid("metadata must not contain a NUL character")
    return found


def _states(values: list[str] | None) -> tuple[SandboxState, ...]:
    states: list[SandboxState] = []
    for name in (part.strip() for entry in values or () for part in entry.split(",")):
        match name:
            case "running" | "paused":
                states.append(name)
            case "":
                continue
            case _:
                raise Invalid(f"state {name[:100]!r} is not running or paused")
    return tuple(states) or ("running", "paused")


def _milliseconds(moment: datetime | None) -> int | None:
    if moment is None:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    try:
        return max(0, int(moment.timestamp() * 1000))
    except (OverflowError, ValueError) as error:
        raise Invalid("startedAfter is out of range") from error
