# SPDX-License-Identifier: Apache-2.0
"""``volume-xapi-sim``: a pool as a process.

It prints one line, a JSON object that says where it listens, and then runs
until it is told to end. What it knows lies in its directory; killed and
started again it goes on with it.
"""

from __future__ import annotations

import argparse
import fcntl
import inspect
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from volume.sim.xapi import registry
from volume.sim.xapi.net.control import Control
from volume.sim.xapi.pool import Pool
from volume.sim.xapi.published import datamodel
from volume.sim.xapi.published import generic
from volume.sim.xapi.published import profiles
from volume.sim.xapi.state.sessions import ROOT
from volume.sim.xapi.state.sessions import User
from volume.sim.xapi.world import World

PASSWORD: Final = 'VOLUME_XAPI_SIM_PASSWORD'
DEFAULTS: Final[Mapping[str, Any]] = {
    'profile': 'xcp-ng-8.3', 'name': 'pool', 'hosts': 2, 'tls': False,
    'ports': [], 'control_port': 0, 'users': {}, 'switches': {},
    'storage': [], 'directory': None, 'world': None,
}
_STORAGE: Final[Mapping[str, Callable[..., object]]] = {
    'nfs': World.add_nfs, 'share': World.add_share,
    'device': World.add_device, 'lun': World.add_lun,
    'target': World.add_target, 'array': World.add_array,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``volume-xapi-sim``."""
    given = _parser().parse_args(argv)
    try:
        if given.what == 'calls':
            return _print_calls()
        config = _config(given)
        logging.basicConfig(
            level=logging.DEBUG if given.debug else logging.WARNING,
            format='%(asctime)s %(levelname)s %(name)s %(message)s',
        )
        return _serve(config)
    except (OSError, ValueError, TypeError) as wrong:
        sys.stderr.write(f'volume-xapi-sim: {wrong}\n')
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='volume-xapi-sim',
        description='A XenAPI pool with its storage, simulated. Not safe '
                    'for anything but tests.',
    )
    parser.add_argument(
        'what', nargs='?', choices=('serve', 'calls'), default='serve',
        help='serve, or list the calls that are known and not simulated',
    )
    add = parser.add_argument
    add('--config', metavar='FILE', help='a JSON object; flags win over it')
    add('--directory', help='where the pool keeps its state')
    add('--world', help='where storage lies; several pools may share one')
    add('--profile', help=f'one of {", ".join(profiles.PROFILES)}')
    add('--name', help='the name of the pool')
    add('--hosts', type=int, help='how many hosts a new pool has')
    add('--tls', action='store_const', const=True, help='serve https')
    add('--port', type=int, action='append', dest='ports', metavar='PORT',
        help="a host's port, in order; free ones are found otherwise")
    add('--control-port', type=int, help='the port for faults')
    add('--switch', action='append', default=[], metavar='NAME=JSON',
        help='a limit or a habit of the server')
    add('--debug', action='store_true', help='log what happens to stderr')
    return parser


def _config(given: argparse.Namespace) -> dict[str, Any]:
    config = dict(DEFAULTS)
    if given.config:
        read = _json(
            _text(given.config, 'the configuration'), given.config)
        if not isinstance(read, dict):
            raise ValueError(f'{given.config}: it is no JSON object')
        unknown = read.keys() - DEFAULTS.keys()
        if unknown:
            raise ValueError(
                f'{given.config}: no such settings: '
                f'{", ".join(sorted(unknown))}; there are '
                f'{", ".join(DEFAULTS)}'
            )
        config |= read
    config |= {
        name: value for name, value in vars(given).items()
        if name in DEFAULTS and value is not None
    }
    if not config['directory']:
        raise ValueError('say where the state is to lie: --directory')
    switches = dict(config['switches'])
    for text in given.switch:
        name, equal, value = text.partition('=')
        if not equal:
            raise ValueError(f'--switch {text}: it is NAME=JSON')
        switches[name] = _json(value, f'--switch {name}')
    config['switches'] = switches
    return config


def _users(config: Mapping[str, Any]) -> dict[str, User]:
    """Return who may log in; a password is never an argument."""
    users = {
        name: User(
            _password(name, about),
            about.get('role', datamodel.ROLES[-1]),
        ) for name, about in config['users'].items()
    }
    if ROOT not in users:
        password = os.environ.get(PASSWORD)
        if password is None:
            raise ValueError(
                f'root has no password: give one by "users" in the '
                f'configuration, or by {PASSWORD}'
            )
        users[ROOT] = User(password)
    return users


def _password(name: str, about: Mapping[str, Any]) -> str:
    if 'password' in about:
        return str(about['password'])
    if 'password_file' not in about:
        raise ValueError(f'user {name} has neither password nor '
                         'password_file')
    return _text(about['password_file'], f'password_file of user {name}'
                 ).rstrip('\n')


def _text(path: str, what: str) -> str:
    try:
        return Path(path).read_text('utf-8')
    except (OSError, UnicodeDecodeError) as failed:
        raise ValueError(
            f'{what}: {path} cannot be read: '
            f'{getattr(failed, "strerror", None) or "no text"}'
        ) from failed


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as failed:
        raise ValueError(f'{what}: it is no JSON: {failed}') from failed


def _add(world: World, thing: Mapping[str, Any]) -> None:
    """Put an entry of "storage" into the world."""
    facts = dict(thing)
    what = facts.pop('what', None)
    if what not in _STORAGE:
        raise ValueError(
            f'storage: "what" is {what!r}, and not one of '
            f'{", ".join(_STORAGE)}'
        )
    add = _STORAGE[what]
    lacks = [
        name for name, one in inspect.signature(add).parameters.items()
        if one.default is one.empty and one.kind is not one.VAR_KEYWORD
        and name not in ('self', *facts)
    ]
    if lacks:
        raise ValueError(f'storage: {what} lacks {", ".join(lacks)}')
    try:
        add(world, **facts)
    except TypeError as wrong:
        # Its last words name the fact: "... keyword argument 'sise'".
        raise ValueError(
            f'storage: {what}: {str(wrong).partition(" ")[2]}') from wrong


def _own(directory: Path) -> int:
    """Take the state; two processes would destroy each other's.

    The lock ends with the process, however that ends.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lock = os.open(directory / 'lock', os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f'another simulator runs with the directory {directory}: end '
            'it first, or name another directory'
        ) from None
    return lock


def _serve(config: Mapping[str, Any]) -> int:
    directory = Path(config['directory'])
    users = _users(config)
    lock = _own(directory)
    world = World(config['world'] or directory / 'world')
    for thing in config['storage']:
        _add(world, thing)
    pool = Pool(
        directory, world, config['profile'], config['name'],
        config['hosts'], users=users, tls=config['tls'],
        ports=config['ports'], switches=config['switches'],
    )
    ends = {signal.SIGTERM, signal.SIGINT}
    # Before any thread exists, so that none of them is interrupted.
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    control = Control(pool, config['control_port'])
    pool.start()
    control.start()
    sys.stdout.write(json.dumps({
        'pid': os.getpid(),
        'pool': pool.uuid,
        'master': pool.url(),
        'urls': [pool.url(host) for host in pool.hosts],
        'control': control.url,
        'certificates': [
            str(pool.servers.certificate(host).certificate.absolute())
            for host in pool.hosts
        ] if pool.servers.tls else [],
    }) + '\n')
    sys.stdout.flush()
    signal.sigwait(ends)
    control.stop()
    pool.stop()
    os.close(lock)
    return 0


def _print_calls() -> int:
    registry.load()
    for name in generic.missing(datamodel.load()):
        sys.stdout.write(f'{name}\n')
    return 0
