"""Templates: lists, one with its builds, names, visibility, deletion."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query, Response

from emberbox.api.auth import Control, Team
from emberbox.api.errors import declared
from emberbox.api.fields import PathText
from emberbox.api.paging import NEXT_TOKEN_HEADER, Limit, NextToken, decode, encode
from emberbox.api.router import Router
from emberbox.api.template_models import (
    AliasFound,
    Template,
    TemplateUpdate,
    TemplateUpdated,
    TemplateWithBuilds,
    full_names,
    template,
    template_with_builds,
)
from emberbox.control.accounts import check_team_id

router = Router(tags=["templates"])

TeamID = Annotated[str | None, Query(max_length=64, description="Identifier of the team")]


@router.get("/templates", responses=declared(400, 401, 403, 500), deprecated=True)
async def list_all(plane: Control, team: Team, teamID: TeamID = None) -> list[Template]:
    """Every template of the team, newest first."""
    check_team_id(team, teamID)
    return [template(view) for view in await plane.templates.page(team)]


@router.get("/v2/templates", responses=declared(400, 401, 403, 500))
async def list_page(
    response: Response,
    plane: Control,
    team: Team,
    teamID: TeamID = None,
    nextToken: NextToken = None,
    limit: Limit = 100,
) -> list[Template]:
    """Templates of the team by page, newest first."""
    check_team_id(team, teamID)
    views = await plane.templates.page(team, limit=limit + 1, after=decode(nextToken))
    if len(views) > limit:
        last = views[limit - 1].template
        response.headers[NEXT_TOKEN_HEADER] = encode((last.created_at, last.id))
    return [template(view) for view in views[:limit]]


@router.get("/default-templates", responses=declared(401, 500))
async def list_defaults(plane: Control, team: Team) -> list[Template]:
    """The templates that come with the installation."""
    return [template(view) for view in await plane.templates.defaults(team)]


@router.get("/templates/aliases/{alias}", responses=declared(400, 401, 403, 404, 500))
async def alias(alias: PathText, plane: Control, team: Team) -> AliasFound:
    """Whether there is a template of this name."""
    found = await plane.templates.alias_exists(team, alias)
    return AliasFound(templateID=found.id, public=found.public)


@router.get("/templates/{templateID}", responses=declared(400, 401, 404, 500))
async def get(
    templateID: PathText,
    response: Response,
    plane: Control,
    team: Team,
    nextToken: NextToken = None,
    limit: Limit = 100,
) -> TemplateWithBuilds:
    """A template with its builds by page, newest first."""
    found = await plane.templates.find(team, templateID)
    builds = await plane.templates.builds(found, limit=limit + 1, after=decode(nextToken))
    if len(builds) > limit:
        last = builds[limit - 1]
        response.headers[NEXT_TOKEN_HEADER] = encode((last.created_at, last.id))
    names = await plane.templates.names(found.id)
    return template_with_builds(found, names, builds[:limit], owned=found.team_id == team.id)


@router.delete("/templates/{templateID}", status_code=204, responses=declared(400, 401, 403, 404, 500))
async def delete(templateID: PathText, plane: Control, team: Team) -> None:
    """Delete a template or a snapshot."""
    await plane.templates.delete(team, templateID)


@router.patch("/templates/{templateID}", responses=declared(400, 401, 403, 404, 500), deprecated=True)
async def update(templateID: PathText, body: TemplateUpdate, plane: Control, team: Team) -> TemplateUpdated:
    """Make a template public, or not."""
    return await update_v2(templateID, body, plane, team)


@router.patch("/v2/templates/{templateID}", responses=declared(400, 401, 403, 404, 500))
async def update_v2(templateID: PathText, body: TemplateUpdate, plane: Control, team: Team) -> TemplateUpdated:
    """Make a template public, or not."""
    found = await plane.templates.find_own(team, templateID)
    if body.public is not None:
        await plane.templates.set_public(found, body.public)
    return TemplateUpdated(names=full_names(await plane.templates.names(found.id)))
