"""Random changes to a directory tree, of every kind that a filesystem knows: what a run may do to its root."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from collections.abc import Callable
    from pathlib import Path

_NAMES = (
    *(
        b"a",
        b"b",
        b"c",
        b"dir",
        b"lib",
        b"x.txt",
        b"\xc3\xbcml\xc3\xa4ut",
        b"no\xfftext",
        b"new\nline",
        b"sp ace",
        b"-dash",
    ),
    *(b"long" * 60, b"\xc3\xa4" * 120, b".hidden", b"wh.", b".w"),
)
_MAX_DEPTH = 6
_CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)  # cap_net_bind_service, revision 2
_ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", *entry)
    for entry in (
        (0x01, 7, 0xFFFFFFFF),
        (0x02, 5, 1234),
        (0x04, 5, 0xFFFFFFFF),
        (0x10, 5, 0xFFFFFFFF),
        (0x20, 4, 0xFFFFFFFF),
    )
)  # linux/posix_acl_xattr.h: user::rwx, user:1234:r-x, group::r-x, mask::r-x, other::r--


class Changer:
    """Changes a tree by chance; what it did is in `log`. Without `link_specials` devices and fifos have one name each."""

    def __init__(self, top: Path, rng: random.Random, *, link_specials: bool = True) -> None:
        self._link_specials = link_specials
        self._top = os.fsencode(top)
        self._rng = rng
        self.log: list[str] = []

    def change(self, count: int) -> None:
        """Make `count` changes. What the filesystem refuses, such as renaming a directory of the image, does not count."""
        kinds: tuple[tuple[Callable[[], object], int], ...] = (
            (self._file, 8),
            (self._directory, 6),
            (self._symlink, 2),
            (self._special, 1),
            (self._rewrite, 3),
            (self._attributes, 4),
            (self._xattr, 2),
            (self._link, 3),
            (self._rename, 3),
            (self._remove, 3),
            (self._remake, 2),
            (self._swap, 2),
        )
        done = 0
        while done < count:
            (action,) = self._rng.choices([kind for kind, _ in kinds], [weight for _, weight in kinds])
            try:
                action()
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
            else:
                done += 1

    def _all(self, wanted: Callable[[int], bool] = lambda _: True) -> list[bytes]:
        found = []
        for directory, directories, files in os.walk(self._top):
            found += [os.path.join(directory, name) for name in directories + files]
        return sorted(path for path in found if wanted(os.lstat(path).st_mode))

    def _pick(self, wanted: Callable[[int], bool] = lambda _: True) -> bytes:
        found = self._all(wanted)
        if not found:
            raise FileNotFoundError(errno.ENOENT, "nothing to change")
        return self._rng.choice(found)

    def _new(self) -> bytes:
        """A name that is free."""
        directory = self._rng.choice([self._top, *self._all(stat.S_ISDIR)])
        if directory[len(self._top) :].count(b"/") >= _MAX_DEPTH:
            directory = self._top
        path = os.path.join(directory, self._rng.choice(_NAMES))
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, "taken")
        return path

    def _note(self, what: str, *paths: bytes) -> None:
        self.log.append(f"{what} {' '.join(repr(path[len(self._top) :]) for path in paths)}")

    def _write(self, path: bytes, flags: int) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | flags, 0o644)
        try:
            os.write(fd, self._rng.randbytes(self._rng.choice((0, 1, 511, 512, 513, 5000, 100_000))))
            if self._rng.random() < 0.2:
                os.ftruncate(fd, self._rng.randrange(1 << 18))  # a hole, or less
        finally:
            os.close(fd)

    def _file(self) -> None:
        path = self._new()
        self._note("file", path)
        self._write(path, os.O_CREAT | os.O_EXCL)

    def _directory(self) -> None:
        path = self._new()
        self._note("directory", path)
        os.mkdir(path)

    def _symlink(self) -> None:
        path = self._new()
        self._note("symlink", path)
        os.symlink(self._rng.choice((b"a", b"/etc", b"../..", b"no\xfftext", b"t" * 300)), path)

    def _special(self) -> None:
        path = self._new()
        self._note("special", path)
        kind = self._rng.choice((stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK))
        os.mknod(path, kind | 0o640, os.makedev(1, self._rng.choice((3, 300_000))))

    def _rewrite(self) -> None:
        path = self._pick(stat.S_ISREG)
        self._note("rewrite", path)
        self._write(path, self._rng.choice((0, os.O_TRUNC, os.O_APPEND)))

    def _attributes(self) -> None:
        path = self._pick()
        self._note("attributes", path)
        if self._rng.random() < 0.5:
            os.chown(path, *self._rng.choices((0, 1000, 65534, 3_000_000), k=2), follow_symlinks=False)
        if not stat.S_ISLNK(os.lstat(path).st_mode) and self._rng.random() < 0.5:
            os.chmod(path, self._rng.choice((0o600, 0o755, 0o4755, 0o2775, 0o1777, 0o000)))
        if self._rng.random() < 0.5:
            when = self._rng.choice((0, 10**9, 1_600_000_000_123_456_789, -5 * 10**9, 9_000_000_000 * 10**9))
            os.utime(path, ns=(0, when), follow_symlinks=False)

    def _xattr(self) -> None:
        path = self._pick(lambda mode: stat.S_ISREG(mode) or stat.S_ISDIR(mode))
        self._note("xattr", path)
        key, value = self._rng.choice(
            (
                (b"user.text", b"value"),
                (b"user.binary", bytes(range(256))),
                (b"user.\xc3\xa4", b"="),
                (b"security.capability", _CAPABILITY),
                (b"system.posix_acl_access", _ACL),
            )
        )
        if key in os.listxattr(path, follow_symlinks=False):  # type: ignore[comparison-overlap]
            os.removexattr(path, key, follow_symlinks=False)
        else:
            os.setxattr(path, key, value, follow_symlinks=False)

    def _link(self) -> None:
        source, path = self._pick(self._can_be_linked), self._new()
        self._note("link", source, path)
        os.link(source, path, follow_symlinks=False)

    def _can_be_linked(self, mode: int) -> bool:
        return stat.S_ISREG(mode) or stat.S_ISLNK(mode) or (self._link_specials and not stat.S_ISDIR(mode))

    def _rename(self) -> None:
        source, path = self._pick(), self._new()
        self._note("rename", source, path)
        os.rename(source, path)

    def _remove(self) -> None:
        path = self._pick()
        self._note("remove", path)
        _remove(path)

    def _remake(self) -> None:
        """An opaque directory, where the image has one."""
        path = self._pick(stat.S_ISDIR)
        self._note("remake", path)
        _remove(path)
        os.mkdir(path)
        with contextlib.suppress(FileExistsError):
            self._write(os.path.join(path, self._rng.choice(_NAMES)), os.O_CREAT | os.O_EXCL)

    def _swap(self) -> None:
        """A directory for something else, or the other way round."""
        path = self._pick()
        self._note("swap", path)
        was_directory = stat.S_ISDIR(os.lstat(path).st_mode)
        _remove(path)
        if was_directory:
            self._write(path, os.O_CREAT | os.O_EXCL)
        else:
            os.mkdir(path)


# EXDEV: a directory of a lower layer is not renamed; EINVAL: into itself; ENOTEMPTY: onto another one.
_REFUSED = {errno.ENOENT, errno.EEXIST, errno.EXDEV, errno.EINVAL, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.EMLINK}


def _remove(path: bytes) -> None:
    shutil.rmtree(path) if stat.S_ISDIR(os.lstat(path).st_mode) else os.unlink(path)
