# SPDX-License-Identifier: Apache-2.0
"""What the simulator's profiles say of types of storage repositories."""

import ast
import pathlib
import unittest

from tests import xapi
from volume.sim.xapi.published import datamodel
from volume.sim.xapi.published import profiles
from volume.sim.xapi.published import smtypes
from volume.sim.xapi.sm import types

LUN = ['SR_PROBE', 'VDI_ATTACH', 'VDI_CREATE', 'VDI_DELETE', 'VDI_DETACH',
       'VDI_INTRODUCE']
SOURCE = pathlib.Path(profiles.__file__).parents[1]


class Tables(unittest.TestCase):
    """What was extracted from the drivers."""

    def test_types_are_offered_by_the_name_that_create_takes(self):
        for profile in profiles.PROFILES.values():
            with self.subTest(profile=profile.name):
                self.assertEqual(
                    [], [kind for kind in profile.sm if 'lvhd' in kind])
                self.assertLessEqual(
                    {'nfs', 'ext', 'lvm', 'lvmoiscsi', 'lvmohba', 'hba',
                     'iscsi', 'file'}, profile.sm.keys())

    def test_a_capability_has_a_version(self):
        features = profiles.PROFILES['head'].sm['nfs'].features
        self.assertEqual(2, features['VDI_RESET_ON_BOOT'])
        self.assertEqual(1, features['VDI_SNAPSHOT'])

    def test_what_the_server_does_not_know_is_dropped(self):
        kind = profiles.PROFILES['head'].sm['nfs']
        self.assertIn('ATOMIC_PAUSE', kind.capabilities)
        self.assertNotIn('ATOMIC_PAUSE', kind.features)

    def test_lun_types_can_do_six_things_and_rawhba_cannot_create(self):
        sm = profiles.PROFILES['xcp-ng-8.3'].sm
        self.assertEqual(LUN, [*sm['hba'].features])
        self.assertEqual(LUN, [*sm['iscsi'].features])
        self.assertEqual(
            ['SR_PROBE', 'VDI_ATTACH', 'VDI_DELETE', 'VDI_DETACH'],
            [*sm['rawhba'].features])

    def test_changed_blocks_came_after_6_5(self):
        self.assertNotIn(
            'VDI_CONFIG_CBT', profiles.PROFILES['xenserver-6.5'].sm[
                'nfs'].features)
        self.assertIn(
            'VDI_CONFIG_CBT', profiles.PROFILES['xenserver-7.6'].sm[
                'nfs'].features)

    def test_only_what_has_no_source_is_modelled(self):
        found = {
            name for profile in profiles.PROFILES.values()
            for name, kind in profile.sm.items() if kind.modelled
        }
        self.assertEqual({'netapp', 'equal', 'cslg', 'gfs2'}, found)

    def test_local_storage_is_not_shared(self):
        sm = profiles.PROFILES['xcp-ng-8.3'].sm
        self.assertEqual(
            {'ext', 'file', 'largeblock', 'lvm', 'shm', 'udev', 'xfs',
             'zfs'},
            {name for name, kind in sm.items() if not kind.shared})

    def test_every_type_is_served_or_known_by_name_only(self):
        for profile in profiles.PROFILES.values():
            for name, kind in profile.sm.items():
                with self.subTest(profile=profile.name, kind=name):
                    self.assertEqual(
                        kind.family != 'bare', name in types.MANAGERS)

    def test_an_error_has_the_words_of_the_drivers(self):
        self.assertEqual(
            ('', 'There is insufficient space [opterr=full]', ''),
            smtypes.fault(44, 'full').params)


class Names(unittest.TestCase):
    """A profile is named, and may be given more types."""

    def test_types_are_added_by_name(self):
        profile = profiles.find('xcp-ng-8.3+netapp+equal')
        self.assertEqual(
            {'netapp', 'equal'},
            profile.sm.keys() - profiles.PROFILES['xcp-ng-8.3'].sm.keys())

    def test_an_unknown_name_is_refused_with_those_that_there_are(self):
        with self.assertRaisesRegex(ValueError, "'xcp'; there are .*head"):
            profiles.find('xcp')
        with self.assertRaisesRegex(ValueError, 'adds nfs; a name can add'):
            profiles.find('head+nfs')

    def test_every_release_is_one_of_the_data_model(self):
        model = datamodel.load()
        for profile in profiles.PROFILES.values():
            with self.subTest(profile=profile.name):
                self.assertTrue(model.released('rio', profile.release))

    def test_every_switch_that_is_asked_for_is_declared(self):
        asked = {
            node.args[0].value
            for path in SOURCE.rglob('*.py')
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == 'switch' and node.args
            and isinstance(node.args[0], ast.Constant)
        }
        self.assertEqual(asked, set(profiles.SWITCHES))

    def test_an_unknown_switch_is_refused(self):
        with self.assertRaisesRegex(ValueError, 'no such .*: warp_speed'):
            xapi.simulator(self, warp_speed=9)


class Records(unittest.TestCase):
    """The same over the XenAPI."""

    def test_each_type_has_a_record(self):
        for name, profile in profiles.PROFILES.items():
            with self.subTest(profile=name):
                pool = xapi.simulator(self, profile=name, hosts=1)
                session = xapi.login(self, pool)
                found = {
                    record['type']: record for record in
                    session.xenapi.SM.get_all_records().values()
                }
                self.assertEqual(set(profile.sm), set(found))
                self.assertEqual(
                    '/opt/xensource/sm/LVMSR',
                    found['lvm']['driver_filename'])
                self.assertEqual(
                    {name: str(version) for name, version in
                     profile.sm['nfs'].features.items()},
                    found['nfs']['features'])
                self.assertEqual(
                    sorted(profile.sm),
                    session.xenapi.SR.get_supported_types())
