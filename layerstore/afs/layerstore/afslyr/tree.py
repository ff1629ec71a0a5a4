"""From tar entries, in their order, to the tree that unpacking them would leave.

The rules are containerd's (archive.Apply) where it has one: paths are confined to the root, the last entry of a name
wins, OCI whiteouts become overlayfs's. docs/afslyr.md lists where this differs.
"""

import stat
from collections.abc import Iterable
from typing import TYPE_CHECKING

from afs.layerstore.afslyr import xattrs
from afs.layerstore.afslyr.errors import CorruptLayer, LayerLimit, printable
from afs.layerstore.afslyr.inodes import ROOT, Inodes
from afs.layerstore.afslyr.layout import BLOCK_BITS, BLOCK_SIZE, TAR_OFFSET
from afs.layerstore.afslyr.limits import DEFAULT_LIMITS, Limits
from afs.layerstore.afslyr.tarheader import HARD_LINK, Entry

if TYPE_CHECKING:
    from afs.layerstore.afslyr.sparse import SparseMap

MAX_NAME = 255
MAX_TARGET = 4095  # PATH_MAX without its NUL
_MAX_HOPS = 40  # symlinks followed on the way to a parent, as in the kernel (MAXSYMLINKS)
_MAX_CACHE = 100_000
_MAX_ID = 0xFFFFFFFE  # (uid_t)-1 means "leave it" to chown(2)
_MAX_MAJOR, _MAX_MINOR = 0xFFF, 0xFFFFF
_NANO = 1_000_000_000
_MAX_SIGNED = 1 << 63  # times and sizes are 64 bits with a sign to the kernel

_WHITEOUT = b".wh."
_AUFS = b".wh..wh."
_OPAQUE = b".wh..wh..opq"
_NO_NAMES = frozenset({b"", b".", b".."})


class _Pending:
    """A hard link whose target has not come yet: an inode that stands in for it, and where."""

    __slots__ = ("entry", "link", "node", "places", "target")

    def __init__(self, entry: bytes, link: bytes, node: int) -> None:
        self.entry, self.link, self.node = entry, link, node
        self.target: int | None = None  # once it is known
        self.places: list[tuple[int, bytes]] = []


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


def _attributes(entry: Entry) -> tuple[int, int, int, int, int]:
    """Mode with type, uid, gid, seconds and nanoseconds; CorruptLayer if EROFS or the kernel cannot hold them."""
    uid, gid = entry.uid, entry.gid
    if not (0 <= uid <= _MAX_ID and 0 <= gid <= _MAX_ID):
        raise CorruptLayer(f"owner {uid}:{gid} is out of range", entry=entry.name)
    seconds, nanoseconds = divmod(entry.mtime_ns, _NANO)
    if not -_MAX_SIGNED <= seconds < _MAX_SIGNED:
        raise CorruptLayer("time is out of range", entry=entry.name)
    return entry.type | entry.mode, uid, gid, seconds, nanoseconds


