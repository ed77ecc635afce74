# SPDX-License-Identifier: Apache-2.0
"""The host's side of iSCSI and NVMe: real initiators, targets made by hand.

The connectors run here and reach the guest's kernel through their node, as
they reach their own on a host.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile

from tests import lab
from tests.lab import case
from tests.lab import exports_case
from tests.lab import hosts
from tests.lab import targets
from volume import errors
from volume import model
from volume.connector import nvme_host
from volume.connector import open_iscsi
from volume.connector.iscsi import IscsiConnector
from volume.connector.kept import Kept
from volume.connector.nvmeof import NvmeConnector
from volume.remote.node import SshNode
from volume.testing import faults

INITIATOR = 'iqn.2024-01.org.example:connector'
# Looks at all command lines of the guest until its input ends, and says
# those that hold the word of its first line.
WATCH = '''
import os, select, sys
word, seen = sys.stdin.buffer.readline().strip(), set()
looks = 0
while not select.select([0], [], [], 0.01)[0]:
    looks += 1
    for pid in filter(str.isdecimal, os.listdir('/proc')):
        try:
            with open(f'/proc/{pid}/cmdline', 'rb') as f:
                line = f.read()
        except OSError:
            continue
        if word in line:
            seen.add(line)
print(looks, sorted(seen))
'''


LOOKS = frozenset({'get', 'list', 'exists'})
QUESTIONS = ('configure', 'exists', 'about', 'read', 'list', 'users', 'size')


class GuestNode(exports_case.FaultyGuestNode):
    """The guest's kernel; who may go first is settled on this machine.

    To die in mid-question is as to die before what comes next, so only what
    changes something counts.
    """

    locks = ''
    late = None  # what happens just before users are looked for, once

    def users(self, path, known=()):
        if self.late:
            late, self.late = self.late, None
            late()
        return super().users(path, known)

    def configure(self, wanted):
        if all(op.verb in LOOKS for op in wanted):
            return SshNode.configure(self, wanted)
        return super().configure(wanted)

    def _count(self, what):
        if what.startswith(QUESTIONS) and not what.startswith(
            ('configure put', 'configure unlink', 'configure rmdir')
        ):
            return None
        return super()._count(what)

    @property
    def lock_dir(self):
        return self.locks


class ConnectorSuite:
    """What every connector does, with targets that it may try."""

    disks = 0
    limit_s = 1800.0  # of one test

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.targets = targets.Targets(cls.guest)
        cls.addClassCleanup(cls.targets.close)
        cls.node = GuestNode(exports_case.target_of(cls.guest))
        cls.addClassCleanup(cls.node.close)
        GuestNode.locks = tempfile.mkdtemp(prefix='connector')
        cls.addClassCleanup(os.rmdir, GuestNode.locks)
        cls.addClassCleanup(cls._unlock)

    @classmethod
    def _unlock(cls):
        for name in os.listdir(GuestNode.locks):
            os.unlink(os.path.join(GuestNode.locks, name))

    def setUp(self):
        super().setUp()
        self.node.arm(None)
        self.connector = self.make_connector(self.node)
        self.made = []
        self.addCleanup(self.check_nothing_left)

    def check_nothing_left(self):
        for target in self.made:
            self.assertEqual('', self.connector.present(target.connection))
            self.targets.end(target)
        self.assertEqual([], self.strays())

    def strays(self):
        """Return what is dead of this test's own."""
        mine = {target.attachment_id for target in self.made}
        return [
            stray for stray in self.connector.strays()
            if stray.attachment_id in mine
        ]

    def keep(self, target):
        self.made.append(target)
        return target

    def attach(self, target):
        path = self.connector.attach(target.connection)
        self.addCleanup(self.connector.detach, target.connection)
        return path

    def open(self, path):
        """Have a process of the guest hold it open as the context lasts."""
        return contextlib.closing(Running(self.guest.start(
            'sh', '-c', f'exec 3<{path}; echo; exec cat'
        )))

    def test_what_is_written_is_on_the_volume_when_it_is_detached(self):
        target = self.target()
        path = self.connector.attach(target.connection)
        image = os.urandom(3 * model.MIB)
        self.guest.run('dd', f'of={path}', 'bs=1M', input_bytes=image)
        self.connector.detach(target.connection)
        self.assertEqual(image, self.guest.run_bytes(
            'dd', f'if={target.device}', 'bs=1M', 'count=3', 'iflag=direct',
            'status=none',
        ))

    def test_again_is_as_once(self):
        target = self.target()
        path = self.attach(target)
        self.assertEqual(path, self.connector.attach(target.connection))
        self.assertEqual(path, self.connector.present(target.connection))
        self.connector.detach(target.connection)
        self.assertEqual('', self.connector.present(target.connection))
        self.connector.detach(target.connection)

    def test_a_device_that_is_open_or_mounted_stays_and_it_is_said_why(self):
        target = self.target()
        path = self.attach(target)
        with self.open(path):
            with self.assertRaisesRegex(errors.Busy, r'cat \(pid \d+\)'):
                self.connector.detach(target.connection)
        self.guest.run('mkfs.ext4', '-q', path)
        self.guest.run('mount', path, '/mnt')
        try:
            with self.assertRaisesRegex(errors.Busy, 'mounted on /mnt'):
                self.connector.detach(target.connection)
            self.guest.run('touch', '/mnt/still-there')
        finally:
            self.guest.run('umount', '/mnt')
        self.connector.detach(target.connection)

    def test_a_disk_of_another_identity_is_let_go_of(self):
        other = '7d7d7d7d-0000-4000-8000-000000000000'
        target = self.target(other)
        with self.assertRaisesRegex(errors.Conflict, 'is not volume'):
            self.connector.attach(target.connection)
        self.assertEqual('', self.connector.present(target.connection))

    def test_a_smaller_disk_is_let_go_of(self):
        target = self.target()
        promised = model.Connection(
            target.connection.protocol,
            {**target.connection.fields, 'size_bytes': 1 << 40},
            credentials=target.connection.credentials,
        )
        with self.assertRaisesRegex(errors.Conflict, 'bytes'):
            self.connector.attach(promised)
        self.assertEqual('', self.connector.present(target.connection))

    def test_what_is_served_is_no_stray_and_what_is_not_is_reaped(self):
        target = self.target()
        self.attach(target)
        self.assertEqual([], self.strays())
        self.targets.end(target)
        stray = self.await_stray()
        self.assertEqual(
            (target.volume_id, target.attachment_id),
            (stray.volume_id, stray.attachment_id),
        )
        self.connector.reap(stray)
        self.assertEqual('', self.connector.present(target.connection))
        self.assertEqual([], self.strays())

    def test_a_stray_that_is_in_use_stays(self):
        target = self.target()
        path = self.attach(target)
        with self.open(path):
            self.targets.end(target)
            stray = self.await_stray()
            with self.assertRaisesRegex(errors.Busy, 'cat'):
                self.connector.reap(stray)

    def test_a_dead_path_is_no_reason_not_to_take_another(self):
        target = self.target(portals=case.PORTALS)
        old, new = (self.by(target, portal) for portal in case.PORTALS)
        before = self.connector.attach(old)
        self.cut(case.PORTALS[0])
        hosts.until(
            lambda: not self.is_up(target), f'{before} does not die')
        path = self.connector.attach(new)
        self.guest.run('dd', f'if={path}', 'of=/dev/null', 'iflag=direct',
                       'bs=4k', 'count=1')
        self.connector.detach(new)
        self.assertEqual('', self.connector.present(old))

    def cut(self, portal):
        """Drop what goes to a portal, until the test ends."""
        self.guest.run('nft', 'add', 'table', 'inet', 'cut')
        self.addCleanup(self.guest.run, 'nft', 'delete', 'table', 'inet',
                        'cut')
        self.guest.run(
            'nft', 'add chain inet cut out { type filter hook output '
            'priority 0; }'
        )
        self.guest.run(
            'nft', f'add rule inet cut out ip daddr {portal} tcp dport '
            f'{self.port} drop'
        )

    def test_a_volume_that_grew_is_seen_larger(self):
        target = self.target()
        path = self.attach(target)
        size_bytes = 2 * targets.SIZE_BYTES
        self.grow(target, size_bytes)
        self.assertEqual(
            size_bytes, self.connector.extend(target.connection)
        )
        self.assertEqual(size_bytes, self.node.size(path))

    def test_killed_anywhere_it_is_gone_on_with_or_undone(self):
        """Each act of attach and detach, the process dying after it."""
        target = self.target()
        step = 1 if lab.FULL else 4
        for nth in itertools.count(1, step):
            with self.subTest(nth=nth):
                fired = self.dies(target, nth, 'attach')
                self.recover(target, goes_on=bool(nth % 2))
            if not fired:
                break
        for nth in itertools.count(1, step):
            with self.subTest(nth=nth):
                self.kept().attach(target.connection, target.attachment_id)
                fired = self.dies(target, nth, 'detach')
                self.recover(target, goes_on=bool(nth % 2))
            if not fired:
                break

    def dies(self, target, nth, verb):
        self.node.arm(faults.Fault('crash', nth, True))
        with contextlib.suppress(faults.Crash):
            getattr(self.kept(), verb)(
                target.connection, target.attachment_id
            )
        fired = self.node.fired
        self.node.arm(None)
        return fired

    def recover(self, target, goes_on):
        """Go on with it, or undo it; then nothing is left but what was."""
        kept = self.kept()
        if goes_on:
            path = kept.attach(target.connection, target.attachment_id)
            self.assertEqual(targets.SIZE_BYTES, self.node.size(path))
            (note,) = kept.notes()
            self.assertEqual(
                ('attached', path), (note.state, note.location)
            )
        kept.detach(target.connection, target.attachment_id)
        self.assertEqual([], list(kept.notes()))
        self.assertEqual('', self.connector.present(target.connection))
        self.assertEqual([], self.strays())

    def kept(self):
        return Kept(self.node, lambda protocol: self.connector)

    def await_stray(self):
        found = []

        def look():
            found[:] = self.strays()
            return bool(found)

        hosts.until(look, 'nothing is dead')
        return found[0]

    def grow(self, target, size_bytes):
        self.targets.disk(target.volume_id, size_bytes)


