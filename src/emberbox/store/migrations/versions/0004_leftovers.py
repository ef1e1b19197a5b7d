"""What was deleted and is still to be removed from its node

Revision ID: 0004
Revises: 0003
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")


def upgrade() -> None:
    op.create_table(
        "leftovers",
        sa.Column("build_id", sa.String(length=36), nullable=False),
        sa.Column("node_id", sa.String(length=128), nullable=False),
        sa.Column("snapshot_id", sa.String(length=64), nullable=True),
        sa.Column("layers", _JSON, nullable=False),
        sa.PrimaryKeyConstraint("build_id"),
    )
    op.create_index("ix_leftovers_node_id", "leftovers", ["node_id"], unique=False)
