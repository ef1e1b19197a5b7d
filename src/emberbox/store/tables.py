"""The tables, and nothing that reads or writes them.

Times are integers, milliseconds since the epoch (UTC): they compare and page the same in SQLite and PostgreSQL.
Identifiers are strings. What is only ever read back whole is JSON.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)
from sqlalchemy.engine import Dialect

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class Json(TypeDecorator[Any]):
    """JSON; JSONB on PostgreSQL, whose dialect is loaded only where it is used (it takes megabytes)."""

    impl = JSON
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> Any:
        if dialect.name == "postgresql":
            from sqlalchemy.dialects.postgresql import JSONB

            return dialect.type_descriptor(JSONB())
        return dialect.type_descriptor(JSON())


teams = Table(
    "teams",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("name", String(128), nullable=False),
    Column("slug", String(128), nullable=False, unique=True),
    Column("is_default", Boolean, nullable=False),
    Column("max_sandboxes", Integer, nullable=False),
    Column("max_timeout_seconds", Integer, nullable=False),
    Column("rate_per_second", Integer, nullable=False),
    Column("rate_burst", Integer, nullable=False),
    Column("created_at", BigInteger, nullable=False),
)


def _credentials(name: str) -> Table:
    return Table(
        name,
        metadata,
        Column("id", String(36), primary_key=True),
        Column("team_id", ForeignKey("teams.id"), nullable=False, index=True),
        Column("name", String(256), nullable=False),
        Column("hash", String(64), nullable=False, unique=True),
        Column("prefix", String(16), nullable=False),
        Column("value_length", Integer, nullable=False),
        Column("masked_prefix", String(8), nullable=False),
        Column("masked_suffix", String(8), nullable=False),
        # Null: all of them.
        Column("scopes", Json, nullable=True),
        # How many sandboxes that it made may live at once; null: as many as the team may have.
        Column("sandbox_limit", Integer, nullable=True),
        Column("created_at", BigInteger, nullable=False),
        Column("last_used_at", BigInteger, nullable=True),
    )


api_keys = _credentials("api_keys")
access_tokens = _credentials("access_tokens")


templates = Table(
    "templates",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("team_id", ForeignKey("teams.id"), nullable=False, index=True),
    # "template" is built from a recipe or steps, "snapshot" was saved from a sandbox.
    Column("kind", String(16), nullable=False),
    Column("public", Boolean, nullable=False),
    Column("is_default", Boolean, nullable=False),
    Column("description", Text, nullable=True),
    Column("created_at", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    Column("last_spawned_at", BigInteger, nullable=True),
    Column("spawn_count", BigInteger, nullable=False),
)

template_aliases = Table(
    "template_aliases",
    metadata,
    # The namespace is the owning team's slug.
    Column("namespace", String(128), primary_key=True),
    Column("alias", String(128), primary_key=True),
    Column("template_id", ForeignKey("templates.id", ondelete="CASCADE"), nullable=False, index=True),
)

template_builds = Table(
    "template_builds",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("template_id", ForeignKey("templates.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("status", String(16), nullable=False),
    Column("cpu_count", Integer, nullable=False),
    Column("memory_mb", Integer, nullable=False),
    Column("disk_size_mb", Integer, nullable=False),
    # By the names of the node contract. Of a build: what was asked for; of a sandbox: what it has.
    Column("rates", Json, nullable=False),
    # What a node needs to start from it: layers, or a snapshot that lies on `node_id`.
    Column("layers", Json, nullable=False),
    Column("env_vars", Json, nullable=False),
    Column("default_user", String(64), nullable=False),
    Column("default_workdir", Text, nullable=False),
    Column("start_command", Text, nullable=False),
    Column("ready_command", Text, nullable=False),
    Column("snapshot_id", String(64), nullable=True),
    Column("memory_kept", Boolean, nullable=True),
    Column("node_id", String(128), nullable=True),
    Column("source_sandbox_id", String(64), nullable=True, index=True),
    Column("size_bytes", BigInteger, nullable=True),
    Column("agent_version", String(64), nullable=False),
    # What was asked: recipe, image or template, steps, registry kind. Never credentials.
    Column("request", Json, nullable=True),
    Column("reason", Json, nullable=True),
    Column("worker", String(36), nullable=True),
    Column("created_at", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    Column("finished_at", BigInteger, nullable=True),
)

leftovers = Table(
    "leftovers",
    metadata,
    # Builds and snapshots that were deleted here, until their node has removed what it has of them.
    Column("build_id", String(36), primary_key=True),
    Column("node_id", String(128), nullable=False, index=True),
    Column("snapshot_id", String(64), nullable=True),
    Column("layers", Json, nullable=False),
)

template_tags = Table(
    "template_tags",
    metadata,
    # Every assignment is kept; a tag means the build of its latest one.
    Column("id", String(36), primary_key=True),
    Column("template_id", ForeignKey("templates.id", ondelete="CASCADE"), nullable=False),
    Column("tag", String(128), nullable=False),
    Column("build_id", ForeignKey("template_builds.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("assigned_at", BigInteger, nullable=False),
    Index("ix_template_tags_latest", "template_id", "tag", "assigned_at"),
)

build_logs = Table(
    "build_logs",
    metadata,
    Column("build_id", ForeignKey("template_builds.id", ondelete="CASCADE"), primary_key=True),
    # Dense from 0, so that a client's offset pages exactly.
    Column("position", Integer, primary_key=True),
    Column("timestamp_ms", BigInteger, nullable=False),
    Column("level", String(8), nullable=False),
    Column("message", Text, nullable=False),
    Column("step", String(32), nullable=False),
)


sandboxes = Table(
    "sandboxes",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("team_id", ForeignKey("teams.id"), nullable=False),
    # No foreign keys: a sandbox outlives its template.
    Column("template_id", String(64), nullable=False),
    Column("build_id", String(36), nullable=False),
    Column("alias", String(256), nullable=True),
    Column("state", String(16), nullable=False),
    Column("state_changed_at", BigInteger, nullable=False),
    # The api process that is carrying out a transition; empty when none is going on.
    Column("worker", String(36), nullable=True),
    Column("node_id", String(128), nullable=False),
    Column("address", String(64), nullable=False),
    Column("cpu_count", Integer, nullable=False),
    Column("memory_mb", Integer, nullable=False),
    Column("disk_size_mb", Integer, nullable=False),
    # By the names of the node contract. Of a build: what was asked for; of a sandbox: what it has.
    Column("rates", Json, nullable=False),
    Column("agent_version", String(64), nullable=False),
    Column("metadata", Json, nullable=False),
    Column("secure", Boolean, nullable=False),
    Column("allow_internet", Boolean, nullable=True),
    Column("network", Json, nullable=False),
    Column("volume_mounts", Json, nullable=False),
    Column("auto_pause", Boolean, nullable=False),
    Column("auto_pause_memory", Boolean, nullable=False),
    Column("auto_resume", Boolean, nullable=False),
    Column("timeout_seconds", Integer, nullable=False),
    Column("started_at", BigInteger, nullable=False),
    Column("end_at", BigInteger, nullable=False),
    Column("paused_at", BigInteger, nullable=True),
    # Whether the latest pause was to keep memory; null before the first.
    Column("pause_memory", Boolean, nullable=True),
    Column("ended_at", BigInteger, nullable=True),
    Column("end_reason", String(16), nullable=True),
    Column("idempotency_key", String(256), nullable=True),
    Column("idempotency_hash", String(64), nullable=True),
    # The API key that made it. No foreign key: a sandbox outlives its key.
    Column("api_key_id", String(36), nullable=True),
    Index("ix_sandboxes_team_state", "team_id", "state", "started_at", "id"),
    Index("ix_sandboxes_started", "team_id", "started_at", "id"),
    # Nulls are distinct: any number of sandboxes has no key.
    Index("uq_sandboxes_idempotency", "team_id", "idempotency_key", unique=True),
    Index("ix_sandboxes_live", "state", "node_id"),
    Index("ix_sandboxes_key_state", "api_key_id", "state"),
    Index("ix_sandboxes_ended_at", "ended_at"),
)

metrics = Table(
    "metrics",
    metadata,
    Column("sandbox_id", String(64), primary_key=True),
    Column("timestamp_ms", BigInteger, primary_key=True, index=True),
    Column("cpu_count", Integer, nullable=False),
    Column("cpu_used_percent", Float, nullable=False),
    Column("memory_used", BigInteger, nullable=False),
    Column("memory_total", BigInteger, nullable=False),
    Column("memory_cache", BigInteger, nullable=False),
    Column("disk_used", BigInteger, nullable=False),
    Column("disk_total", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)

team_metrics = Table(
    "team_metrics",
    metadata,
    Column("team_id", ForeignKey("teams.id"), primary_key=True),
    Column("timestamp_ms", BigInteger, primary_key=True, index=True),
    Column("concurrent_sandboxes", Integer, nullable=False),
    Column("sandbox_start_rate", Float, nullable=False),
)

nodes = Table(
    "nodes",
    metadata,
    Column("id", String(128), primary_key=True),
    Column("target", Text, nullable=False),
    Column("status", String(16), nullable=False),
    Column("status_changed_at", BigInteger, nullable=False),
    Column("service_instance_id", String(64), nullable=False),
    Column("runtime", String(32), nullable=False),
    Column("memory_snapshots", Boolean, nullable=False),
    Column("version", String(64), nullable=False),
    Column("last_seen_at", BigInteger, nullable=False),
    UniqueConstraint("target"),
)
