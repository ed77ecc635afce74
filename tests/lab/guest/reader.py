# SPDX-License-Identifier: Apache-2.0
"""Read from a device that stays open, again and again, past all caches.

A line for each read: ``read``, or ``failed`` and why. A line on standard
input ends it.
"""

import mmap
import os
import select
import sys

device = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
buffer = mmap.mmap(-1, 4096)
while not select.select([sys.stdin], [], [], 0.2)[0]:
    try:
        # The kernel may have cut a device that is gone to nothing.
        found = os.preadv(device, [buffer], 0)
        print('read' if found else 'failed no bytes', flush=True)
    except OSError as failed:
        print('failed', failed.strerror, flush=True)
