# SPDX-License-Identifier: Apache-2.0
"""Notifications: told in their order, and never waited for."""

import logging
import unittest

from oslo_config import cfg

from volume import errors
from volume import rpc
from volume.notifier import Notifier
from volume.rpcapi import VolumeAPI

WAIT_S = 30


class Notifying(unittest.TestCase):
    """Notifications by oslo.messaging's own drivers."""

    def make(self, *drivers, **options):
        conf = cfg.ConfigOpts()
        conf([], default_config_files=[], default_config_dirs=[])
        rpc.register_opts(conf)
        conf.set_override(
            'driver', list(drivers), group='oslo_messaging_notifications'
        )
        made = Notifier(conf, 'node-1', **options)
        self.addCleanup(made.stop)
        return made

    def end(self, notify):
        """Have all sent, however long that takes."""
        thread = notify._thread
        notify.stop()
        thread.join(WAIT_S)

    def test_events_are_sent_in_their_order_and_name_their_publisher(self):
        kept = Kept()
        logger = logging.getLogger('oslo.messaging.notification')
        logger.addHandler(kept)
        self.addCleanup(logger.removeHandler, kept)
        self.addCleanup(logger.setLevel, logger.level)
        logger.setLevel(logging.DEBUG)
        notify = self.make('log')
        wanted = [f'volume.create.{number}' for number in range(20)]
        for event in [*wanted, 'volume.create.error']:
            notify(event, {'volume_id': 'v'})
        self.end(notify)
        self.assertEqual(
            [*wanted, 'volume.create.error'],
            [record.name.split('.', 3)[3] for record in kept.records],
        )
        self.assertIn('volume.node-1', kept.records[0].getMessage())
        self.assertEqual(
            ['INFO', 'ERROR'],
            [kept.records[0].levelname, kept.records[-1].levelname],
        )

    def test_without_a_driver_they_are_logged_for_who_looks(self):
        notify = self.make()
        with self.assertLogs('volume.notifier', 'DEBUG') as logged:
            notify('volume.create.end', {'volume_id': 'v'})
        self.assertIn('volume.create.end {"volume_id": "v"}', logged.output[0])

    def test_what_is_sent_is_what_was_said_then(self):
        payload = {'status': 'creating'}
        notify = self.make()
        with self.assertLogs('volume.notifier', 'DEBUG') as logged:
            notify('volume.create.start', payload)
            payload['status'] = 'available'
        self.assertIn('creating', logged.output[0])

    def test_a_service_without_a_broker_has_none_by_default(self):
        conf = cfg.ConfigOpts()
        conf([], default_config_files=[], default_config_dirs=[])
        self.assertFalse(rpc.is_remote(conf))
        conf.set_override('transport_url', 'rabbit://h/')
        self.assertTrue(rpc.is_remote(conf))
        with self.assertRaises(errors.Invalid):
            VolumeAPI.connect(url='fake://')
        with self.assertRaises(errors.Invalid) as caught:
            VolumeAPI.connect(url='nonsense://u:sesame@h/')
        self.assertNotIn('sesame', str(caught.exception))


class Kept(logging.Handler):
    """Keeps the records."""

    def __init__(self):
        super().__init__()
        self.records = []

    def emit(self, record):
        self.records.append(record)
