"""Templates, their names, builds, tags and build logs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import and_, bindparam, case, delete, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from emberbox.store import leftovers
from emberbox.store.connection import Connection
from emberbox.store.engine import Store
from emberbox.store.errors import DuplicateName
from emberbox.store.records import BuildLogRecord, BuildRecord, Leftover, TagRecord, TemplateRecord, fields, values
from emberbox.store.tables import (
    build_logs,
    template_aliases,
    template_builds,
    template_tags,
    templates,
)

_visible = or_(templates.c.team_id == bindparam("team"), templates.c.public)
_find = (
    select(templates, template_aliases.c.namespace, template_aliases.c.alias)
    .outerjoin(
        template_aliases,
        and_(template_aliases.c.template_id == templates.c.id, template_aliases.c.alias == bindparam("name")),
    )
    .where(
        _visible,
        or_(
            templates.c.id == bindparam("name"),
            and_(
                template_aliases.c.alias == bindparam("name"),
                or_(template_aliases.c.namespace == bindparam("namespace"), templates.c.is_default),
            ),
        ),
    )
    # A team's own name hides a default template's.
    .order_by(case((templates.c.team_id == bindparam("team"), 0), else_=1))
    .limit(1)
)
_tagged = (
    select(template_builds)
    .join(template_tags, template_tags.c.build_id == template_builds.c.id)
    .where(template_tags.c.template_id == bindparam("template"), template_tags.c.tag == bindparam("tag"))
    .order_by(template_tags.c.assigned_at.desc(), template_tags.c.id.desc())
    .limit(1)
)


async def find(
    store: Store, *, team_id: str, namespace: str, name: str, tag: str
) -> tuple[TemplateRecord, str | None, BuildRecord | None] | None:
    """The template that a team means by an ID or an alias, the alias, and the build under `tag`.

    Args:
        namespace: where an alias is looked for, besides the default templates.
    """
    async with store.read() as connection:
        row = (await connection.execute(_find, {"team": team_id, "namespace": namespace, "name": name})).first()
        if row is None:
            return None
        found = fields(row)
        alias = found["alias"]
        template = TemplateRecord(**{c.name: found[c.name] for c in templates.c})
        build = (await connection.execute(_tagged, {"template": template.id, "tag": tag})).first()
    return template, alias, BuildRecord(**fields(build)) if build else None


async def alias_owner(store: Store, namespace: str, alias: str) -> TemplateRecord | None:
    query = (
        select(templates)
        .join(template_aliases, template_aliases.c.template_id == templates.c.id)
        .where(template_aliases.c.namespace == namespace, template_aliases.c.alias == alias)
    )
    async with store.read() as connection:
        row = (await connection.execute(query)).first()
    return TemplateRecord(**fields(row)) if row else None


async def default_template(store: Store, alias: str) -> TemplateRecord | None:
    """The template of this name that comes with the installation."""
    query = (
        select(templates)
        .join(template_aliases, template_aliases.c.template_id == templates.c.id)
        .where(templates.c.is_default, template_aliases.c.alias == alias)
        .limit(1)
    )
    async with store.read() as connection:
        row = (await connection.execute(query)).first()
    return TemplateRecord(**fields(row)) if row else None


async def tagged_build(store: Store, template_id: str, tag: str) -> BuildRecord | None:
    """The build that a tag of a template means."""
    async with store.read() as connection:
        row = (await connection.execute(_tagged, {"template": template_id, "tag": tag})).first()
    return BuildRecord(**fields(row)) if row else None


async def known_names(store: Store, team_id: str) -> list[str]:
    """Every alias that the team could use, for suggestions."""
    query = (
        select(template_aliases.c.alias)
        .join(templates, templates.c.id == template_aliases.c.template_id)
        .where(or_(templates.c.team_id == team_id, templates.c.is_default))
        .limit(1000)
    )
    async with store.read() as connection:
        return list((await connection.execute(query)).scalars())


async def get(store: Store, template_id: str) -> TemplateRecord | None:
    async with store.read() as connection:
        row = (await connection.execute(select(templates).where(templates.c.id == template_id))).first()
    return TemplateRecord(**fields(row)) if row else None


async def page(
    store: Store,
    *,
    team_id: str | None,
    kind: str,
    only_default: bool = False,
    limit: int | None = None,
    after: tuple[int, str] | None = None,
) -> list[TemplateRecord]:
    """Templates, newest first."""
    query = select(templates).where(templates.c.kind == kind)
    if only_default:
        query = query.where(templates.c.is_default)
    if team_id is not None:
        query = query.where(templates.c.team_id == team_id)
    if after is not None:
        at, last_id = after
        query = query.where(
            or_(templates.c.created_at < at, and_(templates.c.created_at == at, templates.c.id < last_id))
        )
    query = query.order_by(templates.c.created_at.desc(), templates.c.id.desc())
    if limit is not None:
        query = query.limit(limit)
    async with store.read() as connection:
        return [TemplateRecord(**fields(row)) for row in await connection.execute(query)]


async def aliases_of(store: Store, template_ids: Iterable[str]) -> dict[str, list[tuple[str, str]]]:
    """Template ID -> its (namespace, alias) pairs."""
    query = (
        select(template_aliases)
        .where(template_aliases.c.template_id.in_(list(template_ids)))
        .order_by(template_aliases.c.namespace, template_aliases.c.alias)
    )
    names: dict[str, list[tuple[str, str]]] = {}
    async with store.read() as connection:
        for row in await connection.execute(query):
            names.setdefault(row.template_id, []).append((row.namespace, row.alias))
    return names


async def latest_builds(store: Store, template_ids: Iterable[str]) -> dict[str, tuple[BuildRecord, int]]:
    """Template ID -> its newest build (a ready one where there is one) and how many builds it has."""
    builds = template_builds
    ranked = (
        select(
            builds.c.id,
            func.count().over(partition_by=builds.c.template_id).label("total"),
            func.row_number()
            .over(
                partition_by=builds.c.template_id,
                order_by=(
                    case((builds.c.status == "ready", 0), else_=1),
                    builds.c.created_at.desc(),
                    builds.c.id.desc(),
                ),
            )
            .label("place"),
        )
        .where(builds.c.template_id.in_(list(template_ids)))
        .subquery()
    )
    query = select(builds, ranked.c.total).join(ranked, ranked.c.id == builds.c.id).where(ranked.c.place == 1)
    found: dict[str, tuple[BuildRecord, int]] = {}
    async with store.read() as connection:
        for row in await connection.execute(query):
            columns = fields(row)
            total = columns.pop("total")
            build = BuildRecord(**columns)
            found[build.template_id] = build, total
    return found


async def count_builds(store: Store, template_id: str) -> int:
    query = select(func.count()).select_from(template_builds).where(template_builds.c.template_id == template_id)
    async with store.read() as connection:
        return int((await connection.execute(query)).scalar_one())


async def builds_page(
    store: Store, template_id: str, *, limit: int | None = None, after: tuple[int, str] | None = None
) -> list[BuildRecord]:
    """Builds of a template, newest first."""
    query = select(template_builds).where(template_builds.c.template_id == template_id)
    if after is not None:
        at, last_id = after
        query = query.where(
            or_(
                template_builds.c.created_at < at,
                and_(template_builds.c.created_at == at, template_builds.c.id < last_id),
            )
        )
    query = query.order_by(template_builds.c.created_at.desc(), template_builds.c.id.desc())
    if limit is not None:
        query = query.limit(limit)
    async with store.read() as connection:
        return [BuildRecord(**fields(row)) for row in await connection.execute(query)]


async def get_build(store: Store, build_id: str) -> BuildRecord | None:
    async with store.read() as connection:
        row = (await connection.execute(select(template_builds).where(template_builds.c.id == build_id))).first()
    return BuildRecord(**fields(row)) if row else None


async def add(
    store: Store, template: TemplateRecord, *, aliases: Sequence[tuple[str, str]], build: BuildRecord
) -> None:
    """Insert a template with its first build, in one transaction.

    Raises:
        DuplicateName: an alias is taken.
    """
    try:
        async with store.write() as connection:
            await connection.execute(insert(templates).values(values(template)))
            for namespace, alias in aliases:
                await connection.execute(
                    insert(template_aliases).values(namespace=namespace, alias=alias, template_id=template.id)
                )
            await connection.execute(insert(template_builds).values(values(build)))
    except IntegrityError as error:
        raise DuplicateName("the template's name is taken") from error


async def add_build(store: Store, build: BuildRecord) -> None:
    async with store.write() as connection:
        await connection.execute(insert(template_builds).values(values(build)))
        await connection.execute(
            update(templates).where(templates.c.id == build.template_id).values(updated_at=build.created_at)
        )


async def change(store: Store, template_id: str, changes: Mapping[str, Any]) -> None:
    await store.write_one(update(templates).where(templates.c.id == template_id).values(**changes))


async def change_build(
    store: Store,
    build_id: str,
    *,
    statuses: Iterable[str],
    changes: Mapping[str, Any],
    tags: Sequence[TagRecord] = (),
) -> BuildRecord | None:
    """Change a build that has one of `statuses` and assign tags to it, in one transaction."""
    statement = (
        update(template_builds)
        .where(template_builds.c.id == build_id, template_builds.c.status.in_(list(statuses)))
        .values(**changes)
        .returning(*template_builds.c)
    )
    async with store.write() as connection:
        row = (await connection.execute(statement)).first()
        if row is None:
            return None
        await _assign(connection, tags)
    return BuildRecord(**fields(row))


async def claim_build(
    store: Store, build_id: str, changes: Mapping[str, Any], *, status: str, worker: str | None
) -> BuildRecord | None:
    """Change a build that has `status` and belongs to `worker` (None: to nobody yet); None when that has changed."""
    owner = template_builds.c.worker
    statement = (
        update(template_builds)
        .where(
            template_builds.c.id == build_id,
            template_builds.c.status == status,
            owner.is_(None) if worker is None else owner == worker,
        )
        .values(**changes)
        .returning(*template_builds.c)
    )
    row = (await store.write_one(statement)).first()
    return BuildRecord(**fields(row)) if row else None


async def touch_builds(store: Store, build_ids: Iterable[str], now: int) -> None:
    """Note that somebody still looks after these builds."""
    await store.write_one(
        update(template_builds).where(template_builds.c.id.in_(list(build_ids))).values(updated_at=now)
    )


async def builds_in(store: Store, statuses: Iterable[str], *, team_id: str | None = None) -> list[BuildRecord]:
    query = select(template_builds).where(template_builds.c.status.in_(list(statuses)))
    if team_id is not None:
        query = query.join(templates, templates.c.id == template_builds.c.template_id).where(
            templates.c.team_id == team_id
        )
    async with store.read() as connection:
        return [BuildRecord(**fields(row)) for row in await connection.execute(query)]


async def delete_template(store: Store, template_id: str) -> list[Leftover]:
    """Remove a template and all that is its own; returns what its nodes are to remove now."""
    async with store.write() as connection:
        left = await leftovers.note(
            store, connection, await _builds(connection, template_builds.c.template_id == template_id)
        )
        await connection.execute(delete(templates).where(templates.c.id == template_id))
        return left


async def delete_build(store: Store, build_id: str) -> list[Leftover]:
    """Remove one build; returns as `delete_template`."""
    async with store.write() as connection:
        left = await leftovers.note(store, connection, await _builds(connection, template_builds.c.id == build_id))
        await connection.execute(delete(template_builds).where(template_builds.c.id == build_id))
        return left


async def unused_layers(store: Store, layers: Iterable[str], *, but_by: str) -> set[str]:
    """Those of `layers` that no build uses, other than `but_by`."""
    candidates = set(layers)
    query = select(template_builds.c.layers).where(template_builds.c.id != but_by)
    async with store.read() as connection:
        for row in await connection.execute(query):
            candidates.difference_update(row.layers)
    return candidates


async def superseded_builds(store: Store, *, kept: int, limit: int) -> list[BuildRecord]:
    """Builds of templates that have ended, that no tag means, and of whose template `kept` such ones are newer."""
    latest = select(
        template_tags.c.build_id,
        func.row_number()
        .over(
            partition_by=(template_tags.c.template_id, template_tags.c.tag),
            order_by=(template_tags.c.assigned_at.desc(), template_tags.c.id.desc()),
        )
        .label("place"),
    ).subquery()
    builds = template_builds
    ranked = (
        select(
            builds.c.id,
            func.row_number()
            .over(partition_by=builds.c.template_id, order_by=(builds.c.created_at.desc(), builds.c.id.desc()))
            .label("place"),
        )
        .where(
            builds.c.status.in_(["ready", "error"]),
            builds.c.snapshot_id.is_(None),
            builds.c.id.not_in(select(latest.c.build_id).where(latest.c.place == 1)),
        )
        .subquery()
    )
    query = select(builds).join(ranked, ranked.c.id == builds.c.id).where(ranked.c.place > kept).limit(limit)
    async with store.read() as connection:
        return [BuildRecord(**fields(row)) for row in await connection.execute(query)]


# ---- tags


async def assign_tags(store: Store, tags: Sequence[TagRecord]) -> None:
    async with store.write() as connection:
        await _assign(connection, tags)


async def tag_assignments(store: Store, template_id: str, *, tag: str | None = None) -> list[TagRecord]:
    """Assignments to ready builds, latest first."""
    query = (
        select(template_tags)
        .join(template_builds, template_builds.c.id == template_tags.c.build_id)
        .where(template_tags.c.template_id == template_id, template_builds.c.status == "ready")
        .order_by(template_tags.c.assigned_at.desc(), template_tags.c.id.desc())
    )
    if tag is not None:
        query = query.where(template_tags.c.tag == tag)
    async with store.read() as connection:
        return [TagRecord(**fields(row)) for row in await connection.execute(query)]


async def delete_tags(store: Store, template_id: str, tags: Iterable[str]) -> int:
    statement = delete(template_tags).where(
        template_tags.c.template_id == template_id, template_tags.c.tag.in_(list(tags))
    )
    async with store.write() as connection:
        return (await connection.execute(statement)).rowcount


# ---- build logs


async def add_logs(store: Store, records: Sequence[BuildLogRecord]) -> bool:
    """Append log entries. Returns whether they could be: the build may be gone."""
    try:
        await store.write_one(insert(build_logs), [values(record) for record in records])
    except IntegrityError:
        return False
    return True


async def count_logs(store: Store, build_id: str) -> int:
    query = select(func.count()).select_from(build_logs).where(build_logs.c.build_id == build_id)
    async with store.read() as connection:
        return int((await connection.execute(query)).scalar_one())


async def logs_from(
    store: Store, build_id: str, *, offset: int, limit: int, levels: Iterable[str] | None = None
) -> list[BuildLogRecord]:
    """Log entries, oldest first, without the first `offset` of those that have one of `levels` (None: any)."""
    query = select(build_logs).where(build_logs.c.build_id == build_id).order_by(build_logs.c.position).limit(limit)
    if levels is None:
        # Positions are dense: the index leads there.
        query = query.where(build_logs.c.position >= offset)
    else:
        query = query.where(build_logs.c.level.in_(list(levels))).offset(offset)
    async with store.read() as connection:
        return [BuildLogRecord(**fields(row)) for row in await connection.execute(query)]


async def last_logs(store: Store, build_id: str, *, step: str | None, limit: int) -> list[BuildLogRecord]:
    """The last log entries of a build or of one of its steps, oldest first."""
    query = select(build_logs).where(build_logs.c.build_id == build_id)
    if step is not None:
        query = query.where(build_logs.c.step == step)
    async with store.read() as connection:
        rows = await connection.execute(query.order_by(build_logs.c.position.desc()).limit(limit))
        return [BuildLogRecord(**fields(row)) for row in rows][::-1]


async def logs_by_time(
    store: Store, build_id: str, *, cursor_ms: int | None, limit: int, backward: bool, levels: Iterable[str]
) -> list[BuildLogRecord]:
    """Log entries by time: forward from a cursor, or backward from it (or from the end)."""
    query = select(build_logs).where(build_logs.c.build_id == build_id, build_logs.c.level.in_(list(levels)))
    if cursor_ms is not None:
        at = build_logs.c.timestamp_ms
        query = query.where(at <= cursor_ms if backward else at >= cursor_ms)
    order = build_logs.c.position.desc() if backward else build_logs.c.position.asc()
    async with store.read() as connection:
        rows = await connection.execute(query.order_by(order).limit(limit))
        return [BuildLogRecord(**fields(row)) for row in rows]


# ---- snapshots: templates whose builds were saved from a sandbox


async def snapshots_page(
    store: Store,
    *,
    team_id: str,
    sandbox_id: str | None,
    template_id: str | None,
    build_id: str | None,
    limit: int,
    after: tuple[int, str] | None,
) -> list[tuple[TemplateRecord, BuildRecord]]:
    """Ready snapshot builds of a team, newest first."""
    query = (
        select(template_builds)
        .join(templates, templates.c.id == template_builds.c.template_id)
        .where(
            templates.c.team_id == team_id,
            template_builds.c.status == "ready",
            template_builds.c.snapshot_id.is_not(None),
        )
    )
    if sandbox_id is not None:
        query = query.where(template_builds.c.source_sandbox_id == sandbox_id)
    if template_id is not None:
        query = query.where(template_builds.c.template_id == template_id)
    if build_id is not None:
        query = query.where(template_builds.c.id == build_id)
    if after is not None:
        at, last_id = after
        query = query.where(
            or_(
                template_builds.c.created_at < at,
                and_(template_builds.c.created_at == at, template_builds.c.id < last_id),
            )
        )
    query = query.order_by(template_builds.c.created_at.desc(), template_builds.c.id.desc()).limit(limit)
    async with store.read() as connection:
        builds = [BuildRecord(**fields(row)) for row in await connection.execute(query)]
        wanted = {build.template_id for build in builds}
        rows = await connection.execute(select(templates).where(templates.c.id.in_(wanted)))
        owners = {row.id: TemplateRecord(**fields(row)) for row in rows}
    return [(owners[build.template_id], build) for build in builds if build.template_id in owners]


async def tags_of_builds(store: Store, build_ids: Iterable[str]) -> dict[str, list[str]]:
    """Build ID -> the tags that were assigned to it, in alphabetical order."""
    query = (
        select(template_tags.c.build_id, template_tags.c.tag)
        .where(template_tags.c.build_id.in_(list(build_ids)))
        .order_by(template_tags.c.tag)
        .distinct()
    )
    found: dict[str, list[str]] = {}
    async with store.read() as connection:
        for row in await connection.execute(query):
            found.setdefault(row.build_id, []).append(row.tag)
    return found


async def _assign(connection: Connection, tags: Sequence[TagRecord]) -> None:
    if tags:
        await connection.execute(insert(template_tags), [values(tag) for tag in tags])


async def _builds(connection: Connection, condition: Any) -> list[BuildRecord]:
    rows = await connection.execute(select(template_builds).where(condition))
    return [BuildRecord(**fields(row)) for row in rows]
