# SPDX-License-Identifier: Apache-2.0
"""A block-storage service with small drivers and a crash-safe journal.

The map of the house, from the ground up; a module may import what stands
above it in this list, and never what stands below it:

* ``model errors``          nouns, and everything that may go wrong
* ``node blockd``           the only doors to this machine
* ``drivers exports connector transfer``  where bytes live and how they move
* ``db``                    what was promised: rows, claims, jobs
* ``placement``             which pool a volume goes to
* ``journal flows``         workflows that survive a crash
* ``backends manager rpcapi service``     a process that serves
* ``api cli``               the doors for people and programs
"""

__version__: str


def __getattr__(name: str) -> str:
    """Return the version, looked up when somebody asks for it.

    That takes a second on a slow machine, and a node's agent never asks.
    """
    if name != '__version__':
        raise AttributeError(f'module {__name__!r} has no {name!r}')
    import importlib.metadata

    try:
        return importlib.metadata.version('volume-service')
    except importlib.metadata.PackageNotFoundError:  # a bare checkout
        return '0.0.0'
