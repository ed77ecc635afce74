# SPDX-License-Identifier: Apache-2.0
"""Volumes on every storage repository (SR) of a XenServer or XCP-ng pool.

``driver`` is the contract; each SR is a ``storage.Storage``. Below them:
``link`` (sessions), ``tasks`` (long calls), ``failures`` and ``calls`` (what
the server says and is asked), ``srs`` and ``vdis`` (its objects), ``kinds``
(the types of SR).
"""
