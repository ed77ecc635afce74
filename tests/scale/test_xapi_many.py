# SPDX-License-Identifier: Apache-2.0
"""A simulated pool with many VDIs goes on as one with few."""

import os
import unittest

from tests import xapi

COUNT = 10_000 if os.environ.get('VOLUME_PROOF') else 300
MIB = 1 << 20


class Many(unittest.TestCase):

    def test_all_of_many_disks_are_told_scanned_and_kept(self):
        pool = xapi.simulator(self)
        # What the snapshot was taken of is not to be merged meanwhile.
        pool.faults.gc_paused = True
        api = xapi.login(self, pool).xenapi
        sr = api.SR.get_by_uuid(xapi.nfs_sr(pool))
        for at in range(COUNT):
            last = api.VDI.create({
                'SR': sr, 'virtual_size': str(2 * MIB), 'type': 'user',
                'sharable': False, 'read_only': False, 'other_config': {},
                'name_label': f'disk {at}'})
        api.VDI.snapshot(last)
        api.SR.scan(sr)
        found = api.VDI.get_all_records()
        self.assertEqual(COUNT + 2, len(found))
        self.assertEqual(
            str(2 * MIB * (COUNT + 2)), api.SR.get_virtual_allocation(sr))
        self.assertEqual(
            [last], [
                ref for ref in api.VDI.get_by_name_label(f'disk {COUNT - 1}')
                if not api.VDI.get_is_a_snapshot(ref)])
        api.VDI.destroy(last)
        self.assertEqual(COUNT + 1, len(api.SR.get_VDIs(sr)))


if __name__ == '__main__':
    unittest.main()
