# SPDX-License-Identifier: Apache-2.0
"""What SR.probe answers, for every type.

A real driver answers an incomplete device_config by failing: what could
complete it is XML in the error. A complete one gives a list of the storage
repositories that are there already.
"""

import re
import xml.dom.minidom
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from volume.sim.xapi.published.smtypes import fault
from volume.sim.xapi.sm import arrays
from volume.sim.xapi.sm import fabric
from volume.sim.xapi.sm import groups
from volume.sim.xapi.world import Lun
from volume.sim.xapi.world import Share

if TYPE_CHECKING:
    from volume.sim.xapi.pool import Pool

Config: TypeAlias = dict[str, str]
# A name with a text, or with more of the same below it.
Node: TypeAlias = 'tuple[str, str | Sequence[Node]]'

UUID = re.compile(r'[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}')


def probe(
    pool: 'Pool', kind: str, host_ref: str, device_config: Config,
) -> str:
    """Answer SR.probe; secrets in ``device_config`` are in the clear.

    :raises Failure: with XML, when something is missing; 38 for types that
        cannot be probed
    """
    check(pool, kind, host_ref, device_config)
    answer = ANSWERS.get(kind)
    if answer is None:
        raise fault(38, f'{kind}: probe')
    return answer(pool, kind, host_ref, device_config)


def check(
    pool: 'Pool', kind: str, host_ref: str, device_config: Config,
) -> None:
    """Refuse an incomplete device_config as the driver's load() does.

    Creating, plugging and probing all come through here.

    :raises Failure: which key is missing, mostly with XML
    """
    CHECKS.get(kind, _nothing)(pool, kind, host_ref, device_config)


def pretty(root: str, nodes: Iterable[Node], spaced: bool = False) -> str:
    """Return XML as drivers print it, and as servers of Python 2 did."""
    document = xml.dom.minidom.Document()
    top = document.createElement(root)
    document.appendChild(top)
    _fill(document, top, nodes)
    text = document.toprettyxml()
    if spaced:
        text = re.sub(
            r'(?m)^(\t*)<(\w+)>([^<\n]*)</\2>$',
            r'\1<\2>\n\1\t\3\n\1</\2>', text,
        )
    return text


# -- what must be there ----------------------------------------------------


def _nothing(pool: 'Pool', kind: str, host_ref: str, config: Config) -> None:
    """Ask for nothing."""


def _needs(*wanted: tuple[str, int]) -> Callable[..., None]:
    """Make a check that wants keys, each missing with its own error."""
    def check_keys(
        pool: 'Pool', kind: str, host_ref: str, config: Config,
    ) -> None:
        for key, code in wanted:
            if not config.get(key):
                raise fault(code)
    return check_keys


def _check_nfs(
    pool: 'Pool', kind: str, host_ref: str, config: Config,
) -> None:
    if not config.get('server'):
        raise fault(102)
    version = config.get('nfsversion') or '3'
    if version not in ('3', '4', '4.0', '4.1'):
        raise fault(72, 'Invalid nfs version')
    shares = _answering(pool, 'nfs', config['server'], 108)
    if not config.get('serverpath'):
        raise fault(101, xml=_pretty(pool, 'nfs-exports', [
            ('Export', (
                ('Target', share.server),
                ('Path', share.path),
                ('Accesslist', share.access),
            ))
            for share in shares
        ]))


def _check_devices(
    pool: 'Pool', kind: str, host_ref: str, config: Config,
) -> None:
    devices = config.get('device', '')
    if not devices:
        raise fault(90)
    for device in devices.split(','):
        if not device.startswith('/'):
            raise fault(91, f'path is {device}')
    if kind == 'largeblock' and ',' in devices:
        raise fault(5010, 'exactly one device is wanted')


def _check_iscsi(
    pool: 'Pool', kind: str, host_ref: str, config: Config,
) -> None:
    address, port = fabric.portal(config)
    fabric.initiator(pool, host_ref)
    if not config.get('targetIQN'):
        found = [
            (target.address, target.port, target.iqn)
            for target in fabric.discover(pool.world, config)
        ]
        raise fault(96, xml=_pretty(pool, 'iscsi-target-iqns', [
            _target(index, *entry)
            for index, entry in enumerate([*found, (address, port, '*')])
        ]))
    if kind == 'lvmoiscsi' and not config.get('SCSIid'):
        luns = fabric.visible(pool, host_ref, kind, config)
        raise fault(107, xml=_pretty(pool, 'iscsi-target', [
            ('LUN', _lun(lun)) for lun in luns
        ]))


