# SPDX-License-Identifier: Apache-2.0
"""LVM in miniature, for machines whose kernel has no device-mapper.

A group is a row of extents that keep what was last written to them, a
logical volume a plain file while it lives, and the commands are those that
the driver gives, no more. What they answer was taken from the real ones
(``unit/lvm_recorded``). That the real ones do the same, and what only a
kernel can show, is for the lab.
"""

import contextlib
import json
import os
import re
import threading

from volume.commands import CommandFailed
from volume.machine.names import About
from volume.node import Node
from volume.testing import faults

GROUP = 'sim-vg'
GROUP_UUID = 'SIMGRP-0000-0000-0000-0000-0000-000000'
EXTENT = 1 << 16
MAPPER = '/dev/mapper/'
LOCKING_DIR = '/run/lock/lvm'
STALE = b'\xee'  # what lies in extents that nobody has written yet
BLOCK = 1 << 12  # of a thin pool


class Lv:
    """A logical volume; its extents are numbers, in order."""

    def __init__(self, name, uuid, kind, size):
        self.name, self.uuid, self.kind, self.size = name, uuid, kind, size
        self.tags = set()
        self.extents = []
        self.origin = self.origin_size = None
        self.active = self.read_only = False
        self.skip = self.open = self.invalid = self.suspended = False
        self.needs_check = False
        self.thin_id = None
        self.pool = 'pool'
        self.filled = None  # of a snapshot, in percent


