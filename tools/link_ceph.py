# SPDX-License-Identifier: Apache-2.0
"""Link Ceph's Python modules into the environment that runs this.

The modules ``rados`` and ``rbd`` are no packages of PyPI. Debian has them for
its own Python; only these two are linked, since the whole of its directory on
the path would hide other packages of the environment. Where they are not
installed, or are made for another Python, nothing is linked: the driver says
so when it is asked for.
"""

from __future__ import annotations

import contextlib
import os
import sys
import sysconfig

SYSTEM = '/usr/lib/python3/dist-packages'
MODULES = ('rados', 'rbd')


def main() -> int:
    target = sysconfig.get_path('platlib')
    if os.path.realpath(target) == os.path.realpath(SYSTEM):
        return 0
    suffix = sysconfig.get_config_var('EXT_SUFFIX')
    for name in MODULES:
        link = os.path.join(target, f'{name}{suffix}')
        source = os.path.join(SYSTEM, f'{name}{suffix}')
        if os.path.exists(source):
            with contextlib.suppress(FileExistsError):
                os.symlink(source, link)
        elif os.path.islink(link):
            os.unlink(link)  # the package is gone
    return 0


if __name__ == '__main__':
    sys.exit(main())
