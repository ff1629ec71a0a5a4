"""Reading the EROFS index of an ``.afslyr`` file: superblock, inodes, directories. docs/afslyr.md draws them.

The bytes may come from anybody. Nothing here recurses, every offset is checked before it is used, and only what format
version 1 writes is accepted: the rest of EROFS (compression, chunks, shared xattrs, ...) is refused. An answer costs time in
proportion to what is asked for, :meth:`IndexReader.walk` in proportion to the metadata. Errors are CorruptLayer.

A reader has no state but the bytes, so threads may share one.
"""

import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from mmap import mmap
from typing import NoReturn

from afs.layerstore.afslyr import xattrs
from afs.layerstore.afslyr.erofs import SUPERBLOCK_OFFSET, pack_superblock
from afs.layerstore.afslyr.errors import CorruptLayer, LayerLimit, printable
from afs.layerstore.afslyr.layout import BLOCK_BITS, BLOCK_SIZE, Layout, align_up
from afs.layerstore.afslyr.limits import DEFAULT_LIMITS, Limits
from afs.layerstore.afslyr.reader import pread_exact
from afs.layerstore.afslyr.tree import MAX_NAME, MAX_TARGET

SUPERBLOCK_SIZE = 128
ROOT = 0  # nid of the root directory
SLOT = 32  # bytes that a nid counts from the start of the metadata

_INODE = struct.Struct("<HHHHQIIIIqIIQQ")
_DIRENT = struct.Struct("<QHBB")
_INOS = struct.Struct("<Q")
_INOS_AT = 16  # in the superblock
_PLAIN, _INLINE = 1, 5  # i_format of extended inodes
_NO_ADDRESS = 0xFFFFFFFF
_NANO = 1_000_000_000
_XATTR_HEADER = 12

# Directory entry types and the modes that they stand for. Sockets (6) are in no tar.
_MODES = {
    1: stat.S_IFREG,
    2: stat.S_IFDIR,
    3: stat.S_IFCHR,
    4: stat.S_IFBLK,
    5: stat.S_IFIFO,
    7: stat.S_IFLNK,
}
_KINDS = frozenset(_MODES.values())
_DOTS = frozenset({b".", b".."})

Metadata = bytes | bytearray | memoryview | mmap


@dataclass(frozen=True, slots=True)
class Inode:
    """One inode. ``mode`` has the type, ``rdev`` is a device number as os.makedev makes it, 0 for all but devices.

    ``offset`` is where in the whole file its ``size`` bytes stand, in one run: a regular file's content, a symlink's
    target, a directory's blocks; 0 for what has none. ``length`` is what the inode takes of the metadata, xattrs and inline
    target included, ``blocks`` what a directory or long target takes of them elsewhere, both in bytes.
    """

    nid: int
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    nlink: int
    rdev: int
    offset: int
    xattrs: dict[bytes, bytes]
    length: int
    blocks: int

    @property
    def is_directory(self) -> bool:
        """Whether it is one."""
        return stat.S_ISDIR(self.mode)


@dataclass(frozen=True, slots=True)
class Dirent:
    """A name in a directory; ``kind`` is the type as in Inode.mode (S_IFREG, ...)."""

    name: bytes
    nid: int
    kind: int


class Place:
    """Where a name stands. A chain instead of a path: a hostile tree may be a million directories deep."""

    __slots__ = ("name", "parent")

    def __init__(self, parent: "Place | None", name: bytes) -> None:
        self.parent, self.name = parent, name

    @property
    def path(self) -> bytes:
        """The path from the root, without a slash in front; empty for the root."""
        names: list[bytes] = []
        place: Place | None = self
        while place is not None and place.parent is not None:
            names.append(place.name)
            place = place.parent
        return b"/".join(reversed(names))


@dataclass(frozen=True, slots=True)
class Found:
    """A name that :meth:`IndexReader.walk` came to; ``first`` is false for further names of one inode."""

    place: Place
    inode: Inode
    first: bool


