"""containerd with AFS as its snapshotter: images of the cluster are pulled lazily, run, committed, and removed without a trace."""

from __future__ import annotations

import gzip
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from tests.testbed import capabilities
from tests.testbed.appimage import MIB, TAG, app_image, archive, on_top, tall_image
from tests.testbed.lazycontainerd import SNAPSHOTTER, lazy_containerd

if TYPE_CHECKING:
    import random
    from pathlib import Path

    from tests.testbed.appimage import AppImage
    from tests.testbed.lazycontainerd import LazyContainerd

pytestmark = [pytest.mark.root, pytest.mark.containerd]
AT_ONCE = 30
FILES = 8


@pytest.fixture
def app(tmp_path: Path, rng: random.Random) -> AppImage:
    """An image that nobody knows."""
    return app_image(tmp_path / "app", rng, FILES)


def test_lazy(lazy: LazyContainerd, app: AppImage) -> None:
    """Nothing but the manifest and the config comes from the registry, and of layers only what is read."""
    image = lazy.push(app, "app")
    lazy.seed(image)
    lazy.registry.forget()
    lazy.rpull(image)
    lazy.assert_no_layer_fetched(app)
    lazy.assert_lazy(app)
    big = app.layers[1]
    assert lazy.run(image, "one", "cat /top") == app.files["/top"].decode()
    assert lazy.missing(big) >= FILES // 2
    lazy.start(image, "two")
    assert lazy.execute("two", app.check) == app.listing
    assert lazy.missing(big) == 0
    lazy.assert_no_layer_fetched(app)
    assert not app.blobs & lazy.content()
    assert lazy.execute("two", f"head -c {MIB} /dev/zero > /new; rm /top; echo x >> /id; cat /id").endswith("x\n")
    lazy.collect()
    assert len(lazy.directories()) == 1
    usage = lazy.usages()
    size, inodes = usage.pop("two")
    assert size >= MIB
    assert inodes >= 4, "the root, /new, the whiteout of /top, and /id"
    assert set(usage) == set(app.chain_ids)


@pytest.mark.slow
def test_commit(lazy: LazyContainerd, app: AppImage, tmp_path: Path) -> None:
    """What a container wrote becomes a layer of a new image, made of what containerd says is different."""
    image = lazy.push(app, "app")
    lazy.seed(image)
    lazy.rpull(image)
    lazy.start(image, "changed")
    lazy.execute("changed", "echo written > /written; rm /id")
    lazy.registry.forget()
    layer = gzip.decompress(output(lazy, "snapshots", *SNAPSHOTTER, "diff", "changed"))
    files = {path: data for path, data in app.files.items() if path != "/id"} | {"/written": b"written\n"}
    committed = replace(on_top(app, tmp_path / "committed", layer, files), gone=(*app.gone, "/id"))
    archive(committed, tmp_path / "committed.tar", committed.layers[-1:])
    lazy.containerd.ctr("images", "import", "--base-name", "committed/app", *SNAPSHOTTER, tmp_path / "committed.tar")
    assert lazy.run(f"committed/app:{TAG}", "one", committed.check) == committed.listing
    lazy.assert_no_layer_fetched(app)
    # Pushed, it is an image like any other: the one new layer is what the cluster lacks, and it gets it by the name.
    other = lazy.containerd.other_namespace("other")
    lazy.rpull(lazy.push(committed, "committed"), other)
    assert lazy.run(lazy.push(committed, "committed"), "one", committed.check, other) == committed.listing
    assert not committed.blobs & lazy.content(other)
    lazy.assert_no_layer_fetched(app)
    assert lazy.registry.blob_fetches()[committed.layers[-1].digest] == 1


def output(lazy: LazyContainerd, *args: str) -> bytes:
    """What `ctr` prints, as it is."""
    return subprocess.run(lazy.containerd.ctr_command(*args), check=True, capture_output=True).stdout


