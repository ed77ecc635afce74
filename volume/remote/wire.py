# SPDX-License-Identifier: Apache-2.0
"""What goes through the connection between a service and a node's agent.

The agent says ``MAGIC`` first, so that a shell's greeting is told from it.
Then both sides send frames: two lengths, a header that is JSON, and bytes.

* a request has an ``id``, ``do`` and ``args``; ``holds`` are the locks that
  it runs under;
* an answer has the ``id`` and a ``result``, or an ``error`` with a
  ``message``; before it may come parts of its bytes (``part``) and how far
  a command is (``percent``);
* without an ``id`` come ``hello``, ``ping``, ``cancel`` and ``release``.

Names that are no UTF-8 pass as Python has them, with lone surrogates.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from volume import errors
from volume.commands import CommandFailed
from volume.commands import Endless
from volume.machine import names
from volume.machine import qemulocks
from volume.machine import users

MAGIC = b'volnode1'
VERSION = 2
"""Of requests and answers; both sides must have the same."""

LENGTHS = struct.Struct('>II')
HEADER_BYTES_MAX = 8 << 20
PAYLOAD_BYTES_MAX = 4 << 20
PART_BYTES = 1 << 20
STDERR_BYTES_MAX = 64 << 10
MESSAGE_CHARS_MAX = 16 << 10
REQUESTS_MAX = 256
"""Begun and not answered; a service has fewer, an agent refuses more."""

PING_S = 10.0
SILENCE_S = 60.0
"""Who has heard nothing for so long takes the connection for dead."""

BY_NAME: Mapping[str, Callable[..., Any]] = {
    function.__name__: function for function in (
        names.about, names.exists, names.is_file, names.is_block, names.size,
        names.allocated, names.space, names.list_, names.older, names.mkdir,
        names.read, names.write, names.rename, names.unlink, names.readlink,
        names.point, names.link, names.hard_link, names.clone,
        qemulocks.probe, users.users,
    )
}
"""What is asked by a path; the agent does nothing else by a name."""

RESULTS: Mapping[str, type[Any]] = {
    'about': names.About, 'space': names.Space,
}
QUESTIONS = frozenset({
    'about', 'exists', 'is_file', 'is_block', 'size', 'allocated', 'space',
    'list_', 'older', 'read', 'readlink', 'probe', 'tickets', 'is_running',
    'users',
    'file.size', 'file.pread_into', 'file.find',
})
"""What changes nothing: without its answer nothing has happened."""

OPPOSITES: Mapping[str, str] = {
    'hold': 'release', 'borrow': 'release', 'open': 'file.close',
}
"""What gives back the number that a request was answered with."""

Header = dict[str, Any]


class Broken(Exception):
    """What came is no frame; nothing after it can be believed."""


def pack(header: Header, payload: Any = b'') -> tuple[bytes, memoryview]:
    """Return a frame: its beginning, and its bytes.

    :raises Invalid: it is too large to send
    """
    data = json.dumps(header, separators=(',', ':')).encode()
    view = memoryview(payload).cast('B')
    if len(data) > HEADER_BYTES_MAX or len(view) > PAYLOAD_BYTES_MAX:
        raise errors.Invalid(
            f'a message of {len(data)} and {len(view)} bytes is too large '
            f'for the connection to a node: {HEADER_BYTES_MAX} and '
            f'{PAYLOAD_BYTES_MAX} are the most'
        )
    return LENGTHS.pack(len(data), len(view)) + data, view


def receive(
    read_into: Callable[[memoryview], int],
) -> tuple[Header, bytearray] | None:
    """Read one frame; None if there is no other.

    :raises Broken: it is none, or it is cut off
    """
    lengths = bytearray(LENGTHS.size)
    if not fill(read_into, lengths, may_end=True):
        return None
    header_bytes, payload_bytes = LENGTHS.unpack(lengths)
    if header_bytes > HEADER_BYTES_MAX or payload_bytes > PAYLOAD_BYTES_MAX:
        raise Broken(
            f'a frame of {header_bytes} and {payload_bytes} bytes'
        )
    data, payload = bytearray(header_bytes), bytearray(payload_bytes)
    fill(read_into, data)
    fill(read_into, payload)
    try:
        header = json.loads(bytes(data))
    except (ValueError, RecursionError) as wrong:
        raise Broken(f'a header that is no JSON: {wrong}') from wrong
    if not isinstance(header, dict):
        raise Broken('a header that is no object')
    return header, payload


def fill(
    read_into: Callable[[memoryview], int],
    buffer: bytearray,
    may_end: bool = False,
) -> bool:
    """Read exactly so much; say whether it came, if it ``may_end`` before."""
    left = memoryview(buffer)
    while left:
        count = read_into(left)
        if not count:
            if may_end and len(left) == len(buffer):
                return False
            raise Broken('a frame that is cut off')
        left = left[count:]
    return True


def encode(value: Any) -> tuple[Any, Any]:
    """Return what a function has returned, as a result and bytes."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return None, value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.astuple(value), b''
    return value, b''


def decode(verb: str, result: Any, payload: bytearray) -> Any:
    """Return what ``encode`` was given."""
    if verb == 'read':
        return bytes(payload)
    kind = RESULTS.get(verb)
    return kind(*result) if kind and result is not None else result


def tell(failed: errors.VolumeError) -> Header:
    """Return an error as an answer has it."""
    told: Header = {
        'error': failed.kind, 'message': str(failed)[:MESSAGE_CHARS_MAX],
    }
    if isinstance(failed, CommandFailed):
        told['code'] = failed.code
        told['stderr'] = failed.stderr[-STDERR_BYTES_MAX:]
    return told


def rebuild(told: Header, argv: Sequence[str]) -> errors.VolumeError:
    """Return the error that an answer tells of."""
    kind, message = str(told['error']), str(told.get('message', ''))
    if kind == CommandFailed.__name__:
        return CommandFailed(argv, int(told['code']), str(told['stderr']))
    if kind == Endless.__name__:
        return Endless(message)
    return errors.rebuild(kind, message)
