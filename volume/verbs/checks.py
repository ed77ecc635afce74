# SPDX-License-Identifier: Apache-2.0
"""Checks of what callers send: sizes, names, metadata, connectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from volume import errors
from volume import model
from volume import sizes

NAME_MAX = 255
METADATA_ITEMS_MAX = 128
HOST_KEYS = frozenset({'host', 'ip', 'initiator', 'nqn'})


def size(value: object, size_bytes_max: int) -> int:
    """Return a size in bytes.

    :raises Invalid: it is no positive whole number of sectors, or too large
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise errors.Invalid(f'size {value!r:.80} is not a whole number')
    if value <= 0:
        raise errors.Invalid(f'size {value!s:.80} must be greater than 0')
    if value > size_bytes_max:
        # Not shown: it may have thousands of digits.
        raise errors.Invalid(
            f'the size is over the limit of {sizes.exact(size_bytes_max)}'
        )
    if value % model.SECTOR_BYTES:
        raise errors.Invalid(
            f'size {value} must be a multiple of {model.SECTOR_BYTES} bytes'
        )
    return value


def text(value: object, what: str, length_max: int = NAME_MAX) -> str:
    """Return a name or description; ``None`` is empty.

    :raises Invalid: it is no text, too long, or has control characters
    """
    if value is None:
        return ''
    if not isinstance(value, str):
        raise errors.Invalid(f'{what} {value!r:.80} is not text')
    if len(value) > length_max:
        raise errors.Invalid(
            f'{what} has {len(value)} characters; {length_max} are allowed'
        )
    if any(ord(c) < 32 or 127 <= ord(c) < 160 for c in value):
        raise errors.Invalid(f'{what} has a control character in it')
    try:
        value.encode()
    except UnicodeEncodeError:
        raise errors.Invalid(f'{what} is not valid Unicode') from None
    return value


def renamed(was: str, name: str | None) -> None:
    """Refuse to take a name away; one that never had any needs none.

    :raises Invalid: the new name is empty
    """
    if was and name is not None and not name.strip():
        raise errors.Invalid(f'the new name of {was!r:.80} is empty')


def metadata(value: object) -> dict[str, str]:
    """Return metadata: at most 128 pairs of short texts.

    :raises Invalid: it is something else
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise errors.Invalid('metadata is not a set of keys and values')
    if len(value) > METADATA_ITEMS_MAX:
        raise errors.Invalid(
            f'metadata has {len(value)} items; '
            f'{METADATA_ITEMS_MAX} are allowed'
        )
    result = {}
    for key, item in value.items():
        if not text(key, 'a metadata key'):
            raise errors.Invalid('a metadata key is empty')
        result[key] = text(item, f'metadata {key}')
    return result


def connector(value: object) -> dict[str, Any]:
    """Return a connector: small JSON that names its host.

    :raises Invalid: it is something else, or names no host
    """
    if not isinstance(value, Mapping) or not value:
        raise errors.Invalid('the connector is not a set of properties')
    if len(value) > 64 or len(repr(value)) > 16384:
        raise errors.Invalid('the connector is too large')
    host = value.get('host')
    if not isinstance(host, str) or not host:
        raise errors.Invalid('the connector names no host')
    text(host, 'the connector\'s host')
    for key in 'ip', 'initiator', 'nqn':
        if not isinstance(value.get(key), str | None):
            raise errors.Invalid(
                f'the connector\'s {key} is {value[key]!r:.80}, which is no '
                'text: give one, or none'
            )
    return dict(value)


def host_of(properties: Mapping[str, Any]) -> model.Host:
    """Return who attaches, from a connector that was checked."""
    address = properties.get('ip')
    return model.Host(
        name=str(properties['host']),
        addresses=(address,) if isinstance(address, str) else (),
        iqn=properties.get('initiator') or None,
        nqn=properties.get('nqn') or None,
        properties={
            str(key): value for key, value in properties.items()
            if isinstance(value, str) and key not in HOST_KEYS
        },
    )
