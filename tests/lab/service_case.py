# SPDX-License-Identifier: Apache-2.0
"""A service on this host whose storage is in the guest, reached over SSH.

``driver`` and ``exporter`` say which; the hosts are the guest's initiators.
The service is one for the class, and is looked at from both sides: what it
says by REST and in its database, and what the tools of the guest say.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from tests.lab import case
from tests.lab import hosts
from tests.process import Refused
from tests.process import ServiceProcess
from volume import ids

MIB = 1 << 20
SIZE_BYTES = 32 * MIB

PORTALS = ', '.join(case.PORTALS)
DRIVERS = {
    'thin': 'driver = lvm\nvolume_groups = {group}\ncreate = true\n'
    'provisioning = thin\n',
    'thick': 'driver = lvm\nvolume_groups = {group}\n'
    # So small an area that a revert alone would fill it.
    'provisioning = thick\nsnapshot_percent = 60\n',
}
EXPORTERS = {
    'lio': f'exporter = lio\niscsi_portals = {PORTALS}\nchap = mutual\n',
    'tgt': f'exporter = tgt\niscsi_portals = {PORTALS}\n',
    'nvmet': f'exporter = nvmet\nnvme_portals = {PORTALS}\n',
}
FAST = (
    'workers = 2\nsweep_interval_s = 1\nstats_interval_s = 5\n'
    'upkeep_interval_s = 5\nlease_wait_s = 60\n'
)


class ClassCleanups:
    """A class where a test is expected: what is made is the class's."""

    def __init__(self, owner: type[case.LabCase]) -> None:
        self._owner = owner

    def addCleanup(self, *what: Any, **how: Any) -> None:
        self._owner.addClassCleanup(*what, **how)


