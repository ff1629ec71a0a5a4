"""The diff of a run, on a real overlay: applied to a copy of the image it has to give what the run saw."""

import gzip
import io
import os
import shutil
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from afs.afslet.diff import Diff
from afs.core.mounts import unmount
from afs.snapshotter.overlay import mount_overlay

pytestmark = pytest.mark.root


@dataclass(slots=True)
class Overlay:
    """A run's root."""

    lower: list[Path]
    upper: Path
    merged: Path

    def diff(self) -> bytes:
        """The tar."""
        chunks = list(Diff(self.upper, self.lower).chunks())
        assert all(0 < len(chunk) < 3 << 19 for chunk in chunks)
        return gzip.decompress(b"".join(chunks))

    def members(self) -> dict[str, tarfile.TarInfo]:
        """The entries of the tar by name."""
        with tarfile.open(fileobj=io.BytesIO(self.diff())) as tar:
            return {member.name: member for member in tar}


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Overlay]:
    """An image of two layers with some files, and an empty directory over them."""
    top, bottom = tmp_path / "top", tmp_path / "bottom"
    for name in ("keep", "gone", "changed", "moved", "dir/a", "dir/sub/b", "replaced/old", "opaque/old"):
        path = bottom / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (bottom / "link").symlink_to("keep")
    (top / "dir").mkdir(parents=True)
    (top / "dir" / "top").write_text("top")
    upper, work, merged = (tmp_path / name for name in ("upper", "work", "merged"))
    for path in (upper, work, merged):
        path.mkdir()
    mount_overlay(merged, [top, bottom], upper, work)
    try:
        yield Overlay([top, bottom], upper, merged)
    finally:
        unmount(str(merged))


