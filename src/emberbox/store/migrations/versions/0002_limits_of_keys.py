"""Keys have a number of sandboxes, and sandboxes know the key that made them

Revision ID: 0002
Revises: 0001
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table in ("api_keys", "access_tokens"):
        op.add_column(table, sa.Column("sandbox_limit", sa.Integer(), nullable=True))
    op.add_column("sandboxes", sa.Column("api_key_id", sa.String(length=36), nullable=True))
    op.create_index("ix_sandboxes_key_state", "sandboxes", ["api_key_id", "state"], unique=False)
