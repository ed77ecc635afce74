# SPDX-License-Identifier: Apache-2.0
"""The xensm driver over the simulator: pools that a whole class shares."""

from __future__ import annotations

import contextlib
import http.client
import unittest
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode
from urllib.parse import urlsplit

import XenAPI

from tests import xapi
from volume.drivers.xensm.driver import XenSmDriver
from volume.node import Node
from volume.sim.xapi.failure import Failure
from volume.testing import fixtures
from volume.testing import workbench


class _Class:
    """A class of tests, to what expects a test."""

    def __init__(self, cls: type[unittest.TestCase]) -> None:
        self.addCleanup = cls.addClassCleanup

    @staticmethod
    def assertEqual(wanted: Any, found: Any) -> None:
        if wanted != found:
            raise AssertionError(f'{wanted!r} != {found!r}')


class SharedPool(workbench.Case):
    """One simulated pool and SR for all tests of the class."""

    profile: Any = 'xcp-ng-8.3'
    by_nbd = False
    switches: dict[str, Any] = {}
    options: dict[str, Any] = {}

    @classmethod
    def make_sr(cls, pool: Any) -> str:
        """Make the SR; return its uuid."""
        return str(xapi.nfs_sr(pool))

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.simulator: Any = xapi.simulator(
            _Class(cls), cls.profile,
            **{'detach_delay_s': 0.02, **cls.switches},
        )
        cls.sr_uuid = cls.make_sr(cls.simulator)
        if cls.by_nbd:
            serve_nbd(cls.simulator)

    def xensm(self, node: Node, **options: Any) -> XenSmDriver:
        """Return a driver of the pool."""
        return XenSmDriver(fixtures.settings(XenSmDriver, **{
            'addresses': [self.simulator.url()], 'password': 'secret',
            'sr_uuid': [self.sr_uuid], **self.options, **options,
        }), node)


class Api:
    """A session of the official client, and what it is known by."""

    def __init__(self, session: Any) -> None:
        self.handle = session.handle
        self._xenapi = session.xenapi

    def __getattr__(self, name: str) -> Any:
        return getattr(self._xenapi, name)


@contextlib.contextmanager
def session(pool: Any) -> Iterator[Any]:
    """Have a session as any other client would."""
    opened = XenAPI.Session(pool.url(), ignore_ssl=True)
    opened.login_with_password('root', 'secret', '1.0', 'somebody')
    try:
        yield Api(opened)
    finally:
        opened.xenapi.session.logout()
        opened('close')()


IQN = 'iqn.2026-01.test:array'
TARGET = '192.0.2.5'
GIB = 1 << 30


def lvmoiscsi_sr(pool: Any) -> str:
    """Make an LVM SR on a LUN by iSCSI; return its uuid."""
    pool.world.add_target(TARGET, IQN)
    pool.world.add_lun('36001405lvmoiscsi', 100 * GIB, iqn=IQN)
    return str(xapi.make_sr(pool, 'lvmoiscsi', {
        'target': TARGET, 'targetIQN': IQN, 'SCSIid': '36001405lvmoiscsi'}))


def lvmohba_sr(pool: Any) -> str:
    """Make an LVM SR on a LUN by fibre channel; return its uuid."""
    pool.world.add_lun('36001405lvmohba', 100 * GIB, adapter='FC')
    return str(xapi.make_sr(
        pool, 'lvmohba', {'SCSIid': '36001405lvmohba'}))


def netapp_sr(pool: Any) -> str:
    """Make an SR on a filer; return its uuid."""
    pool.world.add_array(
        'netapp', 'filer', 'root', 'secret', {'aggr0': {'size': 100 * GIB}})
    return str(xapi.make_sr(pool, 'netapp', {
        'target': 'filer', 'username': 'root', 'password': 'secret',
        'aggregate': 'aggr0', 'allocation': 'thin'}))


def equal_sr(pool: Any) -> str:
    """Make an SR on a group of arrays; return its uuid."""
    pool.world.add_array(
        'equal', '192.0.2.9', 'grpadmin', 'secret',
        {'default': {'size': 16384 * GIB}})
    return str(xapi.make_sr(pool, 'equal', {
        'target': '192.0.2.9', 'username': 'grpadmin', 'password': 'secret',
        'storagepool': 'default', 'allocation': 'thin'}))


def lun_ids(count: int) -> list[str]:
    """Return the SCSI ids of LUNs for volumes."""
    return [f'36001405lun{number:04}' for number in range(count)]


def lun_sr(pool: Any, kind: str, count: int, size_bytes: int) -> str:
    """Make an SR of whole LUNs; return its uuid."""
    if kind == 'iscsi':
        pool.world.add_target(TARGET, IQN)
        where, config = {'iqn': IQN}, {'target': TARGET, 'targetIQN': IQN}
    else:
        where, config = {'adapter': 'FC'}, {'type': 'FC'}
    for number, scsi_id in enumerate(lun_ids(count)):
        pool.world.add_lun(scsi_id, size_bytes, lun_id=number, **where)
    return str(xapi.make_sr(pool, kind, config))


def serve_nbd(pool: Any) -> None:
    """Let the pool serve its VDIs by NBD with TLS."""
    with session(pool) as xenapi:
        for ref in xenapi.network.get_all():
            xenapi.network.add_purpose(ref, 'nbd')


def end_tasks(pool: Any) -> None:
    """End the tasks whose names were lost, with a reply or a process.

    A server forgets them after a day; no client can end them.
    """
    for ref in pool.tasks.pending:
        if (task := pool.tasks.get(ref)) is not None:
            pool.tasks.fail(task, Failure('TASK_CANCELLED', ref))


def foreign(pool: Any, sr_uuid: str, image: bytes) -> str:
    """Make a VDI as any other client would; return its uuid."""
    with session(pool) as xenapi:
        ref = xenapi.VDI.create({
            'name_label': 'somebody\'s', 'name_description': '',
            'SR': xenapi.SR.get_by_uuid(sr_uuid),
            'virtual_size': str(max(len(image), 2 << 20)),
            'type': 'user', 'sharable': False, 'read_only': False,
            'other_config': {}, 'sm_config': {},
        })
        put(pool, xenapi.handle, ref, image)
        return str(xenapi.VDI.get_uuid(ref))


def destroy(pool: Any, uuid: str) -> None:
    """Destroy a VDI as any other client would, if it is there."""
    with session(pool) as xenapi:
        try:
            xenapi.VDI.destroy(xenapi.VDI.get_by_uuid(uuid))
        except XenAPI.Failure as failure:
            if failure.details[0] != 'UUID_INVALID':
                raise


def put(pool: Any, handle: str, vdi: str, image: bytes) -> None:
    """Send raw bytes into a VDI."""
    connection = http.client.HTTPConnection(
        urlsplit(pool.url()).netloc, timeout=60)
    query = urlencode({'session_id': handle, 'vdi': vdi, 'format': 'raw'})
    connection.request('PUT', f'/import_raw_vdi?{query}', image)
    assert connection.getresponse().status == 200
    connection.close()
