# SPDX-License-Identifier: Apache-2.0
"""A VDI's bytes, in, out, and which of them there are: part of a storage."""

from __future__ import annotations

import base64
import binascii
import contextlib
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager

from volume import errors
from volume import model
from volume.drivers import base
from volume.drivers.xensm import outgoing
from volume.drivers.xensm import vdis
from volume.drivers.xensm.incoming import VdiWriter
from volume.drivers.xensm.samples import Samples
from volume.drivers.xensm.storage import Storage
from volume.drivers.xensm.vdis import Thing
from volume.drivers.xensm.vdis import Vdi
from volume.xenapi import failures
from volume.xenapi import handlers

LOG = logging.getLogger(__name__)

# How far samples are read back where bytes come by an export.
NEAR_BYTES = 64 * model.MIB
CHANGED_BYTES = 1 << 16  # for each bit of a server's bitmap
BITMAP_BYTES_MAX = 1 << 26
# What the server answers when it has not tracked the changes.
UNTRACKED = ('VDI_NO_CBT_METADATA', 'SR_BACKEND_FAILURE_460')


class Streams(Storage):
    """An SR whose VDIs are read and filled through the pool."""

    def features(self) -> frozenset[str]:
        found = super().features()
        if self.kind.family == 'array':
            # The server tells nothing of an array's bytes but all of them.
            return found - {base.Extents.__name__}
        return found

    @contextlib.contextmanager
    def reader(self, source: Thing) -> Iterator[base.Reader]:
        vdi = self.need(source)
        with outgoing.reader(
            self.link, vdi.ref, vdi.size_bytes, _called(source)
        ) as reader:
            yield reader

    @contextlib.contextmanager
    def writer(self, volume: model.Volume) -> Iterator[base.Writer]:
        vdi = self.need(volume)
        self.refuse_plugged(vdi, 'fill')
        with contextlib.closing(
            VdiWriter(self.node, _Target(self, vdi, _called(volume)))
        ) as writer:
            yield writer

    def extents(
        self, source: Thing, since: model.Snapshot | None
    ) -> Iterator[model.Extent]:
        vdi, what = self.need(source), _called(source)
        if since is None:
            return iter([
                run for run in outgoing.allocated(
                    self.link, vdi.ref, vdi.size_bytes, what)
                if not run.is_zero
            ])
        before = self.need(since)
        if 'VDI_CONFIG_CBT' in self.abilities:
            try:
                return iter(self._tracked(before, vdi))
            except errors.VolumeError as failed:
                if failures.code(failed) not in UNTRACKED:
                    raise
                LOG.debug('%s: no changes tracked: %s', what, failed)
        return iter(outgoing.changed(
            self.link, vdi.ref, before.ref, vdi.size_bytes, what))

    def _tracked(self, before: Vdi, vdi: Vdi) -> list[model.Extent]:
        text = handlers.patiently(lambda: self.link.call(
            'VDI.list_changed_blocks', before.ref, vdi.ref))
        try:
            bitmap = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as failed:
            raise errors.Corrupt(
                f'the server tells the changes of {vdi.name} in no base64'
            ) from failed
        blocks = -(-vdi.size_bytes // CHANGED_BYTES)
        if not blocks <= len(bitmap) * 8 <= BITMAP_BYTES_MAX * 8:
            raise errors.Corrupt(
                f'the server tells of {len(bitmap) * 8} blocks of '
                f'{vdi.name}, which has {blocks}'
            )
        runs = list(runs_of(bitmap, vdi.size_bytes))
        if before.size_bytes < vdi.size_bytes:
            # It has grown since: what is new is told as changed, whole.
            grown = before.size_bytes // CHANGED_BYTES * CHANGED_BYTES
            runs = [run for run in (_until(r, grown) for r in runs) if run]
            runs.append(
                model.Extent(grown, vdi.size_bytes - grown, False))
        return runs


class _Target:
    """A VDI, as its writer sees it."""

    def __init__(self, storage: Storage, vdi: Vdi, name: str) -> None:
        self._storage = storage
        self._vdi = vdi
        self.name = name
        self.size_bytes = vdi.size_bytes
        # What an export's table shows is what was written, block by block.
        self._has_table = storage.kind.family not in ('array', 'lun')
        self._near_bytes = (
            None if storage.settings.read_back == 'whole' else NEAR_BYTES)
        # A VM that has it, plugged in or not, may have written to it.
        self.is_fresh = vdis.FRESH in vdi.keys and not vdis.guests(
            storage.link, vdi, is_plugged=False)

    def put(self, format: str, length_bytes: int) -> handlers.Upload:
        upload: handlers.Upload = handlers.patiently(
            lambda: handlers.put(
                self._storage.link, self._vdi.ref, format, length_bytes,
                self.name,
            )
        )
        return upload

    def reader(self) -> AbstractContextManager[base.Reader]:
        return outgoing.reader(
            self._storage.link, self._vdi.ref, self.size_bytes, self.name)

    def prove(self, samples: Samples) -> None:
        with self.reader() as reader:
            if self._has_table and isinstance(reader, outgoing.ExportReader):
                # To read far into an export is to read all that is before.
                samples.check_places(reader.extents(), self.name)
                samples.check(reader, self.name, self._near_bytes)
            else:
                samples.check(reader, self.name)

    def spoil(self) -> None:
        vdis.drop(self._storage.link, self._vdi.ref, [vdis.FRESH])
        self.is_fresh = False


def runs_of(bitmap: bytes, size_bytes: int) -> Iterator[model.Extent]:
    """Yield the runs whose bits are set; the first bit is the highest."""
    start = -1
    blocks = -(-size_bytes // CHANGED_BYTES)
    for block in range(blocks + 1):
        is_set = block < blocks and bool(
            bitmap[block // 8] & 0x80 >> block % 8)
        if is_set and start < 0:
            start = block
        elif not is_set and start >= 0:
            at = start * CHANGED_BYTES
            end = min(block * CHANGED_BYTES, size_bytes)
            yield model.Extent(at, end - at, False)
            start = -1


def _until(run: model.Extent, end: int) -> model.Extent | None:
    length = min(run.length_bytes, end - run.offset_bytes)
    if length <= 0:
        return None
    return model.Extent(run.offset_bytes, length, run.is_zero)


def _called(thing: Thing) -> str:
    return f'{type(thing).__name__.lower()} {thing.id}'
