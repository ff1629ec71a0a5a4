"""From tar entries, in their order, to the tree that unpacking them would leave.

The rules are containerd's (archive.Apply) where it has one: paths are confined to the root, the last entry of a name
wins, OCI whiteouts become overlayfs's. docs/afslyr.md lists where this differs.
"""

import stat
from collections.abc import Iterable
from typing import TYPE_CHECKING

from afs.layerstore.afslyr import xattrs
from afs.layerstore.afslyr.errors import CorruptLayer, LayerLimit
from afs.layerstore.afslyr.layout import BLOCK_BITS, BLOCK_SIZE, TAR_OFFSET
from afs.layerstore.afslyr.limits import DEFAULT_LIMITS, Limits
from afs.layerstore.afslyr.tarstream import HARD_LINK, Entry

if TYPE_CHECKING:
    from afs.layerstore.afslyr.sparse import SparseMap

MAX_NAME = 255
MAX_TARGET = 4095  # PATH_MAX without its NUL
_MAX_HOPS = 40  # symlinks followed on the way to a parent, as in the kernel (MAXSYMLINKS)
_MAX_CACHE = 100_000
_MAX_ID = 0xFFFFFFFE  # (uid_t)-1 means "leave it" to chown(2)
_MAX_MAJOR, _MAX_MINOR = 0xFFF, 0xFFFFF
_NANO = 1_000_000_000
_SECONDS = range(-(1 << 63), 1 << 63)

_WHITEOUT = b".wh."
_AUFS = b".wh..wh."
_OPAQUE = b".wh..wh..opq"


class Node:
    """One inode. ``children`` is set for directories alone, ``target`` for symlinks alone.

    ``addr`` is the EROFS block of a regular file's data or a device's number as the kernel encodes it; ``mtime`` is in
    nanoseconds. ``nlink`` and ``nid`` belong to the index builder. Slots, for a layer may have millions.
    """

    __slots__ = ("addr", "children", "gid", "mode", "mtime", "nid", "nlink", "size", "target", "uid", "xattrs")

    def __init__(self, mode: int) -> None:
        self.mode = mode
        self.uid = self.gid = self.size = self.mtime = self.addr = self.nlink = 0
        self.nid = -1
        self.children: dict[bytes, Node] | None = {} if stat.S_ISDIR(mode) else None
        self.target: bytes | None = None
        self.xattrs: dict[bytes, bytes] | None = None


class _Pending:
    """A hard link whose target has not come yet: a node that stands in for it, and where."""

    __slots__ = ("entry", "link", "node", "places", "target")

    def __init__(self, entry: bytes, link: bytes) -> None:
        self.entry, self.link = entry, link
        self.node = Node(0)
        self.target: Node | None = None  # once it is known
        self.places: list[tuple[Node, bytes]] = []


def split_path(path: bytes) -> list[bytes]:
    """The components of *path*, cleaned lexically and confined: ``/a/./b/../../../c`` is ``c``."""
    parts: list[bytes] = []
    for part in path.split(b"/"):
        if part == b"..":
            if parts:
                parts.pop()
        elif part not in {b"", b"."}:
            parts.append(part)
    return parts


def encode_device(major: int, minor: int) -> int:
    """A device number as EROFS stores it: the kernel's new_encode_dev. ValueError outside 12 and 20 bits."""
    if not (0 <= major <= _MAX_MAJOR and 0 <= minor <= _MAX_MINOR):
        raise ValueError(f"device number {major}:{minor} is out of range")
    return (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)


