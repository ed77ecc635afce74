# SPDX-License-Identifier: Apache-2.0
"""Who still uses a directory: processes that a program has left behind."""

import contextlib
import os


def processes():
    """Yield the pid and the command line of each process."""
    for pid in filter(str.isdigit, os.listdir('/proc')):
        with contextlib.suppress(OSError):
            with open(f'/proc/{pid}/cmdline', 'rb') as f:
                yield pid, f.read().replace(b'\0', b' ').decode()


def users(directory):
    """Yield processes that name the directory, or have it open."""
    for pid, name in processes():
        names = [name]
        with contextlib.suppress(OSError):
            for fd in os.listdir(f'/proc/{pid}/fd'):
                with contextlib.suppress(FileNotFoundError):
                    names.append(os.readlink(f'/proc/{pid}/fd/{fd}'))
        if any(directory in name for name in names):
            yield pid, name
