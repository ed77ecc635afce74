# SPDX-License-Identifier: Apache-2.0
"""The secrets by which hosts prove who they are, sealed (``volume.vault``)."""

import sqlalchemy as sa
from alembic import op

ONLY_ADDS = True
revision = '0003'
down_revision = '0002'


def upgrade() -> None:
    op.add_column('attachments', sa.Column(
        'credentials', sa.Text(), nullable=True
    ))


def downgrade() -> None:
    op.drop_column('attachments', 'credentials')
