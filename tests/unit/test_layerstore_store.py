"""The cache directory: its lock, what a crash leaves, and what is damaged."""

import io
import json
import os
from pathlib import Path

import pytest

from afs.core.digests import sha256_digest
from afs.core.errors import FailedPrecondition
from afs.core.images import Platform
from afs.layerstore.afslyr.convert import convert
from afs.layerstore.manifests import Image, build_image
from afs.layerstore.store import LayerStore, StoreLocked, delete
from tests.testbed import oci, tars

AMD64 = Platform("linux", "amd64")
TAR = tars.tar_of({"a": b"1" * 3_000_000, "b": b"2"})
DIFF_ID = sha256_digest(TAR)
OTHER = sha256_digest(b"other")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Where the store is."""
    return tmp_path / "store"


def make_layer(store: LayerStore, tar: bytes = TAR) -> Path:
    """A converted layer in the store's tmp."""
    path = store.temporary()
    convert(io.BytesIO(tar).read, path)
    return path


def reopened(store: LayerStore) -> LayerStore:
    """The store after a restart."""
    store.close()
    return LayerStore(store.root)


def test_one_process_owns_the_directory(root: Path) -> None:
    store = LayerStore(root)
    with pytest.raises(StoreLocked, match=f"^{root} is in use by another afs_layerstore_grpcd$") as caught:
        LayerStore(root)
    assert isinstance(caught.value, FailedPrecondition)
    store.close()
    LayerStore(root).close()


def test_it_is_marked_as_a_cache(root: Path) -> None:
    LayerStore(root).close()
    assert (root / "CACHEDIR.TAG").read_bytes().startswith(b"Signature: 8a477f597d28d172789f06886806bc55\n")


def test_a_crash_s_leftovers_go(root: Path) -> None:
    store = LayerStore(root)
    make_layer(store)
    (root / "tmp" / "directory" / "deep").mkdir(parents=True)
    (root / "partial" / f".{DIFF_ID[7:]}.new").mkdir()
    store = reopened(store)
    assert list((root / "tmp").iterdir()) == []
    assert store.partial_ids() == []
    assert list((root / "partial").iterdir()) == []
    store.close()


def test_commit_makes_a_layer(root: Path) -> None:
    store = LayerStore(root)
    assert store.complete(DIFF_ID) is None
    layer = store.commit(make_layer(store), DIFF_ID)
    assert layer.diff_id == DIFF_ID
    assert layer.path == store.layer_path(DIFF_ID)
    assert store.complete(DIFF_ID) is layer
    assert store.complete_ids() == [DIFF_ID]
    assert list((root / "tmp").iterdir()) == []
    assert layer.table.count > 2
    for index in range(layer.table.count):
        assert layer.read_chunk(index) is not None  # verified
    with pytest.raises(IndexError):
        layer.read_chunk(layer.table.count)
    store = reopened(store)
    again = store.complete(DIFF_ID)
    assert again is not None
    assert again.layout == layer.layout
    store.close()


