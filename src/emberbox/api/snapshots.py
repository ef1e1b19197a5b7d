"""Snapshots and forks."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query, Response

from emberbox.api.auth import Control, Team, Who
from emberbox.api.errors import declared, error_body
from emberbox.api.fields import SandboxID, Text
from emberbox.api.paging import NEXT_TOKEN_HEADER, Limit, NextToken, decode, encode
from emberbox.api.router import Router
from emberbox.api.sandbox_models import ForkRequest, ForkResult, SnapshotInfo, SnapshotRequest, sandbox
from emberbox.control.errors import ControlError
from emberbox.control.names import DEFAULT_TAG
from emberbox.control.snapshots import SnapshotView

router = Router()


@router.post(
    "/sandboxes/{sandboxID}/snapshots",
    status_code=201,
    tags=["sandboxes"],
    responses=declared(400, 401, 404, 409, 500, 503, 504),
)
async def create(sandboxID: SandboxID, body: SnapshotRequest, plane: Control, team: Team) -> SnapshotInfo:
    """Save a sandbox; new ones can be created from it."""
    return _info(await plane.snapshots.create(team, sandboxID, name=body.name, memory=body.memory))


@router.get("/snapshots", tags=["snapshots"], responses=declared(400, 401, 500))
async def list_page(
    response: Response,
    plane: Control,
    team: Team,
    sandboxID: Annotated[Text | None, Query(max_length=64, description="Of this sandbox")] = None,
    name: Annotated[str | None, Query(max_length=300, description="Name or ID, with or without a tag")] = None,
    limit: Limit = 100,
    nextToken: NextToken = None,
) -> list[SnapshotInfo]:
    """Snapshots of the team, newest first."""
    page = await plane.snapshots.page(team, sandbox_id=sandboxID, name=name, limit=limit, after=decode(nextToken))
    if page.more:
        last = page.snapshots[-1].build
        response.headers[NEXT_TOKEN_HEADER] = encode((last.created_at, last.id))
    return [_info(snapshot) for snapshot in page.snapshots]


@router.post(
    "/sandboxes/{sandboxID}/fork",
    status_code=201,
    tags=["sandboxes"],
    responses=declared(400, 401, 404, 409, 500, 501, 503, 504),
)
async def fork(sandboxID: SandboxID, plane: Control, who: Who, body: ForkRequest | None = None) -> list[ForkResult]:
    """Start copies of a running sandbox; one result each."""
    asked = body or ForkRequest()
    if not who.may("sandboxes:exec") and not (await plane.sandboxes.get(who.team, sandboxID)).secure:
        # Anybody may run commands in the copies.
        who.check("sandboxes:exec")
    results = await plane.snapshots.fork(
        who.team, sandboxID, timeout=asked.timeout, count=asked.count, key=who.key_limit
    )
    return [
        ForkResult(error=error_body(result))
        if isinstance(result, ControlError)
        else ForkResult(sandbox=sandbox(result, plane, who))
        for result in results
    ]


def _info(snapshot: SnapshotView) -> SnapshotInfo:
    tags = snapshot.tags or [DEFAULT_TAG]
    names = [f"{namespace}/{alias}:{tag}" for namespace, alias in snapshot.names for tag in tags]
    return SnapshotInfo(snapshotID=names[0] if names else f"{snapshot.template.id}:{tags[0]}", names=names)
