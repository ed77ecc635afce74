# SPDX-License-Identifier: Apache-2.0
"""Hosts open images of Ceph themselves, and how that is ended.

A host is a process of its own, with a client of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import json
import subprocess
import unittest
from collections.abc import Mapping
from typing import Any

from tests import rbd
from tests.rbd_client import Client
from volume import errors
from volume import ids
from volume import model
from volume.connector.rbd import RbdConnector
from volume.drivers.rbd import fence
from volume.drivers.rbd.wire import Wire
from volume.testing import faults
from volume.testing import fixtures
from volume.testing import workbench
from volume.testing.workbench import fill
from volume.testing.workbench import pattern

MIB = model.MIB
A = model.Host('a', ('192.0.2.1',))
B = model.Host('b', ('192.0.2.2',))
HERE = model.Host('here', ('127.0.0.1',))
WRITE, READ = model.Access.WRITE, model.Access.READ
BLOCKED = 'error 108'


class KernelWire(Wire):
    """Shows watchers as if they were kernels."""

    def watchers(self, image: Any) -> list[Mapping[str, Any]]:
        return [
            {**each, 'cookie': fence.KERNEL_COOKIE + 1}
            for each in super().watchers(image)
        ]


class Case(rbd.Pools, unittest.TestCase):

    kind = 'broken'

    def setUp(self) -> None:
        self.node = fixtures.make_node(self)
        self.driver = self.make(rbd.lasting)
        self.pool = self.pool_names[0]

    def make(self, connect: Any = None, **options: Any) -> Any:
        driver = self.rbd(self.node, connect=connect, **options)
        driver.check()
        return driver

    def volume(self, seed: int = 1) -> model.Volume:
        volume = model.Volume(ids.new(), self.pool, MIB)
        self.driver.create(volume)
        fill(self.driver, volume, pattern(seed, MIB))
        return volume

    def open(
        self, volume: model.Volume, *how: str, user: str = ''
    ) -> Client:
        return Client(
            self, self.cluster.conf, user or rbd.user(),
            f'{self.pool}/volume-{volume.id}', *how)

    def blocked(self) -> set[str]:
        """Return the clients that the cluster refuses."""
        return set(self.cluster.ceph('osd', 'dump')['blocklist'])


class FenceTest(Case):

    def test_open_session_cannot_go_on_after_revoke(self) -> None:
        volume = self.volume()
        self.driver.grant(volume, A, WRITE)
        host = self.open(volume)
        self.assertEqual('written', host.ask('write', 0, 'h'))
        self.assertEqual('h', host.ask('read', 0))
        self.driver.revoke(volume, A)
        self.assertEqual(BLOCKED, host.ask('read', 0))
        self.assertEqual(BLOCKED, host.ask('write', 0, 'x'))
        # The next host need not wait for it.
        self.driver.grant(volume, B, WRITE)
        other = self.open(volume)
        self.assertEqual('h', other.ask('read', 0))
        self.assertEqual('written', other.ask('write', 0, 'o'))
        self.assertEqual(BLOCKED, host.ask('read', 0))

    def block_s(self, before: set[str]) -> float:
        """Return how long the new block will last."""
        found = self.cluster.ceph('osd', 'dump')['blocklist']
        new, = set(found) - before
        end = datetime.datetime.fromisoformat(found[new])
        return (end - datetime.datetime.now(datetime.UTC)).total_seconds()

    def test_block_lasts_as_long_as_a_host_may_be_away(self) -> None:
        volume = self.volume()
        self.driver.grant(volume, A, WRITE)
        self.assertEqual('written', self.open(volume).ask('write', 0, 'h'))
        before = self.blocked()
        self.driver.revoke(volume, A)
        self.assertGreater(self.block_s(before), 4 * 365 * 86400)

    def test_lock_that_librbd_breaks_is_blocked_as_long(self) -> None:
        volume = self.volume()
        self.assertEqual('written', self.open(volume).ask('write', 0, 'h'))
        before = self.blocked()
        fence_of = self.driver._parts().fence
        name = f'volume-{volume.id}'
        fence_of._end_locks(
            volume, name, fence_of._clients(self.pool, name))
        self.assertGreater(self.block_s(before), 4 * 365 * 86400)

    def test_short_block_of_somebody_else_is_not_taken_for_ours(self) -> None:
        volume = self.volume()
        self.driver.grant(volume, A, WRITE)
        host = self.open(volume)
        self.assertEqual('written', host.ask('write', 0, 'h'))
        client, = self.driver._parts().fence._clients(
            self.pool, f'volume-{volume.id}')
        self.cluster.run('ceph', 'osd', 'blocklist', 'add', client.address)
        with self.assertRaisesRegex(errors.Busy, 'blocklist rm'):
            self.driver.revoke(volume, A)
        self.cluster.run('ceph', 'osd', 'blocklist', 'rm', client.address)
        before = self.blocked()
        self.driver.revoke(volume, A)
        self.assertGreater(self.block_s(before), 4 * 365 * 86400)
        self.assertEqual(BLOCKED, host.ask('write', 0, 'x'))

    def test_session_that_only_reads_is_ended_too(self) -> None:
        volume = self.volume()
        self.driver.grant(volume, A, WRITE)
        host = self.open(volume)
        host.ask('read', 8192)
        self.driver.revoke(volume, A)
        self.assertEqual(BLOCKED, host.ask('read', 8192))

    def test_other_volumes_of_the_host_go_on(self) -> None:
        volume, other = self.volume(), self.volume()
        for each in volume, other:
            self.driver.grant(each, A, WRITE)
        ended, kept = self.open(volume), self.open(other)
        for host in ended, kept:
            host.ask('write', 0, 'h')
        self.driver.revoke(volume, A)
        self.assertEqual(BLOCKED, ended.ask('read', 0))
        self.assertEqual('h', kept.ask('read', 0))
        self.assertEqual('written', kept.ask('write', 0, 'k'))

    def test_host_that_has_closed_is_not_blocked(self) -> None:
        volume = self.volume()
        self.driver.grant(volume, A, WRITE)
        host = self.open(volume)
        host.ask('write', 0, 'h')
        host.end()
        before = self.blocked()
        self.driver.revoke(volume, A)
        self.assertEqual(before, self.blocked())
        fill(self.driver, volume, pattern(2, MIB))

    def test_writer_whose_watch_has_ended_is_found_by_its_lock(self) -> None:
        class Blind(Wire):
            def watchers(self, image: Any) -> list[Mapping[str, Any]]:
                return []

        driver = self.make(Blind)
        volume = self.volume()
        driver.grant(volume, A, WRITE)
        host = self.open(volume)
        host.ask('write', 0, 'h')
        driver.revoke(volume, A)
        self.assertEqual(BLOCKED, host.ask('write', 0, 'x'))

    def test_two_hosts_see_what_the_other_writes(self) -> None:
        volume = self.volume()
        for each in A, B:
            self.driver.grant(volume, each, WRITE)
        one, two = self.open(volume), self.open(volume)
        for turn in range(3):
            self.assertEqual('written', one.ask('write', 0, 'abc'[turn]))
            self.assertEqual('abc'[turn], two.ask('read', 0))
            self.assertEqual('written', two.ask('write', 0, 'xyz'[turn]))
            self.assertEqual('xyz'[turn], one.ask('read', 0))

    def test_of_two_hosts_only_the_one_is_ended(self) -> None:
        volume = self.volume()
        for each in A, HERE:
            self.driver.grant(volume, each, WRITE)
        here = self.open(volume)
        here.ask('write', 0, 'h')
        self.driver.revoke(volume, A)
        self.assertEqual('written', here.ask('write', 0, 'i'))
        self.driver.grant(volume, A, WRITE)
        self.driver.revoke(volume, HERE)
        self.assertEqual(BLOCKED, here.ask('write', 0, 'j'))

    def test_client_of_unknown_address_is_not_guessed_at(self) -> None:
        volume = self.volume()
        for each in A, B:
            self.driver.grant(volume, each, WRITE)
        host = self.open(volume)
        with self.assertRaisesRegex(errors.Busy, 'rbd_addresses'):
            self.driver.revoke(volume, A)
        self.assertEqual('written', host.ask('write', 0, 'h'))

    def test_kernel_with_another_volume_is_not_cut_off(self) -> None:
        driver = self.make(KernelWire)
        volume, other = self.volume(), self.volume()
        for each in volume, other:
            driver.grant(each, A, WRITE)
        seen = self.open(volume)
        seen.ask('write', 0, 'k')
        fake = self.seen_twice(driver, volume, other)
        with self.assertRaisesRegex(errors.Busy, str(other.id)):
            fake.revoke(volume, A)
        self.assertEqual('written', seen.ask('write', 0, 'l'))
        # A client of its own (noshare) is ended.
        driver.revoke(volume, A)
        self.assertEqual(BLOCKED, seen.ask('write', 0, 'm'))

    def test_image_that_vanishes_meanwhile_ends_no_revoke(self) -> None:
        other, volume = self.volume(), self.volume()
        driver = self.make(KernelWire)
        driver.grant(volume, A, WRITE)
        host = self.open(volume)
        self.assertEqual('written', host.ask('write', 0, 'h'))
        link = driver._parts().link
        header = link.header(self.pool, f'volume-{other.id}')
        # It is listed still.
        link.do('break', lambda wire: wire.ioctx(
            self.pool).remove_object(f'rbd_header.{header}'))
        driver.revoke(volume, A)
        self.assertEqual(BLOCKED, host.ask('write', 0, 'x'))

    def test_revoke_that_misses_something_has_not_ended(self) -> None:
        class Missing(Wire):
            def block(self, address: str) -> None:
                raise self.rados.ObjectNotFound('somewhere', errno.ENOENT)

        volume = self.volume()
        self.driver.grant(volume, A, WRITE)
        host = self.open(volume)
        self.assertEqual('written', host.ask('write', 0, 'h'))
        with self.assertRaisesRegex(errors.Unknown, 'may have volume'):
            self.make(Missing).revoke(volume, A)
        self.driver.revoke(volume, A)
        self.assertEqual(BLOCKED, host.ask('write', 0, 'x'))

    def seen_twice(
        self, driver: Any, volume: model.Volume, other: model.Volume
    ) -> Any:
        """Return a driver that sees the client of one at the other, too."""
        parts = driver._parts()
        watchers = parts.fence._clients(
            self.pool, f'volume-{volume.id}')

        class Shared(KernelWire):
            def watchers(self, image: Any) -> list[Mapping[str, Any]]:
                if image.get_name() == f'volume-{other.id}':
                    return [{
                        'addr': watchers[0].address, 'id': 0,
                        'cookie': fence.KERNEL_COOKIE + 2,
                    }]
                return super().watchers(image)

        return self.make(Shared)

    def test_session_ends_wherever_the_service_dies(self) -> None:
        for turn, nth in enumerate(self.revoke(None)):
            for kind in ('crash', 'lost')[turn % 2:]:
                fault = faults.Fault(kind, nth, is_late=turn % 3 != 2)
                with self.subTest(fault=fault):
                    self.revoke(fault)

    def revoke(self, fault: faults.Fault | None) -> list[int]:
        """Revoke an open session, once spoilt; return which acts count."""
        node = faults.FaultyNode(self.node.state_dir)
        volume = self.volume()
        self.driver.grant(volume, A, WRITE)
        host = self.open(volume)
        host.ask('write', 0, 'h')
        driver = self.rbd(node, connect=rbd.lasting)
        driver.check()
        node.arm(fault)
        with contextlib.suppress(faults.Crash, errors.VolumeError):
            driver.revoke(volume, A)
        if fault is not None:
            self.assertTrue(node.fired)
            self.driver.revoke(volume, A)
        self.assertEqual(BLOCKED, host.ask('write', 0, 'x'))
        self.driver.delete(volume)
        return [
            nth for nth, act in enumerate(node.trace, 1)
            if not act.startswith('rbd ask') or act == 'rbd ask reach'
        ]

    def test_clients_are_told_by_address(self) -> None:
        one = fence.Client('192.0.2.1:0/1', False)
        two = fence.Client('[2001:db8::2]:0/2', False)
        for addresses, others, wanted in (
            (['192.0.2.1'], [], [one, two]),
            (['192.0.2.1'], [['2001:db8::2']], [one]),
            (['2001:db8::2'], [['192.0.2.1']], [two]),
            (['192.0.2.9'], [['192.0.2.1', '2001:db8::2']], []),
        ):
            self.assertEqual(
                wanted, fence.whose([one, two], addresses, others))
        for addresses, others in (
            (['192.0.2.1'], [['192.0.2.3']]),
            (['192.0.2.1', '2001:db8::2'], [['192.0.2.1']]),
        ):
            with self.assertRaises(errors.Busy):
                fence.whose([one, two], addresses, others)


class GrantTest(Case):

    def test_connection_is_of_the_known_form_and_has_no_key(self) -> None:
        driver = self.make(rbd.lasting, secret_uuid='5e-c')
        volume = self.volume()
        found = driver.grant(volume, A, WRITE)
        port = str(self.cluster.port)
        self.assertEqual('rbd', found.protocol)
        self.assertEqual({
            'name': f'{self.pool}/volume-{volume.id}',
            'hosts': ['127.0.0.1'], 'ports': [port], 'cluster_name': 'ceph',
            'auth_enabled': True, 'auth_username': 'volumes',
            'secret_type': 'ceph', 'secret_uuid': '5e-c',
            'volume_id': volume.id, 'discard': True,
        }, dict(found.fields))
        self.assertEqual({}, dict(found.secrets))
        key = self.cluster.ceph('auth', 'get-key', 'client.volumes')['key']
        self.assertNotIn(key, json.dumps(dict(found.fields)))

    def test_read_only_needs_a_user_that_cannot_write(self) -> None:
        volume = self.volume()
        with self.assertRaisesRegex(errors.Unsupported, 'read_only_user'):
            self.driver.grant(volume, A, READ)
        self.cluster.user(
            'readers', 'mon', 'profile rbd', 'osd', 'profile rbd-read-only')
        driver = self.make(rbd.lasting, read_only_user='readers')
        found = driver.grant(volume, A, READ)
        self.assertEqual('readers', found.fields['auth_username'])
        host = self.open(volume, 'ro', user='readers')
        self.assertNotIn('error', host.ask('read', 8192))
        self.assertIn('error', host.ask('write', 0, 'x'))
        self.assertEqual(
            pattern(1, MIB), workbench.content(self.driver, volume))
        driver.revoke(volume, A)

    def test_volume_that_a_host_has_open_is_in_use(self) -> None:
        volume = self.volume()
        self.driver.grant(volume, A, WRITE)
        self.open(volume).ask('write', 0, 'h')
        for do in (
            lambda: self.driver.delete(volume),
            lambda: self.driver.disown(volume),
            lambda: fill(self.driver, volume, bytes(MIB)),
        ):
            with self.assertRaisesRegex(errors.Busy, 'host a'):
                do()


class ConnectorTest(Case):

    def setUp(self) -> None:
        super().setUp()
        self.connector = RbdConnector(self.node, self.cluster.conf)

    def test_host_says_where_its_clients_come_from(self) -> None:
        said = self.connector.host().properties['rbd_addresses'].split()
        self.assertEqual(said, [fence.plain(each) for each in said])
        # Where there is no Ceph, nobody asks.
        stranger = RbdConnector(self.node, '/nowhere/ceph.conf')
        self.assertEqual({}, dict(stranger.host().properties))

    def test_attached_image_is_what_qemu_opens(self) -> None:
        volume = self.volume()
        connection = self.driver.grant(
            volume, self.connector.host(), WRITE)
        url = self.connector.attach(connection)
        self.assertEqual(url, self.connector.attach(connection))
        self.assertIn('json:', url)
        done = subprocess.run(
            ['qemu-img', 'convert', '-O', 'raw', url,
             f'{self.node.state_dir}/copy'],
            capture_output=True, text=True, timeout=60)
        self.assertEqual(0, done.returncode, done.stderr)
        with open(f'{self.node.state_dir}/copy', 'rb') as f:
            self.assertEqual(pattern(1, MIB), f.read())
        for _ in range(2):
            self.connector.detach(connection)

    def test_image_that_is_gone_is_not_found(self) -> None:
        volume = self.volume()
        connection = self.driver.grant(volume, A, WRITE)
        self.driver.delete(volume)
        with self.assertRaises(errors.NotFound):
            self.connector.attach(connection)

    def test_image_that_the_host_may_not_open_is_denied(self) -> None:
        volume = self.volume()
        connection = self.driver.grant(volume, A, WRITE)
        self.cluster.user(
            'stranger', 'mon', 'profile rbd', 'osd',
            f'profile rbd pool={self.pool_names[1]}')
        with self.assertRaisesRegex(errors.Denied, 'key of this host'):
            self.connector.attach(dataclasses.replace(
                connection, fields={
                    **connection.fields, 'auth_username': 'stranger',
                }))

    def test_connection_of_another_protocol_is_refused(self) -> None:
        for connection in (
            model.Connection('nbd', {'name': 'a/b'}),
            model.Connection('rbd', {}),
            model.Connection('rbd', {'name': 'no-pool', 'hosts': []}),
        ):
            with self.assertRaises(errors.Invalid):
                self.connector.attach(connection)
