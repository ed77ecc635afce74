# SPDX-License-Identifier: Apache-2.0
"""Which source has the images of a URL: by scheme, from entry points.

A source from another package is found by its entry point in the group
``volume.sources``, named by its scheme.
"""

from __future__ import annotations

import re
from typing import Any

import stevedore.extension

from volume import errors
from volume.node import Node
from volume.transfer.base import Source

GROUP = 'volume.sources'
SCHEME = re.compile(r'([a-zA-Z][a-zA-Z0-9+.-]{0,30}):')


class Sources:
    """The sources that are installed, each made when first asked for."""

    def __init__(self, conf: Any, node: Node) -> None:
        self.conf = conf
        self.node = node
        manager: Any = stevedore.extension.ExtensionManager(GROUP)
        self._classes: dict[str, type[Source]] = {
            name: extension.plugin
            for name, extension in manager.items()
        }
        self._made: dict[type[Source], Source] = {}

    def schemes(self) -> list[str]:
        """Return the schemes that are known, sorted."""
        return sorted(self._classes)

    def find(self, url: str) -> Source:
        """Return the source of a URL.

        :raises Invalid: no source has its scheme
        """
        found = SCHEME.match(url)
        scheme = found[1].lower() if found else ''
        cls = self._classes.get(scheme)
        if cls is None:
            raise errors.Invalid(
                f'image URL with scheme {scheme!r} has no source; known are '
                + ', '.join(self.schemes())
            )
        if cls not in self._made:
            self._made[cls] = cls(self.conf, self.node)
        return self._made[cls]
