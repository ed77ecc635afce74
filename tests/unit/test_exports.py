# SPDX-License-Identifier: Apache-2.0
"""What exporters share: names, portals, identities, what hosts may say."""

import unittest

from volume import errors
from volume import identity
from volume import ids
from volume import model
from volume.exports import iscsi
from volume.exports import lio_store
from volume.exports import naming
from volume.exports import portals
from volume.exports.base import Export

PREFIX = 'iqn.2010-10.org.openstack:'


def wanted(source=None, size_bytes=1 << 20, **credentials):
    return Export(
        ids.new(), ids.new(), source or model.Device('/dev/one', True),
        model.Host('one'), model.Access.WRITE, size_bytes, credentials,
    )


class Naming(unittest.TestCase):

    def test_name_tells_volume_and_attachment(self):
        one, two = ids.new(), ids.new()
        name = naming.target(PREFIX, one, two)
        self.assertEqual((one, two), naming.parts(PREFIX, name))

    def test_other_names_are_foreign(self):
        one, two = ids.new(), ids.new()
        for name in (
            f'{PREFIX}volume-{one}',  # as Cinder calls its own
            f'{PREFIX}volume-{one}.{two}x',
            f'{PREFIX}volume-{one}.{two}\n',
            f'{PREFIX}volume-{one.upper()}.{two}',
            f'x{PREFIX}volume-{one}.{two}',
            f'iqn.2010-10.org.other:volume-{one}.{two}',
            '', 'discovery_auth',
        ):
            self.assertIsNone(naming.parts(PREFIX, name), name)

    def test_what_is_no_id_is_in_no_name(self):
        with self.assertRaises(errors.Invalid):
            naming.target(PREFIX, '../..', ids.new())

    def test_longest_name_is_one_that_protocols_take(self):
        name = naming.target(
            'p' * naming.PREFIX_BYTES_MAX, ids.new(), ids.new()
        )
        self.assertEqual(223, len(name))


class Portals(unittest.TestCase):

    def parse(self, *texts):
        return [str(each) for each in portals.parse(texts, 'portals', 3260)]

    def test_port_may_be_left_out(self):
        self.assertEqual(
            ['192.0.2.1:3260', '192.0.2.2:77', '[2001:db8::1]:3260',
             '[2001:db8::2]:77'],
            self.parse('192.0.2.1', '192.0.2.2:77', '2001:DB8::1',
                       '[2001:db8::2]:77'),
        )

    def test_what_is_no_address_is_named(self):
        for text in (
            '', 'storage1', '192.0.2.1:', '192.0.2.1:0', '192.0.2.1:65536',
            '192.0.2.1:+5', '[2001:db8::1]77', '192.0.2.1:77:88', '0.0.0.0',
            '[::]', '[2001:db8::1', 'fe80::1%eth0', '192.0.2.1/24',
        ):
            with self.assertRaisesRegex(errors.Invalid, 'portals', msg=text):
                self.parse(text)

    def test_none_and_twice_the_same_are_refused(self):
        for texts in (), ('192.0.2.1', '192.0.2.1:3260'):
            with self.assertRaises(errors.Invalid):
                self.parse(*texts)


class Identity(unittest.TestCase):

    VOLUME = '6f0c7d5e-1f6e-4a6c-9c59-5e6f1a2b3c4d'

    def test_all_come_from_the_id_and_have_the_length_that_hosts_expect(self):
        self.assertEqual(
            '60014056f0c7d5e1f6e4a6c9c595e6f1', identity.scsi_naa(self.VOLUME)
        )
        self.assertEqual(self.VOLUME, identity.scsi_serial(self.VOLUME))
        self.assertEqual(
            '6f0c7d5e1f6e4a6c9c595e6f1a2b3c4d',
            identity.nvme_nguid(self.VOLUME),
        )
        self.assertEqual(20, len(identity.nvme_serial(self.VOLUME)))


class Hosts(unittest.TestCase):

    def test_name_is_compared_in_lower_case(self):
        host = model.Host('one', (), 'iqn.2024-01.Example:ONE')
        self.assertEqual('iqn.2024-01.example:one', iscsi.initiator(host))

    def test_what_is_no_name_is_never_a_path(self):
        for iqn in (
            None, '', 'one', 'iqn.2024-01.example:../x', 'iqn.2024-01./x',
            'iqn.2024-01.example:a b', 'eui.12', 'iqn.2024-01.example:\0',
            'iqn.2024-01.example:' + 'x' * 223,
        ):
            with self.assertRaises(errors.Invalid, msg=iqn):
                iscsi.initiator(model.Host('one', (), iqn))


class Secrets(unittest.TestCase):

    GOOD = 'abcdefgh12345678'

    def test_no_more_are_given_on_than_are_wanted(self):
        found = iscsi.credentials(
            wanted(username='one', password=self.GOOD, mutual_password='x'),
            iscsi.WANTS['one-way'],
        )
        self.assertEqual({'username': 'one', 'password': self.GOOD}, found)

    def test_secret_that_a_target_would_misread_is_refused_unsaid(self):
        for secret in '', 'short', f'NULL{self.GOOD}', f'{self.GOOD}\n', (
            f'with space {self.GOOD}'
        ):
            with self.assertRaises(errors.Invalid) as refused:
                iscsi.credentials(
                    wanted(username='one', password=secret),
                    iscsi.WANTS['one-way'],
                )
            self.assertNotIn(secret or None, str(refused.exception).split())


class Stores(unittest.TestCase):

    def test_what_the_kernel_cannot_serve_is_refused(self):
        for source in (
            model.Device('/one.qcow2', False, 'qcow2'),
            {'driver': 'raw', 'file': {'driver': 'file', 'filename': '/one'}},
        ):
            with self.assertRaises(errors.Unsupported):
                lio_store.of(wanted(source), PREFIX)

    def test_path_cannot_give_the_kernel_orders(self):
        for path in '/one,fd_buffered_io=0', '/one\nreadonly=1', '/o\\ne':
            with self.assertRaises(errors.Invalid):
                lio_store.of(wanted(model.Device(path, True)), PREFIX)

    def test_file_of_half_sectors_is_refused(self):
        store = lio_store.of(
            wanted(model.Device('/one', False), 1 << 20 | 1), PREFIX
        )
        with self.assertRaises(errors.Invalid):
            store.make()
