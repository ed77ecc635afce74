# SPDX-License-Identifier: Apache-2.0
"""The verbs of ``volume``, each against a real service."""

import functools
import json
import os
import pathlib
import shutil
import socket
import unittest

from tests.integration import commands
from volume import errors
from volume import ids
from volume.nbd import NbdClient

MIB = 1 << 20

# What programs may count on; reference/cli.rst promises it.
VOLUME_KEYS = {
    'id', 'name', 'status', 'reason', 'size_bytes', 'backend', 'pool',
    'project_id', 'description', 'metadata', 'bootable', 'multiattach',
    'snapshot_id', 'source_volume_id', 'image', 'attachments', 'created_at',
    'updated_at',
}


class Volumes(commands.Cli):

    def test_a_volume_is_made_shown_renamed_grown_and_deleted(self):
        name = self.name()
        made = self.json(
            'create', '--name', name, '--size', '8M', '--description',
            'of a test', '--metadata', 'owner=me', '--backend', 'fast',
        )
        self.assertEqual(VOLUME_KEYS, set(made))
        self.assertEqual(
            ('available', 8 * MIB, {'owner': 'me'}, 'fast'),
            (made['status'], made['size_bytes'], made['metadata'],
             made['backend']),
        )
        self.volume('rename', name, f'{name}-2')
        self.volume('extend', f'{name}-2', '12M')
        seen = self.json('show', f'{name}-2')
        self.assertEqual(made['id'], seen['id'])
        self.assertEqual(12 * MIB, seen['size_bytes'])
        self.volume('delete', f'{name}-2')
        self.refused('show', made['id'], code=3)

    def test_a_table_is_for_people_and_ids_are_for_pipes(self):
        name = self.name()
        volume_id = self.volume(
            'create', '--name', name, '--size', '1.5G', '--format', 'id'
        ).stdout.strip()
        lines = self.volume('list', '--name', name).stdout.splitlines()
        self.assertEqual(2, len(lines))
        for word in volume_id, name, 'available', '1.5 GiB':
            self.assertIn(word, lines[1])
        listed = self.volume('--format', 'id', 'list', '--name', name)
        self.assertEqual(f'{volume_id}\n', listed.stdout)
        shown = self.volume('show', name).stdout
        self.assertIn('1.5 GiB (1610612736 bytes)', shown)

    def test_a_list_is_chosen_by_status_and_limit_page_by_page(self):
        names = [f'{self.name()}-{n}' for n in range(3)]
        for name in names:
            self.volume(
                'create', '--name', name, '--size', '1M', '--no-wait'
            )
        self.assertLessEqual(
            set(names), {each['name'] for each in self.json('list')}
        )
        self.assertEqual(2, len(self.json('list', '--limit', '2')))
        self.assertEqual([], self.json('list', '--status', 'maintenance'))

    def test_what_is_said_about_a_volume_can_be_changed(self):
        name = self.name()
        self.volume(
            'create', '--name', name, '--size', '1M', '--metadata', 'a=1',
            '--metadata', 'b/c=2',
        )
        changed = self.json(
            'set', name, '--description', 'new', '--metadata', 'd=3',
            '--unset-metadata', 'a', '--bootable', 'yes',
        )
        self.assertEqual({'b/c': '2', 'd': '3'}, changed['metadata'])
        self.assertEqual('new', changed['description'])
        self.assertIs(True, changed['bootable'])
        self.refused('set', name, code=2)

    def test_of_two_with_one_name_none_is_guessed(self):
        name = self.name()
        made = {
            self.json('create', '--name', name, '--size', '1M')['id']
            for _ in range(2)
        }
        words = self.refused('delete', name)
        for each in made:
            self.assertIn(each, words)
        self.assertEqual(2, len(self.json('list', '--name', name)))
        self.volume('delete', *made)
        self.assertEqual([], self.json('list', '--name', name))

    def test_one_that_cannot_be_deleted_hides_no_other(self):
        name = self.name()
        made = self.json('create', '--name', name, '--size', '1M')
        done = self.volume(
            'delete', 'no-such-volume', name, '--format', 'json', code=3
        )
        self.assertIn("no volume 'no-such-volume'", done.stderr)
        self.assertEqual(
            [{'id': made['id'], 'status': 'deleted'}],
            json.loads(done.stdout),
        )

    def test_the_same_id_again_is_the_same_volume(self):
        words = ['create', '--size', '1M', '--id', ids.new()]
        first = self.json(*words)
        self.assertEqual(first['id'], self.json(*words)['id'])
        words[2] = '2M'
        self.assertIn('another way', self.refused(*words))

    def test_a_refusal_says_what_no_pool_could_do(self):
        self.assertIn('tags', self.refused(
            'create', '--size', '1M', '--tag', 'tape'
        ))
        self.assertIn('without room', self.refused('create', '--size', '64G'))
        self.assertIn("there is no backend 'tape'", self.refused(
            'create', '--size', '1M', '--backend', 'tape'
        ))

    def test_bytes_go_out_to_an_image_and_come_back(self):
        name = self.name()
        data = os.urandom(MIB)
        image, copy = (
            os.path.join(self.world.images, f'{name}.{end}')
            for end in ('raw', 'qcow2')
        )
        with open(image, 'wb') as f:
            f.write(data)
        made = self.json(
            'create', '--name', name, '--size', '4M', '--backend', 'fast',
            '--image', f'file://{image}', '--image-format', 'raw',
        )
        self.assertEqual('raw', made['image']['disk_format'])
        self.volume(
            'upload', name, f'file://{copy}', '--image-format', 'qcow2'
        )
        again = self.json(
            'create', '--size', '4M', '--backend', 'fast', '--image',
            f'file://{copy}', '--image-format', 'qcow2',
        )
        path = os.path.join(self.world.pool, f'{again["id"]}.raw')
        with open(path, 'rb') as f:
            self.assertEqual(data + bytes(3 * MIB), f.read())

    def test_what_is_disowned_can_be_adopted(self):
        name = self.name()
        made = self.json(
            'create', '--name', name, '--size', '2M', '--backend', 'fast'
        )
        self.volume('disown', name)
        self.refused('show', name, code=3)
        adopted = self.json(
            'adopt', 'fast', f'{made["id"]}.disowned.raw', '--name',
            f'{name}-2',
        )
        self.assertEqual(2 * MIB, adopted['size_bytes'])
        self.assertEqual('available', adopted['status'])

    def test_backends_and_pools_and_what_is_wrong_are_shown(self):
        backends = {each['name']: each for each in self.json('backends')}
        self.assertEqual(
            {'fast': 'up', 'layers': 'up', 'broken': 'down'},
            {name: each['state'] for name, each in backends.items()},
        )
        self.assertEqual(['local', 'ssd'], backends['fast']['tags'])
        self.assertIn('fast#pool', self.volume('pools').stdout)
        self.assertEqual(
            [('node-1', '', 'up'), ('node-1', 'broken', 'down'),
             ('node-1', 'fast', 'up'), ('node-1', 'layers', 'up')],
            [(each['host'], each['backend'], each['state'])
             for each in self.json('services')],
        )
        done = self.volume('status', code=1)
        self.assertIn('backend broken is down: ', done.stderr)
        self.assertIn('volumes', self.json('limits'))

    def test_the_reference_names_every_key(self):
        made = self.json('create', '--name', self.name(), '--size', '1M')
        self.volume('attach', made['id'])
        shown = [
            self.json('show', made['id']),
            *self.json('show', made['id'])['attachments'],
            *self.json('attachments'), *self.json('jobs'),
            *self.json('backends'), *self.json('pools'),
            *self.json('services'),
            self.json('limits'),
        ]
        text = (
            pathlib.Path(__file__).parents[2]
            / 'doc/source/reference/cli.rst'
        ).read_text()
        for key in {key for each in shown for key in each}:
            self.assertIn(f'``{key}``', text)
        self.volume('detach', made['id'])

    def test_jobs_are_listed_and_shown(self):
        made = self.json('create', '--name', self.name(), '--size', '1M')
        (job,) = self.json('jobs', '--volume', made['id'])
        self.assertEqual(('create', 'done'), (job['kind'], job['state']))
        self.assertEqual(
            [job], self.json('jobs', 'list', '--volume', self.name())
        )
        self.assertEqual(job, self.json('jobs', 'show', job['id']))
        self.assertIn('has ended', self.refused('jobs', 'retry', job['id']))
        self.refused('jobs', 'show', ids.new(), code=3)


