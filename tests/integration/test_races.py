# SPDX-License-Identifier: Apache-2.0
"""Everybody wants the same volume at once; each verb happens once or not.

The real service, a qcow backend, sixteen threads. Which of them is first is
not ours to say; that rows, storage, claims and exports agree afterwards is.
"""

import collections
import dataclasses
import random
import threading
import unittest

from sqlalchemy import func
from sqlalchemy import select
from sqlalchemy import update

from tests.integration import serving
from tests.integration.agreement import disagreements
from volume import errors
from volume import ids
from volume.context import Caller
from volume.db import models
from volume.verbs import attachments
from volume.verbs import jobs
from volume.verbs import lookup
from volume.verbs import snapshots
from volume.verbs import tombstones
from volume.verbs import volumes

CALLER = Caller(project_id='default', user_id='u')
MIB = 1 << 20
THREADS = 16


class RaceCase(unittest.TestCase):
    def setUp(self):
        directory = serving.fixtures.plain_directory(self, 'layers')
        self.world = serving.World(
            self, names='q',
            sections=(
                f'[q]\ndriver = qcow\ndirectories = {directory}\n'
                'exporter = nbd\n'
            ),
            settings='sweep_interval_s = 0.2\nlease_wait_s = 20\n',
        )
        self.service = self.world.service
        self.addCleanup(self.service.node.blockd.stop)
        self.core = self.world.core
        self.heard = collections.Counter()
        self.service.runner.notify = lambda event, payload: (
            self.heard.update([event])
        )

    def make(self, **wish):
        made = volumes.create(self.core, CALLER, volumes.NewVolume(
            **{'size_bytes': MIB, **wish}
        ))
        self.settle()
        return made.id

    def settle(self):
        def open_jobs():
            return self.service.db.read(lambda s: s.scalar(
                select(func.count()).where(models.Job.state == 'open')
            ))

        serving.until(open_jobs, lambda count: not count)
        # Who is to hear of an end hears it after that is durable.
        serving.until(self.service.runner.busy, lambda count: not count)

    def race(self, *verbs):
        """Run all verbs at once; return what each gave, or its error."""
        start = threading.Barrier(len(verbs))
        results = [None] * len(verbs)

        def run(number):
            start.wait()
            try:
                results[number] = verbs[number]()
            except errors.VolumeError as refused:
                results[number] = refused

        threads = [
            threading.Thread(target=run, args=[number])
            for number in range(len(verbs))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.settle()
        return results

    def refusals(self, results):
        return [each for each in results if isinstance(each, Exception)]

    def agrees(self):
        self.assertEqual([], disagreements(self.service))

    def row(self, volume_id):
        return self.service.db.read(
            lambda s: s.get(models.Volume, volume_id)
        )

    def count(self, kind, **values):
        found = self.service.db.read(lambda s: list(s.scalars(
            select(models.Job).filter_by(kind=kind, **values)
        )))
        return len(found)


class Races(RaceCase):
    def test_one_id_asked_for_by_many_is_one_volume(self):
        volume_id = ids.new()
        results = self.race(*[lambda: volumes.create(
            self.core, CALLER,
            volumes.NewVolume(id=volume_id, size_bytes=MIB, name='x'),
        )] * THREADS)
        self.assertEqual([], self.refusals(results))
        self.assertEqual({volume_id}, {each.id for each in results})
        self.assertEqual(1, self.count('create'))
        self.agrees()

    def test_one_id_asked_for_in_two_ways_is_one_of_them(self):
        volume_id = ids.new()
        results = self.race(*[
            lambda name=name: volumes.create(
                self.core, CALLER,
                volumes.NewVolume(id=volume_id, size_bytes=MIB, name=name),
            ) for name in 'ab' * (THREADS // 2)
        ])
        refused = self.refusals(results)
        self.assertEqual({errors.Conflict}, {type(each) for each in refused})
        self.assertEqual(THREADS // 2, len(refused))
        self.agrees()

    def test_many_deletes_delete_once(self):
        volume_id = self.make()
        results = self.race(*[lambda: volumes.delete(
            self.core, CALLER, volume_id
        )] * THREADS)
        self.assertEqual(THREADS - 1, len(self.refusals(results)))
        self.assertEqual(1, self.count('delete'))
        self.assertEqual(1, self.heard['volume.delete.end'])
        self.agrees()

    def test_many_casts_to_delete_delete_once_and_none_fails(self):
        volume_id = self.make()
        results = self.race(*[lambda: tombstones.delete_volume(
            self.core, CALLER, volume_id
        )] * THREADS)
        self.assertEqual([], self.refusals(results))
        self.assertEqual(1, self.count('delete'))
        self.agrees()

    def test_of_many_reservations_one_succeeds(self):
        volume_id = self.make()
        results = self.race(*[lambda: attachments.reserve(
            self.core, CALLER, volume_id
        )] * THREADS)
        self.assertEqual(THREADS - 1, len(self.refusals(results)))
        self.assertEqual('attaching', self.row(volume_id).status)

    def test_of_many_hosts_one_gets_the_volume(self):
        volume_id = self.make()
        results = self.race(*[
            lambda number=number: attachments.create(
                self.core, CALLER, volume_id, ids.new(),
                {'host': f'compute-{number}'},
            ) for number in range(THREADS)
        ])
        self.assertEqual(THREADS - 1, len(self.refusals(results)))
        exported = self.service.runner.backends['q'].exporter.exported()
        self.assertEqual(1, len(exported))
        self.agrees()

    def test_one_host_that_asks_many_times_gets_one_answer(self):
        volume_id = self.make()
        attachments.reserve(self.core, CALLER, volume_id)
        results = self.race(*[lambda: attachments.connect(
            self.core, CALLER, volume_id, {'host': 'compute-1'}
        )] * THREADS)
        self.assertEqual([], self.refusals(results))
        self.assertEqual(1, len({str(each) for each in results}), results)
        self.assertEqual(1, self.count('attach'))
        self.race(*[lambda: attachments.disconnect(
            self.core, CALLER, volume_id, {'host': 'compute-1'}
        )] * THREADS)
        self.assertEqual('available', self.row(volume_id).status)
        self.agrees()

    def test_delete_against_attach_leaves_no_host_without_its_volume(self):
        for number in range(6):
            with self.subTest(number=number):
                self.delete_against_attach(self.make())

    def delete_against_attach(self, volume_id):
        self.race(
            lambda: volumes.delete(self.core, CALLER, volume_id),
            lambda: attachments.create(
                self.core, CALLER, volume_id, ids.new(), {'host': 'c'}
            ),
        )
        left = self.service.db.read(lambda s: list(s.scalars(
            select(models.Attachment).where(
                models.Attachment.volume_id == volume_id
            )
        )))
        row = self.row(volume_id)
        self.assertEqual(row.deleted_at is None, bool(left), row.status)
        self.agrees()

    def test_boot_from_a_volume_keeps_others_off_it(self):
        """A host that connects without reserving has it all the same."""
        volume_id = self.make()
        attachments.connect(
            self.core, CALLER, volume_id, {'host': 'compute-1'}
        )
        self.assertEqual('attaching', self.row(volume_id).status)
        for verb in (
            lambda: volumes.extend(self.core, CALLER, volume_id, 2 * MIB),
            lambda: volumes.delete(self.core, CALLER, volume_id),
            lambda: volumes.create(self.core, CALLER, volumes.NewVolume(
                source_volume_id=volume_id
            )),
        ):
            with self.assertRaises(errors.Invalid):
                verb()
        attachments.unreserve(self.core, CALLER, volume_id)
        self.assertEqual('attaching', self.row(volume_id).status)
        attachments.disconnect(
            self.core, CALLER, volume_id, {'host': 'compute-1'}
        )
        self.assertEqual('available', self.row(volume_id).status)

    def test_everything_at_once_on_one_volume(self):
        for seed in range(5):
            with self.subTest(seed=seed):
                self.everything(random.Random(seed))

    def everything(self, chance):
        volume_id = self.make()
        host = {'host': 'compute-1'}
        kinds = {
            'delete': lambda: volumes.delete(self.core, CALLER, volume_id),
            'cascade': lambda: volumes.delete(
                self.core, CALLER, volume_id, cascade=True
            ),
            'snapshot': lambda: snapshots.create(
                self.core, CALLER,
                snapshots.NewSnapshot(volume_id, force=True),
            ),
            'clone': lambda: volumes.create(
                self.core, CALLER,
                volumes.NewVolume(source_volume_id=volume_id),
            ),
            'extend': lambda: volumes.extend(
                self.core, CALLER, volume_id, 2 * MIB
            ),
            'attach': lambda: attachments.create(
                self.core, CALLER, volume_id, ids.new(), host
            ),
            'connect': lambda: attachments.connect(
                self.core, CALLER, volume_id, host
            ),
            'disconnect': lambda: attachments.disconnect(
                self.core, CALLER, volume_id, host
            ),
            'force-detach': lambda: attachments.detach(
                self.core, CALLER, volume_id, force=True
            ),
            'reset': lambda: volumes.update(
                self.core, CALLER, volume_id, name='x'
            ),
        }
        names = chance.choices(sorted(kinds), k=THREADS)
        results = self.race(*[kinds[name] for name in names])
        for each in self.refusals(results):
            self.assertIsInstance(
                each, errors.Invalid | errors.NotFound | errors.Busy,
                f'{names}: {each}',
            )
        self.agrees()
        for row in self.service.db.read(lambda s: list(s.scalars(
            select(models.Attachment)
        ))):
            attachments.delete(self.core, CALLER, row.id)
        left = lookup.volumes(self.core, CALLER, lookup.Page()).rows
        for each in left:
            volumes.delete(
                self.core, CALLER, each.row.id, cascade=True, force=True
            )
        self.settle()
        self.agrees()
        self.assertEqual(
            [], lookup.volumes(self.core, CALLER, lookup.Page()).rows
        )

    def test_to_cancel_or_retry_a_job_only_wakes_the_sweep(self):
        """Whoever runs it goes on; what was read is no right to run it."""
        hinted = []
        core = dataclasses.replace(
            self.core, hint=lambda row, *known: hinted.append(row)
        )
        volumes.create(core, CALLER, volumes.NewVolume(size_bytes=MIB))
        (born,) = hinted
        self.assertEqual(self.core.owner, born.owner)
        jobs.retry(core, CALLER, born.id)
        jobs.cancel(core, CALLER, born.id)
        self.assertEqual([None, None], [row.owner for row in hinted[1:]])
        self.core.hint(born)
        self.settle()
        self.agrees()

    def test_cancelling_a_job_that_ends_just_then_runs_it_no_second_time(self):
        """A hint of what was read a moment ago must not start it again."""
        made = []
        for _ in range(20):
            new = volumes.create(
                self.core, CALLER, volumes.NewVolume(size_bytes=MIB)
            )
            job_id = self.row(new.id).lease_job
            results = self.race(*[lambda job_id=job_id: jobs.cancel(
                self.core, CALLER, job_id
            )] * 4, lambda new=new: tombstones.delete_volume(
                self.core, CALLER, new.id
            ))
            made.append((new.id, results))
        self.settle()
        for volume_id, _ in made:
            row = self.row(volume_id)
            if row.deleted_at is None:
                volumes.delete(self.core, CALLER, volume_id)
        self.settle()
        self.agrees()


class Tombstones(RaceCase):
    """What is deleted before it was made is never made."""

    def test_a_create_that_comes_after_its_delete_makes_nothing(self):
        volume_id = ids.new()
        tombstones.delete_volume(self.core, CALLER, volume_id)
        made = volumes.create(self.core, CALLER, volumes.NewVolume(
            id=volume_id, size_bytes=MIB
        ))
        self.settle()
        self.assertIsNotNone(made.deleted_at)
        self.assertEqual(0, self.count('create'))
        self.agrees()

    def test_a_create_and_its_delete_at_once_leave_nothing_behind(self):
        for _ in range(8):
            volume_id = ids.new()
            self.race(
                lambda volume_id=volume_id: volumes.create(
                    self.core, CALLER,
                    volumes.NewVolume(id=volume_id, size_bytes=MIB),
                ),
                lambda volume_id=volume_id: tombstones.delete_volume(
                    self.core, CALLER, volume_id
                ),
            )
            row = self.row(volume_id)
            if row.deleted_at is None:  # refused: it was being made
                self.assertEqual('available', row.status)
        self.agrees()

    def test_an_id_in_capitals_is_the_same_id(self):
        volume_id = ids.new()
        tombstones.delete_volume(self.core, CALLER, volume_id.upper())
        made = volumes.create(self.core, CALLER, volumes.NewVolume(
            id=volume_id, size_bytes=MIB
        ))
        self.assertIsNotNone(made.deleted_at)

    def test_a_tombstone_tells_another_project_nothing(self):
        secret = self.make(name='secret')
        volumes.delete(self.core, CALLER, secret)
        self.settle()
        other = Caller(project_id='other', user_id='o')
        with self.assertRaises(errors.Conflict) as caught:
            volumes.create(self.core, other, volumes.NewVolume(
                id=secret, size_bytes=MIB
            ))
        self.assertNotIn('secret', str(caught.exception).split(secret)[-1])

    def test_a_snapshot_deleted_before_it_was_made_is_never_made(self):
        volume_id, snapshot_id = self.make(), ids.new()
        tombstones.delete_snapshot(self.core, CALLER, snapshot_id.upper())
        made = snapshots.create(self.core, CALLER, snapshots.NewSnapshot(
            volume_id, id=snapshot_id
        ))
        self.assertIsNotNone(made.deleted_at)
        self.agrees()


class AcceptedAndLost(RaceCase):
    """The acceptor commits, and dies before it has told anybody."""

    def test_its_job_is_found_when_its_lease_has_run_out(self):
        dead = dataclasses.replace(
            self.core, hint=lambda *job: None, owner=ids.new(),
        )
        made = volumes.create(
            dead, CALLER, volumes.NewVolume(size_bytes=MIB)
        )
        self.assertEqual('creating', self.row(made.id).status)
        self.service.db.write(lambda s: s.execute(
            update(models.Job).values(expires_at=0.0)
        ))
        self.settle()
        self.assertEqual('available', self.row(made.id).status)
        self.agrees()
