# SPDX-License-Identifier: Apache-2.0
"""The command line without a service: words, sizes, tables, lines."""

import argparse
import contextlib
import io
import pathlib
import shlex
import subprocess
import sys
import unittest

from volume import ids
from volume import sizes
from volume.cli import connect
from volume.cli import hostside
from volume.cli import main
from volume.cli import manage
from volume.cli import meter
from volume.cli import show
from volume.cli import values
from volume.cli import wait
from volume.verbs import jobs

REFERENCE = (
    pathlib.Path(__file__).parents[2] / 'doc/source/reference/cli.rst'
)
JOB = {
    'state': 'open', 'direction': 'do', 'attempts': 0, 'error': '',
    'cancelling': False, 'done_bytes': 0, 'total_bytes': 0,
    'rate_bytes_per_s': 0,
}


class Waiting(unittest.TestCase):

    def test_cancel_is_advised_only_where_it_is_allowed(self):
        self.assertEqual(jobs.CANCELLABLE, wait.CANCELLABLE)


class Values(unittest.TestCase):

    def test_sizes_count_by_1024_and_are_exact(self):
        for text, size_bytes in {
            '512B': 512, '1K': 1024, '512M': 512 << 20, '10G': 10 << 30,
            '10GiB': 10 << 30, '10 g': 10 << 30, '1.5T': 3 << 39,
            '0.5k': 512, '3P': 3 << 50, '1023.5K': 1023 * 1024 + 512,
        }.items():
            with self.subTest(text=text):
                self.assertEqual(size_bytes, values.size(text))

    def test_a_size_that_means_two_things_or_none_is_refused(self):
        for text in (
            '', '10', '10GB', '10MB', 'G', '-1G', '0G', '1e3G', '1,5G',
            '10X', '10iB', '1.3K', '0.1G', '1B', '9999999P', '1.G', '٣G',
            'nanG', '10 G B', '0', '-1', '0.0',
        ):
            with self.subTest(text=text):
                with self.assertRaises(argparse.ArgumentTypeError):
                    values.size(text)

    def test_only_a_whole_size_looks_whole(self):
        for size_bytes, text in {
            0: '0 B', 512: '512 B', 1024: '1 KiB', 3 << 39: '1.5 TiB',
            10 << 30: '10 GiB', (10 << 30) + 512: '10.0 GiB',
        }.items():
            self.assertEqual(text, sizes.human(size_bytes))

    def test_bytes_are_told_where_a_rounded_size_hides_them(self):
        for size_bytes, text in {
            0: '0 B', 512: '512 B', 10 << 20: '10 MiB', 90 << 40: '90 TiB',
            (10 << 20) + 512: '10.0 MiB (10486272 bytes)',
        }.items():
            self.assertEqual(text, sizes.exact(size_bytes))

    def test_times_have_units(self):
        self.assertEqual(
            [30, 90, 600, 7200, 0.5],
            [values.duration(t) for t in ('30', '90s', '10m', '2h', '0.5s')],
        )
        for text in '', 'soon', '-1', '1w', '1 m', 'inf':
            with self.assertRaises(argparse.ArgumentTypeError):
                values.duration(text)


class Locations(unittest.TestCase):

    def shown(self, **info):
        return hostside.shown_of({
            'id': '1', 'volume_id': '2', 'status': 'attached',
            'attach_mode': 'rw', 'instance': None, 'attached_at': '',
            'connection_info': info,
        })['location']

    def test_what_becomes_a_device_has_the_url_of_its_export(self):
        self.assertEqual(
            'iscsi://192.0.2.1:3260/iqn.x:volume-1/1', self.shown(
                target_portal='192.0.2.1:3260', target_iqn='iqn.x:volume-1',
                target_lun=1, auth_username='u', auth_password='secret',
            ),
        )
        for address, shown in ('192.0.2.1',) * 2, ('2001:db8::1',
                                                   '[2001:db8::1]'):
            self.assertEqual(f'nvme+tcp://{shown}:4420/nqn.x/1', self.shown(
                target_nqn='nqn.x', ns_id=1,
                portals=[[address, '4420', 'tcp']],
            ))
        self.assertIsNone(self.shown())


