# SPDX-License-Identifier: Apache-2.0
"""The tgt exporter: who is let in, what is stored, what is left alone."""

import concurrent.futures
import contextlib
import ctypes
import dataclasses
import os
import unittest

from tests import iscsi
from tests import tgt
from volume import errors
from volume import identity
from volume import ids
from volume import model
from volume.exports import tgt_daemon
from volume.exports import tgt_listing
from volume.exports.base import Export
from volume.exports.tgt import TgtExporter
from volume.exports.tgt_daemon import Daemon
from volume.node import Node
from volume.testing import faults
from volume.testing import fixtures

MIB = 1 << 20
SIZE = 4 * MIB
HOST = model.Host('one', (), 'iqn.2024-01.example:one')
OTHER = 'iqn.2024-01.example:two'
READ, WRITE = model.Access.READ, model.Access.WRITE


class Case(unittest.TestCase):
    chap = 'one-way'

    def setUp(self):
        tgt.need(self)
        self.node = fixtures.make_node(self)
        self.portal = tgt.free_portal()
        self.exporter = tgt.make_exporter(
            self, self.node, [self.portal], chap=self.chap
        )
        self.exporter.check()
        self.tgtd = self.exporter._tgtd

    def wanted(self, **changes):
        path = os.path.join(self.node.state_dir, f'{ids.new()}.raw')
        with open(path, 'wb') as f:
            f.truncate(SIZE)
        secrets = {
            name: ids.new().replace('-', '')[:16]
            for name in self.exporter.wants
        }
        return Export(**{
            'attachment_id': ids.new(), 'volume_id': ids.new(),
            'source': model.Device(path, is_block=False), 'host': HOST,
            'access': WRITE, 'size_bytes': SIZE, 'credentials': secrets,
            **changes,
        })

    @contextlib.contextmanager
    def session(self, connection, **changes):
        login = dataclasses.replace(
            iscsi.Login.of(connection, HOST.iqn), **changes
        )
        with contextlib.closing(iscsi.Session(login)) as session:
            yield session

    def assert_refused(self, connection, **changes):
        with self.assertRaises(iscsi.Refused):
            with self.session(connection, **changes) as session:
                session.read(0, 512)

    def pid(self):
        return Daemon(self.node, '', 1)._record().pid

    def kill(self):
        """End the daemon as a crash does."""
        tgt.end(self.node)


class AccessTest(Case):
    chap = 'mutual'

    def test_only_who_knows_all_is_let_in(self):
        wanted = self.wanted()
        connection = self.exporter.export(wanted)
        for what, changes in {
            'no CHAP': {'username': '', 'mutual_username': ''},
            'wrong password': {'password': 'x' * 16},
            "another attachment's account": {'username': ids.new()},
            'wrong initiator': {'initiator': OTHER},
            'initiator in other letters': {'initiator': HOST.iqn.upper()},
            'target that cannot prove itself': {'mutual_password': 'x' * 16},
        }.items():
            with self.subTest(what):
                self.assert_refused(connection, **changes)
        with self.session(connection) as session:
            self.assertEqual(bytes(512), session.read(0, 512))

    def test_password_of_one_attachment_opens_no_other(self):
        one, two = self.wanted(), self.wanted()
        first, second = map(self.exporter.export, (one, two))
        self.assert_refused(
            first, username=second.credentials['auth_username'],
            password=second.credentials['auth_password'],
        )

    def test_initiator_sees_its_own_targets_alone(self):
        connection = self.exporter.export(self.wanted())
        names = iscsi.discover(self.portal, HOST.iqn)
        self.assertEqual([connection.fields['target_iqn']], names)
        self.assertEqual([], iscsi.discover(self.portal, OTHER))

    def test_new_password_takes_the_old_one_s_place(self):
        wanted = self.wanted()
        old = self.exporter.export(wanted)
        changed = {name: 'n' * 16 for name in wanted.credentials}
        with self.session(old) as session:
            new = self.exporter.export(Export(
                wanted.attachment_id, wanted.volume_id, wanted.source,
                wanted.host, wanted.access, SIZE, changed,
            ))
            self.assertEqual(bytes(512), session.read(0, 512))
        self.assert_refused(old)
        with self.session(new) as session:
            self.assertEqual(bytes(512), session.read(0, 512))

    def test_nothing_of_an_attachment_is_left(self):
        before = self.tgtd.listing(), self.tgtd.accounts()
        wanted = self.wanted()
        connection = self.exporter.export(wanted)
        self.assertEqual(2, len(self.tgtd.accounts()))
        self.exporter.unexport(wanted.attachment_id)
        self.assertEqual(
            before, (self.tgtd.listing(), self.tgtd.accounts())
        )
        self.assert_refused(connection)

    def test_host_s_name_in_capitals_is_let_in_as_it_writes_it(self):
        host = model.Host('one', (), 'IQN.2024-01.example:One')
        wanted = self.wanted(host=host)
        for _ in range(2):
            connection = self.exporter.export(wanted)
            with self.session(connection, initiator=host.iqn) as session:
                self.assertEqual(bytes(512), session.read(0, 512))

    def test_host_without_a_name_is_refused(self):
        with self.assertRaises(errors.Invalid):
            self.exporter.export(self.wanted(host=model.Host('nameless')))
        self.assertEqual(set(), self.exporter.exported())


