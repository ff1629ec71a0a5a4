"""One scratch file system: an ext4 in a sparse file, mounted through a loop device, for what one root writes.

Making one takes 0.5 ms, because mkfs runs once per size: what it writes are some ten blocks in an empty file, which are
kept as a :class:`Template` and written into each new file. Emptied, it is used again. Blocking functions; which file
system is whose is the pool's business.

There is no journal, nor barriers: nothing in it has to survive a crash. Nor lazy initialisation of inode tables, which
would write zeros into the file: what is not there reads as zeros.
"""

import contextlib
import errno
import logging
import os
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from afs.core import syscalls
from afs.core.errors import AfsError, FailedPrecondition, InvalidArgument, ResourceExhausted
from afs.core.files import remove_tree
from afs.core.mounts import unmount, unmount_below
from afs.core.run import run

log = logging.getLogger(__name__)
_BLOCK = 4096
_MIB = 1 << 20
LEAST_BYTES = 4 * _MIB
MOST_BYTES = 1 << 43  # 8 TiB: ext4 without 64-bit block numbers, and ext4 below it, end at 16
KEPT_BYTES = 4 * _MIB  # of the disk, by one that nobody uses, more than a new one: not worth a trim
_PROGRAM = "mkfs.ext4"
_FEATURES = (
    "none,ext_attr,dir_index,filetype,extent,flex_bg,sparse_super,large_file,huge_file,uninit_bg,dir_nlink,extra_isize"
)
# One inode per block, so that bytes end first unless files are empty. The tables take 6% of a file, where inodes are used.
_FORMAT = ("-q", "-F", "-b", str(_BLOCK), "-I", "256", "-i", str(_BLOCK), "-m", "0", "-O", _FEATURES)
_EXTENDED = ("-E", "nodiscard,lazy_itable_init=1")
# noauto_da_alloc: a file that is replaced by renaming need not be on the disk first.
_OPTIONS = "noinit_itable,barrier=0,noauto_da_alloc,errors=remount-ro"
_FLAGS = syscalls.MS_NODEV | syscalls.MS_NOSUID
_SUPERBLOCK, _COUNTS = (
    1024,
    struct.Struct("<5I"),
)  # s_inodes_count, s_blocks_count, s_r_..., s_free_blocks_..., s_free_inodes_...
_SLACK = 64  # blocks: overlayfs's own directories, and what maps the blocks of files
_TEMPLATES = 8


