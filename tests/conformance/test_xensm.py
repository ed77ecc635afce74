# SPDX-License-Identifier: Apache-2.0
"""The xensm driver over the simulator, on an SR of each family.

An SR of files is tried always; ``VOLUME_PROOF=1`` tries them all.
"""

from __future__ import annotations

import dataclasses
import os
import unittest
from typing import Any

from tests import xapi
from tests import xensm
from volume import model
from volume.drivers import base
from volume.sim.xapi.published import profiles
from volume.testing import conformance
from volume.testing import fixtures

PROOF = bool(os.environ.get('VOLUME_PROOF'))


def proof(case: Any) -> Any:
    """Have a class in a proof run only; elsewhere it would but be skipped."""
    return case if PROOF else None


class Suite(conformance.DriverSuite, xensm.SharedPool):
    """The driver suite over one simulated pool."""

    size_bytes = 4 * model.MIB

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        with xensm.session(cls.simulator) as xenapi:
            uuid = xenapi.pool.get_uuid(xenapi.pool.get_all()[0])
        cls.host = dataclasses.replace(
            cls.host, properties={'xensm_pool': uuid})

    def setUp(self) -> None:
        self.node = fixtures.make_node(self)
        # A host says in which pool it is.
        self.host = dataclasses.replace(  # type: ignore[misc]
            type(self).host, properties={'xensm_pool': self.simulator.uuid}
        )
        super().setUp()

    def make_driver(self) -> base.Driver:
        return self.xensm(self.node)


class Sharing(Suite):
    """An SR whose VDIs share bytes."""

    lacks: frozenset[str] = frozenset()

    def make_foreign(self, pool: str, image: bytes) -> str | None:
        uuid = xensm.foreign(self.simulator, self.sr_uuid, image)
        self.addCleanup(xensm.destroy, self.simulator, uuid)
        return uuid

    def test_pool_has_every_feature_of_the_driver(self) -> None:
        self.assertEqual(
            base.features(self.driver) - self.lacks, self.pool.features)


class NfsTest(Sharing, unittest.TestCase):
    by_nbd = True

    @classmethod
    def make_sr(cls, pool: Any) -> str:
        first = str(xapi.nfs_sr(pool))
        # Another one, for volumes to move to.
        other = str(xapi.ext_sr(pool))
        cls.options = {'sr_uuid': [first, other]}
        cls.pool_name = first
        return first


@proof
class LvmTest(Sharing, unittest.TestCase):
    @classmethod
    def make_sr(cls, pool: Any) -> str:
        return str(xapi.lvm_sr(pool))


@proof
class NfsByExportTest(Sharing, unittest.TestCase):
    """Without NBD bytes come by exports."""


def reverting() -> profiles.Profile:
    """Return the newest server, with a driver that reverts by itself.

    The server has the call; none of the published drivers answers it yet.
    """
    head = profiles.find('head')
    nfs = head.sm['nfs']
    able = dataclasses.replace(
        nfs, capabilities=(*nfs.capabilities, 'VDI_REVERT'))
    return dataclasses.replace(head, sm={**head.sm, 'nfs': able})


@proof
class RevertingTest(Sharing, unittest.TestCase):
    """A server that can revert by itself."""

    profile = reverting()

    def test_server_is_asked_to_revert(self) -> None:
        calls: list[str] = []
        driver = self.driver
        driver._opened[1].records.append(calls.append)
        volume = self.volume(seed=1)
        driver.revert(self.snapshot(volume))
        self.assertIn('Async.VDI.revert', calls)
        self.assertNotIn('Async.VDI.clone', calls)


@proof
class ExtTest(Sharing, unittest.TestCase):
    profile = 'xenserver-8'

    @classmethod
    def make_sr(cls, pool: Any) -> str:
        return str(xapi.ext_sr(pool))


@proof
class LvmOverIscsiTest(Sharing, unittest.TestCase):
    by_nbd = True

    @classmethod
    def make_sr(cls, pool: Any) -> str:
        return xensm.lvmoiscsi_sr(pool)


@proof
class LvmOverHbaTest(Sharing, unittest.TestCase):
    @classmethod
    def make_sr(cls, pool: Any) -> str:
        return xensm.lvmohba_sr(pool)


@proof
class Qcow2Test(Sharing, unittest.TestCase):
    by_nbd = True

    @classmethod
    def make_sr(cls, pool: Any) -> str:
        return str(xapi.nfs_sr(pool, **{
            'preferred-image-formats': 'qcow2'}))


@proof
class NetAppTest(Sharing, unittest.TestCase):
    profile = 'xenserver-6.5'
    lacks = frozenset({'Extents'})

    @classmethod
    def make_sr(cls, pool: Any) -> str:
        return xensm.netapp_sr(pool)


@proof
class EqualLogicTest(Sharing, unittest.TestCase):
    profile = 'xenserver-6.5'
    lacks = frozenset({'Extents'})
    options = {'vdi_config': 'snap-reserve-percentage=600'}

    @classmethod
    def make_sr(cls, pool: Any) -> str:
        return xensm.equal_sr(pool)


class Luns(Suite):
    """An SR whose volumes are whole LUNs."""

    kind = ''
    count = 14

    @classmethod
    def make_sr(cls, pool: Any) -> str:
        cls.options = {'luns': xensm.lun_ids(cls.count)}
        return xensm.lun_sr(pool, cls.kind, cls.count, 8 * model.MIB)


@proof
class HbaTest(Luns, unittest.TestCase):
    kind = 'hba'


@proof
class IscsiTest(Luns, unittest.TestCase):
    kind = 'iscsi'


@proof
class RawHbaTest(Luns, unittest.TestCase):
    kind = 'rawhba'


@proof
class SrPerVolumeTest(Suite, unittest.TestCase):
    """Each volume has an SR of its own, beside one that is empty."""

    options = {
        'sr_per_volume': True, 'sr_type': 'nfs', 'device_config': (
            'server=filer\nserverpath=/export'),
    }
