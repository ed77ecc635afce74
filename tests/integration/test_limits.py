# SPDX-License-Identifier: Apache-2.0
"""How fast a volume may be used: asked for, kept, told to hosts."""

import dataclasses
import unittest

from tests.fault import world
from tests.integration import serving
from volume import errors
from volume import ids
from volume import model
from volume import periodic
from volume.db import jobs
from volume.db import models
from volume.drivers import base
from volume.drivers.file import FileDriver
from volume.testing import faults
from volume.testing import fixtures
from volume.verbs import limits
from volume.verbs import volumes

HOST = {'host': 'h1'}


class Limits(unittest.TestCase):
    def setUp(self):
        self.world = serving.World(self)
        self.volume = self.world.make(size=None, size_bytes=model.MIB)
        self.path = f'/v3/volumes/{self.volume["id"]}'

    def act(self, **action):
        return self.world.ask('POST', f'{self.path}/action', {
            name.replace('__', '-'): info for name, info in action.items()
        })

    def limits(self):
        """Return the limits, once no job is open."""
        serving.until(
            lambda: self.world.ask(
                'GET', '/v3/os-volume-jobs?state=open'
            ).json['jobs'],
            lambda jobs: jobs == [],
        )
        return self.world.ask('GET', self.path).json['volume']['limits']

    def connect(self):
        made = self.act(os__initialize_connection={'connector': HOST})
        return made.json['connection_info']['data']

    def test_a_volume_has_no_limits_until_it_is_given_some(self):
        self.assertEqual({'iops': None, 'bytes_per_s': None}, self.limits())
        self.assertNotIn('qos_specs', self.connect())

    def test_limits_are_kept_and_what_is_left_out_is_lifted(self):
        for asked in {'iops': 500, 'bytes_per_s': 1 << 20}, {'iops': 7}, {}:
            self.assertEqual(202, self.act(os__limit=asked).status)
            self.assertEqual(
                {'iops': None, 'bytes_per_s': None, **asked}, self.limits()
            )

    def test_a_host_that_connects_is_told_in_its_compute_service_s_words(self):
        self.act(os__limit={'iops': 500, 'bytes_per_s': 1 << 20})
        self.limits()
        self.assertEqual(
            {'total_iops_sec': 500, 'total_bytes_sec': 1 << 20},
            self.connect()['qos_specs'],
        )

    def test_an_attached_volume_stays_attached(self):
        self.connect()
        self.act(os__attach={'host_name': 'h1', 'mountpoint': '/dev/vdb'})
        self.assertEqual(202, self.act(os__limit={'iops': 5}).status)
        self.assertEqual(5, self.limits()['iops'])
        shown = self.world.ask('GET', self.path).json['volume']
        self.assertEqual('in-use', shown['status'])

    def test_nonsense_is_refused(self):
        for asked in (
            {'iops': 0}, {'iops': -1}, {'iops': 'many'},
            {'bytes_per_s': 1 << 60}, {'bytes_per_s': 1.5},
            {'iops': True},
        ):
            self.assertEqual(400, self.act(os__limit=asked).status, asked)
        self.assertEqual({'iops': None, 'bytes_per_s': None}, self.limits())


class Bounding(FileDriver, base.Limits):
    """Storage that keeps limits itself, and may be told to fail."""

    trouble = ()
    """What its calls meet; the last of it is met by all that follow."""

    def limit(self, volume, limits):
        if self.trouble:
            met, *rest = self.trouble
            self.trouble = rest or self.trouble
            raise met


class Failed(unittest.TestCase):
    """Limits that storage was to keep to, and did not confirm."""

    def setUp(self):
        directory = fixtures.plain_directory(self)
        self.world = world.World(
            self, f'driver = file\ndirectories = {directory}\n'
            'exporter = local',
        )
        self.world.settings = dataclasses.replace(
            self.world.settings, job_retry_s=5.0
        )
        self.core = dataclasses.replace(
            self.world.core, settings=self.world.settings
        )
        backend = self.world.backends['b']
        self.driver = backend.driver = Bounding(
            backend.driver.conf, self.world.node
        )
        periodic.refresh(
            self.core, self.world.backends.values(), world.HOST
        )
        self.volume_id = volumes.create(
            self.core, world.CALLER, volumes.NewVolume(size_bytes=1 << 20)
        ).id

    def limit(self, *trouble, **asked):
        """Ask for limits; return the volume when the job has ended."""
        self.driver.trouble = trouble
        limits.limit(
            self.core, world.CALLER, self.volume_id, model.IoLimits(**asked)
        )
        self.world.recover()
        return self.row()

    def row(self):
        return self.world.live(models.Volume)[self.volume_id]

    def test_storage_that_refused_is_quoted_and_the_former_limits_hold(self):
        self.limit(iops=500)
        for trouble in errors.Invalid('too few'), errors.Unavailable('gone'):
            row = self.limit(trouble, iops=7)
            self.assertEqual(
                'its new limits (iops 7, bytes_per_s unlimited) were not '
                f'set: {trouble}', row.reason,
            )
            self.assertEqual(500, row.iops_limit)
            self.assertEqual('available', row.status)

    def test_of_storage_that_did_not_answer_nobody_says_what_it_keeps_to(
        self
    ):
        row = self.limit(errors.Unknown('hung up'), bytes_per_s=1 << 20)
        self.assert_open(row, 'iops unlimited, bytes_per_s 1048576', 'hung up')
        self.assertEqual('available', row.status)

    def test_what_was_refused_later_may_have_been_set_by_an_earlier_call(
        self
    ):
        for later in errors.Unavailable('gone'), errors.Denied('not you'):
            row = self.limit(
                errors.Unavailable('not yet'), errors.Unknown('hung up'),
                later, iops=7,
            )
            self.assert_open(row, 'iops 7, bytes_per_s unlimited', str(later))

    def test_a_process_that_died_in_a_call_may_have_set_them(self):
        with self.assertRaises(faults.Crash):
            self.limit(
                faults.Crash('limit'), errors.Unavailable('gone'), iops=7
            )
        self.world.db.write(
            lambda s: jobs.void_earlier(s, ids.new(), world.HOST)
        )
        self.world.recover()
        self.assert_open(
            self.row(), 'iops 7, bytes_per_s unlimited', 'gone'
        )

    def test_limits_that_were_set_after_all_leave_no_reason(self):
        self.limit(errors.Unknown('hung up'), iops=7)
        row = self.limit(iops=7)
        self.assertEqual(('', 7), (row.reason, row.iops_limit))

    def assert_open(self, row, asked, why):
        """Nobody knows whether they were set, and the reason says so."""
        self.assertEqual(
            'its storage may or may not keep to its new limits '
            f'({asked}): set them again: {why}', row.reason,
        )