def _check_fabric(
    pool: 'Pool', kind: str, host_ref: str, config: Config,
) -> None:
    if config.get('SCSIid'):
        return
    wanted = 'fcoe' if kind == 'lvmofcoe' else 'any'
    found = fabric.bus(pool.world, pool.uuid, wanted)
    disks: list[Node] = [
        ('BlockDevice', (
            ('path', f'/dev/disk/by-scsid/{lun.scsi_id}'),
            ('numpaths', '1'),
            ('SCSIid', lun.scsi_id),
            ('vendor', lun.vendor),
            ('serial', lun.serial),
            ('size', str(lun.size_bytes)),
            ('adapter', str(adapter.number)),
            ('channel', '0'),
            ('id', '0'),
            ('lun', str(lun.lun_id)),
            ('hba', adapter.driver),
        ))
        for adapter, lun in found
        if not fabric.is_in_use(pool, lun.scsi_id)
    ]
    raise fault(107, xml=_pretty(pool, 'Devlist', disks + [
        ('Adapter', (
            ('host', adapter.host),
            ('name', adapter.driver),
            ('manufacturer', adapter.manufacturer),
            ('id', str(adapter.number)),
        ))
        for adapter in fabric.adapters(pool.world, pool.uuid, wanted)
    ]))


# -- what is there ---------------------------------------------------------


def _shares(
    pool: 'Pool', kind: str, host_ref: str, config: Config,
) -> str:
    """List the directories that are named by a uuid."""
    server, path = where(kind, config)
    share = mounted(pool, kind, server, path, config)
    top = pool.world.share_directory(
        share, path[len(share.path.rstrip('/')):]
    )
    nodes: list[Node] = [
        ('SR', (('UUID', uuid),)) for uuid in _uuids(top)
    ]
    if 'probeversion' in config and kind == 'nfs':
        nodes.append(('SupportedVersions', tuple(
            ('Version', version) for version in share.versions
        )))
    return _pretty(pool, 'SRlist', nodes)


def where(kind: str, config: Config) -> tuple[str, str]:
    """Return the server and the path that a device_config names."""
    if kind == 'smb':
        parts = config['server'].replace('\\', '/').lstrip('/').split('/')
        return parts[0], '/' + '/'.join(parts[1:])
    if kind == 'glusterfs':
        server, _, path = config['server'].partition(':')
        return server, '/' + path.lstrip('/')
    if kind == 'moosefs':
        return config['masterhost'], config.get('rootpath') or '/'
    return config['server'], config.get('serverpath') or '/'


def mounted(
    pool: 'Pool', kind: str, server: str, path: str, config: Config,
) -> Share:
    """Return the export that a mount of this would give.

    :raises Failure: 108 and 73 for nfs, 111 for the others, 72 for a
        version of nfs that the server does not speak
    """
    refused = 73 if kind == 'nfs' else 111
    _answering(pool, kind, server, 108 if kind == 'nfs' else 111)
    share = pool.world.share(kind, server, path)
    if share is None or share.is_refused:
        raise fault(refused, 'mount failed with return code 32')
    if share.user and (share.user, share.password) != (
        config.get('username', ''), config.get('password', ''),
    ):
        raise fault(refused, 'mount failed with return code 32')
    version = config.get('nfsversion') or '3'
    if (
        kind == 'nfs' and 'probeversion' not in config
        and version not in share.versions
        and version.partition('.')[0] not in share.versions
    ):
        raise fault(72, f'Required NFS server version {version} unsupported')
    return share


def _disks(pool: 'Pool', kind: str, host_ref: str, config: Config) -> str:
    """List the volume groups of the disks that are named."""
    host = pool.rows.field('host', host_ref, 'uuid')
    found: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    for path in config['device'].split(','):
        device = pool.world.device(host, path)
        uuid = groups.on_device(pool.world, host, path)
        if device and uuid:
            found.setdefault(uuid, []).append(path)
            sizes[uuid] = sizes.get(uuid, 0) + device.size_bytes
    return _pretty(pool, 'SRlist', [
        ('SR', (
            ('UUID', uuid),
            ('Devlist', ','.join(paths)),
            ('size', str(sizes[uuid])),
        ))
        for uuid, paths in found.items()
    ])


def _luns(pool: 'Pool', kind: str, host_ref: str, config: Config) -> str:
    """List the volume group of a LUN; a LUN in use is still told."""
    lun = fabric.named(
        fabric.visible(pool, host_ref, kind, config), config['SCSIid']
    )
    uuid = groups.on_lun(pool.world, lun.scsi_id)
    return _pretty(pool, 'SRlist', [
        ('SR', (
            ('UUID', uuid),
            ('Devlist', f'/dev/disk/by-id/scsi-{lun.scsi_id}'),
            ('size', str(lun.size_bytes)),
            ('name_label', ''),
            ('name_description', ''),
            ('pool_metadata_detected', 'false'),
        )),
    ] if uuid else [])


