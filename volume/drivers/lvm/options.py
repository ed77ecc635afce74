# SPDX-License-Identifier: Apache-2.0
"""The options of a backend's section, and what they mean together."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from oslo_config import cfg

from volume import errors

GROUP = re.compile(r'[A-Za-z0-9+_.][A-Za-z0-9+_.-]{0,126}')

OPTIONS: tuple[cfg.Opt, ...] = (
    cfg.ListOpt(
        'volume_groups', required=True,
        help='Volume groups, each one a pool of its name.',
    ),
    cfg.StrOpt(
        'provisioning', default='thin', choices=['thin', 'thick'],
        help='Whether volumes take their space when written, or at once.\n\n'
        'Thin volumes have instant snapshots and clones. Thick ones are '
        'made zero when they are created, which takes its time; a snapshot '
        'of one slows it down, and clones are copies.',
    ),
    cfg.StrOpt(
        'thin_pool', default='pool',
        help='Name of the thin pool in each volume group.',
    ),
    cfg.StrOpt(
        'wipe', default='both', choices=['both', 'create', 'delete'],
        help='When a thick volume is overwritten with zeros.\n\n'
        '"delete" alone is for groups whose free space is known to be zero, '
        'and which nobody else allocates from: a new volume then shows '
        'whatever was there before. Thin pools zero by themselves.',
    ),
    cfg.IntOpt(
        'snapshot_percent', default=100, min=1, max=100,
        help='Space for a thick snapshot, in percent of its volume.\n\n'
        'With less than 100 a snapshot is lost once more than that has '
        'changed and could not be extended in time: it says so, and never '
        'gives wrong bytes.',
    ),
    cfg.IntOpt(
        'extend_percent', default=80, min=20, max=100,
        help='How full a thin pool, or a small snapshot, may be.\n\n'
        'Above it is extended from the free space of its group. 100 leaves '
        'that to somebody else.',
    ),
    cfg.IntOpt(
        'extend_by_percent', default=20, min=1, max=100,
        help='By how much of its size it is extended.',
    ),
    cfg.IntOpt(
        'metadata_high_percent', default=90, min=10, max=99,
        help='How full metadata may be before new volumes are refused.\n\n'
        'Of a thin pool and of the volume group. A pool whose metadata is '
        'full is read-only, and may need repair.',
    ),
    cfg.BoolOpt(
        'create', default=False,
        help='Whether to make the volume group and the thin pool.\n\n'
        'Only if they are missing, at the start of the service, from '
        'devices that carry nothing.',
    ),
    cfg.ListOpt(
        'devices', default=[],
        help='Block devices to make the volume group from.',
    ),
    cfg.IntOpt(
        'command_timeout_s', default=120, min=5,
        help='How long a command of LVM may take.',
    ),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """A section that was read once and found consistent."""

    groups: tuple[str, ...]
    is_thin: bool
    thin_pool: str
    wipes_new: bool
    wipes_old: bool
    snapshot_percent: int
    extend_percent: int
    extend_by_percent: int
    metadata_high_percent: int
    may_create: bool
    devices: tuple[str, ...]
    timeout_s: float


def read(conf: Any) -> Settings:
    """Read a section.

    :raises Invalid: an option is wrong, and why
    """
    groups = tuple(conf.volume_groups or ())
    if not groups:
        raise errors.Invalid(
            'the option volume_groups is empty: name at least one'
        )
    for name in groups:
        if GROUP.fullmatch(name) is None or name in ('.', '..'):
            raise errors.Invalid(f'{name!r:.140} cannot be a volume group')
    if len(set(groups)) != len(groups):
        raise errors.Invalid('volume_groups names one of them twice')
    if conf.create and len(groups) != 1 and conf.devices:
        raise errors.Invalid(
            'create is set, and it is not clear which of the volume_groups '
            'the devices are for: name one only'
        )
    for path in conf.devices:
        if not path.startswith('/dev/'):
            raise errors.Invalid(
                f'devices: {path!r:.200} is no path below /dev'
            )
    if GROUP.fullmatch(conf.thin_pool) is None:
        raise errors.Invalid(
            f'thin_pool: {conf.thin_pool!r:.140} cannot be a name'
        )
    return Settings(
        groups, conf.provisioning == 'thin', conf.thin_pool,
        conf.wipe in ('both', 'create'), conf.wipe in ('both', 'delete'),
        conf.snapshot_percent, conf.extend_percent, conf.extend_by_percent,
        conf.metadata_high_percent, conf.create, tuple(conf.devices),
        float(conf.command_timeout_s),
    )
