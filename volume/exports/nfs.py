# SPDX-License-Identifier: Apache-2.0
"""Volumes that are files, over the NFS server of the node's kernel.

For each attachment there is a directory beside the volume, with one name for
the volume's file in it, exported to the host's address alone. A host is
somebody without rights, ``nfs_uid``, to whom the file belongs from then on;
the directory does not, so that a host makes no files of its own.

With the export goes all access: the server looks at it before each request,
also for a file that is open. Which exports there are is asked of the server's
tools, and at the end of one of the server itself, which remembers what it was
told. Where an attachment's directory is stands in a link, for what has a
directory and is not exported yet, or no more.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import logging
import os
import re
from typing import Any, ClassVar

from oslo_config import cfg

from volume import errors
from volume import ids
from volume import model
from volume.exports.base import Export
from volume.exports.base import Exporter
from volume.node import Node
from volume.node import Op

LOG = logging.getLogger(__name__)

SERVER = '/proc/fs/nfsd'
KEPT = '/proc/net/rpc/nfsd.export/content'
PLACE = '.exports'  # the file driver passes over names with a dot
PLAIN = re.compile(r'/[A-Za-z0-9/._@+-]+')
LINE = re.compile(r'(/\S+)\s+(\S+?)\((.*)\)')
STATE = re.compile(r'superblock: "([0-9a-f:]+)"')
PEER = re.compile(r'^address: "([^"]*)"', re.MULTILINE)
NOBODY = 65534
TABLE_BYTES_MAX = 64 << 20
STATES_BYTES_MAX = 16 << 20
TRIES = 3

OPTIONS: tuple[cfg.Opt, ...] = (
    cfg.StrOpt(
        'nfs_address', required=True,
        help='Address of this node from which hosts mount.',
    ),
    cfg.IntOpt(
        'nfs_uid', default=NOBODY, min=1, max=(1 << 32) - 2,
        help='User and group to whom volumes belong while hosts use them.\n\n'
        'All users of a host are this one. Give a number that nothing else '
        'on the node runs as.',
    ),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Exported:
    """A line of the server's table."""

    path: str
    client: str
    is_read_only: bool


