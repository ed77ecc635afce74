# SPDX-License-Identifier: Apache-2.0
"""Simulated XenAPI pools, their VMs, and the disks that VMs have plugged.

The pools are processes of ``volume-xapi-sim``; what a guest would do is done
by their control ports. All else goes through the XenAPI.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import secrets
from typing import Any
from urllib.parse import urlsplit

from demo_disk import CHUNK_BYTES
from demo_disk import Disk
from demo_family import Family
from demo_screen import Failed
from demo_service import Service
from service_process import command_path
from service_process import Json
from service_process import ServiceProcess
from service_process import until

from volume import model
from volume.connector.xensm import XenSmConnector
from volume.connector.xensm_host import XenHost
from volume.node import Node
from volume.xenapi import plugs
from volume.xenapi import poolfile
from volume.xenapi.link import Link

START_S = 60.0
FILER, EXPORT, VOLUMES = 'filer', '/export', '/volumes'
TARGET, IQN = '192.0.2.1', 'iqn.2026-01.example:array'
LVM_LUN = '36001405000000000000000000000001'
LUN = '36001405000000000000000000000002'
GIB = model.GIB
LUN_BYTES = 64 * model.MIB

CONFIGURATION = """\
[DEFAULT]
enabled_backends = fast, archive, single, luns
state_path = {directory}/state
host = demo
image_allowed_networks = 127.0.0.0/8
image_allowed_directories = {images}
upkeep_interval_s = 0.5
stats_interval_s = 1
log_level = INFO

[api]
port = 0

[fast]
{pool}
sr_name = fast
sr_type = nfs
device_config =
    server={FILER}
    serverpath={EXPORT}
create = true

[archive]
{pool}
sr_name = archive
sr_type = lvmoiscsi
device_config =
    target={TARGET}
    targetIQN={IQN}
    SCSIid={LVM_LUN}
create = true
cost = 10

[single]
{pool}
sr_type = nfs
device_config =
    server={FILER}
    serverpath={VOLUMES}
sr_per_volume = true
peers = {peer}
cost = 20

[luns]
{pool}
sr_name = luns
sr_type = iscsi
device_config =
    target={TARGET}
    targetIQN={IQN}-luns
