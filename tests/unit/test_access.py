# SPDX-License-Identifier: Apache-2.0
"""While a host can reach a volume, or may yet, it is never available."""

import contextlib
import dataclasses
import unittest

from sqlalchemy import update

from tests.fault import world
from volume import errors
from volume import ids
from volume import model
from volume import periodic
from volume.db import models
from volume.drivers.file import FileDriver
from volume.exports.base import Export
from volume.exports.local import LocalExporter
from volume.testing import fixtures
from volume.verbs import attachments
from volume.verbs import volumes

CONNECTOR = {'host': 'compute-1'}


def too_late(job_id, timeout_s):
    raise errors.Unknown(f'job {job_id} goes on')


class Access(unittest.TestCase):
    """A volume, and a service that exports it on its own machine."""

    wish = volumes.NewVolume(size_bytes=1 << 20)

    def setUp(self):
        directory = fixtures.plain_directory(self)
        self.world = world.World(
            self, f'driver = file\ndirectories = {directory}\n'
            'exporter = local',
        )
        self.core = self.world.core
        self.volume_id = volumes.create(
            self.core, world.CALLER, self.wish
        ).id

    @property
    def exporter(self):
        return self.world.backends['b'].exporter

    def status(self):
        return self.world.live(models.Volume)[self.volume_id].status

    def reachable(self):
        return self.exporter.exported()


class GivenUp(Access):
    """A host asks, and stops waiting before its job has begun."""

    def setUp(self):
        super().setUp()
        attachments.reserve(self.core, world.CALLER, self.volume_id)
        self.give_up(self.volume_id, CONNECTOR)

    def give_up(self, volume_id, connector):
        hasty = dataclasses.replace(
            self.core, hint=lambda *known: None, wait=too_late
        )
        with self.assertRaises(errors.Unknown):
            attachments.connect(hasty, world.CALLER, volume_id, connector)

    def test_unreserved_it_is_not_exported_behind_our_back(self):
        attachments.unreserve(self.core, world.CALLER, self.volume_id)
        self.world.recover()
        self.assertEqual('available', self.status())
        self.assertEqual(set(), self.reachable())
        self.assertEqual([], self.world.disagreements())

    def test_not_unreserved_it_is_attaching_until_the_job_has_ended(self):
        self.assertEqual('attaching', self.status())
        self.world.restart()
        self.assertEqual('attaching', self.status())
        self.assertEqual(1, len(self.reachable()))
        with self.assertRaises(errors.Invalid):
            volumes.extend(
                self.core, world.CALLER, self.volume_id, 2 << 20
            )
        with self.assertRaises(errors.Invalid):
            volumes.delete(self.core, world.CALLER, self.volume_id)

    def test_to_delete_a_reservation_stops_no_other_hosts_attach(self):
        shared = volumes.create(
            self.core, world.CALLER,
            volumes.NewVolume(size_bytes=1 << 20, multiattach=True),
        ).id
        reserved = attachments.create(
            self.core, world.CALLER, shared, ids.new()
        )
        self.give_up(shared, {'host': 'compute-2'})
        with self.assertRaises(errors.Busy):
            attachments.delete(self.core, world.CALLER, reserved.id)
        self.world.recover()
        attachments.delete(self.core, world.CALLER, reserved.id)
        self.assertEqual(['compute-2'], [
            row.host for row in self.world.all(models.Attachment)
            if row.volume_id == shared and row.is_connected
        ])

    def test_who_detaches_waits_for_the_job_that_lets_somebody_in(self):
        self.world.recover()
        attachments.attach(
            self.core, world.CALLER, self.volume_id, ids.new(), '/dev/vdb'
        )
        attachments.disconnect(
            self.core, world.CALLER, self.volume_id, CONNECTOR
        )
        self.give_up(self.volume_id, CONNECTOR)
        attachments.begin_detaching(
            self.core, world.CALLER, self.volume_id
        )
        with self.assertRaises(errors.Busy):
            attachments.detach(self.core, world.CALLER, self.volume_id)
        self.world.recover()
        self.assertEqual(1, len(self.reachable()))
        attachments.detach(self.core, world.CALLER, self.volume_id)
        self.assertEqual('available', self.status())
        self.assertEqual(set(), self.reachable())
        self.assertEqual([], self.world.disagreements())

    def test_detached_by_force_nothing_comes_after_it(self):
        attachments.detach(
            self.core, world.CALLER, self.volume_id, force=True
        )
        self.world.recover()
        self.assertEqual('available', self.status())
        self.assertEqual(set(), self.reachable())


class Strangers(Access):
    def test_an_export_that_the_database_does_not_know_goes_on(self):
        export_id = ids.new()
        device = self.world.driver().map(
            self.world.noun(self.volume_id), model.Access.WRITE
        )
        self.exporter.export(Export(
            export_id, self.volume_id, device, model.Host('h'),
            model.Access.WRITE, 1 << 20,
        ))
        strangers = set()
        for _ in range(2):
            self.assertEqual([], periodic.end_orphan_exports(
                self.core, self.world.backends, strangers
            ))
        self.assertEqual({export_id}, strangers)
        self.assertEqual({export_id}, self.reachable())


