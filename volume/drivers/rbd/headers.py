# SPDX-License-Identifier: Apache-2.0
"""What an image's header says, read without opening the image.

librbd opens no image whose parent is lost, and none that it does not
understand; and its Python module fails at metadata that is no text. Any host
may write such metadata, and whose an image is must be known all the same.
"""

from __future__ import annotations

import json
from typing import Any

from volume import errors
from volume.drivers.rbd.wire import Wire

PREFIX = 'metadata_'
PAGE = 1000  # an OSD gives hardly more at once
PAGES_MAX = 20


def find(wire: Wire, pool: str, name: str) -> str | None:
    """Return the id of the image with this name, if it has a header.

    One whose making was cut off has a name, and no header.
    """
    try:
        # Four bytes of length, and the id.
        said = wire.ioctx(pool).read(f'rbd_id.{name}')[4:]
    except wire.rados.ObjectNotFound:
        return None
    image_id = said.decode('ascii', 'replace')
    return image_id if is_there(wire, pool, image_id) else None


def is_there(wire: Wire, pool: str, image_id: str) -> bool:
    """Say whether an image has a header."""
    try:
        wire.ioctx(pool).stat(_name(image_id))
    except wire.rados.ObjectNotFound:
        return False
    return True


def notes(wire: Wire, pool: str, image_id: str) -> dict[str, str]:
    """Return an image's metadata, but for keys that are no text.

    :raises Invalid: there is more than anybody reads
    """
    found: dict[str, bytes] = {}
    after = ''
    for _ in range(PAGES_MAX):
        page, count = _page(wire, pool, image_id, after)
        found.update(page)
        if count < PAGE:
            return {
                key.removeprefix(PREFIX): value.decode(errors='replace')
                for key, value in found.items()
            }
        after = max(page, default=after)
    raise errors.Invalid(
        f'image {image_id} of pool {pool} has over {PAGE * PAGES_MAX} '
        'entries of metadata, or as many that are no text: see what wrote '
        'them, and remove them'
    )


def note(wire: Wire, pool: str, image_id: str, key: str) -> str:
    """Return one entry of an image's metadata; nothing if it has none."""
    ioctx = wire.ioctx(pool)
    with wire.rados.ReadOpCtx() as op:
        rows, _ = ioctx.get_omap_vals_by_keys(op, (PREFIX + key,))
        ioctx.operate_read_op(op, _name(image_id))
        for _, value in rows:
            return bytes(value).decode(errors='replace')
    return ''


def parse(text: str) -> Any:
    """Return what a note holds; None if that is no JSON, or no text."""
    try:
        found = json.loads(text)
        json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    return found


# Ours alone.

def _page(
    wire: Wire, pool: str, image_id: str, after: str
) -> tuple[dict[str, bytes], int]:
    """Return what a page has, and how many there were with those passed."""
    ioctx = wire.ioctx(pool)
    page: dict[str, bytes] = {}
    count = 0
    with wire.rados.ReadOpCtx() as op:
        rows, _ = ioctx.get_omap_vals(op, after, PREFIX, PAGE)
        ioctx.operate_read_op(op, _name(image_id))
        while True:
            try:
                key, value = next(rows)
            except StopIteration:
                return page, count
            except UnicodeDecodeError:
                pass
            else:
                page[str(key)] = bytes(value)
            count += 1


def _name(image_id: str) -> str:
    return f'rbd_header.{image_id}'
