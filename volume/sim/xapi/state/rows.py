# SPDX-License-Identifier: Apache-2.0
"""The pool's database: one row for each object, and what has changed.

Rows are held in memory and written in batches; ``flush`` makes durable what
was changed so far, and a call is answered only after it. Every change gets
the next number of one sequence (``generation``): the events of a client are
the rows whose number is higher than the one that it knows.

Fields that only repeat another object's reference the other way round
(``SR.VDIs``) are never stored; neither is what other parts compute.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import threading
import uuid as uuids
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from volume.sim.xapi.failure import dead
from volume.sim.xapi.failure import Failure
from volume.sim.xapi.published.datamodel import Model
from volume.sim.xapi.state.store import Saved
from volume.sim.xapi.state.store import Store

Row = dict[str, Any]
Key = tuple[str, str]  # class, ref

# (class, field) -> (class, field) whose references it repeats.
BACK: Final = {
    ('SR', 'VDIs'): ('VDI', 'SR'),
    ('SR', 'PBDs'): ('PBD', 'SR'),
    ('VDI', 'VBDs'): ('VBD', 'VDI'),
    ('VDI', 'snapshots'): ('VDI', 'snapshot_of'),
    ('VM', 'VBDs'): ('VBD', 'VM'),
    ('VM', 'snapshots'): ('VM', 'snapshot_of'),
    ('host', 'PBDs'): ('PBD', 'host'),
    ('host', 'PIFs'): ('PIF', 'host'),
    ('host', 'resident_VMs'): ('VM', 'resident_on'),
    ('network', 'PIFs'): ('PIF', 'network'),
    ('task', 'subtasks'): ('task', 'subtask_of'),
}
_INDEXED: Final = {*BACK.values()}
_INDEXED_ALWAYS: Final = (
    'uuid', 'name_label', 'SR', 'VM', 'VDI', 'host', 'location', 'originator',
)
GONE_KEPT: Final = 50_000
# A restart skips numbers, so that none is given out a second time.
_LEAP: Final = 1_000_000


class _Entry:
    __slots__ = ('created', 'fields', 'modified')

    def __init__(self, fields: Row, created: int, modified: int) -> None:
        self.fields = fields
        self.created = created
        self.modified = modified


class Rows:
    """All objects of a pool. Safe for threads; answers are copies."""

    def __init__(self, path: Path, model: Model) -> None:
        self.lock = threading.RLock()
        self.model = model
        self.changed = threading.Condition(self.lock)
        self._computed: dict[Key, Callable[[str, Row], Any]] = {}
        self._entries: dict[str, dict[str, _Entry]] = (
            collections.defaultdict(dict)
        )
        self._index: dict[tuple[str, str, Any], dict[str, None]] = {}
        self._latest: collections.OrderedDict[Key, int] = (
            collections.OrderedDict()
        )
        self._gone: collections.deque[tuple[int, int, str, str]] = (
            collections.deque(maxlen=GONE_KEPT)
        )
        self._unsaved: dict[str, Key] = {}
        self._writing = threading.Lock()
        self._store = Store(path)
        self._closed = False
        self._load()

    def _load(self) -> None:
        self.generation = int(self._store.fact('generation', '0'))
        # All is listed in the order in which it was made, as before.
        for ref, cls, created, modified, fields in self._store.load():
            self._entries[cls][ref] = _Entry(fields, created, modified)
            self._latest[cls, ref] = modified
            self._index_row(cls, ref, fields)
        self._latest = collections.OrderedDict(
            sorted(self._latest.items(), key=lambda item: item[1]),
        )
        if self.generation:
            self.generation += _LEAP

    # -- writing ----------------------------------------------------------

    def new(self, cls: str, /, **fields: Any) -> str:
        """Add an object; what is not given has its default.

        The reference is new; the uuid too, unless it is given.
        """
        ref = f'OpaqueRef:{uuids.uuid4()}'
        row = {
            field.name: self.model.default(field)
            for field in self.model.fields(cls).values()
            if not self._derived(cls, field.name)
        }
        row['uuid'] = str(uuids.uuid4())
        for name, value in fields.items():
            if name not in row:
                raise KeyError(f'{cls}.{name}')
            row[name] = copy.copy(value)
        with self.lock:
            self._entries[cls][ref] = _Entry(row, 0, 0)
            self._index_row(cls, ref, row)
            self._stamp(cls, ref)
            self._entries[cls][ref].created = self.generation
            self._touch_owners(cls, row)
        return ref

    def update(self, cls: str, ref: str, /, **fields: Any) -> None:
        """Change an object; the same value again is no change."""
        with self.lock:
            row = self._entry(cls, ref).fields
            new = {
                name: copy.copy(value) for name, value in fields.items()
                if row[name] != value
            }
            if not new:
                return
            self._touch_owners(cls, row, new)
            self._unindex_row(cls, ref, row, new)
            row.update(new)
            self._index_row(cls, ref, row, new)
            self._touch_owners(cls, row, new)
            self._stamp(cls, ref)

    @contextlib.contextmanager
    def change(self, cls: str, ref: str, name: str) -> Iterator[Any]:
        """Give one map or list to be changed in place."""
        with self.lock:
            value = copy.copy(self._entry(cls, ref).fields[name])
            yield value
            self.update(cls, ref, **{name: value})

    def delete(self, cls: str, ref: str) -> None:
        """Remove an object."""
        with self.lock:
            entry = self._entry(cls, ref)
            del self._entries[cls][ref]
            self._unindex_row(cls, ref, entry.fields)
            self._latest.pop((cls, ref), None)
            self.generation += 1
            self._gone.append((self.generation, entry.created, cls, ref))
            self._unsaved[ref] = (cls, ref)
            self._touch_owners(cls, entry.fields)
            self.changed.notify_all()

    def touch(self, cls: str, ref: str) -> None:
        """Make an event of an object of which only computed parts differ."""
        with self.lock:
            if ref in self._entries[cls]:
                self._stamp(cls, ref)

    # -- reading ----------------------------------------------------------

    def get(self, cls: str, ref: str) -> Row:
        """Return a whole object."""
        with self.lock:
            stored = self._entry(cls, ref).fields
            row = {
                name: copy.copy(value) if isinstance(value, dict | list)
                else value for name, value in stored.items()
            }
            for (owner, name), (child, field) in BACK.items():
                if owner == cls:
                    row[name] = self._referring(child, field, ref)
            for (owner, name), function in self._computed.items():
                if owner == cls:
                    row[name] = function(ref, stored)
            return row

    def field(self, cls: str, ref: str, name: str) -> Any:
        """Return one member of an object."""
        with self.lock:
            row = self._entry(cls, ref).fields
            back = BACK.get((cls, name))
            if back is not None:
                return self._referring(*back, ref)
            function = self._computed.get((cls, name))
            if function is not None:
                return function(ref, row)
            value = row[name]
            return (
                copy.copy(value) if isinstance(value, dict | list) else value
            )

    def exists(self, cls: str, ref: str) -> bool:
        """Say if there is such an object."""
        with self.lock:
            return ref in self._entries[cls]

    def all(self, cls: str) -> list[str]:
        """Return the references of a class, the oldest object first."""
        with self.lock:
            return list(self._entries[cls])

    def find(self, cls: str, /, **equal: Any) -> list[str]:
        """Return the references of those whose members equal these."""
        with self.lock:
            found: list[str] | None = None
            rest = dict(equal)
            for name, value in equal.items():
                if self._indexed(cls, name):
                    del rest[name]
                    refs = self._index.get((cls, name, value), {})
                    found = [
                        ref for ref in (refs if found is None else found)
                        if ref in refs
                    ]
            entries = self._entries[cls]
            return [
                ref for ref in (entries if found is None else found)
                if all(
                    self.field(cls, ref, name) == value
                    for name, value in rest.items()
                )
            ]

    def by_uuid(self, cls: str, uuid: str) -> str:
        """Return the reference of the object with a uuid.

        :raises Failure: UUID_INVALID
        """
        found = self.find(cls, uuid=uuid)
        if not found:
            raise Failure('UUID_INVALID', cls, uuid)
        return found[0]

    def compute(
        self, cls: str, name: str, function: Callable[[str, Row], Any],
    ) -> None:
        """Have a member computed from the reference and the stored row."""
        self._computed[cls, name] = function

    # -- changes ----------------------------------------------------------

    def since(self, generation: int) -> Iterator[tuple[str, str, str]]:
        """Yield (operation, class, ref) of what is newer, oldest first.

        An object appears once, as it is now; one that came and went in
        between does not appear at all. The lock must be held.
        """
        changes: list[tuple[int, str, str, str]] = []
        for (cls, ref), modified in reversed(self._latest.items()):
            if modified <= generation:
                break
            new = self._entries[cls][ref].created > generation
            changes.append((modified, 'add' if new else 'mod', cls, ref))
        for gone, created, cls, ref in reversed(self._gone):
            if gone <= generation:
                break
            if created <= generation:
                changes.append((gone, 'del', cls, ref))
        for _, operation, cls, ref in sorted(changes):
            yield operation, cls, ref

    def is_lost(self, generation: int) -> bool:
        """Say if objects have gone since then that nobody remembers."""
        with self.lock:
            full = len(self._gone) == GONE_KEPT
            return full and self._gone[0][0] > generation + 1

    # -- durability -------------------------------------------------------

    def flush(self) -> None:
        """Make durable what was changed before now."""
        with self._writing:
            with self.lock:
                if self._closed or not self._unsaved:
                    return
                unsaved, self._unsaved = self._unsaved, {}
                rows: list[Saved] = []
                gone: list[str] = []
                for ref, (cls, _) in unsaved.items():
                    entry = self._entries[cls].get(ref)
                    if entry is None:
                        gone.append(ref)
                    else:
                        rows.append((
                            ref, cls, entry.created, entry.modified,
                            dict(entry.fields),
                        ))
                facts = {'generation': str(self.generation)}
            self._store.save(rows, gone, facts)

    def close(self) -> None:
        """Save all, and let go of the file."""
        self.flush()
        with self._writing:
            self._closed = True
            self._store.close()

    # -- within -----------------------------------------------------------

    def _derived(self, cls: str, name: str) -> bool:
        return (cls, name) in BACK or (cls, name) in self._computed

    def _entry(self, cls: str, ref: str) -> _Entry:
        entry = self._entries[cls].get(ref)
        if entry is None:
            raise dead(cls, ref)
        return entry

    def _stamp(self, cls: str, ref: str) -> None:
        self.generation += 1
        self._entries[cls][ref].modified = self.generation
        self._latest[cls, ref] = self.generation
        self._latest.move_to_end((cls, ref))
        self._unsaved[ref] = (cls, ref)
        self.changed.notify_all()

    def _touch_owners(
        self, cls: str, row: Row, only: Row | None = None,
    ) -> None:
        """An object that is referred to has changed as well."""
        for (owner, _), (child, field) in BACK.items():
            if child == cls and (only is None or field in only):
                self.touch(owner, row[field])

    def _referring(self, cls: str, field: str, ref: str) -> list[str]:
        return list(self._index.get((cls, field, ref), ()))

    def _indexed(self, cls: str, name: str) -> bool:
        return name in _INDEXED_ALWAYS or (cls, name) in _INDEXED

    def _index_row(
        self, cls: str, ref: str, row: Row, only: Row | None = None,
    ) -> None:
        for name in row if only is None else only:
            if self._indexed(cls, name):
                key = (cls, name, row[name])
                self._index.setdefault(key, {})[ref] = None

    def _unindex_row(
        self, cls: str, ref: str, row: Row, only: Row | None = None,
    ) -> None:
        for name in row if only is None else only:
            if self._indexed(cls, name):
                key = (cls, name, row[name])
                refs = self._index[key]
                del refs[ref]
                if not refs:
                    del self._index[key]
