# SPDX-License-Identifier: Apache-2.0
"""What the service takes of the machine's memory."""

import concurrent.futures
import os
import platform
import unittest

from tests import process
from tools import fill
from volume import memory

RESIDENT_MIB = 150
LIST = '/volumes/detail?limit=1000'


class Heaps(unittest.TestCase):
    @unittest.skipUnless(
        platform.libc_ver()[0] == 'glibc', 'the C library is not GNU\'s'
    )
    def test_the_c_library_is_told_to_use_few_heaps(self):
        self.assertTrue(memory.use_few_heaps())


@unittest.skipUnless(
    os.environ.get('VOLUME_PROOF'), 'takes a minute: set VOLUME_PROOF=1'
)
class Large(unittest.TestCase):
    def test_a_large_installation_is_served_within_150_mib(self):
        served = process.ServiceProcess(self, '')
        served.conf_file = fill.configure(
            os.path.join(served.root, 'large'), 200, 'file', 'local'
        )
        fill.fill(served.conf_file, fill.Size())
        served.start()
        for _ in range(20):
            self.assertEqual(1000, len(served.call('GET', LIST)['volumes']))
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            made = list(pool.map(
                lambda number: served.create(size=1, name=f'{number}'),
                range(40),
            ))
        for volume_id in made:
            served.wait(volume_id, 'available')
        with open(f'/proc/{served.process.pid}/status') as f:
            (line,) = (line for line in f if line.startswith('VmRSS'))
        self.assertLess(int(line.split()[1]) >> 10, RESIDENT_MIB)


if __name__ == '__main__':
    unittest.main()