@dataclass(frozen=True, slots=True)
class Template:
    """A formatted file system: *pieces* are the blocks that are not zero, by offset; *blocks* of 4096 bytes in all."""

    blocks: int
    usable: int  # bytes
    pieces: tuple[tuple[int, bytes], ...]

    @property
    def reserved(self) -> int:
        """Blocks that the kernel keeps for itself, for maps of blocks that it has promised already (ext4's default)."""
        return min(self.blocks // 50, 4096)


def rounded(size: int, directory: Path) -> int:
    """The usable bytes of the file system for a limit of *size* bytes, below *directory*: whole MiB, at least 4.

    And no more than the disk has: more cannot be written anyway. InvalidArgument for a negative size.
    """
    if size < 0:
        raise InvalidArgument(f"a limit of {size} bytes makes no sense")
    status = os.statvfs(directory)
    disk = status.f_blocks * status.f_frsize
    return max(-(-min(size, disk, MOST_BYTES) // _MIB) * _MIB, LEAST_BYTES)


class Templates:
    """Makes templates and keeps some. For threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[int, Template] = {}  # by size, least recently used first

    def get(self, size: int) -> Template:
        """The one with *size* usable bytes, and a little more. CommandFailed or OSError if it cannot be made."""
        with self._lock:
            found = self._kept.pop(size, None) or _template(size)
            self._kept[size] = found
            if len(self._kept) > _TEMPLATES:
                del self._kept[next(iter(self._kept))]
            return found


def _template(size: int) -> Template:
    wanted = size // _BLOCK + _SLACK
    blocks = wanted
    # The rest follows from how large the tables of the last try were; the margin is less than 1%.
    while (found := _format(blocks)).usable < wanted * _BLOCK:
        missing = wanted - found.usable // _BLOCK
        blocks += missing + missing // 14 + 8
    return found


def _format(blocks: int) -> Template:
    # In memory: mkfs would wait for the disk at its end.
    fd = os.memfd_create("afs-template")
    try:
        os.ftruncate(fd, blocks * _BLOCK)
        run([_PROGRAM, *_FORMAT, *_EXTENDED, f"/proc/{os.getpid()}/fd/{fd}", str(blocks)])
        _, count, _, free, _ = _COUNTS.unpack(os.pread(fd, _COUNTS.size, _SUPERBLOCK))
        unsized = Template(count, 0, tuple(_written(fd)))
        return Template(count, max(free - unsized.reserved, 0) * _BLOCK, unsized.pieces)
    finally:
        os.close(fd)


def _written(fd: int) -> Iterator[tuple[int, bytes]]:
    """The blocks of a sparse file that are not all zeros."""
    end = 0
    while True:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # only a hole is left
                raise
            return
        end = os.lseek(fd, start, os.SEEK_HOLE)
        for offset in range(start, end, _BLOCK):
            block = os.pread(fd, _BLOCK, offset)
            if any(block):
                yield offset, block


@dataclass(slots=True, eq=False)
class Scratch:
    """The file system for *size* bytes that is mounted at *path*, or is to be: *made*. *squeezed*: nobody may write to it.

    *was_squeezed*: so it was at a time since a root got it, so programs may have failed for the machine's want of space.
    """

    size: int
    path: Path
    made: bool = False
    file: int = -1  # descriptor of its file
    device: str = ""  # such as loop3
    mount_id: int = 0
    inodes: int = 0  # that are free when it is empty
    blocks: int = 0
    reserved: int = 0
    least: int = 0  # bytes of the disk that it took when it was new
    squeezed: bool = False
    was_squeezed: bool = False

    @property
    def image(self) -> Path:
        """The file."""
        return self.path.with_suffix(".img")

    def make(self, templates: Templates) -> None:
        """Make and mount it. ResourceExhausted without space, else FailedPrecondition; nothing is left then."""
        try:
            self._make(templates.get(self.size))
        except (OSError, AfsError) as error:
            why = f"cannot make a file system of {self.size} bytes at {self.path}: "
            if isinstance(error, AfsError):
                raise FailedPrecondition(why + error.line) from error
            why += f"{error.filename or self.image}: {error.strerror}"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ResourceExhausted(why) from error
            raise FailedPrecondition(why) from error

    def _make(self, template: Template) -> None:
        with contextlib.ExitStack() as undo:
            self.file = os.open(self.image, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            undo.callback(self.image.unlink)
            undo.callback(os.close, self.file)
            os.ftruncate(self.file, template.blocks * _BLOCK)
            for offset, block in template.pieces:
                if os.pwrite(self.file, block, offset) != len(block):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.image))
            device, name = syscalls.attach_loop(self.file, _BLOCK, writable=True)
            try:
                self.path.mkdir(mode=0o700)
                undo.callback(self.path.rmdir)
                syscalls.mount(name, str(self.path), "ext4", _FLAGS, _OPTIONS)  # now the mount keeps the device
            finally:
                os.close(device)
            undo.callback(unmount, str(self.path))
            self.device, self.mount_id = Path(name).name, syscalls.mount_id(str(self.path))
            self.inodes = os.statvfs(self.path).f_ffree
            self.blocks, self.reserved, self.least = template.blocks, template.reserved, self.used()
            self.made = True
            undo.pop_all()

    def is_mounted(self) -> bool:
        """Whether :attr:`path` leads to it: somebody may have unmounted or covered it."""
        try:
            return syscalls.mount_id(str(self.path)) == self.mount_id
        except OSError:
            return False

    def empty(self) -> str:
        """Delete all that is in it; why it cannot be used again, "" if it can."""
        if not self.is_mounted():
            return "it was unmounted, or covered"
        try:
            for name in os.listdir(self.path):
                if name != "lost+found":
                    remove_tree(self.path / name)
            if (errors := self._sysfs("errors_count").read_text(encoding="ascii").strip()) != "0":
                return f"the kernel counts {errors} errors in it"
        except (OSError, AfsError) as error:
            return f"it cannot be emptied: {error}"
        return ""

    def is_empty(self) -> bool:
        """Whether nobody holds what :meth:`empty` deleted: a process in a root, or the root itself in another namespace."""
        return os.statvfs(self.path).f_ffree == self.inodes

    def used(self) -> int:
        """Bytes of the disk that its file takes."""
        return os.fstat(self.file).st_blocks * 512

    def is_small(self) -> bool:
        """Whether it takes little more of the disk than a new one."""
        return self.used() <= self.least + KEPT_BYTES

    def trim(self) -> bool:
        """Give back to the disk what is not used; whether it is small then."""
        if self.is_small():
            return True
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            syscalls.trim(fd)
        except OSError as error:
            log.info("%s cannot be trimmed: %s", self.path, error.strerror)
        finally:
            os.close(fd)
        return self.is_small()

    def pending(self) -> int:
        """Bytes that were written to it and have no place on the disk yet."""
        return int(self._sysfs("delayed_allocation_blocks").read_text(encoding="ascii")) * _BLOCK

    def squeeze(self, *, on: bool) -> None:
        """Have all writes that need space fail with ENOSPC, or no longer. OSError without a writable sysfs.

        What the kernel promised already keeps its space: it is taken from what is reserved.
        """
        self._sysfs("reserved_clusters").write_text(str(self.blocks - 1 if on else self.reserved), encoding="ascii")
        self.squeezed = on
        self.was_squeezed = self.was_squeezed or on

    def _sysfs(self, name: str) -> Path:
        return Path("/sys/fs/ext4", self.device, name)

    def drop(self) -> None:
        """Unmount it and delete its file, which takes space until its last user has gone."""
        if not self.made:
            return
        self.made = False
        os.close(self.file)
        remove_scratch(self.path)


def lost_writes(root: Path) -> str:
    """Why something that was written to the *root* since it was mounted could not be written back, "" if all could.

    Overlayfs's option volatile makes that cheap (20 us): its fsync(2) writes nothing, and fails if a write-back to the
    upper file system did.
    """
    try:
        fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        return os.strerror(error.errno or 0)
    return ""


def remove_scratch(path: Path) -> None:
    """Unmount the file system at *path*, whoever uses it, and delete its file."""
    unmount_below(path)
    with contextlib.suppress(FileNotFoundError):
        path.rmdir()
    path.with_suffix(".img").unlink(missing_ok=True)


def clear_scratch(directory: Path) -> None:
    """Make *directory*, and remove all file systems below it that a crash left. At start."""
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o700)
    if count := unmount_below(directory):
        log.info("unmounted %d file systems below %s, which a crash left", count, directory)
    for path in list(directory.iterdir()):
        try:
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink()
        except OSError as error:  # somebody's
            log.error("leaving %s alone: %s", path, error.strerror)


def probe_scratch(directory: Path) -> str:
    """Why no scratch file systems can be made below *directory*, "" if they can: by making a small one."""
    trial = Scratch(LEAST_BYTES, directory / "probe")
    try:
        trial.make(Templates())
    except AfsError as error:
        return _reason(error)
    try:
        (trial.path / "upper").mkdir()
        (trial.path / "upper" / "file").write_bytes(b"afs")
        return trial.empty() or ("" if trial.is_empty() else "what is deleted in it stays")
    except OSError as error:
        return f"mounted, but cannot be used: {error.strerror}"
    finally:
        trial.drop()


def _reason(error: AfsError) -> str:
    cause = error.__cause__
    if not isinstance(cause, OSError):
        return error.line
    if cause.filename == _PROGRAM:
        return f"no {_PROGRAM}: the package e2fsprogs is missing"
    if cause.filename == syscalls.LOOP_CONTROL:
        return f"no {syscalls.LOOP_CONTROL}: the module loop is missing or blocked, or may not be used here"
    if cause.errno == errno.ENODEV:
        return "no ext4 in this kernel: the module is missing or blocked"
    if cause.errno in (errno.EPERM, errno.EACCES):
        return f"{cause.filename}: mounting file systems is not permitted here, as in a user namespace"
    return error.line
