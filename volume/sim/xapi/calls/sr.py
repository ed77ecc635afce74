# SPDX-License-Identifier: Apache-2.0
"""Storage repositories: made, introduced, probed, scanned, forgotten."""

from __future__ import annotations

import contextlib
import threading
import uuid as uuids
from typing import TYPE_CHECKING

from volume.sim.xapi import registry
from volume.sim.xapi.failure import Failure
from volume.sim.xapi.objects import storage
from volume.sim.xapi.published import datamodel
from volume.sim.xapi.registry import call
from volume.sim.xapi.registry import Ctx
from volume.sim.xapi.sm import probes
from volume.sim.xapi.sm import sync
from volume.sim.xapi.sm.host import mapped

if TYPE_CHECKING:
    from volume.sim.xapi.pool import Pool

UNKNOWN_SIZE = -1  # of an SR that was never seen by its driver


@call('SR.create')
def create(
    pool: Pool, ctx: Ctx, host: str, device_config: dict[str, str],
    physical_size: int, name_label: str, name_description: str, kind: str,
    content_type: str, shared: bool, sm_config: dict[str, str] | None = None,
) -> str:
    """Format an SR, and plug it as far as that goes.

    A plug that fails is not told: its PBD stays unplugged.
    """
    kind = kind.lower()
    pool.rows.field('host', host, 'uuid')
    storage.assert_type(pool, kind)
    storage.assert_device_config(device_config)
    storage.assert_legible(name_label, name_description)
    hosts = [host]
    if shared:
        others = [each for each in pool.hosts if each != pool.master]
        hosts = [pool.master, *others]
    sr = pool.rows.new(
        'SR', name_label=name_label, name_description=name_description,
        type=kind, content_type=content_type, shared=shared,
        sm_config=sm_config or {}, physical_size=0)
    pbds = [
        storage.new_pbd(pool, sr, each, device_config) for each in hosts]
    try:
        _format(pool, sr, pbds[0])
    except BaseException:
        for pbd in pbds:
            storage.destroy_pbd(pool, pbd)
        pool.rows.delete('SR', sr)
        raise
    for pbd in pbds:
        try:
            with pool.operations.sr(ctx, sr, 'plug'):
                pool.sm.plug(pbd)
        except Failure:
            continue
    if pool.sm.hosts(sr):
        _scan(pool, sr)
    return sr


def _format(pool: Pool, sr: str, pbd: str) -> None:
    row, plan = pool.rows.get('SR', sr), pool.rows.get('PBD', pbd)
    with mapped():
        manager = pool.sm.fresh(
            row['type'], row['uuid'], plan['device_config'],
            row['sm_config'], plan['host'])
        manager.create()
    pool.rows.update('SR', sr, sm_config=manager.sm_config)


@call('SR.make')
def make(pool: Pool, ctx: Ctx, *args: object) -> str:
    """Refuse: nobody should call it since 2007."""
    raise Failure('MESSAGE_DEPRECATED')


@call('SR.introduce')
def introduce(
    pool: Pool, ctx: Ctx, uuid: str, name_label: str, name_description: str,
    kind: str, content_type: str, shared: bool,
    sm_config: dict[str, str] | None = None,
) -> str:
    """Add the row of an SR that there may be somewhere."""
    uuid = uuid or str(uuids.uuid4())
    with pool.rows.lock:
        if pool.rows.find('SR', uuid=uuid):
            raise Failure('SR_UUID_EXISTS', uuid)
        return pool.rows.new(
            'SR', uuid=uuid, name_label=name_label,
            name_description=name_description, type=kind.lower(),
            content_type=content_type, shared=shared,
            sm_config=sm_config or {}, physical_size=UNKNOWN_SIZE,
            physical_utilisation=UNKNOWN_SIZE)


@call('SR.probe')
def probe(
    pool: Pool, ctx: Ctx, host: str, device_config: dict[str, str],
    kind: str, sm_config: dict[str, str] | None = None,
) -> str:
    """Ask a driver what there is; mostly, it answers by failing."""
    kind = kind.lower()
    pool.rows.field('host', host, 'uuid')
    storage.assert_type(pool, kind)
    storage.assert_device_config(device_config)
    return probes.probe(pool, kind, host, pool.sm.in_clear(device_config))


@call('SR.probe_ext')
def probe_ext(
    pool: Pool, ctx: Ctx, host: str, device_config: dict[str, str],
    kind: str, sm_config: dict[str, str] | None = None,
) -> list[dict[str, str]]:
    """Refuse: only drivers of the newer kind can answer it."""
    storage.assert_type(pool, kind.lower())
    storage.assert_device_config(device_config)
    raise Failure('SR_OPERATION_NOT_SUPPORTED')


@call('SR.scan')
def scan(pool: Pool, ctx: Ctx, sr: str) -> None:
    """Make the rows of the VDIs what the driver finds."""
    pool.rows.field('SR', sr, 'uuid')
    storage.assert_plugged(pool, sr)
    with pool.operations.sr(ctx, sr, 'scan'):
        storage.assert_plugged(pool, sr)
        _scan(pool, sr)


def _scan(pool: Pool, sr: str) -> None:
    with pool.sm.serving(sr) as manager:
        sync.replace_all(pool, sr, manager.scan())
        sync.sizes(pool, sr, manager)
    with pool.rows.change('SR', sr, 'other_config') as config:
        config.pop('dirty', None)
    pool.sm.kick(sr)


@registry.daemon
def _scan_by_itself(pool: Pool) -> registry.Stop:
    """Scan SRs that want it, again and again."""
    thread = threading.Thread(
        target=_scan_on, args=(pool,), name='xapi-auto-scan', daemon=True)
    thread.start()
    return thread.join


