# SPDX-License-Identifier: Apache-2.0
"""Secrets at rest: sealed, for one row, by a key that is no part of it."""

import os
import stat
import tempfile
import threading
import unittest

from cryptography.fernet import Fernet

from volume import errors
from volume import vault

ROW = '11111111-1111-4111-8111-111111111111'
OTHER = '22222222-2222-4222-8222-222222222222'


class VaultTest(unittest.TestCase):
    def setUp(self):
        self.root = self.enterContext(tempfile.TemporaryDirectory())
        self.path = os.path.join(self.root, 'secrets.key')
        vault.make_key(self.path)
        self.vault = vault.Vault(self.path)

    def test_what_was_sealed_opens_again(self):
        sealed = self.vault.seal(ROW, {'password': 'grüße"\\'})
        self.assertEqual(
            {'password': 'grüße"\\'}, self.vault.open(ROW, sealed)
        )

    def test_nothing_of_a_secret_can_be_seen_in_what_is_stored(self):
        secret = vault.new_secret()
        self.assertNotIn(secret, self.vault.seal(ROW, {'password': secret}))

    def test_it_opens_for_no_other_row(self):
        sealed = self.vault.seal(ROW, {'password': 'x'})
        with self.assertRaisesRegex(errors.Corrupt, ROW):
            self.vault.open(OTHER, sealed)

    def test_a_changed_byte_is_noticed(self):
        sealed = self.vault.seal(ROW, {'password': 'x'})
        middle = len(sealed) // 2
        letter = 'A' if sealed[middle] != 'A' else 'B'
        with self.assertRaises(errors.Unavailable):
            self.vault.open(
                ROW, sealed[:middle] + letter + sealed[middle + 1:]
            )

    def test_a_new_key_on_top_opens_what_the_old_one_sealed(self):
        sealed = self.vault.seal(ROW, {'password': 'x'})
        with open(self.path, 'rb+') as f:
            old = f.read()
            f.seek(0)
            f.write(Fernet.generate_key() + b'\n' + old)
        self.assertEqual({'password': 'x'}, self.vault.open(ROW, sealed))
        renewed = self.vault.seal(ROW, {'password': 'y'})
        with open(self.path, 'wb') as f:
            f.write(old)
        with self.assertRaisesRegex(errors.Unavailable, 'the same file'):
            self.vault.open(ROW, renewed)

    def test_the_key_is_for_its_owner_alone(self):
        self.assertEqual(0o600, stat.S_IMODE(os.stat(self.path).st_mode))
        os.chmod(self.path, 0o640)
        with self.assertRaisesRegex(errors.Unavailable, 'chmod'):
            self.vault.check()

    def test_a_key_that_is_there_is_never_replaced(self):
        with open(self.path, 'rb') as f:
            before = f.read()
        vault.make_key(self.path)
        with open(self.path, 'rb') as f:
            self.assertEqual(before, f.read())
        self.assertEqual(['secrets.key'], os.listdir(self.root))

    def test_of_many_at_once_one_makes_the_key(self):
        path = os.path.join(self.root, 'other.key')
        threads = [
            threading.Thread(target=vault.make_key, args=(path,))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with open(path, 'rb') as f:
            self.assertEqual(1, len(f.read().split()))

    def test_no_key_or_a_broken_one_is_said(self):
        for text in b'', b'not a key\n':
            with open(self.path, 'wb') as f:
                f.write(text)
            with self.assertRaisesRegex(errors.Unavailable, 'Fernet'):
                self.vault.check()
        os.unlink(self.path)
        with self.assertRaisesRegex(errors.Unavailable, 'secrets_key_file'):
            self.vault.check()

    def test_secrets_differ_and_every_protocol_can_carry_them(self):
        found = {vault.new_secret() for _ in range(100)}
        self.assertEqual(100, len(found))
        for each in found:
            self.assertRegex(each, r'^[a-z][A-Za-z0-9]{15}$')
