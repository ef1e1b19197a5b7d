"""How Alembic reaches the database: through the connection, and in the transaction, that `migrate` hands over."""

from __future__ import annotations

from alembic import context

from emberbox.store.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
    transactional_ddl=False,  # `migrate` owns the transaction
)
context.run_migrations()