def apply(tar: bytes, target: Path) -> None:
    """Apply an OCI layer to a directory, by the words of layer.md; not with the code under test."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        for member in archive:
            path = target / member.name
            if path.name == ".wh..wh..opq":
                for entry in path.parent.iterdir():
                    shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
                continue
            if path.name.startswith(".wh."):
                gone = path.with_name(path.name[4:])
                shutil.rmtree(gone) if gone.is_dir() and not gone.is_symlink() else gone.unlink(missing_ok=True)
                continue
            if (path.is_dir() and not path.is_symlink()) != member.isdir() and path.exists():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            elif path.is_symlink() or path.is_file():
                path.unlink()
            archive.extract(member, target, filter="fully_trusted")
            for key, value in member.pax_headers.items():
                if key.startswith("SCHILY.xattr."):
                    os.setxattr(path, key[13:], value.encode("utf-8", "surrogateescape"), follow_symlinks=False)


def facts(top: Path) -> dict[bytes, object]:
    """What counts of every path below *top*."""
    found: dict[bytes, object] = {}
    inodes: dict[int, bytes] = {}
    for directory, directories, files in os.walk(os.fsencode(top)):
        for name in sorted(directories + files):
            path = os.path.join(directory, name)
            status, short = os.lstat(path), os.path.relpath(path, os.fsencode(top))
            content: object = None
            if stat.S_ISREG(status.st_mode):
                with open(path, "rb") as file:
                    content = file.read()
            elif stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            same = inodes.setdefault(status.st_ino, short) if status.st_nlink > 1 and content is not None else short
            xattrs = {n: os.getxattr(path, n, follow_symlinks=False) for n in os.listxattr(path, follow_symlinks=False)}
            rdev = status.st_rdev if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode) else 0
            found[short] = (status.st_mode, status.st_uid, status.st_gid, content, xattrs, rdev, same)
    return found


def check(root: Overlay, tmp_path: Path) -> None:
    """The diff on a copy of the image gives the merged tree."""
    copy = tmp_path / "copy"
    shutil.copytree(root.lower[1], copy, symlinks=True)
    shutil.copytree(root.lower[0], copy, symlinks=True, dirs_exist_ok=True)
    apply(root.diff(), copy)
    assert facts(copy) == facts(root.merged)


def test_nothing_changed(root: Overlay) -> None:
    assert root.members() == {}


def test_every_kind_of_change(root: Overlay, tmp_path: Path) -> None:
    merged = root.merged
    (merged / "changed").write_text("new")
    (merged / "gone").unlink()
    (merged / "moved").rename(merged / "dir" / "here")
    (merged / "new").mkdir(mode=0o1777)
    (merged / "new" / "file").write_bytes(bytes(range(256)))
    os.link(merged / "new" / "file", merged / "new" / "twin")
    os.chown(merged / "new" / "file", 70000, 80000)
    (merged / "new" / "link").symlink_to("/absolute/nowhere")
    os.mkfifo(merged / "new" / "fifo", 0o600)
    os.mknod(merged / "new" / "device", stat.S_IFCHR | 0o620, os.makedev(1, 3))
    os.setxattr(merged / "new" / "file", "user.binary", b"\x00\xff\n=")
    os.setxattr(merged / "keep", "user.only", b"xattr")
    shutil.rmtree(merged / "replaced")
    (merged / "replaced").write_text("now a file")
    shutil.rmtree(merged / "opaque")
    (merged / "opaque").mkdir()
    (merged / "opaque" / "fresh").write_text("fresh")
    (merged / "link").unlink()
    (merged / "link").mkdir()
    members = root.members()
    assert {name for name in members if "/.wh." in f"/{name}"} == {".wh.gone", ".wh.moved", "opaque/.wh..wh..opq"}
    assert members["new/twin"].islnk()
    assert members["new/twin"].linkname == "new/file"
    check(root, tmp_path)


def test_deleting_in_the_top_layer(root: Overlay, tmp_path: Path) -> None:
    (root.merged / "dir" / "top").unlink()
    shutil.rmtree(root.merged / "dir" / "sub")
    assert set(root.members()) == {"dir", "dir/.wh.top", "dir/.wh.sub"}
    check(root, tmp_path)


def test_new_directories_carry_no_opaque_mark(root: Overlay) -> None:
    """overlayfs marks every new directory; where the image has none, the mark would say nothing."""
    (root.merged / "new" / "deep").mkdir(parents=True)
    assert set(root.members()) == {"new", "new/deep"}


def test_names_that_are_no_text(root: Overlay, tmp_path: Path) -> None:
    name = os.fsencode(root.merged) + b"/odd\xff\n\xc3"
    with open(name, "wb") as file:
        file.write(b"x")
    os.symlink(b"\xfe", os.fsencode(root.merged) + b"/" + b"long" * 60)
    (root.merged / "ü").touch()
    check(root, tmp_path)


def test_times_keep_their_nanoseconds(root: Overlay) -> None:
    path = root.merged / "changed"
    path.write_text("x")
    os.utime(path, ns=(0, 1_600_000_000_123_456_789))
    member = root.members()["changed"]
    assert member.pax_headers["mtime"] == "1600000000.123456789"


def test_sockets_are_left_out(root: Overlay) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(root.merged / "s"))
    assert root.members() == {}


def test_a_big_file_streams(root: Overlay) -> None:
    size = 50_000_000
    with (root.merged / "big").open("wb") as file:
        for _ in range(size // 1_000_000):
            file.write(os.urandom(1_000_000))
    chunks = Diff(root.upper, root.lower).chunks()
    first = next(chunks)
    assert 1 << 18 <= len(first) < 3 << 19  # it comes before the file was read
    rest = [len(chunk) for chunk in chunks]
    assert max(rest) < 3 << 19
    assert len(first) + sum(rest) > size


def test_links_to_directories_are_not_followed(root: Overlay) -> None:
    (root.merged / "out").symlink_to("/etc")
    found = root.members()
    assert found["out"].linkname == "/etc"
    assert not [name for name in found if name.startswith("out/")]


def test_attributes_that_no_layer_can_express_are_left_out(root: Overlay) -> None:
    (root.merged / "new").write_text("x")
    os.setxattr(root.merged / "new", b"user.\xff", b"1")
    os.setxattr(root.merged / "new", "user.good", b"2")
    assert root.members()["new"].pax_headers["SCHILY.xattr.user.good"] == "2"
