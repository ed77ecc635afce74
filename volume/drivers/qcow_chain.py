# SPDX-License-Identifier: Apache-2.0
"""The chain of layers under a volume: opened, frozen, followed by a daemon.

All of it under the pool's lock.
"""

from __future__ import annotations

from typing import Any

from volume import errors
from volume.drivers import qcow_layers
from volume.drivers.qcow_layers import FORMATS
from volume.drivers.qcow_layers import Header
from volume.drivers.qcow_pool import PoolDirectory

Chain = list[tuple[str, Header]]


def opened(pool: PoolDirectory, layer: str, is_volume: bool) -> Chain:
    """Return the layers of what is going to be opened, left alone by us."""
    if is_volume:
        catch_up(pool, layer)
    pool.end_merges(name for name, _ in pool.chain(layer))
    return pool.chain(layer)  # what was merged until now is out of it


def blocknode(
    pool: PoolDirectory, chain: Chain, is_writable: bool
) -> dict[str, Any]:
    """Return how QEMU opens a chain, with nothing left for it to guess."""
    node: dict[str, Any] | None = None
    for name, _ in reversed(chain):
        is_top = name == chain[0][0]
        extension = qcow_layers.extension(name)
        options = {
            'read-only': not (is_top and is_writable), 'discard': 'unmap',
        }
        below = {'backing': node} if extension in ('qcow2', 'vmdk') else {}
        node = {
            'driver': FORMATS[extension].driver, **options, **below,
            'file': {
                'driver': 'file', 'filename': pool.layer_path(name),
                **options,
            },
        }
    assert node is not None
    return node


def freeze(
    pool: PoolDirectory, pointer: str, depth_max: int,
    keeps_size: bool = False,
) -> str:
    """Return a layer with a volume's bytes that nobody writes to.

    With ``keeps_size`` it has the volume's size, and not a smaller one.

    :raises Busy: something that we cannot tell of it writes to the volume
    """
    active, volume_id = pool.target(pointer), pointer.partition('/')[2]
    assert active is not None
    if pool.is_mapped(volume_id):
        raise errors.Busy(
            f'volume {volume_id} is attached by its path: QEMU cannot be '
            'told of a snapshot; detach it first'
        )
    catch_up(pool, active)
    is_live = pool.is_served(active)

    def refuse_writers() -> None:
        if pool.is_written(active):
            raise errors.Busy(
                f'a process that is not ours writes to volume {volume_id}'
            )

    if not is_live:
        pool.insist([active], refuse_writers)
    header = pool.header(active)
    if not is_live:
        # A volume that is copied again and again stands on few layers only.
        if header.backing and pool.is_empty(active, header):
            below = pool.header(header.backing)
            if below.size_bytes == header.size_bytes or not keeps_size:
                return header.backing
    check_depth(pool, active, depth_max, volume_id)
    overlay = pool.overlay(active, header.size_bytes)
    pool.point(pointer, overlay)
    if is_live and pool.node.blockd:
        pool.node.blockd.snapshot(
            pool.layer_path(active), pool.layer_path(overlay)
        )
    return active


def catch_up(pool: PoolDirectory, active: str) -> None:
    """Tell the daemon of an overlay that it was not told of.

    It then has the layer below on top, which has no name, and on which
    nothing else stands.
    """
    below = pool.header(active).backing
    if below is None or not is_top(pool, below) or is_top(pool, active):
        return
    tree = pool.tree()
    if not tree.names.get(below) and tree.children[below] == {active}:
        assert pool.node.blockd is not None
        pool.node.blockd.snapshot(
            pool.layer_path(below), pool.layer_path(active)
        )


def is_top(pool: PoolDirectory, layer: str) -> bool:
    """Say whether the block daemon exports just this layer."""
    blockd = pool.node.blockd
    return blockd is not None and pool.is_used(layer) and blockd.is_top(
        blocknode(pool, pool.chain(layer), False)
    )


def check_depth(
    pool: PoolDirectory, below: str, depth_max: int, volume_id: str
) -> None:
    """Refuse one more layer on a chain that has as many as it may."""
    if len(pool.chain(below)) >= depth_max:
        raise errors.Invalid(
            f'volume {volume_id} stands on {depth_max} layers, which is the '
            'limit (max_depth): delete snapshots, or run `volume flatten '
            f'{volume_id}`'
        )
