# SPDX-License-Identifier: Apache-2.0
"""What SR, PBD and VDI calls have in common: what they refuse, and secrets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from volume.sim.xapi.failure import Failure
from volume.sim.xapi.published.smtypes import fault

if TYPE_CHECKING:
    from volume.sim.xapi.pool import Pool

PASSWORD, SECRET = 'password', '_secret'
INTERNAL_KEY = 'SRmaster'
# What XML 1.0 has no characters for.
ILLEGAL = re.compile('[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]')


def assert_type(pool: Pool, kind: str) -> None:
    """Refuse a type that this server has no driver for.

    :raises Failure: SR_UNKNOWN_DRIVER
    """
    if kind not in pool.profile.sm:
        raise Failure('SR_UNKNOWN_DRIVER', kind)


def assert_device_config(device_config: Mapping[str, str]) -> None:
    """Refuse a key that the server adds itself.

    :raises Failure: VALUE_NOT_SUPPORTED
    """
    if INTERNAL_KEY in device_config:
        raise Failure(
            'VALUE_NOT_SUPPORTED', INTERNAL_KEY, device_config[INTERNAL_KEY],
            'This key is for internal use only')


def assert_feature(pool: Pool, sr: str, feature: str) -> None:
    """Refuse what the type of an SR cannot do.

    :raises Failure: SR_OPERATION_NOT_SUPPORTED
    """
    kind = pool.rows.field('SR', sr, 'type')
    if feature not in features(pool, kind):
        raise Failure('SR_OPERATION_NOT_SUPPORTED', sr)


def features(pool: Pool, kind: str) -> Mapping[str, int]:
    """Return what a type can do; nothing for one that is unknown here."""
    known = pool.profile.sm.get(kind)
    return known.features if known is not None else {}


def assert_plugged(pool: Pool, sr: str) -> None:
    """Refuse an SR that is not plugged where it would be served.

    :raises Failure: SR_HAS_NO_PBDS
    """
    if not pool.sm.hosts(sr):
        raise Failure('SR_HAS_NO_PBDS', sr)


def assert_legible(*texts: str) -> None:
    """Refuse names that the drivers' XML cannot carry.

    :raises Failure: SR_BACKEND_FAILURE_447
    """
    for text in texts:
        if ILLEGAL.search(text):
            raise fault(447)


def with_secrets(
    pool: Pool, device_config: Mapping[str, str],
) -> dict[str, str]:
    """Return a device_config for one PBD: with secrets of its own.

    A password becomes a secret; a secret that is named already, a copy.
    """
    found = {}
    for key, value in device_config.items():
        if key.endswith(PASSWORD):
            found[f'{key}{SECRET}'] = _new_secret(pool, value)
        elif key.endswith(PASSWORD + SECRET):
            refs = pool.rows.find('secret', uuid=value)
            found[key] = _new_secret(
                pool, pool.rows.field('secret', refs[0], 'value'),
            ) if refs else value
        else:
            found[key] = value
    return found


def new_pbd(
    pool: Pool, sr: str, host: str, device_config: Mapping[str, str],
) -> str:
    """Add a PBD that is not plugged."""
    return pool.rows.new(
        'PBD', SR=sr, host=host, currently_attached=False,
        device_config=with_secrets(pool, device_config))


def destroy_pbd(pool: Pool, pbd: str) -> None:
    """Remove a PBD and the secrets that are its own."""
    config = pool.rows.field('PBD', pbd, 'device_config')
    for key, value in config.items():
        if key.endswith(SECRET):
            for secret in pool.rows.find('secret', uuid=value):
                pool.rows.delete('secret', secret)
    pool.rows.delete('PBD', pbd)


def active_vbds(pool: Pool, vdi: str) -> list[str]:
    """Return the VBDs that use a VDI now, or are about to."""
    rows = pool.rows
    return [
        vbd for vbd in rows.find('VBD', VDI=vdi)
        if rows.field('VBD', vbd, 'currently_attached')
        or pool.operations.current('VBD', vbd)
    ]


def _new_secret(pool: Pool, value: str) -> str:
    ref = pool.rows.new('secret', value=value)
    return str(pool.rows.field('secret', ref, 'uuid'))