class Words(unittest.TestCase):

    def test_a_wrong_command_line_is_one_line_and_no_traceback(self):
        job = ids.new()
        for words in (
            (), ('nothing',), ('create',), ('create', '--size'),
            ('create', '--size', '10'), ('create', '--size', '10GB'),
            ('create', '--size', '-1G'), ('create', '--siz', '1G'),
            ('create', '--size', '1G', '--id', 'x'),
            ('create', '--size', '1G', '--checksum', 'md5:00'),
            ('create', '--size', '1G', '--image-format', 'raw'),
            ('create', '--size', '1G', '--metadata', 'x'),
            ('create', '--source', 'x', '--snapshot', 'y'),
            ('list', '--limit', '0'), ('list', '--format', 'xml'),
            ('show',), ('show', ''), ('show', 'a', 'b'), ('snapshot',),
            ('jobs', 'cancel', 'x'), ('jobs', 'list', '--state', 'x'),
            ('jobs', 'cancel', job, '--timeout', 'soon'),
            ('attach', 'x', '--mode', 'wr'), ('set', 'x'),
            ('detach', 'x', '--host', 'a', '--attachment', job),
            ('--url', 'ftp://x', 'list'), ('--url', 'x', 'list'),
            ('--url', 'http://', 'list'), ('--url', 'http://x:y', 'list'),
            ('--url', 'http://..x/', 'list'), ('--url', 'unix:', 'list'),
            ('--url', 'http://me:secret@x/', 'list'),
            ('--url', 'https://x', '--ca-file', '/nonexistent', 'list'),
            ('--token-file', '/nonexistent', 'list'),
            ('--token-file', '/dev/null', 'list'),
            ('show', '\udcff'), ('--project', 'a\nb\udc80', 'list'),
        ):
            with self.subTest(words=words):
                out, err = io.StringIO(), io.StringIO()
                with (
                    contextlib.redirect_stdout(out),
                    contextlib.redirect_stderr(err),
                ):
                    try:
                        code = main.main(words)
                    except SystemExit as ended:
                        code = ended.code
                self.assertEqual((2, ''), (code, out.getvalue()))
                self.assertEqual(1, err.getvalue().count('\n'))
                self.assertNotIn('secret', err.getvalue())


    def said(self, *words):
        """Return what is said of a wrong command line."""
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            with self.assertRaises(SystemExit):
                main.main(words)
        return err.getvalue()

    def test_what_is_wrong_is_told_in_plain_words(self):
        for words, said in {
            ('create', '--size', '-1G'): "size '-1G' is not like 10G",
            ('create', '--size', '0'): "size '0' must be greater than 0",
            ('create', '--sise', '1G'): 'see "volume create --help"',
            ('jobs', 'show', 'x', '--y'): 'see "volume jobs show --help"',
            ('--sise', 'list'): 'see "volume --help"',
            ('rename', 'a', ''): 'the name is empty',
            ('set', 'a', '--name', ' '): 'the name is empty',
            ('snapshot', 'rename', 'a', ''): 'the name is empty',
        }.items():
            with self.subTest(words=words):
                self.assertIn(said, self.said(*words))


