"""What a layer should become, told by the slow and obvious way: docs/afslyr.md, "From tar to tree", on plain dictionaries.

An :class:`Operation` is one entry of a tar; :meth:`Operation.tar` writes it, :meth:`Model.apply` says what it does. Nothing of the
converter is used, so that the two can be compared.
"""

import stat
from dataclasses import dataclass, field, replace
from typing import Literal

from tests.testbed import tars

Dialect = Literal["ustar", "v7", "pax", "gnu", "prefix"]
Kind = Literal["file", "directory", "symlink", "hard link", "device", "fifo", "sparse", "whiteout", "opaque", "global"]
SparseFormat = Literal["old", "0.0", "0.1", "1.0"]
Tree = dict[bytes, tars.Expected]

_TYPE = {"file": b"0", "directory": b"5", "symlink": b"2", "hard link": b"1", "device": b"3", "fifo": b"6"}
_MODE = {
    "file": stat.S_IFREG,
    "directory": stat.S_IFDIR,
    "symlink": stat.S_IFLNK,
    "device": stat.S_IFCHR,
    "fifo": stat.S_IFIFO,
}


class Refused(Exception):
    """No tree can come of this."""


@dataclass(frozen=True)
class Operation:
    """One entry. ``link`` is a target, ``pieces`` are those of a sparse file of ``size`` bytes; ``mtime`` is in seconds."""

    kind: Kind
    path: bytes
    dialect: Dialect = "ustar"
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    nanoseconds: int = 0  # pax alone
    data: bytes = b""
    link: bytes = b""
    device: tuple[int, int] = (0, 0)
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    pieces: tuple[tuple[int, bytes], ...] = ()
    size: int = 0
    sparse: SparseFormat = "old"

    def tar(self) -> bytes:
        """The entry's headers and data."""
        if self.kind == "global":
            return tars.pax([("mtime", str(self.mtime) if self.mtime else "")], b"g")
        if self.kind == "sparse":
            if self.sparse == "old":
                return tars.old_gnu_sparse(self.path, list(self.pieces), self.size)
            return tars.pax_sparse(self.path.decode(), list(self.pieces), self.size, self.sparse)
        kind = _TYPE.get(self.kind, b"0")
        name, link, prefix, before = self.path, self.link, b"", b""
        old = self.dialect == "v7" and self.kind in ("file", "directory")
        if old and self.kind == "directory":
            name += b"/"
        pairs: tars.Records = [(b"SCHILY.xattr." + key, value) for key, value in self.xattrs]
        if self.dialect == "pax":
            pairs += [("path", name), ("mtime", _decimal(self.mtime, self.nanoseconds)), ("uid", str(self.uid))]
            pairs += [("linkpath", link)] if link else []
            pairs += [("size", str(len(self.data)))] if kind == b"0" else []
            name, link = b"other", b"other"
        elif self.dialect == "gnu" or len(name) > 99 or len(link) > 99:
            before = tars.gnu_long(name) + (tars.gnu_long(link, b"K") if link else b"")
            name, link = name[:100], link[:100]
        elif self.dialect == "prefix" and b"/" in name:
            prefix, _, name = name.rpartition(b"/")
        magic = b"ustar\00000"
        if old:
            kind, magic = b"\0", b""
        block = tars.header(
            name,
            kind,
            size=0 if self.dialect == "pax" else len(self.data),
            mode=self.mode,
            uid=7 if self.dialect == "pax" else self.uid,
            gid=self.gid,
            mtime=0 if self.dialect == "pax" else self.mtime,
            link=link,
            major=self.device[0],
            minor=self.device[1],
            magic=magic,
            prefix=prefix,
        )
        return before + (tars.pax(pairs) if pairs else b"") + block + tars.padded(self.data)


def _decimal(seconds: int, nanoseconds: int) -> str:
    """Seconds and nanoseconds as one decimal number; negative times count down from the second."""
    total = seconds * tars.NS + nanoseconds
    whole, part = divmod(abs(total), tars.NS)
    return f"{'-' if total < 0 else ''}{whole}.{part:09}"


@dataclass(eq=False)
class _Node:
    """An inode of the model. ``pending`` is the path of a hard link whose target had not come."""

    expected: tars.Expected
    children: "dict[bytes, _Node] | None" = None
    pending: bytes | None = None
    opaque: bool = False


def _directory(mode: int = 0o755) -> _Node:
    return _Node(tars.Expected(stat.S_IFDIR | mode), {})


