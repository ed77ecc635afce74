# SPDX-License-Identifier: Apache-2.0
"""``volume-manage``: what an operator does on the service's own node.

It opens the database and the backends itself, so it also works while the
service is down; whatever changes storage asks for the service to be down,
or goes through the same leases.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import os
import sqlite3
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import sqlalchemy
from oslo_config import cfg
from sqlalchemy import exists
from sqlalchemy import or_
from sqlalchemy import select
from sqlalchemy.orm import Session

from volume import backends
from volume import conf as options
from volume import errors
from volume import locks
from volume import logs
from volume import reconcile
from volume import report
from volume.blockd import Blockd
from volume.cli import manage_lvm
from volume.cli import manage_status
from volume.cli import manage_xensm
from volume.db import history
from volume.db import migrate
from volume.db import models
from volume.db.engine import Database
from volume.drivers import base
from volume.node import Node

Args = argparse.Namespace


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 is done, 1 refused or found something, 2 usage."""
    args = _parser().parse_args(argv)
    os.umask(0o077)
    logs.set_up('WARNING')
    logging.getLogger('volume').setLevel(logging.CRITICAL)
    try:
        return int(args.run(args))
    except errors.VolumeError as wrong:
        print(f'volume-manage: {wrong}', file=sys.stderr)
    except (cfg.Error, sqlalchemy.exc.SQLAlchemyError, OSError) as wrong:
        if isinstance(wrong, BrokenPipeError):
            # Whoever read us has seen enough (head, less).
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        print(f'volume-manage: {wrong!s:.500}', file=sys.stderr)
    return 1


def db_command(args: Args) -> int:
    """Upgrade, downgrade or copy the database, or say its version."""
    conf = _conf(args)
    if args.action in ('upgrade', 'downgrade'):
        db = Database(options.database_url(conf))
    else:
        db = _database(conf)
    if args.action == 'version':
        print(f'database {migrate.current(db)}, release {migrate.newest()}')
        return 0
    if args.action == 'backup':
        return _backup(db, args.target)
    if args.action == 'downgrade' and not args.version:
        raise errors.Invalid('downgrade needs --to VERSION')
    with contextlib.ExitStack() as stack:
        if args.action == 'downgrade':
            stack.enter_context(_all_services_down(conf, db))
            migrate.downgrade(db, args.version)
        else:
            # Services of the release before work on while a migration only
            # adds; see volume/db/migrate.py.
            if migrate.is_breaking(db, args.version):
                stack.enter_context(_all_services_down(conf, db))
            migrate.upgrade(db, args.version or 'head')
    print(f'database {migrate.current(db)}')
    return 0


def drivers_command(args: Args) -> int:
    """List the installed drivers and what each can do."""
    rows = []
    for name, cls in sorted(options.plugins('volume.drivers').items()):
        rows.append({
            'driver': name,
            'features': ' '.join(sorted(base.features(cls))),
            'options': ' '.join(option.name for option in cls.options),
        })
    _show(rows, args)
    return 0


def check_command(args: Args) -> int:
    """Check every backend's configuration; format nothing."""
    conf = _conf(args)
    # What a driver warns of is a part of the answer.
    logging.getLogger('volume.drivers').setLevel(logging.WARNING)
    rows, is_bad = [], False
    for name, backend in _load(conf, only_looks=True).items():
        backend.check()
        is_bad |= not backend.is_up
        rows.append({
            'backend': name,
            'state': 'up' if backend.is_up else 'down',
            'reason': backend.reason,
            'pools': ' '.join(sorted(backend.pools)),
        })
    if not rows:
        raise errors.Invalid('enabled_backends is empty: there is nothing')
    _show(rows, args)
    return 1 if is_bad else 0


