# SPDX-License-Identifier: Apache-2.0
"""All layers of a pool and what needs them, as they were at one moment."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from volume.drivers.qcow_layers import Header


class Layer(NamedTuple):
    """A layer as its file says; without a header it is broken."""

    name: str
    header: Header | None
    allocated_bytes: int
    inode: int


class Tree:
    """All layers of a pool and what needs them, at one moment."""

    def __init__(
        self, layers: Iterable[Layer], pointers: Iterable[tuple[str, str]]
    ) -> None:
        self.layers = {layer.name: layer for layer in layers}
        self.names: dict[str, set[str]] = {}
        self.children: dict[str, set[str]] = {}
        for pointer, name in pointers:
            self.names.setdefault(name, set()).add(pointer)
        for layer in self.layers.values():
            if layer.header and layer.header.backing:
                self.children.setdefault(layer.header.backing, set()).add(
                    layer.name
                )

    def backing(self, name: str) -> str | None:
        layer = self.layers.get(name)
        return layer.header.backing if layer and layer.header else None

    def size_bytes(self, name: str) -> int:
        layer = self.layers.get(name)
        return layer.header.size_bytes if layer and layer.header else 0

    def allocated_bytes(self, name: str) -> int:
        return self.layers[name].allocated_bytes

    def chain(self, name: str | None) -> list[str]:
        """Return the names of a layer and of all that it stands on."""
        found: list[str] = []
        while name and name not in found:
            found.append(name)
            name = self.backing(name)
        return found

    def is_needed(self, name: str) -> bool:
        return bool(self.names.get(name) or self.children.get(name))

    def hidden(self) -> list[str]:
        """Return the layers that have no name of their own."""
        return [name for name in self.layers if not self.names.get(name)]

    def is_certain(self) -> bool:
        """Say whether all that is needed could be read.

        A layer whose header is broken may stand on any other.
        """
        return all(
            layer.header or not self.is_needed(name)
            for name, layer in self.layers.items()
        )

    def forget(self, name: str) -> None:
        """Take a layer out of the tree."""
        backing = self.backing(name)
        del self.layers[name]
        if backing:
            self.children[backing].discard(name)
