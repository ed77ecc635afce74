# SPDX-License-Identifier: Apache-2.0
"""The secrets by which hosts prove who they are, sealed (``volume.vault``);
and how fast volumes may be used.
"""

import sqlalchemy as sa
from alembic import op

ONLY_ADDS = True
revision = '0003'
down_revision = '0002'

LIMITS = 'iops_limit', 'bytes_per_s_limit'


def upgrade() -> None:
    op.add_column('attachments', sa.Column(
        'credentials', sa.Text(), nullable=True
    ))
    for name in LIMITS:
        op.add_column('volumes', sa.Column(
            name, sa.BigInteger(), nullable=True
        ))


def downgrade() -> None:
    for name in LIMITS:
        op.drop_column('volumes', name)
    op.drop_column('attachments', 'credentials')
