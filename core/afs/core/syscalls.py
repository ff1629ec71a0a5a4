"""Linux system calls that Python's os module lacks. One thin wrapper each; OSError names the object."""

import contextlib
import ctypes
import errno
import fcntl
import os
import socket
import struct
import sys
from collections.abc import Iterator
from typing import Self

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)
_libc.syscall.restype = ctypes.c_long
_libc.prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong)
_libc.unshare.argtypes = (ctypes.c_int,)
_libc.setfsuid.argtypes = _libc.setfsgid.argtypes = (ctypes.c_uint,)
_libc.setns.argtypes = (ctypes.c_int, ctypes.c_int)
_libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_libc.statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p)

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8
CLONE_FS = 0x200
CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000

# The same numbers on every architecture: these came after the tables were unified.
_NR_OPEN_TREE = 428
_NR_MOVE_MOUNT = 429
_NR_FSOPEN = 430
_NR_FSCONFIG = 431
_NR_FSMOUNT = 432
_NR_OPENAT2 = 437
_NR_MOUNT_SETATTR = 442

_FSOPEN_CLOEXEC = _FSMOUNT_CLOEXEC = 1
_FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING, _FSCONFIG_SET_FD, _FSCONFIG_CMD_CREATE = 0, 1, 5, 6
_MOVE_MOUNT_F_EMPTY_PATH, _MOVE_MOUNT_T_EMPTY_PATH = 0x4, 0x40
_OPEN_TREE_CLONE = 1
_AT_FDCWD = -100
MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
_MOUNT_ATTR_IDMAP = 0x100000

LOOP_CONTROL = "/dev/loop-control"
_LOOP_CONFIGURE = 0x4C0A
_LOOP_GET_STATUS64 = 0x4C05
_LOOP_CTL_GET_FREE = 0x4C82
_LO_FLAGS_READ_ONLY, _LO_FLAGS_AUTOCLEAR, _LO_FLAGS_DIRECT_IO = 1, 4, 16
_LOOP_INFO_SIZE, _LOOP_INFO_FLAGS = 232, 52  # struct loop_info64: its size, and where lo_flags is
_LOOP_CONFIG_RESERVED = 64
_LOOP_ATTEMPTS = 256

RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_SECUREBITS, _PR_GET_SECUREBITS = 28, 27
_SECBIT_NO_SETUID_FIXUP = 4
_SYNC_FILE_RANGE_WRITE = 2

_FS_IOC_GETFLAGS = 0x80086601  # linux/fs.h
_FS_VERITY_FL = 0x00100000
_FS_IOC_ENABLE_VERITY = 0x40806685  # linux/fsverity.h
# struct fsverity_enable_arg: version, hash algorithm, block size, salt size, salt, signature size, reserved, signature
_VERITY_ARGS = struct.Struct("=IIIIQIIQ88x")
_VERITY_SHA256 = 1
_VERITY_BLOCK = 4096  # before kernel 6.3 it has to be the page size

_STATX_MNT_ID, _STATX_DIOALIGN = 0x1000, 0x2000  # linux/stat.h
_STATX_SIZE = 256  # of struct statx, and where its fields are
_STATX_MNT_ID_AT, _STATX_DIO_OFFSET_ALIGN = 144, 156
_AT_STATX_DONT_SYNC = 0x4000
_AT_EMPTY_PATH = 0x1000

_SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8913, 0x8914  # netdevice(7)
_IFF_UP = 1
_IFREQ_FLAGS = struct.Struct("16sh22x")

BLKFLSBUF = 0x1261  # linux/fs.h: drop what the page cache has of a block device
_FITRIM = 0xC0185879  # linux/fs.h
_TRIM_RANGE = struct.Struct("=QQQ")  # struct fstrim_range: start, length, least length of an extent


class _OpenHow(ctypes.Structure):
    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]  # type: ignore[mutable-override]


class _MountAttr(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")]  # type: ignore[mutable-override]


def _check(result: int, path: str | bytes) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), os.fsdecode(path))
    return result


def mount(source: str, target: str, fstype: str, flags: int = 0, data: str = "") -> None:
    """mount(2). *data* is at most a page; the kernel truncates more, so that is refused here."""
    encoded = os.fsencode(data)
    if len(encoded) >= os.sysconf("SC_PAGESIZE"):
        raise OSError(7, f"mount options are {len(encoded)} bytes, more than a page", target)
    _check(_libc.mount(os.fsencode(source), os.fsencode(target), fstype.encode(), flags, encoded), target)


