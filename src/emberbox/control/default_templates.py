"""Templates that belong to the installation: those of its first team that every team may name without a namespace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from emberbox.control.builds import Builds
from emberbox.control.errors import Conflict, Invalid, NotFound
from emberbox.control.plane import Plane
from emberbox.store import teams as team_rows
from emberbox.store import templates as rows
from emberbox.store.records import BuildRecord, TeamRecord, TemplateRecord


class DefaultTemplates:
    def __init__(self, plane: Plane, builds: Builds) -> None:
        self._plane = plane
        self._builds = builds

    async def team(self) -> TeamRecord:
        """
        Raises:
            NotFound: there is no team yet.
        """
        team = await team_rows.default_team(self._plane.store)
        if team is None:
            raise NotFound("there is no default team yet; run `emberbox up`, or `python -m emberbox.control.bootstrap`")
        return team

    async def latest(self, team: TeamRecord, name: str) -> BuildRecord | None:
        """The newest build that was started."""
        template = await rows.default_template(self._plane.store, name)
        if template is None or template.team_id != team.id:
            return None
        builds = await rows.builds_page(self._plane.store, template.id)
        return next((build for build in builds if build.worker is not None or build.status != "waiting"), None)

    async def under_way(self, team: TeamRecord, name: str, rates: Mapping[str, int]) -> BuildRecord | None:
        """A build that has not ended, which a request for another one joins.

        Raises:
            Conflict: rates are asked for, and that build has others.
        """
        latest = await self.latest(team, name)
        if latest is None or latest.status not in ("waiting", "building") or latest.worker is None:
            return None
        if rates and dict(rates) != dict(latest.rates):
            raise Conflict(
                f"a build of template {name!r} with other rates is under way; "
                "ask again when it has ended, or without rates to follow it"
            )
        return latest

    async def add(self, team: TeamRecord, name: str, build: BuildRecord, *, description: str = "") -> BuildRecord:
        """Add a build to a default template, which is made when it is missing.

        Raises:
            Invalid: the team has a template of this name that is not the installation's.
        """
        store = self._plane.store
        existing: TemplateRecord | None = await rows.alias_owner(store, team.slug, name)
        if existing is None:
            template = self._builds.new_template(team, public=True, is_default=True)
            template = replace(template, description=description or None)
            build = replace(build, template_id=template.id)
            await rows.add(store, template, aliases=[(team.slug, name)], build=build)
            return build
        if not existing.is_default:
            raise Invalid(
                f"the team {team.slug!r} has a template {name!r} of its own; delete it, or name that one in another way"
            )
        build = replace(build, template_id=existing.id)
        await rows.add_build(store, build)
        return build
