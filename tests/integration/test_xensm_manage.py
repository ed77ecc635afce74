# SPDX-License-Identifier: Apache-2.0
"""``volume-manage xensm``: probing, repairing, and what lies about."""

import argparse
import configparser
import contextlib
import hashlib
import io
import json
import os
import ssl
import subprocess
import sys
import unittest

from tests import xapi
from tests import xensm
from volume import conf as options
from volume import errors
from volume import ids
from volume import model
from volume.cli import manage_xensm
from volume.drivers.xensm import probing
from volume.drivers.xensm import vdis
from volume.drivers.xensm.driver import XenSmDriver
from volume.testing import fixtures
from volume.xenapi import kinds

GIB = model.GIB


class Case(unittest.TestCase):

    def setUp(self):
        self.pool = xapi.simulator(self)
        self.node = fixtures.make_node(self)

    def group(self, **more):
        return fixtures.settings(XenSmDriver, **{
            'addresses': [self.pool.url()], 'password': 'secret', **more,
        })

    def run_on(self, group, action, *words, known=None, stdin=''):
        """Return exit code, rows and text of one call."""
        parser = argparse.ArgumentParser()
        manage_xensm.add_arguments(parser)
        rows, told = [], io.StringIO()
        old, sys.stdin = sys.stdin, io.StringIO(stdin)
        try:
            with contextlib.redirect_stdout(told):
                code = manage_xensm.run(
                    parser.parse_args(['xen', action, *words]),
                    {'xen': group}, self.node, lambda: known or {},
                    rows.extend,
                )
        finally:
            sys.stdin = old
        return code, rows, told.getvalue()

    def section(self, text):
        """Return a backend made of the section that was printed."""
        parser = configparser.RawConfigParser(delimiters=('=',))
        parser.optionxform = str
        parser.read_string(text[text.index('['):])
        name, = parser.sections()
        found = dict(parser[name])
        self.assertEqual('xensm', found.pop('driver'))
        self.assertEqual('root', found.pop('username'))
        found.pop('password_file')
        found.pop('addresses')
        found.pop('fingerprints', None)
        if 'sr_uuid' in found:
            found['sr_uuid'] = [found['sr_uuid']]
        if 'create' in found:
            found['create'] = found['create'] == 'true'
        return self.group(**found)


