"""What a run changed, read from an overlayfs upper directory (Documentation/filesystems/overlayfs.rst).

Deleted: a character device 0:0, or an empty file with the attribute ``whiteout``; replaced directory: the attribute
``opaque``. Roots are mounted without metacopy and redirects, so everything else is what it seems.

The tree was written by untrusted code, which has ended: nothing in it moves any more. Symlinks are not followed.
"""

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from afs.afslet.difftar import Xattrs
from afs.afslet.globs import Globs
from afs.snapshotter.overlay import in_user_namespace

_PATH_MAX = 4096  # with the NUL; a process gets to what lies deeper only step by step
_OVERLAY = ("trusted.overlay.", "user.overlay.")  # overlayfs's own; which kind it obeys is a matter of the mount
_CAPABILITY = "security.capability"  # others of security.* are labels of the node's own policy, such as SELinux's
_MARK = b".wh."


class Kind(Enum):
    """What a change is."""

    NODE = "node"  # a new or changed file of any type
    WHITEOUT = "whiteout"
    OPAQUE = "opaque"


@dataclass(frozen=True, slots=True)
class Change:
    """*name* is relative to the root ("" is the root itself), *path* where it lies."""

    kind: Kind
    name: bytes
    path: bytes
    status: os.stat_result
    xattrs: Xattrs = ()


@dataclass(slots=True)
class Omissions:
    """What a layer cannot express: how many entries, and the first one with the reason."""

    count: int = 0
    first: str = ""

    def add(self, name: bytes, why: str) -> None:
        """Note one."""
        self.count += 1
        if not self.first:
            shown = os.fsdecode(name).encode(errors="replace").decode()
            self.first = f"{shown[:200]!r} {why}"

    def line(self) -> str:
        """For people; empty if nothing was left out."""
        more = f" and {self.count - 1} more" if self.count > 1 else ""
        return f"left out: {self.first}{more}" if self.count else ""


@dataclass(slots=True)
class _Directory:
    """One directory on the way down. *change* waits until something below it is wanted, if it is not wanted itself."""

    name: bytes
    names: list[bytes]
    lower: list[bytes]  # directories of the image that it is merged with
    wanted: bool
    change: Change | None = None
    next: int = 0