@dataclass
class Model:
    """A tree that operations change."""

    root: _Node = field(default_factory=_directory)
    whiteouts: list[tuple[_Node, bytes]] = field(default_factory=list)
    pending: list[_Node] = field(default_factory=list)
    mtime: int = 0  # the global one, if not 0

    def apply(self, operation: Operation) -> None:
        """Do what one entry says. Raises Refused."""
        if operation.kind == "global":
            self.mtime = operation.mtime
            return
        parts = _clean(operation.path)
        if not parts:
            if operation.kind != "directory":
                raise Refused("the root is no directory")
            self.root.expected = self._expected(operation)
            return
        parent = self._directory_at(parts[:-1], create=True)
        assert parent is not None
        assert parent.children is not None
        name = parts[-1]
        if operation.kind == "opaque":
            parent.opaque = True
        elif operation.kind == "whiteout":
            self.whiteouts.append((parent, name.removeprefix(b".wh.")))
        elif operation.kind == "hard link":
            parent.children[name] = self._linked(operation.link)
        else:
            old = parent.children.get(name)
            if operation.kind == "directory" and old is not None and old.children is not None:
                old.expected = self._expected(operation)
                return
            children: dict[bytes, _Node] | None = {} if operation.kind == "directory" else None
            parent.children[name] = _Node(self._expected(operation), children)

    def _expected(self, operation: Operation) -> tars.Expected:
        seconds = self.mtime or operation.mtime
        if operation.kind == "sparse":
            content = bytearray(operation.size)
            for at, data in operation.pieces:
                content[at : at + len(data)] = data
            return tars.Expected(stat.S_IFREG | 0o644, mtime_ns=self.mtime * tars.NS, content=bytes(content))
        mtime_ns = seconds * tars.NS
        if operation.dialect == "pax":
            mtime_ns = operation.mtime * tars.NS + operation.nanoseconds
        kept = {key.decode(): value for key, value in operation.xattrs if not key.startswith(b"trusted.overlay.")}
        return tars.Expected(
            mode=_MODE[operation.kind] | operation.mode,
            uid=operation.uid,
            gid=operation.gid,
            mtime_ns=mtime_ns,
            content=operation.data,
            target=operation.link if operation.kind == "symlink" else None,
            device=operation.device,
            xattrs=kept,
        )

    def _linked(self, link: bytes) -> _Node:
        node = self._at(link)
        if node is None:
            node = _Node(tars.Expected(0), pending=link)
            self.pending.append(node)
        elif node.children is not None:
            raise Refused("hard link to a directory")
        return node

    def _at(self, path: bytes) -> _Node | None:
        parts = _clean(path)
        if not parts:
            return self.root
        parent = self._directory_at(parts[:-1], create=False)
        return None if parent is None or parent.children is None else parent.children.get(parts[-1])

    def _directory_at(self, parts: list[bytes], *, create: bool) -> _Node | None:
        """The directory at *parts*, with symlinks on the way followed within the root."""
        way, todo, hops = [self.root], list(parts), 0
        while todo:
            part = todo.pop(0)
            if part == b"..":
                way = way[:-1] or [self.root]
            elif part not in (b"", b"."):
                here = way[-1].children
                assert here is not None
                node = here.get(part)
                if node is None:
                    if not create:
                        return None
                    node = here[part] = _directory()
                if node.expected.target is not None:
                    hops += 1
                    if hops > 40:
                        raise Refused("symlink loop")
                    way = [self.root] if node.expected.target.startswith(b"/") else way
                    todo = [*node.expected.target.split(b"/"), *todo]
                    continue
                if node.children is None:
                    raise Refused("a parent is no directory")
                way = [*way, node]
        return way[-1]

    def finish(self) -> Tree:
        """Every path and what it should be; the root is ``.``. Raises Refused."""
        real = {id(node): self._resolved(node) for node in self.pending}
        hidden: list[tuple[_Node, bytes]] = []
        for parent, name in self.whiteouts:
            assert parent.children is not None
            node = parent.children.get(name)
            if node is None:
                hidden.append((parent, name))
            elif node.children is not None:
                node.opaque = True
        for parent, name in hidden:
            assert parent.children is not None
            parent.children[name] = _Node(tars.Expected(stat.S_IFCHR))
        names: dict[int, list[bytes]] = {}
        found: dict[bytes, _Node] = {}
        todo = [(b".", self.root)]
        while todo:
            path, node = todo.pop()
            node = real.get(id(node), node)
            found[path] = node
            names.setdefault(id(node), []).append(path)
            prefix = b"" if path == b"." else path + b"/"
            todo += [(prefix + name, child) for name, child in (node.children or {}).items()]
        tree = {}
        for path, node in found.items():
            what = node.expected
            if node.opaque:
                what = replace(what, xattrs={**what.xattrs, "trusted.overlay.opaque": b"y"})
            first = min(names[id(node)])
            same_as = first if first != path else None
            tree[path] = replace(what, nlink=len(names[id(node)]), same_as=same_as)
        return tree

    def _resolved(self, node: _Node) -> _Node:
        """What a link that came before its target leads to in the end."""
        seen: list[_Node] = []
        while node.pending is not None:
            if node in seen:
                raise Refused("hard links in a circle")
            seen.append(node)
            found = self._at(node.pending)
            if found is None:
                raise Refused("hard link to nothing")
            if found.children is not None:
                raise Refused("hard link to a directory")
            node = found
        return node


def _clean(path: bytes) -> list[bytes]:
    parts: list[bytes] = []
    for part in path.split(b"/"):
        if part == b"..":
            parts = parts[:-1]
        elif part not in (b"", b"."):
            parts.append(part)
    return parts
