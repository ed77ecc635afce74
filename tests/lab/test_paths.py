# SPDX-License-Identifier: Apache-2.0
"""A host with two paths to a volume loses one of them, and notices nothing.

A path is lost as in a network that drops packets: nobody is told. What is
written meanwhile is read back and compared by fio, block by block.
"""

import re

from tests import lab
from tests.lab import case
from tests.lab import hosts
from tests.lab.service_case import LabService

MULTIPATH = """defaults {
    user_friendly_names no
    find_multipaths no
    polling_interval 1
    max_polling_interval 2
}
blacklist {
    devnode "^(vd|nvme)"
}
"""
# Verified as it goes on, and once more at the end.
FIO = (
    'fio', '--name=paths', '--ioengine=libaio', '--direct=1', '--rw=randwrite',
    '--bs=16k', '--size=24m', '--iodepth=4', '--verify=crc32c',
    '--verify_backlog=64', '--verify_fatal=1', '--rate=2m', '--randseed=7',
)
DROP = '''
table inet lab {{
    chain out {{
        type filter hook output priority 0;
        ip daddr {0} drop;
        ip saddr {0} drop;
    }}
}}
'''
HEAD = '''
for subsystem in /sys/class/nvme-subsystem/*; do
    [ "$(cat "$subsystem/subsysnqn")" = "$1" ] || continue
    for head in "$subsystem"/nvme*n*; do
        case ${head##*/} in *c*) ;; *) echo "/dev/${head##*/}" ;; esac
    done
done
'''


class Paths(LabService):
    """iSCSI: two sessions under one map of device-mapper."""

    driver, exporter = 'thin', 'lio'

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.start_multipath()

    @classmethod
    def start_multipath(cls):
        cls.guest.run('tee', '/etc/multipath.conf',
                      input_bytes=MULTIPATH.encode())
        cls.addClassCleanup(cls.guest.run, 'rm', '/etc/multipath.conf')
        cls.guest.run('systemctl', 'start', 'multipathd')

    def test_host_that_loses_one_path_after_the_other_loses_no_byte(self):
        volume_id = self.volume()
        host = self.host('one')
        attachment = self.connect(volume_id, host)
        info = attachment['connection_info']
        devices = host.connect(info)
        joined = self.join(info, devices)
        hosts.until(lambda: self.count(joined) == 2, f'no two in {joined}')
        for portal in case.PORTALS:
            with self.subTest(portal):
                writing = self.guest.start(*FIO, f'--filename={joined}')
                hosts.until(
                    lambda: self.is_written(joined), 'nothing is written')
                self.cut(portal)
                said, _ = writing.communicate(timeout=hosts.WAIT_S)
                self.assertEqual(0, writing.returncode, said.decode()[-900:])
                hosts.until(
                    lambda: self.count(joined) == 1,
                    f'{portal} is no path less',
                )
                self.mend()
                hosts.until(
                    lambda: self.count(joined) == 2,
                    f'{portal} does not come back',
                )
        self.part(joined)
        host.disconnect(info)
        self.end(attachment)
        self.assert_agreement(sessions=set())

    def join(self, info, devices):
        """Return the device that has all paths."""
        wwid = self.guest.run(
            '/lib/udev/scsi_id', '-g', '-u', '-d', devices[0]).strip()
        path = f'/dev/mapper/{wwid}'
        hosts.until(
            lambda: self.guest.succeeds('test', '-b', path), f'no {path}')
        return path

    def part(self, joined):
        self.guest.run('multipath', '-f', joined)

    def count(self, joined):
        """Return the number of paths that work."""
        said = self.guest.run('multipath', '-ll', joined)
        return len(re.findall(' active +ready +running', said))

    def is_written(self, joined):
        return self.writes(
            '/sys/class/block/$(basename $(readlink -f "$1"))/stat', joined
        ) > 100

    def writes(self, files, *names):
        """Return how often it was written, by the kernel's own count."""
        return sum(
            int(line.split()[4]) for line in self.guest.run(
                'bash', '-c', f'cat {files}', '-', *names).splitlines()
        )

    def cut(self, portal):
        """Drop what goes to a portal and what comes from there."""
        self.addCleanup(self.mend)
        self.guest.run(
            'nft', '-f', '-', input_bytes=DROP.format(portal).encode())

    def mend(self):
        self.guest.succeeds('nft', 'delete', 'table', 'inet', 'lab')


@lab.in_full
class NvmePaths(Paths):
    """NVMe: the kernel joins the controllers itself, if it was booted so."""

    exporter = 'nvmet'

    @classmethod
    def find_guest(cls):
        guest = lab.Guest(LAB_APPEND='nvme_core.multipath=Y')
        cls.addClassCleanup(guest.end)
        return guest

    @classmethod
    def start_multipath(cls):
        """The kernel does it."""

    def join(self, info, devices):
        return self.guest.run(
            'bash', '-c', HEAD, '-', info['target_nqn']).split()[0]

    def is_written(self, joined):
        # What joins them has no count of its own.
        return self.writes('/sys/class/nvme/nvme*/nvme*c*n*/stat') > 100

    def part(self, joined):
        """Nothing is left of it when the last path goes."""

    def count(self, joined):
        return self.guest.run(
            'nvme', 'list-subsys', joined).count(' live')