class NfsExporter(Exporter):
    """A directory for each attachment; the server outlives our service."""

    options: ClassVar[tuple[cfg.Opt, ...]] = OPTIONS
    outlives_service: ClassVar[bool] = True
    forms: ClassVar[frozenset[model.Form]] = frozenset({model.Form.FILE})
    abilities: ClassVar[model.Abilities] = model.Abilities(
        auth=('address',), remote_node=True,
    )

    def __init__(self, conf: Any, node: Node) -> None:
        self.conf = conf
        self.node = node
        self.is_shared = True

    def check(self) -> None:
        self._address(self.conf.nfs_address, 'nfs_address')
        try:
            threads = self.node.read(f'{SERVER}/threads').strip()
        except errors.NotFound:
            threads = b'0'
        if threads == b'0':
            raise errors.Unavailable(
                'the NFS server of the node does not run: start '
                'nfs-kernel-server'
            )
        self.node.make_directory(self._directory)

    def export(self, wanted: Export) -> model.Connection:
        attachment = ids.check(wanted.attachment_id, 'attachment')
        path = self._path(wanted)
        client = self._client(wanted.host)
        is_read_only = wanted.access is model.Access.READ
        directory = os.path.join(os.path.dirname(path), PLACE, attachment)
        name = f'volume-{wanted.volume_id}'
        there = self._exported().get(attachment)
        if there not in (None, Exported(directory, client, is_read_only)):
            raise errors.Conflict(
                f'attachment {attachment} is exported otherwise ({there}): '
                'end it first'
            )
        self.node.point(self._link(attachment), directory)
        self._put(directory, name, path)
        # The kernel's user of all hosts; it may do what is written here.
        uid = self.conf.nfs_uid
        self.node.run('chown', '--no-dereference', f'{uid}:{uid}', path)
        access = 'ro' if is_read_only else 'rw'
        self.node.run(
            'exportfs', '-o',
            f'{access},sync,subtree_check,all_squash,anonuid={uid},'
            f'anongid={uid}',
            f'{_bracketed(client)}:{directory}',
        )
        server = _bracketed(
            self._address(self.conf.nfs_address, 'nfs_address')
        )
        return model.Connection('nfs', {
            'export': f'{server}:{directory}', 'name': name,
            'options': None, 'format': 'raw',
        })

    def unexport(self, attachment_id: str) -> None:
        attachment = ids.check(attachment_id, 'attachment')
        there = self._exported().get(attachment)
        if there is not None:
            self.node.run(
                'exportfs', '-u', f'{_bracketed(there.client)}:{there.path}'
            )
            if attachment in self._exported():
                raise errors.Unknown(
                    f'attachment {attachment} is still exported by NFS after '
                    'its end'
                )
        link = self._link(attachment)
        try:
            directory = self.node.readlink(link)
        except errors.NotFound:
            if there is None:
                return
            directory = there.path
        self._forget(directory)
        self._clear(directory)
        self.node.unlink(link)

    def exported(self) -> set[str]:
        return set(self._exported())

    # Ours alone: questions.

    @property
    def _directory(self) -> str:
        return os.path.join(self.node.state_dir, 'nfs')

    def _link(self, attachment: str) -> str:
        return os.path.join(self._directory, attachment)

    def _exported(self) -> dict[str, Exported]:
        """Return by attachment what the server has of ours."""
        found = {}
        for line in self.node.run(
            'exportfs', '-s', output_bytes_max=TABLE_BYTES_MAX
        ).splitlines():
            match = LINE.match(line)
            if not match:
                continue
            place, name = os.path.split(match[1])
            if os.path.basename(place) == PLACE and ids.is_id(name):
                found[name] = Exported(
                    match[1], match[2], 'ro' in match[3].split(',')
                )
        return found

    def _path(self, wanted: Export) -> str:
        """Return the volume's file.

        :raises Unsupported: it is none
        :raises Corrupt: it is smaller than the volume
        """
        source = wanted.source
        if (
            not isinstance(source, model.Device) or source.is_block
            or source.format != 'raw'
        ):
            raise errors.Unsupported(
                f'volume {wanted.volume_id} is not one raw file of the node, '
                'and NFS serves no other; use another exporter'
            )
        if not PLAIN.fullmatch(source.path):
            raise errors.Unsupported(
                f'{source.path!r:.200} cannot be named to the NFS server: '
                'give the pool a directory without spaces or signs'
            )
        if self.node.size(source.path) < wanted.size_bytes:
            raise errors.Corrupt(
                f'{source.path} is smaller than volume {wanted.volume_id}'
            )
        return source.path

    def _client(self, host: model.Host) -> str:
        """Return the address from which the host mounts.

        :raises Invalid: it gave none
        """
        for address in host.addresses[:1]:
            return self._address(address, f'the ip of host {host.name}')
        raise errors.Invalid(
            f'host {host.name} has not said its address (ip), by which alone '
            'NFS knows it'
        )

    def _address(self, text: str, what: str) -> str:
        try:
            return str(ipaddress.ip_address(text))
        except ValueError as wrong:
            raise errors.Invalid(
                f'{what} is {text!r:.80}, which is no address'
            ) from wrong

    def _identities(self, *paths: str) -> list[str]:
        """Return device and number of each file, as the server writes it."""
        said = self.node.run('stat', '--format=%Hd %Ld %i', *paths)
        found = []
        for line in said.splitlines():
            major, minor, inode = map(int, line.split())
            found.append(f'{major:02x}:{minor:02x}:{inode}')
        return found

    def _is_known(self, directory: str) -> bool:
        """Say whether the server itself has it, whatever its tools say.

        Each time that it is to forget counts as a second (``write_flush`` of
        the kernel's net/sunrpc/cache.c), and what it has forgotten stays in
        its tables until its clock has come so far: as a comment here, and
        as if nothing had happened in ``exports``.
        """
        try:
            said = self.node.read(KEPT, TABLE_BYTES_MAX)
        except errors.NotFound:
            return False  # there is no server
        # It has the path without links, which may be another, and says so
        # behind it when the directory is no more.
        end = f'/{PLACE}/{os.path.basename(directory)}'
        return any(
            end in line and not line.startswith('#')
            for line in said.decode(errors='replace').splitlines()
        )

    # Ours alone: deeds.

    def _forget(self, directory: str) -> None:
        """Have the server itself forget what is exported no more.

        It keeps what its daemon has answered it: who was ended before he
        had it forgotten, or an answer that came late, leaves it there.

        :raises Unknown: it does not forget it
        """
        for _ in range(TRIES):
            if not self._is_known(directory):
                return
            self.node.run('exportfs', '-f')
        raise errors.Unknown(
            f'the NFS server still serves {directory}, which is exported no '
            f'more ({KEPT})'
        )

    def _put(self, directory: str, name: str, path: str) -> None:
        """Have the volume, and nothing else, in the directory.

        :raises Conflict: another volume is there
        """
        self.node.make_directory(directory)
        self.node.run('chmod', '0555', directory)
        others = [each for each in self.node.list(directory) if each != name]
        if others:
            raise errors.Conflict(
                f'{directory} holds {others[0]}, which is not {name}: end '
                'the attachment first'
            )
        link = os.path.join(directory, name)
        self.node.hard_link(path, link)
        one, two = self._identities(path, link)
        if one != two:
            # The volume was reverted, which put another file in its place.
            self.node.unlink(link)
            self.node.hard_link(path, link)

    def _clear(self, directory: str) -> None:
        """Remove a directory that is exported no more."""
        if not self.node.exists(directory):
            return
        for name in self.node.list(directory):
            path = os.path.join(directory, name)
            self._end_states(path)
            self.node.unlink(path)
        self.node.configure([Op.rmdir(directory)])

    def _end_states(self, path: str) -> None:
        """End what hosts have open of a file: they cannot close it any more.

        A host that has other volumes open is left alone, since it would lose
        those as well; the server forgets what it has of this one with them.
        So is one that has the volume by another attachment, too.
        """
        clients = f'{SERVER}/clients'
        try:
            names = self.node.list(clients)
        except errors.NotFound:
            return
        (identity,) = self._identities(path)
        others: set[str] | None = None
        for name in names:
            found = self._opened(f'{clients}/{name}')
            if identity not in found:
                continue
            if found != {identity}:
                LOG.warning(
                    'NFS client %s has %s open, and others: its locks stay '
                    'until it has ended', name, identity,
                )
                continue
            if others is None:
                others = self._others(path, identity)
            if not others or self._peer(f'{clients}/{name}') not in {
                *others, ''
            }:
                self._expire(f'{clients}/{name}')

    def _opened(self, client: str) -> set[str]:
        """Return which files a client has open or locked."""
        try:
            said = self.node.read(f'{client}/states', STATES_BYTES_MAX)
        except errors.NotFound:
            return set()  # it has gone meanwhile
        except errors.Invalid as many:
            # It is one host, and must not keep others from being detached.
            LOG.warning('what %s has open is not looked at: %s', client, many)
            return set()
        return set(STATE.findall(said.decode(errors='replace')))

    def _peer(self, client: str) -> str:
        """Return the address of a client; nothing if it cannot be told."""
        try:
            said = self.node.read(f'{client}/info').decode(errors='replace')
        except errors.NotFound:
            return ''
        match = PEER.search(said)
        host = match[1].rpartition(':')[0].strip('[]') if match else ''
        try:
            return str(ipaddress.ip_address(host))
        except ValueError:
            return ''

    def _others(self, path: str, identity: str) -> set[str]:
        """Return hosts that have the same file by another attachment."""
        directory, name = os.path.split(path)
        found = set()
        for each in self._exported().values():
            other = os.path.join(each.path, name)
            if each.path != directory and self.node.exists(other) and (
                self._identities(other) == [identity]
            ):
                found.add(each.client)
        return found

    def _expire(self, client: str) -> None:
        try:
            self.node.configure([Op.put(f'{client}/ctl', 'expire\n')])
        except errors.VolumeError:
            if self.node.exists(client):
                raise  # else it has gone by itself


def _bracketed(address: str) -> str:
    return f'[{address}]' if ':' in address else address
