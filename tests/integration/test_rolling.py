# SPDX-License-Identifier: Apache-2.0
"""Two releases on one database, while an operator goes from one to the next.

The newer release is a copy of this tree with one migration more, and a
column of its own.
"""

import os
import shutil
import unittest

import volume
from tests import database
from tests.process import ServiceProcess
from volume.db import migrate
from volume.testing import fixtures

IS_PROOF = os.environ.get('VOLUME_PROOF') == '1'
MIB = 1 << 20
COLUMN = '''
    colour: Mapped[str] = mapped_column(
        String(16), default='red', server_default='none'
    )
'''
MIGRATION = '''
import sqlalchemy as sa
from alembic import op

revision = '9001'
down_revision = '{newest}'
ONLY_ADDS = {only_adds}


def upgrade() -> None:
    op.add_column('volumes', sa.Column(
        'colour', sa.String(16), nullable=False, server_default='none'
    ))


def downgrade() -> None:
    op.drop_column('volumes', 'colour')
'''


def newer_release(test, only_adds):
    """Return the directory of a release with one migration more."""
    root = fixtures.state_dir(test)
    copy = os.path.join(root, 'volume')
    shutil.copytree(
        os.path.dirname(volume.__file__), copy,
        ignore=shutil.ignore_patterns('__pycache__'),
    )
    path = os.path.join(copy, 'db', 'alembic', 'versions', '9001_colour.py')
    with open(path, 'w') as f:
        f.write(MIGRATION.format(
            newest=migrate.newest(), only_adds=only_adds
        ))
    path = os.path.join(copy, 'db', 'models.py')
    with open(path) as f:
        text = f.read()
    before = "    __tablename__ = 'volumes'\n"
    assert before in text
    with open(path, 'w') as f:
        f.write(text.replace(before, before + COLUMN))
    return root


class Rolling(unittest.TestCase):
    database_kind = 'postgresql'

    def setUp(self):
        self.url = database.url(self)

    def release(self, host, backend, path=''):
        """Return a service of one release, which is not started yet."""
        return ServiceProcess(
            self, f'[{backend}]\ndriver = file\nexporter = local\n'
            'directories = {root}/pool\n',
            backends=backend, path=path,
            extra=f'database = {self.url}\nhost = {host}\n',
        )

    def works(self, service, backend):
        """Make a volume there, let it grow, and return its id."""
        made = service.create(**{
            'size_bytes': MIB,
            'OS-SCH-HNT:scheduler_hints': {'backend': backend},
        })
        service.wait(made, 'available')
        service.action(made, 'os-extend', {'new_size_bytes': 2 * MIB})
        service.wait(made, 'available')
        return made

    def colours(self, service):
        return dict(service.sql(
            'SELECT id, colour FROM volumes WHERE deleted_at IS NULL'
        ))

    def test_managers_are_upgraded_one_after_another(self):
        old = self.release('one', 'b')
        new = self.release('two', 'c', newer_release(self, only_adds=True))
        old.start()
        first = self.works(old, 'b')
        before = new.manage('db', 'version')
        self.assertIn(f'database {migrate.newest()}', before.stdout)
        self.assertIn('release 9001', before.stdout)
        # The old service works on; nothing is stopped for it.
        done = new.manage('db', 'upgrade')
        self.assertEqual((0, ''), (done.returncode, done.stderr))
        second = self.works(old, 'b')
        new.start()
        third = self.works(new, 'c')
        self.assertEqual(
            {first: 'none', second: 'none', third: 'red'},
            self.colours(new),
        )
        # Each reads what the other has written, and each may end it.
        for service in old, new:
            self.assertEqual({first, second, third}, set(service.volumes()))
        new.call('DELETE', f'/volumes/{first}')
        old.wait(first, 'gone')
        old.stop()
        old.start()  # an accident: it may come back until the next release
        self.works(old, 'b')
        self.assertIn('9001', old.manage('db', 'version').stdout)

    @unittest.skipUnless(IS_PROOF, 'VOLUME_PROOF=1 is not set')
    def test_what_breaks_an_older_release_waits_for_its_end(self):
        old = self.release('one', 'b')
        new = self.release('two', 'c', newer_release(self, only_adds=False))
        old.start()
        first = self.works(old, 'b')
        refused = new.manage('db', 'upgrade')
        self.assertEqual(1, refused.returncode)
        self.assertIn('one still uses this database', refused.stderr)
        self.works(old, 'b')  # nothing has changed
        old.stop()
        done = new.manage('db', 'upgrade')
        self.assertEqual((0, ''), (done.returncode, done.stderr))
        new.start()
        self.assertEqual('none', self.colours(new)[first])
        with self.assertRaisesRegex(AssertionError, 'did not start'):
            old.start()
        self.assertRegex(
            old.tail(), '9001.*does not know.*newer.*needs a release'
        )
        new.stop()
        # And back again, which loses the column and nothing else.
        done = new.manage('db', 'downgrade', '--to', migrate.newest())
        self.assertEqual((0, ''), (done.returncode, done.stderr))
        old.start()
        self.assertIn(first, old.volumes())


@unittest.skipUnless(IS_PROOF, 'VOLUME_PROOF=1 is not set')
class RollingOnMariadb(Rolling):
    database_kind = 'mariadb'
