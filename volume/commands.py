# SPDX-License-Identifier: Apache-2.0
"""Commands run to their end, and what this machine's errors mean.

``node`` is the door to all of it; nobody else comes here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import re
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from volume import concurrency
from volume import endings
from volume import errors

# What the operating system says, and what it means to our caller.
MEANING: Mapping[int, type[errors.VolumeError]] = {
    errno.ENOSPC: errors.NoSpace,
    errno.EDQUOT: errors.NoSpace,
    errno.ENOENT: errors.NotFound,
    errno.EEXIST: errors.Conflict,
    errno.EBUSY: errors.Busy,
    errno.EACCES: errors.Invalid,
    errno.EPERM: errors.Invalid,
    errno.EROFS: errors.Invalid,
    errno.ENOTDIR: errors.Invalid,
    errno.ENAMETOOLONG: errors.Invalid,
    errno.EFBIG: errors.Invalid,
    errno.ELOOP: errors.Invalid,
    errno.EOPNOTSUPP: errors.Unsupported,
    # This machine has no more of something; nothing happened.
    errno.EAGAIN: errors.Unavailable,
    errno.EMFILE: errors.Unavailable,
    errno.ENFILE: errors.Unavailable,
    errno.ENOMEM: errors.Unavailable,
}

CPU_GRACE_S = 5  # from SIGXCPU to SIGKILL
KILLED_S = 2.0  # for what was killed to be gone
REAP_S = 0.5
PERCENT = re.compile(rb'\((\d+(?:\.\d+)?)/100%\)')  # qemu-img -p
ENVIRONMENT = {
    'LC_ALL': 'C', 'PATH': '/usr/sbin:/usr/bin:/sbin:/bin',
    # Each thread of librbd would reserve address space of its own, and
    # qemu-img may have but so much, whatever the number of processors.
    'MALLOC_ARENA_MAX': '4',
}
WRAPPERS = ('setpriv', 'prlimit')
NOT_INSTALLED = re.compile(r'(setpriv|prlimit): failed to execute')
# By whole words. The path of a file called as a key, and then what is said of
# it, is no secret: two plain words in a row, of which one alone would go.
SECRET = re.compile(
    r'(?i)(?<!\S)(?!/[^\s=:]*key: (?-i:[A-Z]?[a-z]+ [a-z]))'
    r'(\S*?(?:password|passwd|secret|token|key)\S*?[=:]\s*)\S+'
)


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What a command that parses foreign bytes may use, by prlimit(1)."""

    address_bytes: int = 1 << 30
    cpu_s: int = 10
    file_bytes: int | None = None

    def argv(self) -> list[str]:
        # With one limit for both it is killed, and nobody knows for what.
        cpu_s = f'{self.cpu_s}:{self.cpu_s + CPU_GRACE_S}'
        prefix = [
            'prlimit', f'--as={self.address_bytes}', f'--cpu={cpu_s}',
            '--core=0', '--nofile=256',
        ]
        if self.file_bytes is not None:
            prefix.append(f'--fsize={self.file_bytes}')
        return prefix


class CommandFailed(errors.Unknown):
    """A command ended with an exit code other than zero.

    A driver maps it by a table; unmapped it counts as ``Unknown``.
    ``is_ended`` says that somebody has ended it: that tells nothing about
    what it worked on.
    """

    def __init__(self, argv: Sequence[str], code: int, stderr: str) -> None:
        self.code = code
        self.is_ended = code in (-signal.SIGTERM, -signal.SIGKILL)
        self.stderr = stderr
        last = stderr.strip().splitlines()[-1:] or ['it said nothing']
        how = f'failed with code {code}' if code >= 0 else (
            f'was ended by {signal.Signals(-code).name}'
        )
        super().__init__(f'{argv[0]} {how}: {last[0]:.400}')


class Endless(errors.Unknown):
    """A command was ended, for it took too long or printed too much."""


def meaning(failed: OSError, doing: str) -> errors.VolumeError:
    """Return our error for one of the operating system's."""
    kind = MEANING.get(failed.errno or 0, errors.Unknown)
    return kind(f'{doing}: {os.strerror(failed.errno or 0)}')


def mask(text: str, secrets: Sequence[str] = ()) -> str:
    """Replace secrets, and what looks like one, by three stars."""
    for secret in secrets:
        if secret:
            text = text.replace(secret, '***')
    return SECRET.sub(r'\1***', text)


