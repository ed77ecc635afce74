# SPDX-License-Identifier: Apache-2.0
"""An iSCSI host in this process: libiscsi, which needs no kernel.

It shares no code with any target software, and gives what block layers hide:
VPD pages, FUA, reservations, sessions that are left open.
"""

import ctypes
import ctypes.util
import dataclasses
import fcntl
import os
import select
import socket
import struct

BLOCK_BYTES = 512
MIB = 1 << 20
NORMAL, DISCOVERY = 2, 1
CHAP = 1
POLL_OUT = 4
FIEMAP = 0xC020660B  # FS_IOC_FIEMAP
DELAYED = 0x4  # FIEMAP_EXTENT_DELALLOC
LIBRARY = ctypes.util.find_library('iscsi') or ''


class Refused(OSError):
    """The target did not let us in, or did not do it."""


class _Data(ctypes.Structure):
    _fields_ = (('size', ctypes.c_int), ('data', ctypes.c_void_p))


class _Task(ctypes.Structure):
    """struct scsi_task of scsi-lowlevel.h, as far as it is needed."""

    _fields_ = (
        ('status', ctypes.c_int), ('cdb_size', ctypes.c_int),
        ('xfer_dir', ctypes.c_int), ('expxferlen', ctypes.c_int),
        ('cdb', ctypes.c_ubyte * 16), ('residual_status', ctypes.c_int),
        ('residual', ctypes.c_size_t), ('sense', ctypes.c_int * 4),
        ('datain', _Data),
    )


class _Address(ctypes.Structure):
    """struct iscsi_discovery_address."""


_Address._fields_ = (
    ('next', ctypes.POINTER(_Address)), ('target_name', ctypes.c_char_p),
)

_CALLBACK = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p
)
_nothing = _CALLBACK(lambda *_: None)


def _library():
    library = ctypes.CDLL(LIBRARY)
    library.iscsi_create_context.restype = ctypes.c_void_p
    library.iscsi_get_error.restype = ctypes.c_char_p
    library.iscsi_discovery_sync.restype = ctypes.POINTER(_Address)
    for name in (
        'iscsi_read10_sync', 'iscsi_write10_sync', 'iscsi_inquiry_sync',
        'iscsi_synchronizecache10_sync', 'iscsi_persistent_reserve_out_sync',
        'iscsi_read10_task', 'iscsi_modesense6_sync',
    ):
        getattr(library, name).restype = ctypes.POINTER(_Task)
    return library


@dataclasses.dataclass
class Login:
    """Where to, and who says to be who."""

    portal: str
    target: str
    lun: int
    initiator: str
    username: str = ''
    password: str = ''
    mutual_username: str = ''
    mutual_password: str = ''

    @classmethod
    def of(cls, connection, initiator):
        """Return the login that a connection asks for."""
        fields, proof = connection.fields, connection.credentials
        return cls(
            fields['target_portal'], fields['target_iqn'],
            fields['target_lun'], initiator, proof.get('auth_username', ''),
            proof.get('auth_password', ''),
            proof.get('auth_mutual_username', ''),
            proof.get('auth_mutual_password', ''),
        )


