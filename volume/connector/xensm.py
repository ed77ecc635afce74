# SPDX-License-Identifier: Apache-2.0
"""XenAPI on the host's side: a disk of an SR becomes a VBD of a VM.

In the pool that owns the SR that is all. In another pool the SR is brought
first (introduced, given a PBD on each host, plugged, scanned) and forgotten
when none of its disks is in use any more, if it was brought by us: nothing
is formatted and nothing is erased, on either way.

``attach`` and ``detach`` are about the VM that this connector runs in, the
control domain of a host included. A compute service that works for many VMs
calls ``attach_to`` and ``detach_from``.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from volume import errors
from volume import ids
from volume import model
from volume.connector import xensm_host
from volume.connector.alone import alone
from volume.connector.alone import LOCK_S
from volume.connector.base import Connector
from volume.connector.base import field
from volume.node import Node
from volume.xenapi import failures
from volume.xenapi import plugs
from volume.xenapi import srs
from volume.xenapi.link import Link

PROTOCOL = 'xensm'
TRIES = 4  # what another client undoes under us is done again
IN_USE_TRIES = 10


class XenSmConnector(Connector):
    """Gives a device of the VM."""

    protocol: ClassVar[str] = PROTOCOL

    def __init__(
        self,
        node: Node,
        host: xensm_host.XenHost | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.node = node
        self._host = host
        self._sleep = sleep
        self._owner = f'{socket.gethostname()} {ids.new()}'

    @property
    def _xen(self) -> xensm_host.XenHost:
        """The pool that this host is in, read from its file when needed."""
        if self._host is None:
            self._host = xensm_host.load(self.node)
        return self._host

    @property
    def _link(self) -> Link:
        return self._xen.link

    def host(self) -> model.Host:
        properties = {'xensm_pool': self._pool()}
        if self._xen.vm:
            properties['xensm_vm'] = self._xen.vm
        return model.Host(socket.gethostname(), properties=properties)

    def attach(self, connection: model.Connection) -> str:
        return f'/dev/{self.attach_to(connection, self._own_vm())}'

    def detach(self, connection: model.Connection) -> None:
        self.detach_from(connection, self._own_vm())

    # Ours alone.

    def attach_to(
        self,
        connection: model.Connection,
        vm_uuid: str,
        userdevice: str = 'autodetect',
    ) -> str:
        """Attach to a VM and return its device (``xvdb``).

        A halted VM has it when it starts; there is no device name yet.

        :raises NotFound: there is no such VM, or no such disk
        :raises Busy: another VM writes to the disk
        """
        asked = Asked(connection)
        vm = self._vm(vm_uuid)
        with self._alone(vm_uuid):
            for left in reversed(range(TRIES)):
                try:
                    return self._attach(asked, vm, userdevice)
                except errors.VolumeError as failed:
                    # Another client may have forgotten the SR that it had
                    # brought; and what is Unknown is looked at again.
                    if not left or not _may_pass(failed):
                        raise
        raise AssertionError('unreachable')

    def detach_from(
        self, connection: model.Connection, vm_uuid: str = ''
    ) -> None:
        """Detach from a VM, and forget the SR if it is ours to forget.

        :raises Busy: the guest keeps the disk
        """
        asked = Asked(connection)
        vm = plugs.find(self._link, 'VM', ids.check(vm_uuid, 'VM uuid'))
        with self._alone(vm_uuid):
            vdi = plugs.find(self._link, 'VDI', asked.vdi_uuid)
            if vdi is not None and vm is not None:
                for vbd in self._vbds(vm, vdi):
                    plugs.end_vbd(self._link, vbd, sleep=self._sleep)
                if self._vbds(vm, vdi):
                    raise errors.Busy(
                        f'volume {asked.volume_id} was attached to VM '
                        f'{vm_uuid} again while it was detached'
                    )
            self._forget(asked)

    def _attach(self, asked: Asked, vm: str, userdevice: str) -> str:
        with self._lending(asked), contextlib.ExitStack() as undo:
            undo.callback(self._forget_quietly, asked)
            self._need_permission(asked)
            self._bring(asked, vm)
            vdi = self._find_vdi(asked)
            vbd = self._make_vbd(asked, vm, vdi, userdevice, undo)
            device = self._plug(vm, vbd)
            # Forbidden meanwhile, it may have been missed by who forbade it.
            undo.callback(self._end_quietly, vbd)
            self._need_permission(asked)
            undo.pop_all()
        return device

    @contextlib.contextmanager
    def _lending(self, asked: Asked) -> Iterator[None]:
        """Keep the service from taking a disk back that is on its way."""
        if asked.pool in ('', self._pool()):
            yield
            return
        with srs.lock(
            self._link, plugs.lending(asked.vdi_uuid), self._owner,
            hold_s=plugs.LEND_S, wait_s=LOCK_S,
        ):
            yield

    def _need_permission(self, asked: Asked) -> None:
        """See that the service has not taken the volume away from us.

        :raises Denied: it has
        """
        if not asked.pool:
            return  # a service of another make, which says nothing of this
        pool, vdi = plugs.pool(self._link), asked.vdi_uuid
        if asked.pool == pool['uuid']:
            ref = self._find_vdi(asked)
            keys = (plugs.record(self._link, 'VDI', ref) or {}).get(
                'other_config', {})
            found = keys.get(f'{plugs.GRANT}{asked.host}', '').split(' ')[0]
        else:
            found = pool['other_config'].get(
                f'{plugs.MAY}{vdi}:{asked.host}', '')
        if found != asked.volume_id:
            raise errors.Denied(
                f'host {asked.host} may no longer attach volume '
                f'{asked.volume_id}: its access was ended; ask for it again'
            )

    # The SR.

    def _bring(self, asked: Asked, vm: str) -> None:
        """Make the SR known and plugged, if it is not this pool's own."""
        link = self._link
        sr = plugs.find(link, 'SR', asked.sr_uuid)
        if sr is None:
            if asked.pool == self._pool():
                raise errors.NotFound(
                    f'this pool owns SR {asked.sr_uuid} and does not know '
                    'it: the backend has to be repaired'
                )
            config = asked.device_config()
            with plugs.fine('SR_UUID_EXISTS'):
                link.call(
                    'SR.introduce', asked.sr_uuid, asked.name_label,
                    plugs.BROUGHT, asked.sr_type, 'user', True, {},
                )
            sr = str(link.call('SR.get_by_uuid', asked.sr_uuid))
        elif not plugs.is_brought(link, sr):
            return
        else:
            config = asked.device_config()
        for host in link.call('host.get_all_records'):
            with plugs.fine('PBD_EXISTS'):
                link.call('PBD.create', {
                    'host': host, 'SR': sr, 'device_config': config,
                    'other_config': {},
                })
        plugs.plug_sr(link, sr, self._needed(vm))
        self._need_permission(asked)
        link.call('SR.scan', sr)

    def _needed(self, vm: str) -> dict[str, str]:
        """Return the hosts without which it does not work, with names.

        The master does the work of a shared SR; the VM's host has the disk.
        """
        link = self._link
        names = {
            host: str(found['name_label']) for host, found
            in link.call('host.get_all_records').items()
        }
        needed = (
            plugs.pool(link)['master'],
            link.call('VM.get_record', vm)['resident_on'],
        )
        return {host: names[host] for host in needed if host in names}

    def _forget(self, asked: Asked) -> None:
        sr = plugs.find(self._link, 'SR', asked.sr_uuid)
        if sr is not None and plugs.is_brought(self._link, sr):
            plugs.forget_sr(self._link, sr)

    def _forget_quietly(self, asked: Asked) -> None:
        # The caller is told what went wrong first, not what followed.
        with contextlib.suppress(errors.VolumeError):
            self._forget(asked)

    def _find_vdi(self, asked: Asked) -> str:
        vdi = plugs.find(self._link, 'VDI', asked.vdi_uuid)
        if vdi is None:
            raise errors.NotFound(
                f'SR {asked.sr_uuid} has no disk {asked.vdi_uuid} of volume '
                f'{asked.volume_id}'
            )
        return vdi

    # The VBD.

    def _vbds(self, vm: str, vdi: str) -> dict[str, plugs.Record]:
        return {
            vbd: found for vbd, found in plugs.vbds(self._link, vdi).items()
            if found['VM'] == vm
        }

    def _make_vbd(
        self,
        asked: Asked,
        vm: str,
        vdi: str,
        userdevice: str,
        undo: contextlib.ExitStack,
    ) -> str:
        """Return the VM's VBD of the disk: the one that it has, or a new."""
        for vbd, found in self._vbds(vm, vdi).items():
            if found['mode'] == asked.mode:
                return vbd
            raise errors.Conflict(
                f'volume {asked.volume_id} is attached to this VM as '
                f'{found["mode"]}, not {asked.mode}: detach it first'
            )
        made = str(self._link.call('VBD.create', {
            'VM': vm, 'VDI': vdi, 'userdevice': userdevice,
            'bootable': False, 'mode': asked.mode, 'type': 'Disk',
            'unpluggable': True, 'empty': False,
            'qos_algorithm_type': '', 'qos_algorithm_params': {},
            # osvol keeps nova from destroying the disk with the VM.
            'other_config': {
                'osvol': 'True', plugs.VOLUME: asked.volume_id,
                plugs.HOST: asked.host,
            },
        }))
        undo.callback(self._end_quietly, made)
        return made

    def _end_quietly(self, vbd: str) -> None:
        with contextlib.suppress(errors.VolumeError):
            plugs.end_vbd(self._link, vbd, wait_s=0.0, sleep=self._sleep)

    def _plug(self, vm: str, vbd: str) -> str:
        if self._link.call('VM.get_record', vm)['power_state'] == 'Halted':
            return ''
        for left in reversed(range(IN_USE_TRIES)):
            try:
                with plugs.fine('DEVICE_ALREADY_ATTACHED'):
                    self._link.call('VBD.plug', vbd)
                break
            except errors.VolumeError as failed:
                # What an export has plugged goes within seconds of its end.
                if failures.code(failed) != 'VDI_IN_USE' or not left:
                    raise
                self._sleep(plugs.PAUSE_S)
        return str(self._link.call('VBD.get_record', vbd)['device'])

    # Who we are.

    def _pool(self) -> str:
        return str(plugs.pool(self._link)['uuid'])

    def _own_vm(self) -> str:
        if not self._xen.vm:
            raise errors.Invalid(
                f'{self._xen.path} does not say in which VM this host is: '
                'set xensm_vm to its uuid'
            )
        return self._xen.vm

    def _vm(self, uuid: str) -> str:
        vm = plugs.find(self._link, 'VM', ids.check(uuid, 'VM uuid'))
        if vm is None:
            raise errors.NotFound(f'the pool has no VM {uuid}')
        return vm

    @contextlib.contextmanager
    def _alone(self, vm_uuid: str) -> Iterator[None]:
        """Be the only one here that plugs and unplugs disks of a VM.

        A guest that gets two at once loses one of them.
        """
        with alone(
            os.path.join(self.node.state_dir, 'xensm'), vm_uuid,
            f'another disk of VM {vm_uuid} has been on its way',
        ):
            yield


