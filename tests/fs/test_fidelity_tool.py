"""The comparison of trees itself: it has to notice everything that it promises to."""

import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.testbed import mounts, tars, treediff, unpackers
from tests.testbed.treediff import GHOST, Difference, differences, look

pytestmark = pytest.mark.root

ODD = b"\xff\xfe name"


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs: not every filesystem below /tmp has all kinds of attributes."""
    with unpackers.tmpfs(tmp_path / "scratch") as at:
        yield at


def write_tree(root: Path) -> Path:
    """A tree with a file of each type, all times set; the same each time."""
    (root / "dir/sub").mkdir(parents=True)
    (root / "dir/file").write_bytes(b"content")
    os.link(root / "dir/file", root / "linked")
    (root / "alone").write_bytes(b"alone")
    (root / "empty").touch()
    (root / "link").symlink_to("target")
    os.mkfifo(root / "fifo")
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(root / "disk", stat.S_IFBLK | 0o660, os.makedev(8, 1))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(root / "socket"))
    os.mkdir(os.path.join(os.fsencode(root), ODD))
    os.setxattr(root / "alone", "user.one", b"1")
    settle(root)
    return root


def settle(root: Path) -> None:
    """Set all times, directories' too."""
    for here, directories, files in os.walk(os.fsencode(root)):
        for name in [*directories, *files, b"."]:
            os.utime(os.path.join(here, name), ns=(0, 1_700_000_000_000_000_001), follow_symlinks=False)


def relink(root: Path) -> None:
    """Let `linked` be a link to a copy: the same contents and the same number of links, another inode."""
    (root / "linked").unlink()
    (root / "linked").write_bytes(b"content")


CHANGES: dict[str, tuple[Callable[[Path], object], set[tuple[bytes, str]]]] = {
    "nothing": (lambda root: None, set()),
    "content": (lambda root: (root / "alone").write_bytes(b"ALONE"), {(b"alone", "content")}),
    "size": (lambda root: (root / "empty").write_bytes(b"x"), {(b"empty", "size"), (b"empty", "content")}),
    "missing": (lambda root: (root / "alone").unlink(), {(b"alone", "missing")}),
    "surplus": (lambda root: (root / "dir/sub/new").touch(), {(b"dir/sub/new", "surplus")}),
    "mode": (lambda root: (root / "alone").chmod(0o4644), {(b"alone", "mode")}),
    "directory's mode": (lambda root: (root / "dir").chmod(0o1755), {(b"dir", "mode")}),
    "root's mode": (lambda root: root.chmod(0o700), {(b".", "mode")}),
    "uid": (lambda root: os.chown(root / "alone", 1, -1), {(b"alone", "uid")}),
    "gid of a link": (lambda root: os.lchown(root / "link", -1, 1), {(b"link", "gid")}),
    "target": (lambda root: replace_link(root, "TARGET"), {(b"link", "target")}),
    "type": (lambda root: remake(root / "fifo", stat.S_IFREG | 0o644, 0), {(b"fifo", "type")}),
    "rdev": (lambda root: remake(root / "null", stat.S_IFCHR | 0o666, 5), {(b"null", "rdev")}),
    "kind of device": (lambda root: remake(root / "null", stat.S_IFBLK | 0o666, 3), {(b"null", "type")}),
    "broken link": (
        relink,
        {(path, field) for path in (b"linked", b"dir/file") for field in ("nlink", "links")},
    ),
    "more links": (
        lambda root: os.link(root / "alone", root / "dir/sub/more"),
        {(b"alone", "nlink"), (b"alone", "links"), (b"dir/sub/more", "surplus")},
    ),
    "xattr's value": (lambda root: os.setxattr(root / "alone", "user.one", b"2"), {(b"alone", "xattrs")}),
    "no xattr": (lambda root: os.removexattr(root / "alone", "user.one"), {(b"alone", "xattrs")}),
    "xattr of a link": (
        lambda root: os.setxattr(root / "link", "trusted.l", b"", follow_symlinks=False),
        {(b"link", "xattrs")},
    ),
    "ACL": (
        lambda root: os.setxattr(root / "dir", "system.posix_acl_default", tars.ACL),
        {(b"dir", "xattrs")},
    ),
    "capability": (
        lambda root: os.setxattr(root / "alone", "security.capability", tars.CAPABILITY),
        {(b"alone", "xattrs")},
    ),
}


