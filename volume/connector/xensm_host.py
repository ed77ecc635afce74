# SPDX-License-Identifier: Apache-2.0
"""Which pool a compute host is in, as its own file says.

The host has a user of its own at its pool: what it needs to plug disks into
its VMs is not the service's to give.
"""

from __future__ import annotations

import dataclasses
import os

from volume import errors
from volume.node import Node
from volume.xenapi import link
from volume.xenapi import poolfile

PATH = '/etc/volume/xensm-host.conf'
PATH_VARIABLE = 'VOLUME_XENSM_HOST'


@dataclasses.dataclass(frozen=True)
class XenHost:
    """A pool, and the VM in it that this host is, if it is one."""

    path: str
    link: link.Link
    vm: str = ''


def load(node: Node) -> XenHost:
    """Return what the host's file says.

    :raises Unsupported: there is none: this is no host of a Xen pool
    :raises Invalid: it says something wrong
    """
    path = os.environ.get(PATH_VARIABLE) or PATH
    if not os.path.exists(path):
        raise errors.Unsupported(
            f'this host does not say which Xen pool it is in: write {path}'
        )
    found = poolfile.load(path)
    return XenHost(path, link.Link(found.settings, node), found.vm)
