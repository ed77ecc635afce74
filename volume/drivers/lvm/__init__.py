# SPDX-License-Identifier: Apache-2.0
"""Logical volumes of LVM, thick and thin.

``driver`` is the contract, and hands each call to the *store* of its pool: a
volume group, ``thick`` or ``thin``. What both do alike is in ``store``.
``groups`` is the only door to LVM's commands. What a volume is, its name and
its tags say (``names``): there is no state beside the volume group.
"""
