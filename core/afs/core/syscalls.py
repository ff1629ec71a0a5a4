"""Linux system calls that Python's os module lacks. One thin wrapper each; OSError names the object."""

import ctypes
import errno
import fcntl
import os
import struct
import sys

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)
_libc.syscall.restype = ctypes.c_long
_libc.prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong)
_libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

_NR_OPENAT2 = 437  # the same number on every architecture: it came after the tables were unified
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

_PR_SET_PDEATHSIG = 1
_SYNC_FILE_RANGE_WRITE = 2

_FS_IOC_GETFLAGS = 0x80086601  # linux/fs.h
_FS_VERITY_FL = 0x00100000
_FS_IOC_ENABLE_VERITY = 0x40806685  # linux/fsverity.h
# struct fsverity_enable_arg: version, hash algorithm, block size, salt size, salt, signature size, reserved, signature
_VERITY_ARGS = struct.Struct("=IIIIQIIQ88x")
_VERITY_SHA256 = 1
_VERITY_BLOCK = 4096  # before kernel 6.3 it has to be the page size

BLKFLSBUF = 0x1261  # linux/fs.h: drop what the page cache has of a block device


class _OpenHow(ctypes.Structure):
    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]  # type: ignore[mutable-override]


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
