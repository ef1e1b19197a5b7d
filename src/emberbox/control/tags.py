"""Tags: names for builds of a template, each meaning the build it was assigned to last."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from emberbox.control.clock import now_ms
from emberbox.control.errors import Forbidden, Invalid, NotFound
from emberbox.control.names import DEFAULT_TAG, check_tag, parse_ref
from emberbox.control.plane import Plane
from emberbox.control.templates import Templates
from emberbox.store import templates as rows
from emberbox.store.records import BuildRecord, TagRecord, TeamRecord, TemplateRecord


@dataclass(frozen=True, slots=True)
class Assignment:
    """A tag's assignment, with the build it was given to."""

    tag: TagRecord
    build: BuildRecord


class Tags:
    def __init__(self, plane: Plane, templates: Templates) -> None:
        self._plane = plane
        self._templates = templates

    async def current(self, team: TeamRecord, template: str) -> list[TagRecord]:
        """What each tag of a template means now, latest first."""
        found = await self._readable(team, template)
        latest: dict[str, TagRecord] = {}
        for assignment in await rows.tag_assignments(self._plane.store, found.id):
            latest.setdefault(assignment.tag, assignment)
        return list(latest.values())

    async def assignments(self, team: TeamRecord, template: str, *, tag: str | None = None) -> list[Assignment]:
        """Every assignment to a ready build, latest first."""
        found = await self._readable(team, template)
        wanted = check_tag(tag) if tag is not None else None
        assigned = await rows.tag_assignments(self._plane.store, found.id, tag=wanted)
        builds = {build.id: build for build in await rows.builds_page(self._plane.store, found.id)}
        return [Assignment(record, builds[record.build_id]) for record in assigned if record.build_id in builds]

    async def assign(self, team: TeamRecord, target: str, tags: list[str]) -> tuple[list[str], str]:
        """Give tags to the build that `target` names. Returns the tags and the build's ID.

        Raises:
            NotFound: no such template, or no ready build under its tag.
            Invalid: no tag, or one that cannot be used.
        """
        checked = _checked(tags)
        source = await self._templates.resolve(team, target)
        if source.template.team_id != team.id:
            raise Forbidden(f"template {target!r} belongs to another team")
        now = now_ms()
        await rows.assign_tags(
            self._plane.store,
            [TagRecord(str(uuid.uuid4()), source.template.id, tag, source.build.id, now) for tag in checked],
        )
        return checked, source.build.id

    async def delete(self, team: TeamRecord, name: str, tags: list[str]) -> None:
        """
        Raises:
            NotFound: no such template, or none of the tags.
            Invalid: a tag that cannot be used, or the default tag.
        """
        checked = _checked(tags)
        if DEFAULT_TAG in checked:
            raise Invalid(f"the tag {DEFAULT_TAG!r} cannot be deleted; assign it to another build instead")
        template = await self._templates.find_own(team, str(parse_ref(name)))
        if not await rows.delete_tags(self._plane.store, template.id, checked):
            raise NotFound(f"template {name!r} has none of the tags {', '.join(checked)}")

    async def _readable(self, team: TeamRecord, template: str) -> TemplateRecord:
        return await self._templates.find(team, template)


def _checked(tags: list[str]) -> list[str]:
    if not 1 <= len(tags) <= 100:
        raise Invalid("tags must have 1 to 100 entries")
    return list(dict.fromkeys(check_tag(tag) for tag in tags))
