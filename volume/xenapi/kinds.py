# SPDX-License-Identifier: Apache-2.0
"""The types of SR that volumes can lie on: one table.

What a type can do in a given pool is asked of the pool (``SM.features``);
here is what the pool does not tell: which keys it takes, what lies where,
and what to mind. The table in the docs is made of it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping

from volume import errors
from volume import model

VHD_MAX_BYTES = 2040 * model.GIB
QCOW2_MAX_BYTES = 16381 * model.GIB
VHD_GRAIN_BYTES = 2 * model.MIB
LVM_GRAIN_BYTES = 4 * model.MIB

FAMILIES = ('vhd', 'lvm', 'lun', 'array', 'qcow2')
# Which image formats new VDIs get, the preferred one first.
FORMATS = 'preferred-image-formats'
CHAP = ('chapuser', 'chappassword')


@dataclasses.dataclass(frozen=True)
class Kind:
    """A type of SR; keys are those of ``device_config``."""

    type: str
    name: str
    family: str
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    shared: bool = True
    thin: bool = True
    quirks: str = ''
    formats: bool = True
    """Whether it takes a list of image formats, in releases that do."""
    probe: tuple[str, ...] = ()
    """Keys to ask the pool for, in this order, when probing step by step."""
    probes_ext: bool = False
    """Whether it is probed by ``SR.probe_ext``, as newer drivers are."""
    vdi_config: Mapping[str, str] = dataclasses.field(
        default_factory=dict, hash=False)
    """What each new VDI's ``sm_config`` has, unless the section differs."""

    @property
    def granularity_bytes(self) -> int:
        """A volume's size is a multiple of this."""
        if self.family in ('lun', 'array'):
            return model.SECTOR_BYTES
        return VHD_GRAIN_BYTES

    @property
    def max_volume_bytes(self) -> int:
        """The largest volume."""
        if self.family in ('vhd', 'lvm'):
            return VHD_MAX_BYTES
        return QCOW2_MAX_BYTES

    def keys(self) -> tuple[str, ...]:
        """Return every key that it takes."""
        has_formats = self.formats and self.family in ('vhd', 'lvm')
        return (
            *self.required, *self.optional,
            *((FORMATS,) if has_formats else ()),
        )

    def check(self, device_config: Mapping[str, str]) -> None:
        """:raises Invalid: a key lacks, or is none of this type"""
        if 'SRmaster' in device_config:
            raise errors.Invalid('device_config: SRmaster is for the server')
        known = self.keys()
        for key in device_config:
            if key not in known:
                raise errors.Invalid(
                    f'device_config: type {self.type} has no key {key}; it '
                    f'has {", ".join(known)}'
                )
        if not device_config:
            return  # an SR that exists needs none
        missing = [key for key in self.required if key not in device_config]
        if missing:
            raise errors.Invalid(
                f'device_config: type {self.type} needs {", ".join(missing)}'
                + _misplaced(missing, device_config)
            )


_ISCSI = (
    'port', *CHAP, 'incoming_chapuser', 'incoming_chappassword',
    'multihomed', 'usediscoverynumber',
)
_WHOLE = (
    'Each volume is a whole LUN of those named in ``luns``; it is wiped '
    'before it is given back. No snapshots, no clones, no growth.'
)
_THICK = (
    'Thick: a volume takes its full size, and each snapshot of a volume in '
    'use takes it once more.'
)
_MODELLED = (
    'Discontinued; supported as its manual describes it, never tried on '
    'real hardware.'
)

