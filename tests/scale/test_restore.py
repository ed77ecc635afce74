# SPDX-License-Identifier: Apache-2.0
"""A storage daemon that has forgotten everything: all at once, and in turn."""

import json
import os
import shutil
import tempfile
import unittest

from sqlalchemy import select
from sqlalchemy import update

from tests import database
from tests.integration import serving
from tests.integration.blockd_case import BlockdCase
from tests.scale import scale_case
from tools import fill
from volume import blockgraph
from volume import conf as options
from volume import errors
from volume import ids
from volume import service
from volume.db import models

COUNT = 100


class ExportMany(BlockdCase):
    """Many exports in one exchange with the daemon."""

    def wanted(self, *names, writable=True):
        return [
            (ids.new(), self.plain(name), writable) for name in names
        ]

    def commands(self):
        return [
            what for what in self.node.seen if what.startswith('qmp ')
        ]

    def test_a_hundred_are_exported_in_one_exchange(self):
        names = [f'volume-{number}' for number in range(COUNT)]
        for name in names:
            self.raw(name, name.encode())
        wanted = self.wanted(*names)
        self.blockd.bring_up()
        self.node.seen.clear()
        found = self.blockd.export_many(wanted)
        self.assertEqual(['qmp connect', 'qmp batch'], self.commands())
        self.assertEqual({each[0] for each in wanted}, set(found))
        for (export_id, _, _), name in zip(wanted, names, strict=True):
            if name.endswith('7'):
                self.assertEqual(
                    name.encode(), self.read(found[export_id])[:len(name)]
                )
        self.assertEqual(set(found), self.blockd.export_ids())

    def test_one_that_is_wrong_stops_no_other(self):
        for name in 'a', 'b', 'd':
            self.raw(name, name.encode())
        wanted = [
            *self.wanted('a', 'b'), *self.wanted('absent'),
            *self.wanted('d'),
        ]
        found = self.blockd.export_many(wanted)
        self.assertIsInstance(found[wanted[2][0]], errors.NotFound)
        for index, name in (0, b'a'), (1, b'b'), (3, b'd'):
            self.assertEqual(name, self.read(found[wanted[index][0]])[:1])

    def test_repeated_it_is_the_same_and_says_what_differs(self):
        self.raw('a', b'a')
        self.raw('b', b'b')
        wanted = self.wanted('a', 'b')
        first = self.blockd.export_many(wanted)
        self.assertEqual(first, self.blockd.export_many(wanted))
        (export_id, _, _), _ = wanted
        other = self.blockd.export_many([(export_id, self.plain('b'), True)])
        self.assertIsInstance(other[export_id], errors.Conflict)
        self.assertEqual(b'a', self.read(first[export_id])[:1])

    def test_clones_share_the_layers_below_them(self):
        self.qcow2('base')
        tops = [f'top-{number}' for number in range(8)]
        for name in tops:
            self.qcow2(name, 'base')
        found = self.blockd.export_many([
            (ids.new(), self.chain(name, 'base'), True) for name in tops
        ])
        self.assertFalse([
            uri for uri in found.values() if not isinstance(uri, str)
        ])
        self.assertEqual(
            {self.path(name) for name in (*tops, 'base')},
            set(self.blockd.open_files()),
        )
        for export_id in found:
            self.blockd.unexport(export_id)
        self.assertEqual(frozenset(), self.blockd.open_files())

    def test_a_lost_answer_leaves_nothing_in_doubt_when_asked_again(self):
        self.raw('a', b'a')
        wanted = self.wanted('a')
        self.blockd.bring_up()
        self.node.what = 'qmp batch'
        with self.assertRaises(errors.Unknown):
            self.blockd.export_many(wanted)
        found = self.blockd.export_many(wanted)
        self.assertEqual(b'a', self.read(found[wanted[0][0]])[:1])


