# SPDX-License-Identifier: Apache-2.0
"""What a host proves itself with: told to it alone, and sealed at rest."""

import dataclasses
import unittest

import sqlalchemy

from tests.fault import world
from volume import errors
from volume import periodic
from volume import vault
from volume.db import models
from volume.exports.local import LocalExporter
from volume.testing import faults
from volume.testing import fixtures
from volume.verbs import attachments
from volume.verbs import credentials
from volume.verbs import volumes

CONNECTOR = {'host': 'compute-1'}


class Doors(LocalExporter):
    """Paths with a password on the door, which only a test would have."""

    wants = ('password',)

    def __init__(self, conf, node):
        super().__init__(conf, node)
        self.doors = {}

    def export(self, wanted):
        made = super().export(wanted)
        password = wanted.credentials.get('password')
        self.node.act('lock', lambda: self.doors.__setitem__(
            wanted.attachment_id, password
        ))
        return dataclasses.replace(made, credentials={
            'auth_method': 'CHAP', 'auth_password': password,
        } if password else {})


class Credentials(unittest.TestCase):
    def setUp(self):
        directory = fixtures.plain_directory(self)
        self.world = world.World(
            self, f'driver = file\ndirectories = {directory}\n'
            'exporter = local',
        )
        self.key = self.world.state + '/secrets.key'
        vault.make_key(self.key)
        self.fit()
        self.volume_id = volumes.create(
            self.core, world.CALLER, volumes.NewVolume(size_bytes=1 << 20)
        ).id

    def fit(self):
        """Give the world a door with a password, and the key for it."""
        settings = dataclasses.replace(
            self.world.settings, secrets_key_file=self.key
        )
        self.world.settings = settings
        self.core = self.world.core = dataclasses.replace(
            self.world.core, settings=settings
        )
        backend = self.world.backends['b']
        self.exporter = Doors(backend.conf, self.world.node)
        backend.exporter = self.exporter

    def connect(self):
        info = attachments.connect(
            self.core, world.CALLER, self.volume_id, CONNECTOR
        )
        return info['data']

    def row(self):
        return self.world.all(models.Attachment)[0]

    def stored(self):
        """Return everything that stands in the database, as text."""
        with self.world.db.engine.connect() as connection:
            return '\n'.join(
                repr(connection.execute(
                    sqlalchemy.text(f'SELECT * FROM {name}')
                ).all())
                for name in models.Base.metadata.tables
            )

    def test_who_connects_is_told_what_the_exporter_was_given(self):
        told = self.connect()
        self.assertEqual(
            {told['attachment_id']: told['auth_password']},
            self.exporter.doors,
        )
        self.assertEqual('CHAP', told['auth_method'])

    def test_asked_again_it_is_the_same_answer(self):
        self.assertEqual(self.connect(), self.connect())

    def test_nothing_of_it_stands_plainly_in_the_database(self):
        told = self.connect()
        self.assertNotIn(told['auth_password'], self.stored())
        self.assertEqual(
            told['auth_password'],
            credentials.of(self.core, self.row())['auth_password'],
        )

    def test_each_attachment_has_its_own_and_forgets_it(self):
        first = self.connect()['auth_password']
        attachments.disconnect(
            self.core, world.CALLER, self.volume_id, CONNECTOR
        )
        self.assertEqual([], [
            row for row in self.world.all(models.Attachment)
            if row.credentials
        ])
        self.assertNotEqual(first, self.connect()['auth_password'])

    def test_restored_it_is_what_the_host_knows_already(self):
        told = self.connect()
        attachments.attach(
            self.core, world.CALLER, self.volume_id, None, None,
            host_name=CONNECTOR['host'],
        )
        self.exporter.doors.clear()
        self.exporter.unexport(told['attachment_id'])
        periodic.restore_exports(self.core, self.world.backends)
        self.world.recover()
        self.assertEqual(
            {told['attachment_id']: told['auth_password']},
            self.exporter.doors,
        )

    def test_made_before_any_were_wanted_it_is_restored_without(self):
        self.exporter.wants = ()
        told = self.connect()
        attachments.attach(
            self.core, world.CALLER, self.volume_id, None, None,
            host_name=CONNECTOR['host'],
        )
        self.exporter.doors.clear()
        self.exporter.unexport(told['attachment_id'])
        del self.exporter.wants
        periodic.restore_exports(self.core, self.world.backends)
        self.world.recover()
        self.assertEqual({told['attachment_id']: None}, self.exporter.doors)

    def test_a_repeated_step_leaves_the_host_what_the_door_has(self):
        for fault in faults.every(2):
            with self.subTest(fault):
                self.world.node.arm(fault)
                try:
                    told = self.connect()
                except (faults.Crash, errors.VolumeError):
                    self.world.boot(None)
                    self.fit()
                    self.world.recover()
                    told = self.connect()
                self.assertEqual(
                    told['auth_password'],
                    self.exporter.doors.get(
                        told['attachment_id'], told['auth_password']
                    ),
                )
                self.world.node.arm(None)
                attachments.disconnect(
                    self.core, world.CALLER, self.volume_id, CONNECTOR
                )

    def test_without_the_key_nothing_is_exported(self):
        with open(self.key, 'w') as f:
            f.write('')
        with self.assertRaisesRegex(errors.VolumeError, 'Fernet'):
            self.connect()
        self.assertEqual(set(), self.exporter.exported())
        self.assertEqual({}, self.exporter.doors)
