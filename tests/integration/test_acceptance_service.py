# SPDX-License-Identifier: Apache-2.0
"""nova-volume's cases about services, backends and configuration.

Some of them named a storage that is not here (a SAN, a storage repository
of XenAPI): what they want of a service holds for every driver, and is shown
with those that there are.
"""

import logging
import os
import threading
import unittest

from tests.fault.world import CALLER
from tests.integration import hostile_case
from tests.integration import serving
from tests.integration.acceptance_case import AcceptanceCase
from tests.integration.acceptance_case import HOST
from tests.integration.acceptance_case import MIB
from volume import conf as options
from volume import errors
from volume import ids
from volume import model
from volume.db import models
from volume.drivers.file import FileDriver
from volume.drivers.qcow import QcowDriver
from volume.node import Node
from volume.testing import faults
from volume.testing import fixtures

AT_ONCE = 8


class Services(AcceptanceCase):
    """One service, looked at from inside."""

    def at_once(self, *verbs):
        """Run all at the same moment; return what they answered."""
        start = threading.Barrier(len(verbs))
        answers = [None] * len(verbs)

        def run(number, verb):
            start.wait()
            try:
                answers[number] = verb()
            except errors.VolumeError as refused:
                answers[number] = refused

        threads = [
            threading.Thread(target=run, args=each)
            for each in enumerate(verbs)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return answers

    def test_case_09_what_is_over_the_limit_leaves_nothing_behind(self):
        before = hostile_case.kept(self.world.core)
        with self.assertRaisesRegex(errors.NoSpace, 'without room'):
            self.api.create_volume(CALLER, ids.new(), size=5, confirm=True)
        self.assertEqual(before, hostile_case.kept(self.world.core))
        self.assertEqual(set(), self.world.stored())

    def test_case_14_another_hosts_volume_is_left_to_that_host(self):
        volume_id = self.make()
        core = self.world.core
        object.__setattr__(core, 'runs', lambda backend: backend != 'b')
        self.addCleanup(
            object.__setattr__, core, 'runs', lambda backend: True)
        self.api.delete_volume(CALLER, volume_id, confirm=False)
        (job,) = [
            row for row in self.world.all(models.Job) if row.state == 'open'
        ]
        self.assertIsNone(job.owner)
        self.assertEqual({volume_id}, self.world.stored())
        self.assertEqual('deleting', self.status(volume_id))

    def test_case_19_two_deletes_at_once_delete_once(self):
        volume_id = self.make()
        real, seen = self.driver.delete, []

        def delete(volume):
            seen.append(volume.id)
            real(volume)

        self.driver.delete = delete
        self.at_once(*[lambda: self.delete(volume_id)] * AT_ONCE)
        self.world.recover()
        self.gone(volume_id)
        self.assertEqual([volume_id], seen)

    def test_case_49_exports_at_once_are_different_targets(self):
        volumes = [self.make() for _ in range(AT_ONCE)]
        infos = self.at_once(*[
            lambda v=volume_id: self.attach(v) for volume_id in volumes
        ])
        self.assertEqual([], [
            info for info in infos if not isinstance(info, dict)])
        uris = {info['data']['uri'] for info in infos}
        self.assertEqual(AT_ONCE, len(uris))
        self.assertEqual(AT_ONCE, len(self.exported()))

    def test_case_52_what_a_driver_does_goes_by_a_node_that_can_be_swapped(
        self,
    ):
        class Still(Node):
            """A machine on which no command is ever run."""

            def act(self, what, effect):
                seen.append(what)
                if what.startswith('run '):
                    raise errors.Unavailable('no command is run here')
                return effect()

        seen = []
        driver = QcowDriver(
            self.world.backends['b'].conf, Still(self.world.state))
        with self.assertRaisesRegex(errors.Unavailable, 'no command'):
            driver.create(model.Volume(ids.new(), 'pool', MIB))
        self.assertIn('run qemu-img create', seen)
        self.assertEqual(set(), self.world.stored())

    def test_case_59_what_was_stored_and_not_recorded_is_found_again(self):
        volume_id = ids.new()
        self.world.node.arm(faults.Fault('crash', 1, True, 'run qemu-img'))
        with self.assertRaises(faults.Crash):
            self.api.create_volume(CALLER, volume_id, size_bytes=MIB)
        self.world.restart()
        self.boot()
        self.assertEqual('available', self.status(volume_id))
        self.assertEqual({volume_id}, self.world.stored())
        self.assertEqual([], self.world.disagreements())
        self.delete(volume_id)
        self.assertEqual(set(), self.world.stored())

    def test_case_60_what_somebody_has_open_is_busy_and_kept(self):
        volume_id = self.make()
        self.attach(volume_id, HOST)
        with self.assertRaises(errors.Busy):
            self.driver.delete(self.world.noun(volume_id))
        self.assertEqual({volume_id}, self.world.stored())

    def test_case_63_what_lies_in_a_pool_is_never_formatted(self):
        volume_id = self.make()
        self.world.write(volume_id, 0, b'data')
        directory = self.world.backends['b'].conf.directories[0]
        before = hostile_case.files(directory)
        # Another service, which knows nothing of what is there.
        other = QcowDriver(
            self.world.backends['b'].conf, fixtures.make_node(self))
        other.check()
        self.assertEqual(
            [volume_id], [found.id for found in other.scan('pool')])
        self.assertEqual(before, hostile_case.files(directory))
        self.assertEqual(
            b'data', self.world.content(self.world.noun(volume_id))[:4])


class Backends(unittest.TestCase):
    """A service with several backends, asked through REST."""

    def world(self, section, names='first, fast'):
        directory = fixtures.plain_directory(self, 'first')
        return serving.World(
            self, names=names, sections='[first]\ndriver = file\n'
            f'exporter = local\ncost = -1\n{section}'.format(
                directory=directory),
        )

    def wish(self, world, **wish):
        return world.ask('POST', '/v3/volumes', {'volume': {
            'size_bytes': 4 * MIB, **wish}})

    def backend_of(self, world, asked):
        self.assertEqual(202, asked.status, asked.text)
        row = world.settled(asked.json['volume']['id'])
        self.assertEqual('available', row['status'], row['reason'])
        return row['backend']

    def test_case_56_the_next_backend_is_used_if_the_first_is_full(self):
        world = self.world('directories = {directory}\ncapacity_gib = 0.005')
        self.assertEqual(
            ['first', 'fast'],
            [self.backend_of(world, self.wish(world)) for _ in range(2)],
        )
        before = hostile_case.kept(world.core)
        asked = self.wish(world, size_bytes=1 << 40)
        self.assertEqual(413, asked.status)
        self.assertEqual(before, hostile_case.kept(world.core))

    def test_case_56_the_next_backend_is_used_if_the_first_is_down(self):
        world = self.world('directories = {directory}/none')
        self.assertEqual('fast', self.backend_of(world, self.wish(world)))

    def test_case_57_a_type_of_volume_is_made_on_its_backends_alone(self):
        world = self.world('directories = {directory}\ncapacity_gib = 0.005')
        first = {'volume_type': 'first'}
        self.assertEqual(
            'first', self.backend_of(world, self.wish(world, **first)))
        # Another has room; it is no other's volume.
        self.assertEqual(413, self.wish(world, **first).status)

    def test_case_61_a_backend_out_of_reach_is_down_and_the_others_serve(
        self,
    ):
        world = self.world('directories = {directory}/none')
        found = {
            row['name']: row for row in
            world.ask('GET', '/v3/os-volume-backends').json['backends']
        }
        self.assertEqual(
            ('down', 'up'), (found['first']['state'], found['fast']['state']))
        self.assertIn('/none', found['first']['reason'])
        self.assertEqual('available', world.make()['status'])


class Configuration(unittest.TestCase):
    """What stands in a file, and what is told of it."""

    def test_case_62_values_keep_their_signs_and_secrets_are_masked(self):
        path = os.path.join(fixtures.state_dir(self), 'volume.conf')
        with open(path, 'w') as f:
            f.write(
                '[DEFAULT]\nenabled_backends = b\nimage_url_template = '
                'https://x/{id}?a=b c\ndatabase = mysql://u:pass=phrase@db/v\n'
            )
        conf = options.load([], [path])
        self.assertEqual('https://x/{id}?a=b c', conf.image_url_template)
        self.assertEqual('mysql://u:pass=phrase@db/v', conf.database)
        with self.assertLogs('told', 'DEBUG') as told:
            conf.log_opt_values(logging.getLogger('told'), logging.DEBUG)
        self.assertIn('a=b c', '\n'.join(told.output))
        self.assertNotIn('phrase', '\n'.join(told.output))

    def test_case_67_a_file_backend_says_what_its_directories_lack(self):
        node = fixtures.make_node(self)
        pool = fixtures.directory(self)
        for directories, words in (
            ([], 'directories is empty'), ([f'{pool}/none'], f'{pool}/none'),
            (['relative'], 'relative'), (['/dev/null'], '/dev/null'),
        ):
            with self.subTest(directories):
                driver = FileDriver(fixtures.settings(
                    FileDriver, directories=directories), node)
                with self.assertRaisesRegex(errors.VolumeError, words):
                    driver.check()
        driver = FileDriver(
            fixtures.settings(FileDriver, directories=[pool]), node)
        driver.check()
        # What is gone already can be deleted.
        driver.delete(model.Volume(ids.new(), 'pool', MIB))
