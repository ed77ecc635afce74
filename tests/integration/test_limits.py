# SPDX-License-Identifier: Apache-2.0
"""How fast a volume may be used: asked for, kept, told to hosts."""

import unittest

from tests.integration import serving
from volume import model

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
