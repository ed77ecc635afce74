# SPDX-License-Identifier: Apache-2.0
"""How an export of NFS ends; tables in memory stand for the kernel's."""

import os
import types
import unittest

from volume import errors
from volume import ids
from volume import model
from volume.commands import CommandFailed
from volume.exports.base import Export
from volume.exports.nfs import KEPT
from volume.exports.nfs import NfsExporter
from volume.exports.nfs import SERVER
from volume.exports.nfs import STATES_BYTES_MAX
from volume.node import Node
from volume.testing import fixtures

SIZE = 4096
CLIENTS = f'{SERVER}/clients'


class ServerNode(Node):
    """A server: its tools' table, and what the kernel remembers of that."""

    dies = False  # the tool, when it has written the table
    answers_late = 0  # how often the daemon does, with what was there before
    never_forgets = False
    is_ahead = False  # of the clock: what is forgotten stays, as a comment
    goes = False  # a client, as it is told to

    def __init__(self, state_dir):
        super().__init__(state_dir)
        self.table, self.kernel, self.clients = {}, {}, {}
        self.peers, self.expired = {}, []
        self.forgotten = {}

    def list(self, path):
        if path == CLIENTS:
            return list(self.clients)
        return super().list(path)

    def exists(self, path):
        if path.startswith(CLIENTS):
            return os.path.basename(path) in self.clients
        return super().exists(path)

    def configure(self, wanted):
        if wanted[0].path.startswith(CLIENTS):
            name = wanted[0].path.split('/')[-2]
            if name in self.peers:
                self.expired.append(name)
                return None
            if self.goes:
                self.clients.clear()
            raise errors.Unknown('cannot put: No such device or address')
        return super().configure(wanted)

    def read(self, path, bytes_max=1 << 20):
        if path == f'{SERVER}/threads':
            return b'8'
        if path.startswith(CLIENTS):
            name, what = path.split('/')[-2:]
            if what == 'info':
                return (
                    'clientid: 0x1\n'
                    f'address: "{self.peers[name]}"\nstatus: confirmed\n'
                ).encode()
            said = self.clients[name].encode()
            if len(said) > bytes_max:
                raise errors.Invalid(f'{path} is larger than {bytes_max}')
            return said
        if path == KEPT:
            return ''.join(['#path domain(flags)\n', *(
                f'{mark}{directory}\t{client}(rw,sync)\n'
                for mark, kept in (('', self.kernel), ('# ', self.forgotten))
                for directory, client in kept.items()
            )]).encode()
        return super().read(path, bytes_max)

    def run(self, *argv, **options):
        if argv[0] == 'exportfs':
            return self.exportfs(*argv[1:]) or ''
        if argv[0] == 'stat':
            return super().run(*argv, **options)
        return ''  # whose it is

    def exportfs(self, option, *words):
        if option == '-s':
            return ''.join(
                f'{directory}  {client}(rw,sync)\n'
                for directory, client in self.table.items()
            )
        if option == '-o':
            client, _, directory = words[-1].partition(':')
            self.table[directory] = client
            # And the host comes; the pool's path is a link.
            self.kernel[f'/data{directory}'] = client
            return None
        before = dict(self.kernel)
        if option == '-u':
            del self.table[words[0].partition(':')[2]]
            if self.dies:
                self.dies = False
                raise CommandFailed(['exportfs'], -15, '')
        if self.is_ahead:
            self.forgotten.update(self.kernel)
        self.kernel.clear()
        if self.answers_late:
            self.answers_late -= 1
            self.kernel.update(before)
        if self.never_forgets:
            self.kernel.update(before)
        return None