class TreeBuilder:
    """Takes entries by :meth:`add`, gives the root by :meth:`finish`.

    Errors are CorruptLayer, naming the entry, and LayerLimit. ``sparse`` lists regular files whose data the tar does
    not hold in one run: node, map, and the offset in the tar where the pieces start.
    """

    def __init__(self, limits: Limits = DEFAULT_LIMITS) -> None:
        self.root = Node(stat.S_IFDIR | 0o755)
        self.entries = 0
        self.sparse: list[tuple[Node, SparseMap, int]] = []
        self._limits = limits
        self._nodes = self._metadata = self._extents = self._steps = 0
        self._parents: dict[bytes, Node] = {}
        self._opaque: list[Node] = []
        self._whiteouts: dict[tuple[int, bytes], Node] = {}
        self._aufs: list[tuple[Node, bytes]] = []
        self._pending: dict[int, _Pending] = {}

    def add(self, entry: Entry) -> None:
        """Place one entry."""
        self.entries += 1
        if self.entries > self._limits.max_entries:  # not all of them make names: opaque marks, directories again
            raise LayerLimit("entries", self._limits.max_entries)
        path = entry.name.rstrip(b"/")
        directory, _, base = path.rpartition(b"/")
        if base in {b"", b".", b".."}:
            parts = split_path(path)
            if not parts:
                self._set_root(entry)
                return
            base = parts.pop()
            directory = b"/".join(parts)
        parent = self._parents.get(directory)
        if parent is None:
            parent = self._find_parent(directory, entry)
        if base.startswith(_WHITEOUT) and self._is_whiteout(parent, base, entry):
            return
        if entry.type == HARD_LINK:
            self._place(parent, base, self._link_target(entry), entry)
            return
        node = parent.children.get(base) if entry.type == stat.S_IFDIR and parent.children else None
        if node is None or node.children is None:
            node = Node(entry.type)
            self._place(parent, base, node, entry)
        self._set_attributes(node, entry)

    def finish(self) -> Node:
        """Resolve what had to wait for the last entry, and return the root."""
        self._resolve_pending()
        for parent, name in self._aufs:
            if parent.children is not None:
                parent.children.pop(name, None)
        for (_, name), parent in self._whiteouts.items():
            self._apply_whiteout(parent, name)
        for node in self._opaque:
            node.xattrs = {**(node.xattrs or {}), xattrs.OPAQUE: b"y"}
        return self.root

    # Finding places

    def _find_parent(self, directory: bytes, entry: Entry) -> Node:
        parent = self._walk(split_path(directory), entry, create=True)
        assert parent is not None  # create=True never gives None
        if len(self._parents) >= _MAX_CACHE:
            self._parents.clear()
        self._parents[directory] = parent
        return parent

    def _walk(self, parts: list[bytes], entry: Entry, *, create: bool) -> Node | None:
        """The directory at *parts*, symlinks followed within the root; missing ones are made, or give None."""
        stack, todo, hops = [self.root], parts[::-1], 0
        self._count_steps(len(parts))
        while todo:
            part = todo.pop()
            if part == b"..":
                if len(stack) > 1:
                    stack.pop()
                continue
            if part in {b"", b"."}:
                continue
            here = stack[-1].children
            child = here.get(part) if here is not None else None
            if child is None:
                if not create:
                    return None
                child = Node(stat.S_IFDIR | 0o755)
                self._place(stack[-1], part, child, entry)
            elif child.target is not None:
                hops += 1
                if hops > _MAX_HOPS:
                    raise CorruptLayer("too many symlinks on the way to its directory", entry=entry.name)
                if child.target.startswith(b"/"):
                    del stack[1:]
                target = child.target.split(b"/")
                self._count_steps(len(target))
                todo += target[::-1]
                continue
            elif child.children is None:
                raise CorruptLayer("a parent is not a directory", entry=entry.name)
            stack.append(child)
            if len(stack) > self._limits.max_depth:
                raise LayerLimit("directory depth", self._limits.max_depth, "levels")
        return stack[-1]

    def _count_steps(self, count: int) -> None:
        self._steps += count
        if self._steps > self._limits.max_path_steps:
            raise LayerLimit("path components to follow", self._limits.max_path_steps)

    def _place(self, parent: Node, name: bytes, node: Node, entry: Entry) -> None:
        """Let *name* in *parent* be *node*."""
        children = parent.children
        if children is None:
            raise CorruptLayer("a parent is not a directory", entry=entry.name)
        old = children.get(name)
        if old is not None and (old.children is not None or old.target is not None):
            self._parents.clear()  # cached parents may have led through it
        children[name] = node
        self._count(name, entry)
        if node.children is not None:
            self._charge(BLOCK_SIZE)  # however few entries it gets
        if name.startswith(_AUFS):
            # Hard links may lead into aufs's directories, so they go away only at the end.
            self._aufs.append((parent, name))
        if not node.mode and id(node) in self._pending:
            self._pending[id(node)].places.append((parent, name))

    def _count(self, name: bytes, entry: Entry) -> None:
        """Account for a new *name*."""
        if len(name) > MAX_NAME:
            raise CorruptLayer(f"name of {len(name)} bytes, at most {MAX_NAME} possible", entry=entry.name)
        self._nodes += 1
        if self._nodes > self._limits.max_entries:
            raise LayerLimit("entries", self._limits.max_entries)
        self._charge(64 + 12 + len(name))

    def _charge(self, size: int) -> None:
        self._metadata += size
        if self._metadata > self._limits.max_metadata_bytes:
            raise LayerLimit("metadata", self._limits.max_metadata_bytes, "bytes")

    # Attributes

    def _set_root(self, entry: Entry) -> None:
        if entry.type != stat.S_IFDIR:
            raise CorruptLayer("the root is not a directory", entry=entry.name)
        self._set_attributes(self.root, entry)

    def _set_attributes(self, node: Node, entry: Entry) -> None:
        if not (0 <= entry.uid <= _MAX_ID and 0 <= entry.gid <= _MAX_ID):
            raise CorruptLayer(f"owner {entry.uid}:{entry.gid} is out of range", entry=entry.name)
        if entry.mtime_ns // _NANO not in _SECONDS:
            raise CorruptLayer("time is out of range", entry=entry.name)
        node.mode = entry.type | entry.mode
        node.uid = entry.uid
        node.gid = entry.gid
        node.mtime = entry.mtime_ns
        node.xattrs = None
        try:
            if entry.xattrs:
                node.xattrs = xattrs.kept(entry.xattrs)
                self._charge(sum(len(name) + len(value) + 8 for name, value in entry.xattrs.items()))
            if entry.type in {stat.S_IFCHR, stat.S_IFBLK}:
                node.addr = encode_device(entry.devmajor, entry.devminor)
        except ValueError as error:
            raise CorruptLayer(str(error), entry=entry.name) from error
        if entry.type == stat.S_IFREG:
            self._set_data(node, entry)
        elif entry.type == stat.S_IFLNK:
            self._set_target(node, entry)

    def _set_target(self, node: Node, entry: Entry) -> None:
        if not 0 < len(entry.link) <= MAX_TARGET:
            raise CorruptLayer(f"symlink target of {len(entry.link)} bytes", entry=entry.name)
        self._charge(len(entry.link))
        node.target = entry.link
        node.size = len(entry.link)

    def _set_data(self, node: Node, entry: Entry) -> None:
        node.size = entry.size
        if not entry.size:
            return
        if entry.sparse is None or entry.sparse == ((0, entry.size),):
            node.addr = (TAR_OFFSET + entry.offset) >> BLOCK_BITS
            if entry.offset % BLOCK_SIZE:
                raise CorruptLayer("data is not aligned", entry=entry.name)
            return
        self._extents += len(entry.sparse)
        if self._extents > self._limits.max_extents:
            raise LayerLimit("sparse extents", self._limits.max_extents)
        self.sparse.append((node, entry.sparse, entry.offset))

    # Whiteouts

    def _is_whiteout(self, parent: Node, base: bytes, entry: Entry) -> bool:
        if base == _OPAQUE:
            self._opaque.append(parent)
            return True
        if base.startswith(_AUFS):
            return False
        name = base[len(_WHITEOUT) :]
        if name in {b"", b".", b".."}:
            raise CorruptLayer("whiteout of nothing", entry=entry.name)
        self._count(name, entry)
        self._whiteouts[id(parent), name] = parent
        return True

    def _apply_whiteout(self, parent: Node, name: bytes) -> None:
        """A whiteout yields to a real entry; if that is a directory, what lies below it must not show through."""
        children = parent.children
        if children is None:
            return
        node = children.get(name)
        if node is None:
            children[name] = Node(stat.S_IFCHR)
        elif node.children is not None:
            self._opaque.append(node)

    # Hard links

    def _link_target(self, entry: Entry) -> Node:
        """The inode that *entry* links to, or a stand-in if it has not come yet."""
        node = self._lookup(entry.link, entry)
        if node is None:
            pending = _Pending(entry.name, entry.link)
            self._pending[id(pending.node)] = pending
            self._charge(len(entry.name) + len(entry.link))
            return pending.node
        if node.children is not None:
            raise self._bad_link(entry, "a directory")
        return node

    def _lookup(self, path: bytes, entry: Entry) -> Node | None:
        """The node at *path*: symlinks followed on the way, not at its end."""
        parts = split_path(path)
        if not parts:
            return self.root
        base = parts.pop()
        parent = self._walk(parts, entry, create=False)
        return parent.children.get(base) if parent is not None and parent.children is not None else None

    def _resolve_pending(self) -> None:
        for pending in list(self._pending.values()):
            node = self._follow(pending)
            for parent, name in pending.places:
                if parent.children is not None and parent.children.get(name) is pending.node:
                    parent.children[name] = node

    def _follow(self, pending: _Pending) -> Node:
        """The real inode behind a stand-in, through other stand-ins; all on the way learn it."""
        chain: dict[int, _Pending] = {}
        link: _Pending | None = pending
        node: Node | None = None
        while link is not None:
            chain[id(link.node)] = link
            entry = Entry(link.entry, HARD_LINK, link=link.link)
            node = link.target or self._lookup(link.link, entry)
            if node is None or id(node) in chain:
                raise self._bad_link(entry, "missing")
            if node.children is not None:
                raise self._bad_link(entry, "a directory")
            link = self._pending.get(id(node))
        assert node is not None  # the loop ran at least once
        for link in chain.values():
            link.target = node
        return node

    @staticmethod
    def _bad_link(entry: Entry, what: str) -> CorruptLayer:
        target = entry.link.decode("utf-8", "backslashreplace")
        return CorruptLayer(f'target "{target}" of the hard link is {what}', entry=entry.name)


def build(found: Iterable[Entry], limits: Limits = DEFAULT_LIMITS) -> TreeBuilder:
    """A builder that has taken all of *found* and is finished."""
    builder = TreeBuilder(limits)
    for entry in found:
        builder.add(entry)
    builder.finish()
    return builder