class Paths(LocalExporter):
    """Serves what the driver has mapped, and no block nodes."""

    accepts_blocknode = False


class Mapping(FileDriver):
    """Says which paths it was asked to take away."""

    def __init__(self, conf, node):
        super().__init__(conf, node)
        self.unmapped = []

    def unmap(self, volume):
        self.unmapped.append(volume.id)
        super().unmap(volume)


class Mapped(Access):
    """What the driver has mapped is the path of all attachments."""

    wish = volumes.NewVolume(size_bytes=1 << 20, multiattach=True)

    def test_path_is_not_taken_away_before_the_last_host_has_gone(self):
        backend = self.world.backends['b']
        backend.driver = Mapping(backend.conf, backend.node)
        backend.driver.check()
        backend.exporter = Paths(backend.conf, backend.node)
        made = []
        for host in 'one', 'two', 'two':
            made.append(attachments.create(
                self.core, world.CALLER, self.volume_id, ids.new(),
                {'host': host},
            ))
            attachments.complete(self.core, world.CALLER, made[-1].id)
        reserved = attachments.create(
            self.core, world.CALLER, self.volume_id, ids.new()
        )
        for each in made:
            self.assertEqual([], backend.driver.unmapped)
            attachments.delete(self.core, world.CALLER, each.id)
        self.assertEqual([self.volume_id], backend.driver.unmapped)
        attachments.delete(self.core, world.CALLER, reserved.id)


class TwiceOnOneHost(Access):
    """Two virtual machines of one host share a volume."""

    wish = volumes.NewVolume(size_bytes=1 << 20, multiattach=True)

    def attach(self, host):
        made = attachments.create(
            self.core, world.CALLER, self.volume_id, ids.new()
        )
        attachments.update(
            self.core, world.CALLER, made.id, {'host': host}
        )
        attachments.complete(self.core, world.CALLER, made.id)

    def test_each_has_an_attachment_of_its_own(self):
        self.attach('one')
        self.attach('one')
        self.assertEqual(2, len(self.reachable()))

    def test_what_is_restored_for_one_host_another_does_not_stop(self):
        self.attach('one')
        reserved = attachments.create(
            self.core, world.CALLER, self.volume_id, ids.new()
        )
        lost, = self.reachable()
        self.exporter.unexport(lost)
        later = dataclasses.replace(self.core, hint=lambda *known: None)
        self.assertEqual(
            1, periodic.restore_exports(later, self.world.backends)
        )
        attachments.disconnect(
            self.core, world.CALLER, self.volume_id, {'host': 'two'}
        )
        with self.assertRaises(errors.Busy):
            attachments.delete(self.core, world.CALLER, reserved.id)
        self.world.recover()
        self.assertEqual({lost}, self.reachable())

    def test_of_several_none_is_detached_unless_it_is_named(self):
        self.attach('one')
        reserved = attachments.create(
            self.core, world.CALLER, self.volume_id, ids.new()
        )
        attachments.begin_detaching(
            self.core, world.CALLER, self.volume_id
        )
        with self.assertRaisesRegex(errors.Invalid, 'attached 2 times'):
            attachments.detach(self.core, world.CALLER, self.volume_id)
        attachments.detach(
            self.core, world.CALLER, self.volume_id, reserved.id
        )
        self.assertEqual(['one'], [
            row.host for row in self.world.all(models.Attachment)
        ])
        self.assertEqual(1, len(self.reachable()))

    def test_who_cannot_serve_a_host_twice_refuses_before_anything(self):
        pool, = self.world.all(models.Pool)
        features = sorted({*pool.features} - {'export:twice_per_host'})
        self.core.db.write(lambda session: session.execute(
            update(models.Pool).values(features=features)
        ))
        self.attach('one')
        with self.assertRaisesRegex(errors.Unsupported, 'host one twice'):
            self.attach('one')
        self.assertEqual(1, len(self.reachable()))
        self.attach('two')
        self.assertEqual(2, len(self.reachable()))


