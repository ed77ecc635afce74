# SPDX-License-Identifier: Apache-2.0
"""What is left when the node loses its power, or the service is killed.

Whatever was being done is done or undone, what hosts had they have again, and
nothing is left of what was broken off. What the guest had handed to its disks
survives the cut (see ``reset``); what it had in memory does not.
"""

import contextlib

from tests.lab import case
from tests.lab import hosts
from tests.lab.service_case import LabService
from tests.lab.service_case import SIZE_BYTES
from tests.process import Refused

LASTING = {'available', 'in-use', 'error', 'reserved'}


class Power(LabService):
    """Thin volumes behind LIO."""

    driver, exporter = 'thin', 'lio'

    def test_case_51_after_a_power_cut_only_attached_volumes_are_exported(
        self,
    ):
        host = self.host('one')
        attached, idle = self.volume(), self.volume()
        attachment = self.connect(attached, host)
        info = attachment['connection_info']
        written = self.fill(host.connect(info)[0])
        self.cut()
        self.settle()
        self.assertEqual({attachment['id']}, self.targets())
        self.assertEqual('available', self.service.volume(idle)['status'])
        # The same target, by the same secret, with the same bytes.
        device = self.host('one').connect(info)[0]
        self.assertEqual(written, self.sum(device))
        host.disconnect(info)
        self.end(attachment)
        self.assert_agreement(sessions=set())

    def test_power_cut_in_mid_work_leaves_nothing_half_done(self):
        kept, written, asked = self.begin_much()
        self.cut()
        self.assert_recovered(kept, written, asked)

    def test_service_that_is_killed_in_mid_work_leaves_nothing_half_done(
        self,
    ):
        kept, written, asked = self.begin_much()
        self.service.kill()
        self.service.start()
        self.await_backend()
        self.assert_recovered(kept, written, asked)

    def begin_much(self):
        """Ask for one of each kind of work, and wait for none of it."""
        host = self.host('one')
        kept, gone, grown = (self.volume() for _ in range(3))
        with self.attached(kept, host) as devices:
            written = self.fill(devices[0])
        snapshot_id = self.snapshot(kept)
        asked = [
            self.service.create(size_bytes=SIZE_BYTES),
            self.service.create(snapshot_id=snapshot_id),
            kept, grown,
        ]
        self.service.call('POST', '/snapshots', {'snapshot': {
            'volume_id': kept}})
        self.service.action(grown, 'os-extend', {
            'new_size_bytes': 2 * SIZE_BYTES})
        self.service.call('DELETE', f'/volumes/{gone}')
        return kept, written, asked

    def assert_recovered(self, kept, written, asked):
        self.settle()
        statuses = {
            volume_id: self.service.volume(volume_id)['status']
            for volume_id in asked
        }
        self.assertEqual(
            dict.fromkeys(asked, 'available'), statuses, self.log())
        self.assert_agreement(sessions=set())
        host = self.host('one')
        for volume_id in kept, asked[1]:
            with self.attached(volume_id, host) as devices:
                self.assertEqual(written, self.sum(devices[0]), volume_id)

    def cut(self):
        """Cut the power; the network is there before the service's turn."""
        self.guest.reset()
        case.script(self.guest, 'portals.sh', *case.PORTALS)

    def settle(self):
        """Wait until nothing is going on, and all that is attached is back.
        """

        def look():
            with contextlib.suppress(Refused):
                return not self.service.sql(
                    "SELECT 1 FROM jobs WHERE state = 'open'"
                ) and {
                    row['status'] for row in self.service.volumes().values()
                } <= LASTING and self.targets() == {
                    row['id'] for row in self.service.call(
                        'GET', '/attachments')['attachments']
                }
            return False

        try:
            hosts.until(look, 'it does not settle')
        except AssertionError as failed:
            raise AssertionError(f'{failed}: {self.log()}') from failed
