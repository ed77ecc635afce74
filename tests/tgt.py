# SPDX-License-Identifier: Apache-2.0
"""What tests of tgtd need: the tools, an exporter of its own, its end."""

import contextlib
import os
import shutil
import signal

from tests import iscsi
from tests import ports
from volume.exports import tgt
from volume.testing import fixtures

PATH = f'{os.environ.get("PATH", "")}:/usr/sbin:/sbin'


def need(test):
    """Skip a test where tgtd or libiscsi is not installed."""
    if not shutil.which('tgtd', path=PATH):
        test.skipTest('no tgtd')
    if not iscsi.LIBRARY:
        test.skipTest('no libiscsi')


def free_portal(address='127.0.0.1'):
    """Return an address and a port where nobody listens now."""
    return f'{address}:{ports.free(address)}'


def settings(portals, **changes):
    """Return the exporter's options."""
    return fixtures.settings(
        tgt.TgtExporter, iscsi_portals=portals, **changes
    )


def make_exporter(test, node, portals, **changes):
    """Return an exporter whose daemon ends with the test."""
    made = tgt.TgtExporter(settings(portals, **changes), node)
    test.addCleanup(end, node)
    return made


def end(node):
    """End the daemons of a node, also one that nobody has written down."""
    ours = f'TGT_IPC_SOCKET={node.state_dir}/tgtd/socket'.encode()
    for pid in filter(str.isdigit, os.listdir('/proc')):
        with contextlib.suppress(OSError):
            with open(f'/proc/{pid}/environ', 'rb') as f:
                if ours not in f.read().split(b'\0'):
                    continue
            os.kill(int(pid), signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(int(pid), 0)
