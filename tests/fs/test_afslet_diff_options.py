"""What a diff may leave out, how large it may be, and what no layer can hold."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
import zstandard
from isal import isal_zlib

from afs.afslet.diff import Diff, DiffOptions
from afs.afslet.globs import Globs
from afs.core.errors import InvalidArgument
from afs.core.files import remove_tree
from afs.core.mounts import unmount
from afs.proto.v1 import afslet_pb2 as pb
from afs.snapshotter.overlay import mount_overlay

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.root


@dataclass(slots=True)
class Root:
    """A run's root over one directory."""

    lower: Path
    upper: Path
    merged: Path
    diff: Diff = field(init=False)

    def members(self, options: DiffOptions | None = None) -> dict[str, tarfile.TarInfo]:
        """The entries of the diff by name; `diff` tells more of it."""
        self.diff = Diff(self.upper, [self.lower], options)
        with tarfile.open(fileobj=io.BytesIO(isal_zlib.decompress(b"".join(self.diff.chunks()), 31))) as tar:
            found = tar.getmembers()
        assert len(found) == self.diff.entries
        return {member.name: member for member in found}

    def names(self, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> list[str]:
        """The names in the diff of what is included and not excluded, in order."""
        return list(self.members(DiffOptions(include=Globs(include), exclude=Globs(exclude))))


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Root]:
    """An image with some directories."""
    lower, upper, work, merged = (tmp_path / name for name in ("lower", "upper", "work", "merged"))
    for name in ("app/old.py", "app/build/old.o", "app/build/sub/old.o", "gone/x", "gone.log", "etc/conf"):
        (lower / name).parent.mkdir(parents=True, exist_ok=True)
        (lower / name).write_text(name)
    for path in (upper, work, merged):
        path.mkdir(mode=0o755)
    mount_overlay(merged, [lower], upper, work)
    try:
        yield Root(lower, upper, merged)
    finally:
        unmount(str(merged))


def write(root: Root, *names: str) -> None:
    """New files."""
    for name in names:
        (root.merged / name).parent.mkdir(parents=True, exist_ok=True)
        (root.merged / name).write_text(name)


def test_includes_bring_their_parents(root: Root) -> None:
    write(root, "app/new.py", "app/new.txt", "deep/er/x.py", "deep/y.txt", "other/z")
    assert root.names(include=("*.py",)) == ["app", "app/new.py", "deep", "deep/er", "deep/er/x.py"]
    assert root.names(include=("/deep/",)) == ["deep", "deep/er", "deep/er/x.py", "deep/y.txt"]
    assert root.names(include=("deep/*.txt", "other")) == ["deep", "deep/y.txt", "other", "other/z"]
    assert root.names(include=("nothing",)) == []


def test_exclusion_wins(root: Root) -> None:
    write(root, "app/new.py", "app/build/new.o", "x.log", "keep.log")
    assert root.names(exclude=("build/", "*.log")) == ["app", "app/new.py"]
    assert root.names(exclude=("*.log", "!keep.log"), include=("*.log",)) == ["keep.log"]
    assert root.names(include=("app/",), exclude=("*.py",)) == ["app", "app/build", "app/build/new.o"]


def test_whiteouts_match_by_what_they_hide(root: Root) -> None:
    (root.merged / "gone.log").unlink()
    shutil.rmtree(root.merged / "gone")
    (root.merged / "app" / "old.py").unlink()
    assert root.names() == ["app", "app/.wh.old.py", ".wh.gone", ".wh.gone.log"]
    assert root.names(include=("*.log",)) == [".wh.gone.log"]
    assert root.names(exclude=("gone/",)) == [
        "app",
        "app/.wh.old.py",
        ".wh.gone.log",
    ]  # the image has a directory there
    assert root.names(exclude=("*.log/",)) == ["app", "app/.wh.old.py", ".wh.gone", ".wh.gone.log"]
    assert root.names(include=(".wh.*",)) == []


def test_replaced_directories_are_marked_only_where_all_of_them_is_wanted(root: Root) -> None:
    shutil.rmtree(root.merged / "app" / "build")
    write(root, "app/build/new.o", "app/build/new.c")
    assert root.names() == ["app", "app/build", "app/build/.wh..wh..opq", "app/build/new.c", "app/build/new.o"]
    assert root.names(include=("*.c",)) == ["app", "app/build", "app/build/new.c"]


def test_links_to_what_is_left_out(root: Root) -> None:
    write(root, "a")
    os.link(root.merged / "a", root.merged / "b")
    os.link(root.merged / "a", root.merged / "c")
    members = root.members(DiffOptions(exclude=Globs(("a",))))
    assert list(members) == ["b", "c"]
    assert (members["b"].isreg(), members["b"].size, members["c"].linkname) == (True, 1, "b")


def test_a_diff_that_is_too_large_ends_before_the_entry_that_is_too_much(root: Root) -> None:
    for name in ("a", "b", "c"):
        (root.merged / name).write_bytes(os.urandom(100_000))
    members = root.members(DiffOptions(max_bytes=250_000))
    assert list(members) == ["a", "b"]
    assert members["b"].size == 100_000
    assert root.diff.error == "the diff is larger than 250000 bytes: it ends before 'c'"
    assert list(root.members(DiffOptions(max_bytes=310_000))) == ["a", "b", "c"]
    assert root.diff.error == ""
    assert root.members(DiffOptions(max_bytes=1)) == {}