class EndTest(Case):

    @unittest.skipUnless(
        os.environ.get('VOLUME_PROOF'), 'it waits for 20 s: VOLUME_PROOF'
    )
    def test_host_that_takes_nothing_from_the_wire_is_ended(self):
        wanted, other = self.wanted(), self.wanted()
        connection = self.exporter.export(wanted)
        second = self.exporter.export(other)
        stalled = iscsi.Session(iscsi.Login.of(connection, HOST.iqn))
        self.addCleanup(stalled.drop)
        stalled.stall()
        self.exporter.unexport(wanted.attachment_id)
        self.assertEqual({other.attachment_id}, self.exporter.exported())
        with self.session(second) as session:
            self.assertEqual(bytes(512), session.read(0, 512))

    def test_many_sessions_of_one_host_all_end(self):
        wanted = self.wanted()
        connection = self.exporter.export(wanted)
        login = iscsi.Login.of(connection, HOST.iqn)
        sessions = [iscsi.Session(login) for _ in range(5)]
        for session in sessions:
            self.addCleanup(session.drop)
        self.exporter.unexport(wanted.attachment_id)
        for session in sessions:
            with self.assertRaises(iscsi.Refused):
                session.read(0, 512)
        self.assertEqual('', self.tgtd.listing())

    def test_host_that_writes_on_meanwhile_is_ended(self):
        wanted = self.wanted()
        login = iscsi.Login.of(self.exporter.export(wanted), HOST.iqn)

        def write(session):
            with contextlib.suppress(iscsi.Refused):
                while True:
                    session.write(0, b'\xff' * MIB)

        sessions = [iscsi.Session(login) for _ in range(2)]
        for session in sessions:
            self.addCleanup(session.drop)
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            writers = [threads.submit(write, each) for each in sessions]
            while not any(map(bool, self.written(wanted))):
                pass
            self.exporter.unexport(wanted.attachment_id)
            after = self.written(wanted)
            for each in writers:
                each.result()
        self.assertEqual(after, self.written(wanted))

    def written(self, wanted):
        with open(wanted.source.path, 'rb') as f:
            return f.read()

    def test_lines_in_a_host_s_alias_mislead_nobody(self):
        # A host may call itself anything, new lines included.
        victim, wanted = self.wanted(), self.wanted()
        victims = self.exporter.export(victim)
        name = victims.fields['target_iqn']
        absent = ids.new()
        lie = (
            'x\n    LUN information:\n    ACL information:\n'
            f'Target 1: {name.replace(victim.attachment_id, absent)}\n'
            '    ACL information:\n        iqn.2024-01.example:x\n'
        )
        with self.liar(self.exporter.export(wanted), lie):
            self.assertIn('Target 1: ', self.tgtd.listing())
            # It can hide itself, and neither hide nor invent others.
            there = self.exporter.exported() - {wanted.attachment_id}
            self.assertEqual({victim.attachment_id}, there)
            self.exporter.unexport(absent)
            self.exporter.unexport(wanted.attachment_id)
        self.assertEqual({victim.attachment_id}, self.exporter.exported())
        with self.session(victims) as session:
            session.read(0, 512)


    def liar(self, connection, alias):
        """Return a session of a host that calls itself so."""
        prepare = iscsi.Session._prepare

        def with_alias(session, *args):
            prepare(session, *args)
            session._lib.iscsi_set_alias(
                session._context, ctypes.c_char_p(alias.encode())
            )

        session = type('Liar', (iscsi.Session,), {'_prepare': with_alias})
        login = iscsi.Login.of(connection, HOST.iqn)
        return contextlib.closing(session(login))

    def test_host_that_hides_its_admission_is_out_with_the_first_act(self):
        wanted = self.wanted()
        connection = self.exporter.export(wanted)
        node = faults.FaultyNode(self.node.state_dir)
        exporter = TgtExporter(tgt.settings([self.portal], chap='off'), node)
        with self.liar(connection, 'x\nTarget 7: y') as session:
            # The listing is a question; then comes the first act.
            node.arm(faults.Fault('crash', 2, is_late=True))
            with self.assertRaises(faults.Crash):
                exporter.unexport(wanted.attachment_id)
            with self.assertRaises(iscsi.Refused):
                session.read(0, 512)
            self.assert_refused(connection)
        self.exporter.unexport(wanted.attachment_id)
        self.assertEqual('', self.tgtd.listing())

    def test_abandoned_it_serves_nobody(self):
        wanted = self.wanted()
        connection = self.exporter.export(wanted)
        with self.session(connection) as session:
            self.exporter.abandon()
            with self.assertRaises(iscsi.Refused):
                session.read(0, 512)
        self.assert_refused(connection)
        self.assertEqual(set(), self.exporter.exported())
        self.exporter.abandon()

    def test_end_that_broke_off_can_be_taken_back(self):
        wanted = self.wanted()
        self.exporter.export(wanted)
        target, = self.exporter._targets()[wanted.attachment_id]
        self.tgtd.set_ready(target.tid, False)
        self.assertEqual(set(), self.exporter.exported())
        connection = self.exporter.export(wanted)
        self.assertEqual({wanted.attachment_id}, self.exporter.exported())
        with self.session(connection) as session:
            self.assertEqual(bytes(512), session.read(0, 512))