class Probing(Case):

    def test_section_reaches_the_pool_as_the_one_it_was_asked_by(self):
        self.pool = xapi.simulator(self, tls=True)
        self.pool.world.add_nfs('filer', '/export')
        prints = [
            hashlib.sha256(ssl.PEM_cert_to_DER_cert(
                self.pool.servers.certificate(host).certificate.read_text()
            )).hexdigest() for host in self.pool.hosts
        ]
        secret = os.path.join(self.node.state_dir, 'pass word')
        with open(secret, 'w') as file:
            file.write('secret\n')
        os.chmod(secret, 0o600)
        group = self.group(
            password=None, password_file=secret, fingerprints=prints)
        _, _, told = self.run_on(group, 'probe', 'nfs', 'server=filer')
        found = dict(
            line.split(' = ') for line in told.splitlines() if ' = ' in line)
        self.assertEqual(secret, found['password_file'])
        self.assertEqual(set(prints), set(found['fingerprints'].split(', ')))

    def probe(self, *words, **more):
        return self.run_on(self.group(), 'probe', *words, **more)

    def test_types_are_listed(self):
        code, rows, _ = self.probe()
        self.assertEqual(0, code)
        self.assertIn('lvmoiscsi', [row['type'] for row in rows])

    def test_exports_are_offered_until_the_section_is_complete(self):
        self.pool.world.add_nfs('filer', '/one')
        self.pool.world.add_nfs('filer', '/two words')
        code, _, told = self.probe('nfs')
        self.assertEqual((1, True), (code, 'server=...' in told))
        code, rows, told = self.probe('nfs', 'server=filer')
        self.assertEqual(1, code)
        self.assertEqual(
            {'/one', '/two words'}, {row['Path'] for row in rows})
        self.assertIn('serverpath=...', told)
        code, _, told = self.probe(
            'nfs', 'server=filer', 'serverpath=/two words')
        self.assertEqual(0, code)
        driver = XenSmDriver(self.section(told), self.node)
        driver.check()
        self.assertEqual('volumes-nfs', driver.pools()[0].name)

    def test_sr_that_is_there_is_to_be_used_and_not_formatted(self):
        uuid = xapi.nfs_sr(self.pool)
        with xensm.session(self.pool) as xenapi:
            sr = xenapi.SR.get_by_uuid(uuid)
            for pbd in xenapi.SR.get_PBDs(sr):
                xenapi.PBD.unplug(pbd)
            xenapi.SR.forget(sr)
        code, _, told = self.probe(
            'nfs', 'server=filer', 'serverpath=/export')
        self.assertEqual(0, code)
        self.assertNotIn('create', told)
        driver = XenSmDriver(self.section(told), self.node)
        driver.check()
        self.assertEqual(uuid, driver.pools()[0].name)

    def test_targets_and_luns_are_walked_through(self):
        self.pool.world.add_target(xensm.TARGET, xensm.IQN)
        for at in 1, 2:
            self.pool.world.add_lun(
                f'36001405walk{at}', at * GIB, iqn=xensm.IQN)
        code, rows, told = self.probe(
            'lvmoiscsi', f'target={xensm.TARGET}', 'chapuser=me',
            'chappassword', stdin='hush\n',
        )
        self.assertEqual(1, code)
        # There is one target, and so nothing to choose.
        self.assertIn(f'targetIQN={xensm.IQN}', told)
        self.assertIn('SCSIid=...', told)
        self.assertEqual(
            {'36001405walk1', '36001405walk2'},
            {row['SCSIid'] for row in rows})
        self.assertNotIn('hush', told)

    def test_aggregates_are_offered(self):
        self.pool = xapi.simulator(self, 'xenserver-6.5')
        self.pool.world.add_array(
            'netapp', 'filer', 'root', 'hush',
            {'aggr0': {'size': GIB}, 'aggr1': {'size': 2 * GIB}})
        code, rows, told = self.probe(
            'netapp', 'target=filer', 'username=root', 'password',
            stdin='hush\n')
        self.assertEqual((1, 2), (code, len(rows)), told)
        self.assertIn('aggregate=...', told)

    def test_password_in_the_command_line_is_refused(self):
        with self.assertRaisesRegex(errors.Invalid, 'without a value'):
            self.probe('lvmoiscsi', 'target=t', 'chappassword=hush')
        with self.assertRaisesRegex(errors.Invalid, 'no key bogus'):
            self.probe('nfs', 'bogus=1')

    def test_type_that_cannot_be_probed_gets_its_section(self):
        code, _, told = self.probe('file', 'location=/srv/disks')
        self.assertEqual(0, code)
        self.assertIn('cannot be probed', told)
        self.assertIn('location=/srv/disks', told)


class ProbingGfs2(unittest.TestCase):
    """By the published form of the answers: the driver itself is closed."""

    def setUp(self):
        self.calls = []
        self.answer = []

    def call(self, method, *args):
        """Answer as a pool; this is the link."""
        if method == 'pool.get_all_records':
            return {'OpaqueRef:pool': {'master': 'OpaqueRef:host'}}
        self.calls.append((method, args[1]))
        return self.answer

    def step(self, **config):
        return probing.step(self, kinds.find('gfs2'), config)

    def test_nothing_is_asked_before_the_provider_is_known(self):
        step = self.step()
        self.assertEqual(
            ('provider', ['iscsi', 'hba', 'fcoe'], []),
            (step.key, step.choices(), self.calls))

    def test_what_is_not_complete_offers_its_next_key(self):
        self.answer = [
            {'configuration': {'provider': 'hba', 'SCSIid': scsi_id},
             'complete': False, 'sr': [], 'extra_info': {'size': '5'}}
            for scsi_id in ('36001', '36002')
        ]
        step = self.step(provider='hba')
        self.assertEqual(
            [('SR.probe_ext', {'provider': 'hba'})], self.calls)
        self.assertEqual(('SCSIid', ['36001', '36002'], ()), (
            step.key, step.choices(), step.srs))
        self.assertEqual('5', step.rows[0]['size'])

    def test_sr_that_is_there_is_told(self):
        config = {'provider': 'hba', 'SCSIid': '36001'}
        for sr in [{'uuid': 'u', 'name_label': 'n'}], {'uuid': 'u'}:
            self.answer = [{
                'configuration': config, 'complete': True, 'sr': sr,
                'extra_info': {},
            }]
            step = self.step(**config)
            self.assertEqual(('', ['u']), (
                step.key, [each['UUID'] for each in step.srs]))
        self.answer = [{
            'configuration': config, 'complete': True, 'sr': [],
            'extra_info': {},
        }]
        self.assertEqual(probing.Step(), self.step(**config))


