# SPDX-License-Identifier: Apache-2.0
"""The service of the demo: two backends, asked through its REST door."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from demo_family import Family
from demo_screen import Failed
from demo_screen import Step
from service_process import command_path
from service_process import Json
from service_process import parsed
from service_process import ServiceProcess
from service_process import until

from volume import errors

HINTS = 'OS-SCH-HNT:scheduler_hints'

CONFIGURATION = """\
[DEFAULT]
enabled_backends = fast, archive
state_path = {directory}/state
host = demo
# The demo's web server is on loopback, where images are refused otherwise.
image_allowed_networks = 127.0.0.0/8
image_allowed_directories = {images}
upkeep_interval_s = 0.5
stats_interval_s = 1
log_level = INFO

[api]
port = 0

[fast]
driver = qcow
directories = {directory}/fast

[archive]
driver = file
directories = {directory}/archive
cost = 10
"""


class Service(ServiceProcess):
    """``volume-service`` with the backends ``fast`` and ``archive``."""

    def __init__(
        self, family: Family, directory: str, images: str
    ) -> None:
        super().__init__(
            family, directory,
            CONFIGURATION.format(directory=directory, images=images),
            ('fast', 'archive'),
        )

    def command(self, *words: str) -> Json:
        """Return what a verb of ``volume`` answers.

        :raises Failed: it is refused, or fails
        """
        _, said = self._family.run(
            command_path('volume'), '--url', self.url, '--format', 'json',
            *words,
        )
        found: Json = parsed(f'volume {" ".join(words)}', said)
        return found

    def stored_bytes(self, *backends: str) -> int:
        """Return what backends' directories really take on the disk."""
        total = 0
        for backend in backends:
            for where, _, names in os.walk(self.path(backend)):
                for name in names:
                    with contextlib.suppress(FileNotFoundError):
                        path = os.path.join(where, name)
                        total += os.lstat(path).st_blocks * 512
        return total

    # REST.

    def create(
        self,
        name: str,
        size_bytes: int,
        *,
        backend: str = 'fast',
        image: str = '',
        hints: Json | None = None,
        **source: str,
    ) -> str:
        """Ask for a volume, and return its id at once."""
        wanted: Json = {'name': name, 'size_bytes': size_bytes, **source}
        if image:
            wanted['imageRef'] = image
        return str(self.client.post('/volumes', {
            'volume': wanted, HINTS: {'backend': backend, **(hints or {})},
        })['volume']['id'])

    def act(self, volume_id: str, action: str, **info: Any) -> None:
        self.client.post(f'/volumes/{volume_id}/action', {action: info})

    def volume(self, volume_id: str) -> Json:
        found: Json = self.client.get(f'/volumes/{volume_id}')['volume']
        return found

    def job(self, volume_id: str) -> Json | None:
        """Return the open job of a volume, if there is one."""
        found = self.client.get(
            '/os-volume-jobs', volume_id=volume_id, state='open'
        )
        return next(iter(found['jobs']), None)

    def settle(
        self, noun: str, row_id: str, status: str, step: Step | None = None
    ) -> Json:
        """Wait until a volume or snapshot has a status.

        :raises Failed: it went into another one for good, and why
        """
        def look() -> Json:
            found: Json = self.client.get(f'/{noun}s/{row_id}')[noun]
            if found['status'].startswith('error'):
                raise Failed(
                    f'{noun} {found["name"]} is {found["status"]}: '
                    f'{found["reason"]}'
                )
            if step and noun == 'volume' and found['status'] != status:
                self.show_progress(row_id, step)
            return found

        return until(
            look, lambda found: found['status'] == status,
            f'{noun} {row_id} to be {status}',
        )

    def show_progress(self, volume_id: str, step: Step) -> None:
        job = self.job(volume_id)
        if job and job['total_bytes']:
            step.doing(f'{job["kind"]} {percent(job)} %')

    def delete(self, noun: str, row_id: str) -> None:
        """Delete a volume or snapshot, and wait until it is gone."""
        self.client.delete(f'/{noun}s/{row_id}')

        def is_gone() -> bool:
            try:
                found = self.client.get(f'/{noun}s/{row_id}')[noun]
            except errors.NotFound:
                return True
            if found['status'] == 'error_deleting':
                raise Failed(f'{noun} {row_id}: {found["reason"]}')
            return False

        until(is_gone, bool, f'{noun} {row_id} to be gone')


def percent(job: Json) -> int:
    """Return how far a job is."""
    return 100 * int(job['done_bytes']) // max(int(job['total_bytes']), 1)
