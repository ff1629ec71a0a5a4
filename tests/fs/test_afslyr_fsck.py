"""erofs-utils as a witness of the index: fsck.erofs accepts every file and extracts what the kernel shows."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.testbed import capabilities, erofsutils, largelayers, layerkinds, numpyimage, tars, treediff, unpackers
from tests.testbed.ourroots import convert_bytes, convert_layer, mounted
from tests.testbed.treediff import look

pytestmark = pytest.mark.root

KINDS = {**layerkinds.KINDS, "every_kind": tars.every_kind_tar}
# fsck.erofs sets owners after capabilities, which that clears, and leaves out attributes without a value.
NOT_EXTRACTED = {
    "attributes": {(b"capability", "xattrs"), (b"capability3", "xattrs")},
    "empty_xattr": {(b"file", "xattrs")},
    "every_kind": {(b"x/file", "xattrs")},
}


@pytest.fixture(scope="module")
def fsck(cache_dir: Path) -> list[str]:
    """The command; where it is not to be had, tests are skipped with the reason."""
    try:
        return erofsutils.fsck(cache_dir)
    except (RuntimeError, LookupError) as error:
        capabilities.unavailable(f"an fsck.erofs for blocks of 512 bytes: {error}")


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs for what is extracted."""
    with unpackers.tmpfs(tmp_path / "scratch") as at:
        yield at


@pytest.mark.parametrize("kind", KINDS)
def test_fsck_agrees_with_the_kernel(kind: str, fsck: list[str], tmp_path: Path, scratch: Path) -> None:
    convert_bytes(KINDS[kind](), tmp_path / "layer")
    check(fsck, tmp_path / "layer", scratch, NOT_EXTRACTED.get(kind, set()))


def test_fsck_agrees_on_many_files(fsck: list[str], tmp_path: Path, scratch: Path) -> None:
    convert_bytes(largelayers.sources(), tmp_path / "layer")
    check(fsck, tmp_path / "layer", scratch, set())


@pytest.mark.slow
def test_fsck_reads_a_large_directory(fsck: list[str], tmp_path: Path) -> None:
    convert_bytes(largelayers.many(), tmp_path / "layer")
    run([*fsck, "--extract", tmp_path / "layer"])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_fsck_reads_real_layers(fsck: list[str], cache_dir: Path, tmp_path: Path) -> None:
    capabilities.require("debootstrap", "overlay")
    image = numpyimage.numpy(cache_dir)
    for layer in image.layers:
        convert_layer(image.layout, layer, tmp_path / "layer")
        run([*fsck, "--extract", tmp_path / "layer"])
        (tmp_path / "layer").unlink()


def check(fsck: list[str], layer: Path, scratch: Path, but: set[tuple[bytes, str]]) -> None:
    """Check and extract a layer file, and compare with its mount."""
    run([*fsck, f"--extract={scratch}/out", "--xattrs", layer])
    with mounted(layer, scratch / "mnt") as at:
        treediff.assert_same(look(at), look(scratch / "out"), but=but)


def run(argv: list[str | Path]) -> None:
    """Run fsck.erofs, which must be content and silent, apart from what it says about attributes without a value."""
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    complaints = [line for line in done.stderr.splitlines() if "value size of `user.empty`" not in line]
    assert (done.returncode, complaints) == (0, []), done.stdout
