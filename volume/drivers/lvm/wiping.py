# SPDX-License-Identifier: Apache-2.0
"""Zeros over a block device, watched, at the rate that its caller allows."""

from __future__ import annotations

import math
import time

from volume import errors
from volume import model
from volume import progress
from volume.drivers import generic
from volume.node import Node

# So large that it is quick, so small that a person who cancels need not
# wait for a slow disk.
CHUNK_BYTES = 16 * model.MIB


def wipe(
    node: Node,
    path: str,
    start_bytes: int,
    end_bytes: int,
    limit_s: float = math.inf,
) -> int:
    """Make a run of a device read as zeros, durably; say up to where.

    That is its end, unless there is a limit: with that at least one piece
    is done, and none is begun when it has passed.

    :raises Unavailable: the device is shorter than that
    """
    with generic.open_device(node, path, 'rb+') as file:
        if file.size_bytes < end_bytes:
            raise errors.Unavailable(
                f'{path} has {file.size_bytes} bytes, not {end_bytes}: '
                'something else is there by this name'
            )
        at, late = start_bytes, time.monotonic() + limit_s
        while at < end_bytes:
            count = min(CHUNK_BYTES, end_bytes - at)
            file.zero_out(at, count)
            at += count
            progress.tell(at - start_bytes, end_bytes - start_bytes)
            progress.pace(count)
            if time.monotonic() >= late:
                break
        file.sync()
    return at
