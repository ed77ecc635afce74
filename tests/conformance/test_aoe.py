# SPDX-License-Identifier: Apache-2.0
"""The aoe exporter: real vblades on a pair of interfaces of this machine."""

import os
import unittest
import uuid

from tests import aoe
from tests import iscsi
from volume import errors
from volume import ids
from volume import model
from volume.exports.aoe import AoeExporter
from volume.node import CommandFailed
from volume.node import Node
from volume.testing import exports
from volume.testing import fixtures

MAC, OTHER_MAC = '02:00:00:00:00:01', '02:00:00:00:00:02'


class Hanging(Node):
    """A node that has vblades which no signal ends."""

    def __init__(self, state_dir, paths):
        super().__init__(state_dir)
        self.lines = [f'1 vblade -s 9 9 eth9 {path}' for path in paths]

    def run(self, *argv, **options):
        try:
            said = super().run(*argv, **options)
        except CommandFailed as failed:
            if argv[0] != 'pgrep' or failed.code != 1:
                raise
            said = ''
        if argv[0] == 'pgrep':
            return '\n'.join([*self.lines, said])
        return said


class AoeTest(exports.ExporterSuite, unittest.TestCase):

    size_bytes = 256 << 10
    host = model.Host('one', properties={'aoe_mac': MAC})
    other_host = model.Host('two', properties={'aoe_mac': OTHER_MAC})
    interfaces = ()

    def setUp(self):
        aoe.need(self)
        self.interfaces = aoe.make_pair(self)
        self.node = fixtures.make_node(self)
        self.macs = {}
        super().setUp()

    def settings(self, **changes):
        return fixtures.settings(AoeExporter, **{
            'aoe_interface': self.interfaces[0],
            'aoe_trusted_network': True, **changes,
        })

    def make_exporter(self):
        return AoeExporter(self.settings(), self.node)

    def make_source(self, image):
        path = os.path.join(self.node.state_dir, f'{ids.new()}.raw')
        with open(path, 'wb') as f:
            f.write(image)
        return model.Device(path, is_block=False)

    def export(self, attachment_id, source=None, access=model.Access.WRITE,
               host=None):
        connection = super().export(attachment_id, source, access, host)
        mac = (host or self.host).properties['aoe_mac']
        self.macs[connection.fields['device']] = mac
        return connection

    def open_session(self, connection):
        mac = self.macs[connection.fields['device']]
        is_there = any(
            str(each.address) == connection.fields['device']
            for each in self.exporter._running().values()
        )
        return aoe.Session(
            self.interfaces[1], mac, connection.fields,
            answer_s=aoe.ANSWER_S if is_there else aoe.SHUT_S,
        )

    # What holds for this one beside.

    def test_host_with_another_address_is_not_answered(self):
        connection = self.export(self.attachment())
        with aoe.session(
            self.interfaces[1], OTHER_MAC, connection.fields,
            answer_s=aoe.SHUT_S,
        ) as session:
            with self.assertRaises(aoe.Refused):
                session.read(0, 512)

    def test_host_without_an_address_is_refused_unless_all_may(self):
        nameless = model.Host('nameless')
        with self.assertRaises(errors.Invalid):
            self.exporter.export(self.wanted(
                self.attachment(), host=nameless
            ))
        self.exporter = AoeExporter(
            self.settings(aoe_any_host=True), self.node
        )
        connection = self.exporter.export(
            self.wanted(self.attachment(), host=nameless)
        )
        with aoe.session(
            self.interfaces[1], OTHER_MAC, connection.fields
        ) as session:
            self.assertEqual(self.image[:512], session.read(0, 512))

    def test_address_that_cannot_be_read_opens_nothing(self):
        for wrong in '02:00', f'{MAC},x', f'{MAC};{MAC}', 'all':
            host = model.Host('one', properties={'aoe_mac': wrong})
            with self.assertRaises(errors.Invalid):
                self.exporter.export(self.wanted(
                    self.attachment(), host=host
                ))
        self.assertEqual(set(), self.exporter.exported())

    def test_network_must_be_said_to_be_trusted(self):
        exporter = AoeExporter(
            self.settings(aoe_trusted_network=False), self.node
        )
        with self.assertRaisesRegex(errors.Invalid, 'aoe_trusted_network'):
            exporter.check()

    def test_wrong_options_are_said(self):
        for changes, error in (
            ({'aoe_shelves': '5-4'}, errors.Invalid),
            ({'aoe_shelves': '0-65535'}, errors.Invalid),
            ({'aoe_shelves': 'all'}, errors.Invalid),
            ({'aoe_interface': '-x'}, errors.Invalid),
            ({'aoe_interface': 'nowhere0'}, errors.Unavailable),
        ):
            with self.subTest(changes), self.assertRaises(error):
                AoeExporter(self.settings(**changes), self.node).check()

    def test_address_is_kept_when_a_process_dies(self):
        attachment_id = self.attachment()
        connection = self.export(attachment_id)
        self.exporter._end(attachment_id)
        self.assertNotIn(attachment_id, self.exporter.exported())
        self.assertEqual(connection, self.export(attachment_id))
        self.assertEqual(self.image, self.read(connection))

    def test_two_on_one_shelf_have_two_addresses(self):
        self.exporter = AoeExporter(
            self.settings(aoe_shelves='7-7'), self.node
        )
        found = [self.export(self.attachment()) for _ in range(8)]
        self.assertEqual({7}, {each.fields['shelf'] for each in found})
        self.assertEqual(8, len({each.fields['slot'] for each in found}))

    def test_address_that_was_another_s_is_given_away_last(self):
        # A host that was cut off writes on, to whoever answers there.
        exporter = AoeExporter(self.settings(aoe_shelves='7-7'), self.node)
        found = []
        for number in range(30):
            attachment_id = str(uuid.uuid5(uuid.NAMESPACE_OID, str(number)))
            found.append(exporter._claim(attachment_id, {}))
            exporter.unexport(attachment_id)
        self.assertEqual(30, len(set(found)))
        # All that it may have were others': the oldest, then.
        last = str(uuid.uuid5(uuid.NAMESPACE_OID, 'last'))
        at_s = {
            address: 1000.0 - number for number, address
            in enumerate(exporter._addresses(last))
        }
        for address, ended_s in at_s.items():
            self.node.write(exporter._mark(address), b'')
            os.utime(exporter._mark(address), (ended_s, ended_s))
        self.assertEqual(
            min(at_s, key=at_s.get), exporter._claim(last, {}))

    def test_abandoned_it_serves_nobody(self):
        connection = self.export(self.attachment())
        self.assertEqual(self.image, self.read(connection))
        self.exporter.abandon()
        self.assertEqual(set(), self.exporter.exported())
        self.assert_closed(connection)

    def test_those_that_hang_keep_no_other_serving_and_all_are_named(self):
        connection = self.export(self.attachment())
        hung = [ids.new(), ids.new()]
        exporter = AoeExporter(self.settings(), Hanging(
            self.node.state_dir, map(self.exporter._link, hung)
        ))
        exporter.end_s = 3.0  # it looks for all of them within that
        with self.assertRaises(errors.Unavailable) as caught:
            exporter.abandon()
        self.assertIn(', '.join(sorted(hung)), str(caught.exception))
        self.assertEqual(set(), self.exporter.exported())
        self.assert_closed(connection)

    def test_what_a_host_has_written_is_stored(self):
        directory = fixtures.reflink_directory(self)
        path = os.path.join(directory, 'volume.raw')
        with open(path, 'wb') as f:
            f.truncate(self.size_bytes)
        attachment_id = self.attachment()
        connection = self.export(
            attachment_id, model.Device(path, is_block=False)
        )
        with self.session(connection) as session:
            session.write(0, b'\xff' * 4096)
            self.assertFalse(iscsi.is_delayed(path))
        self.exporter.unexport(attachment_id)