class Ending(unittest.TestCase):

    def setUp(self):
        self.root = fixtures.state_dir(self)
        self.node = ServerNode(self.root)
        self.exporter = NfsExporter(types.SimpleNamespace(
            nfs_address='192.0.2.1', nfs_uid=65534,
        ), self.node)
        self.exporter.check()
        self.path = os.path.join(os.path.realpath(self.root), 'volume')
        with open(self.path, 'wb') as f:
            f.truncate(SIZE)
        self.attachment, volume = ids.new(), ids.new()
        self.exporter.export(Export(
            self.attachment, volume, model.Device(self.path, False),
            model.Host('one', addresses=('192.0.2.2',)), model.Access.WRITE,
            SIZE,
        ))
        self.assertEqual({self.attachment}, self.exporter.exported())

    def assert_ended(self):
        self.assertEqual({}, self.node.kernel)
        self.assertEqual(set(), self.exporter.exported())
        self.assertFalse(os.path.exists(
            os.path.join(os.path.dirname(self.path), '.exports',
                         self.attachment)
        ))

    def opened(self, *more):
        """Return what the server says of a client that has the file open."""
        found = self.exporter._identities(self.path)[0], *more
        return ''.join(
            f'- 0x1: {{ type: open, superblock: "{each}" }}\n'
            for each in found
        )

    def test_only_who_has_no_other_attachment_of_it_is_expired(self):
        volume, other = ids.new(), ids.new()
        for attachment, address in (
            (self.attachment, '192.0.2.2'), (other, '192.0.2.3'),
            (ids.new(), '192.0.2.4'),
        ):
            if attachment == self.attachment:
                self.exporter.unexport(attachment)
            self.exporter.export(Export(
                attachment, volume, model.Device(self.path, False),
                model.Host('h', addresses=(address,)), model.Access.WRITE,
                SIZE,
            ))
        self.node.clients = dict.fromkeys('1234', self.opened())
        self.node.clients['5'] = self.opened('08:01:7')
        self.node.peers = {
            '1': '192.0.2.2:876', '2': '192.0.2.3:877',
            '3': '192.0.2.4:878', '4': 'nonsense', '5': '192.0.2.2:1',
        }
        self.exporter.unexport(self.attachment)
        self.assertEqual(['1'], self.node.expired)
        # The last that has it is alone with it, whatever it is called.
        for each in self.exporter.exported():
            self.exporter.unexport(each)
        self.assertLess({'1', '4'}, set(self.node.expired))

    def test_host_that_has_too_much_open_keeps_nobody_from_being_detached(
        self,
    ):
        self.node.clients = {
            '7': self.opened() * (STATES_BYTES_MAX // 40), '8': self.opened(),
        }
        self.node.peers = {'7': '192.0.2.9:1', '8': '192.0.2.2:1'}
        with self.assertLogs('volume.exports.nfs', 'WARNING'):
            self.exporter.unexport(self.attachment)
        self.assertEqual(['8'], self.node.expired)
        self.assert_ended()

    def test_a_host_that_goes_by_itself_meanwhile_is_gone(self):
        self.node.clients = {'7': self.opened()}
        with self.assertRaises(errors.Unknown):
            self.exporter.unexport(self.attachment)
        self.node.goes = True
        self.exporter.unexport(self.attachment)
        self.assert_ended()

    def test_the_server_itself_has_nothing_of_it_any_more(self):
        self.exporter.unexport(self.attachment)
        self.assert_ended()

    def test_what_was_ended_before_the_server_forgot_is_forgotten_next(self):
        self.node.dies = True
        with self.assertRaises(CommandFailed):
            self.exporter.unexport(self.attachment)
        self.assertNotEqual({}, self.node.kernel)
        self.exporter.unexport(self.attachment)
        self.assert_ended()

    def test_an_answer_that_comes_late_is_forgotten_as_well(self):
        self.node.answers_late = 2
        self.exporter.unexport(self.attachment)
        self.assert_ended()

    def test_what_is_forgotten_and_still_there_as_a_comment_is_forgotten(self):
        self.node.is_ahead = True
        self.exporter.unexport(self.attachment)
        self.assertNotEqual({}, self.node.forgotten)
        self.assert_ended()

    def test_a_server_that_does_not_forget_has_not_ended_it(self):
        self.node.never_forgets = True
        with self.assertRaisesRegex(errors.Unknown, 'still serves'):
            self.exporter.unexport(self.attachment)
        # The next one goes on from there.
        self.node.never_forgets = False
        self.exporter.unexport(self.attachment)
        self.assert_ended()
