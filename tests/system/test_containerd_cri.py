"""The kubelet's way to AFS: containerd's CRI plugin with AFS as its snapshotter."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from tests.testbed.appimage import MIB, app_image
from tests.testbed.containerd import CRI_NAMESPACE
from tests.testbed.cri import Kubelet
from tests.testbed.cri.runtime_pb2 import CONTAINER_RUNNING

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.testbed.appimage import AppImage
    from tests.testbed.lazycontainerd import LazyContainerd

pytestmark = [pytest.mark.root, pytest.mark.containerd, pytest.mark.slow]
COUNTED_WITHIN_S = 20


@pytest.fixture
def app(tmp_path: Path, rng: random.Random) -> AppImage:
    """An image that nobody knows."""
    return app_image(tmp_path / "app", rng)


@pytest.fixture
def kubelet(lazy: LazyContainerd) -> Iterator[Kubelet]:
    """Speaks to the containerd; afterwards there are no pods and no images."""
    with Kubelet(lazy.containerd) as speaking:
        yield speaking
        speaking.remove_all()


def test_pod(lazy: LazyContainerd, kubelet: Kubelet, app: AppImage) -> None:
    image = lazy.push(app, "app")
    lazy.seed(image)
    lazy.registry.forget()
    kubelet.pull(image)
    lazy.assert_lazy(app, CRI_NAMESPACE)
    lazy.assert_no_layer_fetched(app)
    (known,) = kubelet.images()
    assert known.repo_tags == [image]
    pod = kubelet.run_pod("pod")
    container = kubelet.run(pod, "one", image, "/bin/sh", "-c", "sleep 1000")
    assert kubelet.status(container).state == CONTAINER_RUNNING
    assert kubelet.execute(container, "/bin/sh", "-ec", app.check) == (0, app.listing.encode(), b"")
    assert kubelet.execute(container, "/bin/sh", "-c", "echo new > /new; cat /new; exit 7") == (7, b"new\n", b"")
    lazy.assert_no_layer_fetched(app)
    assert not app.blobs & lazy.content(CRI_NAMESPACE)
    kubelet.remove(container)
    kubelet.remove_pod(pod)
    kubelet.remove_image(image)
    assert [tag for found in kubelet.images() for tag in found.repo_tags] == [lazy.pause]
    with lazy.api() as api:
        assert not set(app.chain_ids) & set(api.infos())


def test_image_filesystem(lazy: LazyContainerd, kubelet: Kubelet, app: AppImage) -> None:
    """What it says is what is on the disk: of lazy layers the part that is here, and what containers write.

    containerd counts a layer once, so what comes later, when somebody reads it, it never says.
    """
    image = lazy.push(app, "app")
    lazy.seed(image)
    kubelet.pull(image)
    with lazy.api() as api:
        usages = [api.usage(name) for name in api.infos()]
    size, inodes = sum(size for size, _ in usages), sum(inodes for _, inodes in usages)
    assert inodes == len(app.layers)
    assert 0 < size < len(app.files) // 2 * MIB
    until(lambda: used(kubelet) == (size, inodes), kubelet)
    container = kubelet.run(kubelet.run_pod("pod"), "one", image, "/bin/sh", "-c", "sleep 1000")
    before = counted(kubelet)
    assert kubelet.execute(container, "/bin/sh", "-c", f"head -c {4 * MIB} /dev/urandom > /new")[0] == 0
    after = counted(kubelet)
    assert 4 * MIB <= after[0] - before[0] < 5 * MIB
    assert after[1] - before[1] == 1


def used(kubelet: Kubelet) -> tuple[int, int]:
    """Bytes and inodes that ImageFsInfo says."""
    found = kubelet.image_filesystem()
    return found.used_bytes.value, found.inodes_used.value


def counted(kubelet: Kubelet) -> tuple[int, int]:
    """The same, once all that there is was counted after this call."""
    now = time.time_ns()
    until(lambda: kubelet.image_filesystem().timestamp > now, kubelet)
    return used(kubelet)


def until(condition: Callable[[], bool], kubelet: Kubelet) -> None:
    """Wait: containerd counts once a second, and tells nobody."""
    deadline = time.monotonic() + COUNTED_WITHIN_S
    while not condition():
        assert time.monotonic() < deadline, kubelet.image_filesystem()
        time.sleep(0.05)


def test_nobody_has_the_image(lazy: LazyContainerd, kubelet: Kubelet, app: AppImage) -> None:
    image = lazy.push(app, "app")
    lazy.registry.forget()
    kubelet.pull(image)
    lazy.assert_lazy(app, CRI_NAMESPACE)
    fetches = lazy.registry.blob_fetches()
    assert {digest: fetches[digest] for digest in app.blobs} == dict.fromkeys(app.blobs, 1)
    container = kubelet.run(kubelet.run_pod("pod"), "one", image, "/bin/sh", "-c", "sleep 1000")
    assert kubelet.execute(container, "/bin/sh", "-ec", app.check) == (0, app.listing.encode(), b"")
