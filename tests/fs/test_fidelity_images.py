"""Whole images, as the snapshotter mounts them, and each of their layers, against what umoci and containerd unpack."""

import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from afs.layerstore.afslyr.errors import CorruptLayer
from tests.testbed import capabilities, layerkinds, layermarks, numpyimage, oci, tars, treediff, unpackers
from tests.testbed.containerd import Containerd
from tests.testbed.images import BusyboxImage
from tests.testbed.ourroots import convert_bytes, convert_layer, merged, mounted
from tests.testbed.treediff import Seen, look

pytestmark = pytest.mark.root

OPAQUE = "trusted.overlay.opaque"
# What ourroots.merged says; the time of a root directory is that of its making with the others too.
OURS = {(b".", "mtime"), *((name, "surplus") for name in (b"dev", b"proc", b"sys"))}
_IMPLIED = {(path, field) for path in (b"deep", b"deep/er") for field in ("mode", "uid", "mtime")}
_IMPLIED |= {(path, "mtime") for path in (b"usr", b"usr/bin")}


_ROOT = {(b".", field) for field in ("mode", "uid", "gid")}
_ALONE = {(b"alone", field) for field in ("mode", "uid", "mtime")}
# All of `base`
_LOWER = {
    *(b"before", b"after", b"between", b"alone", b"deep", b"deep/er", b"both", b"late", b"gone-dir", b"gone-dir/sub"),
    *(
        b"before/lower",
        b"after/lower",
        b"between/lower",
        b"alone/lower",
        b"deep/lower",
        b"deep/er/lower",
        b"both/lower",
    ),
    *(b"late/lower", b"gone-dir/lower", b"gone-dir/sub/lower", b"gone", b"gone-link", b"kept", b"to-file", b"to-dir"),
    *(b"to-file/inside", b"changed", b"deep/er/gone"),
}


@dataclass(frozen=True)
class Image:
    """Generated layers, bottom up; what umoci and containerd make of them otherwise, or None for a witness that fails."""

    kinds: tuple[str, ...]
    umoci: set[tuple[bytes, str]]
    containerd: set[tuple[bytes, str]] | None


