"""Uploads: what a client sends stays in the staging directory, and fits the image."""

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from afs.afslet.placing import Attributes, UploadRefused
from afs.afslet.upload import Staging, check_path
from afs.core.errors import InvalidArgument

ME, MINE = os.getuid(), os.getgid()


def attributes(mode: int = 0, mtime: int = 1000) -> Attributes:
    """Attributes that any user may set."""
    return Attributes(mode, ME, MINE, mtime)


@pytest.fixture
def staging(tmp_path: Path) -> Iterator[Staging]:
    """An empty staging directory."""
    made = Staging(tmp_path / "staging")
    yield made
    made.close()
    assert not (tmp_path / "staging").exists()


def put(staging: Staging, path: str, data: bytes = b"data", mode: int = 0, mtime: int = 1000) -> None:
    """A file."""
    staging.begin_file(path, attributes(mode, mtime))
    staging.write(data)
    staging.end_file()


def tree(top: Path) -> dict[str, str]:
    """Every path below *top*: d for directories, the target of links, the content of files."""
    found = {}
    for path in sorted(top.rglob("*")):
        name = str(path.relative_to(top))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        else:
            found[name] = "d" if path.is_dir() else path.read_text()
    return found


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a", b"a"),
        ("a/b", b"a/b"),
        ("./a//b/", b"a/b"),
        (".", b""),
        ("a/./b", b"a/b"),
        ("ü", "ü".encode()),
        ("...", b"..."),
    ],
)
def test_paths(path: str, expected: bytes) -> None:
    assert check_path(path) == expected


@pytest.mark.parametrize(
    ("path", "cause"),
    [
        ("", "not a path"),
        ("a\0b", "not a path"),
        ("/a", "the path is absolute; it has to be relative to the container's root"),
        ("..", "the path leads outside the container's root"),
        ("a/../b", "the path leads outside the container's root"),
        ("x" * 256, "the path is too long"),
        ("ab/" * 1500, "the path is too long"),
    ],
)
def test_bad_paths(path: str, cause: str) -> None:
    with pytest.raises(UploadRefused, match=f"^{re.escape(f'upload of {path!r} refused: {cause}')}$"):
        check_path(path)


def test_files_directories_and_links(staging: Staging) -> None:
    staging.add_directory("d", attributes(0o1777, 5))
    put(staging, "d/file", b"x" * 100_000, 0o4751, 7)
    put(staging, "implied/parents/file")
    staging.add_symlink("link", "/etc/passwd", attributes(mtime=9))
    staging.add_directory(".", attributes(0o700))
    staging.finish()
    top = staging.directory
    assert stat.S_IMODE((top / "d").stat().st_mode) == 0o1777
    status = (top / "d" / "file").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_mtime, status.st_size) == (0o4751, 7, 100_000)
    assert stat.S_IMODE((top / "implied" / "parents" / "file").stat().st_mode) == 0o644
    assert stat.S_IMODE((top / "implied").stat().st_mode) == 0o755
    assert (top / "link").readlink() == Path("/etc/passwd")
    assert (top / "link").lstat().st_mtime == 9
    assert stat.S_IMODE(top.stat().st_mode) == 0o755  # the root's attributes are the image's
    assert (staging.entries, staging.bytes) == (4, 100_004)


def test_the_last_entry_of_a_name_wins(staging: Staging) -> None:
    put(staging, "a", b"first")
    put(staging, "a", b"second")
    staging.add_symlink("b", "x", attributes())
    put(staging, "b", b"file")
    put(staging, "c", b"file")
    staging.add_symlink("c", "y", attributes())
    staging.add_directory("d", attributes())
    put(staging, "d/kept")
    staging.add_directory("d", attributes(0o700))
    assert tree(staging.directory) == {"a": "second", "b": "file", "c": "-> y", "d": "d", "d/kept": "data"}
    assert stat.S_IMODE((staging.directory / "d").stat().st_mode) == 0o700


def test_what_is_in_the_way_is_told(staging: Staging) -> None:
    put(staging, "file")
    staging.add_directory("dir", attributes())
    staging.add_symlink("link", "/tmp", attributes())
    for path, cause, add in (
        ("dir", "an uploaded directory is in the way", put),
        ("file/x", "it goes through an uploaded file or symlink", put),
        ("file/x/y", "it goes through an uploaded file or symlink", put),
    ):
        with pytest.raises(UploadRefused, match=f"upload of '{path}' refused: {cause}"):
            add(staging, path)
    with pytest.raises(UploadRefused, match="an uploaded file is in the way"):
        staging.add_directory("file", attributes())
    with pytest.raises(UploadRefused, match="an uploaded file is in the way"):
        staging.add_directory("link", attributes())


