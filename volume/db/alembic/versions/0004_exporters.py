# SPDX-License-Identifier: Apache-2.0
"""Which exporter let a host in: no other can end that."""

import sqlalchemy as sa
from alembic import op

ONLY_ADDS = True
revision = '0004'
down_revision = '0003'


def upgrade() -> None:
    op.add_column('attachments', sa.Column(
        'exporter', sa.String(64), nullable=False, server_default=''
    ))


def downgrade() -> None:
    op.drop_column('attachments', 'exporter')
