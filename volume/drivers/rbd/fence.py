# SPDX-License-Identifier: Apache-2.0
"""Hosts open images themselves: let them in, and really end that.

All hosts share a user of Ceph, so the cluster cannot forbid one of them an
image. What it can is to block a *client*: an address with a number that no
later client has. Who has an image open to be written has a watch on it, and
who has written holds its lock; QEMU opens each image with a client of its
own. To revoke is to block the clients of that host which this image shows,
and to see that they are gone.

Which client is whose is told by addresses; if only one host was let in, all
of them are. What cannot be told is not guessed, but refused. So is a kernel
client that has other volumes open as well: it would lose them, too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import ipaddress
import logging
import time
from collections.abc import Callable, Collection

from volume import errors
from volume import model
from volume.drivers.rbd import guests
from volume.drivers.rbd import names
from volume.drivers.rbd.images import Images
from volume.drivers.rbd.link import Link
from volume.drivers.rbd.wire import BLOCK_S
from volume.drivers.rbd.wire import Wire

LOG = logging.getLogger(__name__)

# As long as a host may be away with the image open.
LEAST = datetime.timedelta(seconds=BLOCK_S / 2)
ROUNDS = 5
END_S = 30.0
POLL_S = 0.05
KERNEL_COOKIE = 0xffff << 48  # the watches of Linux are numbered from here
# To miss one of n OSDs has a chance of n * e^-20.
PROBES_EACH = 20


@dataclasses.dataclass(frozen=True, slots=True)
class Client:
    """One that has an image open, or its lock."""

    address: str
    is_kernel: bool

    @property
    def ip(self) -> str:
        """Return the address without port and number."""
        return plain(self.address.rpartition(':')[0])


def plain(address: str) -> str:
    """Return an IP address as it is written everywhere."""
    text = address.strip().strip('[]')
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        return text


def whose(
    clients: Collection[Client],
    addresses: Collection[str],
    others: Collection[Collection[str]],
) -> list[Client]:
    """Return the clients of a host, by its addresses and those of others.

    :raises Busy: it cannot be told of one of them
    """
    if not others:
        return list(clients)
    found = []
    for client in clients:
        is_its = client.ip in addresses
        is_another = any(client.ip in each for each in others)
        if is_its == is_another:
            raise errors.Busy(
                f'client {client.address} has the image open, and its address '
                f'is that of {"several" if is_its else "none"} of the hosts '
                'that may: detach it there, or have the hosts say their '
                'addresses in rbd_addresses'
            )
        if is_its:
            found.append(client)
    return found


class Fence:
    """Lets hosts in, and ends that."""

    def __init__(
        self, link: Link, images: Images,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.link = link
        self.images = images
        self._sleep = sleep

    def grant(
        self, volume: model.Volume, host: model.Host, access: model.Access
    ) -> model.Connection:
        settings = self.link.settings
        user, secret = settings.host_user, settings.secret_uuid
        if access is model.Access.READ:
            user = settings.read_only_user
            secret = settings.read_only_secret_uuid
        if not user:
            raise errors.Unsupported(
                'Ceph keeps no host from writing whose user may write: set '
                'read_only_user to one that may not, or attach a clone'
            )
        name = names.image(volume)
        monitors = self.link.ask('mons', _monitors)
        value = guests.entry(host, _addresses(host), access.value)
        with self.link.image(
            volume.pool, name, is_read_only=False
        ) as image:
            image.note(names.host(host.name), value)
        return model.Connection('rbd', {
            'name': f'{volume.pool}/{name}',
            'hosts': [each[0] for each in monitors],
            'ports': [each[1] for each in monitors],
            'cluster_name': settings.cluster,
            'auth_enabled': True,
            'auth_username': user,
            'secret_type': 'ceph',
            'secret_uuid': secret or None,
            'volume_id': volume.id,
            'discard': True,
        })

    def revoke(self, volume: model.Volume, host: model.Host) -> None:
        name = names.image(volume)
        try:
            self._revoke(volume, name, host)
        except errors.NotFound as missing:
            # Something is not there; only with the image itself all is done.
            with contextlib.suppress(errors.NotFound), self.link.image(
                volume.pool, name
            ):
                raise errors.Unknown(
                    f'host {host.name} may have volume {volume.id} open: '
                    f'{missing}'
                ) from missing

    # Ours alone.

    def _revoke(
        self, volume: model.Volume, name: str, host: model.Host
    ) -> None:
        for _ in range(ROUNDS):
            clients = self._clients_of(volume, name, host)
            if not clients:
                break
            self._refuse_shared(clients, volume, name)
            for client in clients:
                self.link.do('block', functools.partial(_block, client))
            self._reach_all(volume.pool)
            self._end_locks(volume, name, clients)
            self._await_end(volume, name, clients)
        else:
            raise errors.Busy(
                f'host {host.name} opens volume {volume.id} again and '
                'again: end that there first'
            )
        with self.link.image(
            volume.pool, name, is_read_only=False
        ) as image:
            image.forget(names.host(host.name))

    def _clients_of(
        self, volume: model.Volume, name: str, host: model.Host
    ) -> list[Client]:
        with self.link.image(volume.pool, name) as image:
            found = guests.read(image.notes())
        known = {each.name: each.addresses for each in found.hosts}
        own = known.pop(host.name, ())
        # An entry that nobody can read is another host's, unless its key is
        # this one's. To leave it out could cut off a host that may stay; to
        # count it can only refuse, as any host can have it by inventing one.
        strangers = [
            key for key in found.unreadable if key != names.host(host.name)
        ]
        for key in strangers:
            LOG.warning(
                'image %s of pool %s: what its metadata has of %s is broken; '
                'if no host has it open, run: rbd image-meta remove %s/%s %s',
                name, volume.pool, key, volume.pool, name, key,
            )
        return whose(
            self._clients(volume.pool, name), {*own, *_addresses(host)},
            [*known.values(), *(() for _ in strangers)],
        )

    def _clients(self, pool: str, name: str) -> list[Client]:
        """Return who has an image open to be written, or its lock."""
        with self.link.image(pool, name) as image:  # anew: locks are cached
            watchers = image.watchers()

            def look(wire: Wire) -> list[tuple[str, str, str]]:
                return [
                    each for each in wire.lockers(image.raw)
                    if each[0] != f'client.{wire.client()}'
                ]

            lockers = self.link.ask('lockers', look)
        found = {
            each['addr']: Client(
                each['addr'], int(each['cookie']) >= KERNEL_COOKIE)
            for each in watchers
        }
        for _, cookie, address in lockers:
            number = cookie.rpartition(' ')[2]
            found.setdefault(address, Client(
                address,
                number.isdigit() and int(number) >= KERNEL_COOKIE,
            ))
        return [found[address] for address in sorted(found)]

    def _refuse_shared(
        self, clients: Collection[Client], volume: model.Volume, name: str
    ) -> None:
        """Refuse to block clients that other volumes need.

        The kernel has one client for all images that are mapped alike
        (without "noshare"); QEMU has one for each.

        :raises Busy: one has another volume open
        """
        kernels = {each.address for each in clients if each.is_kernel}
        if not kernels:
            return
        for pool in self.link.settings.pools:
            for other in self.images.listed(pool):
                if (pool, other) == (volume.pool, name) or (
                    names.volume_id(other) is None
                ):
                    continue
                try:
                    there = self._clients(pool, other)
                except (errors.NotFound, errors.Corrupt):
                    continue  # it is gone, or of no use to anybody
                for each in there:
                    if each.address in kernels:
                        raise errors.Busy(
                            f'the kernel of {each.address} has volume '
                            f'{volume.id} open by the same client as image '
                            f'{other} of pool {pool}: unmap it there, or '
                            'block the client by hand when both may end'
                        )

    def _reach_all(self, pool: str) -> None:
        """Let every OSD hear of the block before anything else is done.

        One that serves a question of ours has our map, or a newer one; each
        object is on some OSD, and these names are spread over all.
        """

        def probe(wire: Wire) -> None:
            ioctx = wire.ioctx(pool)
            count = PROBES_EACH * max(1, len(wire.command('osd ls')))
            for number in range(count):
                try:
                    ioctx.stat(f'volume-service.reach.{number}')
                except wire.rados.ObjectNotFound:
                    pass

        self.link.ask('reach', probe)

    def _end_locks(
        self, volume: model.Volume, name: str, clients: list[Client]
    ) -> None:
        """Free the lock, that the next one need not wait for it."""
        addresses = {each.address for each in clients}

        def work(wire: Wire) -> None:
            for who, cookie, address in wire.lockers(image.raw):
                if address in addresses:
                    image.raw.break_lock(who, cookie)

        with self.link.image(volume.pool, name) as image:
            if not any(
                address in addresses for _, _, address in
                self.link.ask('lockers', lambda wire: wire.lockers(image.raw))
            ):
                return
        with self.link.image(
            volume.pool, name, is_read_only=False
        ) as image:
            try:
                self.link.do('break_lock', work)
            except errors.NotFound:
                pass  # somebody else did

    def _await_end(
        self, volume: model.Volume, name: str, clients: list[Client]
    ) -> None:
        """Prove that none of the clients is left.

        :raises Unknown: one is
        """
        addresses = {each.address for each in clients}
        deadline = time.monotonic() + END_S
        while left := addresses & {
            each.address for each in self._clients(volume.pool, name)
        }:
            if time.monotonic() > deadline:
                raise errors.Unknown(
                    f'client {min(left)} is blocked, and is still listed at '
                    f'volume {volume.id}'
                )
            self._sleep(POLL_S)


def _addresses(host: model.Host) -> list[str]:
    said = host.properties.get('rbd_addresses', '').split()
    return sorted({plain(each) for each in (*host.addresses, *said)})


def _block(client: Client, wire: Wire) -> None:
    """Block a client, for long.

    :raises Busy: somebody has blocked it before, for a short time only
    """
    wire.block(client.address)
    # Ceph keeps the first block of a client, however short.
    until = wire.blocked_until(client.address)
    least = datetime.datetime.now(datetime.UTC) + LEAST
    if until is None or until < least:
        raise errors.Busy(
            f'client {client.address} is blocked until {until} only, by '
            'somebody else, and that cannot be changed: take it away (ceph '
            f'osd blocklist rm {client.address}), and detach again'
        )


def _monitors(wire: Wire) -> list[tuple[str, str]]:
    """Return address and port of each monitor."""
    found = []
    for each in wire.command('mon dump')['mons']:
        address, _, port = each['addr'].partition('/')[0].rpartition(':')
        found.append((address.strip('[]'), port))
    return found
