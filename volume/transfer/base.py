# SPDX-License-Identifier: Apache-2.0
"""The contract of a source: where images come from and go to.

``stat`` is asked before a byte moves; ``open`` may be called again from an
offset after a connection was lost; ``put`` makes an image appear whole or
not at all.
"""

from __future__ import annotations

import abc
import dataclasses
import io
from contextlib import AbstractContextManager
from typing import Any, ClassVar

from oslo_config import cfg

from volume.node import Node

Opened = io.RawIOBase | io.BufferedIOBase
"""Bytes with ``readinto`` or ``write``; a reader that may wait for long has
``abort()``, too, which another thread may call."""


@dataclasses.dataclass(frozen=True, slots=True)
class ImageStat:
    """What a source says about an image.

    ``version`` changes when the bytes change (an ETag, or inode and mtime);
    empty if the source has none. ``path`` is where the image lies on this
    node, if it does, so that no copy of it is needed.
    """

    url: str
    size_bytes: int | None
    version: str = ''
    can_resume: bool = False
    path: str | None = None


class Source(abc.ABC):
    """Images of one URL scheme."""

    schemes: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[tuple[cfg.Opt, ...]] = ()

    @abc.abstractmethod
    def __init__(self, conf: Any, node: Node) -> None:
        """Keep the service's options and the node; touch nothing yet."""

    @abc.abstractmethod
    def stat(self, url: str) -> ImageStat:
        """Say how large the image is and which version.

        :raises Invalid: the URL is not allowed by policy, or malformed
        :raises NotFound: there is no such image
        :raises Unavailable: the source does not answer
        """

    @abc.abstractmethod
    def open(
        self, image: ImageStat, offset_bytes: int = 0
    ) -> AbstractContextManager[Opened]:
        """Open the image's bytes from an offset.

        :raises Conflict: the image has changed since ``stat``
        """

    @abc.abstractmethod
    def put(
        self, url: str
    ) -> AbstractContextManager[Opened]:
        """Open a new image for writing; it appears when the context ends well.

        :raises Unsupported: the source is for reading only
        :raises Conflict: an image is there already
        """
