# SPDX-License-Identifier: Apache-2.0
"""The xensm driver over the simulator, on an SR of each family.

One SR of files and one of LVM are tried always; ``VOLUME_PROOF=1`` tries
them all.
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
from volume.testing import conformance
from volume.testing import fixtures

PROOF = bool(os.environ.get('VOLUME_PROOF'))
GIB = model.GIB

proof = unittest.skipUnless(PROOF, 'VOLUME_PROOF is not set: a long run')


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

    def make_foreign(self, pool: str, image: bytes) -> str | None:
        uuid = xensm.foreign(self.simulator, self.sr_uuid, image)
        self.addCleanup(xensm.destroy, self.simulator, uuid)
        return uuid

    def test_pool_has_every_feature_of_the_driver(self) -> None:
        self.assertEqual(base.features(self.driver), self.pool.features)


class NfsTest(Sharing, unittest.TestCase):
    by_nbd = True


class LvmTest(Sharing, unittest.TestCase):
    @classmethod
    def make_sr(cls, pool: Any) -> str:
        return str(xapi.lvm_sr(pool))


@proof
class NfsByExportTest(Sharing, unittest.TestCase):
    """Without NBD bytes come by exports."""


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

    @classmethod
    def make_sr(cls, pool: Any) -> str:
        return xensm.netapp_sr(pool)


@proof
class EqualLogicTest(Sharing, unittest.TestCase):
    profile = 'xenserver-6.5'

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