class Asked(BlockdCase):
    """What is asked for each volume does not grow with their number."""

    def test_an_open_file_is_known_without_asking_for_all_nodes(self):
        self.raw('a')
        uri = self.blockd.export(ids.new(), self.plain('a'), True)
        self.assertTrue(uri)
        self.node.seen.clear()
        self.assertTrue(self.blockd.is_open(self.path('a')))
        self.assertNotIn('qmp query-named-block-nodes', self.node.seen)
        self.raw('b')
        self.assertFalse(self.blockd.is_open(self.path('b')))

    def test_what_lies_alone_is_closed_without_asking_for_the_graph(self):
        self.raw('a')
        export_id = ids.new()
        self.blockd.export(export_id, self.plain('a'), True)
        self.node.seen.clear()
        self.blockd.unexport(export_id)
        self.assertNotIn('qmp x-debug-query-block-graph', self.node.seen)
        self.assertEqual(frozenset(), self.blockd.open_files())

    def test_an_overlay_and_what_is_below_are_closed_together(self):
        self.qcow2('a')
        export_id = ids.new()
        self.blockd.export(export_id, self.chain('a'), True)
        self.qcow2('over', 'a')
        self.blockd.snapshot(self.path('a'), self.path('over'))
        self.blockd.unexport(export_id)
        self.assertEqual(frozenset(), self.blockd.open_files())

    def test_the_top_is_known_by_its_name(self):
        self.qcow2('base')
        self.qcow2('a', 'base')
        chain, below = self.chain('a', 'base'), self.chain('base')
        self.assertFalse(self.blockd.is_top(chain))
        self.blockd.export(ids.new(), chain, True)
        self.assertTrue(self.blockd.is_top(chain))
        self.assertFalse(self.blockd.is_top(below))
        self.qcow2('over', 'a')
        self.blockd.snapshot(self.path('a'), self.path('over'))
        self.assertTrue(self.blockd.is_top(self.chain('over', 'a', 'base')))
        self.assertFalse(self.blockd.is_top(chain))

    def test_a_node_is_opened_in_few_bytes(self):
        """QEMU reads its monitors byte by byte, 4 µs each."""
        layer = blockgraph.parse(self.chain('a'))
        # But for the name of its file, and what QEMU would do anyway.
        text = json.dumps(layer.qapi(True)).replace(layer.filename, '')
        self.assertLess(len(text), 280)


class Restored(unittest.TestCase):
    """What hosts had before the machine was booted, they have again."""

    ATTACHED = 150

    def setUp(self):
        # A socket's path must be short.
        self.root = tempfile.mkdtemp(prefix='vt', dir='/tmp')
        self.addCleanup(shutil.rmtree, self.root, ignore_errors=True)
        path = fill.configure(self.root, 4, 'file', 'nbd', scale_case.QUIET)
        fill.fill(path, fill.Size(
            volumes=self.ATTACHED, snapshots=0, attachments=self.ATTACHED,
            pools=4, history=0,
        ))
        self.service = service.Service(options.load([], [path]))
        self.service.check_wait_s = 60.0  # the next look comes too late
        self.db = self.service.db
        self.addCleanup(self.service.node.blockd.stop)

    def all(self, query):
        return self.db.read(lambda s: s.execute(query).all())

    def restored(self, count):
        """Start the service, and wait until so many are exported."""
        self.service.start()
        self.addCleanup(self.service.stop)
        serving.until(
            lambda: len(self.service.node.blockd.export_ids()),
            lambda there: there == count,
        )
        serving.until(self.service.runner.busy, lambda busy: not busy)

    def test_all_are_restored_by_few_jobs(self):
        self.restored(self.ATTACHED)
        jobs = self.all(select(models.Job.state, models.Job.exclusive).where(
            models.Job.kind == 'restore'
        ))
        self.assertEqual({'done'}, {state for state, _ in jobs})
        self.assertEqual(self.ATTACHED, sum(len(each) for _, each in jobs))
        # One for 64 volumes of a backend; there are four backends.
        self.assertLessEqual(len(jobs), self.ATTACHED // 64 + 4)
        for attachment_id, connection in self.all(select(
            models.Attachment.id, models.Attachment.connection
        )):
            data = connection['data']
            self.assertEqual(attachment_id, data['export'])
            self.assertEqual(attachment_id, data['attachment_id'])

    def test_a_volume_whose_file_is_gone_says_so_and_stops_no_other(self):
        ((volume_id, backend, pool),) = self.all(select(
            models.Volume.id, models.Volume.backend, models.Volume.pool
        ).limit(1))
        os.unlink(os.path.join(self.root, 'pools', pool, f'{volume_id}.raw'))
        self.restored(self.ATTACHED - 1)
        reasons = dict(self.all(
            select(models.Volume.id, models.Volume.reason)
            .where(models.Volume.reason != '')
        ))
        self.assertEqual({volume_id}, set(reasons))
        self.assertIn('could not be restored', reasons[volume_id])
        self.assertIn(backend, self.service.runner.backends)

    def test_what_another_job_works_on_is_left_to_the_next_time(self):
        ((volume_id,),) = self.all(select(models.Volume.id).limit(1))
        held = database.job(
            volume_id=volume_id, owner='other', owner_host='large',
            expires_at=9e9, due_at=9e9,
        )
        self.service.core.db.write(lambda session: (
            session.add(held),
            session.execute(
                update(models.Volume).where(models.Volume.id == volume_id)
                .values(lease_job=held.id)
            ),
        ))
        self.restored(self.ATTACHED - 1)
        held_now = self.all(select(models.Volume.lease_job).where(
            models.Volume.id == volume_id
        ))
        self.assertEqual([(held.id,)], held_now)


if __name__ == '__main__':
    unittest.main()
