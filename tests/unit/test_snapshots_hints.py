"""What labels tell of a layer, the names of its snapshot, and the mounts that containerd gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from afs.core.digests import chain_ids, sha256_digest
from afs.core.errors import InvalidArgument
from afs.snapshotter.snapshots.clusterlayer import ClusterLayer, Name
from afs.snapshotter.snapshots.hints import read_hint
from afs.snapshotter.snapshots.metadata import Kind, Snapshot
from afs.snapshotter.snapshots.mountspec import bind, is_too_long, overlay
from afs.snapshotter.snapshots.remote import OnMissing, parse_on_missing, remote_name

DIFFS = [sha256_digest(str(number).encode()) for number in range(2)]
BOTTOM, TOP = chain_ids(DIFFS)
REF = "containerd.io/snapshot.ref"
MANIFEST = sha256_digest(b"manifest")


def snapshot(name: str, labels: dict[str, str] | None = None, layer: ClusterLayer | None = None) -> Snapshot:
    return Snapshot(1, name, "", Kind.COMMITTED, 0, 0, labels or {}, layer, None, None)


LAZY = snapshot(BOTTOM, {}, ClusterLayer(DIFFS[0], BOTTOM))


def test_the_bottom_layer_needs_nothing_else() -> None:
    hint = read_hint({REF: BOTTOM}, None)
    assert hint is not None
    assert (hint.chain_id, hint.parent_chain_id, hint.diff_id, hint.names) == (BOTTOM, "", DIFFS[0], ())


def test_another_diff_id_of_the_bottom_layer_is_not_believed() -> None:
    hint = read_hint({REF: BOTTOM, "containerd.io/snapshot/afs.diff-id": DIFFS[1]}, None)
    assert hint is not None
    assert hint.diff_id == DIFFS[0]


@pytest.mark.parametrize(
    "parent",
    [
        LAZY,
        snapshot("x", {REF: BOTTOM}),
        snapshot(f"k8s.io/17/{BOTTOM}"),
    ],
)
def test_the_parent_is_known_by_its_layer_its_label_or_its_name(parent: Snapshot) -> None:
    hint = read_hint({REF: TOP}, parent)
    assert hint is not None
    assert (hint.parent_chain_id, hint.diff_id) == (BOTTOM, "")


@pytest.mark.parametrize("key", ["diff-id", "afs.diff-id"])
def test_a_diff_id_counts_if_it_is_proved(key: str) -> None:
    hint = read_hint({REF: TOP, f"containerd.io/snapshot/{key}": DIFFS[1]}, LAZY)
    assert hint is not None
    assert hint.diff_id == DIFFS[1]
    forged = read_hint({REF: TOP, f"containerd.io/snapshot/{key}": DIFFS[0]}, LAZY)
    assert forged is not None
    assert forged.diff_id == ""


@pytest.mark.parametrize(
    ("labels", "parent"),
    [
        ({}, None),
        ({REF: "no digest"}, None),
        ({REF: TOP}, snapshot("some/name")),
        ({REF: TOP, "containerd.io/snapshot/parent-chain-id": TOP}, LAZY),
    ],
)
def test_what_cannot_be_a_layer_of_the_cluster(labels: dict[str, str], parent: Snapshot | None) -> None:
    assert read_hint(labels, parent) is None


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (
            {"cri.image-ref": "docker.io/library/a:1", "cri.manifest-digest": MANIFEST},
            (f"docker.io/library/a@{MANIFEST}", "docker.io/library/a:1"),
        ),
        ({"cri.image-ref": "a:1"}, ("docker.io/library/a:1",)),
        ({"cri.image-ref": MANIFEST, "cri.manifest-digest": MANIFEST}, ()),
        ({"cri.image-ref": f"r.io/a@{MANIFEST}", "cri.manifest-digest": MANIFEST}, (f"r.io/a@{MANIFEST}",)),
        ({"cri.image-ref": "NOT an image"}, ()),
        ({"cri.image-ref": "oci:/etc"}, ()),
        ({"remote/stargz.reference": "127.0.0.1:5000/a:1"}, ("127.0.0.1:5000/a:1",)),
    ],
)
def test_names(labels: dict[str, str], names: tuple[str, ...]) -> None:
    prefixed = {f"containerd.io/snapshot/{key}": value for key, value in labels.items()}
    hint = read_hint({REF: BOTTOM, **prefixed}, None)
    assert hint is not None
    assert hint.names == names
    assert [name.image for name in hint.message().names] == list(names)


def test_names_of_snapshots() -> None:
    assert remote_name(BOTTOM, "") == BOTTOM
    assert remote_name(TOP, BOTTOM) == TOP
    other, another = remote_name(TOP, f"ns/1/{BOTTOM}"), remote_name(TOP, f"ns/2/{BOTTOM}")
    assert other.startswith(f"{TOP}@")
    assert other != another


def test_a_layer_of_the_cluster_on_its_way() -> None:
    layer = ClusterLayer(DIFFS[1], TOP, BOTTOM, (Name("a", "b", "linux", "arm", "v7"), Name("c")))
    assert ClusterLayer.from_json(layer.to_json()) == layer
    assert ClusterLayer.from_message(layer.message()) == layer


def test_on_missing() -> None:
    assert [parse_on_missing(text) for text in ("wait", "background", "never")] == list(OnMissing)
    with pytest.raises(InvalidArgument, match="wait, background, never"):
        parse_on_missing("sometimes")


def test_mounts() -> None:
    assert bind(Path("/a"), writable=False).options == ("ro", "rbind")
    mount = overlay([Path("/l/2"), Path("/l/1")], Path("/s/fs"), Path("/s/work"))
    assert mount.options[-3:] == ("workdir=/s/work", "upperdir=/s/fs", "lowerdir=/l/2:/l/1")
    assert [option for option in overlay([Path("/a"), Path("/b")]).options if "dir=" in option] == ["lowerdir=/a:/b"]


def test_names_that_containerd_can_shorten_and_names_that_it_cannot() -> None:
    far = [Path(f"/run/afs/l/{number}-65024-10232656") for number in range(150)]
    near = Path("/var/lib/afs/snapshotter/snapshots/1/fs")
    assert not is_too_long(overlay(far))
    assert is_too_long(overlay([near, *far]))
    assert not is_too_long(overlay([near, *far[:10]]))
    below_one = [Path(f"/var/afs-run/l/{number}-65024-10232656") for number in range(70)]
    below_other = [Path(f"/var/lib/afs/snapshotter/snapshots/{number}/fs") for number in range(70)]
    assert is_too_long(overlay([*below_one, *below_other]))
