# SPDX-License-Identifier: Apache-2.0
"""Run migrations on the connection that volume.db.migrate hands over."""

from alembic import context

from volume.db import models

context.configure(
    connection=context.config.attributes['connection'],
    target_metadata=models.Base.metadata,
    render_as_batch=True,
    transaction_per_migration=False,
    # PostgreSQL and SQLite run all of it in the transaction of migrate.py;
    # MariaDB has none for this, see volume/db/repeatable.py.
    transactional_ddl=False,
)
context.run_migrations()
