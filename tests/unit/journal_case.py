# SPDX-License-Identifier: Apache-2.0
"""Jobs made of tiny steps, run under a clock that stands still."""

import unittest

from tests import database
from volume import journal
from volume import model
from volume.backends import Backend
from volume.core import Settings
from volume.db import jobs
from volume.db import leases
from volume.db import models
from volume.journal import Flow
from volume.journal import Step
from volume.testing import fixtures

UP = Backend(
    'b', None, None, None, is_up=True,
    pools={'pool': model.Pool('pool', 1, 1, True)},
)


class JournalCase(unittest.TestCase):
    """Steps named by letters; ``done`` is what happened, in order."""

    def setUp(self):
        self.clock = database.Clock()
        self.db = database.make(self, self.clock)
        self.node = fixtures.make_node(self)
        self.settings = Settings(job_retry_s=100.0)
        self.done = []
        self.ended = []
        self.troubles = {}
        self.is_stopping = False
        self.volume = database.volume(status='creating')
        database.add(self.db, self.volume)

    def act(self, name, effect=None):
        """Return a step's function, which notes that it ran, or fails."""

        def act(job):
            self.done.append(name)
            trouble = self.troubles.get(name)
            if callable(trouble):
                trouble = trouble(job)
            if isinstance(trouble, list):
                trouble = trouble.pop(0) if trouble else None
            if trouble is not None:
                raise trouble
            return effect

        return act

    def flow(self, names='abc', undo=True, **effects):
        def failed(job, error):
            self.done.append(f'failed {error.kind} {job.undone}')
            return lambda session: leases.change(
                session, models.Volume, self.volume.id, job.row.id,
                status='error', reason=str(error),
            )

        return Flow('test', tuple(
            Step(
                self.act(name, effects.get(name)),
                self.act(f'undo {name}') if undo else None,
            ) for name in names
        ), failed=failed, ended=lambda job: self.ended.append(job.row.state))

    def says(self, status, **values):
        """Return an effect."""
        return lambda session: leases.change(
            session, models.Volume, self.volume.id, self.row.id,
            status=status, **values,
        )

    def start(self, flow, **values):
        self.flow_of = flow
        row = database.job(volume_id=self.volume.id, **values)
        database.add(self.db, row)
        self.db.write(lambda s: leases.take(
            s, models.Volume, self.volume.id, row.id, {'creating'}
        ))
        self.row = self.fresh(row.id)
        return self.row

    def fresh(self, job_id=None):
        return database.get(self.db, models.Job, job_id or self.row.id)

    def job(self, row=None):
        return journal.Job(
            row=row or self.row, flow=self.flow_of, backend=UP, db=self.db,
            node=self.node, settings=self.settings, notify=None,
            spool_directory='', source_for=None, backend_of=None,
            is_stopping=lambda: self.is_stopping,
        )

    def run_now(self):
        """Run the job as far as it goes; say whether it has ended."""
        return journal.run(self.job())

    def run_later(self, pause_s=None):
        """Let time pass until the job is due; run it; return the pause."""
        due_at = self.fresh().due_at
        waited_s = due_at - self.clock.now
        self.clock.now = due_at
        self.take()
        self.run_now()
        return waited_s

    def take(self, owner='owner'):
        (row,) = self.db.read(
            lambda s: jobs.due(s, ['b'], 'node-1', self.clock.now)
        )
        self.assertTrue(self.db.write(lambda s: jobs.take(
            s, row, owner, 'node-1', self.clock.now, 30.0
        )))
        self.row = self.fresh(row.id)

    def to_the_end(self):
        """Run it until it has ended; return the pauses between."""
        if self.run_now():
            return []
        pauses = []
        while self.fresh().state == 'open':
            pauses.append(round(self.run_later(), 3))
        return pauses

    def status(self):
        return database.get(self.db, models.Volume, self.volume.id).status
