"""EROFS metadata for a tree: superblock, inodes, directory blocks (kernel fs/erofs/erofs_fs.h).

Kernel facts that shape this: the root's nid has 16 bits, so the root comes first; inline data must not cross a block, so
a symlink target that would gets a block of its own, while inodes and their xattrs may cross; names in a directory are
sorted as bytes, ``.`` and ``..`` among them; block addresses have 32 bits.
"""

import stat
import struct

from afs.layerstore.afslyr import xattrs
from afs.layerstore.afslyr.errors import LayerLimit
from afs.layerstore.afslyr.layout import BLOCK_BITS, BLOCK_SIZE, MAX_EROFS_END, Layout, align_up
from afs.layerstore.afslyr.tree import Node

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
_NANO = 1_000_000_000

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

    Between them the caller may set ``addr`` of regular files, for only numbering tells which are still reachable
    (``nlink`` > 0). Breadth first, directories in byte order of their names, the root first.
    """

    def __init__(self, root: Node) -> None:
        self._order: list[Node] = []
        self._end = 0  # of the inode area, bytes
        self._blocks: list[bytes] = []  # what stands behind the inode area
        self._block_count = 0
        self._number(root)
        parents = {root.nid: root.nid}
        for node in self._order:  # grows while it is walked
            if node.children is not None:
                self._add_directory(node, parents)
        if self.length > MAX_EROFS_END:
            raise LayerLimit("metadata", MAX_EROFS_END, "bytes")

    @property
    def inodes(self) -> int:
        """The number of inodes."""
        return len(self._order)

    @property
    def length(self) -> int:
        """Bytes that :meth:`pack` gives."""
        return align_up(self._end, BLOCK_SIZE) + self._block_count * BLOCK_SIZE

    def _number(self, node: Node) -> None:
        """Give *node* its place among the inodes."""
        at = self._end
        node.nid = at >> _SLOT_BITS
        self._order.append(node)
        end = at + _INODE_SIZE
        if node.xattrs:
            end += len(xattrs.encode(node.xattrs))
        if node.target is not None:
            if _fits_inline(end, node.size):
                node.addr = _NO_ADDRESS
                end += node.size
            else:
                node.addr = self._add_blocks(node.target)
        self._end = (end + _SLOT - 1) & -_SLOT

    def _add_blocks(self, data: bytes) -> int:
        """Store *data* behind the inodes; its first block, counted from there."""
        first = self._block_count
        padded = data + bytes(-len(data) % BLOCK_SIZE)
        self._blocks.append(padded)
        self._block_count += len(padded) >> BLOCK_BITS
        return first

    def _add_directory(self, node: Node, parents: dict[int, int]) -> None:
        """Number the children of *node* and write its blocks."""
        children = node.children or {}
        here = node.nid
        found: list[Dirent] = [(b".", here, _DIRECTORY), (b"..", parents.pop(here), _DIRECTORY)]
        node.nlink = 2
        for name in sorted(children):
            child = children[name]
            if child.nid < 0:
                self._number(child)
            kind = _FILE_TYPES[child.mode & 0o170000]
            if kind == _DIRECTORY:
                parents[child.nid] = here
                node.nlink += 1
            else:
                child.nlink += 1
            found.append((name, child.nid, kind))
        found.sort()
        data = pack_directory(found)
        node.size = len(data)
        node.addr = self._add_blocks(data)

    def pack(self, meta_offset: int) -> bytearray:
        """The metadata for a file that has them at byte *meta_offset*."""
        area = align_up(self._end, BLOCK_SIZE)
        behind = (meta_offset + area) >> BLOCK_BITS
        out = bytearray(area)
        for number, node in enumerate(self._order, 1):
            self._pack_inode(out, number, node, behind)
        for block in self._blocks:
            out += block
        return out

    def _pack_inode(self, out: bytearray, number: int, node: Node, behind: int) -> None:
        form, address = _EXTENDED | _PLAIN, node.addr
        body = xattrs.encode(node.xattrs) if node.xattrs else b""
        at = node.nid << _SLOT_BITS
        end = at + _INODE_SIZE + len(body)
        if node.target is not None:
            if address == _NO_ADDRESS:
                form = _EXTENDED | _INLINE
                out[end : end + node.size] = node.target
            else:
                address += behind
        elif node.children is not None:
            address += behind
        seconds, nanoseconds = divmod(node.mtime, _NANO)
        _INODE.pack_into(
            out,
            at,
            form,
            xattrs.count_field(body),
            node.mode,
            0,
            node.size,
            address,
            number,
            node.uid,
            node.gid,
            seconds,
            nanoseconds,
            node.nlink,
            0,
            0,
        )
        if body:
            out[at + _INODE_SIZE : end] = body


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