class Running:
    """A command of the guest that has said that it runs."""

    def __init__(self, process):
        self.process = process
        process.stdout.readline()

    def close(self):
        self.process.communicate()


class IscsiConnectorTest(ConnectorSuite, case.LabCase):
    """One portal."""

    portals = case.PORTALS[:1]
    port = 3260

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.guest.run('systemctl', 'start', 'iscsid')
        cls.initiator = open_iscsi.initiator(cls.node, 'default')

    def make_connector(self, node):
        return IscsiConnector(node)

    def target(self, serial='', portals=(), **more):
        return self.keep(self.targets.iscsi(
            self.initiator, portals or self.portals, serial=serial, **more
        ))

    def by(self, target, portal):
        """Return the connection by one portal alone."""
        given = target.connection
        return model.Connection('iscsi', {
            'target_portal': f'{portal}:3260', 'target_iqn': target.name,
            'target_lun': 0, 'volume_id': target.volume_id,
        }, credentials=given.credentials)

    def is_up(self, target):
        return any(
            each.is_up for each in open_iscsi.sessions(self.node)
            if each.target == target.name
        )

    def test_who_does_not_know_the_secret_is_not_let_in(self):
        target = self.target()
        wrong = model.Connection('iscsi', target.connection.fields,
                                 credentials={
            'auth_method': 'CHAP', 'auth_username': 'user',
            'auth_password': 'wrong-0123456789',
        })
        with self.assertRaises(errors.Denied):
            self.connector.attach(wrong)
        self.assertEqual([], open_iscsi.recorded(self.node))

    def test_another_attachment_of_the_volume_stays(self):
        first = self.target()
        second = self.target(volume_id=first.volume_id)
        self.attach(first)
        path = self.attach(second)
        self.connector.detach(first.connection)
        self.guest.run('dd', f'if={path}', 'of=/dev/null', 'iflag=direct',
                       'bs=4k', 'count=1')
        self.assertEqual('', self.connector.present(first.connection))
        self.connector.detach(second.connection)

    def test_a_record_in_pieces_is_made_anew(self):
        target = self.target()
        self.attach(target)
        self.connector.detach(target.connection)
        directory = f'/etc/iscsi/nodes/{target.name}'
        self.guest.run('mkdir', directory)
        self.guest.run('touch', f'{directory}/{self.portals[0]},3260')
        self.assertTrue(self.connector.attach(target.connection))
        self.connector.detach(target.connection)

    def test_a_host_may_have_a_name_for_an_interface(self):
        where = ['iscsiadm', '-m', 'iface', '-I', 'second']
        self.guest.run(*where, '--op', 'new')
        self.addCleanup(self.guest.run, *where, '--op', 'delete')
        self.guest.run(*where, '--op', 'update', '-n',
                       'iface.initiatorname', '-v', INITIATOR)
        second = IscsiConnector(self.node, iface='second')
        self.assertEqual(INITIATOR, second.host().iqn)
        target = self.keep(self.targets.iscsi(INITIATOR))
        with self.assertRaises((errors.Denied, errors.Unavailable)):
            self.connector.attach(target.connection)
        self.assertTrue(second.attach(target.connection))
        second.detach(target.connection)

    def test_no_command_line_ever_has_the_secret(self):
        target = self.target()
        times = 100 if lab.FULL else 3
        watch = self.guest.start('python3', '-c', WATCH)
        watch.stdin.write(f'{targets.PASSWORD}\n'.encode())
        watch.stdin.flush()
        for _ in range(times):
            self.connector.attach(target.connection)
            (path,) = open_iscsi._files(self.node, target.name, '')
            self.assertEqual('600', self.guest.run(
                'stat', '-c', '%a', path).strip())
            self.assertIn(
                targets.PASSWORD, self.node.read(path).decode())
            self.connector.detach(target.connection)
        said, _ = watch.communicate(timeout=60)
        looks, _, seen = said.decode().partition(' ')
        self.assertEqual('[]', seen.strip())
        self.assertGreater(int(looks), times)
        self.assertFalse(self.guest.succeeds(
            'grep', '-rqF', targets.PASSWORD, '/etc/iscsi', '/run/volume-node'
        ))