class IdentityTest(Case):

    def test_volume_is_one_disk_through_two_daemons(self):
        other_node = fixtures.make_node(self)
        portal = tgt.free_portal()
        other = tgt.make_exporter(self, other_node, [portal])
        other.check()
        one, two = self.wanted(), self.wanted()
        seen = {}
        for wanted in one, two:
            for exporter in self.exporter, other:
                connection = exporter.export(wanted)
                with self.session(connection) as session:
                    seen.setdefault(wanted.volume_id, set()).add(
                        (session.serial, *session.wwns)
                    )
        self.assertEqual({
            each.volume_id: {(
                each.volume_id, identity.scsi_naa(each.volume_id)
            )} for each in (one, two)
        }, seen)

    def test_identity_and_connection_survive_the_daemon(self):
        wanted = self.wanted()
        connection = self.exporter.export(wanted)
        with self.session(connection) as session:
            before = session.serial, session.wwns, session.inquire()
        self.kill()
        self.assertEqual(set(), self.exporter.exported())
        self.exporter.check()
        self.assertEqual(
            {wanted.attachment_id: connection},
            self.exporter.export_many([wanted]),
        )
        with self.session(connection) as session:
            self.assertEqual(
                before, (session.serial, session.wwns, session.inquire())
            )


class BytesTest(Case):

    def setUp(self):
        super().setUp()
        self.directory = fixtures.reflink_directory(self)
        path = os.path.join(self.directory, 'volume.raw')
        with open(path, 'wb') as f:
            f.truncate(SIZE)
            os.fsync(f.fileno())
        self.path = path
        self.file = self.wanted(source=model.Device(path, is_block=False))

    def test_what_a_host_has_flushed_is_stored(self):
        with self.session(self.exporter.export(self.file)) as session:
            # The kernel may store it by itself, and sooner than we look.
            for _ in range(20):
                session.write(0, b'\xff' * MIB)
                if was_delayed := iscsi.is_delayed(self.path):
                    break
            self.assertTrue(was_delayed)
            session.flush()
            self.assertFalse(iscsi.is_delayed(self.path))
        self.exporter.unexport(self.file.attachment_id)

    def test_what_a_host_writes_through_is_stored(self):
        with self.session(self.exporter.export(self.file)) as session:
            session.write(0, b'\xff' * MIB, through=True)
            self.assertFalse(iscsi.is_delayed(self.path))
        self.exporter.unexport(self.file.attachment_id)

    def test_host_is_told_that_it_has_to_flush(self):
        # The caching mode page: write cache enabled.
        with self.session(self.exporter.export(self.file)) as session:
            page = session.sense_mode(0x08)
        self.assertTrue(page[2] & 0x04, page.hex())
        self.exporter.unexport(self.file.attachment_id)

    def test_volume_that_is_smaller_than_promised_is_refused(self):
        with self.assertRaises(errors.Corrupt):
            self.exporter.export(self.wanted(size_bytes=SIZE + 512))

    def test_path_that_would_be_read_as_two_is_refused(self):
        path = os.path.join(self.node.state_dir, 'a,bsoflags=sync')
        with open(path, 'wb') as f:
            f.truncate(SIZE)
        wanted = self.wanted(source=model.Device(path, is_block=False))
        with self.assertRaises(errors.Invalid):
            self.exporter.export(wanted)
        self.exporter.unexport(wanted.attachment_id)
        self.assertEqual('', self.tgtd.listing())

    def test_image_that_is_not_raw_is_refused(self):
        source = model.Device(self.path, is_block=False, format='qcow2')
        with self.assertRaises(errors.Unsupported):
            self.exporter.export(self.wanted(source=source))


