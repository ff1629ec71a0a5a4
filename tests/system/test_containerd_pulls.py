"""Which layers containerd gets from the cluster, by what its client says and what the cluster has; the rest it pulls as ever."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from tests.testbed import oci
from tests.testbed.appimage import DIFF_ID_ANNOTATION, MIB, TAG, app_image, grown
from tests.testbed.lazycontainerd import SNAPSHOTTER
from tests.testbed.registry import PASSWORD, USER, Registry
from tests.testbed.snapshots import REF

if TYPE_CHECKING:
    import random
    from pathlib import Path

    from tests.testbed.appimage import AppImage
    from tests.testbed.lazycontainerd import LazyContainerd

pytestmark = [pytest.mark.root, pytest.mark.containerd, pytest.mark.slow]
FILES = 8


@pytest.fixture
def app(tmp_path: Path, rng: random.Random) -> AppImage:
    """An image that nobody knows."""
    return app_image(tmp_path / "app", rng, FILES)


def test_plain_pull(lazy: LazyContainerd, app: AppImage) -> None:
    """A client that says nothing about layers gets snapshots of its own, even of what the cluster has."""
    image = lazy.push(app, "app")
    lazy.seed(image)
    lazy.registry.forget()
    lazy.pull(image)
    assert app.blobs <= lazy.content()
    assert lazy.registry.blob_fetches()[app.layers[1].digest] == 1
    assert len(lazy.directories()) == len(app.layers)
    assert lazy.run(image, "one", app.check) == app.listing
    size, inodes = lazy.usages()[app.chain_ids[1]]
    assert FILES * MIB <= size < (FILES + 1) * MIB
    assert inodes == len(["/", "/big", *range(FILES), "/data", "/data/replaced", "/data/removed"])


def test_base_unpacked_here(lazy: LazyContainerd, app: AppImage, tmp_path: Path, rng: random.Random) -> None:
    """Layers of the cluster on layers that containerd unpacked."""
    base = lazy.push(app, "base")
    more = grown(app, tmp_path / "grown", rng)
    image = lazy.push(more, "grown")
    lazy.seed(image)
    lazy.pull(base)
    lazy.registry.forget()
    lazy.rpull(image)
    lazy.assert_no_layer_fetched(more)
    assert more.layers[-1].digest not in lazy.content()
    assert len(lazy.directories()) == len(app.layers)
    assert lazy.run(image, "one", more.check) == more.listing
    # And once more in a namespace where nothing is unpacked: all of it is from the cluster.
    other = lazy.containerd.other_namespace("other")
    lazy.rpull(image, other)
    assert lazy.content(other).isdisjoint(more.blobs)
    assert lazy.run(image, "one", more.check, other) == more.listing


def test_registry_gone(lazy: LazyContainerd, app: AppImage) -> None:
    """Once pulled, an image needs the registry no more, for what it has not read either."""
    with Registry() as registry:
        image = lazy.push(app, "app", registry)
        lazy.seed(image)
        lazy.rpull(image)
    assert lazy.missing(app.layers[1])
    assert lazy.run(image, "one", app.check) == app.listing


def test_nobody_has_the_image(lazy: LazyContainerd, app: AppImage) -> None:
    """The cluster pulls what the labels name, once, while containerd waits, and the second node reads it from the first."""
    image = lazy.push(app, "app")
    lazy.registry.forget()
    lazy.rpull(image)
    lazy.assert_lazy(app)
    fetches = lazy.registry.blob_fetches()
    assert {digest: fetches[digest] for digest in app.blobs} == dict.fromkeys(app.blobs, 1)
    asked = {request.user_agent for request in lazy.registry.requests("GET") if request.digest in app.blobs}
    assert len(asked) == 1
    assert "(node1)" in asked.pop()
    assert lazy.run(image, "one", app.check) == app.listing


def test_cluster_may_not_pull(lazy: LazyContainerd, app: AppImage) -> None:
    """An image that only containerd has the password for is pulled as ever."""
    with Registry(auth=True) as registry:
        image = lazy.push(app, "app", registry)
        command = ("images", "rpull", "--plain-http", "--user", f"{USER}:{PASSWORD}", *SNAPSHOTTER, image)
        lazy.containerd.ctr(*command, program="ctr-remote")
        assert app.blobs <= lazy.content()
        fetches = registry.blob_fetches()
        assert {digest: fetches[digest] for digest in app.blobs} == dict.fromkeys(app.blobs, 1)
    assert len(lazy.directories()) == len(app.layers)
    assert lazy.run(image, "one", app.check) == app.listing


def test_tag_that_moved(lazy: LazyContainerd, app: AppImage, tmp_path: Path, rng: random.Random) -> None:
    """The cluster believes a tag for a while, but not if containerd, which asks the registry, has seen another image."""
    old = app_image(tmp_path / "old", rng, 1)
    image = lazy.registry.push(old.layout, TAG, "moved")
    lazy.seed(image)
    assert lazy.registry.push(app.layout, TAG, "moved") == image
    lazy.rpull(image)
    assert not app.blobs & lazy.content()
    assert lazy.run(image, "one", app.check) == app.listing


def test_layerstore_gone(lazy: LazyContainerd, app: AppImage) -> None:
    """Without it a node is one where nothing is lazy."""
    image = lazy.push(app, "app")
    lazy.seed(image)
    lazy.cluster.kill(lazy.node.layerstore)
    lazy.rpull(image)
    assert app.blobs <= lazy.content()
    assert lazy.run(image, "one", app.check) == app.listing
    asyncio.run(lazy.cluster.restart(lazy.node.layerstore))


def test_annotated_image(lazy: LazyContainerd, app: AppImage, tmp_path: Path, rng: random.Random) -> None:
    """containerd passes annotations on, and an image that has them is pulled like any other."""
    annotated = app_image(tmp_path / "annotated", rng, 1, annotated=True)
    manifest = oci.load_json(annotated.layout, oci.read_image(annotated.layout, TAG).manifest.digest)
    assert [layer["annotations"] for layer in manifest["layers"]] == [
        {DIFF_ID_ANNOTATION: layer.diff_id} for layer in annotated.layers
    ]
    image = lazy.push(annotated, "annotated")
    lazy.seed(image)
    lazy.rpull(image)
    lazy.assert_lazy(annotated)
    with lazy.api() as api:
        infos = api.infos()
    # Namespaces share these snapshots, so what one image's author wrote is on none of them.
    assert all(set(infos[chain_id].labels) == {REF} for chain_id in annotated.chain_ids)
    assert lazy.run(image, "one", annotated.check) == annotated.listing
