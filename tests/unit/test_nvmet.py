# SPDX-License-Identifier: Apache-2.0
"""Two services with one NVMe target, which a tree of files stands for."""

import os
import unittest

from volume import errors
from volume import ids
from volume import model
from volume.exports import nvmet_ports
from volume.exports.base import Export
from volume.exports.nvmet import NvmetExporter
from volume.exports.nvmet_subsystem import HOSTS
from volume.machine import ops
from volume.node import Node
from volume.testing import fixtures

HOST = model.Host('one', nqn='nqn.2024-01.org.example:one')
# What the kernel puts into a directory that is made, by the one it is in.
FILES = {
    'ports': nvmet_ports.FIELDS,
    'subsystems': (
        'attr_allow_any_host', 'attr_serial', 'attr_model',
        'attr_cntlid_max',
    ),
    'namespaces': ('device_path', 'device_uuid', 'device_nguid', 'enable'),
    'hosts': (),
}
DIRECTORIES = {
    'ports': ('subsystems',), 'subsystems': ('namespaces', 'allowed_hosts'),
}


class TargetNode(Node):
    """Its target is a tree, and refuses what the kernel's would refuse."""

    def __init__(self, state_dir):
        super().__init__(state_dir)
        self.top = os.path.join(state_dir, 'nvmet')
        for name in 'ports', 'subsystems', 'hosts':
            os.makedirs(os.path.join(self.top, name), exist_ok=True)
        self.before = {}  # what happens before an operation, once

    def configure(self, wanted):
        return [self.do(op) for op in wanted]

    def do(self, op):
        if happens := self.before.pop((op.verb, self.kind(op.path)), None):
            happens()
        path, text = self.here(op.path), op.text
        if op.verb == 'link':
            text = self.here(text)
            if not os.path.exists(text):
                raise errors.NotFound(f'cannot link {op.path}')
        if op.verb == 'put':
            self.check_namespace(*os.path.split(path), text)
        is_new = op.verb == 'mkdir' and not os.path.exists(path)
        if op.verb == 'rmdir' and os.path.isdir(path):
            self.empty(path)
        found = ops.run(ops.Op(op.verb, path, text))
        if is_new:
            for name in FILES[self.kind(path)]:
                with open(os.path.join(path, name), 'w'):
                    pass
            for name in DIRECTORIES.get(self.kind(path), ()):
                os.mkdir(os.path.join(path, name))
        return found

    def check_namespace(self, directory, name, text):
        if name.startswith('device_') and ops.run(
            ops.Op.get(os.path.join(directory, 'enable'))
        ) == '1':
            raise errors.Busy(f'cannot put {name}: it is enabled')
        if (name, text) == ('enable', '1') and not os.path.exists(
            ops.run(ops.Op.get(os.path.join(directory, 'device_path')))
        ):
            raise errors.NotFound(f'cannot put {name}: no device')

    def empty(self, path):
        """Take the kernel's own out, unless it is used or has ours in it."""
        if any(
            os.path.islink(link := os.path.join(where, name))
            and os.path.realpath(link) == path
            for where, names, _ in os.walk(self.top) for name in names
        ):
            raise errors.Busy(f'cannot rmdir {path}')
        for name in DIRECTORIES.get(self.kind(path), ()):
            ops.run(ops.Op.rmdir(os.path.join(path, name)))
        for name in FILES[self.kind(path)]:
            os.unlink(os.path.join(path, name))

    def here(self, path):
        return path.replace(nvmet_ports.NVMET, self.top)

    @staticmethod
    def kind(path):
        return os.path.basename(os.path.dirname(path))


class TwoServices(unittest.TestCase):

    def setUp(self):
        state = fixtures.state_dir(self)
        self.node = TargetNode(state)
        self.one, self.other = (
            NvmetExporter(fixtures.settings(
                NvmetExporter, nvme_portals=['192.0.2.1'],
                nvme_target_prefix=f'nqn.2010-10.org.example.{name}:',
            ), node)
            for name, node in (
                ('one', self.node), ('other', TargetNode(state)),
            )
        )

    def export(self, exporter, path='/dev/null'):
        """Export a volume to the one host; return the attachment."""
        made = ids.new()
        exporter.export(Export(
            made, ids.new(), model.Device(path, True), HOST,
            model.Access.WRITE, 1 << 20,
        ))
        return made

    def entries(self):
        return os.listdir(os.path.join(self.node.top, 'hosts'))

    def admitted(self):
        return [
            os.path.basename(where.removesuffix('/allowed_hosts'))
            for where, names, _ in os.walk(self.node.top)
            if where.endswith('/allowed_hosts') and names == [HOST.nqn]
        ]

    def test_a_hosts_entry_goes_when_neither_has_anything_for_it(self):
        mine, theirs = self.export(self.one), self.export(self.other)
        self.assertEqual(2, len(self.admitted()))
        self.one.unexport(mine)
        self.assertEqual([HOST.nqn], self.entries())
        self.assertEqual({theirs}, self.other.exported())
        self.other.unexport(theirs)
        self.assertEqual([], self.entries())
        self.assertEqual([], self.admitted())

    def test_an_entry_that_the_other_removes_in_the_midst_is_made_again(
        self
    ):
        theirs = self.export(self.other)
        self.node.before['link', 'allowed_hosts'] = lambda: (
            self.other.unexport(theirs)
        )
        mine = self.export(self.one)
        self.assertEqual({}, self.node.before, 'it did not happen')
        self.assertEqual({mine}, self.one.exported())
        self.assertEqual(set(), self.other.exported())
        self.assertEqual(1, len(self.admitted()))

    def test_a_hosts_entry_that_could_not_be_admitted_does_not_stay(self):
        def refuse():
            raise errors.Unavailable('not now')

        self.node.before['link', 'allowed_hosts'] = refuse
        with self.assertRaisesRegex(errors.Unavailable, 'not now'):
            self.export(self.one)
        self.assertEqual([], self.entries())

    def test_a_hosts_entry_that_a_death_has_left_goes_with_the_next(self):
        self.node.configure([ops.Op.mkdir(f'{HOSTS}/{HOST.nqn}')])
        mine = self.export(self.one)
        self.assertEqual([HOST.nqn], self.entries())
        self.one.unexport(mine)
        self.assertEqual([], self.entries())

    def test_a_volume_that_is_not_there_is_not_exported(self):
        with self.assertRaisesRegex(errors.NotFound, 'no device'):
            self.export(self.one, '/nonexistent')
        self.assertEqual([], self.admitted())
        for name in 'subsystems', 'hosts':
            self.assertEqual([], os.listdir(os.path.join(self.node.top, name)))
