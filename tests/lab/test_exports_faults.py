# SPDX-License-Identifier: Apache-2.0
"""The kernel's exporters, spoilt at every operation on the kernel.

Whatever was refused, lost its reply or died: a new service makes a whole
export of it, or ends it, and nothing is left. By default each operation is
refused, loses its reply or is the last, in turn, before its effect and after
it; with the whole lab, in all of these ways.
"""

from __future__ import annotations

import abc
import itertools
import logging

from tests import lab
from tests.lab import exports_case
from tests.lab.test_lio import LioCase
from tests.lab.test_nfs import NfsCase
from tests.lab.test_nfs import POOL
from tests.lab.test_nvmet import NvmetCase
from volume import errors
from volume.exports.lio_store import CORE
from volume.exports.lio_store import HBAS
from volume.node import Op
from volume.testing import faults

LOG = logging.getLogger('volume.lab')


class FaultCase(abc.ABC):
    """An exporter whose node can be told what to spoil."""

    @abc.abstractmethod
    def things(self):
        """Return what the kernel has of ours."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.faulty = exports_case.FaultyGuestNode(
            exports_case.target_of(cls.guest)
        )
        cls.addClassCleanup(cls.faulty.close)

    def setUp(self):
        self.faulty.arm(None)
        super().setUp()

    def spoil(self, prepare, work, *mends):
        """Run ``work`` once for each fault, and see that all is mended."""
        said = []
        for nth in itertools.count(1):
            for fault, mend in self.choose(nth, mends):
                attachment_id = self.attachment()
                LOG.debug('%s: %s, then %s', attachment_id, fault,
                          mend.__name__)
                with self.subTest(fault, mend=mend.__name__):
                    prepare(attachment_id)
                    said.append(self.fail_at(fault, attachment_id, work))
                    fired = self.faulty.fired
                    mend(attachment_id)
                    self.assertEqual([], self.things())
            if not fired:
                break
        self.assertGreater(nth, 10)
        return said

    def choose(self, nth, mends):
        """Yield what goes wrong there, and what is done about it."""
        every = list(faults.every(nth))
        if lab.FULL:
            yield from itertools.product(every, mends)
            return
        # One kind, before its effect and after it.
        for late in False, True:
            fault = every[2 * (nth % 3) + late]
            yield fault, mends[(nth + late) % len(mends)]

    def fail_at(self, fault, attachment_id, work):
        """Return what was said to the caller."""
        self.faulty.arm(fault)
        try:
            work(self.make_exporter(self.faulty), attachment_id)
        except (faults.Crash, errors.VolumeError) as failed:
            return str(failed)
        finally:
            self.faulty.fault = None
            self.faulty.is_dead = False
        return ''

    def repeat(self, attachment_id):
        """What a new service does that goes on with it."""
        self.exporter = self.make_exporter()
        self.exporter.check()
        connection = self.export(attachment_id)
        try:
            self.assertEqual({attachment_id}, self.exporter.exported())
            self.look(connection)
        finally:
            # Else one that fails would have all others fail.
            self.exporter.unexport(attachment_id)

    def give_up(self, attachment_id):
        """What a new service does that ends it."""
        self.exporter = self.make_exporter()
        self.exporter.unexport(attachment_id)

    def look(self, connection):
        """Fail unless a host reads the volume's bytes.

        A login takes long here, and one in ten is enough to know.
        """
        self.looked += 1
        if lab.FULL or self.looked % 10 == 1:
            with self.session(connection) as session:
                self.assertEqual(self.image[:512], session.read(0, 512))

    looked = 0

    def test_export_that_failed_anywhere_can_be_repeated_or_ended(self):
        with self.assertLogs('volume', 'DEBUG') as logs:
            said = self.spoil(lambda attachment_id: None, (
                lambda exporter, attachment_id: exporter.export(
                    self.wanted(attachment_id)
                )
            ), self.repeat, self.give_up)
        secrets = {
            each for secrets in self._secrets.values()
            for each in secrets.values()
        }
        for text in *said, *logs.output:
            self.assertFalse(
                [each for each in secrets if each in text], 'a secret is said'
            )

    def test_end_that_failed_anywhere_can_be_repeated(self):
        self.spoil(self.export, (
            lambda exporter, attachment_id: exporter.unexport(attachment_id)
        ), self.give_up)


class LioFaultTest(FaultCase, LioCase):

    def things(self):
        stores = self.node.configure(
            [Op.list(f'{CORE}/{hba}') for hba in HBAS]
        )
        kept = {'hba_info', 'hba_mode'}
        return [
            *self.exporter.names(),
            *(each for found in stores for each in set(found) - kept),
        ]


class NvmetFaultTest(FaultCase, NvmetCase):

    def things(self):
        # Of a host whose admission was just taken away a name may be left;
        # it admits nobody, and goes with the next end.
        return list(self.exporter.names())


class NfsFaultTest(FaultCase, NfsCase):

    def things(self):
        state_dir = self.node.state_dir
        return self.guest.run('bash', '-c', (
            f'exportfs -s; ls {state_dir}/nfs; '
            f'find {POOL} -path "*/.exports/*"'
        )).split()
