"""What passes between containerd's unpacker and the snapshotter, by a test that acts as the former.

As containerd 1.6 to 2.4 do it: Prepare with the label `containerd.io/snapshot.ref` under a key of the namespace; AlreadyExists
means that there is a committed snapshot, which List finds by that label and the parent; Stat of its name ends it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc
import pytest

from afs.proto.containerd import snapshots_pb2 as pb
from tests.testbed.appimage import app_image, chain_ids
from tests.testbed.snapshots import REF, Snapshots, mounted

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from afs.proto.containerd.mount_pb2 import Mount
    from tests.testbed.appimage import AppImage
    from tests.testbed.lazycontainerd import LazyContainerd

pytestmark = [pytest.mark.root, pytest.mark.containerd, pytest.mark.slow]
DIFF_ID, IMAGE = "containerd.io/snapshot/afs.diff-id", "containerd.io/snapshot/cri.image-ref"


@pytest.fixture
def app(tmp_path: Path, rng: random.Random) -> AppImage:
    """An image that nobody knows."""
    return app_image(tmp_path / "app", rng, 1)


@dataclass
class Unpacker:
    """Unpacks layers as containerd does, under one of its namespaces."""

    api: Snapshots
    namespace: str = "unpacker"
    made: list[str] = field(default_factory=list)
    """Names of what it left, in order."""
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def prepare(self, chain_id: str, parent: str, labels: Mapping[str, str] | None = None) -> tuple[str, list[Mount]]:
        """Ask for a layer. The name of its snapshot if the cluster has it; else a key, and mounts to unpack it at."""
        number = next(self._numbers)
        key = f"{self.namespace}/{number}/extract-{number}-xyz {chain_id}"
        try:
            mounts = self.api.prepare(key, parent, {REF: chain_id, **(labels or {})})
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.ALREADY_EXISTS:
                raise
        else:
            self.made.append(key)
            return key, mounts
        listed = self.api.infos(f'labels."{REF}"=={chain_id},parent=="{parent}"').values()
        assert {(info.parent, info.labels[REF]) for info in listed} == {(parent, chain_id)}
        (found,) = [info for info in listed if info.kind == pb.COMMITTED]
        assert self.api.stat(found.name) == found
        assert key not in self.api.infos(), "the key is free again"
        if found.name not in self.made:
            self.made.append(found.name)
        return found.name, []

    def lazy(self, chain_id: str, parent: str, labels: Mapping[str, str] | None = None) -> str:
        """The name of a layer's snapshot, which has to come from the cluster."""
        name, mounts = self.prepare(chain_id, parent, labels)
        assert not mounts
        return name

    def unpack(self, chain_id: str, parent: str, files: Mapping[str, str], at: Path) -> str:
        """Unpack a layer here: write `files` and commit, under the name that containerd gives it."""
        key, mounts = self.prepare(chain_id, parent)
        assert mounts, "the cluster has it"
        with mounted(mounts, at) as root:
            for name, text in files.items():
                (root / name).write_text(text)
        name = f"{self.namespace}/{next(self._numbers)}/{chain_id}"
        self.api.commit(name, key)
        self.made[-1] = name
        return name

    def contents(self, parent: str, at: Path, *names: str) -> list[bytes]:
        """What is in files of a container's root on a snapshot."""
        key = f"{self.namespace}/container"
        with mounted(self.api.prepare(key, parent), at) as root:
            found = [(root / name.lstrip("/")).read_bytes() for name in names]
        self.api.remove(key)
        return found


@pytest.fixture
def unpacker(lazy: LazyContainerd) -> Iterator[Unpacker]:
    """Speaks to the snapshotter directly; what it made is removed at the end, the newest first."""
    with lazy.api() as api:
        speaking = Unpacker(api)
        yield speaking
        for name in reversed(speaking.made):
            api.remove(name)
        api.cleanup()


