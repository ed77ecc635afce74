# SPDX-License-Identifier: Apache-2.0
"""What the demo shows: the main job of the service, step by step.

Everything goes through doors that users have: REST, the host's connector and
NBD, ``volume-manage``.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from typing import Any

import demo_image
from demo_disk import Disk
from demo_family import Family
from demo_image import Image
from demo_screen import Failed
from demo_screen import MIB
from demo_screen import Screen
from demo_screen import size
from demo_screen import Step
from demo_service import percent
from demo_service import Service
from demo_web import ImageServer
from service_process import until

from volume import errors

GIB = 1 << 30
UP_S = 30.0
SLOW_S = 4.0  # an image that takes so long can be interrupted
SEED = 1  # the same noise each time


class Demo:
    """The steps, in order; each leaves the next one what it needs."""

    through = 'over NBD'

    def __init__(
        self,
        screen: Screen,
        family: Family,
        directory: str,
        *,
        is_small: bool,
    ) -> None:
        self.screen = screen
        self.family = family
        self.directory = directory
        self.content_bytes = (24 if is_small else 320) * MIB
        self.volume_bytes = 128 * MIB if is_small else GIB
        self.noise_bytes = (2 if is_small else 32) * MIB
        self.images = self.path('images')
        os.mkdir(self.images)
        self.random = random.Random(SEED)
        self.service = self.make_service()

    def path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def make_service(self) -> Service:
        """Return the service, not started yet, with all that it needs."""
        return Service(self.family, self.directory, self.images)

    def run(self) -> None:
        """Do it all.

        :raises Failed: something is not as it must be
        """
        with ImageServer(self.images) as self.web:
            image = self.make_image()
            self.start()
            self.create(image)
            self.attach()
            self.verify(image)
            self.check_files()
            self.write()
            self.snapshot()
            self.spoil()
            self.clone()
            self.revert()
            self.grow()
            self.crash(image)
            self.recover(image)
            self.audit()
            self.file_backend(image)
            self.delete()
            self.stop()

    # The steps.

    def make_image(self) -> Image:
        with self.screen.step('image') as step:
            image = demo_image.make(
                self.family, self.images, self.content_bytes
            )
            step.done(
                f'{image.files:,} real files, {size(image.content_bytes)}, as '
                f'ext4 of {size(image.size_bytes)} (e2fsck: clean) and qcow2'
            )
        return image

    def start(self) -> None:
        with self.screen.step('start') as step:
            self.service.start()
            # On a slow disk REST answers before they were looked at.
            late = time.monotonic() + UP_S
            while 'down' in self.states().values() and (
                time.monotonic() < late
            ):
                time.sleep(0.05)
            self.screen.check(
                self.states() == {'fast': 'up', 'archive': 'up'},
                f'a backend is not up: {self.states()}',
            )
            step.done(
                f'REST at {self.service.url}, SQLite; qcow and file backends '
                'are up'
            )

    def create(self, image: Image) -> None:
        """From a qcow2 image over http, its checksum verified on the way."""
        with self.screen.step('create') as step:
            self.volume_id = self.service.create(
                'disk', self.volume_bytes, image=self.web.url(image.qcow2),
                hints={'image_checksum': image.checksum},
            )
            row = self.settle(self.volume_id, step)
            self.screen.check(
                row['size_bytes'] == self.volume_bytes, 'the size is wrong'
            )
            step.done(
                f'{size(self.volume_bytes)} from the qcow2 image by http, '
                'its sha256 verified on the way'
            )

    def attach(self) -> None:
        with self.screen.step('attach') as step:
            self.disk = self.new_disk(self.volume_id)
            self.screen.check(
                self.disk.size_bytes == self.volume_bytes,
                'the NBD disk has another size',
            )
            scheme = self.disk.uri.partition(':')[0]
            step.done(f'over NBD ({scheme}), writable, '
                      f'{size(self.volume_bytes)}; the volume is in-use')

    def verify(self, image: Image) -> None:
        """Every byte, by two programs that share no code."""
        with self.screen.step('verify') as step:
            step.doing('by the one who uses it')
            count = self.same(self.disk, image.raw)
            step.doing('by qemu-img')
            self.disk.compare_by_qemu(image.qcow2, 'qcow2')
            self.screen.checks += 1
            step.done(
                f'{count:,} bytes equal the image, then zeros; so says '
                'qemu-img compare'
            )

    def check_files(self) -> None:
        with self.screen.step('e2fsck') as step:
            self.copy = self.path('copy.raw')
            self.disk.pull(self.copy)
            said = self.fsck(self.copy)
            step.done(f'-fn on what was read {self.through}: clean, {said}')

    def write(self) -> None:
        """A file system is changed as a host changes it: by blocks."""
        with self.screen.step('write') as step:
            local = self.path('new-file')
            with open(local, 'wb') as f:
                f.write(self.random.randbytes(self.noise_bytes // 2))
            self.family.run(
                'debugfs', '-w', '-R', f'write {local} new-file', self.copy
            )
            written = self.disk.push(self.copy)
            self.same(self.disk, self.copy)
            back = self.path('back')
            self.disk.pull(back)
            self.fsck(back)
            dumped = self.path('dumped')
            self.family.run(
                'debugfs', '-R', f'dump new-file {dumped}', back
            )
            self.screen.check(
                _content(dumped) == _content(local),
                'the new file does not read back as it was written',
            )
            step.done(
                f'{size(os.path.getsize(local))} file added, {size(written)} '
                f'of blocks {self.through}; reads back, e2fsck: clean'
            )

    def snapshot(self) -> None:
        with self.screen.step('snapshot') as step:
            self.snapshot_id = self.service.client.post('/snapshots', {
                'snapshot': {
                    'volume_id': self.volume_id, 'name': 'before',
                    'force': True,
                },
            })['snapshot']['id']
            self.service.settle('snapshot', self.snapshot_id, 'available')
            self.same(self.disk, self.copy)
            step.done('taken while attached and writable; the disk reads as '
                      'before')

    def spoil(self) -> None:
        """What a snapshot is for."""
        with self.screen.step('damage') as step:
            noise = self.random.randbytes(self.noise_bytes)
            self.disk.write(noise, 0)
            self.screen.check(
                self.disk.read(0, len(noise)) == noise,
                'the noise does not read back',
            )
            spoilt = self.path('back')
            self.disk.pull(spoilt)
            code, _ = self.family.run(
                'e2fsck', '-fn', spoilt, codes=(4, 8, 12)
            )
            self.screen.check(code >= 4, 'the file system is still whole')
            step.done(f'{size(len(noise))} of noise over its start: e2fsck '
                      'no longer accepts the file system')

    def clone(self) -> None:
        with self.screen.step('clone') as step:
            self.clone_id = self.service.create(
                'clone', self.volume_bytes, snapshot_id=self.snapshot_id
            )
            self.settle(self.clone_id, step)
            took_s = step.elapsed_s
            self.clone_disk = self.new_disk(self.clone_id)
            count = self.same(self.clone_disk, self.copy)
            step.done(
                f'from the snapshot in {1000 * took_s:.0f} ms; attached, all '
                f'{size(count)} has the old bytes'
            )

    def revert(self) -> None:
        with self.screen.step('revert') as step:
            self.refused('revert', snapshot_id=self.snapshot_id)
            self.disk.detach()
            self.service.act(
                self.volume_id, 'revert', snapshot_id=self.snapshot_id
            )
            self.settle(self.volume_id, step)
            self.disk.attach()
            count = self.same(self.disk, self.copy)
            step.done(
                'refused while attached; detached, gone there; all '
                f'{size(count)} as it was'
            )

    def grow(self) -> None:
        with self.screen.step('grow') as step:
            wanted = 2 * self.volume_bytes
            self.refused('os-extend', new_size_bytes=wanted)
            self.disk.detach()
            self.service.act(
                self.volume_id, 'os-extend', new_size_bytes=wanted
            )
            self.settle(self.volume_id, step)
            self.disk.attach()
            self.screen.check(
                self.disk.size_bytes == wanted, 'the disk did not grow'
            )
            self.same(self.disk, self.copy)
            step.done(
                f'to {size(wanted)}, only when detached: the old bytes stay, '
                'the new are all zero'
            )

    def crash(self, image: Image) -> None:
        """SIGKILL while one volume is written and another downloaded."""
        with self.screen.step('kill -9') as step:
            self.web.slow_s = SLOW_S
            made = (
                ('raw', 'fast', image.raw), ('qcow2', 'archive', image.qcow2)
            )
            self.crashed = {
                self.service.create(
                    f'crash-{format}', self.volume_bytes, backend=backend,
                    image=self.web.url(path),
                ): image.raw
                for format, backend, path in made
            }
            done = until(
                lambda: self.progress(step), lambda done: min(done) >= 10,
                'both creates to be on their way',
            )
            self.service.kill()
            self.web.slow_s = 0.0
            word = self.random.randbytes(4096)
            self.disk.write(word, self.volume_bytes)
            self.screen.check(
                self.disk.read(self.volume_bytes, len(word)) == word,
                'the attached disk stopped with the service',
            )
            self.disk.write(bytes(len(word)), self.volume_bytes)
            step.done(
                f'service killed, two creates at {done[0]} % and {done[1]} %; '
                'the attached disk works on'
            )

    def recover(self, image: Image) -> None:
        with self.screen.step('recover') as step:
            self.service.start()
            for volume_id in self.crashed:
                self.settle(volume_id, step)
            took_s = step.elapsed_s
            count = 0
            for volume_id, path in self.crashed.items():
                disk = self.new_disk(volume_id)
                count += self.same(disk, path)
                disk.detach()
            self.same(self.disk, self.copy)
            self.same(self.clone_disk, self.copy)
            step.done(
                'restarted: both creates ended by themselves in '
                f'{took_s:.1f} s; {size(count)} is right'
            )

    def audit(self) -> None:
        """Rows, storage and exports agree, by volume-manage's own look."""
        with self.screen.step('audit') as step:
            for words in ('jobs',), ('reconcile', '--dry-run'):
                found = self.service.manage(*words)
                self.screen.check(
                    not found, f'volume-manage {" ".join(words)}: {found}'
                )
            spooled = os.listdir(self.path('state/spool'))
            self.screen.check(not spooled, f'the spool has {spooled}')
            step.done('no open job, spool empty, volume-manage reconcile '
                      '--dry-run: nothing')

    def file_backend(self, image: Image) -> None:
        """The same in short on raw files, from an image on this node."""
        with self.screen.step('archive') as step:
            command = self.service.command
            made = command(
                'create', '--name', 'raw', '--backend', 'archive',
                '--size', f'{self.volume_bytes // MIB}M',
                '--image', f'file://{image.qcow2}',
            )
            disk = Disk(self.service, self.family, made['id'])
            disk.uri = command('attach', 'raw')['location']
            count = self.same(disk, image.raw)
            disk.compare_by_qemu(image.qcow2, 'qcow2')
            self.screen.checks += 1
            command('detach', 'raw')
            command('delete', 'raw')
            step.done(
                'file backend, by the command line: create, attach, '
                f'{size(count)} equal, delete'
            )

    def delete(self) -> None:
        """In an order that users choose: first what others stand on."""
        with self.screen.step('delete') as step:
            self.disk.detach()
            self.service.delete('snapshot', self.snapshot_id)
            self.service.delete('volume', self.volume_id)
            self.same(self.clone_disk, self.copy)
            self.clone_disk.detach()
            for volume_id in (self.clone_id, *self.crashed):
                self.service.delete('volume', volume_id)
            until(
                lambda: self.service.stored_bytes('fast', 'archive'),
                lambda stored: stored < MIB, 'the storage to be empty',
            )
            self.screen.check(
                not self.claimed_bytes(), 'deleted volumes keep their claim'
            )
            step.done(
                'snapshot, origin first, clone still right; then all: no '
                'claim, disk free'
            )

    def stop(self) -> None:
        with self.screen.step('stop') as step:
            code = self.service.stop()
            self.screen.check(code == 0, f'the service ended with {code}')
            step.done('SIGTERM: drained, exit code 0')

    # What several steps need.

    def new_disk(self, volume_id: str) -> Disk:
        disk = Disk(self.service, self.family, volume_id)
        disk.attach()
        return disk

    def same(self, disk: Disk, path: str) -> int:
        self.screen.checks += 1
        return disk.compare(path)

    def fsck(self, path: str) -> str:
        """Return how many files there are."""
        self.screen.checks += 1
        _, said = self.family.run('e2fsck', '-fn', path)
        return said.splitlines()[-1].partition(': ')[2].partition(' (')[0]

    def refused(self, action: str, **info: object) -> None:
        """See that an attached volume is left alone."""
        self.screen.checks += 1
        with contextlib.suppress(errors.Invalid, errors.Unsupported):
            self.service.act(self.volume_id, action, **info)
            raise Failed(f'{action} of an attached volume was accepted')

    def settle(self, volume_id: str, step: Step) -> dict[str, Any]:
        self.screen.checks += 1
        return self.service.settle('volume', volume_id, 'available', step)

    def progress(self, step: Step) -> list[int]:
        jobs = [self.service.job(volume_id) for volume_id in self.crashed]
        if not all(jobs):
            raise Failed('a create ended before it could be interrupted')
        done = [percent(job) for job in jobs if job]
        step.doing(' and '.join(f'{each} %' for each in done))
        return done

    def backends(self) -> list[dict[str, Any]]:
        found = self.service.client.get('/os-volume-backends')
        listed: list[dict[str, Any]] = found['backends']
        return listed

    def states(self) -> dict[str, str]:
        return {str(b['name']): str(b['state']) for b in self.backends()}

    def claimed_bytes(self) -> int:
        return sum(
            pool['claimed_bytes']
            for backend in self.backends() for pool in backend['pools']
        )


def _content(path: str) -> bytes:
    with open(path, 'rb') as f:
        return f.read()
