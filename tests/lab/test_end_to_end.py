# SPDX-License-Identifier: Apache-2.0
"""Volumes from REST to a file system on a host, by driver and exporter.

Thick and thin volumes and every exporter show the core; thin pools behind
LIO, what is used most, show the rest as well. ``./run lab-full`` shows all of
it with every pair.
"""

import subprocess
import threading
import time

from tests import lab
from tests.lab import case
from tests.lab import hosts
from tests.lab.service_case import LabService
from tests.lab.service_case import MIB
from tests.lab.service_case import SIZE_BYTES
from tests.process import Refused

READER = (case.HERE / 'guest' / 'reader.py').read_text()
# A file system in use grows into the new room.
GROW = '''
mount "$1" /mnt
trap 'umount /mnt' EXIT
resize2fs "$1"
'''
END_S = 60


class Core:
    """What every driver does through every exporter."""

    def tearDown(self):
        super().tearDown()
        self.assert_agreement(sessions=set())

    def test_another_host_reads_from_a_clone_what_one_has_written(self):
        volume_id = self.volume()
        one, two = self.host('one'), self.host('two')
        with self.attached(volume_id, one) as devices:
            written = self.fill(devices[0])
            snapshot_id = self.snapshot(volume_id, force=True)
            again = self.fill(devices[0])
            self.assertNotEqual(written, again)
            clone = self.volume(snapshot_id=snapshot_id, size_bytes=None)
            with self.attached(clone, two) as others:
                self.assertEqual(written, self.sum(others[0]))
                self.assert_agreement()
            self.assertEqual(again, self.sum(devices[0]))

    def test_open_session_reads_no_more_when_its_access_ends(self):
        volume_id = self.volume()
        host = self.host('one')
        attachment = self.connect(volume_id, host)
        info = attachment['connection_info']
        device = host.connect(info)[0]
        reader = self.guest.start('python3', '-u', '-c', READER, device)
        lines = Lines(reader)
        try:
            lines.wait_for('read')
            self.end(attachment)
            ended = lines.count
            # Whatever the host had asked before is answered by now, or by
            # nobody. One of NVMe may wait for that until it lets go.
            if self.exporter == 'nvmet':
                host.disconnect(info)
            lines.wait_for('failed', after=ended)
            found = lines.since(ended)
            self.assertNotIn('read', found[found.index('failed'):])
            self.assertLessEqual(found.index('failed'), 1)
            self.assertFalse(host.admitted(info))
        finally:
            reader.stdin.close()
            reader.wait(END_S)
            host.disconnect(info)


