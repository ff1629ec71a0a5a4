"""Uploads copied into a root: the writable layer has them, the root looks as with a layer, and nothing leaves the root."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest

from afs.afslet.placing import Attributes, UploadRefused
from afs.afslet.upload import Staging
from afs.core.mounts import unmount
from afs.snapshotter.overlay import mount_overlay
from tests.testbed import mounts
from tests.testbed.treediff import Seen, assert_same, look

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.root


@dataclass(slots=True)
class Roots:
    """An image, an upload, and roots of both."""

    image: Path
    staging: Staging
    scratch: Path

    @contextlib.contextmanager
    def mounted(self, *extra: Path) -> Iterator[tuple[Path, Path]]:
        """A new writable root of the image below *extra*, and its upper directory."""
        made = [self.scratch / f"{name}{len(list(self.scratch.iterdir()))}" for name in ("upper", "work", "merged")]
        for path in made:
            path.mkdir()
        upper, work, merged = made
        mount_overlay(merged, [*extra, self.image], upper, work)
        try:
            yield merged, upper
        finally:
            unmount(str(merged))

    def put(self, path: str, data: bytes = b"uploaded", mode: int = 0) -> None:
        """Upload a file."""
        self.staging.add_file(path, Attributes(mode, 0, 0, 1000), data)


@pytest.fixture
def roots(tmp_path: Path) -> Iterator[Roots]:
    """An image with merged /usr and some files; nothing uploaded yet."""
    image, scratch = tmp_path / "image", tmp_path / "scratch"
    scratch.mkdir()
    (image / "usr" / "bin").mkdir(parents=True)
    (image / "usr" / "bin" / "tool").write_text("image")
    (image / "bin").symlink_to("usr/bin")
    (image / "abs").symlink_to("/usr")
    (image / "out").symlink_to("../../../../usr")
    (image / "dangling").symlink_to("nowhere")
    (image / "file").write_text("image")
    os.link(image / "file", image / "twin")
    (image / "link").symlink_to("file")
    (image / "tmp").mkdir()
    (image / "tmp").chmod(0o1777)
    os.utime(image / "tmp", (500, 500))
    staging = Staging(tmp_path / "staging")
    yield Roots(image, staging, scratch)
    staging.close()


def without_times(tree: dict[bytes, Seen]) -> dict[bytes, Seen]:
    """A tree without the times of directories, which change with every entry; hard links of lower files may have broken."""
    return {
        path: replace(one, mtime=0 if one.type == "d" else one.mtime, nlink=None, links=())
        for path, one in tree.items()
    }


def test_both_ways_give_the_same_root(roots: Roots) -> None:
    roots.put("bin/tool", b"uploaded", 0o4755)
    roots.put("abs/bin/other")
    roots.put("out/bin/third")
    roots.put("dangling/inside")
    roots.put("file", b"x" * 3_000_000)
    roots.put("link")  # a symlink of the image is replaced, not followed
    roots.put("tmp/below/deep")
    roots.staging.add_symlink("usr/new", "../file", Attributes(0, 7, 8, 900))
    roots.staging.add_directory("made", Attributes(0o2750, 5, 6, 700))
    roots.put("made/in")
    roots.staging.add_directory(
        "bin", Attributes(0o700, 5, 6, 700)
    )  # a symlink of the image: its target stays as it is
    with roots.mounted() as (copied, upper):
        roots.staging.place_into(copied)
        ours = look(copied)
        assert (upper / "file").stat().st_size == 3_000_000
        assert stat.S_IMODE((upper / "usr" / "bin" / "tool").stat().st_mode) == 0o4755
        assert (upper / "made").stat().st_mtime == 700
        assert (copied / "twin").read_text() == "image"
        assert not (upper / "bin").exists()
    roots.staging.settle(roots.image)
    with roots.mounted(roots.staging.directory) as (layered, _):
        assert_same(without_times(ours), without_times(look(layered)))


def test_nothing_uploaded_changes_nothing(roots: Roots) -> None:
    with roots.mounted() as (copied, upper):
        roots.staging.place_into(copied)
        assert list(upper.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "cause"),
    [
        ("usr", "the image has a directory there"),
        ("file/below", "the image has a file there, not a directory"),
        ("link/below", "the image has a file there, not a directory"),
    ],
)
def test_what_the_image_has_in_the_way(roots: Roots, path: str, cause: str) -> None:
    roots.put(path)
    with roots.mounted() as (copied, _), pytest.raises(UploadRefused, match=cause):
        roots.staging.place_into(copied)


def test_a_described_directory_of_the_image_gets_its_attributes(roots: Roots) -> None:
    roots.staging.add_directory("tmp", Attributes(0o750, 3, 4, 800))
    roots.put("tmp/file")
    with roots.mounted() as (copied, _):
        roots.staging.place_into(copied)
        status = (copied / "tmp").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_mtime) == (0o750, 3, 4, 800)


def test_nothing_is_written_outside(roots: Roots, tmp_path: Path) -> None:
    """The image leads `evil` to a directory of the host; inside of the root that one does not exist."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (roots.image / "evil").symlink_to(outside)
    roots.put("evil/x")
    with roots.mounted() as (copied, _):
        roots.staging.place_into(copied)
        assert (copied / "evil").is_dir()
        assert not (copied / "evil").is_symlink()
    assert list(outside.iterdir()) == []


def test_shifted_owners(roots: Roots) -> None:
    """In a root that is really shifted: tests/system/test_round_trips.py."""
    roots.put("new/file")
    roots.staging.add_symlink("new/link", "file", Attributes(0, 7, 8, 900))
    with roots.mounted() as (copied, _):
        roots.staging.place_into(copied, 100_000)
        owners = {name: (copied / name).lstat() for name in ("new", "new/file", "new/link")}
    assert {name: (one.st_uid, one.st_gid) for name, one in owners.items()} == {
        "new": (100_000, 100_000),
        "new/file": (100_000, 100_000),
        "new/link": (100_007, 100_008),
    }


def test_a_full_disk_is_told(roots: Roots, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounts.mount("tmpfs", small, "tmpfs", "size=1m")
    try:
        roots.scratch = small
        roots.put("big", bytes(3 << 20))
        with roots.mounted() as (copied, _), pytest.raises(OSError, match="No space left") as caught:
            roots.staging.place_into(copied)
        assert caught.value.errno == errno.ENOSPC
    finally:
        mounts.umount_below(small)
