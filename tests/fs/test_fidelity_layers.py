"""Each kind of layer, mounted, against what umoci, containerd and GNU tar make of the same tar.

The tables say where a witness gives something else or nothing, and why. Everywhere else trees must be equal in all that
tests.testbed.treediff sees. What no witness unpacks is in test_afslyr_mount.py, against stated expectations.
"""

import random
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from afs.layerstore.afslyr.errors import CorruptLayer
from tests.testbed import capabilities, largelayers, layerkinds, layermarks, oci, tars, treediff, unpackers
from tests.testbed.containerd import Containerd
from tests.testbed.ourroots import convert_bytes, mounted
from tests.testbed.treediff import Seen, look

pytestmark = pytest.mark.root


@dataclass(frozen=True)
class Witness:
    """What a witness does with a layer: fails with `error`, or differs in fields of paths."""

    error: str = ""
    but: frozenset[tuple[bytes, str]] = frozenset()


def differs(field: str, *paths: bytes | str) -> Witness:
    """A witness that tells another `field` for each of `paths`."""
    return Witness(but=frozenset((path.encode() if isinstance(path, str) else path, field) for path in paths))


def both(*parts: Witness) -> Witness:
    """A witness with the differences of all `parts`, or the first one's error."""
    return Witness(parts[0].error, frozenset().union(*(part.but for part in parts)))


SAME = Witness()
_NO_TARGET = "(?i)no such file"  # entries are made as they come, so the link's target is not there yet
_NOW = differs("mtime", b".", "usr", "usr/bin", "deep", "deep/er")  # others leave the time of unpacking there

UMOCI: Mapping[str, Witness] = {
    # Go's archive/tar reads these types, umoci then knows only the common ones.
    "old_sparse_files": Witness(error="unknown typeflag"),
    "odd_types": Witness(error="unknown typeflag"),
    "global_comment": Witness(error="unknown typeflag"),
    "global_times": Witness(error="unknown typeflag"),
    "forward_links": Witness(error=_NO_TARGET),
    # Only trusted.overlay.* is taken out, not what overlayfs obeys when mounted with "userxattr".
    "overlay_xattrs": differs("xattrs", "dir"),
    # archive/tar drops records without a value, as POSIX has it for standard keys; GNU tar and containerd keep these.
    "empty_xattr": differs("xattrs", "file"),
    # Only star's SCHILY.xattr records are read; bsdtar writes both kinds.
    "libarchive": differs("xattrs", "file"),
    # Removes at once what our marks hide; these kinds are compared as whole images in test_fidelity_images.py.
    "whiteouts": both(
        differs("surplus", "gone", "gone-link", "gone-dir", "deep/er/gone"),
        differs("xattrs", "before", "after", "between"),
    ),
    "remade": differs("xattrs", "both"),
    "remade_late": differs("xattrs", "late"),
    "stray": differs("surplus", "nothing", "fresh/gone"),
    "marks_alone": differs("surplus", "new", "new/dir", "new/dir/x", "fresh", "alone"),
    "opaque_root": differs("xattrs", b"."),
    "implied": _NOW,
    "unmerged_usr": differs("mtime", b".", "bin"),  # makes `bin` after it set the root's time
}

# containerd ignores an entry of the root: its attributes are those of a new directory.
_ROOT = both(*(differs(field, b".") for field in ("mode", "uid", "gid", "mtime")))

