# SPDX-License-Identifier: Apache-2.0
"""One volume group, and the only door to LVM's commands.

A node may see disks of guests and of other machines. So the disks of a
group are found by one look at everything, and each command thereafter is
told to accept these and no other. A report that misses a disk leads to
another look, for a person may have extended the group.

LVM holds a lock on the group for each command. Where extents go from one
logical volume to another, which takes two, that lock is held around both.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import os
import re
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from volume import errors
from volume.drivers.lvm import meaning
from volume.drivers.lvm import names
from volume.drivers.lvm import report
from volume.drivers.lvm.options import Settings
from volume.drivers.lvm.report import Lv
from volume.drivers.lvm.report import Seen
from volume.drivers.lvm.report import Vg
from volume.node import CommandFailed
from volume.node import Node

LOG = logging.getLogger(__name__)

Lock = AbstractContextManager[Any]

REPORT_BYTES_MAX = 256 << 20
SETTLE_S = 10
NOTHING = 'lv_name=""'  # a selection; no logical volume is without a name
EVERYTHING = ''

# LVM lets one command at a time change a group. Ours wait here, those of all
# backends: whoever looks and then changes has nobody of ours in between.
_locks: weakref.WeakKeyDictionary[Node, dict[str, Lock]]
_locks = weakref.WeakKeyDictionary()
_guard = threading.Lock()

_LOCKING_DIR = re.compile(r'^locking_dir="(/[^"]+)"$', re.MULTILINE)
_SPECIAL = re.compile(r'[.^$*+?(){}|\\\[\]]')


class Group:
    """A volume group of this backend."""

    def __init__(self, name: str, settings: Settings, node: Node) -> None:
        self.name = name
        self.settings = settings
        self.node = node
        self.changing = _changing(node, name)
        self._locking = ''  # a part of LVM's configuration
        self._uuid = ''
        self._filter: tuple[str, ...] = ()
        self._known: dict[str, str] = {}
        self._lost: dict[str, str] = {}

    # Finding it.

    def find(self) -> None:
        """Look at all disks for the group's, and refuse what is not ours.

        :raises Unavailable: it is not there, or there are two
        :raises Invalid: it belongs to another machine
        :raises Unsupported: it is shared with other machines
        """
        seen = self._scan()
        if not seen:
            raise errors.Unavailable(
                f'this node has no volume group {self.name}: make it '
                '(vgcreate), connect its disks, or set create and devices'
            )
        uuids = sorted({pv.vg_uuid for pv in seen})
        if len(uuids) > 1:
            raise errors.Unavailable(
                f'{len(uuids)} volume groups are called {self.name} '
                f'({", ".join(uuids)}): rename all but one '
                '(vgrename UUID NAME)'
            )
        self._refuse_foreign(seen[0])
        self._refuse_duplicates(seen)
        if self._uuid and self._uuid != uuids[0]:
            raise errors.Unavailable(
                f'volume group {self.name} has uuid {uuids[0]}, and had '
                f'{self._uuid} when this service started: give back the old '
                'one, or restart the service'
            )
        self._uuid = uuids[0]
        there = {pv.pv_uuid: pv.pv_name for pv in seen if not pv.is_missing}
        self._known.update(there)
        self._lost = {pv.pv_uuid: pv.pv_name for pv in seen if pv.is_missing}
        self._filter = tuple(sorted(there.values()))

    def exists(self) -> bool:
        """Say whether any disk has a group of this name."""
        return bool(self._scan())

    def _scan(self) -> list[Seen]:
        found = scan(self.node, self.settings.timeout_s, self._locking)
        return [pv for pv in found if pv.vg_name == self.name]

    def _refuse_foreign(self, pv: Seen) -> None:
        what = f'volume group {self.name}'
        if pv.lock_type not in ('', 'none'):
            raise errors.Unsupported(
                f'{what} is shared by way of {pv.lock_type} (lvmlockd): '
                'this driver is for groups of one machine'
            )
        if pv.is_exported:
            raise errors.Invalid(
                f'{what} is exported to be moved: import it (vgimport)'
            )
        if pv.system_id:
            said = self._run('lvm', 'systemid')
            own = said.partition(':')[2].strip()
            if own != pv.system_id:
                raise errors.Invalid(
                    f'{what} belongs to the machine with system id '
                    f'{pv.system_id}, and this one has {own or "none"}: '
                    'another machine may use it'
                )

    def _refuse_duplicates(self, seen: Sequence[Seen]) -> None:
        doubled = sorted(
            f'{pv.pv_name} ({pv.pv_uuid})' for pv in seen if pv.is_duplicate
        )
        if doubled:
            raise errors.Unavailable(
                f'volume group {self.name} has a disk twice: '
                f'{", ".join(doubled)} is a copy of another one; take it '
                'away, or give it new ids (vgimportclone)'
            )

    # Asking.

    def look(self, where: str = NOTHING) -> Vg:
        """Return the group with the logical volumes of a selection.

        :raises Unavailable: LVM does not find the group
        """
        if not self._filter:
            self.find()
        try:
            found = self._look(where)
        except errors.Unavailable:
            # Its disks may have other names by now.
            self.find()
            found = self._look(where)
        if not found.missing <= self._lost.keys():
            self.find()
            found = self._look(where)
        if found.uuid != self._uuid:
            raise errors.Unavailable(
                f'volume group {self.name} is another one than at the start '
                'of this service'
            )
        return found

    def about(self, *ids: str, name: str = '') -> Vg:
        """Return all that has to do with volumes and snapshots by id.

        What of it was left suspended goes on.
        """
        where = _about(ids, name)
        found = self.look(where)
        asleep = [lv for lv in found.lvs if lv.is_suspended and lv.role]
        for lv in asleep:
            self.wake(lv.name)
        return self.look(where) if asleep else found

    def missing_words(self, vg: Vg) -> str:
        """Say which disks are missing; nothing if none is."""
        return ', '.join(map(self._missing_word, sorted(vg.missing)))

    def _missing_word(self, uuid: str) -> str:
        path = self._lost.get(uuid, '')
        if path.startswith('/dev/'):
            # The group was changed without it.
            return (
                f'{uuid}, which is there again as {path} and has to be let '
                f'in (vgextend --restoremissing {self.name} {path})'
            )
        if uuid in self._known:
            return f'{uuid} (last seen as {self._known[uuid]})'
        return uuid

    def _look(self, where: str) -> Vg:
        selected = ('-S', where) if where else ()
        return report.read_group(self._run(
            'lvm', 'fullreport', *self._config(), '--reportformat', 'json',
            '--units', 'b', '--nosuffix', self.name,
            '--configreport', 'vg', '-o', ','.join(report.VG_FIELDS),
            '--configreport', 'pv', '-o', ','.join(report.PV_FIELDS),
            '--configreport', 'lv', '-o', ','.join(report.LV_FIELDS),
            *selected,
            '--configreport', 'pvseg', '-o', 'pvseg_start',
            '-S', 'pvseg_size<0',
            '--configreport', 'seg', '-o', ','.join(report.SEG_FIELDS),
            *selected,
        ))

    # Doing.

    def change(
        self, command: str, *argv: str, may_discard: bool = True
    ) -> None:
        """Run a command that changes the group.

        Unless it ``may_discard``, what was written to extents that it frees
        stays there, whatever the machine's lvm.conf says (issue_discards).
        """
        with self.changing:
            self._run(command, '--yes', *self._config(may_discard), *argv)

    @contextlib.contextmanager
    def alone(self) -> Iterator[Group]:
        """Yield the group as nobody else reads or changes it meanwhile.

        No command of LVM, whoever runs it: its lock is held. So all that is
        asked must be asked of the one that is yielded.

        :raises Unavailable: another command goes on for too long
        """
        said = self._run(
            'lvm', 'lvmconfig', '--typeconfig', 'full', 'global/locking_dir'
        )
        where = _LOCKING_DIR.search(said)
        if where is None:
            raise errors.Unavailable(
                f'LVM does not say where its locks are, but {said!r:.100}'
            )
        path, wait_s = f'{where[1]}/V_{self.name}', self.settings.timeout_s
        # As LVM does it: who is to change the group has the second file
        # while he waits for the first, so that no reader comes before him.
        # The first is borrowed last: a command that outlives us keeps that.
        with (
            self.changing, self.node.borrow(f'{path}:aux', wait_s),
            self.node.borrow(path, wait_s),
        ):
            inside = copy.copy(self)
            # Locks of their own, and not none (--nolocking): LVM heeds no
            # signal while it holds one, and would end anywhere without.
            inside._locking = f'global{{locking_dir="{where[1]}/volume"}}'
            yield inside

    def wake(self, name: str) -> None:
        """Let a device go on that a command, ended in its middle, has left.

        Whoever is at the group just now is waited for.
        """
        LOG.warning(
            '%s/%s is suspended, and goes on: a command of LVM was ended in '
            'the middle', self.name, name,
        )
        self.change('lvchange', '--refresh', f'{self.name}/{name}')

    def activate(self, lv: Lv) -> str:
        """Have its device, and return the path.

        :raises Unavailable: the device is suspended, or does not come
        """
        if lv.is_suspended:
            raise errors.Unavailable(
                f'{self.name}/{lv.name} is suspended: a command of LVM was '
                'ended in the middle (dmsetup resume)'
            )
        if not lv.is_active:
            self.change('lvchange', '-ay', '-K', f'{self.name}/{lv.name}')
        return self.await_device(lv)

    def await_device(self, lv: Lv) -> str:
        """Return the path of what is active, once it is there."""
        path = names.device(self.name, lv.name)
        if not self._leads_to(path, lv):
            self.settle()
            if not self._leads_to(path, lv):
                raise errors.Unavailable(
                    f'{self.name}/{lv.name} is active, and {path} is not '
                    'its device: look at udev'
                )
        return path

    def _leads_to(self, path: str, lv: Lv) -> bool:
        """Say whether a path is this logical volume's device.

        Device numbers are given anew at once: a link that udev has not
        removed yet may lead to another volume.
        """
        found = self.node.about(path)
        if found is None:
            return False
        try:
            place = f'/sys/dev/block/{found.device}'
            if found.kind == 'link':
                name = os.path.basename(self.node.readlink(path))
                place = f'/sys/class/block/{name}'
            uuid = self.node.read(f'{place}/dm/uuid')
        except errors.NotFound:
            return False
        wanted = f'LVM-{self._uuid}{lv.uuid}'.replace('-', '')
        return uuid.decode(errors='replace').strip().replace('-', '') == wanted

    def deactivate(self, lv: Lv) -> Lv:
        """Take its device away.

        :raises Busy: somebody has it open
        """
        if lv.is_active:
            self.change('lvchange', '-an', f'{self.name}/{lv.name}')
        return dataclasses.replace(lv, is_active=False)

    def refuse_open(self, lv: Lv, verb: str) -> None:
        """Refuse what somebody has open.

        udev opens what was just closed, for a moment; that is waited for.

        :raises Busy: it is open
        """
        if not lv.is_open:
            return
        self.settle()
        now = self.look(f'lv_uuid="{lv.uuid}"').lvs
        if now and now[0].is_open:
            raise errors.Busy(
                f'cannot {verb} {self.name}/{lv.name}: it is open; end who '
                'uses it first'
            )

    def rename(self, lv: Lv, role: str) -> Lv:
        name = f'{role}-{lv.id}'
        self.change('lvrename', self.name, lv.name, name)
        return dataclasses.replace(lv, name=name, role=role)

    def remove(self, name: str, keeps_zeros: bool = False) -> None:
        """Remove a logical volume, and nothing together with it.

        :raises Busy: something would go with it
        :raises Unavailable: a disk of the group is missing
        """
        vg = self.look(_with_dependents(name))
        if vg.missing:
            # This is the one change that LVM allows then. The disk would
            # have an older version of the group when it comes back.
            raise errors.Unavailable(
                f'volume group {self.name} misses {self.missing_words(vg)}: '
                f'{name} is not removed before that is back, or given up '
                '(vgreduce --removemissing)'
            )
        lv = vg.named(name)
        if lv is not None:
            refuse_dependents(vg, lv)
        # Who does not wipe what is new relies on zeros in free extents.
        self.change('lvremove', f'{self.name}/{name}', may_discard=(
            self.settings.wipes_new and not keeps_zeros
        ))

    def refuse_dependents(self, lv: Lv) -> None:
        """Refuse to end what others need, as they are now.

        :raises Busy: something would go with it
        """
        refuse_dependents(self.look(_with_dependents(lv.name)), lv)

    def settle(self) -> None:
        """Wait until udev has done what it has heard of."""
        try:
            self.node.run(
                'udevadm', 'settle', f'--timeout={SETTLE_S}',
                timeout_s=SETTLE_S + 5,
            )
        except CommandFailed as failed:
            LOG.warning('udev is slow: %s', failed)

    def _config(self, may_discard: bool = True) -> tuple[str, ...]:
        accepted = ''.join(f'"a|^{_quoted(path)}$|",' for path in self._filter)
        return '--config', (
            'devices{use_devicesfile=0 hints="none" '
            f'{"" if may_discard else "issue_discards=0 "}'
            f'filter=[{accepted}"r|.*|"]}}activation{{monitoring=0}}'
            f'{self._locking}'
        )

    def _run(self, *argv: str) -> str:
        return run(self.node, self.settings.timeout_s, *argv)


def _changing(node: Node, name: str) -> Lock:
    with _guard:
        return _locks.setdefault(node, {}).setdefault(
            name, threading.RLock())


def run(node: Node, timeout_s: float, *argv: str) -> str:
    """Run a command of LVM, and say what its failure means."""
    try:
        return node.run(
            *argv, timeout_s=timeout_s, output_bytes_max=REPORT_BYTES_MAX
        )
    except CommandFailed as failed:
        doing = ' '.join(argv[:2]) if argv[0] == 'lvm' else argv[0]
        target = argv[-1] if '/' in argv[-1] else ''
        raise meaning.mean(failed, f'{doing} {target}'.strip()) from failed


def refuse_dependents(vg: Vg, lv: Lv) -> None:
    """Refuse to end what others need; ``vg`` shows those.

    :raises Busy: something would go with it
    """
    taken = [f'{vg.name}/{each.name}' for each in vg.dependents(lv)]
    if taken:
        raise errors.Busy(
            f'{vg.name}/{lv.name} has {", ".join(taken):.300}, which would '
            'go together with it: remove that first'
        )


def scan(node: Node, timeout_s: float, config: str = '') -> list[Seen]:
    """Return all disks with LVM on them, as the machine's own filter has it.
    """
    options = ('--config', config) if config else ()
    return report.read_scan(run(
        node, timeout_s, 'pvs', *options, '--foreign', '--shared', '--all',
        '--reportformat', 'json', '-o', ','.join(report.SCAN_FIELDS),
    ))


def _about(ids: Iterable[str], name: str) -> str:
    parts = [f'lv_name="{name}"'] if name else []
    for id in ids:
        parts += [
            f'lv_tags={{"{kind}:{id}"}}'
            for kind in ('volume', 'snapshot', 'of')
        ]
        parts += [f'lv_name="{role}-{id}"' for role in names.TAGS]
        parts += [f'origin="{role}-{id}"' for role in ('volume', 'snap')]
    return ' || '.join(parts)


def _with_dependents(name: str) -> str:
    return f'lv_name="{name}" || origin="{name}"'


def _quoted(path: str) -> str:
    """Return the pattern of one path, in LVM's dialect."""
    return _SPECIAL.sub(lambda found: f'[{found[0]}]', path)