class Session:
    """A session with a LUN of a target."""

    def __init__(self, login, timeout_s=20):
        self._lun = login.lun
        self._lib = _library()
        self._context = ctypes.c_void_p(
            self._lib.iscsi_create_context(login.initiator.encode())
        )
        self._prepare(login, timeout_s)
        self._lib.iscsi_set_targetname(self._context, login.target.encode())
        self._lib.iscsi_set_session_type(self._context, NORMAL)
        if self._lib.iscsi_full_connect_sync(
            self._context, login.portal.encode(), login.lun
        ):
            said = self._said()
            self._destroy()
            raise Refused(said)

    def read(self, offset_bytes, length_bytes):
        found = bytearray()
        while len(found) < length_bytes:
            size = min(MIB, length_bytes - len(found))
            found += self._done(self._lib.iscsi_read10_sync(
                self._context, self._lun,
                (offset_bytes + len(found)) // BLOCK_BYTES, size,
                BLOCK_BYTES, 0, 0, 0, 0, 0,
            ))
        return bytes(found)

    def write(self, offset_bytes, data, *, through=False):
        """Write; ``through`` means that it is stored when this returns."""
        self._done(self._lib.iscsi_write10_sync(
            self._context, self._lun, offset_bytes // BLOCK_BYTES, data,
            len(data), BLOCK_BYTES, 0, 0, int(through), 0, 0,
        ))

    def flush(self):
        self._done(self._lib.iscsi_synchronizecache10_sync(
            self._context, self._lun, 0, 0, 0, 0
        ))

    def inquire(self, page=None):
        """Return a VPD page, or the standard inquiry."""
        return self._done(self._lib.iscsi_inquiry_sync(
            self._context, self._lun, int(page is not None), page or 0, 255
        ))

    def sense_mode(self, page):
        """Return a mode page."""
        found = self._done(self._lib.iscsi_modesense6_sync(
            self._context, self._lun, 1, 0, page, 0, 255
        ))
        return found[4 + found[3]:]

    @property
    def serial(self):
        """The unit serial number."""
        page = self.inquire(0x80)
        return page[4:4 + page[3]].decode().strip(' \0')

    @property
    def wwns(self):
        """The long NAA names, in hexadecimal."""
        page, found = self.inquire(0x83), []
        at, end = 4, 4 + struct.unpack_from('>H', page, 2)[0]
        while at < end:
            kind, size = page[at + 1] & 0xf, page[at + 3]
            if kind == 3 and size == 16:
                found.append(page[at + 4:at + 4 + size].hex())
            at += 4 + size
        return found

    def stall(self, count=64):
        """Ask for more than the wire holds, and take none of it.

        Returns once the target has begun to send.
        """
        fd = self._lib.iscsi_get_fd(self._context)
        with socket.socket(fileno=os.dup(fd)) as wire:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for _ in range(count):
            self._lib.iscsi_read10_task(
                self._context, self._lun, 0, MIB, BLOCK_BYTES,
                0, 0, 0, 0, 0, _nothing, None,
            )
        while self._lib.iscsi_out_queue_length(self._context):
            if not select.select([], [fd], [], 0.5)[1]:
                break
            before = self._lib.iscsi_out_queue_length(self._context)
            self._lib.iscsi_service(self._context, POLL_OUT)
            if self._lib.iscsi_out_queue_length(self._context) == before:
                break  # it may not ask for more before it has read some
        select.select([fd], [], [])

    def close(self):
        if self._context:
            self._lib.iscsi_logout_sync(self._context)
            self._destroy()

    def drop(self):
        """Be gone, without a word."""
        if self._context:
            self._destroy()

    def _prepare(self, login, timeout_s):
        lib, context = self._lib, self._context
        lib.iscsi_set_noautoreconnect(context, 1)
        lib.iscsi_set_timeout(context, timeout_s)
        if login.username:
            lib.iscsi_set_initiator_username_pwd(
                context, login.username.encode(), login.password.encode()
            )
        if login.mutual_username:
            lib.iscsi_set_target_username_pwd(
                context, login.mutual_username.encode(),
                login.mutual_password.encode(),
            )

    def _done(self, task):
        if not task:
            raise Refused(self._said())
        try:
            if task.contents.status:
                raise Refused(
                    f'status {task.contents.status:#x}: {self._said()}'
                )
            data = task.contents.datain
            return ctypes.string_at(data.data, data.size) if data.data else b''
        finally:
            self._lib.scsi_free_scsi_task(task)

    def _said(self):
        said = self._lib.iscsi_get_error(self._context) or b''
        return said.decode(errors='replace')

    def _destroy(self):
        self._lib.iscsi_destroy_context(self._context)
        self._context = ctypes.c_void_p()


def discover(portal, initiator):
    """Return the names of targets that a portal shows an initiator."""
    lib = _library()
    context = ctypes.c_void_p(lib.iscsi_create_context(initiator.encode()))
    try:
        lib.iscsi_set_session_type(context, DISCOVERY)
        if lib.iscsi_connect_sync(context, portal.encode()) or (
            lib.iscsi_login_sync(context)
        ):
            raise Refused(lib.iscsi_get_error(context).decode())
        found, names = lib.iscsi_discovery_sync(context), []
        each = found
        while each:
            names.append(each.contents.target_name.decode())
            each = each.contents.next
        if found:
            lib.iscsi_free_discovery_data(context, found)
        return names
    finally:
        lib.iscsi_destroy_context(context)


def is_delayed(path):
    """Say whether bytes of a file have no place on the disk yet.

    The file system's own word: an extent whose allocation waits for the
    data to be written.
    """
    room = bytearray(struct.pack('=QQIIII', 0, 1 << 62, 0, 0, 256, 0))
    room += bytes(256 * 56)
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, FIEMAP, room)
    finally:
        os.close(fd)
    count = struct.unpack_from('=I', room, 20)[0]
    return any(
        struct.unpack_from('=I', room, 32 + index * 56 + 40)[0] & DELAYED
        for index in range(count)
    )
