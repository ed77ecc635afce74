# SPDX-License-Identifier: Apache-2.0
"""From a configuration section to a driver that is watched over.

``Backend.guard`` is one of the two places that catch every exception: what
escapes from a driver otherwise than as one of our errors is a bug, is logged
as one, and counts as ``Unknown``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from oslo_config import cfg

from volume import conf as options
from volume import errors
from volume import model
from volume import progress
from volume.drivers import base
from volume.exports import base as exports
from volume.node import Node
from volume.remote import ssh
from volume.remote.node import SshNode

LOG = logging.getLogger(__name__)


@dataclasses.dataclass(slots=True)
class Backend:
    """A configured driver with its exporter; down until it was checked."""

    name: str
    conf: Any
    driver: base.Driver | None
    exporter: exports.Exporter | None
    reason: str = 'it was not checked yet'
    is_up: bool = False
    pools: dict[str, model.Pool] = dataclasses.field(default_factory=dict)
    node: Node | None = None
    """Where the storage is; None is the machine of this service, too."""
    hindrance: str = ''
    """What the rows say against it; see ``report.hinder``."""
    former_exporter: str = ''
    """With a hindrance: who has let in its hosts."""
    _checking: threading.Lock = dataclasses.field(
        default_factory=threading.Lock
    )
    _tending: threading.Lock = dataclasses.field(
        default_factory=threading.Lock
    )

    def check(self) -> None:
        """Ask the driver and the exporter; be up, or down with a reason.

        Returns at once while an earlier check still waits for an answer.
        """
        if self.driver is None or not self._checking.acquire(False):
            return
        try:
            self._check()
        finally:
            self._checking.release()

    def _check(self) -> None:
        assert self.driver is not None
        try:
            with self.guard('check'):
                self.driver.check()
                if self.exporter is not None:
                    self.exporter.check()
                self.refresh()
            if self.hindrance:
                raise errors.Invalid(self.hindrance)
        except errors.VolumeError as failed:
            if self.reason != str(failed):
                LOG.error('backend %s is down: %s', self.name, failed)
            self.is_up, self.reason = False, str(failed)
            return
        if not self.is_up:
            LOG.info('backend %s is up', self.name)
        self.is_up, self.reason = True, ''

    def refresh(self) -> None:
        """Ask the driver for its pools."""
        pools = self.need().pools()
        if self.node is not None and self.node.is_remote:
            # QEMU runs here, and opens nothing that is there.
            pools = [
                dataclasses.replace(
                    pool, features=pool.features - {'BlockNode'}
                ) for pool in pools
            ]
        self.pools = {pool.name: pool for pool in pools}

    def tend(self, rate_bytes_per_s: int = 0) -> None:
        """Let the driver do a piece of background work in each pool.

        Returns at once while it is still at an earlier one.
        """
        if not self.is_up or not isinstance(self.driver, base.Upkeep) or (
            not self._tending.acquire(False)
        ):
            return
        try:
            for pool in list(self.pools):
                if self.feature(pool, 'Upkeep'):
                    self._tend(pool, rate_bytes_per_s)
        finally:
            self._tending.release()

    def _tend(self, pool: str, rate_bytes_per_s: int) -> None:
        try:
            with progress.watching(None, rate_bytes_per_s):
                self.call('upkeep', pool)
        except errors.VolumeError as failed:
            LOG.warning('upkeep of %s#%s: %s', self.name, pool, failed)

    def need(self) -> base.Driver:
        """Return the driver.

        :raises Unavailable: it could not be loaded
        """
        if self.driver is None:
            raise errors.Unavailable(
                f'backend {self.name} is down: {self.reason}'
            )
        return self.driver

    def abilities(self) -> model.Abilities:
        """Return what hosts' way to the volumes can do."""
        if isinstance(self.driver, base.NativeAccess):
            return self.driver.abilities
        return self.exporter.abilities if self.exporter else model.Abilities()

    def feature(self, pool: str, name: str) -> bool:
        """Say whether a pool has a feature now."""
        found = self.pools.get(pool)
        return found is not None and name in found.features

    def call(self, verb: str, *args: Any) -> Any:
        """Call the driver; see ``guard`` for what comes out."""
        driver = self.need()
        with self.guard(verb):
            return getattr(driver, verb)(*args)

    @contextlib.contextmanager
    def guard(self, verb: str) -> Iterator[None]:
        """Let our errors through; make any other ``Unknown``, and log it."""
        try:
            yield
        except errors.VolumeError:
            raise
        except Exception as bug:
            LOG.exception('driver of %s failed in %s', self.name, verb)
            raise errors.Unknown(
                f'backend {self.name}: its driver failed in {verb}: '
                f'{type(bug).__name__}'
            ) from bug


def check_all(backends: Iterable[Backend], wait_s: float) -> None:
    """Check all backends at once; do not wait for the slow ones."""
    each_alone(Backend.check, backends, wait_s)


def each_alone(
    work: Callable[[Backend], object],
    backends: Iterable[Backend],
    wait_s: float,
) -> None:
    """Do the same with all of them at once, and wait only so long."""
    threads = [
        threading.Thread(target=work, args=(backend,), daemon=True)
        for backend in backends
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + wait_s
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0.0))