KINDS: tuple[Kind, ...] = (
    Kind('nfs', 'NFS', 'vhd', ('server', 'serverpath'),
         ('options', 'nfsversion', 'useUDP'),
         quirks='The SR lies in a directory named by its uuid.',
         probe=('server', 'serverpath')),
    Kind('smb', 'SMB', 'vhd', ('server',), ('username', 'password'),
         formats=False,
         quirks='XenServer needs a licence for it.', probe=('server',)),
    Kind('ext', 'local ext4', 'vhd', ('device',), shared=False,
         quirks='One host alone has it.', probe=('device',)),
    Kind('xfs', 'local XFS', 'vhd', ('device',), shared=False,
         quirks='XCP-ng.', probe=('device',)),
    Kind('largeblock', 'local disk of large sectors', 'vhd', ('device',),
         shared=False, quirks='XCP-ng; one device, no 512-byte sectors.',
         probe=('device',)),
    Kind('file', 'local directory', 'vhd', ('location',), shared=False,
         quirks='The directory must be empty. It cannot be probed.'),
    Kind('zfs', 'local ZFS', 'vhd', ('location',), shared=False,
         quirks='XCP-ng; a mounted data set. It cannot be probed.'),
    Kind('cephfs', 'CephFS', 'vhd', ('server', 'serverpath'),
         ('serverport', 'options'), quirks='XCP-ng.',
         probe=('server', 'serverpath')),
    Kind('glusterfs', 'GlusterFS', 'vhd', ('server',),
         ('backupservers', 'fetchattempts'), quirks='XCP-ng.',
         probe=('server',)),
    Kind('moosefs', 'MooseFS', 'vhd', ('masterhost', 'rootpath'),
         ('masterport', 'options'), quirks='XCP-ng.',
         probe=('masterhost', 'rootpath')),
    Kind('linstor', 'LINSTOR (XOSTOR)', 'vhd', ('group-name', 'redundancy'),
         ('provisioning', 'monitor-db-quorum'), formats=False,
         quirks='XCP-ng. It cannot be probed; no changed-block tracking.'),
    Kind('lvm', 'local LVM', 'lvm', ('device',), shared=False, thin=False,
         quirks=_THICK, probe=('device',)),
    Kind('lvmoiscsi', 'LVM over iSCSI', 'lvm',
         ('target', 'targetIQN', 'SCSIid'),
         (*_ISCSI, 'allocation'), thin=False, quirks=_THICK,
         probe=('target', 'targetIQN', 'SCSIid')),
    Kind('lvmohba', 'LVM over FC', 'lvm', ('SCSIid',),
         ('allocation', 'device'), thin=False, quirks=_THICK,
         probe=('SCSIid',)),
    Kind('lvmofcoe', 'LVM over FCoE', 'lvm', ('SCSIid',),
         ('allocation', 'path'), thin=False,
         quirks=f'{_THICK} Older releases and XCP-ng.', probe=('SCSIid',)),
    Kind('gfs2', 'GFS2', 'qcow2', ('provider', 'SCSIid'),
         ('target', 'port', 'targetIQN', *CHAP, 'path'),
         quirks='XenServer with a licence, in a clustered pool.',
         probe=('provider', 'SCSIid'), probes_ext=True),
    Kind('hba', 'LUN-per-VDI over FC', 'lun', (), ('type',), thin=False,
         quirks=f'{_WHOLE} One SR for each type of adapter.'),
    Kind('iscsi', 'LUN-per-VDI over iSCSI', 'lun', ('target', 'targetIQN'),
         ('port', *CHAP, 'incoming_chapuser', 'incoming_chappassword',
          'multihomed', 'force_tapdisk'), thin=False, quirks=_WHOLE,
         probe=('target', 'targetIQN')),
    Kind('rawhba', 'LUN-per-VDI over FC, raw', 'lun', (), ('type',),
         thin=False, quirks=f'{_WHOLE} Discontinued.'),
    Kind('netapp', 'NetApp', 'array',
         ('target', 'username', 'password', 'aggregate'),
         ('FlexVols', 'allocation', 'asis', 'controlport', 'usehttps',
          *CHAP), quirks=_MODELLED,
         probe=('target', 'username', 'password', 'aggregate')),
    Kind('equal', 'EqualLogic', 'array',
         ('target', 'username', 'password', 'storagepool'),
         ('allocation', *CHAP),
         quirks=f'{_MODELLED} Where the snapshots of a volume use up their '
                'reserve (``snap-reserve-percentage`` in ``vdi_config``), '
                'the array takes the volume offline; by its own default it '
                'would delete the oldest.',
         probe=('target', 'username', 'password', 'storagepool'),
         # No snapshot may vanish by itself.
         vdi_config={'snap-depletion': 'volume-offline'}),
)
_BY_TYPE = {kind.type: kind for kind in KINDS}


def find(type: str) -> Kind:
    """Return the row of a type.

    :raises Invalid: volumes cannot lie on such an SR
    """
    # The driver of LVM answers to two spellings; only one can be created.
    name = type.strip().lower().replace('lvhd', 'lvm', 1)
    if name not in _BY_TYPE:
        raise errors.Invalid(
            f'SR type {type!r:.60} cannot hold volumes; these can: '
            f'{", ".join(_BY_TYPE)}'
        )
    return _BY_TYPE[name]


def _misplaced(
    missing: Iterable[str], device_config: Mapping[str, str]
) -> str:
    """Say where a missing key seems to stand; values are never told."""
    for key in missing:
        for other, value in device_config.items():
            if re.search(rf'[,; ]\s*{re.escape(key)}\s*=', value):
                return (
                    f'; {key} seems to stand in the value of {other}: give '
                    'each key an indented line of its own'
                )
    return ''


def is_secret(key: str) -> bool:
    """Say whether a key's value must not be shown."""
    return key.endswith('password')


def secrets(device_config: Mapping[str, str]) -> list[str]:
    """Return the values that must not be shown."""
    return [v for key, v in device_config.items() if is_secret(key)]


def shown(device_config: Mapping[str, str]) -> dict[str, str]:
    """Return the keys with every secret masked."""
    return {
        key: '***' if is_secret(key) else value
        for key, value in device_config.items()
    }


def table() -> Iterable[tuple[str, ...]]:
    """Yield the rows of the docs' table, its head first."""
    yield ('Type', 'Storage', 'Hosts', 'Space', 'Keys', 'To mind')
    for kind in KINDS:
        keys = [f'**{key}**' for key in kind.required]
        keys += kind.keys()[len(kind.required):]
        yield (
            f'``{kind.type}``', kind.name,
            'shared' if kind.shared else 'one host',
            'thin' if kind.thin else 'whole LUNs' if kind.family == 'lun'
            else 'thick', ', '.join(keys) or '–', kind.quirks,
        )