CONTAINERD: Mapping[str, Witness] = {
    "old_sparse_files": Witness(error="unhandled tar header type 83"),
    "odd_types": Witness(error="unhandled tar header type"),
    "forward_links": Witness(error=_NO_TARGET),
    # Times before 1970 become 1970.
    "before_1970": differs(
        "mtime", "dir", "link", "time-1", "time-5", "time-2147483648", "time-8589934592", "pax-1.25", "pax-3",
        "pax-0.000000001",
    ),
    # No attribute of the kind trusted is set at all; overlayfs's own are what that is for, the others do no harm.
    "trusted": differs("xattrs", "file", "fifo", *(f"link-{size}" for size in (*range(360, 460, 4), 880, 944, 948))),
    "overlay_xattrs": differs("xattrs", "dir"),
    "libarchive": differs("xattrs", "file"),
    # A hard link's header changes the inode. umoci and GNU tar leave it as it is.
    "link_headers": both(*(differs(field, "one", "two") for field in ("mode", "uid", "mtime"))),
    # Directories get their times at the end, by name: whatever stands there then gets them, or a symlink's target.
    "duplicates": differs("mtime", "dir-file", "dir-null", "dir-pipe"),
    "dir_to_link": Witness(error="UtimesNanoAt"),
    # The time of whiteouts is that of unpacking; overlayfs shows none of them.
    "whiteouts": differs("mtime", "gone", "gone-link", "gone-dir", "deep/er/gone"),
    "stray": differs("mtime", "nothing", "fresh/gone"),
    "marks_alone": both(
        differs("mtime", "new", "new/dir", "new/dir/x", "fresh", "alone"),
        *(differs(field, "alone") for field in ("mode", "uid")),  # copied from `base`
    ),
    # The new directory is not opaque, so the old contents show. image-spec: whiteouts apply to lower layers first.
    "remade": differs("xattrs", "both"),
    "remade_late": Witness(error="failed to convert whiteout file"),
    # Missing parents are copied from lower layers, see test_fidelity_images.py; here from `base`.
    "implied": both(_NOW, *(differs(field, "deep", "deep/er") for field in ("mode", "uid"))),
    "unmerged_usr": differs("mtime", "bin"),
    # Global records are ignored; POSIX and GNU tar apply them.
    "global_times": both(differs("uid", "all", "own"), differs("mtime", "all")),
}  # fmt: skip
_WITHOUT_ROOT = {"implied", "empty", "nothing"}

GNU_TAR: Mapping[str, Witness] = {
    "names": Witness(error=r"contains '\.\.'"),
    "overlay_xattrs": differs("xattrs", "dir"),  # takes all, as every kind of attribute was asked for
    "libarchive": differs("xattrs", "file"),
    "forward_links": Witness(error=_NO_TARGET),
    "duplicates": Witness(error="File exists"),  # keeps directories that are not empty
    "dir_to_link": Witness(error="File exists"),
    "implied": _NOW,
    "unmerged_usr": differs("mtime", "bin"),
    # Symlinks that are absolute or lead up are made last, so that nothing is written through them.
    "through_links": Witness(error="Not a directory"),
    "empty": differs("mtime", b"."),
    "nothing": Witness(error="does not look like a tar archive"),
}
# Whiteouts have no meaning to GNU tar, and it pads every piece of a sparse file, so it loses its way among odd ones.
_NOT_FOR_GNU_TAR = (
    "whiteouts",
    "remade",
    "remade_late",
    "stray",
    "marks_alone",
    "opaque_root",
    "unaligned_sparse_files",
)