class LookingAfter(Case):

    def setUp(self):
        super().setUp()
        self.uuid = xapi.nfs_sr(self.pool)
        self.xen = self.group(sr_uuid=[self.uuid])

    def test_repair_says_how_each_host_stands(self):
        with xensm.session(self.pool) as xenapi:
            sr = xenapi.SR.get_by_uuid(self.uuid)
            first, second = xenapi.SR.get_PBDs(sr)
            xenapi.PBD.unplug(first)
            xenapi.PBD.unplug(second)
            xenapi.PBD.destroy(second)
        self.pool.faults.put_sr_offline(self.uuid)
        code, rows, _ = self.run_on(self.xen, 'repair')
        self.assertEqual(1, code)
        self.assertEqual(
            {'not plugged in'}, {row['state'] for row in rows})
        self.assertTrue(all(row['trouble'] for row in rows))
        self.pool.faults.put_sr_online(self.uuid)
        code, rows, _ = self.run_on(self.xen, 'repair')
        self.assertEqual(0, code)
        self.assertEqual(
            ['plugged in'] * 2, [row['state'] for row in rows])

    def test_orphans_are_told_with_what_to_do(self):
        driver = XenSmDriver(self.xen, self.node)
        volumes = [
            model.Volume(ids.new(), self.uuid, 4 * model.MIB)
            for _ in range(3)
        ]
        handles = [driver.create(volume) for volume in volumes]
        driver.describe(volumes[1], {'name': 'x'})
        known = {volumes[at].id: handles[at] for at in (1, 2)}
        with xensm.session(self.pool) as xenapi:
            copy = xenapi.VDI.get_uuid(xenapi.VDI.snapshot(
                xenapi.VDI.get_by_uuid(handles[1])))
            xenapi.VDI.add_to_other_config(
                xenapi.VDI.get_by_uuid(handles[2]), vdis.NEXT, ids.new())
            twin = xenapi.VDI.get_uuid(xenapi.VDI.clone(
                xenapi.VDI.get_by_uuid(handles[0])))
        xensm.foreign(self.pool, self.uuid, b'')
        code, rows, _ = self.run_on(self.xen, 'orphans', known=known)
        self.assertEqual(1, code)
        told = {row['vdi']: row['why'] for row in rows}
        self.assertEqual({handles[0], twin, copy, handles[2]}, set(told))
        self.assertIn('no row', told[handles[0]])
        self.assertIn('another tool', told[copy])
        self.assertIn('being made', told[handles[2]])
        known[volumes[0].id] = handles[0]
        _, rows, _ = self.run_on(self.xen, 'orphans', known=known)
        told = {row['vdi']: row['why'] for row in rows}
        self.assertNotIn(handles[0], told)
        self.assertIn('twin', told[twin])

    def test_chains_are_listed_the_longest_first(self):
        driver = XenSmDriver(self.xen, self.node)
        volume = model.Volume(ids.new(), self.uuid, 4 * model.MIB)
        handle = driver.create(volume)
        other = model.Volume(ids.new(), self.uuid, 4 * model.MIB)
        driver.create(other)
        for _ in range(3):
            driver.snapshot(
                model.Snapshot(ids.new(), volume, volume.size_bytes))
        code, rows, _ = self.run_on(self.xen, 'chains')
        self.assertEqual(0, code)
        self.assertEqual(4, rows[0]['depth'])
        self.assertIn(handle, [row['vdi'] for row in rows[:2]])
        self.assertEqual(1, rows[-1]['depth'])

    def test_command_reads_the_configuration(self):
        path = os.path.join(self.node.state_dir, 'volume.conf')
        with open(path, 'w') as file:
            file.write(
                '[DEFAULT]\nenabled_backends = xen\n'
                f'state_path = {self.node.state_dir}\n'
                '[xen]\ndriver = xensm\n'
                f'addresses = {self.pool.url()}\n'
                f'password = secret\nsr_uuid = {self.uuid}\n'
                'sr_type = nfs\ndevice_config =\n    server=filer\n'
                '    serverpath=/export\n    options=vers=4.1,a b\n'
            )
        conf = options.load([], [path])
        self.assertIsNotNone(conf)
        done = subprocess.run(
            [sys.executable, '-m', 'volume.cli.manage', '--config-file',
             path, '--format', 'json', 'xensm', 'xen', 'chains'],
            capture_output=True, timeout=60, text=True,
        )
        self.assertEqual((0, []), (done.returncode, json.loads(done.stdout)),
                         done.stderr)


