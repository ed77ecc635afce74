# SPDX-License-Identifier: Apache-2.0
"""The nvmet exporter on a real kernel; hosts by that kernel's initiator."""

from __future__ import annotations

from tests import lab
from tests.lab import case
from tests.lab import exports_case
from tests.lab import hosts
from volume import errors
from volume import identity
from volume import ids
from volume import model
from volume.exports import naming
from volume.exports.nvmet import NvmetExporter
from volume.exports.nvmet_subsystem import namespace
from volume.node import Op
from volume.remote.node import SshNode
from volume.testing import exports
from volume.testing import fixtures

NVMET = '/sys/kernel/config/nvmet'
# A subsystem that lets everybody in, as another tool makes or restores it.
FOREIGN = f'''
mkdir {NVMET}/subsystems/$1
cd {NVMET}/subsystems/$1
echo 1 >attr_allow_any_host
mkdir namespaces/1
echo $2 >namespaces/1/device_path
echo 1 >namespaces/1/enable
for port in {NVMET}/ports/*; do
    ln -s {NVMET}/subsystems/$1 $port/subsystems/$1
done
'''
REMOVE = f'''
rm {NVMET}/ports/*/subsystems/$1
rmdir {NVMET}/subsystems/$1/namespaces/1 {NVMET}/subsystems/$1
'''


class NvmeSession:
    """A host that has the namespace as a device of its kernel."""

    def __init__(self, host, connection):
        self.host = host
        self.info = {'data': connection.fields}
        try:
            self.device = host.connect(self.info)[0]
        except AssertionError:
            self.close()
            raise

    def read(self, offset_bytes, length_bytes):
        found = self.host.guest.run_bytes(
            'dd', f'if={self.device}', 'status=none', 'bs=1M',
            'iflag=direct,skip_bytes,count_bytes', f'skip={offset_bytes}',
            f'count={length_bytes}',
        )
        assert len(found) == length_bytes
        return found

    def write(self, offset_bytes, data):
        self.host.guest.run(
            'dd', f'of={self.device}', 'status=none', 'bs=512',
            'iflag=fullblock', 'oflag=direct,seek_bytes', 'conv=notrunc',
            f'seek={offset_bytes}', input_bytes=data,
        )

    def attribute(self, name):
        """Return what the kernel of the host says of its device."""
        node = self.device.removeprefix('/dev/')
        return self.host.guest.run(
            'cat', f'/sys/class/block/{node}/{name}'
        ).strip()

    def close(self):
        self.host.disconnect(self.info)


class InterruptedNode(SshNode):
    """Lets something happen just before a host is admitted, once."""

    happens = None

    def configure(self, wanted):
        found = []
        for op in wanted:
            if self.happens and (
                op.verb == 'link' and '/allowed_hosts/' in op.path
            ):
                happens, self.happens = self.happens, None
                happens()
            found += super().configure([op])
        return found


