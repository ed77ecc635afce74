# SPDX-License-Identifier: Apache-2.0
"""A file that says how to talk to a pool, for hosts and for other pools.

It has one section, with the options that a backend's section has for the
same purpose::

    [xensm]
    addresses = https://10.0.0.5, https://10.0.0.6
    password_file = /etc/volume/pool.password
    fingerprints = 3f:0a:…
    vm = 6e2d…          # on a host: the VM that it is, or its dom0
"""

from __future__ import annotations

import dataclasses

from oslo_config import cfg

from volume import errors
from volume.xenapi import options

SECTION = 'xensm'
VM = cfg.StrOpt('vm', default='', help='UUID of the VM that this host is.')


@dataclasses.dataclass(frozen=True)
class PoolFile:
    """What such a file says."""

    path: str
    settings: options.Settings
    vm: str = ''


def load(path: str) -> PoolFile:
    """Read a file.

    :raises Invalid: it cannot be read, or says something wrong
    """
    conf = cfg.ConfigOpts()
    opts = [o for o in options.OPTIONS if o.name in options.LINK]
    conf.register_opts([*opts, VM], group=SECTION)
    try:
        conf([], default_config_files=[path], default_config_dirs=[])
        group = conf[SECTION]
        settings = options.read_link(group)
        vm = options.uuid(group.vm, 'vm') if group.vm else ''
    except (cfg.Error, ValueError) as wrong:
        raise errors.Invalid(f'{path}: {wrong}') from None
    except errors.Invalid as wrong:
        raise errors.Invalid(f'{path}: {wrong}') from None
    return PoolFile(path, settings, vm)
