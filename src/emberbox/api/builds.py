"""Template builds: their status and logs. Starting one answers 501 until the build steps are there."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Path, Query

from emberbox.api.auth import Control, Team
from emberbox.api.errors import declared
from emberbox.api.fields import PathText, UnixMilliseconds
from emberbox.api.router import Router
from emberbox.api.template_models import (
    BuildInfo,
    BuildLogs,
    FileUpload,
    LogLevel,
    NewTemplateV1,
    NewTemplateV2,
    NewTemplateV3,
    RequestedBuild,
    StartBuild,
    TemplateLegacy,
    build_info,
    build_log_entry,
    levels_from,
)
from emberbox.control.errors import NotBuilt

router = Router(tags=["templates"])

_NOT_BUILT = "template builds are not built yet; use the templates that come with the installation"

BuildID = Annotated[str, Path(max_length=64, description="Identifier of the build")]


@router.get("/templates/{templateID}/builds/{buildID}/status", responses=declared(400, 401, 404, 500))
async def status(
    templateID: PathText,
    buildID: BuildID,
    plane: Control,
    team: Team,
    logsOffset: Annotated[int, Query(ge=0, lt=2**31, description="Position of the first log entry")] = 0,
    limit: Annotated[int, Query(ge=0, le=100)] = 100,
    level: LogLevel | None = None,
) -> BuildInfo:
    """How a build gets on, with its log from an offset on."""
    _, build = await plane.templates.build(team, templateID, buildID)
    entries = await plane.templates.build_logs(build, position=logsOffset, limit=limit, levels=levels_from(level))
    return build_info(build, entries)


@router.get("/templates/{templateID}/builds/{buildID}/logs", responses=declared(400, 401, 404, 500))
async def logs(
    templateID: PathText,
    buildID: BuildID,
    plane: Control,
    team: Team,
    cursor: Annotated[UnixMilliseconds | None, Query(description="From this time, unix milliseconds")] = None,
    limit: Annotated[int, Query(ge=0, le=100)] = 100,
    direction: Literal["forward", "backward"] = "forward",
    level: LogLevel | None = None,
    source: Annotated[Literal["temporary", "persistent"] | None, Query(description="Both are the same here")] = None,
) -> BuildLogs:
    """A build's log."""
    _, build = await plane.templates.build(team, templateID, buildID)
    entries = await plane.templates.build_logs_by_time(
        build,
        cursor_ms=cursor,
        limit=limit,
        backward=direction == "backward",
        levels=levels_from(level),
    )
    return BuildLogs(logs=[build_log_entry(entry) for entry in entries])


@router.post("/v3/templates", status_code=202, responses=declared(400, 401, 403, 500, 501))
async def create_v3(body: NewTemplateV3, team: Team) -> RequestedBuild:
    """Ask for a build."""
    raise NotBuilt(_NOT_BUILT)


@router.post("/v2/templates", status_code=202, responses=declared(400, 401, 500, 501), deprecated=True)
async def create_v2(body: NewTemplateV2, team: Team) -> TemplateLegacy:
    """Ask for a build."""
    raise NotBuilt(_NOT_BUILT)


@router.post("/templates", status_code=202, responses=declared(400, 401, 500, 501), deprecated=True)
async def create_v1(body: NewTemplateV1, team: Team) -> TemplateLegacy:
    """Ask for a build."""
    raise NotBuilt(_NOT_BUILT)


@router.post("/templates/{templateID}", status_code=202, responses=declared(400, 401, 500, 501), deprecated=True)
async def rebuild_v1(templateID: PathText, body: NewTemplateV1, team: Team) -> TemplateLegacy:
    """Ask for another build."""
    raise NotBuilt(_NOT_BUILT)


@router.get("/templates/{templateID}/files/{hash}", status_code=201, responses=declared(400, 401, 404, 500, 501))
async def upload_link(templateID: PathText, hash: Annotated[str, Path(max_length=128)], team: Team) -> FileUpload:
    """Where to upload the files of a COPY step."""
    raise NotBuilt(_NOT_BUILT)


@router.post(
    "/templates/{templateID}/builds/{buildID}",
    status_code=202,
    responses=declared(400, 401, 500, 501),
    deprecated=True,
)
async def start_v1(templateID: PathText, buildID: BuildID, team: Team) -> None:
    """Start a build."""
    raise NotBuilt(_NOT_BUILT)


@router.post("/v2/templates/{templateID}/builds/{buildID}", status_code=202, responses=declared(400, 401, 500, 501))
async def start_v2(templateID: PathText, buildID: BuildID, body: StartBuild, team: Team) -> None:
    """Start a build."""
    raise NotBuilt(_NOT_BUILT)