def run(
    argv: list[str],
    locks: Sequence[int],
    timeout_s: float,
    input_bytes: bytes,
    output_bytes_max: int,
    secrets: Sequence[str],
    watch: Callable[[float], None] | None,
    tick: Callable[[], None] | None = None,
) -> str:
    """Run it to its end; ``locks`` are descriptors that it inherits.

    Without input the last of them is its standard input, too: LVM closes
    all but its standard streams as it starts, and that one it keeps.

    ``tick`` is called a few times a second as well, and ends the command by
    raising; unlike ``watch`` it does not change what is kept of the output.
    """
    stdin = locks[-1] if locks else subprocess.DEVNULL
    try:
        child = concurrency.popen(
            argv, env=ENVIRONMENT, pass_fds=locks, process_group=0,
            stdin=subprocess.PIPE if input_bytes else stdin,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
        )
    except FileNotFoundError as missing:
        raise errors.Unavailable(f'{argv[0]} is not installed') from missing
    except OSError as failed:
        raise meaning(failed, f'start {argv[0]}') from failed
    name = _without_wrappers(argv)
    try:
        out, err = _talk(
            child, name, timeout_s, input_bytes, output_bytes_max, watch,
            tick,
        )
    except BaseException as failed:
        if not _is_ended(child) and isinstance(
            failed, (errors.Unknown, errors.Cancelled)
        ):
            raise Endless(
                f'{failed}; {name[0]} was killed and has not ended: the '
                'kernel waits for something on its behalf, as for a disk '
                'that does not answer'
            ) from failed
        raise
    finally:
        for pipe in child.stdin, child.stdout, child.stderr:
            if pipe is not None:
                pipe.close()
    code = child.returncode
    if code:
        words = mask(err.decode(errors='replace'), secrets)
        if NOT_INSTALLED.match(words):
            raise errors.Unavailable(f'{name[0]} is not installed')
        raise CommandFailed(name, code, words)
    return out.decode(errors='replace')


def _talk(
    child: subprocess.Popen[bytes],
    argv: list[str],
    timeout_s: float,
    input_bytes: bytes,
    output_bytes_max: int,
    watch: Callable[[float], None] | None,
    tick: Callable[[], None] | None,
) -> tuple[bytes, bytes]:
    """Feed and drain the child until it ends."""
    deadline = time.monotonic() + timeout_s
    assert child.stdout and child.stderr
    kept = {child.stdout: bytearray(), child.stderr: bytearray()}
    percent = 0.0
    with selectors.DefaultSelector() as selector:
        for pipe in kept:
            selector.register(pipe, selectors.EVENT_READ, pipe)
        if child.stdin:
            # Small inputs only: a pipe holds 64 KiB without a reader.
            assert len(input_bytes) <= 1 << 16
            # A child that does not want its input says why by its code.
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(input_bytes)
                child.stdin.close()
        while selector.get_map():
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise Endless(
                    f'{argv[0]} did not end within {timeout_s:g} s'
                )
            for key, _ in selector.select(min(left_s, 0.3)):
                data = key.data.read(1 << 16)
                if not data:
                    selector.unregister(key.fileobj)
                    continue
                buffer = kept[key.data]
                buffer += data
                if watch and (found := PERCENT.findall(buffer[-200:])):
                    percent = float(found[-1])
                    del buffer[:-200]
                if len(buffer) > output_bytes_max:
                    raise Endless(
                        f'{argv[0]} printed over {output_bytes_max} bytes'
                    )
            if tick:
                tick()
            if watch:
                watch(percent)
        _await(child, argv[0], deadline, timeout_s)
    return bytes(kept[child.stdout]), bytes(kept[child.stderr])


def _await(
    child: subprocess.Popen[bytes],
    name: str,
    deadline: float,
    timeout_s: float,
) -> None:
    """Wait for a child that has closed its output; it may live on."""
    try:
        child.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise Endless(
            f'{name} did not end within {timeout_s:g} s'
        ) from None


def _is_ended(child: subprocess.Popen[bytes]) -> bool:
    """End it with all that it has started; say whether it is gone.

    What waits for a dead disk lives on, and keeps the locks that it has
    inherited: nobody works beside it. Our caller must not wait as long.
    """
    endings.end_group(
        child.pid, [pipe for pipe in (child.stdout, child.stderr) if pipe]
    )
    try:
        child.wait(KILLED_S)
    except subprocess.TimeoutExpired:
        threading.Thread(
            target=_reap, args=(child,), name=f'reap-{child.pid}', daemon=True
        ).start()
        return False
    return True


def _reap(child: subprocess.Popen[bytes]) -> None:
    while child.poll() is None:
        time.sleep(REAP_S)


def _without_wrappers(argv: list[str]) -> list[str]:
    """Return the command that the limits and belts are for."""
    rest = argv
    while rest[0] in WRAPPERS:
        rest = rest[1:]
        while rest and rest[0].startswith('--'):
            rest = rest[1:]
    return rest