def test_chain_ids_alone(lazy: LazyContainerd, unpacker: Unpacker, app: AppImage, tmp_path: Path) -> None:
    """nerdctl says no more. Snapshots are named by chain ids, for all namespaces, and the second time they are there."""
    lazy.seed(lazy.push(app, "app"))
    lazy.registry.forget()
    other = Unpacker(unpacker.api, "another")
    parent = ""
    for chain_id in app.chain_ids:
        for asking in (unpacker, other):
            assert asking.lazy(chain_id, parent) == chain_id
        parent = chain_id
    assert set(unpacker.api.infos()) == set(app.chain_ids)
    assert unpacker.contents(parent, tmp_path / "at", *app.files) == list(app.files.values())
    lazy.assert_no_layer_fetched(app)


def test_chain_that_nobody_knows(lazy: LazyContainerd, unpacker: Unpacker, app: AppImage, tmp_path: Path) -> None:
    """An ordinary snapshot: empty, and all that the snapshotter knows of the layer."""
    lazy.seed(lazy.push(app, "app"))
    unknown = chain_ids([app.layers[0].diff_id, app.layers[2].diff_id])[1]
    bottom = unpacker.lazy(app.chain_ids[0], "")
    key, mounts = unpacker.prepare(unknown, bottom)
    with mounted(mounts, tmp_path / "at") as at:
        assert (at / "id").read_bytes() == app.files["/id"]
    (upper,) = [option.partition("=")[2] for option in mounts[0].options if option.startswith("upperdir=")]
    assert list((tmp_path / upper).iterdir()) == []
    info = unpacker.api.stat(key)
    assert (info.kind, dict(info.labels)) == (pb.ACTIVE, {REF: unknown})


def test_layer_on_one_unpacked_here(lazy: LazyContainerd, unpacker: Unpacker, app: AppImage, tmp_path: Path) -> None:
    """It has a name of its own there, for the parent is another one; under the chain id it is found on the chain id."""
    unpacked = unpacker.unpack(app.chain_ids[0], "", {"id": "unpacked", "here": "here"}, tmp_path / "at")
    lazy.seed(lazy.push(app, "app"))
    second = unpacker.lazy(app.chain_ids[1], unpacked)
    third = unpacker.lazy(app.chain_ids[2], second)
    assert not {second, third} & set(app.chain_ids)
    top = app.files["/top"]
    assert unpacker.contents(third, tmp_path / "at", "id", "here", "top") == [b"unpacked", b"here", top]
    parent = ""
    for chain_id in app.chain_ids:
        parent = unpacker.lazy(chain_id, parent)
        assert parent == chain_id
    assert unpacker.contents(parent, tmp_path / "at", "id", "top") == [app.files["/id"], top]


def test_annotation_tells_the_diff_id(lazy: LazyContainerd, unpacker: Unpacker, app: AppImage, tmp_path: Path) -> None:
    """With it the cluster finds a layer in whatever image it is, unless it does not fit: it may come from anybody."""
    lazy.seed(lazy.push(app, "app"))
    low, high = app.layers[1].diff_id, app.layers[0].diff_id  # no image has them in this order
    bottom, top = chain_ids([low, high])
    assert unpacker.lazy(bottom, "") == bottom, "of the bottom layer the diff id is the chain id"
    assert unpacker.prepare(top, bottom)[1]
    assert unpacker.prepare(top, bottom, {DIFF_ID: app.layers[2].diff_id})[1], "another layer"
    assert unpacker.prepare(top, bottom, {DIFF_ID: "sha256:../../etc"})[1]
    assert unpacker.lazy(top, bottom, {DIFF_ID: high}) == top
    assert unpacker.contents(top, tmp_path / "at", "id", "big/00") == [app.files["/id"], app.files["/big/00"]]


def test_names_are_only_somewhere_to_look(lazy: LazyContainerd, unpacker: Unpacker, app: AppImage) -> None:
    """A label may lead to an image without the layer, to none, or to files of the node."""
    other = lazy.push(app, "app")
    layout = f"oci:{app.layout}:latest"
    for name in (f"{lazy.registry.address}/no/such:image", "127.0.0.1:1/no:registry", layout, "/", ""):
        assert unpacker.prepare(app.chain_ids[0], "", {IMAGE: name})[1], name
    unknown = f"sha256:{'1' * 64}"
    assert unpacker.prepare(unknown, "", {IMAGE: other})[1]
    assert unpacker.lazy(app.chain_ids[0], "", {IMAGE: other}) == app.chain_ids[0]