@pytest.mark.parametrize("damage", ["header", "table", "cut", "empty"])
def test_a_damaged_layer_is_removed(root: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    store = LayerStore(root)
    layer = store.commit(make_layer(store), DIFF_ID)
    data = bytearray(layer.path.read_bytes())
    match damage:
        case "header":
            data[0] ^= 1
        case "table":
            data[layer.layout.table_offset] ^= 1
        case "cut":
            del data[-1]
        case _:
            data.clear()
    layer.path.write_bytes(data)
    store = reopened(store)
    assert store.complete_ids() == [DIFF_ID]
    assert store.complete(DIFF_ID) is None
    assert store.complete_ids() == []
    assert caplog.records[-1].message.startswith(f"removing {layer.path}: corrupt layer")
    store.close()


def test_a_layer_under_another_s_name_is_removed(root: Path) -> None:
    store = LayerStore(root)
    make_layer(store).rename(store.layer_path(OTHER))
    assert store.complete(OTHER) is None
    assert not store.layer_path(OTHER).exists()
    with pytest.raises(FailedPrecondition, match=f"layer {OTHER} vanished while it was committed"):
        store.commit(make_layer(store), OTHER)
    store.close()


def test_files_of_others_are_left_alone(root: Path) -> None:
    store = LayerStore(root)
    for path in (root / "layers" / "notes.txt", root / "layers" / "x.afslyr", root / "partial" / "lost+found"):
        path.mkdir()
    assert store.complete_ids() == []
    assert store.partial_ids() == []
    assert (root / "layers" / "x.afslyr").exists()
    store.close()


def test_dropping_a_partial_layer_twice(root: Path) -> None:
    store = LayerStore(root)
    store.partial_dir(DIFF_ID).mkdir()
    assert store.partial_ids() == [DIFF_ID]
    store.drop_partial(DIFF_ID)
    store.drop_partial(DIFF_ID)
    assert store.partial_ids() == []
    store.close()


def test_a_second_pull_leaves_the_file_that_may_be_mounted(root: Path) -> None:
    store = LayerStore(root)
    first = store.commit(make_layer(store), DIFF_ID)
    inode = first.path.stat().st_ino
    assert store.commit(make_layer(store), DIFF_ID) is first
    assert first.path.stat().st_ino == inode
    assert list((root / "tmp").iterdir()) == []
    store.close()


def test_detaching_takes_both_forms_at_once(root: Path) -> None:
    store = LayerStore(root)
    assert store.detach(DIFF_ID) == []
    layer = store.commit(make_layer(store), DIFF_ID)
    store.partial_dir(DIFF_ID).mkdir()
    with layer.path.open("rb") as mounted:
        taken = store.detach(DIFF_ID)
        assert {path.parent for path in taken} == {root / "tmp"}
        assert store.complete(DIFF_ID) is None
        assert store.complete_ids() == store.partial_ids() == []
        for path in taken:
            delete(path)
            delete(path)
        assert len(mounted.read()) == layer.layout.file_size
    with pytest.raises(FileNotFoundError):
        layer.read_chunk(0)
    store.close()


def test_usage_is_what_the_disk_gives_for_it(root: Path) -> None:
    store = LayerStore(root)
    assert store.usage(DIFF_ID) == (0, 0.0)
    layer = store.commit(make_layer(store), DIFF_ID)
    complete = layer.path.stat().st_blocks * 512
    assert store.usage(DIFF_ID)[0] == complete >= 3_000_000
    partial = store.partial_dir(DIFF_ID)
    partial.mkdir()
    with (partial / "data").open("wb") as data:
        data.truncate(1 << 30)  # a hole
        os.pwrite(data.fileno(), bytes(1 << 18), 5 << 18)
    assert complete + (1 << 18) <= store.usage(DIFF_ID)[0] < complete + (2 << 18)
    store.stamp(DIFF_ID, 1234.0)
    assert store.usage(DIFF_ID)[1] == 1234.0
    free, used = store.free(), store.usage(DIFF_ID)[0]
    assert store.default_capacity() == pytest.approx((free + used) * 0.9, rel=0.01)
    assert 0 < store.default_headroom() <= 1 << 30
    store.close()


@pytest.mark.parametrize("where", ["chunk", "table", "footer"])
def test_damage_in_a_complete_layer_is_seen_and_put_right(root: Path, where: str) -> None:
    store = LayerStore(root)
    layer = store.commit(make_layer(store), DIFF_ID)
    good = layer.path.read_bytes()
    at = {"chunk": (1 << 18) + 7, "table": layer.layout.table_offset + 33, "footer": len(good) - 60}[where]
    with layer.path.open("r+b") as file:
        os.pwrite(file.fileno(), bytes([good[at] ^ 1]), at)
    whole = [index for index in range(layer.table.count) if layer.read_chunk(index, from_disk=True) is not None]
    assert (1 in whole) == (where != "chunk")
    assert layer.has_tail() == (where == "chunk")
    layer.write_tail()
    assert layer.has_tail()
    layer.write_chunk(1, good[1 << 18 : 2 << 18])
    assert layer.path.read_bytes() == good
    store.close()


# Images


def an_image(name: str = "registry.example.com/app:v1", cmd: str = "x") -> Image:
    """An image without layers."""
    config = json.dumps(oci.image_config([], {"Cmd": [cmd]}, oci.AMD64)).encode()
    manifest = {"config": {"mediaType": oci.OCI_CONFIG, "digest": sha256_digest(config)}, "layers": []}
    return build_image(name, AMD64, json.dumps(manifest).encode(), config, 42, b'{"index": 1}')


def test_images_survive_a_restart(root: Path) -> None:
    store = LayerStore(root)
    first, second = an_image(), an_image("registry.example.com/app:v2")
    for image in (first, second, first):
        store.save_image(image.key.partition(" ")[0], AMD64, image)
    store = reopened(store)
    assert sorted((named.image for named in store.load_images()), key=lambda image: image.key) == [first, second]
    store.close()


@pytest.mark.parametrize(
    "change",
    [
        b"", b"[]", b"3", b"{}", b'"x"', b"\xff", {"name": 5}, {"name": "A B"}, {"name": ""}, {"platform": "x"}, {"platform": 3},
        {"manifest": "e30="}, {"manifest": "!"}, {"config": "e30="}, {"resolved_unix": None}, {"resolved_unix": "x"},
        {"index": 3}, {"platform": ["linux", "arm64", ""]},
    ],
    ids=repr,
)  # fmt: skip
def test_a_damaged_image_file_is_removed(
    root: Path, change: bytes | dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    store = LayerStore(root)
    good, bad = an_image(), an_image("registry.example.com/bad:v1")
    for image in (good, bad):
        store.save_image(image.key.partition(" ")[0], AMD64, image)
    path = store._image_path(bad.key)
    if isinstance(change, bytes):
        path.write_bytes(change)
    else:
        path.write_text(json.dumps(json.loads(path.read_bytes()) | change))
    assert [named.image for named in store.load_images()] == [good]
    assert not path.exists()
    assert caplog.records[-1].message.startswith(f"removing {path}: ")
    store.close()
