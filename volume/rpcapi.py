# SPDX-License-Identifier: Apache-2.0
"""The client that a compute service imports; it needs no database.

Version history of the RPC door:

* 1.0  nova-volume's verbs, with their names and arguments
* 1.1  a cast may carry everything (``size`` … ``role``); ``refuse``,
  ``force``, ``cascade``, ``mode`` and sizes in bytes; ``get_volume``,
  ``get_snapshot``, ``reserve_volume``, ``unreserve_volume``,
  ``begin_detaching``, ``roll_detaching``, ``wake``

A message carries the oldest version that has what it uses, so that an older
service serves what it can. A newer minor version only adds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from oslo_config import cfg

from volume import rpc

Json = dict[str, Any]


class VolumeAPI:
    """The verbs, as functions; ``caller`` is who asks.

    A caller is a ``volume.context.Caller``, a RequestContext of
    oslo.context, or a mapping with ``project_id``, ``user_id``,
    ``is_admin`` and ``request_id``. ``host`` names one service to ask; left
    out, any answers. A call raises the kinds of ``volume.errors``; after
    ``Unknown`` it may have happened, and every verb may simply be asked
    again.
    """

    def __init__(self, bus: rpc.Bus) -> None:
        self._bus = bus

    @classmethod
    def connect(
        cls,
        conf: cfg.ConfigOpts | None = None,
        url: str | None = None,
        *,
        timeout_s: float | None = None,
        retries: int = rpc.SEND_RETRIES,
    ) -> VolumeAPI:
        """Return a client through a broker: ``url``, or the conf's own.

        Without a conf, it has one of its own; nothing global is touched.
        """
        if conf is None:
            conf = cfg.ConfigOpts()
            conf([], default_config_files=[], default_config_dirs=[])
        return cls(rpc.Remote(
            conf, url, timeout_s=timeout_s, retries=retries
        ))

    @classmethod
    def local(cls, endpoint: rpc.Endpoint) -> VolumeAPI:
        """Return a client of an endpoint in this process."""
        return cls(rpc.Local(endpoint))

    def close(self) -> None:
        """Close every connection."""
        self._bus.close()

    # Volumes.

    def create_volume(
        self,
        caller: object,
        volume_id: str,
        snapshot_id: str | None = None,
        image_id: str | None = None,
        reservations: list[Any] | None = None,
        *,
        host: str = '',
        confirm: bool = True,
        size: int | str | None = None,
        size_bytes: int | None = None,
        name: str | None = None,
        description: str | None = None,
        metadata: Mapping[str, str] | None = None,
        tags: Collection[str] | None = None,
        image: Mapping[str, Any] | None = None,
        source_volume_id: str | None = None,
        volume_type: str | None = None,
        availability_zone: str | None = None,
        multiattach: bool | None = None,
        backend: str | None = None,
        pool: str | None = None,
        cluster: str | None = None,
        role: str | None = None,
    ) -> Json | None:
        """Ask for a volume; ``size`` is GiB, ``size_bytes`` exact.

        With ``confirm`` it is a call: it returns the volume once that is
        promised durably, and raises if it cannot be. Without, it is a
        cast, which is lost if the service dies before it has read it: cast
        again with the same id until ``get_volume`` knows it.
        """
        args = _given(
            snapshot_id=snapshot_id, image_id=image_id,
            reservations=reservations,
        )
        more = _given(
            size=size, size_bytes=size_bytes, name=name,
            description=description, metadata=metadata, image=image,
            source_volume_id=source_volume_id, volume_type=volume_type,
            availability_zone=availability_zone, multiattach=multiattach,
            backend=backend, pool=pool, cluster=cluster, role=role,
            tags=None if tags is None else sorted(tags),
        )
        if confirm:
            more['refuse'] = True
        made: Json | None = self._ask(
            caller, 'create_volume',
            {'volume_id': volume_id, **args}, more, host, waits=confirm,
        )
        return made

    def delete_volume(
        self,
        caller: object,
        volume_id: str,
        *,
        host: str = '',
        confirm: bool = False,
        force: bool | None = None,
        cascade: bool | None = None,
    ) -> None:
        """Ask for a volume's end; an unknown id will never be made."""
        self._ask(
            caller, 'delete_volume', {'volume_id': volume_id},
            _given(force=force, cascade=cascade), host, waits=confirm,
        )

    def extend_volume(
        self,
        caller: object,
        volume_id: str,
        new_size: int | None = None,
        *,
        host: str = '',
        confirm: bool = False,
        new_size_bytes: int | None = None,
    ) -> None:
        """Ask for a detached volume to grow to so many GiB, or bytes."""
        self._ask(
            caller, 'extend_volume',
            {'volume_id': volume_id, **_given(new_size=new_size)},
            _given(new_size_bytes=new_size_bytes), host, waits=confirm,
        )

    def get_volume(
        self, caller: object, volume_id: str, *, host: str = ''
    ) -> Json:
        """Return a volume: id, status, size, attachments …"""
        found: Json = self._call_new(
            caller, 'get_volume', {'volume_id': volume_id}, host
        )
        return found

    def copy_volume_to_image(
        self,
        caller: object,
        volume_id: str,
        image_id: str,
        *,
        host: str = '',
        confirm: bool = False,
        format: str | None = None,
        force: bool | None = None,
    ) -> None:
        """Ask for a volume to be written to an image: a URL, or an id."""
        self._ask(
            caller, 'copy_volume_to_image',
            {'volume_id': volume_id, 'image_id': image_id},
            _given(format=format, force=force), host, waits=confirm,
        )

    # Snapshots.

    def create_snapshot(
        self,
        caller: object,
        volume_id: str,
        snapshot_id: str,
        *,
        host: str = '',
        confirm: bool = False,
        name: str | None = None,
        description: str | None = None,
        metadata: Mapping[str, str] | None = None,
        force: bool | None = None,
    ) -> None:
        """Ask for a snapshot; ``force`` also of an attached volume."""
        self._ask(
            caller, 'create_snapshot',
            {'volume_id': volume_id, 'snapshot_id': snapshot_id},
            _given(
                name=name, description=description, metadata=metadata,
                force=force,
            ),
            host, waits=confirm,
        )

    def delete_snapshot(
        self,
        caller: object,
        snapshot_id: str,
        *,
        host: str = '',
        confirm: bool = False,
        force: bool | None = None,
    ) -> None:
        """Ask for a snapshot's end; an unknown id will never be made."""
        self._ask(
            caller, 'delete_snapshot', {'snapshot_id': snapshot_id},
            _given(force=force), host, waits=confirm,
        )

    def get_snapshot(
        self, caller: object, snapshot_id: str, *, host: str = ''
    ) -> Json:
        """Return a snapshot: id, status, size, volume."""
        found: Json = self._call_new(
            caller, 'get_snapshot', {'snapshot_id': snapshot_id}, host
        )
        return found

    # What a host does around an attach.

    def reserve_volume(
        self, caller: object, volume_id: str, *, host: str = ''
    ) -> None:
        """``available`` becomes ``attaching``; of two at once one wins."""
        self._call_new(
            caller, 'reserve_volume', {'volume_id': volume_id}, host
        )

    def unreserve_volume(
        self, caller: object, volume_id: str, *, host: str = ''
    ) -> None:
        """``attaching`` becomes ``available`` again."""
        self._call_new(
            caller, 'unreserve_volume', {'volume_id': volume_id}, host
        )

    def initialize_connection(
        self,
        caller: object,
        volume_id: str,
        connector: Mapping[str, Any],
        *,
        host: str = '',
        mode: str | None = None,
    ) -> Json:
        """Let a host in; return its connection_info."""
        info: Json = self._ask(
            caller, 'initialize_connection',
            {'volume_id': volume_id, 'connector': connector},
            _given(mode=mode), host, waits=True,
        )
        return info

    def terminate_connection(
        self,
        caller: object,
        volume_id: str,
        connector: Mapping[str, Any] | None,
        force: bool = False,
        *,
        host: str = '',
    ) -> None:
        """End a host's access; it has ended when this returns."""
        self._ask(
            caller, 'terminate_connection',
            {'volume_id': volume_id, 'connector': connector},
            {'force': True} if force else {}, host, waits=True,
        )

    def attach_volume(
        self,
        caller: object,
        volume_id: str,
        instance_uuid: str | None,
        mountpoint: str | None,
        *,
        host: str = '',
        host_name: str | None = None,
        mode: str | None = None,
    ) -> None:
        """Record that an instance uses the volume: it is ``in-use``."""
        self._ask(
            caller, 'attach_volume',
            {
                'volume_id': volume_id, 'instance_uuid': instance_uuid,
                'mountpoint': mountpoint,
            },
            _given(host_name=host_name, mode=mode), host, waits=True,
        )

    def begin_detaching(
        self, caller: object, volume_id: str, *, host: str = ''
    ) -> None:
        """``in-use`` becomes ``detaching``."""
        self._call_new(
            caller, 'begin_detaching', {'volume_id': volume_id}, host
        )

    def roll_detaching(
        self, caller: object, volume_id: str, *, host: str = ''
    ) -> None:
        """``detaching`` becomes ``in-use``: the host could not let go."""
        self._call_new(
            caller, 'roll_detaching', {'volume_id': volume_id}, host
        )

    def detach_volume(
        self,
        caller: object,
        volume_id: str,
        attachment_id: str | None = None,
        *,
        host: str = '',
        force: bool | None = None,
    ) -> None:
        """Record that the instance has let go."""
        self._ask(
            caller, 'detach_volume', {'volume_id': volume_id},
            _given(attachment_id=attachment_id, force=force), host,
            waits=True,
        )

    # Among our own processes.

    def wake(self, caller: object, job_id: str, *, host: str = '') -> None:
        """Hint that a job is due; the journal is the truth."""
        self._ask(
            caller, 'wake', {}, {'job_id': job_id}, host, waits=False,
        )

    def _call_new(
        self, caller: object, method: str, args: Json, host: str
    ) -> Any:
        return self._ask(caller, method, {}, args, host, waits=True)

    def _ask(
        self,
        caller: object,
        method: str,
        old: Json,
        new: Json,
        host: str,
        *,
        waits: bool,
    ) -> Any:
        """Send what 1.0 knows, and what came later, by the right version."""
        send = self._bus.call if waits else self._bus.cast
        return send(
            rpc.context_of(caller), '1.1' if new else '1.0', method,
            {**old, **new}, host,
        )


def _given(**values: Any) -> Json:
    """Return those arguments that were given; mappings as plain ones."""
    return {
        name: dict(value) if isinstance(value, Mapping) else value
        for name, value in values.items() if value is not None
    }
