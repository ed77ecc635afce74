# SPDX-License-Identifier: Apache-2.0
"""AoE with the guest's kernel as the host: exporter and connector together.

Two interfaces that are wired to each other are the network; the node serves
on one, and the kernel asks on all.
"""

from __future__ import annotations

import unittest

from tests import lab
from tests.lab import exports_case
from volume import errors
from volume import ids
from volume import model
from volume.connector import aoe as connector
from volume.exports.aoe import AoeExporter
from volume.exports.base import Export
from volume.testing import fixtures
from volume.testing.workbench import pattern

ENDS = ('aoe-node', 'aoe-host')
SIZE = exports_case.LV_BYTES


class AoeSession:
    """A host that has the volume as a device of its kernel."""

    def __init__(self, guest, host, connection):
        self.guest = guest
        self.host = host
        self.connection = connection
        self.path = host.attach(connection)

    def read(self, offset_bytes, length_bytes):
        return self.guest.run_bytes(
            'dd', f'if={self.path}', 'bs=64k', 'status=none',
            'iflag=direct,skip_bytes,count_bytes', f'skip={offset_bytes}',
            f'count={length_bytes}',
        )

    def write(self, offset_bytes, data):
        self.guest.run(
            'dd', f'of={self.path}', 'bs=4k', 'status=none',
            'oflag=direct,seek_bytes', 'conv=notrunc',
            f'seek={offset_bytes}', input_bytes=data,
        )

    def close(self):
        self.host.detach(self.connection)


class AoeTest(exports_case.DeviceCase):

    size_bytes = SIZE

    @classmethod
    def setUpClass(cls):
        if not lab.FULL:
            raise unittest.SkipTest('the long form: VOLUME_LAB is not full')
        super().setUpClass()
        run = cls.guest.run
        run('modprobe', 'aoe', 'aoe_deadsecs=3')
        cls.addClassCleanup(run, 'modprobe', '-r', 'aoe')
        run('ip', 'link', 'add', ENDS[0], 'type', 'veth', 'peer', 'name',
            ENDS[1])
        cls.addClassCleanup(run, 'ip', 'link', 'delete', ENDS[0])
        for end in ENDS:
            run('ip', 'link', 'set', end, 'up')
        cls.mac = run('cat', f'/sys/class/net/{ENDS[1]}/address').strip()

    def make_exporter(self):
        return AoeExporter(fixtures.settings(
            AoeExporter, aoe_interface=ENDS[0], aoe_trusted_network=True,
        ), self.node)

    def open_session(self, connection):
        self.addCleanup(self.guest.run, 'aoe-flush', '-a')
        return AoeSession(self.guest, self.kernel, connection)

    @property
    def kernel(self):
        """The guest's kernel as the host."""
        return connector.AoeConnector(self.node)

    def export_for(self, mac):
        """Return an attachment, its source and its connection."""
        source = self.make_source(pattern(1, SIZE))
        attachment_id = ids.new()
        self.addCleanup(self.exporter.unexport, attachment_id)
        made = self.exporter.export(Export(
            attachment_id, ids.new(), source,
            model.Host('one', properties={'aoe_mac': mac}),
            model.Access.WRITE, SIZE,
        ))
        return attachment_id, source, made

    def test_host_has_the_volume_as_a_device_and_lets_go_of_it(self):
        self.assertIn(self.mac, self.kernel.host().properties['aoe_mac'])
        attachment_id, source, made = self.export_for(self.mac)
        with self.session(made) as session:
            self.assertEqual(session.path, self.kernel.attach(made))
            self.assertEqual(session.path, self.kernel.present(made))
            self.assertEqual(pattern(1, SIZE), session.read(0, SIZE))
            session.write(0, b'\xff' * 4096)
        self.assertEqual(b'\xff' * 4096, self.stored(source, 4096))
        self.assertEqual('', self.kernel.present(made))
        self.kernel.detach(made)
        self.exporter.unexport(attachment_id)
        self.assertEqual(set(), self.exporter.exported())

    def test_host_that_holds_it_open_is_cut_off_all_the_same(self):
        attachment_id, _, made = self.export_for(self.mac)
        session = self.open_session(made)
        self.exporter.unexport(attachment_id)
        with self.assertRaises(lab.Failed):
            session.read(0, SIZE)

    def test_device_that_was_another_s_goes_unless_somebody_has_it_open(
        self
    ):
        _, _, made = self.export_for(self.mac)
        path = self.kernel.attach(made)
        with self.guest.start(
            'sh', '-c', f'exec 3<{path}; echo; exec cat'
        ) as holding:
            holding.stdout.readline()
            with self.assertRaisesRegex(errors.Busy, 'cat'):
                self.kernel.clear(made)
            self.assertEqual(path, self.kernel.present(made))
            holding.stdin.close()
        self.kernel.clear(made)
        self.assertEqual('', self.kernel.present(made))
        self.assertEqual(path, self.kernel.attach(made))
        self.kernel.detach(made)

    def test_host_with_another_mac_finds_nothing(self):
        _, _, made = self.export_for('02:00:00:00:00:99')
        with self.assertRaises(errors.NotFound):
            self.open_session(made)
