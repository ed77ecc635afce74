# SPDX-License-Identifier: Apache-2.0
"""A compute service for tests: a process of its own that has VolumeAPI alone.

It reads a request a line, ``[method, args, kwargs]`` in JSON, and answers
with ``{'result'}`` or ``{'error', 'message'}``. ``plug`` and ``unplug`` are
what the connector of this host does with a connection_info.
"""

import contextlib
import json
import logging
import os
import subprocess
import sys
import unittest
from collections.abc import Mapping
from typing import Any

from volume import errors
from volume.rpcapi import VolumeAPI

TOP = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
CALLER = {
    'project_id': 'p', 'user_id': 'u', 'is_admin': False,
    'request_id': 'req-compute',
}


class Compute:
    """The process; its methods are VolumeAPI's."""

    def __init__(
        self,
        test: unittest.TestCase,
        url: str,
        timeout_s: float = 30.0,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._child = subprocess.Popen(
            [sys.executable, '-m', __name__, url, str(timeout_s)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=TOP, text=True,
            env={**os.environ, **(environment or {})},
        )
        test.addCleanup(self.end)

    def end(self) -> None:
        with self._child as child:
            if child.stdin and not child.stdin.closed:
                child.stdin.close()
            try:
                child.wait(20)
            except subprocess.TimeoutExpired:
                child.kill()

    def __getattr__(self, method: str):  # type: ignore[no-untyped-def]
        def ask(*args, **kwargs):  # type: ignore[no-untyped-def]
            self._child.stdin.write(json.dumps([method, args, kwargs]) + '\n')
            self._child.stdin.flush()
            answer = json.loads(self._child.stdout.readline())
            if 'error' in answer:
                raise errors.KINDS[answer['error']](answer['message'])
            return answer['result']

        return ask


def _here() -> Any:
    # Not before it is asked for: a client of the service needs none of it.
    from volume.connector import here
    if directory := os.environ.get('TEST_STATE_DIR'):
        here.STATE_DIR = directory
    return here


def _connector(name: str) -> dict[str, Any]:
    found: dict[str, Any] = _here().properties(name)
    return found


def _plug(info: dict[str, Any]) -> str:
    return str(_connected(info, 'attach'))


def _unplug(info: dict[str, Any]) -> None:
    _connected(info, 'detach')


def _connected(info: dict[str, Any], verb: str) -> Any:
    from volume import model
    connection = model.Connection(info['driver_volume_type'], info['data'])
    return getattr(_here().find(connection.protocol), verb)(connection)


OWN = {'connector': _connector, 'plug': _plug, 'unplug': _unplug}


def main(url: str, timeout_s: str) -> None:
    # What the libraries say of a broker that is away is not asked for.
    logging.getLogger().addHandler(logging.NullHandler())
    api = VolumeAPI.connect(url=url, timeout_s=float(timeout_s))
    with contextlib.closing(api):
        for line in sys.stdin:
            method, args, kwargs = json.loads(line)
            try:
                if method == 'loaded':
                    answer = {'result': sorted(sys.modules)}
                elif method in OWN:
                    answer = {'result': OWN[method](*args)}
                else:
                    send = getattr(api, method)
                    answer = {'result': send(CALLER, *args, **kwargs)}
            except errors.VolumeError as failed:
                answer = {'error': failed.kind, 'message': str(failed)}
            sys.stdout.write(json.dumps(answer) + '\n')
            sys.stdout.flush()


if __name__ == '__main__':
    main(*sys.argv[1:])
