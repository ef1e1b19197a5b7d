"""Template builds: registering, uploading files, starting, their status and logs."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Path, Query, Request
from starlette.requests import ClientDisconnect

from emberbox.api.auth import Control, Team
from emberbox.api.errors import declared
from emberbox.api.fields import PathText, UnixMilliseconds
from emberbox.api.linked import address
from emberbox.api.router import Router
from emberbox.api.template_models import (
    BuildInfo,
    BuildLogs,
    FileUpload,
    LogLevel,
    NewTemplateV1,
    NewTemplateV2,
    NewTemplateV3,
    RateLimits,
    RequestedBuild,
    StartBuild,
    TemplateLegacy,
    asked_rates,
    build_info,
    build_log_entry,
    build_plan,
    levels_from,
    new_template,
    requested_build,
    template_legacy,
)
from emberbox.control.accounts import check_team_id
from emberbox.control.errors import Gone, Invalid
from emberbox.control.templates import TemplateView

router = Router(tags=["templates"])

_ENDED = "; Dockerfiles are built with `e2b template create` of @e2b/cli 2, or Template().from_dockerfile() of the SDKs"
_GONE_REGISTER = "this way to build ended: register with POST /v3/templates" + _ENDED
_GONE_START = "this way to build ended: start with POST /v2/templates/{templateID}/builds/{buildID}" + _ENDED

BuildID = Annotated[str, Path(max_length=64, description="Identifier of the build")]
FilesHash = Annotated[str, Path(max_length=128, description="Hash of the files")]


@router.post("/v3/templates", status_code=202, responses=declared(400, 401, 403, 409, 500))
async def create_v3(body: NewTemplateV3, plane: Control, team: Team) -> RequestedBuild:
    """Register a build, of a new template or of one of the team's."""
    check_team_id(team, body.teamID)
    return requested_build(await plane.builds.register(team, new_template(body)))


@router.post("/v2/templates", status_code=202, responses=declared(400, 401, 403, 409, 500), deprecated=True)
async def create_v2(body: NewTemplateV2, plane: Control, team: Team) -> TemplateLegacy:
    """Register a build, as earlier clients do."""
    check_team_id(team, body.teamID)
    made = await plane.builds.register(team, new_template(NewTemplateV3(**body.model_dump())))
    count = await plane.templates.count_builds(made.template)
    return template_legacy(TemplateView(made.template, made.names, made.build, count, owned=True))


@router.get("/templates/{templateID}/files/{hash}", status_code=201, responses=declared(400, 401, 403, 404, 500))
async def upload_link(
    templateID: PathText, hash: FilesHash, request: Request, plane: Control, team: Team
) -> FileUpload:
    """Whether the files of a COPY step are there, and where to upload them: a PUT without an API key."""
    await plane.templates.find_own(team, templateID)
    link = await plane.uploads.link(team.id, hash)
    return FileUpload(present=link.present, url=address(request) + link.target)


@router.put("/files/{teamID}/{hash}", status_code=200, responses=declared(400, 403, 413, 500, 507))
async def upload(
    teamID: Annotated[str, Path(max_length=64)],
    hash: FilesHash,
    request: Request,
    plane: Control,
    expires: Annotated[str, Query(max_length=20)],
    signature: Annotated[str, Query(max_length=128)],
) -> None:
    """Receive the files of a COPY step: a tar, compressed with gzip or not. The link authorises."""
    declared_length = request.headers.get("content-length", "")
    try:
        await plane.uploads.receive(
            teamID,
            hash,
            expires=expires,
            signature=signature,
            length=int(declared_length) if declared_length.isdigit() else None,
            body=request.stream(),
        )
    except ClientDisconnect:
        raise Invalid("the client went away during the upload") from None


@router.post(
    "/v2/templates/{templateID}/builds/{buildID}",
    status_code=202,
    responses=declared(400, 401, 403, 404, 409, 500, 503),
)
async def start_v2(templateID: PathText, buildID: BuildID, body: StartBuild, plane: Control, team: Team) -> None:
    """Start a registered build. It waits until there is room."""
    await plane.builds.start(team, templateID, buildID, build_plan(body))


@router.get("/templates/{templateID}/builds/{buildID}/status", responses=declared(400, 401, 403, 404, 500))
async def status(
    templateID: PathText,
    buildID: BuildID,
    plane: Control,
    team: Team,
    logsOffset: Annotated[int, Query(ge=0, lt=2**31, description="How many log entries to leave out")] = 0,
    limit: Annotated[int, Query(ge=0, le=100)] = 100,
    level: LogLevel | None = None,
) -> BuildInfo:
    """How a build gets on, with its log from an offset on."""
    # The status is read first: what ends a build is in the log before.
    _, build = await plane.templates.build(team, templateID, buildID)
    entries = await plane.templates.build_logs(
        build, offset=logsOffset, limit=limit, levels=levels_from(level) if level else None
    )
    return build_info(build, entries, await plane.templates.reason_logs(build))


@router.get("/templates/{templateID}/builds/{buildID}/logs", responses=declared(400, 401, 403, 404, 500))
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


# ---- templates that ship with Emberbox; the command line's own operations


@router.get("/shipped-templates", include_in_schema=False)
async def shipped(plane: Control, team: Team) -> list[str]:
    """Names of the templates that `emberbox template build` knows, besides `base`."""
    return sorted(plane.shipped.names)


@router.post("/shipped-templates/{name}/builds", status_code=202, include_in_schema=False)
async def build_shipped(
    name: PathText, plane: Control, team: Team, rates: Annotated[RateLimits, Query()], force: bool = False
) -> dict[str, str]:
    """Build a shipped template, or join the build that is under way. The team that owns them may."""
    plane.shipped.check_owner(team)
    build = await plane.shipped.build(name, rates=asked_rates(rates), force=force)
    return {"templateID": build.template_id, "buildID": build.id}


# ---- the first generation of builds, which E2B has ended


@router.post("/templates", status_code=202, responses=declared(400, 401, 410, 500), deprecated=True)
async def create_v1(body: NewTemplateV1, team: Team) -> TemplateLegacy:
    """Ended; answers 410."""
    raise Gone(_GONE_REGISTER)


@router.post("/templates/{templateID}", status_code=202, responses=declared(400, 401, 410, 500), deprecated=True)
async def rebuild_v1(templateID: PathText, body: NewTemplateV1, team: Team) -> TemplateLegacy:
    """Ended; answers 410."""
    raise Gone(_GONE_REGISTER)


@router.post(
    "/templates/{templateID}/builds/{buildID}",
    status_code=202,
    responses=declared(400, 401, 410, 500),
    deprecated=True,
)
async def start_v1(templateID: PathText, buildID: BuildID, team: Team) -> None:
    """Ended; answers 410."""
    raise Gone(_GONE_START)
