# SPDX-License-Identifier: Apache-2.0
"""The real service in a process of its own, asked through its REST door."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

from demo_family import Family
from demo_screen import Failed
from demo_screen import Step

from volume import errors
from volume.cli.client import Client

T = TypeVar('T')
Json = dict[str, Any]

START_S = 30.0
STOP_S = 30.0
WAIT_S = 120.0
LOOK_S = 0.02
LOG_LINES = 30
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


class Service:
    """``volume-service``: start, ask, kill, start again."""

    def __init__(
        self, family: Family, directory: str, images: str
    ) -> None:
        self._family = family
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ''
        self.client = Client()
        for name in 'fast', 'archive':
            os.mkdir(self._path(name))
        with open(self._path('volume.conf'), 'w') as f:
            f.write(CONFIGURATION.format(directory=directory, images=images))

    # The process.

    def start(self) -> None:
        """Start it, and wait until it serves.

        :raises Failed: it does not
        """
        with (
            open(self._path('service.out'), 'wb') as out,
            open(self._path('service.log'), 'ab') as log,
        ):
            self._process = self._family.start(
                _command('volume-service'),
                '--config-file', self._path('volume.conf'),
                stdout=out, stderr=log,
            )
        process = self._process

        def address() -> str:
            if process.poll() is not None:
                raise Failed(
                    f'the service ended with code {process.returncode}'
                )
            with open(self._path('service.out')) as out:
                words = out.read()
            return words.split()[-1] if words.endswith('\n') else ''

        self.url = until(address, bool, 'the service to serve', START_S)
        self.client = Client(self.url)

    def kill(self) -> None:
        """End it by SIGKILL, as a crash or the kernel would."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> int:
        """Ask it to stop; return its exit code."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            raise Failed(
                f'the service did not stop within {STOP_S:g} s'
            ) from None

    def manage(self, *words: str) -> list[Json]:
        """Return what ``volume-manage`` says; what it finds is no failure."""
        _, said = self._family.run(
            _command('volume-manage'), '--format', 'json',
            '--config-file', self._path('volume.conf'), *words,
            codes=(0, 1),
        )
        found: list[Json] = _json(f'volume-manage {" ".join(words)}', said)
        return found

    def command(self, *words: str) -> Json:
        """Return what a verb of ``volume`` answers.

        :raises Failed: it is refused, or fails
        """
        _, said = self._family.run(
            _command('volume'), '--url', self.url, '--format', 'json', *words
        )
        found: Json = _json(f'volume {" ".join(words)}', said)
        return found

    def log_tail(self) -> str:
        """Return the last lines that the service has logged.

        The requests that went well are left out.
        """
        with contextlib.suppress(OSError):
            with open(self._path('service.log'), errors='replace') as f:
                lines = [line for line in f if '" 20' not in line]
                return ''.join(lines[-LOG_LINES:])
        return ''

    def stored_bytes(self, *backends: str) -> int:
        """Return what backends' directories really take on the disk."""
        total = 0
        for backend in backends:
            for where, _, names in os.walk(self._path(backend)):
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

    # Ours alone.

    def _path(self, name: str) -> str:
        return os.path.join(self._directory, name)


def until(
    look: Callable[[], T],
    is_right: Callable[[T], bool],
    what: str,
    limit_s: float = WAIT_S,
) -> T:
    """Return what ``look`` gives once it is right.

    :raises Failed: it never is
    """
    deadline = time.monotonic() + limit_s
    while not is_right(found := look()):
        if time.monotonic() > deadline:
            now = found['status'] if isinstance(found, dict) else found
            raise Failed(f'waited {limit_s:g} s for {what}; it is {now!r}')
        time.sleep(LOOK_S)
    return found


def percent(job: Json) -> int:
    """Return how far a job is."""
    return 100 * int(job['done_bytes']) // max(int(job['total_bytes']), 1)


def _json(command: str, said: str) -> Any:
    try:
        return json.loads(said)
    except ValueError:
        raise Failed(f'{command}: {said}') from None


def _command(name: str) -> str:
    """Return a command that was installed beside this Python."""
    path = os.path.join(os.path.dirname(sys.executable), name)
    if not os.path.exists(path):
        raise Failed(f'{path} is not there; call ./run demo')
    return path