def reconcile_command(args: Args) -> int:
    """Compare rows, storage and exports; mend what was asked for."""
    conf = _conf(args)
    db = _ready(conf)
    table = _load(conf, only_looks=True)
    db.read(lambda session: report.hinder(session, table.values()))
    for backend in table.values():
        backend.check()
    with contextlib.ExitStack() as stack:
        if not args.dry_run:
            stack.enter_context(_service_down(conf))
            _need_others_down(db, conf, table)
            # A database that was rebuilt has no pools to add claims to.
            db.write(lambda session: report.report(
                session, list(table.values()), conf.host, db.clock()
            ))
        findings = reconcile.look(db, table, conf.host)
        mended = [] if args.dry_run else reconcile.mend(
            db, table, findings, adopt=args.adopt,
            delete_orphans=args.delete_orphans,
        )
    rows = [
        {
            'kind': finding.kind, 'what': finding.what,
            'detail': finding.detail,
            'remedy': 'done' if finding in mended else finding.remedy,
        }
        for finding in findings
    ]
    if rows or args.format == 'json':
        _show(rows, args)
    else:
        print('nothing differs')
    left = [finding for finding in findings if finding not in mended]
    return 1 if left else 0


def jobs_command(args: Args) -> int:
    """List open jobs, oldest first; with --all the ended ones too."""
    db = _ready(_conf(args))
    query = select(models.Job).order_by(models.Job.created_at).limit(1000)
    if not args.all:
        query = query.where(models.Job.state == 'open')
    now = time.time()
    _show([
        {
            'job': row.id, 'kind': row.kind, 'state': row.state,
            'direction': row.direction, 'step': row.step,
            'volume': row.volume_id or '', 'backend': row.backend,
            'age_s': round(now - row.created_at, 1),
            'held_by': row.owner_host if row.expires_at > now else '',
            'error': row.error,
        }
        for row in db.read(lambda s: list(s.scalars(query)))
    ], args)
    return 0


def status_command(args: Args) -> int:
    """Show what is going on; exit with 1 if something needs a look."""
    conf = _conf(args)
    return manage_status.run(_ready(conf), conf, args)


def lvm_command(args: Args) -> int:
    """Look after volume groups.

    check compares groups, their thin pools' metadata and the database, and
    says what to do about each difference. It changes nothing.
    """
    conf = _conf(args)

    def known(backend: str) -> dict[str, manage_lvm.Known]:
        db = _ready(conf)
        return {
            row.id: manage_lvm.Known(
                row.pool, row.handle, getattr(row, 'size_bytes', None)
            )
            for kind in (models.Volume, models.Snapshot)
            for row in db.read(functools.partial(_stored, kind, backend))
        }

    return manage_lvm.run(
        args, {
            name: (backend.conf, backend.node)
            for name, backend in _load(conf).items()
            if backend.conf is not None and backend.conf.driver == 'lvm'
            and backend.node is not None
        }, known, lambda rows: _show(rows, args),
    )


def _stored(
    kind: type[models.Volume] | type[models.Snapshot], backend: str,
    session: Session,
) -> list[Any]:
    return list(session.scalars(
        select(kind).where(
            kind.backend == backend, kind.deleted_at.is_(None)
        )
    ))


def xensm_command(args: Args) -> int:
    """Look after the SRs of a XenServer or XCP-ng pool.

    probe finds what an SR can be made of, and prints the section to paste;
    repair plugs SRs in, host by host; orphans lists VDIs that bear our keys
    and are not what these say; chains says how long the chains are.
    """
    conf = _conf(args)
    state = os.path.abspath(conf.state_path)

    def known() -> dict[str, str]:
        db = _ready(conf)
        found: dict[str, str] = {}
        for row in models.Volume, models.Snapshot:
            query = select(row.id, row.handle).where(row.deleted_at.is_(None))
            found.update(db.read(functools.partial(_pairs, query)))
        return found

    return manage_xensm.run(
        args, {
            name: backend.conf for name, backend in _load(conf).items()
            if backend.conf is not None and backend.conf.driver == 'xensm'
        }, Node(state, os.path.abspath(conf.lock_path)), known,
        lambda rows: _show(rows, args),
    )


def _pairs(
    query: sqlalchemy.Select[str, str], session: Session
) -> list[tuple[str, str]]:
    return [(id, handle) for id, handle in session.execute(query)]