def _scan_on(pool: Pool) -> None:
    while not pool.stopping.wait(pool.limits.auto_scan_s):
        for sr in pool.rows.all('SR'):
            with contextlib.suppress(Failure):
                config = pool.rows.field('SR', sr, 'other_config')
                if config.get('auto-scan') == 'true' or 'dirty' in config:
                    scan(pool, _nobody(pool), sr)
                    pool.rows.flush()


def _nobody(pool: Pool) -> Ctx:
    """Return the context of what the server does by itself."""
    session = registry.Session('', datamodel.ROLES[-1], is_local_root=True)
    return Ctx(session, pool.master, f'OpaqueRef:{uuids.uuid4()}')


@call('SR.update')
def update(pool: Pool, ctx: Ctx, sr: str) -> None:
    """Look at the sizes again; nothing is locked for it."""
    pool.rows.field('SR', sr, 'uuid')
    storage.assert_feature(pool, sr, 'SR_UPDATE')
    storage.assert_plugged(pool, sr)
    with pool.sm.serving(sr) as manager:
        manager.assert_online()
        sync.sizes(pool, sr, manager)


@call('SR.forget')
def forget(pool: Pool, ctx: Ctx, sr: str) -> None:
    """Remove the rows of an SR; its data stays where it is."""
    pool.rows.field('SR', sr, 'uuid')
    _assert_unplugged(pool, sr)
    with pool.operations.sr(ctx, sr, 'forget'):
        _assert_unplugged(pool, sr)
        _forget(pool, sr)


@call('SR.destroy')
def destroy(pool: Pool, ctx: Ctx, sr: str) -> None:
    """Remove an SR and what is in it; no VDI may be left."""
    _assert_destroyable(pool, sr)
    with pool.operations.sr(ctx, sr, 'destroy'):
        _assert_destroyable(pool, sr)
        _delete(pool, sr)
        _forget(pool, sr)


def _assert_unplugged(pool: Pool, sr: str) -> None:
    rows = pool.rows
    if any(
        rows.field('PBD', pbd, 'currently_attached')
        for pbd in rows.find('PBD', SR=sr)
    ):
        raise Failure('SR_HAS_PBD', sr)


def _assert_destroyable(pool: Pool, sr: str) -> None:
    rows = pool.rows
    row = rows.get('SR', sr)
    _assert_unplugged(pool, sr)
    if not row['PBDs']:
        raise Failure('SR_HAS_NO_PBDS', sr)
    if row['other_config'].get('indestructible') == 'true':
        raise Failure('SR_INDESTRUCTIBLE', sr)
    for vdi in row['VDIs']:
        if (
            rows.field('VDI', vdi, 'managed')
            and rows.field('VDI', vdi, 'type') != 'rrd'
        ):
            raise Failure('SR_NOT_EMPTY')
    for host in pool.hosts:
        if rows.field('host', host, 'local_cache_sr') == sr:
            raise Failure('SR_IS_CACHE_SR', host)


def _delete(pool: Pool, sr: str) -> None:
    """Have the driver remove it, plugged for the time of it."""
    rows = pool.rows
    pbds = rows.find('PBD', SR=sr)
    at_master = [
        pbd for pbd in pbds if rows.field('PBD', pbd, 'host') == pool.master]
    plan = rows.get('PBD', (at_master or pbds)[0])
    row = rows.get('SR', sr)
    with mapped():
        manager = pool.sm.fresh(
            row['type'], row['uuid'], plan['device_config'],
            row['sm_config'], plan['host'])
        manager.attach(plan['host'])
        try:
            manager.delete()
        finally:
            manager.detach(plan['host'])


def _forget(pool: Pool, sr: str) -> None:
    for pbd in pool.rows.find('PBD', SR=sr):
        storage.destroy_pbd(pool, pbd)
    for vdi in pool.rows.find('VDI', SR=sr):
        sync.remove(pool, vdi)
    pool.sm.forget(sr)
    pool.rows.delete('SR', sr)


@call('SR.set_shared')
def set_shared(pool: Pool, ctx: Ctx, sr: str, value: bool) -> None:
    """Say whether hosts share an SR."""
    if not value and len(pool.rows.field('SR', sr, 'PBDs')) > 1:
        raise Failure('SR_HAS_MULTIPLE_PBDS', sr)
    pool.rows.update('SR', sr, shared=value)


@call('SR.get_supported_types')
def get_supported_types(pool: Pool, ctx: Ctx) -> list[str]:
    """Return the types that there are drivers for."""
    return sorted(pool.profile.sm)


@call('SR.set_name_label')
def set_name_label(pool: Pool, ctx: Ctx, sr: str, value: str) -> None:
    """Rename an SR, which goes through its driver."""
    pool.rows.field('SR', sr, 'uuid')
    storage.assert_plugged(pool, sr)
    storage.assert_legible(value)
    pool.rows.update('SR', sr, name_label=value)


@call('SR.set_name_description')
def set_name_description(pool: Pool, ctx: Ctx, sr: str, value: str) -> None:
    """Describe an SR, which goes through its driver."""
    pool.rows.field('SR', sr, 'uuid')
    storage.assert_plugged(pool, sr)
    storage.assert_legible(value)
    pool.rows.update('SR', sr, name_description=value)


@call('SR.set_physical_size')
def set_physical_size(pool: Pool, ctx: Ctx, sr: str, value: int) -> None:
    """Write a size down; no driver is asked."""
    pool.rows.update('SR', sr, physical_size=value)