class World:
    """A machine with one group; lasts longer than a node of it."""

    def __init__(self, directory, extents, has_pool=False):
        self.directory = directory
        self.mutex = threading.RLock()
        self.lock = threading.Lock()  # the file that LVM's commands go by
        self.disk = [STALE * EXTENT] * extents
        self.free = set(range(extents))
        self.lvs = {}
        self.seqno, self.serial = 1, 0
        self.missing = self.damaged = False
        self.is_back = False  # what was missing, and nobody has let it in
        self.discards = False  # as lvm.conf may have it
        self.stale = {}  # links, and whose device they lead to
        self.hangs = False  # the layer of the thin pool
        self.has_group = True
        self.signatures = []  # of disks that are in no group
        self.users = []  # of the same
        self.extended = []  # which, each time
        self.held = None  # the root of the pool's metadata snapshot
        self.metadata_percent = self.data_percent = 10.0
        if has_pool:
            self._new('pool', 'pool', 0).active = True

    # What is asked.

    def command(self, argv):
        """Do a command; what cannot be done is said as LVM says it."""
        words = [
            word for word in argv[1:] if word not in ('--yes', '-Wn', '-Zn')
        ]
        said = ''
        while '--config' in words:
            at = words.index('--config')
            said += words[at + 1]
            del words[at:at + 2]
        lock = contextlib.nullcontext()
        if 'locking_dir' in said:  # where nobody else waits
            assert self.lock.locked(), argv
        elif argv[0][:2] in ('lv', 'pv', 'vg'):
            lock = self.lock
        with lock, self.mutex:
            self._discards = self.discards and 'issue_discards=0' not in said
            try:
                return getattr(self, f'_{argv[0]}')(words) or ''
            except Said as said:
                raise CommandFailed(argv, 5, f'  {said}\n') from None

    def path(self, device):
        """Return the file that stands for a device; none if it is gone."""
        name = device.removeprefix('/dev/mapper/sim--vg-').replace('--', '-')
        lv = self.lvs.get(self.stale.get(name, name))
        return self._file(lv) if lv and lv.active else None

    def _pvs(self, words):
        if not self.has_group:
            return json.dumps({'report': [{'pv': []}]})
        return json.dumps({'report': [{'pv': [{
            'pv_name': self._disk_name(), 'pv_uuid': 'SIMPV',
            'vg_name': GROUP,
            'pv_missing': 'missing' if self.missing else '',
            'pv_duplicate': '', 'vg_uuid': GROUP_UUID, 'vg_lock_type': '',
            'vg_systemid': '', 'vg_exported': '',
        }]}]})

    def _wipefs(self, words):
        assert words[:2] == ['--no-act', '--json'], words
        return json.dumps({'signatures': [
            {'type': kind} for kind in self.signatures
        ]})

    def _vgcreate(self, words):
        assert words == ['-qq', '--metadatasize', '64m', GROUP, '/dev/sim']
        self.has_group = True

    def _lvm(self, words):
        if words[0] == 'lvmconfig':
            return f'locking_dir="{LOCKING_DIR}"\n'
        assert words[0] == 'fullreport' and self.has_group, words
        assert GROUP in words
        at = words.index('lv')
        chosen = words[at + 4] if words[at + 3] == '-S' else ''
        lvs = [lv for lv in self.lvs.values() if selected(lv, chosen)]
        return json.dumps({'report': [{
            'vg': [{
                'vg_name': GROUP, 'vg_uuid': GROUP_UUID,
                'vg_size': str(len(self.disk) * EXTENT),
                'vg_free': str(len(self.free) * EXTENT),
                'vg_extent_size': str(EXTENT), 'vg_mda_size': '1044480',
                'vg_mda_free': '500000',
            }],
            'pv': [{
                'pv_name': self._disk_name(), 'pv_uuid': 'SIMPV',
                'pv_missing': 'missing' if self.missing else '',
            }],
            'lv': [self._row(lv) for lv in lvs],
            'seg': [{
                'lv_uuid': lv.uuid, 'thin_id': lv.thin_id or '',
                'zero': 'zero' if lv.kind in ('pool', 'thin') else 'unknown',
                'seg_pe_ranges': ' '.join(
                    f'/dev/sim:{number}-{number}' for number in lv.extents),
            } for lv in lvs],
        }]})

    def _disk_name(self):
        gone = self.missing and not self.is_back
        return '[unknown]' if gone else '/dev/sim'

    def _row(self, lv):
        roles = {'pool': 'private'}.get(lv.kind, 'public')
        if lv.kind == 'cow':
            roles += ',snapshot,thicksnapshot'
        is_pool = lv.kind == 'pool'
        return {
            'lv_name': lv.name, 'lv_uuid': lv.uuid, 'lv_size': str(
                len(lv.extents) * EXTENT if lv.kind == 'cow' else lv.size),
            'lv_tags': ','.join(sorted(lv.tags)), 'lv_role': roles,
            'lv_layout': {'pool': 'thin,pool', 'thin': 'thin,sparse',
                          'cache': 'cache'}.get(lv.kind, 'linear'),
            'lv_active': 'active' if lv.active else '',
            'lv_device_open': 'open' if lv.open else '',
            'lv_permissions': 'read-only' if lv.read_only else 'writeable',
            'lv_snapshot_invalid': 'snapshot invalid' if lv.invalid else '',
            'lv_skip_activation': 'skip activation' if lv.skip else '',
            'lv_when_full': 'error' if is_pool else '',
            'lv_metadata_size': '4194304' if is_pool else '',
            'origin': lv.origin or '',
            'origin_size': str(lv.origin_size or ''),
            'lv_check_needed': 'check needed' if lv.needs_check else '',
            'lv_suspended': 'suspended' if lv.suspended else '',
            'pool_lv': lv.pool if lv.kind == 'thin' else '',
            'data_percent': str(
                self.data_percent if is_pool else lv.filled or ''),
            'metadata_percent': str(self.metadata_percent) if is_pool else '',
        }

    # What is changed.

    def _lvcreate(self, words):
        self._refuse_missing()
        options, (target,) = options_of(words)
        if '-T' in options:
            assert {'--errorwhenfull', '--zero'} <= set(options)
            self._new(target.removeprefix(f'{GROUP}/'), 'pool', 0)
            return
        name = options['-n'][0]
        if name in self.lvs:
            raise Said(f'Logical Volume "{name}" already exists in volume '
                       f'group "{GROUP}"')
        if '-s' in options:
            origin = self._need(target)
            is_thin = origin.kind == 'thin' and '-l' not in options
            kind = 'thin' if is_thin else 'cow'
            made = self._new(name, kind, origin.size)
            made.origin = origin.name
            if kind == 'cow':
                made.origin_size, made.active = origin.size, origin.active
                made.extents = self._take(name, int(options['-l'][0]))
            self._copy(origin, made)
        elif '-V' in options:
            size = int(options['-V'][0].removesuffix('b'))
            made = self._new(name, 'thin', -(-size // EXTENT) * EXTENT)
            with open(self._file(made), 'wb') as f:
                f.truncate(made.size)
        else:
            count = int(options['-l'][0])
            extents = self._take(name, count)
            made = self._new(name, 'linear', count * EXTENT)
            made.extents = extents
            self._fill(made, extents, 0)
        made.tags |= set(options.get('--addtag', ()))
        made.skip = '-ky' in options
        made.active = made.active or '-K' in options
        made.read_only = '-pr' in options
        self.seqno += 1

    def _lvextend(self, words):
        self._refuse_missing()
        options, (target, *ranges) = options_of(words)
        lv = self._need(target)
        self.extended.append(lv.name)
        if '--poolmetadatasize' in options:
            self.metadata_percent /= 2
            self.seqno += 1
            return
        said = options['-l'][0]
        more = int(said) - (0 if said[0] == '+' else lv.size // EXTENT)
        if any(each.origin == lv.name and each.kind == 'cow' and lv.active
               for each in self.lvs.values()):
            raise Said('Snapshot origin volumes can be resized only while '
                       'inactive: try lvchange -an.')
        if lv.kind in ('linear', 'cow'):
            wanted = [int(each.rpartition('-')[2]) for each in ranges]
            extents = self._take(lv.name, more, wanted)
            if lv.kind == 'linear':
                self._fill(lv, extents, lv.size)
            lv.extents += extents
        else:
            with open(self._file(lv), 'r+b') as f:
                f.truncate(lv.size + more * EXTENT)
        if lv.kind != 'cow':
            lv.size += more * EXTENT
        self.seqno += 1

    def _lvchange(self, words):
        options, (target,) = options_of(words)
        lv = self._need(target)
        snapshots = [
            each for each in self.lvs.values()
            if each.kind == 'cow' and lv.name in (each.origin, each.name)
        ]
        if '-an' in options:
            for each in [lv, *snapshots]:
                if each.open:
                    raise Said(f'Logical volume {GROUP}/{each.name} in use.')
        if '-an' in options or '-ay' in options:
            for each in [lv, *snapshots, *(
                self.lvs[each.origin] for each in snapshots
            )]:
                each.active = '-ay' in options
            return
        self._refuse_missing()
        if '-prw' in options:
            lv.read_only = False
        if '-ky' in options or '-kn' in options:
            lv.skip = '-ky' in options
        if '--refresh' in options:
            lv.suspended = self.hangs = False
            return
        lv.tags -= set(options.get('--deltag', ()))
        lv.tags |= set(options.get('--addtag', ()))
        self.seqno += 1

    def _lvrename(self, words):
        self._refuse_missing()
        _, source, target = words
        lv = self._need(f'{GROUP}/{source}')
        if target in self.lvs:
            raise Said(f'Logical Volume "{target}" already exists in volume '
                       f'group "{GROUP}"')
        for each in self.lvs.values():
            if each.origin == source:
                each.origin = target
        del self.lvs[source]
        lv.name = target
        self.lvs[target] = lv
        self.seqno += 1

    def _lvconvert(self, words):
        assert words[0] == '--splitsnapshot'
        lv = self._need(words[1])
        if lv.open:
            raise Said(f'Logical volume {GROUP}/{lv.name} in use.')
        lv.kind, lv.size = 'linear', len(lv.extents) * EXTENT
        # Its area has what the origin had.
        with open(self._file(lv), 'r+b') as f:
            f.truncate(0)
            f.write(STALE * lv.size)
        lv.origin = lv.origin_size = None
        self.seqno += 1

    def _lvremove(self, words):
        lv = self._need(words[0])
        if lv.open:
            raise Said(f'Logical volume {GROUP}/{lv.name} in use.')
        for each in list(self.lvs.values()):
            # With --yes it asks nobody.
            if each.origin == lv.name and (
                each.kind == 'cow' or (each.kind, each.pool) != (
                    lv.kind, lv.pool)
            ):
                self._lvremove([f'{GROUP}/{each.name}'])
        if lv.kind == 'linear':
            with open(self._file(lv), 'rb') as f:
                for number in lv.extents:
                    self.disk[number] = f.read(EXTENT)
                    if self._discards:
                        self.disk[number] = STALE * EXTENT
        self.free |= set(lv.extents)
        os.unlink(self._file(lv))
        del self.lvs[lv.name]
        self.seqno += 1

    # The pool's metadata.

    def _dmsetup(self, words):
        if words[0] == 'info':
            return ('sim--vg-pool-tpool Suspended\n' if self.hangs else '')
        if words[0] == 'status':
            held = '-' if self.held is None else self.held
            return (f'sim--vg-pool-tpool: 0 100 thin-pool 1 1/9 0/9 {held} rw'
                    ' discard_passdown error_if_no_space - 256\n')
        assert words[1:3] == ['sim--vg-pool-tpool', '0']
        if words[3] == 'reserve_metadata_snap':
            if self.held is not None:
                raise Said('device-mapper: message ioctl on sim--vg-pool-'
                           'tpool  failed: Device or resource busy')
            self.serial += 1
            self.held = self.serial
        else:
            assert words[3] == 'release_metadata_snap' and self.held
            self.held = None

    def _thin_dump(self, words):
        assert self.held is not None and '-m' in words
        options, _ = options_of(words)
        blocks = self._blocks(options['--dev-id'][0])
        rows = ''.join(
            f'<single_mapping origin_block="{at}" data_block="1" time="0"/>'
            for at, data in enumerate(blocks) if any(data)
        )
        return superblock(f'<device dev_id="1">{rows}</device>')

    def _thin_delta(self, words):
        assert self.held is not None and '-m' in words
        options, _ = options_of(words)
        old, new = (
            self._blocks(options[f'--thin{number}'][0]) for number in (1, 2)
        )
        old += [b''] * (len(new) - len(old))
        rows = ''.join(
            f'<{kind} begin="{at}" length="1"/>'
            for at, pair in enumerate(zip(old, new, strict=True))
            if (kind := _kind(*pair))
        )
        return superblock(f'<diff left="1" right="2">{rows}</diff>')

    def _thin_check(self, words):
        assert self.held is not None and '-m' in words
        if self.damaged:
            raise Said('bad checksum in superblock')

    def _blocks(self, thin_id):
        lv, = (lv for lv in self.lvs.values() if lv.thin_id == thin_id)
        with open(self._file(lv), 'rb') as f:
            return [f.read(BLOCK) for _ in range(lv.size // BLOCK)]

    # Ours alone.

    def _udevadm(self, words):
        pass

    def _new(self, name, kind, size):
        self.serial += 1
        lv = Lv(name, f'uuid-{self.serial}', kind, size)
        if kind == 'thin':
            lv.thin_id = str(self.serial)
        self.lvs[name] = lv
        return lv

    def _need(self, target):
        name = target.removeprefix(f'{GROUP}/')
        if name not in self.lvs:
            raise Said(f'Failed to find logical volume "{target}"')
        return self.lvs[name]

    def _refuse_missing(self):
        if self.missing:
            raise Said(f'Cannot change VG {GROUP} while PVs are missing.')

    def _take(self, name, count, wanted=()):
        free = sorted(set(wanted) & self.free if wanted else self.free)
        if len(free) < count:
            raise Said(f'Insufficient free space: {count} extents needed, '
                       f'but only {len(free)} available')
        self.free -= set(free[:count])
        return free[:count]

    def _file(self, lv):
        return os.path.join(self.directory, lv.uuid)

    def _fill(self, lv, extents, at):
        """Give a file what lies in its extents."""
        with open(self._file(lv), 'r+b' if at else 'w+b') as f:
            f.seek(at)
            for number in extents:
                f.write(self.disk[number])

    def _copy(self, source, target):
        with open(self._file(source), 'rb') as s, open(
            self._file(target), 'wb'
        ) as t:
            t.truncate(source.size)
            at = 0
            while at < source.size and source.size < 1 << 30:
                chunk = s.read(1 << 20)
                if any(chunk):
                    t.seek(at)
                    t.write(chunk)
                at += len(chunk)


class Said(Exception):
    """What LVM says when it cannot."""


def options_of(words):
    """Return what each option was given, and the other words."""
    with_value = ('-n', '-l', '-V', '--addtag', '--deltag', '--thinpool',
                  '--dev-id', '--thin1', '--thin2', '-f', '--errorwhenfull',
                  '--zero', '--poolmetadatasize')
    options, others, left = {}, [], list(words)
    while left:
        word = left.pop(0)
        if word in with_value:
            options.setdefault(word, []).append(left.pop(0))
        elif word.startswith('-'):
            options[word] = []
        else:
            others.append(word)
    return options, others


def selected(lv, chosen):
    """Say whether a selection, as the driver writes them, takes it."""
    for part in filter(None, chosen.split(' || ')):
        field, sign, value = re.fullmatch(
            r'(\w+)(=~|=)\{?"(.*?)"\}?', part).groups()
        if field == 'lv_tags':
            found = value in lv.tags
        else:
            have = {'lv_name': lv.name, 'lv_uuid': lv.uuid,
                    'origin': lv.origin or ''}[field]
            found = re.match(value, have) if sign == '=~' else have == value
        if found:
            return True
    return not chosen


def superblock(text):
    return f'<superblock data_block_size="{BLOCK // 512}">{text}</superblock>'


def _kind(old, new):
    """Return how thin_delta calls the difference of two blocks."""
    if old == new or not (any(old) or any(new)):
        return ''
    if not any(new):
        return 'left_only'
    return 'different' if any(old) else 'right_only'


class Machine:
    """What a node over a world does otherwise."""

    is_remote = True  # its paths are not ours
    world = None

    def _run(self, argv, *others):
        if argv[0] == 'qemu-img':
            argv = [
                re.sub(
                    r'"driver": "host_device", "filename": "([^"]+)"',
                    lambda found: '"driver": "file", "filename": '
                                  f'"{self.world.path(found[1])}"', word,
                ) for word in argv
            ]
            return Node._run(self, argv, *others)
        return self.world.command(list(argv))

    @contextlib.contextmanager
    def borrow(self, path, wait_s):
        lock = {
            f'{LOCKING_DIR}/V_{GROUP}': self.world.lock,
            f'{LOCKING_DIR}/V_{GROUP}:aux': contextlib.nullcontext(),
        }
        with lock[path]:
            yield

    def open(self, path, mode='rb'):
        return super().open(self._there(path), mode)

    def users(self, path, known=()):
        if path == '/dev/sim':
            return self.act('users sim', lambda: self.world.users)
        return super().users(path, known)

    def about(self, path):
        """Of a device all that counts is which one it is."""
        found = self.world.path(path) if path.startswith(MAPPER) else None
        if path.startswith(MAPPER):
            return self.act(f'about {os.path.basename(path)}', lambda: (
                found and About('block', 0, 0, 0.0, found.rpartition('/')[2])
            ))
        return super().about(path)

    def read(self, path, bytes_max=1 << 20):
        found = re.fullmatch('/sys/dev/block/(.+)/dm/uuid', path)
        if found:
            return self.act(
                f'read {found[1]}',
                lambda: f'LVM-{GROUP_UUID}{found[1]}\n'.encode(),
            )
        return super().read(path, bytes_max)

    def is_block(self, path):
        return self.act(
            f'is_block {os.path.basename(path)}',
            lambda: path == '/dev/sim' or self.world.path(path) is not None,
        )

    def _there(self, path):
        if not path.startswith(MAPPER):
            return path
        return self.world.path(path) or path


class SimNode(Machine, Node):
    """A machine with LVM in miniature."""


class FaultySimNode(Machine, faults.FaultyNode):
    """One whose acts can be spoilt."""
