# SPDX-License-Identifier: Apache-2.0
"""The tables, and the statuses that rows go through.

Times are seconds since 1970 in UTC, as doubles: every database keeps them
alike. Sizes are bytes. ``lease_job`` is the job that holds a row for itself
for as long as it is open, ``lease_shared`` how many jobs read it.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger
from sqlalchemy import Double
from sqlalchemy import Index
from sqlalchemy import Integer
from sqlalchemy import JSON
from sqlalchemy import MetaData
from sqlalchemy import String
from sqlalchemy import Text
from sqlalchemy.dialects.mysql import MEDIUMTEXT
from sqlalchemy.orm import DeclarativeBase
from sqlalchemy.orm import Mapped
from sqlalchemy.orm import mapped_column

TRANSITIONAL = frozenset({
    'creating', 'downloading', 'uploading', 'attaching', 'detaching',
    'extending', 'deleting', 'reverting', 'managing', 'unmanaging',
    'flattening', 'reserved',
})
"""Statuses that something must lead out of: a job, or a host's next call."""


# MariaDB's TEXT ends at 64 KiB, and in the middle of a sentence.
LongText = Text().with_variant(MEDIUMTEXT(), 'mariadb')


class Base(DeclarativeBase):
    """Names every constraint, so that a migration can drop it again."""

    metadata = MetaData(naming_convention={
        'ix': 'ix_%(table_name)s_%(column_0_N_name)s',
        'uq': 'uq_%(table_name)s_%(column_0_N_name)s',
        'pk': 'pk_%(table_name)s',
    })
    type_annotation_map = {
        int: BigInteger, float: Double, dict[str, Any]: JSON, list[str]: JSON,
    }


class Volume(Base):
    """A volume that was promised; deleted ones stay as tombstones."""

    __tablename__ = 'volumes'
    __table_args__ = (
        Index(None, 'deleted_at', 'created_at', 'id'),
        Index(None, 'deleted_at', 'project_id', 'created_at', 'id'),
        Index(None, 'deleted_at', 'name'),
        Index(None, 'backend', 'pool'),
    )

    id: Mapped[str] = mapped_column(String(36), primary_key=True)
    project_id: Mapped[str] = mapped_column(String(255))
    user_id: Mapped[str] = mapped_column(String(255))
    name: Mapped[str] = mapped_column(String(255), default='')
    description: Mapped[str] = mapped_column(String(255), default='')
    meta: Mapped[dict[str, Any]] = mapped_column(default=dict)
    status: Mapped[str] = mapped_column(String(32))
    reason: Mapped[str] = mapped_column(LongText, default='')
    backend: Mapped[str] = mapped_column(String(64), default='')
    pool: Mapped[str] = mapped_column(String(255), default='')
    handle: Mapped[str] = mapped_column(String(255), default='')
    size_bytes: Mapped[int]
    claimed_bytes: Mapped[int] = mapped_column(default=0)
    availability_zone: Mapped[str] = mapped_column(String(255), default='nova')
    volume_type: Mapped[str] = mapped_column(String(255), default='')
    bootable: Mapped[bool] = mapped_column(default=False)
    multiattach: Mapped[bool] = mapped_column(default=False)
    readonly: Mapped[bool] = mapped_column(default=False)
    iops_limit: Mapped[int | None]
    bytes_per_s_limit: Mapped[int | None]
    snapshot_id: Mapped[str | None] = mapped_column(String(36))
    source_volume_id: Mapped[str | None] = mapped_column(String(36))
    image: Mapped[dict[str, Any]] = mapped_column(default=dict)
    wish: Mapped[dict[str, Any]] = mapped_column(default=dict)
    request_hash: Mapped[str] = mapped_column(String(64), default='')
    lease_job: Mapped[str | None] = mapped_column(String(36))
    lease_shared: Mapped[int] = mapped_column(Integer, default=0)
    created_at: Mapped[float]
    updated_at: Mapped[float]
    launched_at: Mapped[float | None]
    deleted_at: Mapped[float | None]


