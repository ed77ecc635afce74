# SPDX-License-Identifier: Apache-2.0
"""Everything that may go wrong, by what the caller can do about it.

* VolumeError
  + Invalid         can never work                         400  report
  + Denied          the caller may not                     403  report
  + NotFound        not there                              404  report
  + Conflict        it exists and differs                  409  report
  + Busy            in use now                             409  retry
  + NoSpace         the pool is full                       413  another pool
  + Corrupt         wrong bytes                            500  tell a person
  + Unsupported     no such feature                        501  report
  + Unavailable     nothing happened, try again            503  retry
  + Unknown         it may have happened: inspect first    503  inspect
  + Cancelled       a person asked for it to stop          409  undo

``Unavailable`` and ``Unknown`` are different facts: after the first a call
may simply be made again; after the second it must be made again, or its
effect looked for, before anything else is done to the same volume.
"""

from __future__ import annotations


class VolumeError(Exception):
    """What went wrong, which thing, why, and what to do: one sentence."""

    http = 500
    retry = False

    @property
    def kind(self) -> str:
        """The name of the kind, as rows, RPC replies and the API carry it."""
        return type(self).__name__


class Invalid(VolumeError):
    """The request can never work."""

    http = 400


class Denied(VolumeError):
    """The caller may not do this."""

    http = 403


class NotFound(VolumeError):
    """There is no such thing."""

    http = 404


class Conflict(VolumeError):
    """It exists already, and differs from what was asked for."""

    http = 409


class Busy(VolumeError):
    """It is in use now."""

    http = 409
    retry = True


class NoSpace(VolumeError):
    """The pool is full."""

    http = 413


class Corrupt(VolumeError):
    """The bytes are not what they must be; a person has to look."""

    http = 500


class Unsupported(VolumeError):
    """The storage has no such feature."""

    http = 501


class Unavailable(VolumeError):
    """The storage did not answer, and nothing happened."""

    http = 503
    retry = True


class Unknown(VolumeError):
    """The storage did not answer, and it may have happened."""

    http = 503
    retry = True


class Cancelled(VolumeError):
    """A person asked for the work to stop."""

    http = 409


KINDS: dict[str, type[VolumeError]] = {
    kind.__name__: kind
    for kind in (
        Invalid, Denied, NotFound, Conflict, Busy, NoSpace, Corrupt,
        Unsupported, Unavailable, Unknown, Cancelled,
    )
}


def rebuild(kind: str, message: str) -> VolumeError:
    """Return the error that a row or an RPC reply names.

    A kind from a newer version becomes ``Unknown``: the careful reading.
    """
    return KINDS.get(kind, Unknown)(message)