class LabService(case.LabCase):
    """Tests of a service that has one backend in the guest."""

    driver: ClassVar[str] = 'thin'
    exporter: ClassVar[str] = 'lio'
    service: ClassVar[ServiceProcess]

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.service = ServiceProcess(
            ClassCleanups(cls), cls.section(), extra=FAST
        )
        cls.service.start()
        cls.addClassCleanup(cls.empty)
        cls.await_backend()

    @classmethod
    def section(cls) -> str:
        """Return the section of the backend."""
        return (
            f'[b]\n{DRIVERS[cls.driver]}{EXPORTERS[cls.exporter]}'
            f'{cls.node()}'
        ).format(group=cls.group)

    @classmethod
    def node(cls) -> str:
        return (
            f'node = ssh://root@{cls.guest.address}:{cls.guest.port}\n'
            f'node_key_file = {cls.guest.key}\n'
            f'node_known_hosts_file = {cls.guest.known_hosts}\n'
            'node_command = /usr/local/bin/volume-node\n'
        )

    @classmethod
    def await_backend(cls) -> None:
        """Wait until the storage in the guest has been checked."""
        found: dict[str, Any] = {}

        def look() -> bool:
            (found['row'],) = cls.service.call(
                'GET', '/os-volume-backends')['backends']
            return found['row']['state'] == 'up'

        try:
            hosts.until(look, 'the backend did not come up')
        except AssertionError as failed:
            raise AssertionError(
                f'{failed}: {found}; {cls.log()}') from failed

    @classmethod
    def log(cls) -> str:
        """Return the end of the service's log, without who asked what."""
        with open(cls.service.log) as f:
            return ''.join(
                line for line in f if 'volume.api.access' not in line)[-3000:]

    @classmethod
    def empty(cls) -> None:
        """Delete whatever the tests have made, in good order."""
        if cls.service.process is None:
            return
        for row in cls.service.call('GET', '/attachments')['attachments']:
            cls.service.call('DELETE', f'/attachments/{row["id"]}')
        for kind in 'snapshot', 'volume':
            rows = getattr(cls.service, f'{kind}s')()
            for row_id in rows:
                cls.service.call('DELETE', f'/{kind}s/{row_id}')
            for row_id in rows:
                cls.wait(row_id, 'gone', kind=kind)
        cls.service.stop()

    # What a test begins with.

    @classmethod
    def wait(
        cls, row_id: str, *statuses: str, kind: str = 'volume'
    ) -> dict[str, Any]:
        """Return the row once its status is one of these.

        An empty one is returned for what is gone.
        """
        # Not as often as elsewhere: that would take the guest's processor.
        row: dict[str, Any] = {'status': ''}

        def look() -> bool:
            try:
                row.update(cls.service.call('GET', f'/{kind}s/{row_id}')[kind])
            except Refused as refused:
                if refused.status != 404 or 'gone' not in statuses:
                    raise
                row.clear()
            return not row or row['status'] in statuses

        try:
            hosts.until(look, f'{kind} {row_id} is not {statuses}')
        except AssertionError as failed:
            raise AssertionError(f'{failed}: {row}; {cls.log()}') from failed
        return row

    def host(self, name: str) -> hosts.IscsiHost | hosts.NvmeHost:
        """Return a host that has let go of all when the test ends."""
        kind = hosts.NvmeHost if self.exporter == 'nvmet' else hosts.IscsiHost
        return kind(self.guest, name)

    def volume(
        self, hints: Mapping[str, Any] | None = None, **wish: Any
    ) -> str:
        """Return a volume that is available."""
        volume_id = str(self.service.call('POST', '/volumes', {
            'volume': {'size_bytes': SIZE_BYTES, **wish},
            'OS-SCH-HNT:scheduler_hints': dict(hints or {}),
        })['volume']['id'])
        row = self.wait(volume_id, 'available', 'error')
        self.assertEqual('available', row['status'], row.get('reason'))
        return volume_id

    def snapshot(self, volume_id: str, **wish: Any) -> str:
        made = self.service.call('POST', '/snapshots', {'snapshot': {
            'volume_id': volume_id, **wish,
        }})['snapshot']['id']
        row = self.wait(made, 'available', 'error', kind='snapshot')
        self.assertEqual('available', row['status'], row.get('reason'))
        return str(made)

    def connect(
        self, volume_id: str, host: hosts.Host
    ) -> dict[str, Any]:
        """Attach a volume to a host; return the attachment."""
        made = self.service.call('POST', '/attachments', {'attachment': {
            'volume_uuid': volume_id, 'instance_uuid': ids.new(),
            'connector': host.connector,
        }})['attachment']
        self.service.call('POST', f'/attachments/{made["id"]}/action', {
            'os-complete': {},
        })
        return dict(made)

    def end(self, attachment: Mapping[str, Any]) -> None:
        """End an access."""
        self.service.call('DELETE', f'/attachments/{attachment["id"]}')

    @contextlib.contextmanager
    def attached(
        self, volume_id: str, host: hosts.Host
    ) -> Iterator[list[str]]:
        """The devices of a volume on a host, as long as the context lasts."""
        attachment = self.connect(volume_id, host)
        info = attachment['connection_info']
        try:
            yield host.connect(info)
        finally:
            host.disconnect(info)
            self.end(attachment)

    # What the guest says.

    def fill(self, device: str, size_mib: int = 8) -> str:
        """Make a file system with noise on a device; return its sum."""
        return case.script(self.guest, 'fill.sh', device, str(size_mib))

    def sum(self, device: str) -> str:
        """Return the sum of the noise on a device."""
        return case.script(self.guest, 'sum.sh', device)

    def stored(self) -> dict[str, str]:
        """Return the logical volumes that are ours, by id: what they are."""
        report = json.loads(self.guest.run(
            'lvs', '--reportformat', 'json', '-o', 'lv_name,lv_tags',
            self.group,
        ))
        found = {}
        for row in report['report'][0]['lv']:
            if named := re.fullmatch(r'(\w+)-([0-9a-f-]{36})', row['lv_name']):
                found[named[2]] = named[1]
        return found

    def targets(self) -> set[str]:
        """Return the attachments whose targets the guest has."""
        if self.exporter == 'tgt':
            said = case.script(self.guest, 'tgt.sh')
        else:
            said = self.guest.run(
                'ls', '/sys/kernel/config/nvmet/subsystems'
                if self.exporter == 'nvmet'
                else '/sys/kernel/config/target/iscsi',
                check=False,
            )
        return set(re.findall(
            r'volume-[0-9a-f-]{36}\.([0-9a-f-]{36})', said
        ))

    def sessions(self) -> set[str]:
        """Return the attachments that hosts in the guest are logged in to."""
        said = self.guest.run('iscsiadm', '-m', 'session', check=False)
        said += self.guest.run(
            'bash', '-c', 'cat /sys/class/nvme/*/subsysnqn', check=False
        )
        return set(re.findall(
            r'volume-[0-9a-f-]{36}\.([0-9a-f-]{36})', said
        ))

    def assert_agreement(self, sessions: set[str] | None = None) -> None:
        """The database, the volume group and the targets say the same."""
        # What could not be made is a row in error, and nothing on a disk.
        rows = {
            row_id: kind for kind, found in (
                ('volume', self.service.volumes()),
                ('snap', self.service.snapshots()),
            )
            for row_id, row in found.items() if row['status'] != 'error'
        }
        attachments = {
            row['id'] for row in
            self.service.call('GET', '/attachments')['attachments']
        }
        self.assertEqual(rows, self.stored())
        self.assertEqual(attachments, self.targets())
        if sessions is not None:
            self.assertEqual(sessions, self.sessions())
        self.assertEqual([], self.service.sql(
            "SELECT id, kind, error FROM jobs WHERE state = 'open'"
        ))
