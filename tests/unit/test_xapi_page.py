# SPDX-License-Identifier: Apache-2.0
"""The simulator's page says what is so."""

import contextlib
import io
import json
import pathlib
import re
import unittest

from tests import xapi
from volume.sim.xapi import faults
from volume.sim.xapi import main
from volume.sim.xapi.failure import Failure
from volume.sim.xapi.net import control
from volume.sim.xapi.published import datamodel
from volume.sim.xapi.published import generic
from volume.sim.xapi.state import limits

PAGE = (
    pathlib.Path(__file__).parents[2] / 'doc/source/simulator.rst'
).read_text()
VALUES = {
    'int': 0, 'bool': False, 'float': 0.0, 'datetime': '20260101T00:00:00Z',
}


class Page(unittest.TestCase):
    """Each list in it is whole."""

    def assert_told(self, names):
        self.assertEqual(
            [], [name for name in names if f'``{name}``' not in PAGE])

    def test_every_limit_is_told_with_its_default(self):
        self.assert_told(limits.NAMES)

    def test_every_setting_is_told(self):
        self.assert_told(main.DEFAULTS)

    def test_every_kind_of_storage_is_told(self):
        for text in re.findall(r'"what": "(\w+)"', PAGE):
            self.assertIn(text, main._STORAGE)
        self.assert_told(main._STORAGE)

    def test_every_fault_is_told(self):
        self.assert_told(faults.KINDS)

    def test_every_verb_of_the_control_port_is_told(self):
        self.assertEqual([], [
            (method, word) for method, word in control._VERBS
            if not re.search(f'{method} (\\$CONTROL)?/{word}\\b', PAGE)
        ])

    def test_the_configuration_shown_is_one(self):
        text = PAGE.split('$ cat pool.json\n', 1)[1].split('$ ', 1)[0]
        shown = json.loads(text)
        self.assertLessEqual(shown.keys(), main.DEFAULTS.keys())


class Missing(unittest.TestCase):
    """What is listed as not simulated is that, and nothing else is."""

    def test_each_call_listed_answers_that_it_is_not_implemented(self):
        pool = xapi.simulator(self, profile='head', hosts=1)
        session = pool.invoke(
            pool.master, 'session.login_with_password', ['root', 'secret'])
        model = datamodel.load()
        others = {}
        for name in generic.missing(model):
            message = model.message(name)
            sent = [
                sample(model, param.type) for param in message.params
            ]
            if message.has_session:
                sent.insert(0, session)
            with self.assertRaises(Failure, msg=name) as caught:
                pool.invoke(pool.master, name, sent)
            if caught.exception.code == 'NOT_IMPLEMENTED':
                self.assertEqual((name,), caught.exception.params)
            else:
                others.setdefault(caught.exception.code, []).append(name)
        self.assertLessEqual(
            others.keys(), {'MESSAGE_REMOVED', 'MESSAGE_METHOD_UNKNOWN'})

    def test_the_command_prints_the_list(self):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            self.assertEqual(0, main.main(['calls']))
        self.assertEqual(
            generic.missing(datamodel.load()), printed.getvalue().split())

    def test_what_a_volume_driver_needs_is_not_in_the_list(self):
        self.assertEqual(set(), {
            'SR.create', 'SR.scan', 'SR.probe', 'PBD.plug', 'VDI.create',
            'VDI.snapshot', 'VDI.clone', 'VDI.copy', 'VDI.resize',
            'VBD.plug', 'event.from', 'task.cancel', 'VDI.get_nbd_info',
        } & {*generic.missing(datamodel.load())})


def sample(model, kind):
    """Return some value of a type."""
    if kind.endswith(' set'):
        return []
    if kind.endswith(' map'):
        return {}
    if kind.endswith(' record'):
        cls = kind.removesuffix(' record')
        fields = model.fields(cls)
        return {
            name: sample(model, fields[name].type) for name in
            model.constructors.get(cls, {}).get('required', ())
        }
    if kind.startswith('enum '):
        return sorted(model._enums[kind[5:]])[0]
    return VALUES.get(kind, 'OpaqueRef:NULL')
