# SPDX-License-Identifier: Apache-2.0
"""What hosts know a volume by; all of it comes from the volume's id.

So a volume is one disk to a host through whichever of its exports, on
whichever node, and after whatever restart; and two volumes are never one.
"""

from __future__ import annotations

from volume import ids

# NAA 6, the company id that LIO uses, and 25 digits of our own.
NAA_PREFIX = '6001405'
NVME_SERIAL_CHARS = 20


def scsi_serial(volume_id: str) -> str:
    """Return the unit serial number (INQUIRY, page 0x80)."""
    return ids.check(volume_id, 'volume')


def scsi_naa(volume_id: str) -> str:
    """Return the WWN (INQUIRY, page 0x83), 32 hexadecimal digits.

    It is what LIO makes of the unit serial number, so that an exporter that
    has to be told the WWN shows hosts the same one.
    """
    return NAA_PREFIX + _digits(volume_id)[:32 - len(NAA_PREFIX)]


def nvme_uuid(volume_id: str) -> str:
    """Return the UUID of the namespace."""
    return ids.check(volume_id, 'volume')


def nvme_nguid(volume_id: str) -> str:
    """Return the NGUID of the namespace, 32 hexadecimal digits."""
    return _digits(volume_id)


def nvme_serial(volume_id: str) -> str:
    """Return the serial number of a subsystem that holds the volume."""
    return _digits(volume_id)[:NVME_SERIAL_CHARS]


def _digits(volume_id: str) -> str:
    return ids.check(volume_id, 'volume').replace('-', '')
