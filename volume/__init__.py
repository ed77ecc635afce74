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

import importlib.metadata

try:
    __version__ = importlib.metadata.version('volume-service')
except importlib.metadata.PackageNotFoundError:  # run from a bare checkout
    __version__ = '0.0.0'