class Undone(Access):
    """An attach fails, and what it has done cannot be undone."""

    def setUp(self):
        super().setUp()
        exporter = self.exporter
        self.unexport, export = exporter.unexport, exporter.export

        def half(wanted):
            export(wanted)
            raise errors.Invalid('half way')

        def stuck(attachment_id):
            raise errors.Invalid('it cannot end')

        exporter.export, exporter.unexport = half, stuck

    def half_attach(self, begin):
        reserved = begin()
        with self.assertRaises(errors.VolumeError):
            attachments.connect(
                self.core, world.CALLER, self.volume_id, CONNECTOR,
                attachment_id=reserved.id if reserved else None,
            )
        self.assertEqual('error_attaching', self.status())
        with contextlib.suppress(errors.VolumeError):
            attachments.unreserve(self.core, world.CALLER, self.volume_id)
        self.assertEqual('error_attaching', self.status())
        self.assertEqual(1, len(self.reachable()))

    def test_reserved_or_not_it_is_known_and_can_be_detached(self):
        for begin in (
            lambda: None,
            lambda: attachments.reserve(
                self.core, world.CALLER, self.volume_id
            ),
            lambda: attachments.create(
                self.core, world.CALLER, self.volume_id, ids.new()
            ),
        ):
            with self.subTest(begin):
                stuck = self.exporter.unexport
                self.half_attach(begin)
                self.exporter.unexport = self.unexport
                attachments.detach(
                    self.core, world.CALLER, self.volume_id, force=True
                )
                self.exporter.unexport = stuck
                self.assertEqual('available', self.status())
                self.assertEqual(set(), self.reachable())
                self.assertEqual([], self.world.all(models.Attachment))

    def test_nobody_is_let_in_by_a_restart(self):
        self.half_attach(lambda: None)
        for attachment_id in self.reachable():
            self.unexport(attachment_id)
        self.assertEqual(0, periodic.restore_exports(
            self.core, self.world.backends
        ))


class Extending(Access):
    """An extend of an attached volume, of which nobody knows the end."""

    def test_it_can_be_detached_and_is_exported_again(self):
        attachments.connect(
            self.core, world.CALLER, self.volume_id, CONNECTOR
        )
        attachments.attach(
            self.core, world.CALLER, self.volume_id, None, None
        )
        self.core.db.write(lambda session: session.execute(
            update(models.Volume).values(status='error_extending')
        ))
        there = self.reachable()
        for attachment_id in there:
            self.exporter.unexport(attachment_id)
        self.assertEqual(
            1, periodic.restore_exports(self.core, self.world.backends)
        )
        self.world.recover()
        self.assertEqual(there, self.reachable())
        attachments.detach(self.core, world.CALLER, self.volume_id)
        attachments.disconnect(
            self.core, world.CALLER, self.volume_id, CONNECTOR
        )
        self.assertEqual(set(), self.reachable())


class Differently(Access):
    """What is asked for is not what the host has."""

    def test_an_attachment_is_not_told_to_another_host(self):
        made = attachments.create(
            self.core, world.CALLER, self.volume_id, ids.new(), CONNECTOR
        )
        with self.assertRaisesRegex(errors.Conflict, 'another host') as seen:
            attachments.update(
                self.core, world.CALLER, made.id, {'host': 'compute-2'}
            )
        self.assertNotIn('compute-1', str(seen.exception))
        again = attachments.update(
            self.core, world.CALLER, made.id, CONNECTOR
        )
        self.assertEqual(made.connection, again.connection)

    def test_a_host_is_told_that_it_has_the_volume_itself(self):
        made = attachments.create(
            self.core, world.CALLER, self.volume_id, None, CONNECTOR
        )
        for host, said in (
            ('compute-1', 'to this same host, compute-1, by'),
            ('compute-2', 'to another host by'),
        ):
            with self.assertRaisesRegex(
                errors.Invalid, f'{said} attachment {made.id}'
            ):
                attachments.create(
                    self.core, world.CALLER, self.volume_id, None,
                    {'host': host},
                )

    def test_a_volume_that_is_reserved_is_not_said_to_be_attached(self):
        made = attachments.create(
            self.core, world.CALLER, self.volume_id, None
        )
        with self.assertRaisesRegex(
            errors.Invalid, f'is reserved by attachment {made.id}'
        ):
            attachments.create(
                self.core, world.CALLER, self.volume_id, None, CONNECTOR
            )

    def test_a_second_host_is_not_told_who_the_first_one_is(self):
        attachments.connect(
            self.core, world.CALLER, self.volume_id, CONNECTOR
        )
        with self.assertRaisesRegex(
            errors.Invalid, 'is attached to another host'
        ) as seen:
            attachments.connect(
                self.core, world.CALLER, self.volume_id, {'host': 'other'}
            )
        self.assertNotIn('compute-1', str(seen.exception))

    def test_who_may_write_is_not_told_that_it_may_only_read(self):
        attachments.connect(
            self.core, world.CALLER, self.volume_id, CONNECTOR
        )
        with self.assertRaisesRegex(errors.Conflict, 'for writing'):
            attachments.connect(
                self.core, world.CALLER, self.volume_id, CONNECTOR,
                mode='ro',
            )

    def test_a_volume_is_made_read_only_before_it_is_attached(self):
        attachments.connect(
            self.core, world.CALLER, self.volume_id, CONNECTOR
        )
        with self.assertRaisesRegex(errors.Invalid, 'status is attaching'):
            self.make_read_only()
        volumes.update(
            self.core, world.CALLER, self.volume_id, readonly=False
        )
        attachments.disconnect(
            self.core, world.CALLER, self.volume_id, CONNECTOR
        )
        self.assertTrue(self.make_read_only().readonly)
        info = attachments.connect(
            self.core, world.CALLER, self.volume_id, CONNECTOR
        )
        self.assertEqual('ro', info['data']['access_mode'])

    def make_read_only(self):
        return volumes.update(
            self.core, world.CALLER, self.volume_id, readonly=True
        )
