"""EROFS metadata for a tree: superblock, inodes, directory blocks (kernel fs/erofs/erofs_fs.h).

Kernel facts that shape this: the root's nid has 16 bits, so the root comes first; inline data must not cross a block, so
a symlink target that would gets a block of its own, while inodes and their xattrs may cross; names in a directory are
sorted as bytes, ``.`` and ``..`` among them; block addresses have 32 bits.
"""

import bisect
import stat
import struct
from array import array
from collections import deque

from afs.layerstore.afslyr import xattrs
from afs.layerstore.afslyr.errors import LayerLimit
from afs.layerstore.afslyr.inodes import ROOT, Inodes
from afs.layerstore.afslyr.layout import BLOCK_BITS, BLOCK_SIZE, MAX_EROFS_END, Layout, align_up

SUPERBLOCK_OFFSET = 1024  # bytes
VOLUME_NAME = b"afslyr"

_MAGIC = 0xE0F5E1E2
_COMPAT_MTIME = 0x2  # inode times are mtimes
_SUPERBLOCK = struct.Struct("<IIIBBHQQIIII16s16sIHHHBBIQB23x")
_INODE = struct.Struct("<HHHHQIIIIqIIQQ")
_DIRENT = struct.Struct("<QHBB")
_INODE_SIZE = 64
_SLOT_BITS = 5  # a nid counts 32 bytes from the start of the metadata
_SLOT = 1 << _SLOT_BITS
_EXTENDED = 1
_PLAIN, _INLINE = 0 << 1, 2 << 1  # data layouts, shifted as i_format has them
_NO_ADDRESS = 0xFFFFFFFF

_FILE_TYPES = {
    stat.S_IFREG: 1,
    stat.S_IFDIR: 2,
    stat.S_IFCHR: 3,
    stat.S_IFBLK: 4,
    stat.S_IFIFO: 5,
    stat.S_IFSOCK: 6,
    stat.S_IFLNK: 7,
}
_DIRECTORY = _FILE_TYPES[stat.S_IFDIR]

Dirent = tuple[bytes, int, int]  # name, nid, file type


def pack_superblock(layout: Layout, inodes: int) -> bytes:
    """The 128 bytes at SUPERBLOCK_OFFSET. No clock and no random uuid: one tar gives one file."""
    return _SUPERBLOCK.pack(
        _MAGIC,
        0,  # checksum: the feature is off, the chunk table covers this block
        _COMPAT_MTIME,
        BLOCK_BITS,
        0,
        0,  # nid of the root
        inodes,
        0,  # build time
        0,
        layout.erofs_end >> BLOCK_BITS,
        layout.meta_offset >> BLOCK_BITS,
        0,
        bytes.fromhex(layout.diff_id.removeprefix("sha256:"))[:16],
        VOLUME_NAME.ljust(16, b"\0"),
        0,  # incompatible features: none
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
    )