def made(kind: str) -> bytes:
    """The tar of a kind."""
    return layerkinds.KINDS[kind]()


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs for witnesses."""
    with unpackers.tmpfs(tmp_path / "scratch") as at:
        yield at


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containerd]:
    """A containerd whose files are on a tmpfs."""
    capabilities.require("root", "containerd")
    with unpackers.tmpfs(tmp_path_factory.mktemp("containerd") / "tmpfs") as at, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(at))
        with Containerd() as running:
            yield running


def ours(tar: bytes, tmp_path: Path) -> dict[bytes, Seen]:
    """The tree of a converted tar."""
    convert_bytes(tar, tmp_path / "layer")
    with mounted(tmp_path / "layer", tmp_path / "mnt") as at:
        return look(at)


@pytest.mark.parametrize("kind", layerkinds.KINDS)
def test_as_umoci_unpacks_it(kind: str, tmp_path: Path, scratch: Path) -> None:
    capabilities.require("umoci")
    witness = UMOCI.get(kind, SAME)
    builder = oci.LayoutBuilder(tmp_path / "layout")
    builder.add_image("t", [builder.add_layer(made(kind), level=1)])
    if witness.error:
        with pytest.raises(unpackers.UnpackError, match=witness.error):
            unpackers.umoci(builder.directory, "t", scratch / "root")
        return
    theirs = look(unpackers.umoci(builder.directory, "t", scratch / "root"))
    treediff.assert_same(ours(made(kind), tmp_path), theirs, but=witness.but)


def test_random_layers_are_as_umoci_unpacks_them(tmp_path: Path, scratch: Path, rng: random.Random) -> None:
    """Those that umoci unpacks; it sets the times of directories as it goes, so they are left out."""
    capabilities.require("umoci")
    compared = 0
    for number in range(100):
        tar = largelayers.random_layer(rng)
        work = tmp_path / f"{number}"
        builder = oci.LayoutBuilder(work / "layout")
        builder.add_image("t", [builder.add_layer(tar, level=1)])
        try:
            theirs = look(unpackers.umoci(builder.directory, "t", scratch / work.name))
        except unpackers.UnpackError:
            continue
        treediff.assert_same(without_directory_times(ours(tar, work)), without_directory_times(theirs))
        compared += 1
    assert compared > 30


def without_directory_times(tree: Mapping[bytes, Seen]) -> dict[bytes, Seen]:
    """A tree with all times of directories alike."""
    return {path: replace(seen, mtime=0) if seen.type == "d" else seen for path, seen in tree.items()}


def test_a_source_tree_is_as_umoci_unpacks_it(tmp_path: Path, scratch: Path) -> None:
    capabilities.require("umoci")
    builder = oci.LayoutBuilder(tmp_path / "layout")
    builder.add_image("t", [builder.add_layer(largelayers.sources(), level=1)])
    theirs = look(unpackers.umoci(builder.directory, "t", scratch / "root"))
    assert len(theirs) > largelayers.SOURCES
    treediff.assert_same(ours(largelayers.sources(), tmp_path), theirs)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_large_directory_is_as_gnu_tar_unpacks_it(tmp_path: Path, scratch: Path) -> None:
    """umoci takes a minute for this one."""
    theirs = look(unpackers.gnu_tar(largelayers.many(), scratch / "root"))
    assert len(theirs) == largelayers.MANY + 2
    treediff.assert_same(ours(largelayers.many(), tmp_path), theirs)


@pytest.mark.parametrize("kind", layerkinds.KINDS)
def test_as_containerd_unpacks_it(kind: str, tmp_path: Path, scratch: Path, daemon: Containerd) -> None:
    """As the upper one of two layers: then containerd writes the marks of overlayfs too, and they can be compared."""
    witness = both(CONTAINERD.get(kind, SAME), differs("mtime", b".") if kind in _WITHOUT_ROOT else _ROOT)
    builder = oci.LayoutBuilder(tmp_path / "layout")
    builder.add_image("t", [builder.add_layer(tar, level=1) for tar in (layermarks.base(), made(kind))])
    if witness.error:
        with (
            pytest.raises(unpackers.UnpackError, match=witness.error),
            unpackers.containerd(daemon, builder.directory, "t", scratch / kind),
        ):
            pass
        return
    with unpackers.containerd(daemon, builder.directory, "t", scratch / kind) as snapshots:
        theirs = look(snapshots.layers[1])
    treediff.assert_same(ours(made(kind), tmp_path), theirs, but=witness.but)


@pytest.mark.parametrize("kind", [kind for kind in layerkinds.KINDS if kind not in _NOT_FOR_GNU_TAR])
def test_as_gnu_tar_unpacks_it(kind: str, tmp_path: Path, scratch: Path) -> None:
    witness = GNU_TAR.get(kind, SAME)
    if witness.error:
        with pytest.raises(unpackers.UnpackError, match=witness.error):
            unpackers.gnu_tar(made(kind), scratch / "root")
        return
    theirs = look(unpackers.gnu_tar(made(kind), scratch / "root"))
    treediff.assert_same(ours(made(kind), tmp_path), theirs, but=witness.but)


@pytest.mark.parametrize("length", [0, 4096])
def test_targets_that_no_symlink_can_have_are_errors_everywhere(length: int, tmp_path: Path, scratch: Path) -> None:
    capabilities.require("umoci")
    tar = tars.root() + tars.pax([("linkpath", "t" * length)]) + tars.symlink("link", "") + tars.END
    builder = oci.LayoutBuilder(tmp_path / "layout")
    builder.add_image("t", [builder.add_layer(tar)])
    with pytest.raises(CorruptLayer, match=f'"link": symlink target of {length} bytes'):
        convert_bytes(tar, tmp_path / "layer")
    with pytest.raises(unpackers.UnpackError, match="symlink"):
        unpackers.umoci(builder.directory, "t", scratch / "root")
