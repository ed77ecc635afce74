# SPDX-License-Identifier: Apache-2.0
"""The options of the driver ``rbd``, read and checked."""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any

from oslo_config import cfg

from volume import errors

FEATURES = (
    'layering', 'exclusive-lock', 'object-map', 'fast-diff', 'deep-flatten',
)
# Without the first there are no clones; the second is what keeps a client
# that was cut off from writing on, and lets a volume grow under its host.
NEEDED = frozenset({'layering', 'exclusive-lock'})
NEEDS = {'object-map': 'exclusive-lock', 'fast-diff': 'object-map'}
NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9._-]{0,127}')

OPTIONS = (
    cfg.ListOpt(
        'pools', default=['volumes'],
        help='Names of the RADOS pools that hold volumes.\n\n'
        'Each is initialised for RBD already ("rbd pool init").',
    ),
    cfg.StrOpt(
        'ceph_conf', default='/etc/ceph/ceph.conf',
        help='The configuration file of the cluster.\n\n'
        'It says where monitors and the keyring of ceph_user are.',
    ),
    cfg.StrOpt(
        'ceph_cluster', default='ceph',
        help='What hosts call the cluster.',
    ),
    cfg.StrOpt(
        'ceph_user', default='volumes',
        help='The cephx user of this service, without "client.".\n\n'
        'Of the monitors it needs "profile rbd", and of the OSDs "profile '
        'rbd pool=NAME" for each pool.',
    ),
    cfg.StrOpt(
        'host_user', default='',
        help='The cephx user of hosts; empty is ceph_user.\n\n'
        'Its key never leaves the cluster and the hosts.',
    ),
    cfg.StrOpt(
        'secret_uuid', default='',
        help='What libvirt calls the secret with the key of host_user.',
    ),
    cfg.StrOpt(
        'read_only_user', default='',
        help='The cephx user of hosts that attach read-only; empty is none.'
        '\n\nGive it "profile rbd-read-only". Without it nobody attaches '
        'read-only. Ceph does not show who reads, so such a session is not '
        'ended by a detach that the host does not take part in.',
    ),
    cfg.StrOpt(
        'read_only_secret_uuid', default='',
        help='What libvirt calls the secret with the key of read_only_user.',
    ),
    cfg.ListOpt(
        'features', default=list(FEATURES),
        help='Features of new images.\n\n'
        'Of layering, exclusive-lock, object-map, fast-diff and '
        'deep-flatten; the first two are always needed.',
    ),
    cfg.IntOpt(
        'clone_depth_max', default=5, min=1, max=15,
        help='How many images a clone may stand on before it is flattened.'
        '\n\nThat happens in the background, while no host uses it.',
    ),
    cfg.IntOpt(
        'trash_delay_s', default=0, min=0,
        help='How long the image of a deleted volume can be restored.\n\n'
        'Until then "rbd trash restore" brings it back, and it takes room.',
    ),
    cfg.IntOpt(
        'timeout_s', default=30, min=1,
        help='How long to wait for the cluster, for each operation.',
    ),
    cfg.BoolOpt(
        'require_secure_ceph', default=False,
        help='Refuse a cluster whose release has known flaws in cephx.\n\n'
        'Otherwise there is a warning in the log.',
    ),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """A section of the configuration, once it is right."""

    pools: tuple[str, ...]
    conf: str
    cluster: str
    user: str
    host_user: str
    secret_uuid: str
    read_only_user: str
    read_only_secret_uuid: str
    features: tuple[str, ...]
    clone_depth_max: int
    trash_delay_s: int
    timeout_s: int
    require_secure: bool


def read(conf: Any) -> Settings:
    """Return the settings of a section.

    :raises Invalid: an option is wrong
    """
    if not conf.pools:
        raise errors.Invalid('option pools is empty: name at least one')
    for name in conf.pools:
        if not NAME.fullmatch(name):
            raise errors.Invalid(f'option pools: {name!r:.140} is no pool')
    if len(set(conf.pools)) != len(conf.pools):
        raise errors.Invalid('option pools names a pool twice')
    for option in 'ceph_user', 'host_user', 'read_only_user', 'ceph_cluster':
        name = getattr(conf, option)
        if name and not NAME.fullmatch(name):
            raise errors.Invalid(
                f'option {option}: {name!r:.140} is no name; leave out '
                '"client."'
            )
    if not os.path.isabs(conf.ceph_conf):
        raise errors.Invalid(
            f'option ceph_conf: {conf.ceph_conf!r:.200} is relative: give it '
            'from the root'
        )
    return Settings(
        tuple(conf.pools), conf.ceph_conf, conf.ceph_cluster,
        conf.ceph_user, conf.host_user or conf.ceph_user, conf.secret_uuid,
        conf.read_only_user, conf.read_only_secret_uuid,
        _features(conf.features), conf.clone_depth_max, conf.trash_delay_s,
        conf.timeout_s, conf.require_secure_ceph,
    )


def _features(names: list[str]) -> tuple[str, ...]:
    unknown = set(names) - set(FEATURES)
    if unknown:
        raise errors.Invalid(
            f'option features: {", ".join(sorted(unknown)):.200} are none of '
            f'{", ".join(FEATURES)}'
        )
    missing = {
        *NEEDED, *(NEEDS[name] for name in names if name in NEEDS),
    } - set(names)
    if missing:
        raise errors.Invalid(
            f'option features lacks {", ".join(sorted(missing))}'
        )
    return tuple(names)
