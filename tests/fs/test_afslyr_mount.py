"""The kernel's view of a converted layer: every kind of entry, mounted and compared."""

import io
import os
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from afs.layerstore.afslyr.convert import convert
from tests.testbed import largelayers, mounts, ourroots, tars, treediff

pytestmark = pytest.mark.root


@contextmanager
def mounted(layer: Path, at: Path) -> Iterator[bytes]:
    """*layer* mounted at *at*, as a path of bytes."""
    at.mkdir()
    subprocess.run(["mount", "-t", "erofs", "-o", "ro", layer, at], check=True)
    try:
        yield os.fsencode(at)
    finally:
        subprocess.run(["umount", at], check=True)


def make(tmp_path: Path, tar: bytes) -> Path:
    """*tar* as a layer file."""
    out = tmp_path / "layer.afslyr"
    convert(io.BytesIO(tar).read, out)
    return out


def xattrs_of(path: bytes) -> dict[str, bytes]:
    """All extended attributes that root sees."""
    return {name: os.getxattr(path, name, follow_symlinks=False) for name in os.listxattr(path, follow_symlinks=False)}


def seen(root: bytes, path: bytes) -> tars.Expected:
    """What stands at *path* below *root*."""
    full = os.path.join(root, path)
    found = os.lstat(full)
    kind = stat.S_IFMT(found.st_mode)
    is_device = kind in {stat.S_IFCHR, stat.S_IFBLK}
    content = b""
    if kind == stat.S_IFREG:
        content = Path(os.fsdecode(full)).read_bytes()
        assert found.st_size == len(content)
    return tars.Expected(
        mode=found.st_mode,
        uid=found.st_uid,
        gid=found.st_gid,
        mtime_ns=found.st_mtime_ns,
        content=content,
        target=os.readlink(full) if kind == stat.S_IFLNK else None,
        device=(os.major(found.st_rdev), os.minor(found.st_rdev)) if is_device else (0, 0),
        nlink=1 if kind == stat.S_IFDIR else found.st_nlink,
        xattrs=xattrs_of(full),
    )


def all_paths(root: bytes) -> set[bytes]:
    """Every path below *root*, and the root as ``.``."""
    found = {b"."}
    for here, directories, files in os.walk(root):
        found |= {os.path.relpath(os.path.join(here, name), root) for name in directories + files}
    return found


def test_every_kind_of_entry_is_mounted_as_it_was_packed(tmp_path: Path) -> None:
    tar, expected = tars.every_kind()
    with mounted(make(tmp_path, tar), tmp_path / "mnt") as root:
        assert all_paths(root) == expected.keys()
        for path, wanted in expected.items():
            found = seen(root, path)
            if wanted.same_as is not None:
                assert os.path.samestat(
                    os.lstat(os.path.join(root, path)), os.lstat(os.path.join(root, wanted.same_as))
                )
            assert found == replace(wanted, same_as=None), path


def test_directories_have_a_link_per_subdirectory(tmp_path: Path) -> None:
    tar = tars.tar_of({"a/x": None, "a/y": None, "a/y/z": None, "a/file": b""})
    with mounted(make(tmp_path, tar), tmp_path / "mnt") as root:
        assert [os.lstat(root + path).st_nlink for path in (b"", b"/a", b"/a/x", b"/a/y")] == [3, 4, 2, 3]


def test_all_directories_of_every_kind_have_their_links(tmp_path: Path) -> None:
    with mounted(make(tmp_path, tars.every_kind_tar()), tmp_path / "mnt") as root:
        wanted = treediff.directory_links(treediff.look(root))
        assert {path: os.lstat(os.path.join(root, path)).st_nlink for path in wanted} == wanted


@pytest.mark.parametrize("options", ["ro", "ro,loop"])
def test_mount_needs_nothing_of_afs(tmp_path: Path, options: str) -> None:
    """mount(8) alone does. Without "loop" it may mount the file itself or take a loop device: Debian 12's does the latter."""
    layer = make(tmp_path, tars.every_kind_tar())
    with ourroots.mounted(layer, tmp_path / "direct") as at:  # by mount(2), so the file itself
        direct = treediff.look(at)
    (tmp_path / "mnt").mkdir()
    subprocess.run(["mount", "-t", "erofs", "-o", options, layer, tmp_path / "mnt"], check=True)
    try:
        source = next(mount.source for mount in mounts.table() if mount.target == str(tmp_path / "mnt"))
        assert source.startswith("/dev/loop") or "loop" not in options
        treediff.assert_same(treediff.look(tmp_path / "mnt"), direct)
    finally:
        subprocess.run(["umount", tmp_path / "mnt"], check=True)


@pytest.mark.parametrize("tar", [b"", tars.END, tars.tar_of({"only": None})], ids=["nothing", "end", "directory"])
def test_small_tars_mount(tmp_path: Path, tar: bytes) -> None:
    with mounted(make(tmp_path, tar), tmp_path / "mnt") as root:
        assert os.listdir(root) == ([b"only"] if len(tar) > 1024 else [])


def test_a_whiteout_and_an_opaque_directory_work_under_overlayfs(tmp_path: Path) -> None:
    lower = tmp_path / "lower"
    (lower / "dir").mkdir(parents=True)
    (lower / "dir/hidden").touch()
    (lower / "gone").touch()
    (lower / "kept").touch()
    layer = make(tmp_path, tars.tar_of({".wh.gone": b"", "dir": None, "dir/.wh..wh..opq": b"", "dir/new": b""}))
    merged = tmp_path / "merged"
    merged.mkdir()
    with mounted(layer, tmp_path / "mnt") as root:
        options = f"lowerdir={os.fsdecode(root)}:{lower}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, merged], check=True)
        try:
            assert sorted(os.listdir(merged)) == ["dir", "kept"]
            assert os.listdir(merged / "dir") == ["new"]
        finally:
            subprocess.run(["umount", merged], check=True)


def test_large_directories_list_and_look_up(tmp_path: Path) -> None:
    names = [f"d/{'x' * (number % 200)}{number}" for number in range(20_000)]
    with mounted(
        make(tmp_path, b"".join(tars.file(name[:100]) for name in names) + tars.END), tmp_path / "mnt"
    ) as root:
        wanted = {name[:100][2:] for name in names}
        assert set(os.listdir(os.fsdecode(root) + "/d")) == wanted
        for name in sorted(wanted)[::37]:
            os.lstat(os.fsdecode(root) + "/d/" + name)


def test_a_directory_of_200_000_names_lists_and_looks_up(tmp_path: Path) -> None:
    with mounted(make(tmp_path, largelayers.many()), tmp_path / "mnt") as root:
        assert sorted(os.listdir(root + b"/many")) == [b"%06d" % number for number in range(largelayers.MANY)]
        for number in (*range(0, largelayers.MANY, 997), largelayers.MANY - 1):
            assert os.lstat(root + b"/many/%06d" % number).st_mtime == 2
        for missing in (b"", b"0", b"000000x", b"199999x", b"200000", b"zzz"):
            assert not os.path.lexists(root + b"/many/x" + missing)
