# SPDX-License-Identifier: Apache-2.0
"""What the lvm driver makes of names, tags, reports, failures and deltas."""

import base64
import json
import unittest
import zlib

from tests.unit import lvm_recorded
from volume import errors
from volume.commands import CommandFailed
from volume.drivers.lvm import deltas
from volume.drivers.lvm import driver
from volume.drivers.lvm import groups
from volume.drivers.lvm import meaning
from volume.drivers.lvm import names
from volume.drivers.lvm import options
from volume.drivers.lvm import report
from volume.testing import fixtures

A, B, C = (
    f'{digit * 8}-{digit * 4}-4{digit * 3}-8{digit * 3}-{digit * 12}'
    for digit in '123'
)


class Names(unittest.TestCase):

    def test_name_and_tag_together_make_it_ours(self):
        tags = {f'volume:{A}'}
        self.assertEqual(
            ('volume', A), names.role_of(f'volume-{A}', tags))
        for name, others in (
            (f'volume-{A}', set()), (f'volume-{A}', {f'volume:{B}'}),
            (f'volume-{A}', {f'snapshot:{A}'}), ('data', tags),
            (f'volume-{A}x', tags), (f'VOLUME-{A}', tags),
        ):
            with self.subTest(name):
                self.assertEqual(('', ''), names.role_of(name, others))

    def test_no_two_names_share_a_device(self):
        self.assertEqual(
            '/dev/mapper/a--b-c--d', names.device('a-b', 'c-d'))
        self.assertNotEqual(
            names.device('a', 'b-c'), names.device('a-b', 'c'))

    def test_note_comes_back_from_tags_that_lvm_takes(self):
        for note in (
            {}, {'name': 'two, with "quotes" and ü\n', 'size': '1'},
            {'name': '\U0001f4be' * 255, 'x': ''.join(map(chr, range(999)))},
        ):
            tags = names.note_tags(note)
            self.assertEqual(note, names.note_of({*tags, f'volume:{A}'}))
            for tag in tags:
                self.assertRegex(tag, r'\A[A-Za-z0-9_+.:/=-]{1,1024}\Z')

    def test_broken_note_is_none(self):
        long = {f'name{at}': names.device(str(at), A) for at in range(400)}
        tags = names.note_tags(long)
        self.assertGreater(len(tags), 1)
        for left in tags[1:], ['note:0:%%'], ['note:0:QUJD'], ['note:x:1']:
            self.assertEqual({}, names.note_of(left))

    def test_note_that_somebody_made_to_do_harm_is_none(self):
        for text in b'[' * 60000, b'[1]', b'9' * 60000, b'\xff':
            packed = base64.b64encode(zlib.compress(text)).decode()
            with self.subTest(text[:3]):
                self.assertEqual(
                    {}, names.note_of([f'note:0:{packed}']))


class Reports(unittest.TestCase):

    def setUp(self):
        self.vg = report.read_group(lvm_recorded.GROUP)

    def test_group_and_its_disks_are_read(self):
        vg = self.vg
        self.assertEqual(
            ('rec-vg', 4290772992, 4173332480, 4194304),
            (vg.name, vg.size_bytes, vg.free_bytes, vg.extent_bytes),
        )
        self.assertEqual(['/dev/vdd'], [pv.name for pv in vg.pvs])
        self.assertEqual(frozenset(), vg.missing)

    def test_only_what_bears_our_tag_is_ours(self):
        self.assertEqual(
            {('volume', A), ('volume', C), ('snap', A), ('snap', B)},
            {(lv.role, lv.id) for lv in self.vg.lvs if lv.role},
        )
        stranger = self.vg.named(f'volume-{B}')
        self.assertEqual('', stranger.role)
        self.assertIsNone(self.vg.ours('volume', B))

    def test_snapshots_say_whose_they_are_and_how_large(self):
        thin, thick = self.vg.ours('snap', B), self.vg.ours('snap', A)
        self.assertEqual((A, C), (thin.of, thick.of))
        self.assertEqual((False, True), (
            thin.is_thick_snapshot, thick.is_thick_snapshot))
        self.assertEqual(
            (16777216, 20971520), (thick.size_bytes, thick.stored_bytes))
        self.assertEqual((2, None), (thin.thin_id, thick.thin_id))
        self.assertTrue(thick.is_active and not thin.is_active)

    def test_thin_pool_says_how_full_it_is(self):
        pool = self.vg.named('pool')
        self.assertTrue(
            pool.is_thin_pool and pool.zeroes and pool.errors_when_full)
        self.assertEqual(
            (0.0, 10.94), (pool.data_percent, pool.metadata_percent))
        self.assertFalse(pool.needs_check)

    def test_extents_of_a_volume_are_read(self):
        self.assertEqual(
            ('/dev/vdd:18-21',), self.vg.ours('volume', C).ranges)

    def test_what_is_no_report_is_unknown_and_never_an_absence(self):
        for text in (
            '', 'x', '{}', '{"report": 1}', '{"report": [{"vg": []}]}',
            lvm_recorded.GROUP[:-20],
        ):
            with self.subTest(text[:20]), self.assertRaises(errors.Unknown):
                report.read_group(text)


