# SPDX-License-Identifier: Apache-2.0
"""The schema goes up and down, and the data survive both."""

import itertools
import os
import unittest

import sqlalchemy
from alembic import autogenerate
from alembic.runtime import migration

from tests import database
from volume import errors
from volume.db import migrate
from volume.db import models
from volume.db.engine import Database
from volume.testing import fixtures


def versions():
    """Return every version from the oldest on."""
    found = [each.revision for each in migrate._scripts().walk_revisions()]
    return found[::-1]


class Migrations(unittest.TestCase):
    def setUp(self):
        path = os.path.join(fixtures.state_dir(self), 'volume.sqlite')
        self.db = Database(f'sqlite:///{path}')
        self.addCleanup(self.db.close)

    def tables(self):
        return set(sqlalchemy.inspect(self.db.engine).get_table_names())

    def dump(self):
        """Return every row of every table, as the database has it."""
        meta = sqlalchemy.MetaData()
        meta.reflect(self.db.engine)

        def look(session):
            return {
                table.name: sorted(
                    map(repr, session.execute(sqlalchemy.select(table)))
                ) for table in meta.sorted_tables
                if table.name != 'alembic_version'
            }

        return self.db.read(look)

    def fill(self):
        """Put two rows with awkward values into every table there is now."""
        meta = sqlalchemy.MetaData()
        meta.reflect(self.db.engine)

        def put(session):
            for table in meta.sorted_tables:
                if table.name == 'alembic_version':
                    continue
                for number in 1, 2:
                    session.execute(table.insert().values({
                        column.name: sample(column, number)
                        for column in table.columns
                    }))

        self.db.write(put)

    def test_each_step_up_and_down_keeps_the_data(self):
        known = ['base', *versions()]
        for lower, upper in itertools.pairwise(known):
            with self.subTest(upper):
                migrate.upgrade(self.db, upper)
                if lower == 'base':
                    continue
                migrate.downgrade(self.db, lower)
                self.fill()
                before = self.dump()
                migrate.upgrade(self.db, upper)
                migrate.downgrade(self.db, lower)
                self.assertEqual(before, self.dump())
                migrate.upgrade(self.db, upper)
        self.assertEqual(migrate.newest(), migrate.current(self.db))

    def test_data_of_the_newest_version_can_be_read_by_the_models(self):
        migrate.upgrade(self.db)
        self.fill()
        for table in models.Base.__subclasses__():
            with self.subTest(table.__name__):
                self.assertEqual(2, len(self.db.read(
                    lambda s, table=table: s.query(table).all()
                )))

    def test_awkward_values_come_back_as_they_were(self):
        migrate.upgrade(self.db)
        row = database.volume(
            name='ü' * 255, meta={'k': '\u2028"\\'}, size_bytes=(1 << 62) + 1,
            created_at=1700000000.123456, reason='x' * 100_000,
        )
        values = {
            column.name: getattr(row, column.name)
            for column in models.Volume.__table__.columns
        }
        database.add(self.db, row)
        found = database.get(self.db, models.Volume, values['id'])
        for name in 'name', 'meta', 'size_bytes', 'created_at', 'reason':
            self.assertEqual(values[name], getattr(found, name))

    def test_the_newest_version_is_what_the_models_say(self):
        migrate.upgrade(self.db)
        with self.db.engine.connect() as connection:
            context = migration.MigrationContext.configure(
                connection, opts={'compare_type': True}
            )
            self.assertEqual([], autogenerate.compare_metadata(
                context, models.Base.metadata
            ))

    def test_down_to_the_base_nothing_is_left(self):
        migrate.upgrade(self.db)
        self.fill()
        migrate.downgrade(self.db, 'base')
        self.assertLessEqual(self.tables(), {'alembic_version'})
        self.assertIsNone(migrate.current(self.db))

    def test_an_empty_database_has_no_version(self):
        self.assertIsNone(migrate.current(self.db))
        with self.assertRaisesRegex(errors.Invalid, 'db upgrade'):
            migrate.require(self.db)

    def test_the_newest_version_is_what_this_release_wants(self):
        migrate.upgrade(self.db)
        migrate.require(self.db)
        migrate.upgrade(self.db)  # again is nothing
        migrate.require(self.db)

    def test_a_newer_version_is_refused(self):
        migrate.upgrade(self.db)
        self.db.write(lambda s: s.execute(sqlalchemy.text(
            "UPDATE alembic_version SET version_num = '9999'"
        )))
        with self.assertRaisesRegex(errors.Invalid, '9999.*is newer'):
            migrate.require(self.db)

    def test_a_migration_that_fails_halfway_has_done_nothing(self):
        self.db.write(lambda s: s.execute(sqlalchemy.text(
            'CREATE TABLE volumes (x int)'
        )))
        with self.assertRaises(errors.Unavailable):
            migrate.upgrade(self.db)
        self.assertEqual({'volumes'}, self.tables())
        self.assertIsNone(migrate.current(self.db))


def sample(column, number):
    """Return a value of a column's type that is easily spoilt."""
    kind = column.type
    if isinstance(kind, sqlalchemy.JSON):
        return {'ключ': ['a', number, None]}
    if isinstance(kind, sqlalchemy.Boolean):
        return bool(number % 2)
    if isinstance(kind, sqlalchemy.Integer):
        return (1 << 61) + number
    if isinstance(kind, sqlalchemy.Float):
        return 1700000000.123456 + number
    return f'ж"\'%{number}'[:getattr(kind, 'length', None) or 20]
