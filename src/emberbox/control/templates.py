"""Templates as users see them: found by name, listed, checked for existence, deleted."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from emberbox.control.clock import now_ms
from emberbox.control.errors import Forbidden, Invalid, NotFound
from emberbox.control.names import DEFAULT_TAG, TemplateRef, did_you_mean, parse_ref
from emberbox.control.plane import Plane
from emberbox.store import templates as rows
from emberbox.store.records import BuildLogRecord, BuildRecord, Leftover, TeamRecord, TemplateRecord

log = structlog.get_logger()

REASON_LOG_ENTRIES = 100
"""Log entries of the failing step that a failed build's reason repeats."""
_REMOVED_AT_ONCE = 20


@dataclass(frozen=True, slots=True)
class Source:
    """What a sandbox starts from."""

    template: TemplateRecord
    build: BuildRecord
    alias: str | None


@dataclass(frozen=True, slots=True)
class TemplateView:
    """A template with its names and the build that counts."""

    template: TemplateRecord
    names: list[tuple[str, str]]
    build: BuildRecord
    build_count: int
    owned: bool


class Templates:
    def __init__(self, plane: Plane) -> None:
        self._plane = plane
        self.ship: Callable[[TemplateRef], Awaitable[bool]] | None = None
        """Builds what a reference means when it is a template that ships with Emberbox; returns whether it is one."""
        self.leaving: Callable[[str], Awaitable[None]] | None = None
        """Told of a template before it is deleted."""

    async def resolve(self, team: TeamRecord, text: str) -> Source:
        """The ready build that `text` names for this team. A shipped template is built on its first use.

        Raises:
            Invalid: `text` is not a name, or what it names has no ready build.
            NotFound: no such template or tag, or it is another team's.
            NodeUnavailable: it is a shipped template that is being built.
        """
        ref = parse_ref(text)
        try:
            return await self._resolve(team, ref)
        except (Invalid, NotFound):
            if self.ship is None or not await self.ship(ref):
                raise
        return await self._resolve(team, ref)

    async def resolve_default(self, name: str) -> Source:
        """The ready build of a template that comes with the installation, whatever else has its name.

        Raises:
            NotFound: there is none.
            Invalid: it has no ready build.
            NodeUnavailable: it is being built.
        """
        found = await self._default(name)
        if found is None and self.ship is not None and await self.ship(TemplateRef(None, name, None)):
            found = await self._default(name)
        if found is None:
            raise NotFound(f"template {name!r} is not there yet; `emberbox status` says how far it is")
        return found

    async def _default(self, name: str) -> Source | None:
        template = await rows.default_template(self._plane.store, name)
        build = await rows.tagged_build(self._plane.store, template.id, DEFAULT_TAG) if template else None
        if template is None or build is None or build.status != "ready":
            return None
        return Source(template, build, name)

    async def _resolve(self, team: TeamRecord, ref: TemplateRef) -> Source:
        template, alias, build = await self._find(team, ref)
        if build is None:
            tags = {one.tag for one in await rows.tag_assignments(self._plane.store, template.id)}
            if not tags:
                raise Invalid(f"template {ref.name!r} has no ready build")
            others = f"it has {', '.join(sorted(tags)[:20])}"
            if ref.tag is None:
                raise Invalid(
                    f"template {ref.name!r} has no build with the tag {DEFAULT_TAG!r}; {others}: "
                    f"name one of them, such as '{ref.name}:{min(tags)}'"
                )
            raise NotFound(f"template {ref.name!r} has no tag {ref.tag!r}; {others}")
        if build.status != "ready":
            raise Invalid(f"template {str(ref)!r} has no ready build (its build is {build.status!r})")
        return Source(template, build, alias)

    async def find(self, team: TeamRecord, text: str) -> TemplateRecord:
        """The template that `text` names: the team's own, or a public one.

        Raises:
            Invalid: `text` is not a name.
            NotFound: no such template, or it is another team's.
        """
        return (await self._find(team, parse_ref(text)))[0]

    async def find_own(self, team: TeamRecord, text: str) -> TemplateRecord:
        """`find`, but only a template that the team may change.

        Raises:
            Forbidden: it is public and another team's.
        """
        template = await self.find(team, text)
        if template.team_id != team.id:
            raise Forbidden(f"template {text!r} belongs to another team")
        return template

    async def ids_named(self, team: TeamRecord, text: str) -> tuple[str, ...]:
        """The IDs that a list's filter `text` means; none when nothing has the name."""
        ref = parse_ref(text)
        found = await rows.find(
            self._plane.store,
            team_id=team.id,
            namespace=ref.namespace or team.slug,
            name=ref.name,
            tag=ref.tag_or_default,
        )
        # The name itself too: sandboxes outlive their template.
        return (found[0].id, ref.name) if found else (ref.name,)

    async def alias_exists(self, team: TeamRecord, alias: str) -> TemplateRecord:
        """The template that has `alias`.

        Raises:
            NotFound: there is none.
            Forbidden: it is another team's and not public.
        """
        ref = parse_ref(alias)
        if ref.namespace and ref.namespace != team.slug:
            owner = await rows.alias_owner(self._plane.store, ref.namespace, ref.name)
            if owner is not None and not owner.public:
                raise Forbidden(f"template {alias!r} belongs to another team")
        return (await self._find(team, ref))[0]

    async def page(
        self, team: TeamRecord, *, limit: int | None = None, after: tuple[int, str] | None = None
    ) -> list[TemplateView]:
        """The team's own templates, newest first."""
        store = self._plane.store
        found = await rows.page(store, team_id=team.id, kind="template", limit=limit, after=after)
        return await self._views(team, found)

    async def defaults(self, team: TeamRecord) -> list[TemplateView]:
        """The templates that come with the installation."""
        found = await rows.page(self._plane.store, team_id=None, kind="template", only_default=True)
        return await self._views(team, found)

    async def builds(self, template: TemplateRecord, *, limit: int, after: tuple[int, str] | None) -> list[BuildRecord]:
        """Builds of a template, newest first."""
        return await rows.builds_page(self._plane.store, template.id, limit=limit, after=after)

    async def count_builds(self, template: TemplateRecord) -> int:
        return await rows.count_builds(self._plane.store, template.id)

    async def build(self, team: TeamRecord, text: str, build_id: str) -> tuple[TemplateRecord, BuildRecord]:
        """A build of one of the team's templates. What others' builds print is not for everybody, public or not.

        Raises:
            NotFound: no such template, or no such build of it.
            Forbidden: it is public and another team's.
        """
        template = await self.find_own(team, text)
        return template, await self.build_of(template, build_id)

    async def build_of(self, template: TemplateRecord, build_id: str) -> BuildRecord:
        """
        Raises:
            NotFound: the template has no such build.
        """
        build = await rows.get_build(self._plane.store, build_id) if "\0" not in build_id else None
        if build is None or build.template_id != template.id:
            raise NotFound(f"template {template.id!r} has no build {build_id[:64]!r}")
        return build

    async def build_logs(
        self, build: BuildRecord, *, offset: int, limit: int, levels: tuple[str, ...] | None
    ) -> list[BuildLogRecord]:
        """Log entries without the first `offset`, of all or of those of some levels: adding up what came pages."""
        return await rows.logs_from(self._plane.store, build.id, offset=offset, limit=limit, levels=levels)

    async def reason_logs(self, build: BuildRecord) -> list[BuildLogRecord]:
        """The last log entries of the step at which a build failed; none for one that did not fail at a step."""
        step = (build.reason or {}).get("step")
        if not step:
            return []
        return await rows.last_logs(self._plane.store, build.id, step=step, limit=REASON_LOG_ENTRIES)

    async def build_logs_by_time(
        self, build: BuildRecord, *, cursor_ms: int | None, limit: int, backward: bool, levels: tuple[str, ...]
    ) -> list[BuildLogRecord]:
        return await rows.logs_by_time(
            self._plane.store, build.id, cursor_ms=cursor_ms, limit=limit, backward=backward, levels=levels
        )

    async def names(self, template_id: str) -> list[tuple[str, str]]:
        return (await rows.aliases_of(self._plane.store, [template_id])).get(template_id, [])

    async def set_public(self, template: TemplateRecord, public: bool) -> None:
        """
        Raises:
            Forbidden: it comes with the installation and stays public.
        """
        if template.is_default and not public:
            raise Forbidden("a template that comes with the installation is public")
        await rows.change(self._plane.store, template.id, {"public": public, "updated_at": now_ms()})

    async def delete(self, team: TeamRecord, text: str) -> None:
        """Remove a template or a snapshot with its builds, here and on the nodes that hold them.

        A snapshot named with a tag loses that build alone, while it has others. Sandboxes that were started from what
        is removed go on: nodes keep the layers that something stands on.

        Raises:
            NotFound: no such template or snapshot.
            Forbidden: another team's, or one that comes with the installation.
        """
        store = self._plane.store
        ref = parse_ref(text)
        template, _, build = await self._find(team, ref)
        if template.team_id != team.id or template.is_default:
            raise Forbidden(f"template {text!r} is not yours to delete")
        if template.kind == "snapshot" and ref.tag is not None:
            if build is None:
                raise NotFound(f"snapshot {str(ref)!r} not found")
            if len(await rows.builds_page(store, template.id, limit=2)) > 1:
                await self._gone(await rows.delete_build(store, build.id))
                return
        if self.leaving is not None:
            await self.leaving(template.id)
        await self._gone(await rows.delete_template(store, template.id))
        log.info("template.deleted", template_id=template.id, team_id=team.id)

    async def remove_superseded(self) -> None:
        """Remove old builds that no tag means, where the installation keeps only some."""
        kept = self._plane.settings.builds_kept_per_template
        if not kept:
            return
        for build in await rows.superseded_builds(self._plane.store, kept=kept, limit=_REMOVED_AT_ONCE):
            await self._gone(await rows.delete_build(self._plane.store, build.id))
            log.info("build.removed", build_id=build.id, template_id=build.template_id)

    async def _gone(self, leftovers: list[Leftover]) -> None:
        for left in leftovers:
            await self._plane.remove_leftover(left)

    async def _find(self, team: TeamRecord, ref: TemplateRef) -> tuple[TemplateRecord, str | None, BuildRecord | None]:
        store = self._plane.store
        found = await rows.find(
            store,
            team_id=team.id,
            namespace=ref.namespace or team.slug,
            name=ref.name,
            tag=ref.tag_or_default,
        )
        if found is None:
            hint = did_you_mean(ref.name, await rows.known_names(store, team.id))
            raise NotFound(f"template {str(ref)!r} not found{hint}")
        return found

    async def _views(self, team: TeamRecord, found: list[TemplateRecord]) -> list[TemplateView]:
        ids = [template.id for template in found]
        names = await rows.aliases_of(self._plane.store, ids)
        builds = await rows.latest_builds(self._plane.store, ids)
        return [
            TemplateView(template, names.get(template.id, []), *builds[template.id], owned=template.team_id == team.id)
            for template in found
            if template.id in builds
        ]