class Index:
    """The metadata of a tree, in two steps: numbering in the constructor, bytes by :meth:`pack`.

    Between them the caller may set ``addr`` of regular files, for only numbering tells which are still reachable.
    Breadth first, directories in byte order of their names, the root first.
    """

    def __init__(self, inodes: Inodes) -> None:
        self._inodes = inodes
        self._order = array("I")
        self._nids = array("q", [-1]) * len(inodes)
        self._links = array("I", [0]) * len(inodes)
        self._end = 0  # of the inode area, bytes
        self._blocks: deque[bytes] = deque()  # what stands behind the inode area
        self._block_count = 0
        self._number(ROOT)
        parents = {ROOT: self._nids[ROOT]}  # nids, of directories that are numbered but not written yet
        for node in self._order:  # grows while it is walked
            if (children := inodes.children.get(node)) is not None:
                self._add_directory(node, children, parents)
        if self.length > MAX_EROFS_END:
            raise LayerLimit("metadata", MAX_EROFS_END, "bytes")

    @property
    def count(self) -> int:
        """The number of inodes that have a name."""
        return len(self._order)

    @property
    def length(self) -> int:
        """Bytes that :meth:`pack` gives."""
        return align_up(self._end, BLOCK_SIZE) + self._block_count * BLOCK_SIZE

    def is_reachable(self, node: int) -> bool:
        """Whether inode *node* has a name; later entries may have taken it."""
        return self._nids[node] >= 0

    def _number(self, node: int) -> int:
        """Give *node* its place among the inodes; its nid."""
        at = self._end
        nid = self._nids[node] = at >> _SLOT_BITS
        self._order.append(node)
        end = at + _INODE_SIZE
        inodes = self._inodes
        if node in inodes.xattrs:
            end += len(inodes.xattrs[node])
        if (target := inodes.targets.get(node)) is not None:
            if _fits_inline(end, len(target)):
                inodes.addr[node] = _NO_ADDRESS
                end += len(target)
            else:
                inodes.addr[node] = self._add_blocks(target)
        self._end = (end + _SLOT - 1) & -_SLOT
        return nid

    def _add_blocks(self, data: bytes) -> int:
        """Store *data* behind the inodes; its first block, counted from there."""
        first = self._block_count
        padded = data + bytes(-len(data) % BLOCK_SIZE)
        self._blocks.append(padded)
        self._block_count += len(padded) >> BLOCK_BITS
        return first

    def _add_directory(self, node: int, children: dict[bytes, int], parents: dict[int, int]) -> None:
        """Number the *children* of *node* and write its blocks."""
        nids, links, modes = self._nids, self._links, self._inodes.mode
        here = nids[node]
        found: list[Dirent] = []
        links[node] = 2
        for name in sorted(children):
            child = children[name]
            nid = nids[child]
            if nid < 0:
                nid = self._number(child)
            kind = _FILE_TYPES[modes[child] & 0o170000]
            if kind == _DIRECTORY:
                parents[child] = here
                links[node] += 1
            else:
                links[child] += 1
            found.append((name, nid, kind))
        bisect.insort(found, (b".", here, _DIRECTORY))
        bisect.insort(found, (b"..", parents.pop(node), _DIRECTORY))
        data = pack_directory(found)
        self._inodes.size[node] = len(data)
        self._inodes.addr[node] = self._add_blocks(data)

    def pack(self, meta_offset: int) -> bytearray:
        """The metadata for a file that has them at byte *meta_offset*. To be called once: it gives memory back on the way."""
        area = align_up(self._end, BLOCK_SIZE)
        behind = (meta_offset + area) >> BLOCK_BITS
        inodes = self._inodes
        children, targets, bodies = inodes.children, inodes.targets, inodes.xattrs
        out = bytearray(area)
        pack_into = _INODE.pack_into
        for number, node in enumerate(self._order, 1):
            form, address, count = _EXTENDED | _PLAIN, inodes.addr[node], 0
            at = self._nids[node] << _SLOT_BITS
            end = at + _INODE_SIZE
            if node in bodies:
                body = bodies[node]
                count = xattrs.count_field(body)
                out[end : end + len(body)] = body
                end += len(body)
            if node in targets:
                if address == _NO_ADDRESS:
                    form = _EXTENDED | _INLINE
                    out[end : end + len(targets[node])] = targets[node]
                else:
                    address += behind
            elif node in children:
                address += behind
            pack_into(
                out,
                at,
                form,
                count,
                inodes.mode[node],
                0,
                inodes.size[node],
                address,
                number,
                inodes.uid[node],
                inodes.gid[node],
                inodes.seconds[node],
                inodes.nanoseconds[node],
                self._links[node],
                0,
                0,
            )
        while self._blocks:
            out += self._blocks.popleft()
        return out


def _fits_inline(at: int, size: int) -> bool:
    """Whether *size* bytes at offset *at* of the metadata, which are block-aligned, stay within one block."""
    return at % BLOCK_SIZE + size <= BLOCK_SIZE and size < BLOCK_SIZE


def pack_directory(entries: list[Dirent]) -> bytes:
    """The blocks of a directory with sorted *entries*; the last one is not padded.

    A block has the fixed parts first and the names behind them; the first name's offset tells how many there are.
    """
    blocks: list[bytes] = []
    start, used = 0, 0
    for index, entry in enumerate(entries):
        need = _DIRENT.size + len(entry[0])
        if used + need > BLOCK_SIZE:
            blocks.append(_directory_block(entries[start:index]).ljust(BLOCK_SIZE, b"\0"))
            start, used = index, 0
        used += need
    blocks.append(_directory_block(entries[start:]))
    return b"".join(blocks)


def _directory_block(entries: list[Dirent]) -> bytes:
    fixed: list[bytes] = []
    names: list[bytes] = []
    at = _DIRENT.size * len(entries)
    pack = _DIRENT.pack
    for name, nid, kind in entries:
        fixed.append(pack(nid, at, kind, 0))
        names.append(name)
        at += len(name)
    return b"".join(fixed) + b"".join(names)