class Snapshot(Base):
    """A snapshot that was promised; ``size_bytes`` is the volume's then."""

    __tablename__ = 'snapshots'
    __table_args__ = (
        Index(None, 'volume_id', 'deleted_at'),
        Index(None, 'deleted_at', 'created_at', 'id'),
        Index(None, 'deleted_at', 'project_id', 'created_at', 'id'),
        Index(None, 'backend', 'pool'),
    )

    id: Mapped[str] = mapped_column(String(36), primary_key=True)
    volume_id: Mapped[str] = mapped_column(String(36))
    project_id: Mapped[str] = mapped_column(String(255))
    user_id: Mapped[str] = mapped_column(String(255))
    name: Mapped[str] = mapped_column(String(255), default='')
    description: Mapped[str] = mapped_column(String(255), default='')
    meta: Mapped[dict[str, Any]] = mapped_column(default=dict)
    status: Mapped[str] = mapped_column(String(32))
    reason: Mapped[str] = mapped_column(LongText, default='')
    backend: Mapped[str] = mapped_column(String(64), default='')
    pool: Mapped[str] = mapped_column(String(255), default='')
    handle: Mapped[str] = mapped_column(String(255), default='')
    size_bytes: Mapped[int]
    claimed_bytes: Mapped[int] = mapped_column(default=0)
    request_hash: Mapped[str] = mapped_column(String(64), default='')
    lease_job: Mapped[str | None] = mapped_column(String(36))
    lease_shared: Mapped[int] = mapped_column(Integer, default=0)
    created_at: Mapped[float]
    updated_at: Mapped[float]
    deleted_at: Mapped[float | None]


class Attachment(Base):
    """A host's right to a volume; gone when it has ended.

    Status: ``reserved`` (no connector yet), ``attaching`` (a connection is
    being made, or was given), ``attached``, ``detaching``. While it is
    connected, ``node`` is the service whose node has the volume open; empty
    if the storage itself lets the host in. ``exporter`` is what the backend
    had then, and alone can end it; empty if an earlier release made it.
    ``credentials`` are sealed: what the exporter was given, and what the
    host is told.
    """

    __tablename__ = 'attachments'
    __table_args__ = (
        Index(None, 'volume_id'),
        Index(None, 'backend'),
        Index(None, 'instance_uuid'),
        Index(None, 'created_at', 'id'),
        Index(None, 'project_id', 'created_at', 'id'),
    )

    id: Mapped[str] = mapped_column(String(36), primary_key=True)
    volume_id: Mapped[str] = mapped_column(String(36))
    project_id: Mapped[str] = mapped_column(String(255))
    backend: Mapped[str] = mapped_column(String(64))
    status: Mapped[str] = mapped_column(String(32))
    host: Mapped[str] = mapped_column(String(255), default='')
    connector: Mapped[dict[str, Any]] = mapped_column(default=dict)
    connection: Mapped[dict[str, Any]] = mapped_column(default=dict)
    is_connected: Mapped[bool] = mapped_column(default=False)
    instance_uuid: Mapped[str | None] = mapped_column(String(36))
    mountpoint: Mapped[str | None] = mapped_column(String(255))
    mode: Mapped[str] = mapped_column(String(2), default='rw')
    node: Mapped[str] = mapped_column(
        String(255), default='', server_default=''
    )
    exporter: Mapped[str] = mapped_column(
        String(64), default='', server_default=''
    )
    credentials: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[float]
    attached_at: Mapped[float | None]


class Backend(Base):
    """A configured backend, as its manager last reported it."""

    __tablename__ = 'backends'

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    host: Mapped[str] = mapped_column(String(255))
    driver: Mapped[str] = mapped_column(String(64))
    exporter: Mapped[str] = mapped_column(String(64), default='')
    is_up: Mapped[bool] = mapped_column(default=False)
    enabled: Mapped[bool] = mapped_column(default=True)
    reason: Mapped[str] = mapped_column(LongText, default='')
    tags: Mapped[list[str]] = mapped_column(default=list)
    projects: Mapped[list[str]] = mapped_column(default=list)
    cluster: Mapped[str] = mapped_column(String(255), default='')
    role: Mapped[str] = mapped_column(String(32), default='')
    cost: Mapped[int] = mapped_column(default=0)
    updated_at: Mapped[float]


