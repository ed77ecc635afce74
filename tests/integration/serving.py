# SPDX-License-Identifier: Apache-2.0
"""A real service with a file backend, asked through its REST door."""

from __future__ import annotations

import json
import os
import time
import unittest
from collections.abc import Callable
from typing import Any

import webob

from tests import database
from volume import conf as options
from volume import service
from volume.api import app
from volume.api import auth
from volume.api.call import Limits
from volume.testing import fixtures

SETTLED = {
    'available', 'error', 'in-use', 'error_deleting', 'error_extending',
}
WAIT_S = 60


class World:
    """A service in a fresh directory; ``ask`` speaks to its application."""

    def __init__(
        self,
        test: unittest.TestCase,
        *,
        roles: str = 'manager',
        settings: str = '',
        sections: str = '',
        names: str = 'fast',
        snapshots: bool = False,
    ) -> None:
        self.directory = fixtures.state_dir(test)
        state, self.images = (
            os.path.join(self.directory, name) for name in ('state', 'images')
        )
        # The file driver has snapshots where files can share blocks.
        self.pool = (
            fixtures.reflink_directory if snapshots
            else fixtures.plain_directory
        )(test)
        os.mkdir(self.images)
        chosen = database.option(test, settings)
        if not chosen and 'database =' not in settings:
            os.mkdir(state)
            database.copy(f'sqlite:///{state}/volume.sqlite')
        path = os.path.join(self.directory, 'volume.conf')
        with open(path, 'w') as f:
            f.write(
                '[DEFAULT]\n'
                f'enabled_backends = {names}\nstate_path = {state}\n'
                f'host = node-1\nroles = {roles}\n'
                f'{chosen}'
                # Nothing periodic between a test's statements.
                + unless(settings, 'stats_interval_s = 600')
                + unless(settings, 'sweep_interval_s = 600')
                + unless(settings, 'reservation_timeout_s = 86400') +
                f'image_allowed_directories = {self.images}\n'
                f'image_upload_directories = {self.images}\n'
                f'{settings}\n'
                '[api]\nport = 0\n'
                f'[fast]\ndriver = file\ndirectories = {self.pool}\n'
                'exporter = local\ntags = ssd, local\n'
                # That file system is 1 GiB; what it is filled with is sparse.
                + ('oversubscription = 20\n' if snapshots
                   else 'capacity_gib = 8\n')
                + f'{sections}\n'
            )
        self.path = path
        self.start()
        test.addCleanup(self.stop)

    def start(self) -> None:
        """Serve, as the configuration is now, with all doors open."""
        self.service = service.Service(options.load([], [self.path]))
        # Nothing periodic would report a backend that is slow at first.
        self.service.check_wait_s = 60.0
        self.service.start()
        self.core = self.service.core
        self.app = app.make_app(self.core, auth.NoAuth())

    def stop(self) -> None:
        """End the service; to be repeated."""
        self.service.stop()

    def with_tokens(
        self, entries: list[dict[str, Any]], limits: Limits | None = None
    ) -> None:
        """Let in only holders of tokens from now on; see ``token``."""
        path = os.path.join(self.directory, 'tokens.json')
        write_tokens(path, entries)
        self.app = app.make_app(
            self.core, auth.Tokens(path), limits=limits,
            upload_url=f'file://{self.images}',
        )

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        version: str | None = '3.54',
        token: str | None = None,
        headers: dict[str, str] | None = None,
        remote: str = '',
    ) -> Answer:
        """Send a request; a body that is no bytes goes as JSON."""
        request = webob.Request.blank(
            path, method=method, environ={'REMOTE_ADDR': remote}
        )
        if version:
            request.headers['OpenStack-API-Version'] = f'volume {version}'
        if token:
            request.headers['X-Auth-Token'] = token
        if body is not None:
            request.body = (
                body if isinstance(body, bytes) else json.dumps(body).encode()
            )
            request.headers['Content-Type'] = 'application/json'
        request.headers.update(headers or {})
        response = request.get_response(self.app)
        return Answer(response)

    def make(self, token: str | None = None, **volume: Any) -> dict[str, Any]:
        """Return a new volume that is available."""
        asked = self.ask(
            'POST', '/v3/volumes', {'volume': {'size': 1, **volume}},
            token=token,
        )
        assert asked.status == 202, asked.text
        return self.settled(asked.json['volume']['id'], token=token)

    def settled(
        self, row_id: str, noun: str = 'volume', token: str | None = None
    ) -> dict[str, Any]:
        """Return a thing once its job has ended."""
        return until(
            lambda: self.ask(
                'GET', f'/v3/{noun}s/{row_id}', token=token
            ).json[noun],
            lambda thing: thing['status'] in SETTLED,
        )

    def gone(self, row_id: str, noun: str = 'volume') -> None:
        """Wait until a thing is no longer there."""
        until(
            lambda: self.ask('GET', f'/v3/{noun}s/{row_id}').status,
            lambda status: status == 404,
        )


class Answer:
    """What came back."""

    def __init__(self, response: webob.Response) -> None:
        self.status: int = response.status_int
        self.headers = response.headers
        self.text: str = response.text if response.charset else (
            response.body.decode()
        )

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def fault(self) -> str:
        """The name of the fault."""
        (name,) = self.json
        return str(name)

    @property
    def message(self) -> str:
        (fault,) = self.json.values()
        return str(fault['message'])


def token(name: str, project: str, *roles: str) -> dict[str, Any]:
    """Return an entry of a tokens file; the token is the user's name."""
    return {
        'token_sha256': auth.hash_token(name), 'user': name,
        'project': project, 'roles': list(roles),
    }


def write_tokens(
    path: str, entries: list[dict[str, Any]], mode: int = 0o600
) -> None:
    """Write a tokens file as an operator does: beside it, then over it."""
    draft = f'{path}.new'
    with open(draft, 'w') as f:
        json.dump({'tokens': entries}, f)
    os.chmod(draft, mode)
    os.rename(draft, path)


def unless(settings: str, default: str) -> str:
    """Return a line of the configuration that no test has of its own."""
    name = default.split(' ')[0]
    return '' if name in settings else f'{default}\n'


def until(
    look: Callable[[], Any], is_right: Callable[[Any], bool]
) -> Any:
    """Return what ``look`` gives once it is right."""
    deadline = time.monotonic() + WAIT_S
    while not is_right(found := look()):
        if time.monotonic() > deadline:
            raise AssertionError(f'it did not come to that: {found!r:.500}')
        time.sleep(0.005)
    return found
