"""Compares two directory trees in everything that a filesystem tells about them.

A witness for unpackers: it knows nothing about layers. Paths are bytes, for names in layers need not be UTF-8. Left out
is what no tar carries and every filesystem has its own way with: the size and the number of links of directories,
inode numbers (hard links are compared as groups of paths), blocks, atime and ctime.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, NamedTuple

from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

_READ = 1 << 20
_SHOWN = 20
"""Differences that a failed assertion lists."""


@dataclass(frozen=True)
class Seen:
    """One path of a tree."""

    type: str
    """One letter, as ls(1) has it; "?" for a name that its directory lists but nobody can look up."""
    mode: int
    """The low 12 bits."""
    uid: int
    gid: int
    mtime: int
    """In ns."""
    size: int | None
    """In bytes; None for directories."""
    nlink: int | None
    """None for directories."""
    links: tuple[bytes, ...]
    """All paths of the inode in this tree, where there is more than one."""
    rdev: tuple[int, int] | None
    """Major and minor of devices."""
    target: bytes | None
    """Of symlinks."""
    xattrs: Mapping[str, bytes]
    content: str | None
    """sha256 of regular files, in hex."""


GHOST = Seen("?", 0, 0, 0, 0, None, None, (), None, None, {}, None)


class Difference(NamedTuple):
    """One field of one path; `field` is "missing" or "surplus" where only one tree has the path."""

    path: bytes
    field: str
    left: object = None
    right: object = None

    @override
    def __str__(self) -> str:
        name = os.fsdecode(self.path).encode("utf-8", "backslashreplace").decode()
        if self.field in {"missing", "surplus"}:
            return f"{name}: {self.field}"
        return f"{name}: {self.field} {_shown(self.left)}, expected {_shown(self.right)}"


def look(root: str | os.PathLike[str] | bytes) -> dict[bytes, Seen]:
    """Everything at and below a directory, by path; the directory itself is `.`.

    Raises:
        OSError: something in it could not be read.

    """
    start = os.fsencode(root)
    found: dict[bytes, tuple[bytes, os.stat_result | None]] = {b".": (start, os.lstat(start))}
    found.update({path: (full, status) for path, full, status in _walk(start, b"")})
    groups: dict[tuple[int, int], list[bytes]] = {}
    for path, (_, status) in found.items():
        if status is not None and not stat.S_ISDIR(status.st_mode) and status.st_nlink > 1:
            groups.setdefault((status.st_dev, status.st_ino), []).append(path)
    links = {path: tuple(sorted(group)) for group in groups.values() if len(group) > 1 for path in group}
    return {
        path: GHOST if status is None else _seen(full, status, links.get(path, ()))
        for path, (full, status) in found.items()
    }


def differences(left: Mapping[bytes, Seen], right: Mapping[bytes, Seen]) -> list[Difference]:
    """How `left` differs from `right`, which is taken for the right one; sorted by path."""
    found = []
    for path in sorted(left.keys() | right.keys()):
        ours, theirs = left.get(path), right.get(path)
        if ours is None or theirs is None:
            found.append(Difference(path, "missing" if ours is None else "surplus"))
            continue
        if ours == theirs:
            continue
        if ours.type != theirs.type:  # nearly everything else follows from it
            found.append(Difference(path, "type", ours.type, theirs.type))
            continue
        for one in fields(Seen):
            was, wanted = getattr(ours, one.name), getattr(theirs, one.name)
            if was != wanted:
                found.append(Difference(path, one.name, was, wanted))
    return found


def assert_same(
    left: Mapping[bytes, Seen], right: Mapping[bytes, Seen], *, but: Iterable[tuple[bytes, str]] = ()
) -> None:
    """Fail with a list unless `left` is as `right`, apart from pairs of path and field in `but`, which must differ."""
    found = differences(left, right)
    expected = set(but)
    wrong = [str(one) for one in found if (one.path, one.field) not in expected]
    alike = sorted(expected - {(one.path, one.field) for one in found})
    wrong += [f"{os.fsdecode(path)!r}: {field} should differ, but does not" for path, field in alike]
    more = f"\n... and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    assert not wrong, f"{len(wrong)} differences:\n" + "\n".join(wrong[:_SHOWN]) + more


def directory_links(tree: Mapping[bytes, Seen]) -> dict[bytes, int]:
    """What `st_nlink` of each directory is where a filesystem counts as ext4 and EROFS do: 2 and one per subdirectory."""
    counts = {path: 2 for path, seen in tree.items() if seen.type == "d"}
    for path in counts.keys() - {b"."}:
        counts[path.rpartition(b"/")[0] or b"."] += 1
    return counts


def _walk(directory: bytes, prefix: bytes) -> Iterator[tuple[bytes, bytes, os.stat_result | None]]:
    with os.scandir(directory) as entries:
        listed = sorted(entries, key=lambda entry: entry.name)
    for entry in listed:
        path = prefix + entry.name
        try:
            status = os.lstat(entry.path)
        except FileNotFoundError:  # overlayfs lists whiteouts of directories that only one layer has
            yield path, entry.path, None
            continue
        # d_type comes from the directory, st_mode from the inode: a wrong index may have two minds.
        kinds = (entry.is_dir(follow_symlinks=False), entry.is_symlink(), entry.is_file(follow_symlinks=False))
        mode = status.st_mode
        assert kinds == (stat.S_ISDIR(mode), stat.S_ISLNK(mode), stat.S_ISREG(mode)), f"{entry.path!r}: wrong d_type"
        yield path, entry.path, status
        if stat.S_ISDIR(mode):
            yield from _walk(entry.path, path + b"/")


def _seen(path: bytes, status: os.stat_result, links: tuple[bytes, ...]) -> Seen:
    mode = status.st_mode
    is_directory, is_device = stat.S_ISDIR(mode), stat.S_ISCHR(mode) or stat.S_ISBLK(mode)
    return Seen(
        type=stat.filemode(mode)[0],
        mode=stat.S_IMODE(mode),
        uid=status.st_uid,
        gid=status.st_gid,
        mtime=status.st_mtime_ns,
        size=None if is_directory else status.st_size,
        nlink=None if is_directory else status.st_nlink,
        links=links,
        rdev=(os.major(status.st_rdev), os.minor(status.st_rdev)) if is_device else None,
        target=os.readlink(path) if stat.S_ISLNK(mode) else None,
        xattrs={
            name: os.getxattr(path, name, follow_symlinks=False)
            for name in sorted(os.listxattr(path, follow_symlinks=False))
        },
        content=_digest(path, status.st_size) if stat.S_ISREG(mode) else None,
    )


def _digest(path: bytes, size: int) -> str:
    digest = hashlib.sha256()
    if not size:  # a quarter of the time of a tree of 200,000 empty files
        return digest.hexdigest()
    with open(path, "rb", buffering=0) as file:
        while data := file.read(_READ):
            digest.update(data)
    return digest.hexdigest()


def _shown(value: object) -> str:
    text = oct(value) if isinstance(value, int) and 0 < value < 0o10000 else repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