@dataclass(slots=True)
class Walk:
    """All changes below *upper*, parents first, in the order of their names. *lower*: directories below it, topmost first.

    Only what *include* means (everything if it is empty) and *exclude* does not; a pattern that means a directory means all
    below it. Directories above what is wanted come, too.
    """

    upper: Path
    lower: Sequence[Path]
    include: Globs = field(default_factory=lambda: Globs(()))
    exclude: Globs = field(default_factory=lambda: Globs(()))
    omitted: Omissions = field(default_factory=Omissions)
    _marks: str = field(default_factory=lambda: _OVERLAY[in_user_namespace()])
    _stack: list[_Directory] = field(default_factory=list)

    def changes(self) -> Iterator[Change]:
        """Blocking; OSError if the tree cannot be read. Iterative: runs may nest deeper than Python recurses."""
        top = os.fsencode(self.upper)
        lower = [os.fsencode(path) for path in self.lower]
        if (root := self._root(top, lower)) is not None and not self.include:
            yield root
        self._stack = [_Directory(b"", _names(top), lower, not self.include)]
        while self._stack:
            directory = self._stack[-1]
            if directory.next == len(directory.names):
                self._stack.pop()
                continue
            base = directory.names[directory.next]
            directory.next += 1
            name = directory.name + b"/" + base if directory.name else base
            path = top + b"/" + name
            if len(path) >= _PATH_MAX:
                self.omitted.add(name, "lies too deep")
                continue
            yield from self._one(directory, name, base, path)

    def is_empty(self) -> bool:
        """Whether nothing was changed at all, told by two system calls."""
        top = os.fsencode(self.upper)
        lower = [os.fsencode(path) for path in self.lower[:1]]
        return not os.listdir(top) and (bool(self.include) or self._root(top, lower) is None)

    def _root(self, top: bytes, lower: Sequence[bytes]) -> Change | None:
        """The root itself, if it has other attributes than the image's; its time changes with every entry in it."""
        status, (_, _, xattrs) = os.lstat(top), self._attributes(b"", top)
        if lower:
            before = os.lstat(lower[0])
            if (before.st_mode, before.st_uid, before.st_gid) == (status.st_mode, status.st_uid, status.st_gid):
                return Change(Kind.NODE, b"", top, status, xattrs) if xattrs else None
        return Change(Kind.NODE, b"", top, status, xattrs)

    def _one(self, directory: _Directory, name: bytes, base: bytes, path: bytes) -> Iterator[Change]:
        status = os.lstat(path)
        mode = status.st_mode
        is_directory = stat.S_ISDIR(mode)
        if stat.S_ISSOCK(mode):
            return
        if stat.S_ISCHR(mode) and status.st_rdev == 0:
            yield from self._whiteout(directory, name, base, path, status)
            return
        if self.exclude and self.exclude.match(os.fsdecode(name), is_directory):
            return
        wanted = directory.wanted or self.include.match(os.fsdecode(name), is_directory)
        opaque, hidden, xattrs = self._attributes(name, path, note=wanted)
        if hidden and stat.S_ISREG(mode) and not status.st_size:
            yield from self._whiteout(directory, name, base, path, status)
            return
        if base.startswith(_MARK):
            if wanted or is_directory:
                self.omitted.add(name, "begins with .wh., which means deleted files in a layer")
            return
        change = Change(Kind.NODE, name, path, status, xattrs)
        if wanted:
            yield from self._parents()
            yield change
        if is_directory:
            below = _directories(directory.lower, base)
            if opaque and below and wanted:
                yield Change(Kind.OPAQUE, name, path, status)
            self._stack.append(
                _Directory(name, _names(path), [] if opaque else below, wanted, None if wanted else change)
            )

    def _whiteout(
        self, directory: _Directory, name: bytes, base: bytes, path: bytes, status: os.stat_result
    ) -> Iterator[Change]:
        """A deleted file. Patterns are about what it was: a directory, if the image has one there."""
        text, was_directory = os.fsdecode(name), bool(_directories(directory.lower, base))
        if self.exclude.match(text, was_directory):
            return
        if directory.wanted or self.include.match(text, was_directory):
            yield from self._parents()
            yield Change(Kind.WHITEOUT, name, path, status)

    def _parents(self) -> Iterator[Change]:
        for directory in self._stack:
            if directory.change is not None:
                yield directory.change
                directory.change = None

    def _attributes(self, name: bytes, path: bytes, *, note: bool = True) -> tuple[bool, bool, Xattrs]:
        """Whether *path* is marked opaque, whether as deleted, and its attributes but for overlayfs's.

        *note*: those that a layer cannot hold count as left out.
        """
        try:
            keys = os.listxattr(path, follow_symlinks=False)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            return False, False, ()
        if not keys:
            return False, False, ()
        opaque = hidden = False
        kept = list[tuple[bytes, bytes]]()
        for key in sorted(keys):
            if key.startswith(_OVERLAY):
                # "x" only says that files with the attribute whiteout may be in it. The run itself may have set attributes
                # of the other kind: they mean nothing here, and would to whoever mounts the layer.
                opaque |= key == f"{self._marks}opaque" and os.getxattr(path, key, follow_symlinks=False) == b"y"
                hidden |= key == f"{self._marks}whiteout"
            elif key.startswith("security.") and key != _CAPABILITY:
                continue
            elif "=" in key or not _is_text(key):  # a record's key is UTF-8 and ends at the first "="
                if note:
                    self.omitted.add(name, f"has an attribute {key[:80].encode(errors='replace').decode()!r}")
            else:
                kept.append((key.encode(), os.getxattr(path, key, follow_symlinks=False)))
        return opaque, hidden, kept


def _is_text(name: str) -> bool:
    """Whether *name* came from valid UTF-8: Python maps other bytes to lone surrogates (PEP 383)."""
    return name.isprintable() or name.encode(errors="replace").decode() == name


def _names(path: bytes) -> list[bytes]:
    return sorted(os.listdir(path))


def _directories(lower: Sequence[bytes], base: bytes) -> list[bytes]:
    """Which of *lower* have a directory *base*. All above it was found to be a directory in the same way."""
    found = []
    for directory in lower:
        path = directory + b"/" + base
        try:
            if stat.S_ISDIR(os.lstat(path).st_mode):
                found.append(path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
    return found
