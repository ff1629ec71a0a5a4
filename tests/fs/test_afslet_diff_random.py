"""Random changes to a root: their diff on the image, as AFS mounts it and as umoci unpacks it, gives what the run saw.

AFS_TEST_SEED chooses the changes; a failure prints them.
"""

from __future__ import annotations

import gzip
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import zstandard

from afs.afslet.diff import Diff, DiffOptions
from afs.core.mounts import unmount
from afs.proto.v1 import afslet_pb2 as pb
from afs.snapshotter.overlay import mount_overlay
from tests.testbed import oci, treediff, unpackers
from tests.testbed.ourroots import convert_layer, merged
from tests.testbed.treechanges import Changer

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator
    from pathlib import Path

    from tests.testbed.treediff import Seen

pytestmark = pytest.mark.root

ROUNDS = 6
OURS = {(name, "surplus") for name in (b"dev", b"proc", b"sys")}  # always there, see ourroots.merged


def seen(root: Path) -> dict[bytes, Seen]:
    """A tree, without the number of links: a lower file counts those that the upper layer has hidden. The root's time is
    that of its making.
    """
    found = {path: replace(one, nlink=None) for path, one in treediff.look(root).items()}
    return found | {b".": replace(found[b"."], mtime=0)}


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs: it takes all times and attributes."""
    with unpackers.tmpfs(tmp_path / "scratch") as at:
        yield at


def layer_of(directory: Path) -> bytes:
    """A directory as a layer, by GNU tar."""
    argv = ["tar", "-c", "-C", str(directory), "--format=pax", "--numeric-owner", "--xattrs", "--xattrs-include=*", "."]
    return subprocess.run(argv, check=True, capture_output=True).stdout


@pytest.mark.parametrize("number", range(ROUNDS))
async def test_the_diff_of_random_changes(scratch: Path, rng: random.Random, number: int) -> None:
    bottom, top, upper, work, root = (scratch / name for name in ("bottom", "top", "upper", "work", "root"))
    for directory in (bottom, top, upper, work, root):
        directory.mkdir()
    for directory in (bottom, top):
        Changer(directory, rng, link_specials=False).change(60)  # GNU tar tells links of regular files only
    builder = oci.LayoutBuilder(scratch / "image")
    layers = [builder.add_layer(layer_of(directory), level=1) for directory in (bottom, top)]
    mount_overlay(root, [top, bottom], upper, work)
    try:
        changer = Changer(root, rng)
        changer.change(20 if number % 2 else 120)
        if number % 3 == 0:
            root.chmod(0o711)
        print("\n".join(changer.log))
        expected = seen(root)
    finally:
        unmount(str(root))
    zipped = b"".join(Diff(upper, [top, bottom]).chunks())
    options = DiffOptions(pb.DIFF_ZSTD)
    tar = gzip.decompress(zipped)
    again = b"".join(Diff(upper, [top, bottom], options).chunks())
    assert zstandard.ZstdDecompressor().decompressobj().decompress(again) == tar
    layers.append(builder.add_layer(tar, level=1))
    builder.add_image("t", layers)

    unpacked = unpackers.umoci(scratch / "image", "t", scratch / "umoci")
    treediff.assert_same(seen(unpacked), expected)

    files = []
    for place, layer in enumerate(layers):
        convert_layer(scratch / "image", layer, scratch / f"layer{place}")
        files.append((layer.diff_id, scratch / f"layer{place}"))
    async with merged(scratch / "ours", files) as ours:
        treediff.assert_same(seen(ours), expected, but=OURS)
