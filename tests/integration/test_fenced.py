# SPDX-License-Identifier: Apache-2.0
"""A service that finds itself fenced ends its own daemons, and no other's."""

import os
import signal
import subprocess
import sys
import tempfile
import time
import unittest

from tests import aoe
from tests import tgt
from tests.process import ServiceProcess
from volume import ids
from volume import model
from volume import service
from volume.exports.aoe import AoeExporter
from volume.exports.base import Export
from volume.exports.tgt_wire import Tgtd
from volume.node import Node
from volume.testing import fixtures

MAC = '02:00:00:00:00:01'
CONNECTOR = {
    'host': 'h1', 'initiator': 'iqn.2024-01.example:one', 'aoe_mac': MAC,
}
END_S = 60


class Fenced(unittest.TestCase):

    def start(self, exporter):
        """Have a service, started anew since it has exported a volume."""
        made = ServiceProcess(
            self, '[b]\ndriver = file\ndirectories = {root}/pool\n'
            f'{exporter}', extra='lease_s = 3\n',
        )
        # It ends with the test, whatever has become of the service.
        self.node = Node(made.state)
        self.addCleanup(tgt.end, self.node)
        self.addCleanup(AoeExporter(None, self.node).abandon)
        made.start()
        volume_id = made.call('POST', '/volumes', {'volume': {
            'size_bytes': model.MIB,
        }})['volume']['id']
        made.wait(volume_id, 'available')
        attachment = made.call('POST', '/attachments', {'attachment': {
            'volume_uuid': volume_id, 'instance_uuid': ids.new(),
            'connector': CONNECTOR,
        }})['attachment']
        made.call('POST', f'/attachments/{attachment["id"]}/action', {
            'os-complete': {},
        })
        # What an earlier process has started is no child of this one.
        made.kill()
        made.start()
        return made, attachment['id']

    def fence(self, made):
        """Take its name from it, as an operator does, and see it end."""
        made.sql('UPDATE services SET is_fenced = :yes', yes=True)
        self.assertEqual(
            service.GIVEN_UP, made.process.wait(END_S), made.tail()
        )

    def reload(self, made, sections):
        """Give it another configuration, and see it taken."""
        made.configure(sections, extra='lease_s = 3\n', backends='c')
        made.process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + END_S
        while 'backends now: c' not in made.tail():
            self.assertLess(time.monotonic(), deadline, made.tail())
            time.sleep(0.02)

    def bystander(self, exporter):
        """Export a file by somebody else's exporter, ended with the test."""
        path = os.path.join(exporter.node.state_dir, 'image')
        with open(path, 'wb') as f:
            f.truncate(model.MIB)
        exporter.check()
        attachment_id = ids.new()
        self.addCleanup(exporter.abandon)
        exporter.export(Export(
            attachment_id, ids.new(), model.Device(path, is_block=False),
            model.Host('h2', (), CONNECTOR['initiator'], properties={
                'aoe_mac': MAC,
            }), model.Access.WRITE, model.MIB,
        ))
        return attachment_id

    def test_its_tgtd_ends_with_it_and_another_goes_on(self):
        tgt.need(self)
        other = tgt.make_exporter(
            self, fixtures.make_node(self), [tgt.free_portal()], chap='off'
        )
        theirs = self.bystander(other)
        made, mine = self.start(
            f'exporter = tgt\niscsi_portals = {tgt.free_portal()}\n'
            'chap = off\n'
        )
        tgtd = Tgtd(self.node, f'{made.state}/tgtd/socket.0')
        self.assertIn(mine, tgtd.listing())
        self.fence(made)
        self.assertEqual([], processes(f'TGT_IPC_SOCKET={made.state}/'))
        self.assertEqual({theirs}, other.exported())

    def test_its_vblades_end_with_it_and_another_goes_on(self):
        aoe.need(self)
        interface = aoe.make_pair(self)[0]
        other = AoeExporter(fixtures.settings(
            AoeExporter, aoe_interface=interface, aoe_trusted_network=True,
            aoe_shelves='100-199',
        ), fixtures.make_node(self))
        theirs = self.bystander(other)
        made, mine = self.start(
            f'exporter = aoe\naoe_interface = {interface}\n'
            'aoe_trusted_network = true\n'
        )
        ours = AoeExporter(None, self.node)
        self.assertEqual({mine}, ours.exported())
        self.fence(made)
        self.assertEqual(set(), ours.exported())
        self.assertEqual({theirs}, other.exported())

    def test_exports_of_a_section_that_was_taken_away_end_as_well(self):
        aoe.need(self)
        made, mine = self.start(
            f'exporter = aoe\naoe_interface = {aoe.make_pair(self)[0]}\n'
            'aoe_trusted_network = true\n'
        )
        self.reload(made, '[c]\ndriver = file\ndirectories = {root}/pool\n'
                    'exporter = local\n')
        ours = AoeExporter(None, self.node)
        self.assertEqual({mine}, ours.exported())
        self.fence(made)
        self.assertEqual(set(), ours.exported())


GIVE_UP = """
import subprocess, sys, time
from volume import conf, service

class Ends:
    def __init__(self, effect):
        self.abandon = effect

def broken():
    raise {bug}

def late():
    # As a thread that still works may; it keeps stdout open.
    subprocess.Popen(['sleep', '90'])
    print('late', flush=True)

def stuck():
    time.sleep(90)

made = service.Service(conf.load([], [sys.argv[1]]))
made.give_up_s = {give_up_s}
made._exporters = dict(enumerate(map(Ends, ({effects}))))
made._give_up('a test')
"""


class Ending(unittest.TestCase):
    """A service that gives up, in a process of its own."""

    def give_up(self, bug, effects='broken, late', give_up_s=60.0):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        path = os.path.join(directory.name, 'volume.conf')
        with open(path, 'w') as f:
            f.write(f'[DEFAULT]\nstate_path = {directory.name}/s\n')
        # Returns when the last that has its stdout has ended.
        return subprocess.run(
            [sys.executable, '-c', GIVE_UP.format(
                bug=bug, effects=effects, give_up_s=give_up_s,
            ), path],
            capture_output=True, text=True, timeout=END_S,
        )

    def test_a_bug_in_one_exporter_keeps_nothing_else_from_ending(self):
        done = self.give_up('ValueError("a bug")')
        self.assertEqual(service.GIVEN_UP, done.returncode, done.stderr)
        self.assertIn('ValueError: a bug', done.stderr)
        self.assertEqual('late\n', done.stdout)

    def test_whatever_comes_it_exits(self):
        done = self.give_up('KeyboardInterrupt')
        self.assertEqual(service.GIVEN_UP, done.returncode, done.stderr)

    def test_what_does_not_end_keeps_it_from_nothing(self):
        done = self.give_up('', effects='late, stuck', give_up_s=0.5)
        self.assertEqual(service.GIVEN_UP, done.returncode, done.stderr)


def processes(word):
    """Return the processes whose environment has a word."""
    found = []
    for pid in filter(str.isdecimal, os.listdir('/proc')):
        try:
            with open(f'/proc/{pid}/environ', 'rb') as f:
                if word.encode() in f.read():
                    found.append(int(pid))
        except OSError:
            continue
    return found
