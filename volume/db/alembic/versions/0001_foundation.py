# SPDX-License-Identifier: Apache-2.0
"""Volumes, snapshots, attachments, pools, services and jobs."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

TEXT = sa.Text().with_variant(mysql.MEDIUMTEXT(), 'mariadb')

revision = '0001'
down_revision = None


def upgrade() -> None:
    op.create_table('attachments',
    sa.Column('id', sa.String(length=36), nullable=False),
    sa.Column('volume_id', sa.String(length=36), nullable=False),
    sa.Column('project_id', sa.String(length=255), nullable=False),
    sa.Column('backend', sa.String(length=64), nullable=False),
    sa.Column('status', sa.String(length=32), nullable=False),
    sa.Column('host', sa.String(length=255), nullable=False),
    sa.Column('connector', sa.JSON(), nullable=False),
    sa.Column('connection', sa.JSON(), nullable=False),
    sa.Column('is_connected', sa.Boolean(), nullable=False),
    sa.Column('instance_uuid', sa.String(length=36), nullable=True),
    sa.Column('mountpoint', sa.String(length=255), nullable=True),
    sa.Column('mode', sa.String(length=2), nullable=False),
    sa.Column('created_at', sa.Double(), nullable=False),
    sa.Column('attached_at', sa.Double(), nullable=True),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_attachments'))
    )
    op.create_index(op.f('ix_attachments_backend'), 'attachments', ['backend'], unique=False)
    op.create_index(op.f('ix_attachments_volume_id'), 'attachments', ['volume_id'], unique=False)
    op.create_table('backends',
    sa.Column('name', sa.String(length=64), nullable=False),
    sa.Column('host', sa.String(length=255), nullable=False),
    sa.Column('driver', sa.String(length=64), nullable=False),
    sa.Column('exporter', sa.String(length=64), nullable=False),
    sa.Column('is_up', sa.Boolean(), nullable=False),
    sa.Column('enabled', sa.Boolean(), nullable=False),
    sa.Column('reason', TEXT, nullable=False),
    sa.Column('tags', sa.JSON(), nullable=False),
    sa.Column('projects', sa.JSON(), nullable=False),
    sa.Column('cluster', sa.String(length=255), nullable=False),
    sa.Column('role', sa.String(length=32), nullable=False),
    sa.Column('cost', sa.BigInteger(), nullable=False),
    sa.Column('updated_at', sa.Double(), nullable=False),
    sa.PrimaryKeyConstraint('name', name=op.f('pk_backends'))
    )
    op.create_table('devices',
    sa.Column('name', sa.String(length=255), nullable=False),
    sa.Column('limit_bytes', sa.BigInteger(), nullable=False),
    sa.Column('claimed_bytes', sa.BigInteger(), nullable=False),
    sa.PrimaryKeyConstraint('name', name=op.f('pk_devices'))
    )
    op.create_table('jobs',
    sa.Column('id', sa.String(length=36), nullable=False),
    sa.Column('kind', sa.String(length=32), nullable=False),
    sa.Column('state', sa.String(length=16), nullable=False),
    sa.Column('direction', sa.String(length=4), nullable=False),
    sa.Column('step', sa.Integer(), nullable=False),
    sa.Column('volume_id', sa.String(length=36), nullable=True),
    sa.Column('snapshot_id', sa.String(length=36), nullable=True),
    sa.Column('backend', sa.String(length=64), nullable=False),
    sa.Column('args', sa.JSON(), nullable=False),
    sa.Column('exclusive', sa.JSON(), nullable=False),
    sa.Column('shared', sa.JSON(), nullable=False),
    sa.Column('project_id', sa.String(length=255), nullable=False),
    sa.Column('request_id', sa.String(length=64), nullable=False),
    sa.Column('error_kind', sa.String(length=32), nullable=False),
    sa.Column('error', TEXT, nullable=False),
    sa.Column('owner', sa.String(length=36), nullable=True),
    sa.Column('owner_host', sa.String(length=255), nullable=False),
    sa.Column('token', sa.BigInteger(), nullable=False),
    sa.Column('expires_at', sa.Double(), nullable=False),
    sa.Column('due_at', sa.Double(), nullable=False),
    sa.Column('give_up_at', sa.Double(), nullable=True),
    sa.Column('attempts', sa.Integer(), nullable=False),
    sa.Column('cancel', sa.Boolean(), nullable=False),
    sa.Column('done_bytes', sa.BigInteger(), nullable=False),
    sa.Column('total_bytes', sa.BigInteger(), nullable=False),
    sa.Column('rate_bytes_per_s', sa.BigInteger(), nullable=False),
    sa.Column('created_at', sa.Double(), nullable=False),
    sa.Column('updated_at', sa.Double(), nullable=False),
    sa.Column('ended_at', sa.Double(), nullable=True),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_jobs'))
    )
    op.create_index(op.f('ix_jobs_created_at'), 'jobs', ['created_at'], unique=False)
    op.create_index(op.f('ix_jobs_state_due_at'), 'jobs', ['state', 'due_at'], unique=False)
    op.create_index(op.f('ix_jobs_state_ended_at'), 'jobs', ['state', 'ended_at'], unique=False)
    op.create_index(op.f('ix_jobs_volume_id_state'), 'jobs', ['volume_id', 'state'], unique=False)
    op.create_table('pools',
    sa.Column('backend', sa.String(length=64), nullable=False),
    sa.Column('name', sa.String(length=255), nullable=False),
    sa.Column('is_up', sa.Boolean(), nullable=False),
    sa.Column('total_bytes', sa.BigInteger(), nullable=False),
    sa.Column('limit_bytes', sa.BigInteger(), nullable=False),
    sa.Column('free_bytes', sa.BigInteger(), nullable=False),
    sa.Column('claimed_bytes', sa.BigInteger(), nullable=False),
    sa.Column('hidden_bytes', sa.BigInteger(), nullable=False),
    sa.Column('granularity_bytes', sa.BigInteger(), nullable=False),
    sa.Column('max_volume_bytes', sa.BigInteger(), nullable=False),
    sa.Column('thin', sa.Boolean(), nullable=False),
    sa.Column('features', sa.JSON(), nullable=False),
    sa.Column('device', sa.String(length=255), nullable=False),
    sa.Column('updated_at', sa.Double(), nullable=False),
    sa.PrimaryKeyConstraint('backend', 'name', name=op.f('pk_pools'))
    )
    op.create_table('services',
    sa.Column('host', sa.String(length=255), nullable=False),
    sa.Column('owner', sa.String(length=36), nullable=False),
    sa.Column('roles', sa.JSON(), nullable=False),
    sa.Column('version', sa.String(length=64), nullable=False),
    sa.Column('node_id', sa.String(length=36), nullable=False),
    sa.Column('is_fenced', sa.Boolean(), nullable=False),
    sa.Column('started_at', sa.Double(), nullable=False),
    sa.Column('heard_at', sa.Double(), nullable=False),
    sa.PrimaryKeyConstraint('host', name=op.f('pk_services'))
    )
    op.create_table('snapshots',
    sa.Column('id', sa.String(length=36), nullable=False),
    sa.Column('volume_id', sa.String(length=36), nullable=False),
    sa.Column('project_id', sa.String(length=255), nullable=False),
    sa.Column('user_id', sa.String(length=255), nullable=False),
    sa.Column('name', sa.String(length=255), nullable=False),
    sa.Column('description', sa.String(length=255), nullable=False),
    sa.Column('meta', sa.JSON(), nullable=False),
    sa.Column('status', sa.String(length=32), nullable=False),
    sa.Column('reason', TEXT, nullable=False),
    sa.Column('backend', sa.String(length=64), nullable=False),
    sa.Column('pool', sa.String(length=255), nullable=False),
    sa.Column('handle', sa.String(length=255), nullable=False),
    sa.Column('size_bytes', sa.BigInteger(), nullable=False),
    sa.Column('claimed_bytes', sa.BigInteger(), nullable=False),
    sa.Column('request_hash', sa.String(length=64), nullable=False),
    sa.Column('lease_job', sa.String(length=36), nullable=True),
    sa.Column('lease_shared', sa.Integer(), nullable=False),
    sa.Column('created_at', sa.Double(), nullable=False),
    sa.Column('updated_at', sa.Double(), nullable=False),
    sa.Column('deleted_at', sa.Double(), nullable=True),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_snapshots'))
    )
    op.create_index(op.f('ix_snapshots_backend_pool'), 'snapshots', ['backend', 'pool'], unique=False)
    op.create_index(op.f('ix_snapshots_deleted_at_created_at_id'), 'snapshots', ['deleted_at', 'created_at', 'id'], unique=False)
    op.create_index(op.f('ix_snapshots_deleted_at_project_id_created_at_id'), 'snapshots', ['deleted_at', 'project_id', 'created_at', 'id'], unique=False)
    op.create_index(op.f('ix_snapshots_volume_id_deleted_at'), 'snapshots', ['volume_id', 'deleted_at'], unique=False)
    op.create_table('volumes',
    sa.Column('id', sa.String(length=36), nullable=False),
    sa.Column('project_id', sa.String(length=255), nullable=False),
    sa.Column('user_id', sa.String(length=255), nullable=False),
    sa.Column('name', sa.String(length=255), nullable=False),
    sa.Column('description', sa.String(length=255), nullable=False),
    sa.Column('meta', sa.JSON(), nullable=False),
    sa.Column('status', sa.String(length=32), nullable=False),
    sa.Column('reason', TEXT, nullable=False),
    sa.Column('backend', sa.String(length=64), nullable=False),
    sa.Column('pool', sa.String(length=255), nullable=False),
    sa.Column('handle', sa.String(length=255), nullable=False),
    sa.Column('size_bytes', sa.BigInteger(), nullable=False),
    sa.Column('claimed_bytes', sa.BigInteger(), nullable=False),
    sa.Column('availability_zone', sa.String(length=255), nullable=False),
    sa.Column('volume_type', sa.String(length=255), nullable=False),
    sa.Column('bootable', sa.Boolean(), nullable=False),
    sa.Column('multiattach', sa.Boolean(), nullable=False),
    sa.Column('readonly', sa.Boolean(), nullable=False),
    sa.Column('snapshot_id', sa.String(length=36), nullable=True),
    sa.Column('source_volume_id', sa.String(length=36), nullable=True),
    sa.Column('image', sa.JSON(), nullable=False),
    sa.Column('wish', sa.JSON(), nullable=False),
    sa.Column('request_hash', sa.String(length=64), nullable=False),
    sa.Column('lease_job', sa.String(length=36), nullable=True),
    sa.Column('lease_shared', sa.Integer(), nullable=False),
    sa.Column('created_at', sa.Double(), nullable=False),
    sa.Column('updated_at', sa.Double(), nullable=False),
    sa.Column('launched_at', sa.Double(), nullable=True),
    sa.Column('deleted_at', sa.Double(), nullable=True),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_volumes'))
    )
    op.create_index(op.f('ix_volumes_backend_pool'), 'volumes', ['backend', 'pool'], unique=False)
    op.create_index(op.f('ix_volumes_deleted_at_created_at_id'), 'volumes', ['deleted_at', 'created_at', 'id'], unique=False)
    op.create_index(op.f('ix_volumes_deleted_at_name'), 'volumes', ['deleted_at', 'name'], unique=False)
    op.create_index(op.f('ix_volumes_deleted_at_project_id_created_at_id'), 'volumes', ['deleted_at', 'project_id', 'created_at', 'id'], unique=False)


def downgrade() -> None:
    op.drop_index(op.f('ix_volumes_deleted_at_project_id_created_at_id'), table_name='volumes')
    op.drop_index(op.f('ix_volumes_deleted_at_name'), table_name='volumes')
    op.drop_index(op.f('ix_volumes_deleted_at_created_at_id'), table_name='volumes')
    op.drop_index(op.f('ix_volumes_backend_pool'), table_name='volumes')
    op.drop_table('volumes')
    op.drop_index(op.f('ix_snapshots_volume_id_deleted_at'), table_name='snapshots')
    op.drop_index(op.f('ix_snapshots_deleted_at_project_id_created_at_id'), table_name='snapshots')
    op.drop_index(op.f('ix_snapshots_deleted_at_created_at_id'), table_name='snapshots')
    op.drop_index(op.f('ix_snapshots_backend_pool'), table_name='snapshots')
    op.drop_table('snapshots')
    op.drop_table('services')
    op.drop_table('pools')
    op.drop_index(op.f('ix_jobs_volume_id_state'), table_name='jobs')
    op.drop_index(op.f('ix_jobs_state_ended_at'), table_name='jobs')
    op.drop_index(op.f('ix_jobs_state_due_at'), table_name='jobs')
    op.drop_index(op.f('ix_jobs_created_at'), table_name='jobs')
    op.drop_table('jobs')
    op.drop_table('devices')
    op.drop_table('backends')
    op.drop_index(op.f('ix_attachments_volume_id'), table_name='attachments')
    op.drop_index(op.f('ix_attachments_backend'), table_name='attachments')
    op.drop_table('attachments')