class NeighboursTest(Case):

    def test_targets_of_others_are_left_alone(self):
        self.tgtd.new_target(1, 'iqn.2001-04.com.example:theirs')
        self.tgtd.new_account('theirs', 'p' * 12)
        wanted = self.wanted()
        self.exporter.export(wanted)
        self.exporter.unexport(wanted.attachment_id)
        self.assertEqual({'theirs'}, self.tgtd.accounts())
        left = list(tgt_listing.parse(self.tgtd.listing()))
        self.assertEqual(
            ['iqn.2001-04.com.example:theirs'], [each.name for each in left]
        )

    def test_number_that_is_taken_is_another_s(self):
        wanted = self.wanted()
        numbers = list(tgt_listing.numbers(wanted.attachment_id))
        for number in numbers[:2]:
            self.tgtd.new_target(number, f'iqn.2001-04.com.example:{number}')
        connection = self.exporter.export(wanted)
        self.assertEqual(connection, self.exporter.export(wanted))
        with self.session(connection) as session:
            session.read(0, 512)
        self.exporter.unexport(wanted.attachment_id)
        self.assertEqual(2, self.tgtd.listing().count('Target '))

    def test_services_that_start_at_once_find_one_daemon(self):
        self.kill()
        exporters = [
            TgtExporter(tgt.settings([self.portal]), Node(
                self.node.state_dir
            )) for _ in range(4)
        ]
        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            results = [threads.submit(each.check) for each in exporters]
        for result in results:
            with contextlib.suppress(errors.Unavailable):
                result.result()
        for each in exporters:
            each.check()
        wanted = [self.wanted() for _ in range(20)]
        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            list(threads.map(
                lambda pair: pair[0].export(pair[1]),
                zip(exporters * 5, wanted, strict=True),
            ))
        names = {each.attachment_id for each in wanted}
        for each in exporters:
            self.assertEqual(names, each.exported())
        self.assertTrue(os.path.exists(f'/proc/{self.pid()}'))

    def test_daemon_that_runs_already_is_used(self):
        socket = os.path.join(self.node.state_dir, 'tgtd', 'socket.0')
        system = TgtExporter(
            tgt.settings([self.portal], tgt_socket=socket),
            fixtures.make_node(self),
        )
        system.check()
        connection = system.export(self.wanted())
        with self.session(connection) as session:
            session.read(0, 512)

    def test_daemon_that_listens_elsewhere_is_refused(self):
        socket = os.path.join(self.node.state_dir, 'tgtd', 'socket.0')
        system = TgtExporter(
            tgt.settings([tgt.free_portal()], tgt_socket=socket),
            fixtures.make_node(self),
        )
        with self.assertRaisesRegex(errors.Invalid, 'does not listen'):
            system.check()

    def test_system_daemon_that_is_down_is_not_taken_for_empty(self):
        system = TgtExporter(
            tgt.settings([self.portal], tgt_socket='/nowhere/socket.0'),
            self.node,
        )
        for ask in (
            system.check, system.exported,
            lambda: system.unexport(ids.new()),
        ):
            with self.assertRaises(errors.Unavailable):
                ask()


