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
    # What starts from a snapshot has what its sandbox had: no limits, whatever the installation gives by then.
    builds = sa.table("template_builds", sa.column("snapshot_id", sa.String), sa.column("rates", _JSON))
    none = {"disk_mb_per_second": 0, "disk_operations_per_second": 0, "network_mbit_per_second": 0}
    op.execute(builds.update().where(builds.c.snapshot_id.is_not(None)).values(rates=none))