class Checking(Case):
    """``volume-manage check`` and ``reconcile`` only look."""

    def run_manage(self, section, *words):
        path = os.path.join(self.node.state_dir, 'volume.conf')
        with open(path, 'w') as file:
            file.write(
                '[DEFAULT]\nenabled_backends = xen\n'
                f'state_path = {self.node.state_dir}\n'
                '[xen]\ndriver = xensm\n'
                f'addresses = {self.pool.url()}\n{section}\n'
            )
        done = subprocess.run(
            [sys.executable, '-m', 'volume.cli.manage', '--config-file',
             path, '--format', 'json', *words],
            capture_output=True, timeout=60, text=True,
        )
        return done.returncode, done.stdout + done.stderr

    def srs(self):
        with xensm.session(self.pool) as xenapi:
            return sorted(
                each['name_label']
                for each in xenapi.SR.get_all_records().values()
            )

    def test_nothing_is_formatted_until_the_service_starts(self):
        self.pool.world.add_nfs('filer', '/export')
        before = self.srs()
        section = (
            'password = secret\nsr_name = new\nsr_type = nfs\n'
            'create = true\ndevice_config =\n    server=filer\n'
            '    serverpath=/export'
        )
        self.run_manage(section, 'db', 'upgrade')
        for words in ['check'], ['reconcile', '--dry-run'], ['reconcile']:
            with self.subTest(words):
                _, told = self.run_manage(section, *words)
                self.assertIn('formats one when it starts', told)
                self.assertEqual(before, self.srs())
        driver = XenSmDriver(self.group(
            sr_name='new', sr_type='nfs', create=True,
            device_config='server=filer\nserverpath=/export',
        ), self.node)
        driver.check()
        self.assertEqual(sorted([*before, 'new']), self.srs())
        self.assertEqual(0, self.run_manage(section, 'check')[0])

    def test_nothing_is_plugged_in_until_the_service_starts(self):
        uuid = xapi.nfs_sr(self.pool)

        def plugged():
            with xensm.session(self.pool) as xenapi:
                return [
                    each['currently_attached']
                    for each in xenapi.PBD.get_all_records().values()
                ]

        with xensm.session(self.pool) as xenapi:
            for pbd in xenapi.SR.get_PBDs(xenapi.SR.get_by_uuid(uuid)):
                xenapi.PBD.unplug(pbd)
        section = f'password = secret\nsr_uuid = {uuid}'
        code, told = self.run_manage(section, 'check')
        self.assertEqual(1, code)
        self.assertIn('the service plugs it in when it starts', told)
        self.assertEqual([False, False], plugged())
        XenSmDriver(self.group(sr_uuid=[uuid]), self.node).check()
        self.assertEqual([True, True], plugged())
        self.assertEqual(0, self.run_manage(section, 'check')[0])

    def test_keys_in_one_line_are_told_to_have_lines_of_their_own(self):
        _, told = self.run_manage(
            'password = secret\nsr_name = new\nsr_type = lvmoiscsi\n'
            'create = true\n'
            'device_config = target=192.0.2.5,targetIQN=iqn.x:y, '
            'SCSIid=36001,chappassword=hush', 'check')
        self.assertIn('needs targetIQN, SCSIid; targetIQN seems to stand in '
                      'the value of target', told)
        self.assertIn('an indented line of its own', told)
        self.assertNotIn('hush', told)

    def test_sr_of_another_type_than_the_section_says_is_refused(self):
        uuid = xapi.nfs_sr(self.pool)
        with xensm.session(self.pool) as xenapi:
            xenapi.SR.set_name_label(xenapi.SR.get_by_uuid(uuid), 'mine')
        driver = XenSmDriver(self.group(
            sr_name='mine', sr_type='lvm', create=True,
            device_config='device=/dev/sdb',
        ), self.node)
        with self.assertRaises(errors.Invalid) as caught:
            driver.check()
        self.assertIn('is of type nfs', str(caught.exception))

    def test_dollar_of_a_secret_is_explained_and_not_told(self):
        code, told = self.run_manage(
            'password = pa$word\nsr_name = new', 'check')
        self.assertEqual(1, code)
        self.assertIn('option password', told)
        self.assertIn('$$', told)
        self.assertNotIn('word in group', told)

    def test_two_dollars_are_one(self):
        self.pool = xapi.simulator(self, password='pa$word')
        _, told = self.run_manage(
            'password = pa$$word\nsr_name = none', 'check')
        self.assertIn('the pool has no SR called', told)