class PortalsTest(Case):

    def test_host_has_a_way_through_each_portal(self):
        portals = [self.portal, tgt.free_portal('127.0.0.2')]
        exporter = tgt.make_exporter(self, self.node, portals)
        exporter.check()
        self.exporter = exporter
        connection = exporter.export(self.wanted())
        self.assertEqual(portals, connection.fields['target_portals'])
        for portal in portals:
            with self.session(connection, portal=portal) as session:
                session.read(0, 512)

    def test_portal_that_is_taken_is_said_and_nothing_listens(self):
        node = fixtures.make_node(self)
        exporter = tgt.make_exporter(self, node, [self.portal])
        with self.assertRaisesRegex(errors.Unavailable, self.portal):
            exporter.check()
        self.assertTrue(Daemon(node, '', 1).is_gone())

    def test_backends_that_cannot_listen_are_all_down_and_say_why(self):
        node = fixtures.make_node(self)
        exporters = [
            tgt.make_exporter(self, node, [self.portal]) for _ in range(3)
        ]
        for _ in range(3):
            with concurrent.futures.ThreadPoolExecutor(3) as threads:
                results = [threads.submit(each.check) for each in exporters]
            for result in results:
                with self.assertRaisesRegex(
                    errors.Unavailable,
                    f'cannot listen on {self.portal}.*already in use',
                ):
                    result.result()
        self.assertTrue(Daemon(node, '', 1).is_gone())

    def test_backend_that_cannot_listen_ends_no_other_s_daemon(self):
        node = fixtures.make_node(self)
        deaf = tgt.make_exporter(self, node, [self.portal])
        other = tgt.make_exporter(self, node, [tgt.free_portal()])
        for _ in range(3):
            tgt.end(node)
            with concurrent.futures.ThreadPoolExecutor(2) as threads:
                results = [
                    threads.submit(each.check) for each in (deaf, other)
                ]
            with self.assertRaisesRegex(errors.Unavailable, 'already in use'):
                results[0].result()
            results[1].result()
            self.assertEqual(set(), other.exported())
            self.assertFalse(Daemon(node, '', 1).is_gone())


class UnwrittenTest(Case):
    """The service died between starting the daemon and writing it down."""

    def setUp(self):
        super().setUp()
        self.process = Daemon(self.node, '', 1)._record()
        Daemon(self.node, '', 1)._keep(tgt_daemon.UNKNOWN)

    def test_daemon_nobody_wrote_down_is_written_down_when_it_is_found(self):
        self.exporter.check()
        self.assertEqual(
            self.process, Daemon(self.node, '', 1)._written()
        )

    def test_daemon_nobody_wrote_down_ends_with_a_fenced_service(self):
        connection = self.exporter.export(self.wanted())
        self.exporter.abandon()
        self.assert_refused(connection)
        self.assertFalse(self.node.is_running(self.process))

    def test_daemon_that_cannot_be_told_from_others_is_said_to_go_on(self):
        class Hidden(Node):
            def read(self, path, *args):
                if path.endswith('/environ'):
                    raise errors.Invalid('permission denied')
                return super().read(path, *args)

        exporter = TgtExporter(
            tgt.settings([self.portal]), Hidden(self.node.state_dir)
        )
        with self.assertRaisesRegex(errors.Unknown, 'end it'):
            exporter.abandon()
        self.kill()
        exporter.abandon()


class CountTest(Case):

    def test_exchanges_for_many_exports_do_not_grow_with_their_number(self):
        asked = []

        class Counting(Node):
            def act(self, what, effect):
                asked.append(what)
                return super().act(what, effect)

        exporter = TgtExporter(
            tgt.settings([self.portal]), Counting(self.node.state_dir)
        )
        counts = []
        for count in 5, 10:
            wanted = [self.wanted() for _ in range(count)]
            asked.clear()
            found = exporter.export_many(wanted)
            counts.append(len(asked))
            self.assertTrue(all(
                isinstance(each, model.Connection) for each in found.values()
            ))
        # Seven each (the size of the file is one), and one listing.
        self.assertEqual([5 * 7 + 1, 10 * 7 + 1], counts)
        asked.clear()
        self.assertEqual(15, len(exporter.exported()))
        self.assertEqual(['talk socket.0'], asked)