class TreeBuilder:
    """Takes entries by :meth:`add`, gives the inodes by :meth:`finish`.

    Errors are CorruptLayer, naming the entry, and LayerLimit. ``sparse`` lists regular files whose data the tar does
    not hold in one run: inode, map, and the offset in the tar where the pieces start.
    """

    def __init__(self, limits: Limits = DEFAULT_LIMITS) -> None:
        self.inodes = Inodes()
        self.inodes.add(stat.S_IFDIR | 0o755)
        self.entries = 0
        self.sparse: list[tuple[int, SparseMap, int]] = []
        self._limits = limits
        self._names = self._metadata = self._extents = self._steps = 0
        self._children = self.inodes.children
        self._parents: dict[bytes, int] = {}
        self._bodies: dict[bytes, bytes] = {}
        self._opaque: dict[int, None] = {}
        self._whiteouts: dict[tuple[int, bytes], None] = {}
        self._aufs: list[tuple[int, bytes]] = []
        self._pending: dict[int, _Pending] = {}

    def add(self, entry: Entry) -> None:
        """Place one entry."""
        self.entries += 1
        if self.entries > self._limits.max_entries:  # not all of them make names: opaque marks, directories again
            raise LayerLimit("entries", self._limits.max_entries)
        path = entry.name.rstrip(b"/")
        directory, _, base = path.rpartition(b"/")
        if base in _NO_NAMES:
            parts = self._split(path)
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
            self._link(parent, base, entry)
            return
        children = self._children.get(parent)
        if children is None:
            raise CorruptLayer("a parent is not a directory", entry=entry.name)
        known = children.get(base) if entry.type == stat.S_IFDIR else None
        if known is None or known not in self._children:
            node = self.inodes.add(*_attributes(entry))
            self._place(parent, base, node, entry)
        else:
            node = known
            self._change(node, entry)
        self._set_content(node, entry)

    def finish(self) -> Inodes:
        """Resolve what had to wait for the last entry, and return the inodes; ROOT is the root."""
        self._resolve_pending()
        for parent, name in self._aufs:
            self._children[parent].pop(name, None)
        for parent, name in self._whiteouts:
            self._apply_whiteout(parent, name)
        for node in self._opaque:
            known = self.inodes.xattrs.get(node)
            marked = {**(xattrs.decode(known) if known else {}), xattrs.OPAQUE: b"y"}
            self.inodes.xattrs[node] = xattrs.encode(marked)
        return self.inodes

    # Finding places

    def _find_parent(self, directory: bytes, entry: Entry) -> int:
        parent = self._walk(self._split(directory), entry, create=True)
        assert parent is not None  # create=True never gives None
        if len(self._parents) >= _MAX_CACHE:
            self._parents.clear()
        if len(directory) <= MAX_TARGET:  # longer ones can only be odd spellings, of which many would fill the memory
            self._parents[directory] = parent
        return parent

    def _walk(self, parts: list[bytes], entry: Entry, *, create: bool) -> int | None:
        """The directory at *parts*, symlinks followed within the root; missing ones are made, or give None."""
        stack, todo, hops = [ROOT], parts[::-1], 0
        self._count_steps(len(parts))
        while todo:
            part = todo.pop()
            if part == b"..":
                if len(stack) > 1:
                    stack.pop()
                continue
            if part in {b"", b"."}:
                continue
            child = self._children[stack[-1]].get(part)
            if child is None:
                if not create:
                    return None
                child = self.inodes.add(stat.S_IFDIR | 0o755)
                self._place(stack[-1], part, child, entry)
            elif (target := self.inodes.targets.get(child)) is not None:
                hops += 1
                if hops > _MAX_HOPS:
                    raise CorruptLayer("too many symlinks on the way to its directory", entry=entry.name)
                if target.startswith(b"/"):
                    del stack[1:]
                more = target.split(b"/")
                self._count_steps(len(more))
                todo += more[::-1]
                continue
            elif child not in self._children:
                raise CorruptLayer("a parent is not a directory", entry=entry.name)
            stack.append(child)
            if len(stack) > self._limits.max_depth:
                raise LayerLimit("directory depth", self._limits.max_depth, "levels")
        return stack[-1]

    def _split(self, path: bytes) -> list[bytes]:
        self._count_steps(path.count(b"/"))  # slashes that mean nothing take their time, too
        return split_path(path)

    def _count_steps(self, count: int) -> None:
        self._steps += count
        if self._steps > self._limits.max_path_steps:
            raise LayerLimit("path components to follow", self._limits.max_path_steps)

    def _place(self, parent: int, name: bytes, node: int, entry: Entry) -> None:
        """Let *name* in *parent* be *node*."""
        children = self._children[parent]
        old = children.get(name)
        if old is not None and (old in self._children or old in self.inodes.targets):
            self._parents.clear()  # cached parents may have led through it
        children[name] = node
        self._count(name, entry, BLOCK_SIZE if node in self._children else 0)  # however few entries it gets
        if name.startswith(_AUFS):
            # Hard links may lead into aufs's directories, so they go away only at the end.
            self._aufs.append((parent, name))

    def _count(self, name: bytes, entry: Entry, more: int = 0) -> None:
        """Account for a new *name*, its inode and *more* bytes of metadata."""
        if len(name) > MAX_NAME:
            raise CorruptLayer(f"name of {len(name)} bytes, at most {MAX_NAME} possible", entry=entry.name)
        self._names += 1
        if self._names > self._limits.max_entries:
            raise LayerLimit("entries", self._limits.max_entries)
        self._charge(64 + 12 + len(name) + more)

    def _charge(self, size: int) -> None:
        self._metadata += size
        if self._metadata > self._limits.max_metadata_bytes:
            raise LayerLimit("metadata", self._limits.max_metadata_bytes, "bytes")

    # Attributes

    def _set_root(self, entry: Entry) -> None:
        if entry.type != stat.S_IFDIR:
            raise CorruptLayer("the root is not a directory", entry=entry.name)
        self._change(ROOT, entry)
        self._set_content(ROOT, entry)

    def _change(self, node: int, entry: Entry) -> None:
        """Give a directory that came before the attributes of *entry*."""
        inodes = self.inodes
        inodes.mode[node], inodes.uid[node], inodes.gid[node], inodes.seconds[node], inodes.nanoseconds[node] = (
            _attributes(entry)
        )

    def _set_content(self, node: int, entry: Entry) -> None:
        """Set extended attributes, and what only files of this type have."""
        inodes, kind = self.inodes, entry.type
        if entry.xattrs:
            self._set_xattrs(node, entry, entry.xattrs)
        elif inodes.xattrs:
            inodes.xattrs.pop(node, None)  # of a directory that came before
        if kind == stat.S_IFREG:
            self._set_data(node, entry)
        elif kind == stat.S_IFLNK:
            self._set_target(node, entry)
        elif kind in {stat.S_IFCHR, stat.S_IFBLK}:
            try:
                inodes.addr[node] = encode_device(entry.devmajor, entry.devminor)
            except ValueError as error:
                raise CorruptLayer(str(error), entry=entry.name) from error

    def _set_xattrs(self, node: int, entry: Entry, found: dict[bytes, bytes]) -> None:
        try:
            body = xattrs.body_of(found)
        except ValueError as error:
            raise CorruptLayer(str(error), entry=entry.name) from error
        self._charge(len(body))
        if body:
            # Many files have equal ones: a label of SELinux, say.
            self.inodes.xattrs[node] = self._bodies.setdefault(body, body)
        else:
            self.inodes.xattrs.pop(node, None)

    def _set_target(self, node: int, entry: Entry) -> None:
        if not 0 < len(entry.link) <= MAX_TARGET:
            raise CorruptLayer(f"symlink target of {len(entry.link)} bytes", entry=entry.name)
        self._charge(len(entry.link))
        self.inodes.targets[node] = entry.link
        self.inodes.size[node] = len(entry.link)

    def _set_data(self, node: int, entry: Entry) -> None:
        if not entry.size:
            return
        if entry.size >= _MAX_SIGNED:
            raise CorruptLayer("size is out of range", entry=entry.name)
        self.inodes.size[node] = entry.size
        if entry.sparse is None or entry.sparse == ((0, entry.size),):
            self.inodes.addr[node] = (TAR_OFFSET + entry.offset) >> BLOCK_BITS
            if entry.offset % BLOCK_SIZE:
                raise CorruptLayer("data is not aligned", entry=entry.name)
            return
        self._extents += len(entry.sparse)
        if self._extents > self._limits.max_extents:
            raise LayerLimit("sparse extents", self._limits.max_extents)
        self.sparse.append((node, entry.sparse, entry.offset))

    # Whiteouts

    def _is_whiteout(self, parent: int, base: bytes, entry: Entry) -> bool:
        if base == _OPAQUE:
            self._opaque[parent] = None
            return True
        if base.startswith(_AUFS):
            return False
        name = base[len(_WHITEOUT) :]
        if name in _NO_NAMES:
            raise CorruptLayer("whiteout of nothing", entry=entry.name)
        self._count(name, entry)
        self._whiteouts[parent, name] = None
        return True

    def _apply_whiteout(self, parent: int, name: bytes) -> None:
        """A whiteout yields to a real entry; if that is a directory, what lies below it must not show through."""
        node = self._children[parent].get(name)
        if node is None:
            self._children[parent][name] = self.inodes.add(stat.S_IFCHR)
        elif node in self._children:
            self._opaque[node] = None

    # Hard links

    def _link(self, parent: int, base: bytes, entry: Entry) -> None:
        """Let *base* in *parent* be the inode that *entry* links to, or a stand-in if it has not come yet."""
        node = self._lookup(entry.link, entry)
        if node is None:
            node = self.inodes.add(0)
            self._pending[node] = _Pending(entry.name, entry.link, node)
            self._charge(len(entry.name) + len(entry.link))
        elif node in self._children:
            raise self._bad_link(entry, "a directory")
        self._place(parent, base, node, entry)
        if node in self._pending:
            self._pending[node].places.append((parent, base))

    def _lookup(self, path: bytes, entry: Entry) -> int | None:
        """The inode at *path*: symlinks followed on the way, not at its end."""
        parts = self._split(path)
        if not parts:
            return ROOT
        base = parts.pop()
        parent = self._walk(parts, entry, create=False)
        return None if parent is None else self._children[parent].get(base)

    def _resolve_pending(self) -> None:
        for pending in list(self._pending.values()):
            node = self._follow(pending)
            for parent, name in pending.places:
                if self._children[parent].get(name) == pending.node:
                    self._children[parent][name] = node

    def _follow(self, pending: _Pending) -> int:
        """The real inode behind a stand-in, through other stand-ins; all on the way learn it."""
        chain: dict[int, _Pending] = {}
        link: _Pending | None = pending
        node: int | None = None
        while link is not None:
            chain[link.node] = link
            entry = Entry(link.entry, HARD_LINK, link=link.link)
            node = link.target if link.target is not None else self._lookup(link.link, entry)
            if node is None or node in chain:
                raise self._bad_link(entry, "missing")
            if node in self._children:
                raise self._bad_link(entry, "a directory")
            link = self._pending.get(node)
        assert node is not None  # the loop ran at least once
        for link in chain.values():
            link.target = node
        return node

    @staticmethod
    def _bad_link(entry: Entry, what: str) -> CorruptLayer:
        return CorruptLayer(f'target "{printable(entry.link)}" of the hard link is {what}', entry=entry.name)


def build(found: Iterable[Entry], limits: Limits = DEFAULT_LIMITS) -> TreeBuilder:
    """A builder that has taken all of *found* and is finished."""
    builder = TreeBuilder(limits)
    for entry in found:
        builder.add(entry)
    builder.finish()
    return builder