def umount(target: str, flags: int = 0) -> None:
    """umount2(2); never follows a symlink at *target*."""
    _check(_libc.umount2(os.fsencode(target), flags | UMOUNT_NOFOLLOW), target)


def openat2(dir_fd: int, path: bytes, flags: int, resolve: int, mode: int = 0) -> int:
    """openat2(2): open *path* below *dir_fd* under the RESOLVE_* rules and return the descriptor (close-on-exec)."""
    how = _OpenHow(flags | os.O_CLOEXEC, mode, resolve)
    fd = _libc.syscall(
        ctypes.c_long(_NR_OPENAT2),
        ctypes.c_int(dir_fd),
        ctypes.c_char_p(path),
        ctypes.byref(how),
        ctypes.c_size_t(ctypes.sizeof(how)),
    )
    return _check(fd, path)


def set_parent_death_signal(signum: int) -> None:
    """prctl(PR_SET_PDEATHSIG): get *signum* when the thread that started this process ends."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signum, 0, 0, 0), "prctl")


def set_child_subreaper(*, enabled: bool = True) -> None:
    """prctl(PR_SET_CHILD_SUBREAPER): descendants whose parent ended become children of this process."""
    _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, int(enabled), 0, 0, 0), "prctl")


def start_writeback(fd: int, offset: int, length: int) -> None:
    """sync_file_range(SYNC_FILE_RANGE_WRITE): have the kernel write dirty pages to disk now, without waiting for it.

    A hint before fsync(2), which alone makes data durable. OSError for what fsync would tell, too, such as EIO.
    """
    _check(_libc.sync_file_range(fd, offset, length, _SYNC_FILE_RANGE_WRITE), f"descriptor {fd}")


def enable_verity(fd: int) -> None:
    """FS_IOC_ENABLE_VERITY with sha256: from now on the kernel checks what it reads of this file, and nobody can write it.

    *fd* is open for reading, and nobody has the file open for writing (ETXTBSY). The kernel reads and hashes all of it first.
    EOPNOTSUPP or ENOTTY if kernel or file system cannot do it; EEXIST if it is done.
    """
    fcntl.ioctl(fd, _FS_IOC_ENABLE_VERITY, _VERITY_ARGS.pack(1, _VERITY_SHA256, _VERITY_BLOCK, 0, 0, 0, 0, 0))


def has_verity(fd: int) -> bool:
    """Whether :func:`enable_verity` was done to the file."""
    try:
        flags = fcntl.ioctl(fd, _FS_IOC_GETFLAGS, bytes(struct.calcsize("l")))
    except OSError as error:
        if error.errno in (errno.ENOTTY, errno.EOPNOTSUPP):  # a file system without flags
            return False
        raise
    return bool(int.from_bytes(flags[:4], sys.byteorder) & _FS_VERITY_FL)


def unshare(flags: int) -> None:
    """unshare(2) of the calling thread."""
    _check(_libc.unshare(flags), "unshare")


@contextlib.contextmanager
def creating_as(uid: int, gid: int) -> Iterator[None]:
    """Files that this thread makes within the block belong to *uid* and *gid*; it may still do whatever root may.

    In a tree whose owners are shifted root itself is nobody, and can make nothing (EOVERFLOW). By setfsuid(2), and with
    SECBIT_NO_SETUID_FIXUP (capabilities(7)), all of the calling thread alone: no await in the block.
    """
    bits = _check(_libc.prctl(_PR_GET_SECUREBITS, 0, 0, 0, 0), "prctl")
    _check(_libc.prctl(_PR_SET_SECUREBITS, bits | _SECBIT_NO_SETUID_FIXUP, 0, 0, 0), "prctl")
    try:
        old_uid, old_gid = _libc.setfsuid(uid), _libc.setfsgid(gid)
        try:
            yield
        finally:
            _libc.setfsuid(old_uid)
            _libc.setfsgid(old_gid)
    finally:
        _check(_libc.prctl(_PR_SET_SECUREBITS, bits, 0, 0, 0), "prctl")


def setns(fd: int, kind: int) -> None:
    """setns(2): the calling thread is in the namespace of descriptor *fd* from now on; *kind* is its CLONE_NEW*."""
    _check(_libc.setns(fd, kind), f"namespace of descriptor {fd}")


def set_interface_up(name: str) -> None:
    """Bring up a network interface of the calling thread's namespace (netdevice(7)). OSError names it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        try:
            request = fcntl.ioctl(control, _SIOCGIFFLAGS, _IFREQ_FLAGS.pack(name.encode(), 0))
            _, flags = _IFREQ_FLAGS.unpack(request)
            fcntl.ioctl(control, _SIOCSIFFLAGS, _IFREQ_FLAGS.pack(name.encode(), flags | _IFF_UP))
        except OSError as error:
            raise OSError(error.errno, error.strerror, name) from None