class Help(unittest.TestCase):

    def test_whatever_a_command_takes_has_a_word_of_help(self):
        for make in main.make_parser, connect.make_parser, manage._parser:
            for verb in verbs(make()):
                for action in verb._actions:
                    with self.subTest(verb=verb.prog, takes=action.dest):
                        self.assertTrue(action.help)

    def test_every_verb_has_an_example_that_is_right(self):
        seen = 0
        for verb in verbs(main.make_parser()):
            with self.subTest(verb=verb.prog):
                example = verb.get_default('example')
                self.assertTrue(
                    example.startswith(f'{verb.prog} ')
                    or example == verb.prog, example,
                )
                self.assertIn(example, verb.format_help())
                parsed = main.make_parser().parse_args(
                    shlex.split(example)[1:]
                )
                self.assertIs(verb.get_default('run'), parsed.run)
                seen += 1
        self.assertGreater(seen, 25)

    def test_the_reference_names_every_verb(self):
        for verb in verbs(main.make_parser()):
            self.assertIn(f'``{verb.prog}``', REFERENCE.read_text())

    def test_options_stand_before_or_behind_the_verb(self):
        for words in '--format json list', 'list --format json':
            parsed = main.make_parser().parse_args(words.split())
            self.assertEqual('json', parsed.format)
        for words in 'jobs --limit 3', 'jobs list --limit 3', \
                'jobs --limit 3 list':
            parsed = main.make_parser().parse_args(words.split())
            self.assertEqual(3, parsed.limit)

    def test_nothing_slow_is_imported_to_start(self):
        slow = ('rich', 'requests', 'sqlalchemy', 'oslo_config', 'stevedore')
        done = subprocess.run(
            [sys.executable, '-c',
             'import sys; from volume.cli import main; main.make_parser(); '
             f'sys.exit(repr(set({slow}) & set(sys.modules)))'],
            capture_output=True, text=True, timeout=60,
        )
        self.assertEqual('set()', done.stderr.strip())


class Shown(unittest.TestCase):

    def test_no_terminal_takes_a_name_for_commands(self):
        self.assertEqual('a?[31mb?c?d', show.clean('a\x1b[31mb\nc\x9bd'))
        for things in {'name': 'x\x1b[2J\ny'}, [{'name': 'x\x1b[2J\ny'}]:
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                if isinstance(things, dict):
                    show.one(things, 'table')
                else:
                    show.many(things, [
                        show.Column('NAME', lambda row: row['name'])
                    ], 'table')
            self.assertIn('x?[2J?y', out.getvalue())

    def test_a_table_is_as_wide_as_its_widest_cell(self):
        out = io.StringIO()
        columns = [
            show.Column('A', lambda row: row['a']),
            show.Column('B', lambda row: row['b']),
        ]
        with contextlib.redirect_stdout(out):
            show.many(
                [{'a': 'long', 'b': None}, {'a': 1, 'b': 2}], columns, 'table'
            )
        self.assertEqual('A     B\nlong\n1     2\n', out.getvalue())


class Lines(unittest.TestCase):

    def setUp(self):
        self.now = 0.0
        self.out = io.StringIO()
        self.lines = meter.Lines('creating x', self.out, lambda: self.now)

    def show(self, at, **changes):
        """Return what is printed when a job is seen at a time."""
        self.now = at
        self.out.truncate(self.out.seek(0))
        self.lines.show({**JOB, **changes})
        return self.out.getvalue()

    def test_a_line_now_and_then_if_there_is_something_new(self):
        half = {'done_bytes': 1 << 20, 'total_bytes': 2 << 20,
                'rate_bytes_per_s': 1024}
        self.assertEqual('', self.show(1, **half))
        self.assertEqual(
            'creating x: 1 MiB of 2 MiB, 1 KiB/s\n', self.show(5, **half)
        )
        self.assertEqual('', self.show(6, **{**half, 'done_bytes': 5}))
        self.assertEqual('', self.show(11, **half))
        self.assertNotEqual('', self.show(16, **{**half, 'done_bytes': 5}))

    def test_what_keeps_a_job_is_said_at_once_and_once(self):
        trouble = {'attempts': 1, 'error': 'the backend is down'}
        self.assertEqual(
            'creating x: it will be tried again: the backend is down\n',
            self.show(0.1, **trouble),
        )
        self.assertEqual('', self.show(0.2, **trouble))
        self.assertIn('undone', self.show(
            0.3, direction='undo', error='the pool is full'
        ))


def verbs(parser):
    """Yield the parsers of all verbs that have no verbs of their own."""
    nested = [
        action for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
    ]
    if not nested:
        yield parser
    for action in nested:
        for each in dict.fromkeys(action.choices.values()):
            yield from verbs(each)
