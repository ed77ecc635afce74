# SPDX-License-Identifier: Apache-2.0
"""Two hundred ask at once where a hundred and fifty fit."""

import threading
import unittest

from sqlalchemy import func
from sqlalchemy import select

from tests.integration import serving
from tests.integration.agreement import disagreements
from volume.db import models

ASKED, FIT = 200, 150


class Burst(unittest.TestCase):
    def setUp(self):
        directory = serving.fixtures.plain_directory(self, 'small')
        self.world = serving.World(
            self, names='small',
            sections=(
                f'[small]\ndriver = file\ndirectories = {directory}\n'
                f'exporter = local\ncapacity_gib = {FIT / 1024}\n'
            ),
            settings='sweep_interval_s = 0.5\n',
        )
        self.service = self.world.service
        self.db = self.service.db

    def at_once(self, asks):
        """Send all requests together; return their answers."""
        start = threading.Barrier(len(asks))
        answers = [None] * len(asks)

        def ask(number):
            start.wait()
            answers[number] = self.world.ask(*asks[number])

        threads = [
            threading.Thread(target=ask, args=[number])
            for number in range(len(asks))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return answers

    def settle(self):
        def open_jobs():
            return self.db.read(lambda s: s.scalar(
                select(func.count()).where(models.Job.state == 'open')
            ))

        serving.until(open_jobs, lambda count: not count)

    def claimed(self):
        return self.db.read(lambda s: (
            s.scalar(select(func.sum(models.Pool.claimed_bytes))),
            s.scalar(select(func.sum(models.Device.claimed_bytes))),
        ))

    def test_exactly_as_many_as_fit_succeed_and_the_rest_are_told_why(self):
        answers = self.at_once([
            ('POST', '/v3/volumes', {'volume': {'size_bytes': 1 << 20}})
        ] * ASKED)
        taken = [each for each in answers if each.status == 202]
        refused = [each for each in answers if each.status != 202]
        self.assertEqual((FIT, ASKED - FIT), (len(taken), len(refused)))
        for each in refused:
            self.assertEqual(413, each.status)
            self.assertIn('no pool fits: 1 without room for it', each.message)
        names = [each.json['volume']['id'] for each in taken]
        self.assertEqual(FIT, len(set(names)))
        self.settle()
        rows = self.db.read(lambda s: list(s.scalars(select(models.Volume))))
        self.assertEqual(set(names), {row.id for row in rows})
        self.assertEqual({'available'}, {row.status for row in rows})
        claimed = sum(row.claimed_bytes for row in rows)
        self.assertEqual((claimed, claimed), self.claimed())
        self.assertEqual([], disagreements(self.service))
        gone = self.at_once([
            ('DELETE', f'/v3/volumes/{name}') for name in names
        ])
        self.assertEqual({202}, {each.status for each in gone})
        self.settle()
        self.assertEqual((0, 0), self.claimed())
        self.assertEqual([], disagreements(self.service))
