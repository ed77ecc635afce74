# SPDX-License-Identifier: Apache-2.0
"""The verbs that other services call by RPC; each only accepts.

Names and arguments are nova-volume's; what came later has a default. A cast
may be repeated, and may overtake another: the same again is nothing, another
request for the same id is a Conflict, and what was deleted before it came is
never made. Sizes called ``size`` are GiB.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import select

from volume import errors
from volume import ids
from volume import model
from volume.context import Caller
from volume.core import Core
from volume.db import models
from volume.notify import Notify
from volume.rpcverb import verb
from volume.verbs import attachments
from volume.verbs import images
from volume.verbs import jobs
from volume.verbs import lookup
from volume.verbs import rows
from volume.verbs import snapshots
from volume.verbs import tombstones
from volume.verbs import volumes

Json = dict[str, Any]


class VolumeManager:
    """The endpoint of the topics ``volume`` and ``volume.<host>``."""

    def __init__(self, core: Core) -> None:
        self.core = core

    @property
    def notify(self) -> Notify:
        """Where a failed cast is reported."""
        return self.core.notify

    # Volumes.

    @verb(error='volume.create.error')
    def create_volume(
        self,
        caller: Caller,
        volume_id: str,
        snapshot_id: str | None = None,
        image_id: str | None = None,
        reservations: list[Any] | None = None,
        *,
        size: int | str | None = None,
        size_bytes: int | None = None,
        name: str | None = None,
        description: str | None = None,
        metadata: dict[str, Any] | None = None,
        tags: list[str] | None = None,
        image: dict[str, Any] | None = None,
        source_volume_id: str | None = None,
        volume_type: str | None = None,
        availability_zone: str | None = None,
        multiattach: bool = False,
        backend: str | None = None,
        pool: str | None = None,
        cluster: str | None = None,
        role: str | None = None,
        refuse: bool = False,
    ) -> Json:
        """Accept a volume; ``refuse`` leaves no row where no pool fits.

        ``reservations`` are the sender's own affair and left alone.
        """
        if image and image_id:
            raise errors.Invalid('image and image_id are given; one will do')
        new = volumes.NewVolume(
            id=ids.check(volume_id, 'volume id'),
            size_bytes=_size_bytes(size, size_bytes),
            name=name, description=description, metadata=metadata,
            snapshot_id=snapshot_id, source_volume_id=source_volume_id,
            image=image or ({'url': image_id} if image_id else None),
            volume_type=volume_type, availability_zone=availability_zone,
            multiattach=multiattach, tags=frozenset(tags or ()),
            backend=backend or '', pool=pool or '', cluster=cluster or '',
            role=role or '',
        )
        # A cast of nova-volume's names a row that is there already: then
        # it is the hint to make it, and the journal needs none.
        if new == volumes.NewVolume(id=new.id):
            found = lookup.volume(self.core, caller, volume_id)
            return volume_json(found.row, list(found.attachments))
        row = volumes.create(self.core, caller, new, refuse=refuse)
        return volume_json(row, [])

    @verb(error='volume.delete.error')
    def delete_volume(
        self,
        caller: Caller,
        volume_id: str,
        *,
        force: bool = False,
        cascade: bool = False,
    ) -> bool:
        tombstones.delete_volume(
            self.core, caller, volume_id, force=force, cascade=cascade
        )
        return True

    @verb(error='volume.resize.error')
    def extend_volume(
        self,
        caller: Caller,
        volume_id: str,
        new_size: int | str | None = None,
        *,
        new_size_bytes: int | None = None,
    ) -> None:
        wanted = _size_bytes(new_size, new_size_bytes)
        if wanted is None:
            raise errors.Invalid('new_size is missing')
        if not self._is_extended(caller, volume_id, wanted):
            volumes.extend(self.core, caller, volume_id, wanted)

    @verb('1.1')
    def get_volume(self, caller: Caller, volume_id: str) -> Json:
        found = lookup.volume(self.core, caller, volume_id)
        return volume_json(found.row, list(found.attachments))

    @verb(error='volume.upload.error')
    def copy_volume_to_image(
        self,
        caller: Caller,
        volume_id: str,
        image_id: str,
        *,
        format: str = 'raw',
        force: bool = False,
    ) -> str:
        template = self.core.settings.image_url_template
        url = template.replace('{id}', image_id) if (
            template and ids.is_id(image_id)
        ) else image_id
        return images.upload(
            self.core, caller, volume_id, url, format=format, force=force
        ).id

    # Snapshots.

    @verb(error='snapshot.create.error')
    def create_snapshot(
        self,
        caller: Caller,
        volume_id: str,
        snapshot_id: str,
        *,
        name: str | None = None,
        description: str | None = None,
        metadata: dict[str, Any] | None = None,
        force: bool = False,
    ) -> str:
        return snapshots.create(self.core, caller, snapshots.NewSnapshot(
            volume_id=volume_id, id=ids.check(snapshot_id, 'snapshot id'),
            name=name, description=description, metadata=metadata,
            force=force,
        )).id

    @verb(error='snapshot.delete.error')
    def delete_snapshot(
        self, caller: Caller, snapshot_id: str, *, force: bool = False
    ) -> bool:
        tombstones.delete_snapshot(
            self.core, caller, snapshot_id, force=force
        )
        return True

    @verb('1.1')
    def get_snapshot(self, caller: Caller, snapshot_id: str) -> Json:
        return snapshot_json(
            lookup.snapshot(self.core, caller, snapshot_id)
        )

    # What a host does around an attach.

    @verb('1.1')
    def reserve_volume(self, caller: Caller, volume_id: str) -> None:
        attachments.reserve(self.core, caller, volume_id)

    @verb('1.1')
    def unreserve_volume(self, caller: Caller, volume_id: str) -> None:
        attachments.unreserve(self.core, caller, volume_id)

    @verb()
    def initialize_connection(
        self,
        caller: Caller,
        volume_id: str,
        connector: dict[str, Any],
        *,
        mode: str = 'rw',
    ) -> Json:
        return attachments.connect(
            self.core, caller, volume_id, connector, mode=mode,
            with_secrets=True,
        )

    @verb()
    def terminate_connection(
        self,
        caller: Caller,
        volume_id: str,
        connector: dict[str, Any] | None = None,
        force: bool = False,
    ) -> None:
        attachments.disconnect(
            self.core, caller, volume_id, connector, force=force
        )

    @verb()
    def attach_volume(
        self,
        caller: Caller,
        volume_id: str,
        instance_uuid: str | None,
        mountpoint: str | None,
        *,
        host_name: str | None = None,
        mode: str = 'rw',
    ) -> None:
        attachments.attach(
            self.core, caller, volume_id, instance_uuid, mountpoint,
            host_name=host_name, mode=mode,
        )

    @verb('1.1')
    def begin_detaching(self, caller: Caller, volume_id: str) -> None:
        attachments.begin_detaching(self.core, caller, volume_id)

    @verb('1.1')
    def roll_detaching(self, caller: Caller, volume_id: str) -> None:
        attachments.roll_detaching(self.core, caller, volume_id)

    @verb()
    def detach_volume(
        self,
        caller: Caller,
        volume_id: str,
        attachment_id: str | None = None,
        *,
        force: bool = False,
    ) -> None:
        attachments.detach(
            self.core, caller, volume_id, attachment_id, force=force
        )

    # Among our own processes.

    @verb('1.1')
    def wake(self, caller: Caller, job_id: str) -> None:
        """Run a job now that another process has accepted."""
        job = jobs.get(self.core, caller, job_id)
        # Another's job is left alone: a hint that is handed on could go
        # round for ever, and the sweep finds the job anyway.
        if job.state == 'open' and self.core.runs(job.backend):
            jobs.wake(self.core, job)

    # Ours alone.

    def _is_extended(
        self, caller: Caller, volume_id: str, size_bytes: int
    ) -> bool:
        """Say whether this very extension is done, or under way."""

        def look(session: Any) -> bool:
            row = rows.volume(session, caller, volume_id)
            if row.status != 'extending':
                grain = rows.pool(session, row).granularity_bytes
                return row.size_bytes == -(-size_bytes // grain) * grain
            job = session.scalar(select(models.Job).where(
                models.Job.volume_id == row.id,
                models.Job.state == 'open',
                models.Job.kind == 'extend',
            ))
            return job is not None and (
                job.args.get('asked_bytes') == size_bytes
            )

        return bool(self.core.db.read(look))


def volume_json(
    row: models.Volume, attached: list[models.Attachment]
) -> Json:
    """Return a volume as messages carry it; no connection, no handle."""
    first = next((each for each in attached if each.instance_uuid), None)
    in_use = any(each.status == 'attached' for each in attached)
    return {
        'id': row.id,
        'project_id': row.project_id,
        'user_id': row.user_id,
        'status': row.status,
        'reason': row.reason or '',
        'size': -(-row.size_bytes // model.GIB),
        'size_bytes': row.size_bytes,
        'display_name': row.name,
        'display_description': row.description,
        'metadata': dict(row.meta or {}),
        'availability_zone': row.availability_zone,
        'volume_type': row.volume_type or None,
        'host': f'{row.backend}#{row.pool}' if row.backend else None,
        'snapshot_id': row.snapshot_id,
        'source_volume_id': row.source_volume_id,
        'bootable': bool(row.bootable),
        'multiattach': bool(row.multiattach),
        'attach_status': 'attached' if in_use else 'detached',
        'instance_uuid': first.instance_uuid if first else None,
        'mountpoint': first.mountpoint if first else None,
        'attachments': [
            {
                'id': each.id,
                'status': each.status,
                'host': each.host,
                'instance_uuid': each.instance_uuid,
                'mountpoint': each.mountpoint,
                'mode': each.mode,
            }
            for each in attached
        ],
        'created_at': row.created_at,
        'launched_at': row.launched_at,
    }


def snapshot_json(row: models.Snapshot) -> Json:
    """Return a snapshot as messages carry it."""
    return {
        'id': row.id,
        'volume_id': row.volume_id,
        'project_id': row.project_id,
        'user_id': row.user_id,
        'status': row.status,
        'reason': row.reason or '',
        'progress': '100%' if row.status == 'available' else '0%',
        'volume_size': -(-row.size_bytes // model.GIB),
        'size_bytes': row.size_bytes,
        'display_name': row.name,
        'display_description': row.description,
        'metadata': dict(row.meta or {}),
        'created_at': row.created_at,
    }


def _size_bytes(gib: int | str | None, size_bytes: int | None) -> int | None:
    """Return the size that is asked for, of a number in GiB or in bytes.

    :raises Invalid: it is no whole number, not positive, or they differ
    """
    if gib is None:
        return size_bytes
    if isinstance(gib, str):
        if not gib.isascii() or not gib.isdigit() or len(gib) > 12:
            raise errors.Invalid(f'size {gib!r:.40} is not a whole number')
        gib = int(gib)
    if gib <= 0:
        raise errors.Invalid(f'size {gib!s:.40} must be greater than 0')
    if size_bytes is not None and size_bytes != gib * model.GIB:
        raise errors.Invalid(
            f'size {gib!s:.40} GiB and size_bytes {size_bytes!s:.40} '
            'differ'
        )
    return gib * model.GIB
