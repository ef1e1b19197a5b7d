"""Templates ask for rates of disk and network, and sandboxes have them

Revision ID: 0003
Revises: 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")


def upgrade() -> None:
    for table in ("template_builds", "sandboxes"):
        op.add_column(table, sa.Column("rates", _JSON, nullable=False, server_default="{}"))
