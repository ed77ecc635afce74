# SPDX-License-Identifier: Apache-2.0
"""Disks that came by a network: are they the volume, and may they go?

Nothing is taken for the volume because of its name or place: a disk must say
of itself the identity that comes from the volume's id. LUNs are used again,
and what one pointed to yesterday is another's today.
"""

from __future__ import annotations

import errno
import logging
import re
import time
from collections.abc import Callable, Sequence

from volume import errors
from volume import identity
from volume.node import Node
from volume.node import Op

LOG = logging.getLogger(__name__)

RETURN_S = 15.0  # of a server that is started anew, or a short cut
FREE_S = 5.0  # until who only looked has closed it
POLL_S = 0.2
SECTOR_BYTES = 512
LOOKER = re.compile(
    r'((lv|vg|pv)[a-z]*|blkid|udevadm|dmsetup|kpartx|multipath|mdadm) '
    r'\(pid \d+\)'
)
GONE = (errno.ENXIO, errno.ENODEV)  # what an open says of such a device


def check_scsi(node: Node, name: str, volume_id: str) -> None:
    """Prove that a SCSI disk is the volume.

    :raises Conflict: it is another
    """
    base = f'/sys/block/{name}/device'
    # Four bytes of header, then the text.
    page = node.read(f'{base}/vpd_pg80')
    serial = page[4:].decode(errors='replace').strip('\0 ')
    wwid, = node.configure([Op.get(f'{base}/wwid')])
    expected = identity.scsi_serial(volume_id)
    naa = identity.scsi_naa(volume_id)
    if serial != expected or wwid != f'naa.{naa}':
        raise _another(name, volume_id, f'{serial!r:.60}, {wwid!r:.60}')


def check_nvme(node: Node, name: str, volume_id: str) -> None:
    """Prove that an NVMe namespace is the volume.

    :raises Conflict: it is another
    """
    uuid, nguid = node.configure([
        Op.get(f'/sys/block/{name}/{key}') for key in ('uuid', 'nguid')
    ])
    said = str(nguid).replace('-', '').lower()
    if uuid != identity.nvme_uuid(volume_id) or (
        said != identity.nvme_nguid(volume_id)
    ):
        raise _another(name, volume_id, f'{uuid!r:.60}, {nguid!r:.60}')


def _another(name: str, volume_id: str, said: str) -> errors.Conflict:
    return errors.Conflict(
        f'{name} is not volume {volume_id}: it says that it is {said}; it '
        'was let go, and not a byte of it was read'
    )


def size_bytes(node: Node, name: str) -> int:
    """Return how large the kernel takes a disk for."""
    text, = node.configure([Op.get(f'/sys/block/{name}/size')])
    return int(str(text)) * SECTOR_BYTES if text else 0


def check_size(node: Node, name: str, volume_id: str, at_least: int) -> None:
    """
    :raises Conflict: the disk is smaller than the volume
    """
    found = size_bytes(node, name)
    if found < max(at_least, 1):
        raise errors.Conflict(
            f'{name} has {found} bytes, and volume {volume_id} {at_least}: '
            'its node has to be looked at'
        )


def await_return(
    volume_id: str, is_away: Callable[[], bool], return_s: float
) -> None:
    """Give the ways to a disk time to come back, if all of them are down.

    Whoever has written to it and is gone may have left what only they can
    take; after that time it is lost, as if the access had ended.
    """
    late = time.monotonic() + return_s
    while is_away():
        if time.monotonic() >= late:
            LOG.warning(
                'volume %s is not reached, and is let go of: what this host '
                'had not written by now is lost', volume_id,
            )
            return
        time.sleep(POLL_S)


def need_free(
    node: Node, path: str, volume_id: str, known: Sequence[int] = ()
) -> None:
    """See that nobody uses a device, or a file of which something is known.

    :raises Busy: somebody does; the message says who
    """
    late = time.monotonic() + FREE_S
    while users := node.users(path, known):
        if time.monotonic() > late:
            raise _used(path, volume_id, users)
        time.sleep(POLL_S)


def need_unused(node: Node, path: str, volume_id: str) -> None:
    """See that nobody uses a device but those that look at each new one.

    :raises Busy: somebody does; the message says who
    """
    users = [
        each for each in node.users(path) if not LOOKER.fullmatch(each)
    ]
    if users:
        raise _used(path, volume_id, users)


def _used(path: str, volume_id: str, users: Sequence[str]) -> errors.Busy:
    return errors.Busy(
        f'volume {volume_id} is used here ({path}): {", ".join(users)}; end '
        'that first'
    )


def flush(node: Node, path: str, volume_id: str) -> None:
    """Have written what this host still keeps in memory.

    For a device with nothing behind it any more there is nothing to be done.

    :raises Unavailable: it cannot be; nothing was let go of
    """
    try:
        with node.open(path) as device:
            device.sync()
    except errors.NotFound:
        return
    except errors.VolumeError as failed:
        if getattr(failed.__cause__, 'errno', 0) in GONE:
            return
        raise errors.Unavailable(
            f'what was written to volume {volume_id} cannot be stored '
            f'({failed}); see to its node, or end its access with "volume '
            'force-detach" and lose it'
        ) from failed
    node.run('blockdev', '--flushbufs', path, timeout_s=300.0)


def remove(node: Node, names: Sequence[str]) -> None:
    """Take SCSI disks out of the kernel."""
    for name in names:
        path = f'/sys/block/{name}/device/delete'
        try:
            node.configure([Op.put(path, '1')])
        except errors.VolumeError:
            if node.exists(path):
                raise  # else it has gone by itself


def rescan(node: Node, names: Sequence[str]) -> None:
    """Have the kernel ask SCSI disks for their size."""
    node.configure([
        Op.put(f'/sys/block/{name}/device/rescan', '1') for name in names
    ])
