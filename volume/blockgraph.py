# SPDX-License-Identifier: Apache-2.0
"""QEMU's block nodes: checked on the way in, read back on the way out.

A chain of images becomes ``Layer`` objects with names that follow from what
they are (format, file, and the whole chain below), so that a restarted
service, or a restarted daemon, comes to the same names:

* ``n`` the top of a chain: it may be exported, and written to
* ``b`` a layer below one: read only, shared by all chains over it
* ``s`` an overlay that a snapshot puts over an open layer

So a name never means another chain, and a file that is written to as a top
cannot be opened below another one: QEMU's own lock refuses it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any

from volume import errors

DEPTH_MAX = 256
OUR_NAME = re.compile(r'[bns][0-9a-f]{30}')

# In a qcow2 header: where the name of the backing file is, and its length.
# The name lies in the first cluster, before 64 KiB.
BACKING_AT = struct.Struct('>8xQI')
HEADER_BYTES = 1 << 16
QCOW2_MAGIC = b'QFI\xfb'

# Formats whose headers may name a backing file.
BACKED = frozenset({'qcow', 'qcow2', 'qed', 'vmdk'})

# What a caller must not say: the first three are ours to set, the last two
# would open files behind the locks of others.
OURS = ('node-name', 'read-only', 'auto-read-only')
FORBIDDEN = ('force-share', 'locking')


@dataclasses.dataclass(frozen=True)
class Layer:
    """An image: a format over a file, over its backing layer.

    ``file`` are the options of the protocol node, ``options`` what else the
    caller said about the format.
    """

    driver: str
    file: Mapping[str, Any]
    options: Mapping[str, Any]
    backing: Layer | None

    @property
    def filename(self) -> str:
        """The path, or what stands for one where there is none."""
        name = self.file.get('filename')
        return name if isinstance(name, str) else _canonical(self.file)

    @functools.cached_property
    def digest(self) -> str:
        below = self.backing.digest if self.backing else ''
        text = _canonical([self.driver, dict(self.file), below])
        return hashlib.sha256(text.encode()).hexdigest()[:30]

    @property
    def name(self) -> str:
        """The node's name as the top of its chain."""
        return f'n{self.digest}'

    @property
    def name_below(self) -> str:
        """The node's name below another layer."""
        return f'b{self.digest}'

    @property
    def name_overlay(self) -> str:
        """The node's name if a snapshot has put it over an open layer."""
        return f's{_path_digest(self.filename)}'

    def chain(self) -> Iterator[Layer]:
        """Yield the layers from the top down."""
        layer: Layer | None = self
        while layer:
            yield layer
            layer = layer.backing

    def qapi(self, writable: bool) -> dict[str, Any]:
        """Return how QEMU opens it as the top, over the open one below."""
        return self._qapi(self.name, f'f{self.digest}', writable)

    def qapi_below(self) -> dict[str, Any]:
        """Return how QEMU opens it to lie below another layer."""
        return self._qapi(self.name_below, f'g{self.digest}', False)

    def reopen_qapi(self) -> dict[str, Any]:
        """Return how QEMU makes this open top writable."""
        return {**self.qapi(True), 'file': f'f{self.digest}'}

    def _qapi(
        self, name: str, file_name: str, writable: bool
    ) -> dict[str, Any]:
        node: dict[str, Any] = {
            **self.options, **_policy(), 'driver': self.driver,
            'node-name': name, 'read-only': not writable,
            'file': file_qapi(self.file, file_name),
        }
        if self.driver in BACKED:
            node['backing'] = self.backing and self.backing.name_below
        return node


def parse(blocknode: Mapping[str, Any]) -> Layer:
    """Return the checked layers of a ``BlockdevOptions`` dictionary.

    :raises Invalid: a format is not named, or an option is not allowed
    """
    return _parse(blocknode, DEPTH_MAX)


def overlay_qapi(path: str) -> dict[str, Any]:
    """Return how QEMU opens a qcow2 file that will be put on another.

    Its name is of another kind than a layer's: opened without what it lies
    on, it must never be taken for the whole image.
    """
    digest = _path_digest(path)
    file = {'driver': 'file', 'filename': path}
    return {
        **_policy(), 'driver': 'qcow2', 'node-name': f's{digest}',
        'read-only': False, 'backing': None,
        'file': file_qapi(file, f't{digest}'),
    }