def node_command(args: Args) -> int:
    """Let another node's jobs be taken over: its operator swears it is dead.

    A lease fences rows; nothing here can prove that a silent node does not
    still write to shared storage. Who fences a node says: neither its
    service, nor a process that it has started, nor its storage daemon
    writes, or will before the service is started anew. So what is attached
    there is exported by another node, and hosts have to connect again.
    """
    conf = _conf(args)
    db = _ready(conf)

    def fence(session: Session) -> bool:
        row = session.get(models.Service, args.node)
        if row is None and args.action == 'fence' and _has_work(
            session, args.node
        ):
            # It was stopped in good order, and what it exported was not.
            row = models.Service(
                host=args.node, owner='', roles=[], started_at=0.0,
                heard_at=0.0,
            )
            session.add(row)
        if row is None:
            return False
        if args.action == 'fence' and (
            db.clock() - row.heard_at < conf.lease_s
        ):
            raise errors.Busy(
                f'node {args.node} was heard of less than {conf.lease_s:g} s '
                'ago; stop it first'
            )
        row.is_fenced = args.action == 'fence'
        return True

    if not db.write(fence):
        raise errors.NotFound(f'there is no node {args.node}')
    print(f'node {args.node}: {args.action}d')
    return 0


def _has_work(session: Session, node: str) -> bool:
    """Say whether a job or an attachment names a node."""
    jobs, attachments = models.Job, models.Attachment
    return bool(session.scalar(select(or_(
        exists().where(jobs.state == 'open', or_(
            jobs.node == node, jobs.owner_host == node
        )),
        exists().where(attachments.node == node),
    ))))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='volume-manage',
        description='Look after the volume service on its own node.',
    )
    parser.add_argument(
        '--config-file', action='append', metavar='FILE',
        help='configuration file (default: /etc/volume/volume.conf)',
    )
    parser.add_argument(
        '--state-path', metavar='DIR', help='overrides the option state_path'
    )
    _add_format(parser, 'table')
    commands = parser.add_subparsers(required=True, metavar='COMMAND')

    def add(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, help=help, description=run.__doc__
        )
        command.set_defaults(run=run)
        # It may stand before the command as well as behind it.
        _add_format(command, argparse.SUPPRESS)
        return command

    _add_db(add('db', db_command, 'upgrade, downgrade, version, backup'))
    add('drivers', drivers_command, 'list the installed drivers')
    add('check', check_command, 'check the backends\' configuration')
    compare = add(
        'reconcile', reconcile_command, 'compare rows, storage and exports'
    )
    compare.add_argument(
        '--dry-run', action='store_true',
        help='only say what differs; the service may run meanwhile',
    )
    compare.add_argument(
        '--adopt', action='store_true',
        help='make rows again for volumes that have lost theirs',
    )
    compare.add_argument(
        '--delete-orphans', action='store_true',
        help='remove stored volumes that have no row: their bytes are gone',
    )
    jobs = add('jobs', jobs_command, 'list open jobs')
    jobs.add_argument('--all', action='store_true', help='ended ones too')
    status = add('status', status_command, 'show what is going on')
    status.add_argument(
        '--all', action='store_true', help='leave nothing out of the lists'
    )
    manage_lvm.add_arguments(add(
        'lvm', lvm_command, 'look after volume groups'
    ))
    xensm = add(
        'xensm', xensm_command, 'look after the SRs of a XenServer pool'
    )
    manage_xensm.add_arguments(xensm)
    node = add('node', node_command, 'fence a dead node')
    node.add_argument(
        'action', choices=['fence', 'unfence'],
        help='let others take over what it did, or let it come back',
    )
    node.add_argument('node', help='its host, as in "volume services"')
    return parser


def _add_db(db: argparse.ArgumentParser) -> None:
    db.add_argument(
        'action', choices=['upgrade', 'downgrade', 'version', 'backup'],
        help='bring it to this release\'s version or back to an earlier one, '
             'say which it has, or copy it (SQLite)',
    )
    db.add_argument(
        '--to', dest='version', metavar='VERSION',
        help='the version to go to; upgrade goes to the newest without it',
    )
    db.add_argument('--target', metavar='FILE', help='file of the backup')


def _add_format(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        '--format', choices=['table', 'json'], default=default,
        help='how results are printed',
    )


def _conf(args: Args) -> cfg.ConfigOpts:
    argv = ['--state_path', args.state_path] if args.state_path else []
    conf = options.load(argv, args.config_file)
    locks.check_owner(conf.state_path)
    return conf