class Pool(Base):
    """A pool's capacity: what is promised, and what is stored.

    ``limit_bytes`` is total × oversubscription − reserved; claims and
    hidden bytes together never pass it. ``free_bytes`` is physical, less
    the reserve.
    """

    __tablename__ = 'pools'

    backend: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(255), primary_key=True)
    is_up: Mapped[bool] = mapped_column(default=False)
    total_bytes: Mapped[int] = mapped_column(default=0)
    limit_bytes: Mapped[int] = mapped_column(default=0)
    free_bytes: Mapped[int] = mapped_column(default=0)
    claimed_bytes: Mapped[int] = mapped_column(default=0)
    hidden_bytes: Mapped[int] = mapped_column(default=0)
    granularity_bytes: Mapped[int] = mapped_column(default=512)
    max_volume_bytes: Mapped[int] = mapped_column(default=1 << 62)
    thin: Mapped[bool] = mapped_column(default=True)
    features: Mapped[list[str]] = mapped_column(default=list)
    device: Mapped[str] = mapped_column(String(255), default='')
    updated_at: Mapped[float]


class Device(Base):
    """A physical store under one or more pools, with their common budget."""

    __tablename__ = 'devices'

    name: Mapped[str] = mapped_column(String(255), primary_key=True)
    limit_bytes: Mapped[int] = mapped_column(default=0)
    claimed_bytes: Mapped[int] = mapped_column(default=0)


class Service(Base):
    """A process that serves, and when it was last heard of.

    ``domain`` is its lock domain; ``backends`` says of each that it has what
    is wrong with it, nothing if it is up.
    """

    __tablename__ = 'services'

    host: Mapped[str] = mapped_column(String(255), primary_key=True)
    owner: Mapped[str] = mapped_column(String(36))
    roles: Mapped[list[str]] = mapped_column(default=list)
    version: Mapped[str] = mapped_column(String(64), default='')
    node_id: Mapped[str] = mapped_column(String(36), default='')
    is_fenced: Mapped[bool] = mapped_column(default=False)
    domain: Mapped[str] = mapped_column(
        String(128), default='', server_default=''
    )
    backends: Mapped[dict[str, Any] | None] = mapped_column(
        JSON(none_as_null=True)
    )
    started_at: Mapped[float]
    heard_at: Mapped[float]


class Compatibility(Base):
    """One row: the oldest schema version whose code works on this one."""

    __tablename__ = 'compatibility'

    oldest: Mapped[str] = mapped_column(String(32), primary_key=True)


class Job(Base):
    """A workflow: what is to be done, how far it is, and who does it.

    State: ``open`` until it is ``done``, ``failed`` or ``cancelled``.
    Direction: ``do``, or ``undo`` after a failure. ``step`` is the step
    that has begun; ``token`` grows with each take-over and fences rows.
    ``node`` is the one service that may run it, if it is given: the volume
    is open there.
    """

    __tablename__ = 'jobs'
    __table_args__ = (
        Index(None, 'state', 'due_at'),
        Index(None, 'volume_id', 'state'),
        Index(None, 'state', 'ended_at'),
        Index(None, 'created_at', 'id'),
        Index(None, 'project_id', 'created_at', 'id'),
    )

    id: Mapped[str] = mapped_column(String(36), primary_key=True)
    kind: Mapped[str] = mapped_column(String(32))
    state: Mapped[str] = mapped_column(String(16), default='open')
    direction: Mapped[str] = mapped_column(String(4), default='do')
    step: Mapped[int] = mapped_column(Integer, default=0)
    volume_id: Mapped[str | None] = mapped_column(String(36))
    snapshot_id: Mapped[str | None] = mapped_column(String(36))
    backend: Mapped[str] = mapped_column(String(64))
    args: Mapped[dict[str, Any]] = mapped_column(default=dict)
    exclusive: Mapped[list[str]] = mapped_column(default=list)
    shared: Mapped[list[str]] = mapped_column(default=list)
    project_id: Mapped[str] = mapped_column(String(255), default='')
    request_id: Mapped[str] = mapped_column(String(64), default='')
    error_kind: Mapped[str] = mapped_column(String(32), default='')
    error: Mapped[str] = mapped_column(LongText, default='')
    owner: Mapped[str | None] = mapped_column(String(36))
    owner_host: Mapped[str] = mapped_column(String(255), default='')
    node: Mapped[str] = mapped_column(
        String(255), default='', server_default=''
    )
    token: Mapped[int] = mapped_column(default=1)
    expires_at: Mapped[float] = mapped_column(default=0.0)
    due_at: Mapped[float]
    give_up_at: Mapped[float | None]
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    cancel: Mapped[bool] = mapped_column(default=False)
    done_bytes: Mapped[int] = mapped_column(default=0)
    total_bytes: Mapped[int] = mapped_column(default=0)
    rate_bytes_per_s: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[float]
    updated_at: Mapped[float]
    ended_at: Mapped[float | None]