class Asked:
    """A connection as it must be, or ``Invalid``."""

    def __init__(self, connection: model.Connection) -> None:
        self._fields = dict(connection.fields)
        self.sr_uuid = ids.check(
            field(connection, PROTOCOL, 'sr_uuid'), 'SR uuid'
        )
        self.vdi_uuid = ids.check(
            field(connection, PROTOCOL, 'vdi_uuid'), 'VDI uuid'
        )
        self.sr_type = field(connection, PROTOCOL, 'sr_type')
        # What Cinder's driver of this name leaves out.
        self.volume_id = self._text('volume_id')
        self.pool = self._text('pool')
        self.host = self._text('host') or socket.gethostname()
        self.name_label = self._text('name_label') or f'SR {self.sr_uuid}'
        is_read = self._text('access') == model.Access.READ.value
        self.mode = 'RO' if is_read else 'RW'

    def device_config(self) -> dict[str, str]:
        """Return what a PBD of the SR needs."""
        keys = self._fields.get('introduce_sr_keys')
        if not isinstance(keys, list):
            raise errors.Invalid(
                f'the connection of volume {self.volume_id} does not say '
                'how its SR is introduced (introduce_sr_keys)'
            )
        wanted = [str(key) for key in keys if key != 'sr_type']
        missing = [key for key in wanted if not self._text(key)]
        if missing:
            raise errors.Invalid(
                f'the connection of volume {self.volume_id} lacks '
                f'{", ".join(missing)}: secrets are in the reply to an RPC, '
                'and nowhere else'
            )
        return {key: self._text(key) for key in wanted}

    def _text(self, name: str) -> str:
        found: Any = self._fields.get(name)
        return found if isinstance(found, str) else ''


def _may_pass(failed: errors.VolumeError) -> bool:
    return isinstance(failed, errors.Unknown) or failures.code(failed) in (
        'SR_HAS_NO_PBDS', *plugs.GONE,
    )
