# SPDX-License-Identifier: Apache-2.0
"""The types of storage repositories, as ``SM`` records say them.

What a type can do, how it is configured and which errors it raises was
extracted by a script from the drivers' own source and stands in
``sm_drivers.json``. For three things there is no source, and the tables here
say so (``modelled``): the drivers for NetApp and EqualLogic arrays and for
StorageLink were never published, and neither was ``gfs2``. Those tables
follow the administrator's guides and what management clients ask for.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterable
from typing import Any

from volume.sim.xapi.failure import Failure
from volume.sim.xapi.failure import sm_failure

DATA = pathlib.Path(__file__).parents[1] / 'sm_drivers.json'

HEAD = 'sm_HEAD_4.1.x_2026'
XCPNG = 'xcpng_3.2.12-8.3_2025'
OLD = 'sm_v1.9.50_2015_regex'

# What the server knows; anything else that a driver says it drops.
KNOWN_FEATURES = frozenset({
    'SR_CREATE', 'SR_DELETE', 'SR_ATTACH', 'SR_DETACH', 'SR_SCAN',
    'SR_PROBE', 'SR_UPDATE', 'SR_SUPPORTS_LOCAL_CACHING', 'SR_METADATA',
    'SR_TRIM', 'SR_MULTIPATH', 'SR_CACHING', 'SR_STATS', 'VDI_CREATE',
    'VDI_DELETE', 'VDI_ATTACH', 'VDI_DETACH', 'VDI_MIRROR', 'VDI_MIRROR_IN',
    'VDI_RESIZE', 'VDI_RESIZE_ONLINE', 'VDI_CLONE', 'VDI_SNAPSHOT',
    'VDI_ACTIVATE', 'VDI_ACTIVATE_READONLY', 'VDI_DEACTIVATE', 'VDI_UPDATE',
    'VDI_INTRODUCE', 'VDI_GENERATE_CONFIG', 'VDI_ATTACH_OFFLINE',
    'VDI_RESET_ON_BOOT', 'VDI_CONFIG_CBT', 'VDI_COMPOSE', 'LARGE_VDI',
    'THIN_PROVISIONING', 'VDI_READ_CACHING', 'VDI_REVERT',
})

# By the driver's file: the type that a client names, and the plugin's file
# where that is not the driver's own. Types in two spellings (``lvhd``) are
# offered under the one that ``SR.create`` takes.
FILES = {
    'DummySR': ('dummy', ''),
    'EXTSR': ('ext', ''),
    'FileSR': ('file', ''),
    'HBASR': ('hba', ''),
    'ISOSR': ('iso', ''),
    'LVHDSR': ('lvm', 'LVMSR'),
    'LVHDoHBASR': ('lvmohba', 'LVMoHBASR'),
    'LVHDoISCSISR': ('lvmoiscsi', 'LVMoISCSISR'),
    'LVHDoFCoESR': ('lvmofcoe', 'LVMoFCoESR'),
    'NFSSR': ('nfs', ''),
    'ISCSISR': ('iscsi', ''),
    'RawISCSISR': ('iscsi', ''),
    'RawHBASR': ('rawhba', ''),
    'SHMSR': ('shm', ''),
    'SMBSR': ('smb', ''),
    'udevSR': ('udev', ''),
    'CephFSSR': ('cephfs', ''),
    'GlusterFSSR': ('glusterfs', ''),
    'MooseFSSR': ('moosefs', ''),
    'LargeBlockSR': ('largeblock', ''),
    'LinstorSR': ('linstor', ''),
    'XFSSR': ('xfs', ''),
    'ZFSSR': ('zfs', ''),
}

FAMILIES = {
    'file': (
        'nfs', 'smb', 'ext', 'xfs', 'largeblock', 'file', 'zfs', 'cephfs',
        'glusterfs', 'moosefs', 'linstor',
    ),
    'lvm': ('lvm', 'lvmoiscsi', 'lvmohba', 'lvmofcoe'),
    'lun': ('iscsi', 'hba', 'rawhba'),
    'array': ('netapp', 'equal'),
}
# Known by name, with an SM record, but nothing of them is simulated.
BARE = ('iso', 'udev', 'shm', 'dummy', 'tmpfs', 'cslg', 'gfs2')

LOCAL = frozenset({
    'ext', 'xfs', 'largeblock', 'file', 'zfs', 'lvm', 'udev', 'shm', 'dummy',
})
QCOW2 = frozenset({
    'nfs', 'ext', 'xfs', 'largeblock', 'file', 'zfs', 'lvm', 'lvmoiscsi',
    'lvmohba', 'lvmofcoe', 'cephfs', 'glusterfs', 'moosefs',
})

# The capabilities of these were never published: what their guides promise.
ARRAY = (
    'SR_PROBE', 'SR_UPDATE', 'VDI_CREATE', 'VDI_DELETE', 'VDI_ATTACH',
    'VDI_DETACH', 'VDI_CLONE', 'VDI_SNAPSHOT', 'VDI_RESIZE',
)
MODELLED: dict[str, dict[str, Any]] = {
    'netapp': {
        'file': 'NETAPPSR', 'name': 'NetApp', 'vendor': 'Citrix Systems Inc',
        'desc': 'SR plugin which represents LUNs on a NetApp filer as VDIs',
        'capabilities': ARRAY,
        'configuration': (
            ('target', 'IP address or hostname of the filer (required)'),
            ('username', 'The username of an administrator (required)'),
            ('password', 'The password of that administrator (required)'),
            ('aggregate', 'The aggregate to make FlexVols in (required)'),
            ('FlexVols', 'How many FlexVols to use, 1 to 32 (default 8)'),
            ('allocation', 'thick or thin (default thick)'),
            ('asis', 'Deduplicate: true or false; needs allocation=thin'),
            ('chapuser', 'The username for CHAP (optional)'),
            ('chappassword', 'The password for CHAP (optional)'),
            ('controlport', 'The port that the filer is managed on'),
            ('usehttps', 'Manage the filer by https: true or false'),
        ),
    },
    'equal': {
        'file': 'EQUALSR', 'name': 'EqualLogic',
        'vendor': 'Citrix Systems Inc',
        'desc': 'SR plugin which represents volumes of an EqualLogic group '
                'as VDIs',
        'capabilities': ARRAY,
        'configuration': (
            ('target', 'IP address of the group (required)'),
            ('username', 'The username of an administrator (required)'),
            ('password', 'The password of that administrator (required)'),
            ('storagepool', 'The storage pool to make volumes in (required)'),
            ('allocation', 'thick or thin (default thick)'),
            ('chapuser', 'The username for CHAP (optional)'),
            ('chappassword', 'The password for CHAP (optional)'),
        ),
    },
    'cslg': {
        'file': 'CSLGSR', 'name': 'CSLG', 'vendor': 'Citrix Systems Inc',
        'desc': 'SR plugin for arrays behind StorageLink',
        'capabilities': ARRAY,
        'configuration': tuple((key, '') for key in (
            'target', 'username', 'password', 'adapterid', 'storageSystemId',
            'storagePoolId', 'protocol', 'provision-type',
            'provision-options', 'raid-type', 'chapuser', 'chappassword',
        )),
    },
    'gfs2': {
        'file': 'org.xen.xapi.storage.gfs2', 'name': 'GFS2',
        'vendor': 'Citrix Systems Inc',
        'desc': 'Shared block storage with qcow2 disks in a clustered pool',
        'capabilities': (
            'SR_PROBE', 'VDI_CREATE', 'VDI_DELETE', 'VDI_ATTACH',
            'VDI_DETACH', 'VDI_ACTIVATE', 'VDI_DEACTIVATE', 'VDI_CLONE',
            'VDI_SNAPSHOT', 'VDI_RESIZE', 'LARGE_VDI', 'THIN_PROVISIONING',
        ),
        'configuration': tuple((key, '') for key in (
            'provider', 'SCSIid', 'target', 'port', 'targetIQN', 'chapuser',
            'chappassword', 'path',
        )),
        'cluster': ('corosync',),
    },
}


@dataclasses.dataclass(frozen=True)
class SmType:
    """One type of SR, as one kind of server has it."""

    type: str
    name: str
    description: str
    vendor: str
    version: str
    capabilities: tuple[str, ...]
    configuration: tuple[tuple[str, str], ...]
    plugin: str
    family: str
    modelled: bool = False
    image_formats: tuple[str, ...] = ()
    required_cluster_stack: tuple[str, ...] = ()

    @property
    def features(self) -> dict[str, int]:
        """Feature to its version: what ``SM.features`` says."""
        found: dict[str, int] = {}
        for capability in self.capabilities:
            name, _, version = capability.partition('/')
            if name in KNOWN_FEATURES:
                found[name] = int(version or 1)
        return dict(sorted(found.items()))

    @property
    def shared(self) -> bool:
        """Whether more than one host can see such storage."""
        return self.type not in LOCAL

    @property
    def keys(self) -> frozenset[str]:
        """The keys of a device_config that this type knows."""
        return frozenset(key for key, _ in self.configuration)

    def record(self) -> dict[str, Any]:
        """Return the fields of this type's ``SM`` record."""
        plugin = self.plugin
        if '.' not in plugin:
            plugin = f'/opt/xensource/sm/{plugin}'
        return {
            'name_label': self.name,
            'name_description': self.description,
            'type': self.type,
            'vendor': self.vendor,
            'copyright': f'(C) {self.vendor}',
            'version': self.version,
            'required_api_version': '1.0',
            'configuration': dict(self.configuration),
            'capabilities': [*self.features],
            'features': self.features,
            'driver_filename': plugin,
            'required_cluster_stack': [*self.required_cluster_stack],
            'supported_image_formats': [*self.image_formats],
            'other_config': {},
        }