def replace_link(root: Path, target: str) -> None:
    """Let `link` point elsewhere."""
    (root / "link").unlink()
    (root / "link").symlink_to(target)


def remake(path: Path, mode: int, minor: int) -> None:
    """Another file, perhaps a device."""
    path.unlink()
    os.mknod(path, mode, os.makedev(1, minor))


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_noticed(what: str, scratch: Path) -> None:
    change, expected = CHANGES[what]
    left, right = write_tree(scratch / "left"), write_tree(scratch / "right")
    change(left)
    settle(left)
    found = differences(look(left), look(right))
    assert {(one.path, one.field) for one in found} == expected


@pytest.mark.parametrize("name", [b".", b"dir", b"alone", b"link", b"fifo", b"null", ODD])
def test_a_nanosecond_is_noticed(name: bytes, scratch: Path) -> None:
    left, right = write_tree(scratch / "left"), write_tree(scratch / "right")
    os.utime(os.path.join(os.fsencode(left), name), ns=(0, 1_700_000_000_000_000_000), follow_symlinks=False)
    (found,) = differences(look(left), look(right))
    assert found == Difference(name, "mtime", 1_700_000_000_000_000_000, 1_700_000_000_000_000_001)


def test_links_within_one_inode_are_told_apart(scratch: Path) -> None:
    """Two pairs of names, crossed: every name has the same contents and number of links in both trees."""
    for tree, pairs in (("left", (("a", "b"), ("c", "d"))), ("right", (("a", "c"), ("b", "d")))):
        (scratch / tree).mkdir()
        for one, two in pairs:
            (scratch / tree / one).touch()
            os.link(scratch / tree / one, scratch / tree / two)
        settle(scratch / tree)
    found = differences(look(scratch / "left"), look(scratch / "right"))
    assert [(one.path, one.field) for one in found] == [(name, "links") for name in (b"a", b"b", b"c", b"d")]


def test_names_without_files_are_noticed(scratch: Path) -> None:
    """overlayfs lists a whiteout of a directory that only one layer has, but does not find it."""
    (scratch / "upper/dir").mkdir(parents=True)
    (scratch / "lower").mkdir()
    os.mknod(scratch / "upper/dir/ghost", stat.S_IFCHR, 0)
    (scratch / "merged").mkdir()
    mounts.mount("overlay", scratch / "merged", "overlay", f"lowerdir={scratch}/upper:{scratch}/lower")
    assert look(scratch / "merged")[b"dir/ghost"] == GHOST


def test_differences_read_well(scratch: Path) -> None:
    left, right = write_tree(scratch / "left"), write_tree(scratch / "right")
    (left / "alone").chmod(0o600)
    (right / "empty").unlink()
    os.rmdir(os.path.join(os.fsencode(left), ODD))
    settle(left)
    settle(right)
    with pytest.raises(AssertionError) as caught:
        treediff.assert_same(look(left), look(right), but={(b"linked", "uid")})
    assert str(caught.value).splitlines() == [
        "4 differences:",
        "alone: mode 0o600, expected 0o644",
        "empty: surplus",
        "\\udcff\\udcfe name: missing",
        "'linked': uid should differ, but does not",
    ]


def test_known_differences_are_left_out(scratch: Path) -> None:
    left, right = write_tree(scratch / "left"), write_tree(scratch / "right")
    (left / "alone").chmod(0o600)
    settle(left)
    treediff.assert_same(look(left), look(right), but={(b"alone", "mode")})


def test_links_of_directories_are_counted(scratch: Path) -> None:
    root = write_tree(scratch / "left")
    assert treediff.directory_links(look(root)) == {b".": 4, b"dir": 3, b"dir/sub": 2, ODD: 2}
    assert {path: os.lstat(os.path.join(os.fsencode(root), path)).st_nlink for path in (b".", b"dir", ODD)} == {
        b".": 4,
        b"dir": 3,
        ODD: 2,
    }