@pytest.mark.slow
def test_two_namespaces(lazy: LazyContainerd, app: AppImage) -> None:
    """They share layers of the cluster, and removing an image in one leaves it to the other."""
    image = lazy.push(app, "app")
    lazy.seed(image)
    lazy.registry.forget()
    other = lazy.containerd.other_namespace("other")
    for namespace in ("", other):
        lazy.rpull(image, namespace)
        lazy.assert_lazy(app, namespace)
    lazy.assert_no_layer_fetched(app)
    with lazy.api() as api:
        assert set(api.infos()) == set(app.chain_ids)
    lazy.start(image, "one", namespace="")
    lazy.start(image, "one", namespace=other)
    lazy.execute("one", "echo here > /here")
    assert lazy.execute("one", f"test ! -e /here; {app.check}", other) == app.listing
    lazy.containerd.end_containers()
    lazy.containerd.ctr("images", "remove", image)
    lazy.collect()
    assert lazy.snapshots("list").splitlines()[1:] == []
    assert lazy.execute("one", app.check, other) == app.listing
    assert lazy.run(image, "two", app.check, other) == app.listing


@pytest.mark.slow
def test_many_containers_at_once(lazy: LazyContainerd, app: AppImage) -> None:
    image = lazy.push(app, "app")
    lazy.seed(image)
    lazy.registry.forget()
    lazy.rpull(image)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(
            pool.map(lambda n: lazy.run(image, f"c{n}", f"echo {n} > /n; {app.check}; cat /n"), range(AT_ONCE))
        )
    assert found == [f"{app.listing}{n}\n" for n in range(AT_ONCE)]
    lazy.assert_no_layer_fetched(app)


@pytest.mark.slow
def test_other_roots(lazy: LazyContainerd, app: AppImage) -> None:
    """A view, and one whose files belong to others, for which containerd copies them all."""
    image = lazy.push(app, "app")
    lazy.seed(image)
    lazy.registry.forget()
    lazy.rpull(image)
    assert lazy.run(image, "view", f"{app.check}; ! touch /new", flags=["--read-only"]) == app.listing
    mapped = ["--uidmap", "0:100000:65536", "--gidmap", "0:100000:65536"]
    assert lazy.run(image, "mapped", f"{app.check}; stat -c %u:%g /id", flags=mapped) == f"{app.listing}0:0\n"
    lazy.assert_no_layer_fetched(app)


@pytest.mark.slow
def test_many_layers(lazy: LazyContainerd, tmp_path: Path, rng: random.Random) -> None:
    """More than mount(2) has room for if each is given by its name."""
    tall = tall_image(tmp_path / "tall", rng, 100)
    image = lazy.push(tall, "tall")
    lazy.seed(image)
    lazy.registry.forget()
    lazy.rpull(image)
    lazy.assert_lazy(tall)
    lazy.assert_no_layer_fetched(tall)
    lazy.start(image, "one")
    assert lazy.execute("one", tall.check) == tall.listing
    lazy.stop_snapshotter(kill=True)
    lazy.start_snapshotter()
    assert lazy.run(image, "two", tall.check) == tall.listing


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["erofs-loop", "tree"])
def test_other_backends(app: AppImage, backend: str) -> None:
    """What kernels before 6.12 and 6.4 use."""
    capabilities.require("root", "fuse", "overlay", "erofs", "cgroup", "runc", "containerd", "ctr-remote")
    with lazy_containerd(f"--backend={backend}") as lazy:
        image = lazy.push(app, "app")
        lazy.seed(image)
        lazy.rpull(image)
        lazy.assert_lazy(app)
        lazy.start(image, "one", f"echo x > /new; {app.check} > /read; exec sleep 1000")
        lazy.stop_snapshotter(kill=True)
        lazy.start_snapshotter()
        assert lazy.execute("one", app.check) == app.listing
        assert lazy.run(image, "two", app.check) == app.listing
        lazy.remove_everything()
        lazy.assert_empty()


@pytest.mark.slow
def test_nerdctl(lazy: LazyContainerd, app: AppImage) -> None:
    if shutil.which("nerdctl") is None:
        pytest.skip("Debian 12 has no nerdctl, and none is on PATH")
    image = lazy.push(app, "app")
    lazy.seed(image)
    lazy.registry.forget()
    address = ("--address", str(lazy.containerd.socket), "--namespace", lazy.containerd.namespace)
    run = (
        "run",
        "--rm",
        "--network",
        "host",
        "--cgroup-parent",
        f"/{lazy.containerd.namespace}",
        "--insecure-registry",
    )
    done = subprocess.run(
        ["nerdctl", *address, *SNAPSHOTTER, *run, image, "/bin/sh", "-ec", app.check],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == app.listing, done.stderr
    lazy.assert_no_layer_fetched(app)
