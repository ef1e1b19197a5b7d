"""The first tables

Revision ID: 0001
Revises:
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

_JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:

    op.create_table(
        "metrics",
        sa.Column("sandbox_id", sa.String(length=64), nullable=False),
        sa.Column("timestamp_ms", sa.BigInteger(), nullable=False),
        sa.Column("cpu_count", sa.Integer(), nullable=False),
        sa.Column("cpu_used_percent", sa.Float(), nullable=False),
        sa.Column("memory_used", sa.BigInteger(), nullable=False),
        sa.Column("memory_total", sa.BigInteger(), nullable=False),
        sa.Column("memory_cache", sa.BigInteger(), nullable=False),
        sa.Column("disk_used", sa.BigInteger(), nullable=False),
        sa.Column("disk_total", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("sandbox_id", "timestamp_ms", name=op.f("pk_metrics")),
        sqlite_with_rowid=False,
    )
    with op.batch_alter_table("metrics", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_metrics_timestamp_ms"), ["timestamp_ms"], unique=False)

    op.create_table(
        "nodes",
        sa.Column("id", sa.String(length=128), nullable=False),
        sa.Column("target", sa.Text(), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("status_changed_at", sa.BigInteger(), nullable=False),
        sa.Column("service_instance_id", sa.String(length=64), nullable=False),
        sa.Column("runtime", sa.String(length=32), nullable=False),
        sa.Column("memory_snapshots", sa.Boolean(), nullable=False),
        sa.Column("version", sa.String(length=64), nullable=False),
        sa.Column("last_seen_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_nodes")),
        sa.UniqueConstraint("target", name=op.f("uq_nodes_target")),
    )
    op.create_table(
        "teams",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("slug", sa.String(length=128), nullable=False),
        sa.Column("is_default", sa.Boolean(), nullable=False),
        sa.Column("max_sandboxes", sa.Integer(), nullable=False),
        sa.Column("max_timeout_seconds", sa.Integer(), nullable=False),
        sa.Column("rate_per_second", sa.Integer(), nullable=False),
        sa.Column("rate_burst", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_teams")),
        sa.UniqueConstraint("slug", name=op.f("uq_teams_slug")),
    )
    op.create_table(
        "access_tokens",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("team_id", sa.String(length=36), nullable=False),
        sa.Column("name", sa.String(length=256), nullable=False),
        sa.Column("hash", sa.String(length=64), nullable=False),
        sa.Column("prefix", sa.String(length=16), nullable=False),
        sa.Column("value_length", sa.Integer(), nullable=False),
        sa.Column("masked_prefix", sa.String(length=8), nullable=False),
        sa.Column("masked_suffix", sa.String(length=8), nullable=False),
        sa.Column("scopes", _JSON, nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("last_used_at", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(["team_id"], ["teams.id"], name=op.f("fk_access_tokens_team_id_teams")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_access_tokens")),
        sa.UniqueConstraint("hash", name=op.f("uq_access_tokens_hash")),
    )
    with op.batch_alter_table("access_tokens", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_access_tokens_team_id"), ["team_id"], unique=False)

    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("team_id", sa.String(length=36), nullable=False),
        sa.Column("name", sa.String(length=256), nullable=False),
        sa.Column("hash", sa.String(length=64), nullable=False),
        sa.Column("prefix", sa.String(length=16), nullable=False),
        sa.Column("value_length", sa.Integer(), nullable=False),
        sa.Column("masked_prefix", sa.String(length=8), nullable=False),
        sa.Column("masked_suffix", sa.String(length=8), nullable=False),
        sa.Column("scopes", _JSON, nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("last_used_at", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(["team_id"], ["teams.id"], name=op.f("fk_api_keys_team_id_teams")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
        sa.UniqueConstraint("hash", name=op.f("uq_api_keys_hash")),
    )
    with op.batch_alter_table("api_keys", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_api_keys_team_id"), ["team_id"], unique=False)

    op.create_table(
        "sandboxes",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("team_id", sa.String(length=36), nullable=False),
        sa.Column("template_id", sa.String(length=64), nullable=False),
        sa.Column("build_id", sa.String(length=36), nullable=False),
        sa.Column("alias", sa.String(length=256), nullable=True),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("state_changed_at", sa.BigInteger(), nullable=False),
        sa.Column("worker", sa.String(length=36), nullable=True),
        sa.Column("node_id", sa.String(length=128), nullable=False),
        sa.Column("address", sa.String(length=64), nullable=False),
        sa.Column("cpu_count", sa.Integer(), nullable=False),
        sa.Column("memory_mb", sa.Integer(), nullable=False),
        sa.Column("disk_size_mb", sa.Integer(), nullable=False),
        sa.Column("agent_version", sa.String(length=64), nullable=False),
        sa.Column("metadata", _JSON, nullable=False),
        sa.Column("secure", sa.Boolean(), nullable=False),
        sa.Column("allow_internet", sa.Boolean(), nullable=True),
        sa.Column("network", _JSON, nullable=False),
        sa.Column("volume_mounts", _JSON, nullable=False),
        sa.Column("auto_pause", sa.Boolean(), nullable=False),
        sa.Column("auto_pause_memory", sa.Boolean(), nullable=False),
        sa.Column("auto_resume", sa.Boolean(), nullable=False),
        sa.Column("timeout_seconds", sa.Integer(), nullable=False),
        sa.Column("started_at", sa.BigInteger(), nullable=False),
        sa.Column("end_at", sa.BigInteger(), nullable=False),
        sa.Column("paused_at", sa.BigInteger(), nullable=True),
        sa.Column("pause_memory", sa.Boolean(), nullable=True),
        sa.Column("ended_at", sa.BigInteger(), nullable=True),
        sa.Column("end_reason", sa.String(length=16), nullable=True),
        sa.Column("idempotency_key", sa.String(length=256), nullable=True),
        sa.Column("idempotency_hash", sa.String(length=64), nullable=True),
        sa.ForeignKeyConstraint(["team_id"], ["teams.id"], name=op.f("fk_sandboxes_team_id_teams")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_sandboxes")),
    )
    with op.batch_alter_table("sandboxes", schema=None) as batch_op:
        batch_op.create_index("ix_sandboxes_ended_at", ["ended_at"], unique=False)
        batch_op.create_index(
            "ix_sandboxes_live",
            ["state", "node_id"],
            unique=False,
        )
        batch_op.create_index("ix_sandboxes_started", ["team_id", "started_at", "id"], unique=False)
        batch_op.create_index("ix_sandboxes_team_state", ["team_id", "state", "started_at", "id"], unique=False)
        batch_op.create_index(
            "uq_sandboxes_idempotency",
            ["team_id", "idempotency_key"],
            unique=True,
        )

    op.create_table(
        "team_metrics",
        sa.Column("team_id", sa.String(length=36), nullable=False),
        sa.Column("timestamp_ms", sa.BigInteger(), nullable=False),
        sa.Column("concurrent_sandboxes", sa.Integer(), nullable=False),
        sa.Column("sandbox_start_rate", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["team_id"], ["teams.id"], name=op.f("fk_team_metrics_team_id_teams")),
        sa.PrimaryKeyConstraint("team_id", "timestamp_ms", name=op.f("pk_team_metrics")),
    )
    with op.batch_alter_table("team_metrics", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_team_metrics_timestamp_ms"), ["timestamp_ms"], unique=False)

    op.create_table(
        "templates",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("team_id", sa.String(length=36), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("public", sa.Boolean(), nullable=False),
        sa.Column("is_default", sa.Boolean(), nullable=False),
        sa.Column("description", sa.Text(), nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.Column("last_spawned_at", sa.BigInteger(), nullable=True),
        sa.Column("spawn_count", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["team_id"], ["teams.id"], name=op.f("fk_templates_team_id_teams")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_templates")),
    )
    with op.batch_alter_table("templates", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_templates_team_id"), ["team_id"], unique=False)

    op.create_table(
        "template_aliases",
        sa.Column("namespace", sa.String(length=128), nullable=False),
        sa.Column("alias", sa.String(length=128), nullable=False),
        sa.Column("template_id", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(
            ["template_id"],
            ["templates.id"],
            name=op.f("fk_template_aliases_template_id_templates"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("namespace", "alias", name=op.f("pk_template_aliases")),
    )
    with op.batch_alter_table("template_aliases", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_template_aliases_template_id"), ["template_id"], unique=False)

    op.create_table(
        "template_builds",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("template_id", sa.String(length=64), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("cpu_count", sa.Integer(), nullable=False),
        sa.Column("memory_mb", sa.Integer(), nullable=False),
        sa.Column("disk_size_mb", sa.Integer(), nullable=False),
        sa.Column("layers", _JSON, nullable=False),
        sa.Column("env_vars", _JSON, nullable=False),
        sa.Column("default_user", sa.String(length=64), nullable=False),
        sa.Column("default_workdir", sa.Text(), nullable=False),
        sa.Column("start_command", sa.Text(), nullable=False),
        sa.Column("ready_command", sa.Text(), nullable=False),
        sa.Column("snapshot_id", sa.String(length=64), nullable=True),
        sa.Column("memory_kept", sa.Boolean(), nullable=True),
        sa.Column("node_id", sa.String(length=128), nullable=True),
        sa.Column("source_sandbox_id", sa.String(length=64), nullable=True),
        sa.Column("size_bytes", sa.BigInteger(), nullable=True),
        sa.Column("agent_version", sa.String(length=64), nullable=False),
        sa.Column("request", _JSON, nullable=True),
        sa.Column("reason", _JSON, nullable=True),
        sa.Column("worker", sa.String(length=36), nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.Column("finished_at", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(
            ["template_id"], ["templates.id"], name=op.f("fk_template_builds_template_id_templates"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_template_builds")),
    )
    with op.batch_alter_table("template_builds", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_template_builds_source_sandbox_id"), ["source_sandbox_id"], unique=False)
        batch_op.create_index(batch_op.f("ix_template_builds_template_id"), ["template_id"], unique=False)

    op.create_table(
        "build_logs",
        sa.Column("build_id", sa.String(length=36), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("timestamp_ms", sa.BigInteger(), nullable=False),
        sa.Column("level", sa.String(length=8), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("step", sa.String(length=32), nullable=False),
        sa.ForeignKeyConstraint(
            ["build_id"],
            ["template_builds.id"],
            name=op.f("fk_build_logs_build_id_template_builds"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("build_id", "position", name=op.f("pk_build_logs")),
    )
    op.create_table(
        "template_tags",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("template_id", sa.String(length=64), nullable=False),
        sa.Column("tag", sa.String(length=128), nullable=False),
        sa.Column("build_id", sa.String(length=36), nullable=False),
        sa.Column("assigned_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["build_id"],
            ["template_builds.id"],
            name=op.f("fk_template_tags_build_id_template_builds"),
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["template_id"], ["templates.id"], name=op.f("fk_template_tags_template_id_templates"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_template_tags")),
    )
    with op.batch_alter_table("template_tags", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_template_tags_build_id"), ["build_id"], unique=False)
        batch_op.create_index("ix_template_tags_latest", ["template_id", "tag", "assigned_at"], unique=False)


def downgrade() -> None:

    with op.batch_alter_table("template_tags", schema=None) as batch_op:
        batch_op.drop_index("ix_template_tags_latest")
        batch_op.drop_index(batch_op.f("ix_template_tags_build_id"))

    op.drop_table("template_tags")
    op.drop_table("build_logs")
    with op.batch_alter_table("template_builds", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_template_builds_template_id"))
        batch_op.drop_index(batch_op.f("ix_template_builds_source_sandbox_id"))

    op.drop_table("template_builds")
    with op.batch_alter_table("template_aliases", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_template_aliases_template_id"))

    op.drop_table("template_aliases")
    with op.batch_alter_table("templates", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_templates_team_id"))

    op.drop_table("templates")
    with op.batch_alter_table("team_metrics", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_team_metrics_timestamp_ms"))

    op.drop_table("team_metrics")
    with op.batch_alter_table("sandboxes", schema=None) as batch_op:
        batch_op.drop_index(
            "uq_sandboxes_idempotency",
        )
        batch_op.drop_index("ix_sandboxes_team_state")
        batch_op.drop_index("ix_sandboxes_started")
        batch_op.drop_index("ix_sandboxes_live")
        batch_op.drop_index("ix_sandboxes_ended_at")

    op.drop_table("sandboxes")
    with op.batch_alter_table("api_keys", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_api_keys_team_id"))

    op.drop_table("api_keys")
    with op.batch_alter_table("access_tokens", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_access_tokens_team_id"))

    op.drop_table("access_tokens")
    op.drop_table("teams")
    op.drop_table("nodes")
    with op.batch_alter_table("metrics", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_metrics_timestamp_ms"))

    op.drop_table("metrics")