def _database(conf: cfg.ConfigOpts) -> Database:
    """Return the database, and make none where there is none.

    :raises NotFound: there is none, or an empty one
    """
    url = options.database_url(conf)
    name = manage_status.name(url)
    path = sqlalchemy.make_url(url).database or ''
    if url.startswith('sqlite') and not os.path.exists(path):
        raise errors.NotFound(
            f'there is no database {name}: start volume-service, which makes '
            'it, or run volume-manage db upgrade; or are state_path and '
            'database others?'
        )
    return Database(url)


def _ready(conf: cfg.ConfigOpts) -> Database:
    """Return the database, of the version that this release is for."""
    db = _database(conf)
    migrate.require(db)
    return db


def _load(
    conf: cfg.ConfigOpts, *, only_looks: bool = False
) -> dict[str, backends.Backend]:
    state = os.path.abspath(conf.state_path)
    node = Node(state, os.path.abspath(conf.lock_path))
    node.blockd = Blockd(
        node, os.path.join(state, 'blockd'), tcp=conf.nbd_listen or None
    )
    found = backends.load(conf, node)
    for backend in found.values():
        if backend.driver is not None and only_looks:
            backend.driver.may_format = False
    return found


@contextlib.contextmanager
def _service_down(conf: cfg.ConfigOpts) -> Iterator[None]:
    """Hold the state directory, so that the service cannot run meanwhile."""
    state = os.path.abspath(conf.state_path)
    os.makedirs(state, 0o700, exist_ok=True)
    with locks.alone(
        os.path.join(state, 'service.lock'), f'state_path {state}'
    ):
        yield


def _need_others_down(
    db: Database, conf: cfg.ConfigOpts, names: Iterable[str]
) -> None:
    """:raises Busy: another service works on one of these backends"""
    heard_after = db.clock() - conf.lease_s
    for row in db.read(lambda s: list(s.scalars(
        select(models.Service).where(
            models.Service.host != conf.host,
            models.Service.heard_at >= heard_after,
        )
    ))):
        shared = sorted({*(row.backends or {})} & {*names})
        if shared:
            raise errors.Busy(
                f'service {row.host} works on {", ".join(shared)} as well; '
                'stop it first, or look only, with --dry-run'
            )


@contextlib.contextmanager
def _all_services_down(conf: cfg.ConfigOpts, db: Database) -> Iterator[None]:
    """Make sure that nobody works on the database meanwhile.

    :raises Busy: a service does, here or on another node
    """
    with _service_down(conf):
        if migrate.current(db) is not None:
            before = db.clock() - conf.service_down_s
            row = models.Service
            alive = sorted(db.read(lambda s: list(s.scalars(
                select(row.host).where(row.heard_at > before)
            ))))
            if alive:
                raise errors.Busy(
                    f'{", ".join(alive):.300} still uses this database, or '
                    'has not ended in good order; this changes what its '
                    'release relies on: stop it, or wait a minute'
                )
        yield


def _backup(db: Database, target: str | None) -> int:
    """Copy an SQLite database while it is in use."""
    if not target:
        raise errors.Invalid('backup needs --target FILE')
    if not db.is_sqlite:
        raise errors.Unsupported(
            'only SQLite is copied by this command; use pg_dump or '
            'mariadb-dump'
        )
    if os.path.exists(target):
        raise errors.Conflict(f'{target} exists already')
    source = sqlite3.connect(sqlalchemy.make_url(db.url).database or '')
    with contextlib.closing(source):
        with contextlib.closing(sqlite3.connect(target)) as copy:
            source.backup(copy)
    made = Database(f'sqlite:///{os.path.abspath(target)}')
    made.write(lambda session: history.end_open_jobs(session, made.clock()))
    with made.engine.connect() as connection:
        connection.exec_driver_sql('PRAGMA wal_checkpoint(TRUNCATE)')
    made.close()
    print(f'{target}: {os.path.getsize(target)} bytes')
    return 0


def _show(rows: list[dict[str, Any]], args: Args) -> None:
    if args.format == 'json':
        print(json.dumps(rows, indent=2))
        return
    if not rows:
        print('none')
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*rows[0], box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(str(value)) for value in row.values()))
    width = None if sys.stdout.isatty() else 200
    Console(width=width, soft_wrap=False).print(table)


if __name__ == '__main__':
    sys.exit(main())
