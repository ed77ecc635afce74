# SPDX-License-Identifier: Apache-2.0
"""``volume-manage`` in this process, which is left as it was."""

import contextlib
import io
import logging
import os

from volume.cli import manage


def run(*words):
    """Run a command; return its exit code and what it has printed."""
    out, err = io.StringIO(), io.StringIO()
    with _as_before():
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = manage.main(words)
    return code, out.getvalue(), err.getvalue()


@contextlib.contextmanager
def _as_before():
    """Keep the umask, and what is logged; a later test may look at it."""
    root, mask = logging.getLogger(), os.umask(0o077)
    loggers = [root, *map(logging.getLogger, root.manager.loggerDict)]
    handlers, levels = root.handlers[:], [each.level for each in loggers]
    try:
        yield
    finally:
        os.umask(mask)
        root.handlers[:] = handlers
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
