# SPDX-License-Identifier: Apache-2.0
"""Where an attachment is open, where a job must run, who can fence whom;
and indexes for the lists of a large installation.

Each new column has a default in the database, so that a release which does
not know it can go on writing rows while the managers are upgraded one after
another. The table ``compatibility`` says from here on which code may work
on a schema that it does not know, see ``volume.db.migrate``.
"""

import sqlalchemy as sa
from alembic import op

revision = '0002'
down_revision = '0001'

INDEXES = (
    ('attachments', ('instance_uuid',)),
    ('attachments', ('created_at', 'id')),
    ('attachments', ('project_id', 'created_at', 'id')),
    ('jobs', ('created_at', 'id')),
    ('jobs', ('project_id', 'created_at', 'id')),
)


def upgrade() -> None:
    op.create_table(
        'compatibility',
        sa.Column('oldest', sa.String(32), nullable=False),
        sa.PrimaryKeyConstraint('oldest', name=op.f('pk_compatibility')),
    )
    for table, column, length in (
        ('attachments', 'node', 255), ('jobs', 'node', 255),
        ('services', 'domain', 128),
    ):
        op.add_column(table, sa.Column(
            column, sa.String(length), nullable=False, server_default=''
        ))
    op.add_column('services', sa.Column('backends', sa.JSON(), nullable=True))
    # Until now a backend had one manager: what is exported, it exports.
    attachments = sa.table(
        'attachments', sa.column('backend'), sa.column('node'),
        sa.column('is_connected', sa.Boolean()),
    )
    backends = sa.table('backends', sa.column('name'), sa.column('host'))
    host = (
        sa.select(backends.c.host)
        .where(backends.c.name == attachments.c.backend)
        .scalar_subquery()
    )
    op.execute(
        attachments.update()
        .where(attachments.c.is_connected.is_(True))
        .values(node=sa.func.coalesce(host, ''))
    )
    for table, columns in INDEXES:
        op.create_index(_name(table, columns), table, columns)
    op.drop_index('ix_jobs_created_at', 'jobs')


def downgrade() -> None:
    op.create_index('ix_jobs_created_at', 'jobs', ['created_at'])
    for table, columns in INDEXES:
        op.drop_index(_name(table, columns), table)
    op.drop_table('compatibility')
    op.drop_column('services', 'backends')
    op.drop_column('services', 'domain')
    op.drop_column('jobs', 'node')
    op.drop_column('attachments', 'node')


def _name(table: str, columns: tuple[str, ...]) -> str:
    return f'ix_{table}_{"_".join(columns)}'