class Hosts(commands.Cli):

    def setUp(self):
        super().setUp()
        for tool in 'qemu-storage-daemon', 'qemu-img':
            if shutil.which(tool) is None:
                raise unittest.SkipTest(f'there is no {tool}')

    def make(self, *words):
        made = self.json(
            'create', '--name', self.name(), '--size', '4M', '--backend',
            'layers', *words,
        )
        return made['name']

    def attach(self, name, *words):
        """Attach; return what was printed."""
        return self.volume('attach', name, *words).stdout.strip()

    def write(self, name, data):
        url = self.attach(name)
        client = NbdClient(url)
        client.pwrite(data, 0)
        client.flush()
        client.close()
        self.volume('detach', name)

    def read(self, name, length):
        client = NbdClient(self.attach(name, '--mode', 'ro'))
        self.assertTrue(client.is_read_only)
        data = bytearray(length)
        client.pread_into(data, 0)
        client.close()
        self.volume('detach', name)
        return bytes(data)

    def test_an_attached_volume_is_read_and_written_until_detached(self):
        name = self.make()
        url = self.attach(name)
        self.assertEqual('in-use', self.json('show', name)['status'])
        (each,) = self.json('attachments', name)
        self.assertEqual(('attached', url), (each['status'], each['location']))
        self.assertEqual(socket.gethostname(), each['host'])
        self.assertIn(
            f' {socket.gethostname()} ',
            self.volume('attachments', name).stdout,
        )
        self.assertEqual(
            [each], self.json('attachments', '--host', each['host'])
        )
        data = os.urandom(4096)
        client = NbdClient(url)
        client.pwrite(data, 0)
        client.close()
        self.volume('detach', name)
        with self.assertRaises(errors.VolumeError):
            NbdClient(url, 5)
        self.assertEqual(data, self.read(name, 4096))
        self.assertEqual('available', self.json('show', name)['status'])

    def test_to_attach_again_is_the_same_url_and_no_second_access(self):
        name = self.make('--multiattach')
        url = self.attach(name)
        self.assertEqual(url, self.attach(name))
        self.assertEqual(1, len(self.json('attachments', name)))
        self.assertIn(
            "attached here as 'rw'",
            self.refused('attach', name, '--mode', 'ro'),
        )
        self.volume('detach', name)
        self.assertEqual([], self.json('attachments', name))

    def test_volume_connect_does_the_same_and_knows_a_connection(self):
        name = self.make()
        connect = functools.partial(
            self.volume, module='volume.cli.connect'
        )
        url = connect('attach', name).stdout.strip()
        self.assertEqual(url, self.attach(name))
        (row,) = self.world.ask(
            'GET', '/v3/attachments/detail'
        ).json['attachments']
        info = json.dumps(row['connection_info'])
        for given in info, json.dumps({'attachment': row}):
            self.assertEqual(url, connect(
                'attach', '--connection', '-', stdin=given,
                url='unix:/nonexistent',
            ).stdout.strip())
        said = connect('detach', '--connection', '-', stdin=info).stderr
        self.assertTrue(said.startswith('volume-connect: '), said)
        self.assertTrue(row['volume_id'] in said or row['id'] in said, said)
        connect('detach', name)
        said = connect('attach', '--connection', '-', stdin=info, code=3)
        self.assertTrue(said.stderr.startswith('volume-connect: '), said)
        connect('attach', '--connection', '-', stdin='{}', code=2)
        connect('attach', '--connection', '/nonexistent', code=2)
        connect('attach', code=2)

    def test_where_there_is_nothing_to_clean_that_is_said(self):
        said = self.volume('clean', '--dry-run', module='volume.cli.connect')
        self.assertEqual(
            ('', 'volume-connect: there is nothing to clean\n'),
            (said.stdout, said.stderr),
        )

    def test_a_path_is_printed_where_the_exporter_gives_one(self):
        made = self.json(
            'create', '--name', self.name(), '--size', '1M', '--backend',
            'fast',
        )
        path = self.attach(made['id'])
        self.assertEqual(MIB, os.stat(path).st_size)
        self.volume('detach', made['id'])

    def test_snapshot_revert_clone_and_flatten_keep_the_right_bytes(self):
        name = self.make()
        old, new = os.urandom(512), os.urandom(512)
        self.write(name, old)
        kept = self.json('snapshot', 'create', name, '--name', f'{name}-s')
        self.assertEqual('available', kept['status'])
        self.write(name, new)
        self.volume('clone', name, '--name', f'{name}-c')
        self.volume(
            'create', '--snapshot', f'{name}-s', '--name', f'{name}-o'
        )
        self.volume('flatten', f'{name}-c')
        self.volume('revert', name, f'{name}-s')
        self.assertEqual(
            [old, new, old],
            [self.read(each, 512) for each in
             (name, f'{name}-c', f'{name}-o')],
        )
        (listed,) = self.json('snapshot', 'list', '--volume', name)
        self.volume('snapshot', 'rename', listed['id'], f'{name}-t')
        self.assertEqual(
            listed['id'], self.json('snapshot', 'show', f'{name}-t')['id']
        )
        words = self.refused('delete', name)
        self.assertIn('1 snapshots', words)
        self.assertIn('--cascade', words)
        words = self.refused('revert', f'{name}-o', f'{name}-t', code=3)
        self.assertIn(f'is of volume {listed["volume_id"]}', words)
        self.volume('snapshot', 'delete', f'{name}-t')
        self.assertEqual([], self.json('snapshot', 'list', '--volume', name))
        self.volume('delete', name, f'{name}-c', f'{name}-o')

    def test_delete_with_cascade_takes_the_snapshots_too(self):
        name = self.make()
        kept = self.json('snapshot', 'create', name)
        self.volume('delete', name, '--cascade')
        self.refused('snapshot', 'show', kept['id'], code=3)

    def test_a_second_host_and_what_needs_force_are_refused(self):
        name = self.make()
        self.attach(name)
        self.assertIn('(--force)', self.refused('snapshot', 'create', name))
        self.assertIn('(--force)', self.refused(
            'upload', name, 'file:///nonexistent'
        ))
        self.assertIn(
            'is attached to', self.refused('attach', name, '--host', 'b')
        )
        self.volume('detach', name)

    def test_another_hosts_access_is_never_ended_by_chance(self):
        name = self.make('--multiattach')
        urls = [self.attach(name, '--host', host) for host in ('a', 'b')]
        words = self.refused('detach', name)
        self.assertIn(f'not by "volume attach" on {socket.gethostname()}',
                      words)
        self.volume('detach', name, '--host', 'a')
        with self.assertRaises(errors.VolumeError):
            NbdClient(urls[0], 5)
        NbdClient(urls[1], 5).close()
        self.assertIn('not attached to a', self.refused(
            'force-detach', name, '--host', 'a'
        ))
        self.volume('force-detach', name)
        with self.assertRaises(errors.VolumeError):
            NbdClient(urls[1], 5)
        self.assertEqual('available', self.json('show', name)['status'])

    def test_a_host_that_cannot_connect_gives_its_access_back(self):
        name = self.make()

        def elsewhere(method, path, body):
            if 'attachment' in body and method == 'POST':
                info = body['attachment']['connection_info']
                info['uri'] = 'nbd+unix:///x?socket=/nonexistent/nbd'
            return body

        relay = commands.Relay(self, self.url, elsewhere)
        self.refused('attach', name, url=relay.url, code=5)
        self.assertEqual([], self.json('attachments', name))
        self.assertEqual('available', self.json('show', name)['status'])

    def test_what_an_instance_has_is_left_to_its_compute_service(self):
        name = self.make()
        volume_id = self.json('show', name)['id']
        made = self.world.ask('POST', '/v3/attachments', {'attachment': {
            'volume_uuid': volume_id, 'instance_uuid': ids.new(),
            'connector': {'host': socket.gethostname()},
        }}).json['attachment']
        self.assertIn(made['id'], self.refused('detach', name))
        self.volume('detach', name, '--attachment', made['id'])