def file_qapi(file: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return how QEMU opens a protocol node: locked, writable on demand."""
    node = {
        **file, **_policy(), 'node-name': name, 'auto-read-only': True,
    }
    if file['driver'] in ('file', 'host_device'):
        node['locking'] = 'on'
    return node


def check_header(layer: Layer, head: bytes) -> None:
    """Hold a layer against the first bytes of its qcow2 file.

    Served over another image than it was made for, or over none, its
    unwritten clusters would read as what nobody wrote.

    :raises Corrupt: it was made for another chain
    """
    if not head.startswith(QCOW2_MAGIC):
        return  # QEMU will not open it either, and says why
    offset, length = BACKING_AT.unpack_from(head.ljust(20, b'\0'))
    name = head[offset:offset + length]
    named = name.decode(errors='surrogateescape')
    if offset and (len(name) < length or not name or b'\0' in name):
        raise errors.Corrupt(
            f'{layer.filename} has a broken header: it names a backing file, '
            'but not which'
        )
    wanted = layer.backing.filename if layer.backing else ''
    if offset:
        directory = os.path.dirname(layer.filename)
        named = os.path.realpath(os.path.join(directory, named))
    if named != wanted:
        raise errors.Corrupt(
            f'{layer.filename} lies on {named or "nothing"} by its header, '
            f'but is to be opened over {wanted or "nothing"}'
        )


class Graph:
    """What the daemon has open at one moment: nodes and who uses them."""

    def __init__(self, graph: Mapping[str, Any], nodes: Any = ()) -> None:
        """Read ``x-debug-query-block-graph`` and, for what looks at files,
        ``query-named-block-nodes``."""
        names = {n['id']: n['name'] for n in graph['nodes']}
        users = {
            n['id'] for n in graph['nodes'] if n['type'] != 'block-driver'
        }
        self.names = frozenset(
            n['name'] for n in graph['nodes'] if n['id'] not in users
        )
        self._children: dict[str, dict[str, str]] = {}
        self._over: dict[str, list[str]] = {}
        for edge in graph['edges']:
            child = names[edge['child']]
            self._over.setdefault(child, []).append(edge['name'])
            if edge['parent'] not in users:
                parent = names[edge['parent']]
                self._children.setdefault(parent, {})[edge['name']] = child
        self._info = {n['node-name']: n for n in nodes}

    def is_used(self, name: str) -> bool:
        """Say whether an export or another layer stands on the node."""
        return bool(self._over.get(name))

    def is_backing(self, name: str) -> bool:
        """Say whether another layer stands on the node."""
        return 'backing' in self._over.get(name, ())

    def is_read_only(self, name: str) -> bool:
        return bool(self._info[name]['ro'])

    def image(self, name: str) -> Mapping[str, Any]:
        """Return what the daemon says about the image of a node."""
        image: Mapping[str, Any] = self._info[name]['image']
        return image

    def backing(self, name: str) -> str | None:
        return self._children.get(name, {}).get('backing')

    def chain(self, name: str) -> list[str]:
        """Return the names of a node and of all below it."""
        found = [name]
        while (below := self.backing(found[-1])) is not None:
            found.append(below)
        return found

    def filename(self, name: str) -> str:
        """Return the file under a layer; empty if there is none."""
        below = self._children.get(name, {}).get('file', name)
        return str(self._info.get(below, {}).get('file', ''))

    def files(self) -> frozenset[str]:
        """Return all files that are open."""
        return frozenset(
            str(info['file']) for name, info in self._info.items()
            if not self._children.get(name)
        )

    def layers_of(self, path: str) -> list[str]:
        """Return the names of the layers whose file this is."""
        return [
            name for name, children in self._children.items()
            if 'file' in children and self.filename(name) == path
        ]

    def orphans(self) -> list[str]:
        """Return the layers of ours that nobody uses."""
        return [
            name for name in self.names
            if OUR_NAME.fullmatch(name) and not self.is_used(name)
        ]


def _policy() -> dict[str, Any]:
    """Return what every node gets beside QEMU's defaults.

    Those are the host's cache, so that plain readers of the file see the
    same bytes; a flush is an fdatasync.
    """
    return {'discard': 'unmap'}


def _parse(blocknode: object, depth: int) -> Layer:
    if not depth:
        raise errors.Invalid(
            f'the chain of images has over {DEPTH_MAX} layers'
        )
    options = dict(_mapping(blocknode, 'a block node'))
    _refuse(options)
    driver = options.pop('driver')
    file = options.pop('file', None)
    backing = options.pop('backing', None)
    if file is None:
        # A protocol alone: its bytes are the volume's.
        leaf = {**options, 'driver': driver}
        return Layer('raw', _leaf(leaf), {}, None)
    if driver in BACKED and 'backing' not in _mapping(blocknode, ''):
        raise errors.Invalid(
            f'a {driver} block node must name its backing node, or null: '
            'what the header says is never followed'
        )
    if backing is not None and driver not in BACKED:
        raise errors.Invalid(f'a {driver} block node has no backing')
    for key in ('discard', 'cache'):
        options.pop(key, None)
    return Layer(
        driver, _leaf(file), options,
        None if backing is None else _parse(backing, depth - 1),
    )


def _leaf(file: object) -> dict[str, Any]:
    options = dict(_mapping(file, 'the file of a block node'))
    _refuse(options)
    for key in ('discard', 'cache'):
        options.pop(key, None)
    if 'file' in options:
        raise errors.Invalid(
            f'a block node of {options["driver"]} over another format'
        )
    if options['driver'] in ('file', 'host_device'):
        name = options.get('filename')
        if (
            not isinstance(name, str) or not os.path.isabs(name)
            or '\0' in name
        ):
            raise errors.Invalid(f'{name!r:.200} is no absolute path')
        # The file that the name means now: a pointer may move later.
        options['filename'] = os.path.realpath(name)
    return options


def _refuse(options: dict[str, Any]) -> None:
    if not isinstance(options.get('driver'), str):
        raise errors.Invalid(
            'a block node must name its driver: nothing is probed'
        )
    for key in FORBIDDEN:
        if key in options:
            raise errors.Invalid(f'a block node may not set {key}')
    for key in OURS:
        options.pop(key, None)


def _mapping(found: object, what: str) -> Mapping[str, Any]:
    if not isinstance(found, Mapping):
        raise errors.Invalid(f'{what} is {found!r:.80}, not a mapping')
    return found


def _path_digest(path: str) -> str:
    return hashlib.sha256(path.encode()).hexdigest()[:30]


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(',', ':'))