def load(conf: cfg.ConfigOpts, node: Node) -> dict[str, Backend]:
    """Return the enabled backends by name, none of them checked yet.

    A section that is wrong is a backend that is down with the reason; the
    others serve.
    """
    drivers = options.plugins('volume.drivers')
    exporters = options.plugins('volume.exports')
    found: dict[str, Backend] = {}
    for name in conf.enabled_backends:
        if name in found:
            LOG.error('enabled_backends names %s twice', name)
            continue
        try:
            found[name] = _load(conf, node, name, drivers, exporters)
        except (cfg.Error, errors.VolumeError, ValueError) as wrong:
            reason = f'section [{name}]: {wrong}'
            LOG.error('backend %s is down: %s', name, reason)
            found[name] = Backend(name, None, None, None, reason=reason)
    return found


def _load(
    conf: cfg.ConfigOpts,
    node: Node,
    name: str,
    drivers: dict[str, Any],
    exporters: dict[str, Any],
) -> Backend:
    if len(name) > 64:
        raise errors.Invalid('the name is over 64 characters')
    conf.register_opts(options.BACKEND, group=name)
    group = conf[name]
    driver = _pick(drivers, group.driver, 'driver')
    exporter = _pick(exporters, group.exporter, 'exporter')
    own = {option.name for option in driver.options}
    conf.register_opts(driver.options, group=name)
    conf.register_opts(
        [o for o in exporter.options if o.name not in own], group=name
    )
    # Each value is read now: one that is wrong is this backend's trouble.
    for option in (*options.BACKEND, *driver.options, *exporter.options):
        try:
            value = group[option.dest]
        except (cfg.NoSuchOptError, cfg.TemplateSubstitutionError) as wrong:
            # What follows the "$" may be a part of a password.
            raise errors.Invalid(
                f'option {option.name} has a "$" that names no other '
                'option: write $$ for one that is meant as it stands'
            ) from wrong
        except cfg.ConfigFileValueError as wrong:
            # What oslo.config says before it is where in its own terms.
            _, _, why = str(wrong).partition(' is not valid: ')
            raise errors.Invalid(
                f'option {option.name} is wrong'
                f'{f": {why}" if why and not option.secret else ""}'
            ) from wrong
        if value is None and option.required:
            raise errors.Invalid(f'option {option.name} is missing')
    node = _place(group, node, driver, exporter)
    if not node.is_remote:
        _refuse_overlap(conf, group, driver, node)
    made = Backend(name, group, None, None, node=node)
    with made.guard('__init__'):
        made.driver = driver(group, node)
        # Hosts reach such a storage by themselves.
        if not issubclass(driver, base.NativeAccess):
            made.exporter = exporter(group, node)
            _refuse_mismatch(group, made.driver, exporter, exporters)
    return made


def _refuse_mismatch(
    group: Any, driver: base.Driver, exporter: Any, exporters: dict[str, Any]
) -> None:
    """Refuse an exporter that can read no volume which the driver makes."""
    if _reads(exporter, driver):
        return
    fitting = sorted(
        name for name, each in exporters.items() if _reads(each, driver)
    )
    if fitting:
        raise errors.Invalid(
            f'exporter {group.exporter} reads {_listed(exporter.forms)}, and '
            f'driver {group.driver} has '
            f'{_listed(getattr(driver, "forms", ())) or "no paths"}: use '
            f'exporter {" or ".join(fitting)}'
        )


def _reads(exporter: Any, driver: base.Driver) -> bool:
    if exporter.accepts_blocknode and isinstance(driver, base.BlockNode):
        return True
    return isinstance(driver, base.LocalDevice) and not (
        driver.forms.isdisjoint(exporter.forms)
    )


def _listed(forms: Iterable[model.Form]) -> str:
    return ' and '.join(form.value for form in model.Form if form in forms)


def _place(group: Any, node: Node, driver: Any, exporter: Any) -> Node:
    """Return the node of a section; those of one address share one."""
    if not group.node:
        return node
    target = ssh.parse(
        group.node, group.node_key_file, group.node_known_hosts_file,
        group.node_command,
    )
    if not driver.may_be_remote:
        raise errors.Invalid(
            f'driver {group.driver} serves this machine alone: leave out '
            f'node = {group.node}'
        )
    if not exporter.abilities.remote_node:
        raise errors.Invalid(
            f'exporter {group.exporter} serves this machine alone: choose '
            f'another for the storage of {target.address}'
        )
    return node.neighbours.setdefault(target, SshNode(target))


def _refuse_overlap(
    conf: cfg.ConfigOpts, group: Any, driver: Any, node: Node
) -> None:
    """Refuse image directories that hold volumes, or the service's state.

    Whoever may name an image there could read another project's volume.
    """
    paths = [node.state_dir]
    for option in driver.options:
        value = group[option.dest]
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, str) and os.path.isabs(each):
                paths.append(each)
    for images in (
        *conf.image_allowed_directories, *conf.image_upload_directories
    ):
        for path in paths:
            real = os.path.realpath(path), os.path.realpath(images)
            if os.path.commonpath(real) in real:
                raise errors.Invalid(
                    f'image directory {images} and {path} lie in each other: '
                    'images must be apart from volumes and from state_path'
                )


def _pick(classes: dict[str, Any], name: str | None, what: str) -> Any:
    if not name:
        raise errors.Invalid(f'option {what} is missing')
    if name not in classes:
        raise errors.Invalid(
            f'there is no {what} {name!r}; installed are '
            f'{", ".join(sorted(classes))}'
        )
    return classes[name]

