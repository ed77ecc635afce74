# SPDX-License-Identifier: Apache-2.0
"""Networks: there is one, and NBD is served on it if it has the purpose."""

from __future__ import annotations

from typing import TYPE_CHECKING

from volume.sim.xapi.failure import Failure
from volume.sim.xapi.registry import call
from volume.sim.xapi.registry import Ctx

if TYPE_CHECKING:
    from volume.sim.xapi.pool import Pool

# A network is used for one of these or the other.
PURPOSES = {'nbd': 'insecure_nbd', 'insecure_nbd': 'nbd'}


@call('network.add_purpose')
def add_purpose(pool: Pool, ctx: Ctx, network: str, value: str) -> None:
    """Let a network be used for something.

    :raises Failure: NETWORK_INCOMPATIBLE_PURPOSES: some network is used for
        what does not go with it
    """
    for other in pool.rows.all('network'):
        if PURPOSES[value] in pool.rows.field('network', other, 'purpose'):
            raise Failure(
                'NETWORK_INCOMPATIBLE_PURPOSES', value, PURPOSES[value])
    with pool.rows.change('network', network, 'purpose') as purposes:
        if value not in purposes:
            purposes.append(value)


@call('network.remove_purpose')
def remove_purpose(pool: Pool, ctx: Ctx, network: str, value: str) -> None:
    """Let a network be used for something no more."""
    with pool.rows.change('network', network, 'purpose') as purposes:
        if value in purposes:
            purposes.remove(value)