class NvmetCase(exports_case.DeviceCase):
    """An exporter in front of the guest's kernel, and two hosts of it."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.addClassCleanup(cls._remove_ports)
        cls.hosts = {
            host.nqn: host for host in (
                hosts.NvmeHost(cls.guest, name) for name in ('one', 'two')
            )
        }
        cls.host, cls.other_host = (
            model.Host(each.name, ('192.0.2.9',), None, each.nqn)
            for each in cls.hosts.values()
        )

    @classmethod
    def _remove_ports(cls):
        cls.guest.run('bash', '-c', f'rmdir {NVMET}/ports/* || true')

    def make_exporter(self, node=None, **options):
        conf = fixtures.settings(NvmetExporter, **{
            'nvme_portals': list(case.PORTALS), **options
        })
        return NvmetExporter(conf, node or self.node)

    def open_session(self, connection):
        host = self.hosts[connection.fields['host_nqn']]
        return NvmeSession(host, connection)


class NvmetTest(exports.ExporterSuite, NvmetCase):

    def test_another_host_is_refused(self):
        connection = self.export(self.attachment())
        info = {'data': connection.fields}
        self.assertFalse(self.hosts[self.other_host.nqn].admitted(info))
        self.assertTrue(self.hosts[self.host.nqn].admitted(info))

    def test_each_portal_leads_to_the_volume(self):
        connection = self.export(self.attachment())
        portals = connection.fields['portals']
        self.assertEqual(
            [[each, '4420', 'tcp'] for each in case.PORTALS], portals
        )
        for portal in portals:
            fields = {**connection.fields, 'portals': [portal]}
            only = model.Connection('nvmeof', fields)
            self.assertEqual(self.image, self.read(only))

    def test_volume_is_one_disk_by_all_its_exports_and_after_a_restart(self):
        one, two = self.attachment(), self.attachment()
        volume_id = self.wanted(one).volume_id
        for attachment_id in one, two, one:
            with self.session(self.export(attachment_id)) as session:
                self.assertEqual(
                    f'uuid.{identity.nvme_uuid(volume_id)}',
                    session.attribute('wwid'),
                )
                self.assertEqual(
                    identity.nvme_nguid(volume_id),
                    session.attribute('nguid').replace('-', ''),
                )
                self.assertEqual(
                    identity.nvme_serial(volume_id),
                    session.attribute('device/serial'),
                )
            self.exporter.unexport(attachment_id)
            self.exporter = self.make_exporter()
            self.exporter.check()

    def test_host_sees_at_once_that_the_volume_has_grown(self):
        attachment_id = self.attachment()
        with self.session(self.export(attachment_id)) as session:
            before = int(session.attribute('size'))
            self.guest.run('lvextend', '-q', '-L', '+4M', self.source.path)
            self.exporter.grow(self.wanted(attachment_id))
            hosts.until(
                lambda: int(session.attribute('size')) == 2 * before,
                'the host does not see the new size',
            )
            self.assertEqual(self.image[:512], session.read(0, 512))
            session.write(before * 512, b'\xa5' * 512)
        self.guest.run('lvreduce', '-q', '-f', '-L', '4M', self.source.path)

    def test_half_made_it_is_not_exported_and_is_made_whole(self):
        attachment_id = self.attachment()
        name = self.export(attachment_id).fields['target_nqn']
        self.node.configure([Op.put(f'{namespace(name)}/enable', '0')])
        self.assertEqual(set(), self.exporter.exported())
        connection = self.export(attachment_id)
        self.assertEqual({attachment_id}, self.exporter.exported())
        self.assertEqual(self.image, self.read(connection))

    def test_hosts_entry_that_another_service_removes_is_made_again(self):
        other = self.make_exporter(
            nvme_target_prefix='nqn.2010-10.org.example.other:'
        )
        theirs = self.wanted(self.attachment())
        other.export(theirs)
        self.addCleanup(other.unexport, theirs.attachment_id)
        node = InterruptedNode(exports_case.target_of(self.guest))
        self.addCleanup(node.close)
        node.happens = lambda: other.unexport(theirs.attachment_id)
        attachment_id = self.attachment()
        connection = self.make_exporter(node).export(
            self.wanted(attachment_id)
        )
        self.assertIsNone(node.happens, 'it did not happen')
        self.assertEqual({attachment_id}, self.exporter.exported())
        self.assertEqual(self.image, self.read(connection))

    def test_read_only_is_refused_and_never_pretended(self):
        with self.assertRaises(errors.Unsupported):
            self.export(self.attachment(), access=model.Access.READ)

    def test_file_is_refused_for_its_blocks_would_be_others(self):
        file = model.Device('/etc/hostname', is_block=False)
        with self.assertRaisesRegex(errors.Unsupported, 'block device'):
            self.export(self.attachment(), file)

    def test_attachment_is_not_given_to_another_host(self):
        attachment_id = self.attachment()
        connection = self.export(attachment_id)
        with self.assertRaisesRegex(errors.Conflict, self.host.nqn):
            self.export(attachment_id, host=self.other_host)
        self.assertEqual(self.image, self.read(connection))

    def test_host_without_a_usable_name_is_told_so(self):
        for nqn in None, '', 'one', 'nqn.2024-01.org.example:a/../b':
            with self.assertRaises(errors.Invalid):
                self.export(
                    self.attachment(), host=model.Host('bare', (), None, nqn)
                )

    def test_options_that_are_wrong_are_refused(self):
        for options in (
            {'nvme_portals': []},
            {'nvme_portals': ['storage.example']},
            {'nvme_target_prefix': 'iqn.2010-10.org.openstack:'},
            {'nvme_target_prefix': f'nqn.2010-10.org.{"long" * 40}:'},
        ):
            with self.assertRaises(errors.Invalid, msg=options):
                self.make_exporter(**options).check()

    def test_what_is_not_ours_is_left_alone(self):
        first = self.export(self.attachment())
        name = f'{self.exporter.prefix}volume-{ids.new()}'
        self.guest.run('bash', '-ec', FOREIGN, '-', name, self.source.path)
        self.addCleanup(self.guest.run, 'bash', '-c', REMOVE, '-', name)
        connection = self.export(self.attachment(), host=self.other_host)
        self.exporter = self.make_exporter()
        self.exporter.check()
        for each in first, connection:
            self.exporter.unexport(
                each.fields['target_nqn'].rpartition('.')[2]
            )
        self.assertEqual(set(), self.exporter.exported())
        theirs = model.Connection('nvmeof', {
            **first.fields, 'target_nqn': name,
            'portals': first.fields['portals'][:1],
        })
        self.assertEqual(self.image, self.read(theirs))

    def test_what_another_tool_has_restored_is_not_taken_for_ours(self):
        wanted = self.wanted(self.attachment())
        name = naming.target(
            self.exporter.prefix, wanted.volume_id, wanted.attachment_id
        )
        for by_check in True, False:
            self.guest.run('bash', '-ec', FOREIGN, '-', name,
                           self.source.path)
            self.exporter = self.make_exporter()
            if by_check:
                self.exporter.check()
                self.assertEqual(set(), self.exporter.exported())
            info = {'data': self.exporter.export(wanted).fields}
            self.assertFalse(self.hosts[self.other_host.nqn].admitted(info))
            self.assertTrue(self.hosts[self.host.nqn].admitted(info))
            self.exporter.unexport(wanted.attachment_id)

    def test_many_are_exported_in_few_round_trips(self):
        many = [
            self.wanted(ids.new()) for _ in range(1000 if lab.FULL else 102)
        ]
        self.addCleanup(self.end, many)
        hundreds = -(-len(many) // 100)
        for trips_each, ops_each in (4, 22), (5, 12):
            self.node.trips = self.node.ops = 0
            found = self.exporter.export_many(many)
            for each in many:
                self.assertIsInstance(
                    found[each.attachment_id], model.Connection
                )
            self.assertLessEqual(self.node.trips, 1 + trips_each * hundreds)
            self.assertLessEqual(
                self.node.ops, 50 * hundreds + ops_each * len(many)
            )

    def end(self, many):
        for each in many:
            self.exporter.unexport(each.attachment_id)