class MountContext:
    """A file system that is being set up, by fsopen(2) and its relatives (Linux 5.2). Used within a ``with`` block.

    Every error carries what the kernel wrote about it, which mount(2) leaves in its log.
    """

    def __init__(self, fstype: str) -> None:
        self._fstype = fstype
        self._fd = _check(
            _libc.syscall(ctypes.c_long(_NR_FSOPEN), ctypes.c_char_p(fstype.encode()), ctypes.c_uint(_FSOPEN_CLOEXEC)),
            fstype,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def set(self, key: str, value: str | None = None) -> None:
        """Set an option, or a flag if *value* is None. A value has at most 255 bytes."""
        command = _FSCONFIG_SET_FLAG if value is None else _FSCONFIG_SET_STRING
        self._configure(command, key, None if value is None else os.fsencode(value), 0)

    def set_fd(self, key: str, fd: int) -> None:
        """Set an option that takes a file, to the one that *fd* (perhaps of O_PATH) has open."""
        self._configure(_FSCONFIG_SET_FD, key, None, fd)

    def make(self, attributes: int) -> int:
        """Make the file system and mount it nowhere: a descriptor (close-on-exec) that paths can be relative to.

        *attributes* are MOUNT_ATTR_*. The mount goes with the descriptor; nobody else sees it.
        """
        self._configure(_FSCONFIG_CMD_CREATE, None, None, 0)
        call = ctypes.c_long(_NR_FSMOUNT), ctypes.c_int(self._fd), ctypes.c_uint(_FSMOUNT_CLOEXEC)
        return self._checked(_libc.syscall(*call, ctypes.c_uint(attributes)), self._fstype)

    def mount(self, target: str, attributes: int) -> None:
        """Make the file system and mount it at *target*; *attributes* are MOUNT_ATTR_*."""
        mounted = self.make(attributes)
        try:
            _move_mount(mounted, _AT_FDCWD, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH)
        finally:
            os.close(mounted)

    def _configure(self, command: int, key: str | None, value: bytes | None, aux: int) -> None:
        done = _libc.syscall(
            ctypes.c_long(_NR_FSCONFIG),
            ctypes.c_int(self._fd),
            ctypes.c_uint(command),
            ctypes.c_char_p(key.encode() if key is not None else None),
            ctypes.c_char_p(value),
            ctypes.c_int(aux),
        )
        self._checked(done, key or self._fstype)

    def _checked(self, result: int, what: str) -> int:
        try:
            return _check(result, what)
        except OSError as error:
            if said := self._messages():
                raise OSError(error.errno, f"{error.strerror} ({said})", what) from None
            raise

    def _messages(self) -> str:
        """What the kernel has to say, without the letter that tells errors from warnings."""
        lines = []
        with contextlib.suppress(OSError):  # ENODATA ends them
            while line := os.read(self._fd, 4096):
                lines.append(line.decode(errors="replace").strip()[2:])
        return "; ".join(lines)


def clone_mount(path: str) -> int:
    """A descriptor of a second mount of what is mounted at *path*, in no tree yet (open_tree(2), Linux 5.2).

    It keeps the file system, and ends with the descriptor unless :func:`place_mount` was called.
    """
    flags = ctypes.c_uint(_OPEN_TREE_CLONE | os.O_CLOEXEC)
    call = ctypes.c_long(_NR_OPEN_TREE), ctypes.c_int(_AT_FDCWD), ctypes.c_char_p(os.fsencode(path))
    return _check(_libc.syscall(*call, flags), path)


def place_mount(mounted: int, directory: int) -> None:
    """Mount what :func:`clone_mount` gave on the directory of another descriptor (move_mount(2))."""
    _move_mount(mounted, directory, b"", _MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_EMPTY_PATH)


def map_mount_ids(mounted: int, namespace: int) -> None:
    """Have what :func:`clone_mount` gave show owners as user namespace *namespace* maps them (mount_setattr(2), Linux 5.12).

    EINVAL if its file system cannot; only before it is placed.
    """
    attr = _MountAttr(attr_set=_MOUNT_ATTR_IDMAP, userns_fd=namespace)
    call = ctypes.c_long(_NR_MOUNT_SETATTR), ctypes.c_int(mounted), ctypes.c_char_p(b""), ctypes.c_uint(_AT_EMPTY_PATH)
    done = _libc.syscall(*call, ctypes.byref(attr), ctypes.c_size_t(ctypes.sizeof(attr)))
    _check(done, f"descriptor {mounted}")


def _move_mount(mounted: int, to: int, path: bytes, flags: int) -> None:
    source, target = (ctypes.c_int(mounted), ctypes.c_char_p(b"")), (ctypes.c_int(to), ctypes.c_char_p(path))
    done = _libc.syscall(ctypes.c_long(_NR_MOVE_MOUNT), *source, *target, ctypes.c_uint(flags))
    _check(done, path or f"descriptor {to}")


def attach_loop(file: int, block_size: int, *, writable: bool = False) -> tuple[int, str]:
    """A loop device over the file of descriptor *file*: a descriptor of it and its path (Linux 5.8).

    The device is set up in one step and goes with its last user (autoclear), so whoever is killed in between leaves
    none. It does direct I/O with the file if kernel and file system can, which :func:`loop_is_direct` tells. OSError
    names /dev/loop-control or the device.
    """
    info = bytearray(_LOOP_INFO_SIZE)
    flags = _LO_FLAGS_AUTOCLEAR | _LO_FLAGS_DIRECT_IO | (0 if writable else _LO_FLAGS_READ_ONLY)
    struct.pack_into("=I", info, _LOOP_INFO_FLAGS, flags)
    config = struct.pack("=II", file, block_size) + bytes(info) + bytes(_LOOP_CONFIG_RESERVED)
    control = os.open(LOOP_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        attempts = 0
        while True:
            path = f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
            device = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
            attempts += 1
            try:
                fcntl.ioctl(device, _LOOP_CONFIGURE, config)
            except OSError as error:
                os.close(device)
                # EBUSY: somebody else was quicker to take it.
                if error.errno != errno.EBUSY or attempts == _LOOP_ATTEMPTS:
                    raise OSError(error.errno, error.strerror, path) from error
            else:
                return device, path
    finally:
        os.close(control)


def loop_is_direct(device: int) -> bool:
    """Whether the loop device of descriptor *device* reads its file by direct I/O, not through the file's page cache."""
    info = fcntl.ioctl(device, _LOOP_GET_STATUS64, bytes(_LOOP_INFO_SIZE))
    (flags,) = struct.unpack_from("=I", info, _LOOP_INFO_FLAGS)
    return bool(flags & _LO_FLAGS_DIRECT_IO)


def trim(fd: int) -> None:
    """FITRIM: the file system of directory *fd* tells the device below it what it has no use for.

    A loop device gives that back to the file system that its file is on. EOPNOTSUPP if the device cannot.
    """
    fcntl.ioctl(fd, _FITRIM, _TRIM_RANGE.pack(0, (1 << 64) - 1, 0))


def direct_alignment(fd: int) -> int | None:
    """How many bytes offsets of direct I/O are multiples of in the file of descriptor *fd*: 0 if it has no direct I/O.

    None if the file system does not say (statx(2) with STATX_DIOALIGN, Linux 6.1).
    """
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    _check(_libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, buffer), f"descriptor {fd}")
    (mask,) = struct.unpack_from("=I", buffer)
    if not mask & _STATX_DIOALIGN:
        return None
    (alignment,) = struct.unpack_from("=I", buffer, _STATX_DIO_OFFSET_ALIGN)
    return int(alignment)


def mount_id(path: str) -> int:
    """The number of the mount that *path* leads to, by statx(2) (Linux 5.8); asks no server of a FUSE file system."""
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    _check(_libc.statx(_AT_FDCWD, os.fsencode(path), _AT_STATX_DONT_SYNC, _STATX_MNT_ID, buffer), path)
    (number,) = struct.unpack_from("=Q", buffer, _STATX_MNT_ID_AT)
    return int(number)
