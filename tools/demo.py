# SPDX-License-Identifier: Apache-2.0
"""The main job of the service on real input, each step checked and timed.

It needs no root and leaves nothing behind: what it makes lies in one
temporary directory, what it starts is ended by its pid.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence

from demo_family import ENVIRONMENT
from demo_family import Family
from demo_screen import Failed
from demo_screen import Screen
from demo_screen import size
from demo_story import Demo
from demo_xensm import XenDemo

import volume
from volume import errors

TOOLS = (
    'debugfs', 'e2fsck', 'mke2fs', 'prlimit', 'qemu-img',
    'qemu-storage-daemon',
)
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; 0 is all right, 1 is not, 130 is interrupted."""
    parser = argparse.ArgumentParser(
        prog='./run demo', description=__doc__.split('\n')[0]
    )
    parser.add_argument(
        'on', nargs='?', choices=('files', 'xensm'), default='files',
        help='files of this machine (the default), or XenAPI pools, '
             'simulated',
    )
    parser.add_argument(
        '--small', action='store_true',
        help='with an image of tens of MiB, for a quick look',
    )
    options = parser.parse_args(arguments)
    screen = Screen()
    for number in signal.SIGTERM, signal.SIGHUP:
        signal.signal(number, _interrupt)
    try:
        _run(screen, options.on, options.small)
    except KeyboardInterrupt:
        screen.say('interrupted; everything was ended and removed', '31')
        return INTERRUPTED
    except (Failed, errors.VolumeError, OSError) as failed:
        screen.say(f'demo: {failed}', '31')
        return 1
    screen.say(
        f'\nAll {screen.checks} checks in {screen.steps} steps passed in '
        f'{screen.elapsed_s:.0f} s; nothing is left behind.', '32'
    )
    return 0


def _run(screen: Screen, on: str, is_small: bool) -> None:
    _check_machine(is_small)
    screen.say(
        f'volume-service {volume.__version__} on {_system()}, '
        f'{os.cpu_count()} processors, Python {platform.python_version()}\n',
        '1',
    )
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(
            tempfile.TemporaryDirectory(prefix='volume-demo-')
        )
        family = stack.enter_context(Family())
        # From here on nobody's impatience leaves a process or a file behind.
        stack.callback(_ignore_signals)
        kind = XenDemo if on == 'xensm' else Demo
        demo = kind(screen, family, directory, is_small=is_small)
        try:
            demo.run()
        except (Failed, errors.VolumeError, OSError):
            if log := demo.service.log_tail():
                screen.say(f'\nThe service\'s log ends with:\n{log}')
            raise


def _check_machine(is_small: bool) -> None:
    """Say what is missing before anything is begun."""
    missing = [
        tool for tool in TOOLS
        if shutil.which(tool, path=ENVIRONMENT['PATH']) is None
    ]
    if missing:
        raise Failed(f'not installed: {", ".join(missing)}; see bindep.txt')
    needed = (1 << 30) if is_small else (8 << 30)
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < needed:
        raise Failed(
            f'{tempfile.gettempdir()} has {size(free)} free and '
            f'{size(needed)} are needed; set TMPDIR, or use --small'
        )


def _system() -> str:
    try:
        return platform.freedesktop_os_release()['PRETTY_NAME']
    except (OSError, KeyError):
        return platform.system()


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _ignore_signals() -> None:
    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        signal.signal(number, signal.SIG_IGN)


if __name__ == '__main__':
    sys.exit(main())