@pytest.mark.parametrize("path", ["link/x", "link/deep/x", "link2/x"])
def test_uploaded_links_are_not_followed(staging: Staging, tmp_path: Path, path: str) -> None:
    (tmp_path / "outside" / "deep").mkdir(parents=True)
    staging.add_symlink("link", str(tmp_path / "outside"), attributes())
    staging.add_symlink("link2", "../outside", attributes())
    cause = r"it goes through an uploaded (file or )?symlink"
    with pytest.raises(UploadRefused, match=cause):
        put(staging, path)
    with pytest.raises(UploadRefused, match=cause):
        staging.add_directory(path, attributes())
    assert tree(tmp_path / "outside") == {"deep": "d"}


def test_files_come_one_after_the_other(staging: Staging) -> None:
    with pytest.raises(InvalidArgument, match="file_chunk without file_begin"):
        staging.write(b"x")
    with pytest.raises(InvalidArgument, match="file_end without file_begin"):
        staging.end_file()
    with pytest.raises(UploadRefused, match="not a file name"):
        staging.begin_file(".", attributes())
    with pytest.raises(UploadRefused, match="a symlink needs a name and a target"):
        staging.add_symlink("x", "", attributes())
    staging.add_directory("d", attributes())
    staging.expect_end()
    staging.end_file()  # of the directory
    staging.begin_file("a", attributes())
    with pytest.raises(UploadRefused, match="upload of 'b' refused: the file before it was not ended"):
        staging.begin_file("b", attributes())
    with pytest.raises(UploadRefused, match="upload of 'a' refused: the upload ended in the middle of it"):
        staging.finish()


# Fitting it to the image


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image with merged /usr, as Debian has."""
    top = tmp_path / "image"
    (top / "usr" / "bin").mkdir(parents=True)
    (top / "usr" / "lib").mkdir()
    (top / "bin").symlink_to("usr/bin")
    (top / "lib").symlink_to("/usr/lib")
    (top / "up").symlink_to("../../../../usr")
    (top / "dangling").symlink_to("nowhere")
    (top / "tmp").mkdir()
    (top / "tmp").chmod(0o1777)
    os.utime(top / "tmp", (500, 500))
    return top


def test_uploads_follow_the_image_s_links(staging: Staging, image: Path) -> None:
    put(staging, "bin/a")
    put(staging, "usr/bin/b")
    put(staging, "lib/sub/c")
    put(staging, "up/bin/d")
    put(staging, "dangling/e")
    staging.settle(image)
    found = {name for name, kind in tree(staging.directory).items() if kind != "d"}
    assert found == {"usr/bin/a", "usr/bin/b", "usr/lib/sub/c", "usr/bin/d", "dangling/e"}
    assert not (staging.directory / "bin").exists()
    assert not (staging.directory / "up").exists()


def test_directories_merge(staging: Staging, image: Path) -> None:
    (image / "usr" / "bin" / "sub").mkdir()
    put(staging, "bin/sub/a")
    put(staging, "usr/bin/sub/b")
    staging.settle(image)
    assert set(tree(staging.directory / "usr" / "bin" / "sub")) == {"a", "b"}


def test_directories_that_the_client_did_not_describe_are_the_image_s(staging: Staging, image: Path) -> None:
    put(staging, "tmp/below/file")
    staging.settle(image)
    status = (staging.directory / "tmp").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_mtime) == (0o1777, 500)
    assert stat.S_IMODE((staging.directory / "tmp" / "below").stat().st_mode) == 0o755


def test_the_root_itself_stays_the_image_s(staging: Staging, image: Path) -> None:
    """Over the image the upload's top directory is the root."""
    image.chmod(0o711)
    os.setxattr(image, "user.root", b"1")
    os.setxattr(image / "tmp", "user.tmp", b"2")
    put(staging, "tmp/file")
    staging.settle(image)
    assert stat.S_IMODE(staging.directory.stat().st_mode) == 0o711
    assert os.getxattr(staging.directory, "user.root") == b"1"
    assert os.getxattr(staging.directory / "tmp", "user.tmp") == b"2"


def test_described_directories_keep_their_attributes(staging: Staging, image: Path) -> None:
    staging.add_directory("tmp", attributes(0o700, 111))
    put(staging, "tmp/file")
    staging.add_directory("bin/made", attributes(0o710, 222))
    put(staging, "bin/made/x")
    staging.settle(image)
    status = (staging.directory / "tmp").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_mtime) == (0o700, 111)
    status = (staging.directory / "usr" / "bin" / "made").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_mtime) == (0o710, 222)


@pytest.mark.parametrize("link", ["usr/bin", "usr", "usr/bin/x"])
def test_settling_does_not_follow_uploaded_links(staging: Staging, image: Path, tmp_path: Path, link: str) -> None:
    """The image's /bin leads to usr/bin, which the client has made a link to a directory of the host."""
    outside = tmp_path / "outside"
    (outside / "bin").mkdir(parents=True)
    staging.add_symlink(link, str(outside), attributes())
    put(staging, "bin/x/evil" if link == "usr/bin/x" else "bin/evil")
    with pytest.raises(UploadRefused):
        staging.settle(image)
    assert tree(outside) == {"bin": "d"}
