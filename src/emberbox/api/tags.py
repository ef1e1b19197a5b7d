"""Tags of templates."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Query

from emberbox.api.auth import Control, Team
from emberbox.api.errors import declared
from emberbox.api.fields import PathText
from emberbox.api.paging import Position, decode, encode
from emberbox.api.router import Router
from emberbox.api.template_models import (
    AssignedTags,
    AssignTags,
    DeleteTags,
    TagAssignments,
    TagExists,
    TagGroup,
    TagGroups,
    TagsCount,
    TemplateTag,
    tag_assignment,
    template_tag,
)
from emberbox.control.names import check_tag
from emberbox.control.tags import Assignment

router = Router(tags=["tags"])

Cursor = Annotated[str | None, Query(max_length=512)]
Sort = Literal["latest_asc", "latest_desc", "name_asc", "name_desc"]


@router.post("/templates/tags", status_code=201, responses=declared(400, 401, 403, 404, 500))
async def assign(body: AssignTags, plane: Control, team: Team) -> AssignedTags:
    """Give tags to the build that `target` names."""
    tags, build_id = await plane.tags.assign(team, body.target, body.tags)
    return AssignedTags(tags=tags, buildID=build_id)


@router.delete("/templates/tags", status_code=204, responses=declared(400, 401, 403, 404, 500))
async def delete(body: DeleteTags, plane: Control, team: Team) -> None:
    """Take tags from a template."""
    await plane.tags.delete(team, body.name, body.tags)


@router.get("/templates/{templateID}/tags", responses=declared(400, 401, 403, 404, 500))
async def list_all(templateID: PathText, plane: Control, team: Team) -> list[TemplateTag]:
    """Every tag of a template with the build that it means."""
    return [template_tag(record) for record in await plane.tags.current(team, templateID)]


@router.get("/templates/{templateID}/tags/count", responses=declared(400, 401, 403, 404, 500))
async def count(templateID: PathText, plane: Control, team: Team) -> TagsCount:
    return TagsCount(total=len(await plane.tags.current(team, templateID)))


@router.get("/templates/{templateID}/tags/exists", responses=declared(400, 401, 403, 404, 500))
async def exists(
    templateID: PathText, plane: Control, team: Team, tag: Annotated[str, Query(max_length=300)]
) -> TagExists:
    normal = check_tag(tag)
    current = await plane.tags.current(team, templateID)
    return TagExists(exists=any(record.tag == normal for record in current), normalizedTag=normal)


@router.get("/templates/{templateID}/tags/groups", responses=declared(400, 401, 403, 404, 500))
async def groups(
    templateID: PathText,
    plane: Control,
    team: Team,
    assignmentLimit: Annotated[int, Query(ge=1, le=100)] = 6,
    tagsLimit: Annotated[int, Query(ge=1, le=100)] = 25,
    tagsCursor: Cursor = None,
    search: Annotated[str | None, Query(max_length=128)] = None,
    sort: Sort = "latest_desc",
) -> TagGroups:
    """Tags with their latest assignments, by page."""
    by_tag: dict[str, list[Assignment]] = {}
    for assignment in await plane.tags.assignments(team, templateID):
        by_tag.setdefault(assignment.tag.tag, []).append(assignment)
    by_name, descending = sort.startswith("name"), sort.endswith("desc")

    def place(name: str) -> Position:
        return 0 if by_name else by_tag[name][0].tag.assigned_at, name

    names = sorted((name for name in by_tag if search is None or search.lower() in name), key=place, reverse=descending)
    if (after := decode(tagsCursor)) is not None:
        # By place, not by name: the tag that the page before ended with may be gone.
        names = [name for name in names if (place(name) < after if descending else place(name) > after)]
    shown = names[:tagsLimit]
    return TagGroups(
        tags=[
            TagGroup(
                tag=name,
                assignments=[tag_assignment(one) for one in by_tag[name][:assignmentLimit]],
                hasMore=len(by_tag[name]) > assignmentLimit,
            )
            for name in shown
        ],
        nextCursor=encode(place(shown[-1])) if len(names) > tagsLimit else None,
    )


@router.get("/templates/{templateID}/tags/{tag}/assignments", responses=declared(400, 401, 403, 404, 500))
async def assignments(
    templateID: PathText,
    tag: PathText,
    plane: Control,
    team: Team,
    cursor: Cursor = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 50,
) -> TagAssignments:
    """What a tag meant over time, latest first, by page."""
    found = await plane.tags.assignments(team, templateID, tag=tag)
    position = decode(cursor)
    if position is not None:
        found = [one for one in found if (one.tag.assigned_at, one.tag.id) < position]
    shown = found[:limit]
    last = shown[-1].tag if len(found) > limit else None
    return TagAssignments(
        data=[tag_assignment(one) for one in shown],
        nextCursor=encode((last.assigned_at, last.id)) if last else None,
    )