IMAGES: Mapping[str, Image] = {
    "whiteouts": Image(("base", "whiteouts"), set(), _ROOT),
    "whiteouts-undone": Image(("base", "whiteouts", "base"), set(), _ROOT),
    "whiteouts-twice": Image(("base", "whiteouts", "whiteouts"), set(), _ROOT),
    # containerd shows what was removed and made anew in one layer.
    "remade": Image(("base", "remade"), set(), {*_ROOT, (b"both/lower", "missing")}),
    # umoci removes what the whiteout hides after it gave the directory its time.
    "remade-late": Image(("base", "remade_late"), {(b"late", "mtime")}, None),
    # overlayfs has no regard for the mark on a layer's root; the snapshotter leaves out the layers below.
    "opaque-root": Image(("base", "opaque_root"), set(), {*_ROOT, *((path, "missing") for path in _LOWER)}),
    # overlayfs lists whiteouts in directories that only one layer has. In the lowest layer containerd removes them.
    "stray": Image(("base", "stray", "base"), {(b"fresh/gone", "surplus")}, _ROOT),
    "stray-lowest": Image(("stray", "base"), {(b"fresh/gone", "surplus")}, {*_ROOT, (b"fresh/gone", "surplus")}),
    # Marks make their directories, and umoci none.
    "marks-alone": Image(
        ("base", "marks_alone"),
        {*_ALONE, *((path, "surplus") for path in (b"new", b"new/dir", b"new/dir/x", b"fresh"))},
        {*_ROOT, *_ALONE, *((path, "mtime") for path in (b"new", b"new/dir", b"fresh"))},
    ),
    # umoci removes what the file replaces, then the file.
    "file-then-dir": Image(("base", "file_then_dir"), {(b"late/lower", "surplus")}, _ROOT),
    # What a layer alone cannot know: both witnesses keep the attributes that directories have in lower layers.
    "implied": Image(("base", "implied"), {*_ROOT, *_IMPLIED}, _IMPLIED),
    # umoci follows the symlink of the layer below; containerd makes a directory too, in place of the symlink.
    "usr-merge": Image(
        ("merged_usr", "unmerged_usr"),
        {(b"bin", "type"), (b"bin/tool", "surplus"), (b"usr/bin/tool", "missing")},
        {*_ROOT, (b"bin", "mode"), (b"bin", "mtime")},
    ),
    "empty-layers": Image(("base", "empty", "nothing"), _ROOT, set()),
    "types-change": Image(("base", "duplicates", "devices", "base"), set(), None),
}


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs for witnesses."""
    with unpackers.tmpfs(tmp_path / "scratch") as at:
        yield at


@pytest.fixture(scope="module")
def daemon() -> Iterator[Containerd]:
    """A containerd."""
    capabilities.require("root", "containerd")
    with Containerd() as running:
        yield running


def converted(image: oci.StoredImage, at: Path) -> list[tuple[str, Path]]:
    """The layers of an image as layer files: diff_id and file."""
    at.mkdir()
    found = []
    for number, layer in enumerate(image.layers):
        convert_layer(image.layout, layer, at / str(number))
        found.append((layer.diff_id, at / str(number)))
    return found


def generated(kinds: tuple[str, ...], at: Path) -> oci.StoredImage:
    """An image of generated layers, tagged `t`."""
    builder = oci.LayoutBuilder(at)
    builder.add_image("t", [builder.add_layer(layerkinds.KINDS[kind](), level=1) for kind in kinds])
    return oci.read_image(at, "t")


def layout_of(image: oci.StoredImage, layers: Sequence[oci.Layer], at: Path) -> Path:
    """A new layout whose only image `t` has some of the layers of another one."""
    builder = oci.LayoutBuilder(at)
    for layer in layers:
        shutil.copy(oci.blob_path(image.layout, layer.digest), oci.blob_path(at, layer.digest))
    builder.add_image("t", layers)
    return at


def additions(theirs: Mapping[bytes, Seen], known: set[tuple[bytes, str]]) -> set[tuple[bytes, str]]:
    """What is expected to differ: the known, and what our roots always have unless the image has it too."""
    return {(path, field) for path, field in OURS if field != "surplus" or path not in theirs} | known


def without_marks(tree: Mapping[bytes, Seen]) -> dict[bytes, Seen]:
    """A layer's tree without whiteouts and marks of opaque directories, as it is without layers below."""
    return {
        path: replace(seen, xattrs={name: value for name, value in seen.xattrs.items() if name != OPAQUE})
        for path, seen in tree.items()
        if seen.rdev != (0, 0)
    }


@pytest.mark.parametrize("name", IMAGES)
async def test_a_generated_image(name: str, tmp_path: Path, scratch: Path, daemon: Containerd) -> None:
    expected = IMAGES[name]
    image = generated(expected.kinds, tmp_path / "layout")
    async with merged(tmp_path / "ours", converted(image, tmp_path / "layers")) as root:
        ours = look(root)
    capabilities.require("umoci")
    theirs = look(unpackers.umoci(image.layout, "t", scratch / "umoci"))
    treediff.assert_same(ours, theirs, but=additions(theirs, expected.umoci))
    if expected.containerd is not None:
        with unpackers.containerd(daemon, image.layout, "t", scratch / name) as snapshots:
            theirs = look(snapshots.merged)
        treediff.assert_same(ours, theirs, but=additions(theirs, expected.containerd))


async def test_directories_without_entries_hide_the_attributes_of_lower_ones(tmp_path: Path) -> None:
    """A layer alone cannot know them; overlayfs shows a directory's attributes from the topmost layer that has it."""
    image = generated(("base", "implied"), tmp_path / "layout")
    files = converted(image, tmp_path / "layers")
    with mounted(files[0][1], tmp_path / "mnt") as at:
        below = look(at)[b"deep/er"]
    assert (below.mode, below.uid, below.mtime) == (0o750, 7, 11_000_000_000)
    async with merged(tmp_path / "ours", files) as root:
        tree = look(root)
        assert sorted(os.listdir(root / "deep/er")) == ["gone", "lower", "new"]
    for path in (b"deep", b"deep/er", b"usr", b"usr/bin"):
        seen = tree[path]
        assert (seen.mode, seen.uid, seen.gid, seen.mtime, seen.xattrs) == (0o755, 0, 0, 0, {}), path


