# SPDX-License-Identifier: Apache-2.0
"""Options come from files and the command line, and from nowhere else."""

import contextlib
import io
import os
import unittest

from oslo_config import cfg

from volume import conf as options
from volume.testing import fixtures


class Options(unittest.TestCase):
    def load(self, text='', *argv):
        path = os.path.join(fixtures.state_dir(self), 'volume.conf')
        with open(path, 'w') as f:
            f.write(text)
        return options.load(argv, [path])

    def refusal(self, text='', *argv):
        """Return what a person reads whose configuration is wrong."""
        told = io.StringIO()
        with contextlib.redirect_stderr(told):
            try:
                conf = self.load(text, *argv)
                for option in options.SERVICE:
                    conf[option.dest]
                for option in options.API:
                    conf.api[option.dest]
            except (SystemExit, cfg.Error, ValueError) as wrong:
                return f'{told.getvalue()}{wrong}'
        raise AssertionError('it was accepted')

    def test_the_defaults_are_closed(self):
        conf = self.load()
        self.assertEqual('127.0.0.1', conf.api.listen)
        self.assertEqual([], conf.image_allowed_directories)
        self.assertEqual([], conf.enabled_backends)
        self.assertEqual(['api', 'manager'], conf.roles)

    def test_the_command_line_wins_over_the_file(self):
        conf = self.load(
            '[DEFAULT]\nstate_path = /a\n', '--state_path', '/b'
        )
        self.assertEqual('/b', conf.state_path)

    def test_the_database_lies_in_the_state_directory(self):
        conf = self.load('[DEFAULT]\nstate_path = /a/b\n')
        self.assertEqual(
            'sqlite:////a/b/volume.sqlite', options.database_url(conf)
        )

    def test_a_relative_state_directory_is_made_absolute(self):
        conf = self.load('[DEFAULT]\nstate_path = here\n')
        self.assertEqual(
            f'sqlite:///{os.getcwd()}/here/volume.sqlite',
            options.database_url(conf),
        )

    def test_another_database_is_taken_as_it_is(self):
        url = 'postgresql+psycopg://volume:pw@db/volume'
        conf = self.load(f'[DEFAULT]\ndatabase = {url}\n')
        self.assertEqual(url, options.database_url(conf))

    def test_the_database_s_password_is_not_shown(self):
        conf = self.load('[DEFAULT]\ndatabase = mysql://u:hunter2@db/v\n')
        with self.assertLogs('x', 'DEBUG') as logged:
            import logging
            conf.log_opt_values(logging.getLogger('x'), logging.DEBUG)
        self.assertNotIn('hunter2', '\n'.join(logged.output))

    def test_what_cannot_be_is_refused_with_its_name(self):
        for text in (
            'lease_s = 0', 'lease_s = soon', 'sweep_interval_s = 0',
            'job_retry_s = -1', 'roles = api, cook', 'log_level = LOUD',
        ):
            with self.subTest(text):
                self.assertIn(
                    text.split()[0], self.refusal(f'[DEFAULT]\n{text}\n')
                )
        for text in 'port = 70000', 'auth = trust', 'threads = 0':
            with self.subTest(text):
                self.assertIn(
                    text.split()[0], self.refusal(f'[api]\n{text}\n')
                )

    def test_a_section_that_stands_twice_is_refused_with_both_lines(self):
        said = self.refusal(
            '[DEFAULT]\nenabled_backends = b\n[b]\ndriver = file\n'
            'directories = /one\n[b]\ndirectories = /two\n'
        )
        self.assertIn('volume.conf:6: section [b] stands in line 3', said)

    def test_an_option_that_stands_twice_is_refused(self):
        for text, word in (
            ('[b]\ndirectories = /one\n# another\ndirectories = /two\n',
             'option directories of section [b] stands in line 5'),
            ('[api]\nport = 1\nport = 2\n', 'option port of section [api]'),
        ):
            with self.subTest(word):
                self.assertIn(word, self.refusal(
                    f'[DEFAULT]\nenabled_backends = b\n\n{text}'
                    if '[b]' in text else text
                ))
        self.assertIn('option lease-s', self.refusal(
            '[DEFAULT]\nlease_s = 1\nlease-s = 2\n'))

    def test_what_other_packages_may_repeat_is_left_to_them(self):
        self.load(
            '[oslo_messaging_notifications]\ndriver = log\ndriver = noop\n'
            '[b]\ndirectories = /one,\n  /two\n'
        )

    def test_every_value_is_read_before_it_is_needed(self):
        path = os.path.join(fixtures.state_dir(self), 'volume.conf')
        for text in (
            '[DEFAULT]\nlease_s = soon\n', '[api]\nthreads = many\n',
            '[DEFAULT]\nimage_http_attempts = -1\n', '[api\nport = 1\n',
            'no assignment\n',
        ):
            with open(path, 'w') as f:
                f.write(text)
            with self.subTest(text), self.assertRaises(cfg.Error) as wrong:
                options.load([], [path])
            self.assertIn(path, str(wrong.exception))

    def test_a_file_that_is_not_there_is_refused(self):
        with contextlib.redirect_stderr(io.StringIO()):
            with self.assertRaises((SystemExit, cfg.Error)):
                options.load([], ['/nowhere/volume.conf'])

    def test_two_configurations_do_not_know_each_other(self):
        one = self.load('[DEFAULT]\nstate_path = /one\n')
        other = self.load('[DEFAULT]\nstate_path = /other\n')
        self.assertEqual(
            ['/one', '/other'], [one.state_path, other.state_path]
        )


class Catalogue(unittest.TestCase):
    """What the sample file and the docs are made of."""

    def test_each_driver_has_a_section_with_its_own_and_the_common(self):
        listed = dict(options.list_opts())
        for name in 'file', 'qcow':
            dests = {option.dest for option in listed[f'my_{name}']}
            self.assertLessEqual(
                {'driver', 'exporter', 'tags', 'directories'}, dests
            )

    def test_no_section_names_an_option_twice(self):
        for group, listed in options.list_opts():
            dests = [option.dest for option in listed]
            self.assertEqual(len(set(dests)), len(dests), group)

    def test_every_help_begins_with_one_short_sentence(self):
        for group, listed in options.list_opts():
            for option in listed:
                with self.subTest(group=group, option=option.name):
                    first = (option.help or '').split('\n')[0]
                    self.assertTrue(first.endswith('.'), first)
                    self.assertLess(len(first), 80)

    def test_an_entry_point_that_cannot_be_loaded_is_left_out(self):
        with self.assertLogs('volume.conf', 'ERROR') as logged:
            options._note_failure(None, 'broken = x:y', ImportError('no x'))
        self.assertIn('broken', logged.output[0])