create = true
luns = {LUN}
cost = 30
"""


class XenPool:
    """A pool of two hosts; several may stand beside one world."""

    def __init__(self, family: Family, directory: str, name: str) -> None:
        self.name = name
        self.directory = os.path.join(directory, name)
        self.world = os.path.join(directory, 'world')
        self._family = family
        self.password = secrets.token_hex(8)
        self.uuid = ''
        self.urls: list[str] = []
        self._control = ''

    def start(self, *storage: Json) -> None:
        """Start it.

        :raises Failed: it does not
        """
        os.mkdir(self.directory, 0o700)
        config = os.path.join(self.directory, 'sim.json')
        with open(config, 'w') as f:
            json.dump({
                'directory': os.path.join(self.directory, 'state'),
                'world': self.world, 'name': self.name,
                'users': {'root': {'password': self.password}},
                'storage': storage,
            }, f)
        out = os.path.join(self.directory, 'out')
        with open(out, 'wb') as said, open(f'{out}.log', 'wb') as log:
            process = self._family.start(
                command_path('volume-xapi-sim'), '--config', config,
                stdout=said, stderr=log,
            )

        def line() -> str:
            if process.poll() is not None:
                with open(f'{out}.log') as f:
                    raise Failed(f'the simulator ended: {f.read()}')
            with open(out) as f:
                words = f.read()
            return words if words.endswith('\n') else ''

        said_json = json.loads(until(line, bool, 'the pool', START_S))
        self.uuid = said_json['pool']
        self.urls = said_json['urls']
        self._control = said_json['control']
        # What is freed is swept at once, not in five minutes.
        self.control('POST', '/gc', {'delay_s': 0.2})
        self.node = Node(os.path.join(self.directory, 'host'))
        self.link = Link(poolfile.load(self.write_file()).settings, self.node)

    def write_file(self) -> str:
        """Write what hosts and other pools need to know; return its path."""
        path = os.path.join(self.directory, 'pool.conf')
        with open(path, 'w') as f:
            f.write(
                f'[xensm]\naddresses = {", ".join(self.urls)}\n'
                f'password = {self.password}\n'
            )
        os.chmod(path, 0o600)
        return path

    def control(self, method: str, path: str, body: object = None) -> Any:
        """Ask the control port; bytes go and come as they are."""
        connection = http.client.HTTPConnection(
            urlsplit(self._control).netloc, timeout=60)
        with contextlib.closing(connection):
            connection.request(
                method, path, body if isinstance(body, bytes) else
                json.dumps(body) if body is not None else None,
            )
            answer = connection.getresponse()
            found = answer.read()
        if answer.status != http.client.OK:
            raise Failed(f'{method} {path}: {found.decode()}')
        if answer.getheader('Content-Type') == 'application/json':
            return json.loads(found)
        return found

    def make_vm(self, at: int) -> str:
        """Make a VM and start it on a host; return its uuid."""
        hosts = {
            found['address']: ref for ref, found
            in self.link.call('host.get_all_records').items()
        }
        host = hosts[urlsplit(self.urls[at]).netloc]
        memory = str(GIB)
        vm = self.link.call('VM.create', {
            'name_label': 'guest', 'name_description': '',
            'user_version': '1', 'is_a_template': False, 'affinity': host,
            'memory_target': '0', 'memory_static_max': memory,
            'memory_dynamic_max': memory, 'memory_dynamic_min': memory,
            'memory_static_min': memory, 'VCPUs_params': {},
            'VCPUs_max': '1', 'VCPUs_at_startup': '1',
            'actions_after_shutdown': 'destroy',
            'actions_after_reboot': 'restart',
            'actions_after_crash': 'destroy', 'PV_bootloader': '',
            'PV_kernel': '', 'PV_ramdisk': '', 'PV_args': '',
            'PV_bootloader_args': '', 'PV_legacy_args': '',
            'HVM_boot_policy': '', 'HVM_boot_params': {}, 'platform': {},
            'PCI_bus': '', 'other_config': {}, 'recommendations': '',
        })
        self.link.call('VM.start_on', vm, host, False, False)
        return str(self.link.call('VM.get_record', vm)['uuid'])

    def plugged_srs(self) -> set[str]:
        """Return the uuids of the SRs that any host has plugged in."""
        found = self.link.call('SR.get_all_records')
        return {
            found[pbd['SR']]['uuid']
            for pbd in self.link.call('PBD.get_all_records').values()
            if pbd['currently_attached']
        }

    def violations(self) -> list[str]:
        """Return what two pools did to one SR at a time."""
        found: list[str] = self.control('GET', '/state')['violations']
        return found


STORAGE: tuple[Json, ...] = (
    {'what': 'nfs', 'server': FILER, 'path': EXPORT,
     'size_bytes': 200 * GIB},
    {'what': 'nfs', 'server': FILER, 'path': VOLUMES,
     'size_bytes': 200 * GIB},
    {'what': 'target', 'address': TARGET, 'iqn': IQN},
    {'what': 'lun', 'scsi_id': LVM_LUN, 'size_bytes': 200 * GIB, 'iqn': IQN},
    {'what': 'target', 'address': TARGET, 'iqn': f'{IQN}-luns'},
    {'what': 'lun', 'scsi_id': LUN, 'size_bytes': LUN_BYTES,
     'iqn': f'{IQN}-luns'},
)


class XenService(Service):
    """``volume-service`` with four backends of one pool."""

    def __init__(
        self, family: Family, directory: str, images: str, pool: XenPool,
        peer: XenPool,
    ) -> None:
        self._world = pool.world
        login = (
            f'driver = xensm\naddresses = {", ".join(pool.urls)}\n'
            f'password = {pool.password}'
        )
        ServiceProcess.__init__(
            self, family, directory, CONFIGURATION.format(
                directory=directory, images=images, pool=login,
                peer=peer.write_file(), **globals(),
            ), (),
        )
        os.chmod(self.path('volume.conf'), 0o600)

    def stored_bytes(self, *backends: str) -> int:
        """Return what the VHDs of all SRs take on the disk."""
        return sum(
            os.lstat(os.path.join(where, name)).st_blocks * 512
            for where, _, names in os.walk(self._world) for name in names
            if name.endswith('.vhd') or name.startswith('VHD-')
        )


class XenDisk(Disk):
    """One attachment: a disk of a VM, which a guest reads and writes."""

    def __init__(
        self, service: Service, family: Family, volume_id: str,
        pool: XenPool, vm: str,
    ) -> None:
        super().__init__(service, family, volume_id)
        self._pool = pool
        self._vm = vm
        self._connector = XenSmConnector(
            pool.node, XenHost('', pool.link, vm))

    def attach(self) -> None:
        """Ask the service for access, and the connector for a device."""
        client = self._service.client
        host = self._connector.host()
        found = client.post('/attachments', {'attachment': {
            'volume_uuid': self._volume_id,
            'connector': {
                'host': f'compute-{self._pool.name}', **host.properties},
        }})['attachment']
        self._attachment_id = found['id']
        fields = dict(found['connection_info'])
        protocol = fields.pop('driver_volume_type')
        self._connection = model.Connection(protocol, fields)
        self.uri = self._connector.attach(self._connection)
        client.post(
            f'/attachments/{self._attachment_id}/action', {'os-complete': {}}
        )
        self._service.settle('volume', self._volume_id, 'in-use')

    def detach(self) -> None:
        """Let go, and see that the VM has the disk no more.

        :raises Failed: it still has
        """
        self._connector.detach(self._connection)
        self._service.client.delete(f'/attachments/{self._attachment_id}')
        self._service.settle('volume', self._volume_id, 'available')
        link = self._pool.link
        vdi = plugs.find(link, 'VDI', self.vdi_uuid)
        if vdi is not None and plugs.vbds(link, vdi):
            raise Failed(f'VM {self._vm} still has {self.uri}')

    @property
    def vdi_uuid(self) -> str:
        return str(self._connection.fields['vdi_uuid'])

    @property
    def sr_uuid(self) -> str:
        return str(self._connection.fields['sr_uuid'])

    def compare_by_qemu(self, path: str, format: str = 'raw') -> None:
        copy = os.path.join(self._pool.directory, 'compared.raw')
        self.pull(copy)
        self._family.run(
            'qemu-img', 'compare', '-f', format, '-F', 'raw', path, copy)
        os.unlink(copy)

    def pull(self, path: str) -> None:
        with self._open() as client, open(path, 'wb') as f:
            for at in range(0, client.size_bytes, CHUNK_BYTES):
                piece = bytearray(min(CHUNK_BYTES, client.size_bytes - at))
                client.pread_into(piece, at)
                if piece.count(0) != len(piece):
                    f.seek(at)
                    f.write(piece)
            f.truncate(client.size_bytes)

    def _open(self) -> Any:
        return contextlib.closing(_Guest(
            self._pool, f'/guests/{self._vm}/{os.path.basename(self.uri)}',
            self.vdi_uuid,
        ))


class _Guest:
    """A guest that reads and writes its disk, as ``NbdClient`` would."""

    def __init__(self, pool: XenPool, path: str, vdi_uuid: str) -> None:
        self._pool = pool
        self._path = path
        record = pool.link.call(
            'VDI.get_record', pool.link.call('VDI.get_by_uuid', vdi_uuid))
        self.size_bytes = int(record['virtual_size'])

    def pread_into(self, buffer: Any, offset: int) -> None:
        view = memoryview(buffer)
        for at in range(0, len(view), CHUNK_BYTES):
            part = view[at:at + CHUNK_BYTES]
            part[:] = self._pool.control(
                'GET',
                f'{self._path}?offset={offset + at}&length={len(part)}',
            )

    def pwrite(self, data: Any, offset: int) -> None:
        view = memoryview(data)
        for at in range(0, len(view), CHUNK_BYTES):
            self._pool.control(
                'PUT', f'{self._path}?offset={offset + at}',
                bytes(view[at:at + CHUNK_BYTES]),
            )

    def flush(self) -> None:
        """Each write was durable when it was answered."""

    def close(self) -> None:
        """There is nothing to close."""