def _known_targets(
    pool: 'Pool', kind: str, host_ref: str, config: Config,
) -> str:
    """List the SRs of the database that use the target."""
    return _pretty(pool, 'SRlist', [
        ('SR', (
            ('UUID', uuid),
            ('Target', sm_config.get('target', '')),
            ('TargetIQN', sm_config['targetIQN']),
        ))
        for uuid, sm_config in _srs(pool)
        if sm_config.get('targetIQN') == config['targetIQN']
    ])


def _known_buses(
    pool: 'Pool', kind: str, host_ref: str, config: Config,
) -> str:
    """List the SRs of the database that are made of LUNs of adapters."""
    return _pretty(pool, 'SRlist', [
        ('SR', (('UUID', uuid),))
        for uuid, sm_config in _srs(pool)
        if sm_config.get('datatype') == 'HBA'
    ])


def _arrays(pool: 'Pool', kind: str, host_ref: str, config: Config) -> str:
    """List the SRs that an array's volumes belong to."""
    return _pretty(pool, 'SRlist', [
        ('SR', (('UUID', uuid),))
        for uuid in arrays.repositories(pool.world, kind, config)
    ])


def _empty(pool: 'Pool', kind: str, host_ref: str, config: Config) -> str:
    return ''


# -- smaller parts ---------------------------------------------------------


def _fill(
    document: xml.dom.minidom.Document, parent: xml.dom.minidom.Element,
    nodes: Iterable[Node],
) -> None:
    for name, value in nodes:
        element = document.createElement(name)
        parent.appendChild(element)
        if isinstance(value, str):
            element.appendChild(document.createTextNode(value))
        else:
            _fill(document, element, value)


def _pretty(pool: 'Pool', root: str, nodes: Iterable[Node]) -> str:
    return pretty(root, nodes, bool(pool.switch('spaced_xml')))


def _answering(
    pool: 'Pool', kind: str, server: str, code: int,
) -> list[Share]:
    shares = pool.world.shares(kind, server)
    if not shares or all(share.is_down for share in shares):
        raise fault(code)
    return shares


def _target(index: int, address: str, port: int, iqn: str) -> Node:
    return ('TGT', (
        ('Index', str(index)),
        ('IPAddress', address),
        *([('Port', str(port))] if port != fabric.DEFAULT_PORT else []),
        ('TargetIQN', iqn),
    ))


def _lun(lun: Lun) -> Sequence[Node]:
    """Return a LUN's facts; an empty one is left out, as by the driver."""
    facts = (
        ('vendor', lun.vendor),
        ('serial', lun.serial),
        ('LUNid', str(lun.lun_id)),
        ('size', str(lun.size_bytes)),
        ('SCSIid', lun.scsi_id),
    )
    return tuple(fact for fact in facts if fact[1])


def _srs(pool: 'Pool') -> list[tuple[str, dict[str, str]]]:
    return [
        (sr['uuid'], sr['sm_config'])
        for sr in (pool.rows.get('SR', ref) for ref in pool.rows.all('SR'))
    ]


def _uuids(directory: Path) -> list[str]:
    if not directory.is_dir():
        raise fault(73, 'mount failed with return code 32')
    return sorted(
        path.name for path in directory.iterdir()
        if UUID.fullmatch(path.name)
    )


CHECKS: dict[str, Callable[['Pool', str, str, Config], None]] = {
    'nfs': _check_nfs,
    'smb': _needs(('server', 102)),
    'cephfs': _needs(('server', 102), ('serverpath', 101)),
    'glusterfs': _needs(('server', 102)),
    'moosefs': _needs(('masterhost', 102), ('rootpath', 101)),
    'ext': _check_devices,
    'xfs': _check_devices,
    'largeblock': _check_devices,
    'lvm': _check_devices,
    'file': _needs(('location', 94)),
    'zfs': _needs(('location', 94)),
    'linstor': _needs(('group-name', 5004), ('redundancy', 5005)),
    'iscsi': _check_iscsi,
    'lvmoiscsi': _check_iscsi,
    'lvmohba': _check_fabric,
    'lvmofcoe': _check_fabric,
    'netapp': _needs(('target', 120), ('username', 121), ('password', 122)),
    'equal': _needs(('target', 160), ('username', 161), ('password', 162)),
}
ANSWERS: dict[str, Callable[['Pool', str, str, Config], str]] = {
    **dict.fromkeys(
        ('nfs', 'smb', 'cephfs', 'glusterfs', 'moosefs'), _shares),
    **dict.fromkeys(('ext', 'xfs', 'largeblock', 'lvm'), _disks),
    **dict.fromkeys(('lvmoiscsi', 'lvmohba', 'lvmofcoe'), _luns),
    'iscsi': _known_targets,
    'hba': _known_buses,
    'rawhba': _known_buses,
    'linstor': _empty,
    **dict.fromkeys(('netapp', 'equal'), _arrays),
}