class Scan(unittest.TestCase):
    """What the look at all disks leads to."""

    def test_copy_of_a_disk_is_refused(self):
        self.assert_refused(
            lvm_recorded.COPY, errors.Unavailable,
            r'disk twice: /dev/mapper/copy .*vgimportclone',
        )

    def test_two_groups_of_one_name_are_refused(self):
        self.assert_refused(
            lvm_recorded.TWINS, errors.Unavailable,
            '2 volume groups are called rec-vg .*MJctqa.*vgrename',
        )

    def test_group_of_another_machine_is_refused(self):
        self.assert_refused(
            lvm_recorded.FOREIGN, errors.Invalid, 'system id other-host')

    def test_shared_group_is_refused_by_name(self):
        text = lvm_recorded.FOREIGN.replace(
            '"vg_lock_type": ""', '"vg_lock_type": "sanlock"')
        self.assert_refused(
            text, errors.Unsupported, 'shared by way of sanlock')

    def test_exported_group_is_refused(self):
        text = lvm_recorded.FOREIGN.replace(
            '"vg_exported": ""', '"vg_exported": "exported"')
        self.assert_refused(text, errors.Invalid, 'vgimport')

    def test_group_that_is_not_there_is_unavailable(self):
        self.assert_refused(
            '{"report": [{"pv": []}]}', errors.Unavailable, 'no volume group')

    def assert_refused(self, text, kind, words):
        group = groups.Group('rec-vg', settings(), Said({
            'pvs': text, 'lvm': '  system ID: \n',
        }))
        with self.assertRaisesRegex(kind, words):
            group.find()


class Said:
    """A node whose commands answer what they are to."""

    def __init__(self, answers):
        self.answers = answers

    def run(self, *argv, **options):
        return self.answers[argv[0]]


class Meaning(unittest.TestCase):

    def test_each_failure_has_its_kind(self):
        for kind, stderr in lvm_recorded.FAILURES:
            failed = CommandFailed(['lvcreate'], 5, stderr)
            with self.subTest(stderr):
                found = meaning.mean(failed, 'lvcreate')
                self.assertEqual(kind, found.kind)
                self.assertNotIn('WARNING', str(found))

    def test_no_failure_is_taken_for_an_absence(self):
        kinds = {kind for _, kind in meaning.TABLE}
        self.assertNotIn(errors.NotFound, kinds)


class Deltas(unittest.TestCase):

    def test_delta_tells_what_changed_and_what_became_zero(self):
        block_bytes, runs = deltas.read(lvm_recorded.DELTA, 1)
        self.assertEqual(65536, block_bytes)
        self.assertEqual(
            [(0, 2, False), (5, 2, True), (50, 2, True)], runs)

    def test_dump_tells_what_is_stored(self):
        _, runs = deltas.read(lvm_recorded.DUMP, None)
        self.assertEqual(
            [(2, 3, True), (5, 2, True), (7, 13, True), (50, 2, True)], runs)

    def test_other_output_is_unknown_and_never_no_change(self):
        cut = lvm_recorded.DELTA[:-20]
        for text, newer in (
            ('', 1), (cut, 1), (lvm_recorded.DUMP, 1),
            (lvm_recorded.DELTA, None),
            ('<superblock data_block_size="128"/>', 1),
        ):
            with self.subTest(text[-30:]), self.assertRaises(errors.Unknown):
                deltas.read(text, newer)


class Options(unittest.TestCase):

    def test_what_makes_no_sense_is_refused(self):
        for words, wrong in (
            ('name at least one', {'volume_groups': []}),
            ('cannot be a volume group', {'volume_groups': ['a b']}),
            ('twice', {'volume_groups': ['a', 'a']}),
            ('one only', {'volume_groups': ['a', 'b'], 'create': True,
                          'devices': ['/dev/sdb']}),
            ('no path', {'devices': ['sdb']}),
            ('thin_pool', {'thin_pool': 'a/b'}),
        ):
            with self.subTest(words):
                with self.assertRaisesRegex(errors.Invalid, words):
                    settings(**wrong)

    def test_unknown_way_to_wipe_is_refused(self):
        for value in 'none', '', 'always':
            with self.assertRaises(ValueError):
                settings(wipe=value)

    def test_filter_accepts_the_disks_of_the_group_alone(self):
        group = groups.Group('rec-vg', settings(), Said({
            'pvs': lvm_recorded.TWINS.replace('5QTIX0', 'MJctqa'),
        }))
        rows = json.loads(lvm_recorded.TWINS)['report'][0]['pv']
        for row in rows:
            row['vg_uuid'] = 'one'
            row['pv_name'] = row['pv_name'].replace('vdd', 'mapper/a.b+c')
        group.node.answers['pvs'] = json.dumps({'report': [{'pv': rows}]})
        group.find()
        self.assertIn(
            'filter=["a|^/dev/mapper/a[.]b[+]c$|","a|^/dev/vde$|","r|.*|"]',
            group._config()[1],
        )


def settings(**wanted):
    return options.read(fixtures.settings(
        driver.LvmDriver, **{'volume_groups': ['rec-vg'], **wanted}))
