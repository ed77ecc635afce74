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

import dataclasses
import functools
import ipaddress
import json
import time
from collections.abc import Callable, Collection

from volume import errors
from volume import model
from volume.drivers.rbd import names
from volume.drivers.rbd.images import hosts
from volume.drivers.rbd.images import Images
from volume.drivers.rbd.link import Link
from volume.drivers.rbd.wire import Wire

# An address is never used again, so this need not end soon; it must not end
# while a host may still have the image open.
BLOCK_S = 5 * 365 * 86400
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
        value = json.dumps({
            'name': host.name, 'addresses': _addresses(host),
            'access': access.value,
        }, sort_keys=True)
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
            for _ in range(ROUNDS):
                clients = self._clients_of(volume, name, host)
                if not clients:
                    break
                for client in clients:
                    self._refuse_shared(client, volume, name)
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
        except errors.NotFound:
            return  # with its volume

    # Ours alone.

    def _clients_of(
        self, volume: model.Volume, name: str, host: model.Host
    ) -> list[Client]:
        with self.link.image(volume.pool, name) as image:
            notes = image.notes()
        known = {each.name: each.addresses for each in hosts(notes)}
        own = known.pop(host.name, ())
        return whose(
            self._clients(volume.pool, name), {*own, *_addresses(host)},
            list(known.values()),
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
        self, client: Client, volume: model.Volume, name: str
    ) -> None:
        """Refuse to block a client that other volumes need.

        The kernel has one client for all images that are mapped alike
        (without "noshare"); QEMU has one for each.

        :raises Busy: it has another volume open
        """
        if not client.is_kernel:
            return
        for pool in self.link.settings.pools:
            for found in self.images.scan(pool):
                if found.id in (None, volume.id) or found.snapshot_of:
                    continue
                there = self._clients(pool, found.handle)
                if client.address in [each.address for each in there]:
                    raise errors.Busy(
                        f'the kernel of {client.address} has volume '
                        f'{volume.id} open by the same client as volume '
                        f'{found.id}: unmap it there, or block the client '
                        'by hand when both may end'
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
    wire.block(client.address, BLOCK_S)


def _monitors(wire: Wire) -> list[tuple[str, str]]:
    """Return address and port of each monitor."""
    found = []
    for each in wire.command('mon dump')['mons']:
        address, _, port = each['addr'].partition('/')[0].rpartition(':')
        found.append((address.strip('[]'), port))
    return found