def test_options_of_a_request() -> None:
    start = pb.StartRequest(diff_format=pb.DIFF_ZSTD, diff_include=["a"], diff_exclude=["b"], diff_max_bytes=7)
    options = DiffOptions.of(start)
    assert (options.format, options.max_bytes, options.name) == (pb.DIFF_ZSTD, 7, "writable-upper.tar.zst")
    assert DiffOptions.of(start, max_bytes=5).max_bytes == 5
    assert DiffOptions.of(pb.StartRequest(), max_bytes=5).max_bytes == 5
    assert DiffOptions.of(pb.StartRequest()).name == "writable-upper.tar.gz"
    assert DiffOptions.of(pb.StartRequest(diff_format=pb.DIFF_NONE)).name is None
    with pytest.raises(InvalidArgument, match="diff_exclude"):
        DiffOptions.of(pb.StartRequest(diff_exclude=["[a"]))


async def test_nothing_changed_takes_no_thread(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading.Thread, "start", None)
    for kind in (pb.DIFF_GZIP, pb.DIFF_ZSTD):
        diff = Diff(root.upper, [root.lower], DiffOptions(kind))
        chunks = [chunk async for chunk in diff.stream()]
        assert chunks == list(Diff(root.upper, [root.lower], DiffOptions(kind)).chunks())
        assert (diff.bytes, diff.entries, diff.error) == (len(chunks[0]), 0, "")


async def test_a_stream_is_the_same_as_its_chunks(root: Root) -> None:
    (root.merged / "big").write_bytes(os.urandom(5_000_000))
    write(root, "a/b", "c")
    streamed, plain = Diff(root.upper, [root.lower]), Diff(root.upper, [root.lower])
    assert [chunk async for chunk in streamed.stream()] == list(plain.chunks())
    assert (streamed.bytes, streamed.entries) == (plain.bytes, 4)


def test_names_that_mean_deletion_are_left_out_and_told(root: Root) -> None:
    write(root, ".wh.conf", "etc/.wh..wh..opq", "etc/.wh.d/x", "etc/fine")
    assert root.names() == ["etc", "etc/fine"]
    assert root.diff.error == ("left out: '.wh.conf' begins with .wh., which means deleted files in a layer and 2 more")


def test_what_is_not_wanted_is_not_told(root: Root) -> None:
    write(root, "etc/.wh.x", "etc/fine", "attribute")
    os.setxattr(root.merged / "attribute", "user.a=b", b"1")
    assert root.names(include=("fine",)) == ["etc", "etc/fine"]
    assert root.diff.error == ""
    assert root.names(exclude=(".wh.*", "attribute")) == ["etc", "etc/fine"]
    assert root.diff.error == ""


def test_what_lies_too_deep_is_left_out_and_told(root: Root) -> None:
    here = os.open(root.merged, os.O_RDONLY)
    try:
        for _ in range(20):
            os.mkdir(b"d" * 250, dir_fd=here)
            below = os.open(b"d" * 250, os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
    finally:
        os.close(here)
    assert 10 < len(root.names()) < 20
    assert root.diff.error.endswith(" lies too deep")
    remove_tree(root.upper / ("d" * 250))  # pytest could not


def test_attributes_that_are_not_for_layers(root: Root) -> None:
    write(root, "f", "etc/new")
    os.setxattr(root.merged / "f", "user.a=b", b"1")
    os.setxattr(root.merged / "f", "user.kept", b"2")
    # What the command says of its own in overlayfs's words for other mounts means nothing.
    os.setxattr(root.upper / "etc", "user.overlay.opaque", b"y")
    os.setxattr(root.upper / "f", "user.overlay.whiteout", b"")
    os.truncate(root.upper / "f", 0)
    members = root.members()
    assert list(members) == ["etc", "etc/new", "f"]
    assert {key for key in members["f"].pax_headers if "xattr" in key} == {"SCHILY.xattr.user.kept"}
    assert not [key for key in members["etc"].pax_headers if "xattr" in key]
    assert root.diff.error == "left out: 'f' has an attribute 'user.a=b'"


def test_whiteouts_that_are_attributes(root: Root) -> None:
    """The kernel's other way to say it, for overlayfs on overlayfs."""
    (root.upper / "etc").mkdir()
    os.setxattr(root.upper / "etc", "trusted.overlay.opaque", b"x")
    (root.upper / "etc" / "conf").touch()
    os.setxattr(root.upper / "etc" / "conf", "trusted.overlay.whiteout", b"")
    assert root.names() == ["etc", "etc/.wh.conf"]


def test_the_root_s_own_attributes(root: Root) -> None:
    assert root.names() == []
    root.merged.chmod(0o711)
    assert root.names() == ["."]
    assert root.members()["."].mode == 0o711
    assert root.names(include=("etc",)) == []


def test_holes_are_zeros(root: Root) -> None:
    with (root.merged / "sparse").open("wb") as file:
        file.truncate(50_000_000)
        for offset in (0, 10_000_000, 49_999_999):
            file.seek(offset)
            file.write(b"x")
    (root.merged / "hole").touch()
    os.truncate(root.merged / "hole", 3_000_000)
    chunks = b"".join(Diff(root.upper, [root.lower], DiffOptions(pb.DIFF_ZSTD)).chunks())
    with tarfile.open(fileobj=io.BytesIO(zstandard.ZstdDecompressor().decompressobj().decompress(chunks))) as tar:
        for name in ("sparse", "hole"):
            member = tar.extractfile(name)
            assert member is not None
            assert member.read() == (root.merged / name).read_bytes()