class IndexReader:
    """Files and directories by nid: the root is :data:`ROOT`, others are found by :meth:`readdir` and :meth:`lookup`.

    *superblock* is the 128 bytes at 1024 of the file, *metadata* the bytes from ``layout.meta_offset`` to
    ``layout.erofs_end``, in memory or mapped. Its answers never lead outside of the file.
    """

    def __init__(self, layout: Layout, superblock: bytes, metadata: Metadata) -> None:
        self.layout = layout
        self._data = metadata
        if len(metadata) != layout.erofs_end - layout.meta_offset:
            self._bad(f"{len(metadata)} bytes of metadata, the header says {layout.erofs_end - layout.meta_offset}")
        if len(superblock) != SUPERBLOCK_SIZE:
            self._bad(f"superblock has {len(superblock)} bytes, {SUPERBLOCK_SIZE} needed")
        (self.inodes,) = _INOS.unpack_from(superblock, _INOS_AT)
        if superblock != pack_superblock(layout, self.inodes):
            self._bad("the superblock is not the one that belongs to the header")
        self._directory(ROOT)

    # One inode

    def inode(self, nid: int) -> Inode:
        """The inode *nid*."""
        at = nid * SLOT
        if nid < 0 or at + _INODE.size > len(self._data):
            self._bad(f"inode {nid} is outside of the metadata")
        (form, count, mode, zero, size, address, _, uid, gid, seconds, nanoseconds, nlink, zero1, zero2) = (
            _INODE.unpack_from(self._data, at)
        )
        kind = stat.S_IFMT(mode)
        if kind not in _KINDS or form not in (_PLAIN, _INLINE) or (form == _INLINE and kind != stat.S_IFLNK):
            self._bad(f"inode {nid} has mode {mode:#o} and format {form}")
        if zero or zero1 or zero2:
            self._bad(f"inode {nid} has reserved bytes that are not zero")
        if nanoseconds >= _NANO or not nlink:
            self._bad(f"inode {nid} has {nanoseconds} nanoseconds and {nlink} links")
        end = at + _INODE.size
        attributes: dict[bytes, bytes] = {}
        if count:
            length = _XATTR_HEADER + 4 * (count - 1)
            try:
                attributes = xattrs.decode(self._bytes(end, length))
            except ValueError as error:
                self._bad(f"inode {nid}: {error}")
            end += length
        rdev = offset = blocks = 0
        if form == _INLINE:
            offset = self._inline_offset(nid, end, size, address)
            end += size
        elif kind in (stat.S_IFCHR, stat.S_IFBLK):
            rdev = os.makedev((address >> 8) & 0xFFF, (address & 0xFF) | (address >> 12 & 0xFFF00))
        elif kind != stat.S_IFIFO and (size or kind != stat.S_IFREG):
            offset = self._data_offset(nid, kind, address << BLOCK_BITS, size)
            blocks = align_up(size, BLOCK_SIZE) if kind != stat.S_IFREG else 0
        if size and not offset:
            self._bad(f"inode {nid} of mode {mode:#o} has {size} bytes of data")
        mtime_ns = seconds * _NANO + nanoseconds
        return Inode(nid, mode, uid, gid, size, mtime_ns, nlink, rdev, offset, attributes, end - at, blocks)

    def _inline_offset(self, nid: int, at: int, size: int, address: int) -> int:
        """Where in the file a symlink target behind its inode stands."""
        if not 0 < size < BLOCK_SIZE or at % BLOCK_SIZE + size > BLOCK_SIZE or address != _NO_ADDRESS:
            self._bad(f"inode {nid} has an inline target of {size} bytes")  # the kernel refuses it across blocks
        if at + size > len(self._data):
            self._bad(f"inode {nid} is outside of the metadata")
        return self.layout.meta_offset + at

    def _data_offset(self, nid: int, kind: int, offset: int, size: int) -> int:
        """*offset* in the file, if *size* bytes from there on may belong to an inode of that kind."""
        layout, end = self.layout, offset + size
        if kind == stat.S_IFREG:
            in_tar = layout.tar_offset <= offset and end <= layout.tar_offset + layout.tar_length
            in_extras = layout.extras_offset <= offset and end <= layout.extras_offset + layout.extras_length
            if not (in_tar or in_extras):
                self._bad(f"inode {nid} has {size} bytes at {offset}, which is neither tar nor extras")
        elif not size or not (layout.meta_offset <= offset and end <= layout.erofs_end):
            self._bad(f"inode {nid} has {size} bytes at {offset}, which is outside of the metadata")
        elif kind == stat.S_IFLNK and size > MAX_TARGET:
            self._bad(f"inode {nid} has a target of {size} bytes, at most {MAX_TARGET} possible")
        return offset

    def readlink(self, nid: int) -> bytes:
        """The target of the symlink *nid*."""
        inode = self.inode(nid)
        if not stat.S_ISLNK(inode.mode):
            self._bad(f"inode {nid} is no symlink")
        target = self._bytes(inode.offset - self.layout.meta_offset, inode.size)
        if b"\0" in target:
            self._bad(f"inode {nid} has a NUL in its target")
        return target

    # Directories

    def readdir(self, nid: int) -> Iterator[Dirent]:
        """The entries of the directory *nid* but ``.`` and ``..``, in the byte order of their names."""
        return (entry for entry in self._entries(self._directory(nid)) if entry.name not in _DOTS)

    def lookup(self, nid: int, name: bytes) -> Dirent | None:
        """The entry *name* of the directory *nid*, ``.`` and ``..`` among them, by binary search."""
        return self.find(self._directory(nid), name)

    def find(self, directory: Inode, name: bytes) -> Dirent | None:
        """As :meth:`lookup`, of a directory whose inode is known."""
        low, high = 0, _blocks(directory.size)  # the name is not in a block before low, nor in high or behind
        while high - low > 1:
            middle = (low + high) // 2
            if self._first_name(directory, middle) <= name:
                low = middle
            else:
                high = middle
        return next((entry for entry in self._block(directory, low) if entry.name == name), None)

    def block(self, directory: Inode, number: int) -> list[Dirent]:
        """The entries of block *number* of a directory, ``.`` and ``..`` among them; none behind the last block."""
        return self._block(directory, number) if number < _blocks(directory.size) else []

    def _directory(self, nid: int) -> Inode:
        inode = self.inode(nid)
        if not inode.is_directory:
            self._bad(f"inode {nid} is no directory")
        return inode

    def _entries(self, directory: Inode) -> Iterator[Dirent]:
        """All entries; complains at the end if ``.`` or ``..`` was missing."""
        last, dots = b"", 0
        for number in range(_blocks(directory.size)):
            for entry in self._block(directory, number):
                if entry.name <= last:
                    self._bad(f'directory {directory.nid}: "{printable(entry.name)}" is not in order')
                last = entry.name
                if last in _DOTS:
                    dots += 1
                    if entry.kind != stat.S_IFDIR or (last == b"." and entry.nid != directory.nid):
                        self._bad(f'directory {directory.nid}: "{last.decode()}" leads elsewhere')
                yield entry
        if dots != len(_DOTS):
            self._bad(f'directory {directory.nid} lacks "." or ".."')

    def _first_name(self, directory: Inode, number: int) -> bytes:
        """The first name in block *number*; the rest of the block is not looked at."""
        start = directory.offset - self.layout.meta_offset + number * BLOCK_SIZE
        length = min(BLOCK_SIZE, directory.size - number * BLOCK_SIZE)
        data = self._bytes(start, length)
        begin = int.from_bytes(data[8:10], "little")
        if not _DIRENT.size <= begin < length:
            self._bad(f"directory {directory.nid}: block {number} has its names at {begin} of {length}")
        # It ends where the second one begins, or at the zeros behind the only one.
        end = int.from_bytes(data[20:22], "little") if begin > _DIRENT.size else length
        return data[begin:end].rstrip(b"\0")

    def _block(self, directory: Inode, number: int) -> list[Dirent]:
        """The entries of block *number*, at least one."""
        start = directory.offset - self.layout.meta_offset + number * BLOCK_SIZE
        length = min(BLOCK_SIZE, directory.size - number * BLOCK_SIZE)
        data = self._bytes(start, length)
        names_at = int.from_bytes(data[8:10], "little")
        if names_at % _DIRENT.size or not _DIRENT.size <= names_at < length:
            self._bad(f"directory {directory.nid}: block {number} has its names at {names_at} of {length}")
        fixed = list(_DIRENT.iter_unpack(data[:names_at]))
        ends = [at for _, at, _, _ in fixed[1:]]
        # Zeros fill a block behind its last name.
        ends.append(length if number + 1 == _blocks(directory.size) else len(data.rstrip(b"\0")))
        entries = []
        at = names_at
        for (nid, begin, kind, zero), end in zip(fixed, ends, strict=True):
            name = data[at:end]
            if begin != at or not 0 < len(name) <= MAX_NAME or end > length or b"\0" in name or b"/" in name:
                self._bad(f"directory {directory.nid}: block {number} has a bad name at {begin}")
            if kind not in _MODES or zero:
                self._bad(f'directory {directory.nid}: "{printable(name)}" is of type {kind}')
            entries.append(Dirent(name, nid, _MODES[kind]))
            at = end
        return entries

    # All of it

    def walk(self) -> Iterator[Found]:
        """Every name, the root first, each directory before what is in it; checks what no single answer can.

        That is: each directory has one name, so there are no cycles; the link counts are right; inodes and directories do
        not share bytes, so that the walk ends after reading the metadata once; there are as many inodes as the superblock says.
        """
        seen = bytearray(len(self._data) // SLOT + 1)
        links: dict[int, tuple[Inode, int]] = {}  # of inodes with several names: how many are still to come
        root = self._directory(ROOT)
        seen[ROOT] = 1
        room = self._charge(len(self._data), root)
        count = 1
        top = Place(None, b"")
        yield Found(top, root, first=True)
        todo = [(root, ROOT, top)]
        while todo:
            directory, parent, here = todo.pop()
            subdirectories = 0
            for entry in self._entries(directory):
                if entry.name in _DOTS:
                    if entry.name == b".." and entry.nid != parent:
                        self._bad(f'directory {directory.nid}: ".." leads elsewhere')
                    continue
                place = Place(here, entry.name)
                if entry.nid in links:
                    inode, left = links.pop(entry.nid)
                    first = False
                    if left > 1:
                        links[entry.nid] = inode, left - 1
                else:
                    inode, first = self.inode(entry.nid), True
                    if seen[entry.nid]:
                        self._bad(f"inode {entry.nid} has more names than links", place)
                    seen[entry.nid] = 1
                    count += 1
                    room = self._charge(room, inode)
                    if inode.is_directory:
                        subdirectories += 1
                        todo.append((inode, directory.nid, place))
                    elif inode.nlink > 1:
                        links[entry.nid] = inode, inode.nlink - 1
                if stat.S_IFMT(inode.mode) != entry.kind:
                    self._bad(f"inode {entry.nid} is not of the type that its name says", place)
                yield Found(place, inode, first)
            if directory.nlink != 2 + subdirectories:
                self._bad(f"directory has {directory.nlink} links and {subdirectories} subdirectories", here)
        if links:
            self._bad(f"inode {next(iter(links))} has fewer names than links")
        if count != self.inodes:
            self._bad(f"{count} inodes, the superblock says {self.inodes}")

    def _charge(self, room: int, inode: Inode) -> int:
        """*room* bytes of metadata less what *inode* takes of them."""
        room -= inode.length + inode.blocks
        if room < 0:
            self._bad("inodes and directories share bytes")
        return room

    def _bytes(self, at: int, count: int) -> bytes:
        if at < 0 or at + count > len(self._data):
            self._bad(f"{count} bytes at {at} of {len(self._data)} bytes of metadata wanted")
        return bytes(self._data[at : at + count])

    def _bad(self, reason: str, place: Place | None = None) -> NoReturn:
        raise CorruptLayer(reason, layer=self.layout.diff_id, entry=place.path if place is not None else None)


def _blocks(size: int) -> int:
    return -(-size // BLOCK_SIZE)


def read_index(fd: int, layout: Layout, limits: Limits = DEFAULT_LIMITS) -> IndexReader:
    """A reader of the metadata of the open file *fd*, taken into memory; LayerLimit if there are too many for that."""
    length = layout.erofs_end - layout.meta_offset
    if length > align_up(limits.max_metadata_bytes):  # the file has them padded
        raise LayerLimit("metadata", limits.max_metadata_bytes, "bytes")
    superblock = pread_exact(fd, SUPERBLOCK_SIZE, SUPERBLOCK_OFFSET)
    return IndexReader(layout, superblock, pread_exact(fd, length, layout.meta_offset))