class NvmeConnectorTest(ConnectorSuite, case.LabCase):
    """NVMe over TCP; the kernel makes a device of each connection."""

    port = 4420

    def make_connector(self, node):
        return NvmeConnector(node)

    def target(self, uuid='', portals=case.PORTALS):
        return self.keep(self.targets.nvme(
            nvme_host.identity(self.node).nqn, portals, uuid=uuid
        ))

    def by(self, target, portal):
        """Return the connection by one portal alone."""
        return model.Connection('nvmeof', {
            **target.connection.fields, 'portals': [[portal, '4420', 'tcp']],
        })

    def is_up(self, target):
        return any(
            each.is_up for each in nvme_host.controllers(self.node)
            if each.nqn == target.name
        )

    def grow(self, target, size_bytes):
        super().grow(target, size_bytes)
        self.guest.run(
            'tee', '/sys/kernel/config/nvmet/subsystems/'
            f'{target.name}/namespaces/1/revalidate_size', input_bytes=b'1',
        )

    def test_a_stranger_is_not_let_in(self):
        target = self.keep(self.targets.nvme(
            'nqn.2014-08.org.nvmexpress:uuid:'
            '00000000-0000-4000-8000-000000000000'
        ))
        with self.assertRaises(errors.Denied):
            self.connector.attach(target.connection)

    def test_a_portal_that_does_not_answer_is_passed_over(self):
        target = self.target()
        fields = dict(target.connection.fields)
        fields['portals'] = [['192.0.2.99', '4420', 'tcp'], *fields['portals']]
        self.assertTrue(self.connector.attach(
            model.Connection('nvmeof', fields)
        ))
        self.connector.detach(target.connection)
