# SPDX-License-Identifier: Apache-2.0
"""Bytes out of a VDI: by NBD where the pool offers it, else by an export.

NBD is read at any offset. An export goes forward, so that going back begins
it anew; as a VHD its empty blocks do not travel. Both tell what is zero
without reading it, by the table at the head of a VHD.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import quote

from volume import errors
from volume import model
from volume.drivers import base
from volume.drivers import generic
from volume.nbd import NbdClient
from volume.transfer import vhd_layout
from volume.transfer.vhd_stream import Stream
from volume.xenapi import handlers
from volume.xenapi.handlers import Download
from volume.xenapi.link import Link

NBD_S = 60.0
SKIP_BYTES = model.MIB


@contextlib.contextmanager
def reader(
    link: Link, vdi: str, size_bytes: int, what: str
) -> Iterator[base.Reader]:
    """Open a VDI for reading.

    :raises Busy: something writes to it
    """
    with contextlib.ExitStack() as stack:
        opened: base.Reader
        client = _by_nbd(link, vdi)
        if client is not None:
            stack.enter_context(contextlib.closing(client))
            opened = _NbdReader(link, vdi, client, what)
        else:
            opened = ExportReader(link, vdi, size_bytes, what)
        yield stack.enter_context(contextlib.closing(opened))


def allocated(link: Link, vdi: str, size_bytes: int, what: str) -> list[
    model.Extent
]:
    """Return runs that cover a VDI, by which of its blocks are in use."""
    if size_bytes > vhd_layout.DISK_BYTES_MAX:
        return [model.Extent(0, size_bytes, False)]
    with contextlib.closing(_get(link, vdi, 'vhd', what)) as export:
        stream = Stream(_Opened(export), name=what)
        return list(_clipped(stream.blocks(), size_bytes))


def changed(
    link: Link, vdi: str, since: str, size_bytes: int, what: str
) -> list[model.Extent]:
    """Return what a VDI has written since another, by an export's table.

    :raises Unsupported: the server cannot compare them
    """
    with contextlib.closing(
        _get(link, vdi, 'vhd', what, base=since)
    ) as export:
        stream = Stream(
            _Opened(export), name=what, takes_any_parent=True)
        return [
            run for run in _clipped(stream.blocks(), size_bytes)
            if not run.is_zero
        ]


class _NbdReader(generic.NbdReader):
    """Reads by NBD; what is zero is told by a VHD, if not by NBD."""

    def __init__(
        self, link: Link, vdi: str, client: NbdClient, what: str
    ) -> None:
        super().__init__(client)
        self._whence = link, vdi, what
        self._knows = client.knows_extents

    def extents(self) -> Iterator[model.Extent]:
        if self._knows:
            return super().extents()
        link, vdi, what = self._whence
        return iter(allocated(link, vdi, self.size_bytes, what))


class ExportReader(base.Reader):
    """Reads exports, one after the other if it must go back."""

    def __init__(
        self, link: Link, vdi: str, size_bytes: int, what: str
    ) -> None:
        self._link = link
        self._vdi = vdi
        self._what = what
        self._position = 0
        self._source: _Forward | None = None
        self.size_bytes = size_bytes

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._position = generic.moved(
            self._position, self.size_bytes, offset, whence)
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast('B')
        view = view[:max(0, self.size_bytes - self._position)]
        if not view:
            return 0
        if self._source is None or self._source.at > self._position:
            self._begin()
        assert self._source is not None
        self._source.read(self._position, view)
        self._position += len(view)
        return len(view)

    def extents(self) -> Iterator[model.Extent]:
        return iter(allocated(
            self._link, self._vdi, self.size_bytes, self._what))

    def abort(self) -> None:
        """Stop a read that is waiting, from another thread."""
        if self._source is not None:
            self._source.export.abort()

    def close(self) -> None:
        self._end()
        super().close()

    def _begin(self) -> None:
        self._end()
        is_vhd = self.size_bytes <= vhd_layout.DISK_BYTES_MAX
        export = _get(
            self._link, self._vdi, 'vhd' if is_vhd else 'raw', self._what)
        try:
            if is_vhd:
                self._source = _Vhd(export, self.size_bytes, self._what)
            else:
                self._source = _Forward(export, self._what)
        except BaseException:
            export.close()
            raise

    def _end(self) -> None:
        source, self._source = self._source, None
        if source is not None:
            source.export.close()


class _Forward:
    """The bytes of a raw export; ``at`` is the next of them."""

    def __init__(self, export: Download, what: str) -> None:
        self.export = export
        self.at = 0
        self._what = what

    def read(self, at: int, view: memoryview) -> None:
        """Fill the view with what is at an offset, not before ``self.at``."""
        while self.at < at:
            skipped = bytearray(min(SKIP_BYTES, at - self.at))
            self._fill(memoryview(skipped))
        self._fill(view)

    def _fill(self, view: memoryview) -> None:
        while view:
            count = self.export.readinto(view)
            if not count:
                raise errors.Corrupt(
                    f'the export of {self._what} ended at {self.at}')
            self.at += count
            view = view[count:]


class _Vhd(_Forward):
    """The disk in a VHD export, of which only what is not empty comes."""

    def __init__(self, export: Download, size_bytes: int, what: str) -> None:
        super().__init__(export, what)
        self._stream = Stream(_Opened(export), name=f'the export of {what}')
        if self._stream.size_bytes < size_bytes:
            raise errors.Corrupt(
                f'the export of {what} has {self._stream.size_bytes} bytes, '
                f'not {size_bytes}'
            )
        self._runs = self._stream.runs()
        self._run: tuple[int, memoryview] = 0, memoryview(b'')
        self._ended = False

    def read(self, at: int, view: memoryview) -> None:
        self.at = at
        while view:
            start, data = self._run
            if not self._ended and start + len(data) <= self.at:
                self._next()
                continue
            if self._ended or start > self.at:
                # Zeros up to the next run, or to the end.
                count = len(view)
                if not self._ended:
                    count = min(count, start - self.at)
                view[:count] = bytes(count)
            else:
                inside = self.at - start
                count = min(len(view), len(data) - inside)
                view[:count] = data[inside:inside + count]
            self.at += count
            view = view[count:]
        if self.at >= self._stream.size_bytes:
            # Its end is what proves that nothing is missing.
            while not self._ended:
                self._next()

    def _next(self) -> None:
        found = next(self._runs, None)
        if found is None:
            self._ended = True
            return
        if found[0] < self._run[0]:
            raise errors.Unsupported(
                f'the export of {self._what} has its blocks in no order')
        self._run = found


class _Opened(io.RawIOBase):
    """An export as what ``vhd_stream`` reads."""

    def __init__(self, export: Download) -> None:
        self._export = export

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        return self._export.readinto(buffer)


def _get(
    link: Link, vdi: str, format: str, what: str, base: str = ''
) -> Download:
    export: Download = handlers.patiently(
        lambda: handlers.get(link, vdi, format, what, base))
    return export


def _by_nbd(link: Link, vdi: str) -> NbdClient | None:
    """Return a connection to a host that serves the VDI, if one does."""
    try:
        offers = link.call('VDI.get_nbd_info', vdi)
    except errors.Unsupported:
        return None
    for offer in offers:
        with contextlib.suppress(errors.Unavailable):
            client: NbdClient = link.node.act(
                'xapi nbd', functools.partial(_connected, link, offer))
            return client
    return None


def _connected(link: Link, offer: Mapping[str, Any]) -> NbdClient:
    """Connect to an NBD server of the pool, by TLS if it has a certificate.

    :raises Unavailable: it does not answer, or is not who it must be
    """
    host = str(offer['address'])
    if ':' in host:
        host = f'[{host}]'
    name = quote(str(offer['exportname']), safe='')
    uri = f'nbd://{host}:{int(offer["port"])}/{name}'
    try:
        return NbdClient(uri, NBD_S, _secure(offer) if offer['cert'] else (
            None))
    except errors.VolumeError as failed:
        # The name of an export holds the session.
        raise errors.Unavailable(
            f'NBD of {host}: {link.clean(failed)}') from None


def _secure(
    offer: Mapping[str, Any]
) -> Callable[[socket.socket], socket.socket]:
    """Return how to put TLS on a connection; the pool's offer is trusted."""

    def wrap(sock: socket.socket) -> socket.socket:
        context = ssl.create_default_context(cadata=str(offer['cert']))
        return context.wrap_socket(
            sock, server_hostname=str(offer['subject']))

    return wrap


def _clipped(
    runs: Iterator[model.Extent], size_bytes: int
) -> Iterator[model.Extent]:
    for run in runs:
        length = min(run.length_bytes, size_bytes - run.offset_bytes)
        if length > 0:
            yield model.Extent(run.offset_bytes, length, run.is_zero)