def published(source: str, *only: str) -> dict[str, SmType]:
    """Return the types of a source tree by name; all, or ``only`` these."""
    found = {}
    for driver in data()['drivers'][source]:
        stem = pathlib.PurePath(driver['file']).stem
        if stem not in FILES:
            continue
        name, plugin = FILES[stem]
        if only and name not in only:
            continue
        found[name] = SmType(
            type=name,
            name=driver['name'],
            description=driver.get('desc') or driver['name'],
            vendor=driver['vendor'],
            version='1.0',
            capabilities=tuple(driver['capabilities']),
            configuration=keys(driver['configuration']),
            plugin=plugin or stem,
            family=family(name),
        )
    return found


def modelled(*names: str) -> dict[str, SmType]:
    """Return types whose drivers were never published."""
    found = {}
    for name in names:
        table = MODELLED[name]
        found[name] = SmType(
            type=name,
            name=table['name'],
            description=table['desc'],
            vendor=table['vendor'],
            version='1.0',
            capabilities=table['capabilities'],
            configuration=table['configuration'],
            plugin=table['file'],
            family=family(name),
            modelled=True,
            required_cluster_stack=table.get('cluster', ()),
        )
    return found


def with_formats(types: dict[str, SmType]) -> dict[str, SmType]:
    """Return the types as a server has them that knows qcow2."""
    return {
        name: dataclasses.replace(
            kind, image_formats=('vhd', 'raw', 'qcow2')
        ) if name in QCOW2 else kind
        for name, kind in types.items()
    }


def family(name: str) -> str:
    """Return which kind of manager serves a type."""
    for family_, names in FAMILIES.items():
        if name in names:
            return family_
    return 'bare'


def keys(configuration: Iterable[Any] | None) -> tuple[tuple[str, str], ...]:
    """Return (key, description) pairs; some drivers give one flat list."""
    listed = list(configuration or ())
    if listed and isinstance(listed[0], str):
        return ((listed[0], listed[1]),)
    return tuple((key, text) for key, text in listed)


def fault(code: int, opterr: str = '', xml: str = '') -> Failure:
    """Return a driver's error by number, in the driver's own words."""
    return sm_failure(code, errors()[code], opterr, xml)


@functools.cache
def errors() -> dict[int, str]:
    """Return each driver error's text by its number."""
    return {
        int(code): text
        for code, (_, text) in data()['sr_backend_errors_xcpng'].items()
    }


@functools.cache
def data() -> dict[str, Any]:
    """Return what was extracted from the drivers' sources."""
    loaded: dict[str, Any] = json.loads(DATA.read_text())
    return loaded
