# SPDX-License-Identifier: Apache-2.0
"""The schema goes up and down, and the data survive both."""

import itertools
import json
import os
import threading
import unittest

import sqlalchemy
from alembic import autogenerate
from alembic.runtime import migration

from tests import database
from volume import errors
from volume.db import migrate
from volume.db import models
from volume.db import schema
from volume.db.engine import Database

# What migrations write themselves.
OWN = {'alembic_version', 'compatibility'}


def versions():
    """Return every version from the oldest on."""
    found = [each.revision for each in migrate._scripts().walk_revisions()]
    return found[::-1]


@database.on_all
class Migrations(unittest.TestCase):
    def setUp(self):
        self.db = Database(database.url(self))
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
                if table.name not in OWN
            }

        return self.db.read(look)

    def fill(self):
        """Put two rows with awkward values into every table there is now."""
        meta = sqlalchemy.MetaData()
        meta.reflect(self.db.engine)

        def put(session):
            for table in meta.sorted_tables:
                if table.name in OWN:
                    continue
                session.execute(table.delete())
                for number in 1, 2:
                    session.execute(table.insert().values({
                        column.name: bound(column, number)
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
            if table.__tablename__ in OWN:
                continue
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
        self.assertEqual([], self.differences())

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

    def test_a_start_fills_an_empty_database_and_accepts_its_own_version(
        self,
    ):
        self.assertEqual(schema.REVISION, migrate.newest())
        for _ in range(2):
            schema.ensure(self.db)
            self.assertEqual(schema.REVISION, migrate.current(self.db))

    def test_a_newer_version_is_refused(self):
        migrate.upgrade(self.db)
        self.say(version='9999', oldest='9999')
        with self.assertRaisesRegex(errors.Invalid, '9999.*is newer'):
            migrate.require(self.db)
        with self.assertRaises(errors.Invalid):
            schema.ensure(self.db)

    def test_tables_of_somebody_else_are_left_alone(self):
        self.db.write(lambda s: s.execute(sqlalchemy.text(
            'CREATE TABLE volumes (x int)'
        )))
        with self.assertRaisesRegex(errors.Invalid, 'volumes.*of its own'):
            migrate.upgrade(self.db)
        self.assertEqual({'volumes'}, self.tables())
        self.assertIsNone(migrate.current(self.db))

    def test_a_migration_that_dies_halfway_is_finished_by_the_next(self):
        migrate.upgrade(self.db)
        migrate.downgrade(self.db, 'base')
        count = len(self.statements_of(None))
        migrate.downgrade(self.db, 'base')
        if os.environ.get('VOLUME_PROOF') == '1':
            points = list(range(2, count))
        elif self.db.kind == 'mariadb':
            points = [count // 3, count - 1]
        else:  # all of it is one transaction
            points = [count - 1]
        for last in points:
            with self.subTest(died_before_statement=last):
                with self.assertRaises(Died):
                    self.statements_of(last)
                migrate.upgrade(self.db)
                self.assertEqual([], self.differences())
                with self.assertRaises(Died):
                    self.statements_of(last // 2 + 1, down=True)
                migrate.downgrade(self.db, 'base')
                self.assertLessEqual(self.tables(), {'alembic_version'})

    def statements_of(self, last, down=False):
        """Migrate, and die before the statement of that number."""
        seen = []

        def note(connection, cursor, statement, *rest):
            if connection.engine.url != self.db.engine.url:
                return  # of a service that another test has left running
            seen.append(statement)
            if len(seen) == last:
                raise Died

        listen = sqlalchemy.Engine, 'before_cursor_execute', note
        sqlalchemy.event.listen(*listen)
        try:
            if down:
                migrate.downgrade(self.db, 'base')
            else:
                migrate.upgrade(self.db)
        finally:
            sqlalchemy.event.remove(*listen)
        return seen

    def test_two_that_migrate_at_once_do_it_once(self):
        failed = []

        def work():
            try:
                migrate.upgrade(self.db)
            except BaseException as error:  # told to the test's thread
                failed.append(error)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual([], failed)
        self.assertEqual([], self.differences())

    def test_texts_compare_exactly(self):
        """No case is folded, no trailing space dropped, on any column."""
        migrate.upgrade(self.db)
        pairs = (
            ('name', 'Disk', 'disk'), ('name', 'disk', 'disk '),
            ('name', 'ss', 'ß'), ('name', 'e\u0301', 'é'),
            ('project_id', 'P', 'p'), ('pool', '😀', '😁'),
            ('meta', {'k': 'V'}, {'k': 'v'}), ('meta', {'K': 'v'}, {}),
        )
        for column, one, other in pairs:
            with self.subTest(column=column, one=one, other=other):
                row = database.volume(**{column: one})
                wanted = row.id
                database.add(
                    self.db, row, database.volume(**{column: other})
                )
                field = getattr(models.Volume, column)
                if column == 'meta':
                    (key, value), = one.items()
                    field, one = field[key].as_string(), value
                found = self.db.read(lambda s, is_it=field == one: list(
                    s.scalars(sqlalchemy.select(models.Volume.id).where(
                        is_it
                    ))
                ))
                self.assertEqual([wanted], found)
                database.empty(self.db)

    def test_code_of_an_older_version_may_work_on_what_was_only_added_to(self):
        migrate.upgrade(self.db)
        newer = migrate.newest()
        self.say(version='9999', oldest=newer)
        migrate.require(self.db)
        self.say(version='9999', oldest='9998')
        with self.assertRaisesRegex(errors.Invalid, '9999.*knows 9998'):
            migrate.require(self.db)

    def say(self, version, oldest):
        """Have the schema say what a newer release's migration writes."""
        self.db.write(lambda s: [
            s.execute(sqlalchemy.text(statement)) for statement in (
                f"UPDATE alembic_version SET version_num = '{version}'",
                f"UPDATE compatibility SET oldest = '{oldest}'",
            )
        ])

    def differences(self):
        """Return how the schema differs from the models."""
        with self.db.engine.connect() as connection:
            context = migration.MigrationContext.configure(
                connection, opts={'compare_type': True}
            )
            return autogenerate.compare_metadata(
                context, models.Base.metadata
            )


class Died(Exception):
    """What a crash is to a migration: its connection ends."""


def bound(column, number):
    """Return a sample as the database is given it."""
    value = sample(column, number)
    if isinstance(value, dict) and not isinstance(
        column.type, sqlalchemy.JSON
    ):
        return json.dumps(value)
    return value


def sample(column, number):
    """Return a value of a column's type that is easily spoilt."""
    # MariaDB has texts and small numbers for JSON and truth.
    known = models.Base.metadata.tables.get(column.table.name)
    kind = (
        column if known is None or column.name not in known.c
        else known.c[column.name]
    ).type
    if isinstance(kind, sqlalchemy.JSON):
        return {'ключ': ['a', number, None]}
    if isinstance(kind, sqlalchemy.Boolean):
        return bool(number % 2)
    if isinstance(kind, sqlalchemy.BigInteger):
        return (1 << 61) + number
    if isinstance(kind, sqlalchemy.Integer):
        return (1 << 30) + number
    if isinstance(kind, sqlalchemy.Float):
        return 1700000000.123456 + number
    return f'ж"\'%{number}'[:getattr(kind, 'length', None) or 20]