def test_a_hard_link_to_a_lower_layer_is_an_error(tmp_path: Path, scratch: Path, daemon: Containerd) -> None:
    """As with containerd; umoci, which unpacks into one tree, takes it."""
    capabilities.require("umoci")
    upper = tars.root() + tars.hard_link("link", "kept") + tars.END
    builder = oci.LayoutBuilder(tmp_path / "layout")
    builder.add_image("t", [builder.add_layer(layermarks.base()), builder.add_layer(upper)])
    with pytest.raises(CorruptLayer, match='"link": target "kept" of the hard link is missing'):
        convert_bytes(upper, tmp_path / "layer")
    with (
        pytest.raises(unpackers.UnpackError, match="no such file"),
        unpackers.containerd(daemon, builder.directory, "t", scratch / "containerd"),
    ):
        pass
    assert (unpackers.umoci(builder.directory, "t", scratch / "umoci") / "link").read_bytes() == b"k"


async def test_busybox(busybox_image: BusyboxImage, tmp_path: Path, scratch: Path, daemon: Containerd) -> None:
    found = oci.read_image(busybox_image.layout, "gzip")
    image = oci.read_image(layout_of(found, found.layers, tmp_path / "image"), "t")  # ctr would import all tags
    await check_all(image, tmp_path, scratch, daemon, implied={b"opt", b"var"})


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_debian_with_numpy(cache_dir: Path, tmp_path: Path, scratch: Path, daemon: Containerd) -> None:
    capabilities.require("debootstrap")
    image = numpyimage.numpy(cache_dir)
    await check_all(oci.read_image(image.layout, image.tag), tmp_path, scratch, daemon)


async def check_all(
    image: oci.StoredImage, tmp_path: Path, scratch: Path, daemon: Containerd, implied: Collection[bytes] = ()
) -> None:
    """Compare an image and each of its layers with both witnesses.

    `implied` are directories without an entry in any layer: some of the witnesses leave there the time of unpacking.
    """
    capabilities.require("umoci")
    files = converted(image, tmp_path / "layers")
    async with merged(tmp_path / "ours", files) as root:
        whole = timeless(look(root), implied)
    layers = []
    for number, (_, file) in enumerate(files):
        with mounted(file, tmp_path / f"mnt{number}") as at:
            layers.append(timeless(look(at), {b".", *implied}))
    theirs = timeless(look(unpackers.umoci(image.layout, image.tag, scratch / "whole")), implied)
    treediff.assert_same(whole, theirs, but=additions(theirs, set()))
    for number, layer in enumerate(layers):
        alone = layout_of(image, [image.layers[number]], tmp_path / f"alone{number}")
        theirs = look(unpackers.umoci(alone, "t", scratch / f"{number}"))
        treediff.assert_same(without_marks(layer), timeless(theirs, {b".", *implied}))
    with unpackers.containerd(daemon, image.layout, image.tag, scratch / "containerd") as snapshots:
        theirs = timeless(look(snapshots.merged), implied)
        treediff.assert_same(whole, theirs, but=additions(theirs, set()))
        for layer, directory in zip(layers, snapshots.layers, strict=True):
            whiteouts = {path for path, seen in layer.items() if seen.rdev == (0, 0)}
            treediff.assert_same(layer, timeless(look(directory), {b".", *whiteouts, *implied}))


def timeless(tree: Mapping[bytes, Seen], paths: Collection[bytes]) -> dict[bytes, Seen]:
    """A tree without the times of `paths`."""
    return {path: replace(seen, mtime=0) if path in paths else seen for path, seen in tree.items()}