class More(Core):
    """What is shown in full of one pair only, unless all is wanted."""

    def test_host_that_was_not_let_in_stays_out(self):
        volume_id = self.volume()
        one, two = self.host('one'), self.host('two')
        attachment = self.connect(volume_id, one)
        info = attachment['connection_info']
        self.assertFalse(two.admitted(info))
        if info.get('auth_method'):
            wrong = {**info, 'auth_password': 'x' * 16}
            self.assertFalse(one.admitted(wrong))
        self.assertTrue(one.admitted(info))
        self.end(attachment)
        self.assertFalse(one.admitted(info))

    def test_volume_that_grows_is_larger_on_its_host(self):
        volume_id = self.volume()
        host = self.host('one')
        with self.attached(volume_id, host) as devices:
            written = self.fill(devices[0])
            if self.exporter == 'tgt':
                with self.assertRaises(Refused):
                    self.grow(volume_id, 2 * SIZE_BYTES)
                return
            self.grow(volume_id, 2 * SIZE_BYTES)
            host.rescan()
            hosts.until(
                lambda: self.size(devices[0]) == 2 * SIZE_BYTES,
                f'{devices[0]} has not grown',
            )
            tail = self.guest.run_bytes(
                'dd', f'if={devices[0]}', 'bs=1M', 'iflag=direct',
                f'skip={SIZE_BYTES // MIB}', 'status=none',
            )
            self.assertEqual(bytes(SIZE_BYTES), tail)
            self.guest.run('bash', '-ec', GROW, '-', devices[0])
            self.assertEqual(written, self.sum(devices[0]))

    def grow(self, volume_id, size_bytes):
        self.service.action(
            volume_id, 'os-extend', {'new_size_bytes': size_bytes})
        row = self.wait(volume_id, 'in-use', 'error_extending')
        self.assertEqual('in-use', row['status'], row['reason'])

    def size(self, device):
        return int(self.guest.run('blockdev', '--getsize64', device))

    def test_reverted_volume_has_what_it_had(self):
        volume_id = self.volume()
        host = self.host('one')
        with self.attached(volume_id, host) as devices:
            written = self.fill(devices[0])
        self.snapshot(volume_id)
        snapshot_id = self.snapshot(volume_id)
        with self.attached(volume_id, host) as devices:
            self.assertNotEqual(written, self.fill(devices[0]))
        self.service.action(volume_id, 'revert', {'snapshot_id': snapshot_id})
        self.wait(volume_id, 'available')
        with self.attached(volume_id, host) as devices:
            self.assertEqual(written, self.sum(devices[0]))
        # Both snapshots are still there: assert_agreement sees to it.

    def test_hosts_of_a_shared_volume_lose_it_one_by_one(self):
        volume_id = self.volume(hints={'multiattach': True})
        one, two = self.host('one'), self.host('two')
        with self.attached(volume_id, one) as devices:
            written = self.fill(devices[0])
            if self.exporter == 'tgt':
                # It keeps reservations for each target alone.
                with self.assertRaises(Refused):
                    self.connect(volume_id, two)
                return
            if self.exporter == 'nvmet':
                # One kernel is both hosts here, and takes no disk twice.
                later = self.connect(volume_id, two)
            else:
                with self.attached(volume_id, two) as others:
                    self.assertEqual(written, self.sum(others[0]))
                    self.assertEqual(
                        self.serial(devices[0]), self.serial(others[0]))
            self.assertEqual(written, self.sum(devices[0]))
        if self.exporter == 'nvmet':
            info = later['connection_info']
            self.assertEqual(written, self.sum(two.connect(info)[0]))
            two.disconnect(info)
            self.end(later)

    def serial(self, device):
        """Return what a host knows the disk by."""
        return self.guest.run(
            'udevadm', 'info', '--query=property', '--property=ID_SERIAL',
            '--property=ID_WWN', device,
        )

    def test_read_only_host_cannot_write(self):
        volume_id = self.volume()
        host = self.host('one')
        with self.attached(volume_id, host) as devices:
            written = self.fill(devices[0])
        wish = {
            'volume_uuid': volume_id, 'mode': 'ro',
            'instance_uuid': volume_id, 'connector': host.connector,
        }
        if self.exporter == 'nvmet':
            # The kernel has no read-only namespaces: none are pretended.
            with self.assertRaises(Refused):
                self.service.call('POST', '/attachments', {
                    'attachment': wish})
            return
        made = self.service.call('POST', '/attachments', {
            'attachment': wish})['attachment']
        info = made['connection_info']
        device = host.connect(info)[0]
        self.assertFalse(self.guest.succeeds(
            'dd', 'if=/dev/zero', f'of={device}', 'bs=4k', 'count=1',
            'oflag=direct', 'conv=nocreat',
        ))
        self.assertEqual(written, self.sum(device))
        host.disconnect(info)
        self.end(made)


class Lines:
    """What a command in the guest says, as it says it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._found: list[str] = []
        self._news = threading.Condition()
        threading.Thread(
            target=self._listen, args=(process,), daemon=True).start()

    def _listen(self, process):
        for line in process.stdout:
            with self._news:
                self._found.append(line.decode().split()[0])
                self._news.notify_all()

    @property
    def count(self):
        with self._news:
            return len(self._found)

    def since(self, number):
        with self._news:
            return self._found[number:]

    def wait_for(self, word, after=0):
        deadline = time.monotonic() + END_S
        with self._news:
            while word not in self._found[after:]:
                if not self._news.wait(deadline - time.monotonic()):
                    raise AssertionError(f'no {word}: {self._found[-5:]}')


Rest = More if lab.FULL else Core


class ThinLio(More, LabService):
    driver, exporter = 'thin', 'lio'


class ThickLio(Rest, LabService):
    driver, exporter = 'thick', 'lio'


class ThinTgt(Rest, LabService):
    driver, exporter = 'thin', 'tgt'


class ThinNvmet(Rest, LabService):
    driver, exporter = 'thin', 'nvmet'


if lab.FULL:

    class ThickTgt(More, LabService):
        driver, exporter = 'thick', 'tgt'

    class ThickNvmet(More, LabService):
        driver, exporter = 'thick', 'nvmet'
