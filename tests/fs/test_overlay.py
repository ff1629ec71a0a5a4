"""overlayfs mounts by both ways of telling the kernel about directories, whichever this kernel would be given."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from afs.core.mounts import list_mounts, unmount
from afs.snapshotter import overlay
from tests.testbed import capabilities

pytestmark = pytest.mark.root

LAYERS = 128  # what containerd has at most


@pytest.fixture(params=["fds", "page"])
def way(request: pytest.FixtureRequest) -> overlay.Way:
    """Each way that this kernel has."""
    if request.param == "fds" and overlay.best_way() != "fds":
        capabilities.unavailable("overlayfs that takes descriptors (Linux 6.13)")
    wanted: overlay.Way = request.param
    return wanted


@pytest.fixture
def merged(tmp_path: Path) -> Iterator[Path]:
    """A directory to mount at."""
    at = tmp_path / "merged"
    at.mkdir()
    yield at
    unmount(str(at))


def layers(top: Path, count: int) -> list[Path]:
    """Directories, topmost first, each with a file of its own and one that all have."""
    found = []
    for number in range(count):
        path = top / f"layer-{number}"
        path.mkdir(parents=True)
        (path / f"only-{number}").touch()
        (path / "same").write_text(str(number))
        found.append(path)
    return found


def check_root(merged: Path, lower: Sequence[Path], upper: Path) -> None:
    """The files of all layers, the topmost one's content, and writes in `upper`."""
    assert {path.name for path in merged.iterdir()} == {"same", *(f"only-{number}" for number in range(len(lower)))}
    assert (merged / "same").read_text() == "0"
    (merged / "new").touch()
    assert (upper / "new").exists()
    (found,) = (mount for mount in list_mounts(str(merged)) if mount.target == str(merged))
    assert (found.fstype, found.source) == ("overlay", overlay.SOURCE)


@pytest.mark.parametrize(
    "name", ["co:lon", "com,ma", "back\\slash", "sp ace", "new\nline", "a\\:b,c", "return\r", "ü\udcff"]
)
def test_odd_names_mount(tmp_path: Path, merged: Path, name: str, way: overlay.Way) -> None:
    top = tmp_path / name
    upper, work = top / "upper", top / "work"
    lower = layers(top, 2)
    upper.mkdir()
    work.mkdir()
    overlay.mount_overlay(merged, lower, upper, work, way=way)
    check_root(merged, lower, upper)


def test_128_layers_below_a_long_directory(tmp_path: Path, merged: Path, way: overlay.Way) -> None:
    top = tmp_path / ("x" * 200) / ("y" * 200)
    upper, work = top / "upper", top / "work"
    lower = layers(top, LAYERS)
    upper.mkdir()
    work.mkdir()
    here = Path.cwd()
    descriptors = len(os.listdir("/proc/self/fd"))
    overlay.mount_overlay(merged, lower, upper, work, way=way)
    assert (Path.cwd(), len(os.listdir("/proc/self/fd"))) == (here, descriptors)
    check_root(merged, lower, upper)


def test_as_many_layers_as_overlayfs_takes(tmp_path: Path, merged: Path, way: overlay.Way) -> None:
    lower = layers(tmp_path / ("x" * 200), overlay.MAX_LAYERS)
    overlay.mount_overlay(merged, lower, way=way)
    assert len(list(merged.iterdir())) == overlay.MAX_LAYERS + 1
    with pytest.raises(OSError, match="Read-only"):
        (merged / "new").touch()


@pytest.mark.parametrize("count", [2, LAYERS])
def test_what_fails_is_told_and_leaves_nothing(tmp_path: Path, merged: Path, way: overlay.Way, count: int) -> None:
    lower = layers(tmp_path / ("x" * 200), count)
    upper = tmp_path / "upper"
    upper.mkdir()
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError):
        overlay.mount_overlay(merged, [*lower, tmp_path / "none"], way=way)
    with pytest.raises(OSError, match=r"Invalid argument|Too many levels"):  # work within upper
        (upper / "work").mkdir()
        overlay.mount_overlay(merged, lower, upper, upper / "work", way=way)
    assert list_mounts(str(merged)) == []
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_marks_of_a_user_namespace(tmp_path: Path, way: overlay.Way) -> None:
    """There trusted.* cannot be read, so opaque directories are marked by user.overlay.opaque."""
    for name in ("upper", "work", "merged", "top/dir", "lower/dir"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "lower/dir/hidden").touch()
    (tmp_path / "top/dir/new").touch()
    os.setxattr(tmp_path / "top/dir", "user.overlay.opaque", b"y")
    script = f"""
import os
from pathlib import Path
from afs.snapshotter import overlay
top = Path({str(tmp_path)!r})
assert overlay.in_user_namespace()
overlay.mount_overlay(top / "merged", [top / "top", top / "lower"], top / "upper", top / "work", way={way!r})
assert os.listdir(top / "merged/dir") == ["new"], os.listdir(top / "merged/dir")
(top / "merged/dir/written").touch()
"""
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*unshare, "true"], check=False, capture_output=True).returncode:
        capabilities.unavailable("user namespaces")
    done = subprocess.run([*unshare, sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "upper/dir/written").exists()
