"""Debian's containerd as a fixture, with images of the testbed run in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.testbed import oci
from tests.testbed.appimage import TAG, app_image, pause_image
from tests.testbed.containerd import CRI_NAMESPACE, Containerd, Cri, CtrError
from tests.testbed.cri import Kubelet
from tests.testbed.cri.runtime_pb2 import CONTAINER_RUNNING

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator
    from pathlib import Path

    from tests.testbed.images import BusyboxImage
    from tests.testbed.registry import Registry

pytestmark = [pytest.mark.root, pytest.mark.containerd]
PULL = ("images", "pull", "--plain-http")


@pytest.fixture
def containerd() -> Iterator[Containerd]:
    with Containerd() as running:
        yield running


@pytest.mark.parametrize("tag", ["latest", "docker", "multi"])
def test_images_of_each_encoding_run(
    containerd: Containerd, session_registry: Registry, busybox_image: BusyboxImage, tag: str
) -> None:
    name = f"{session_registry.address}/busybox:{tag}"
    containerd.ctr(*PULL, name)
    script = "; ".join(
        [f"cat {path}" for path in sorted(busybox_image.present)]
        + [f"test ! -e {path}" for path in busybox_image.absent]
    )
    wanted = b"".join(busybox_image.present[path] for path in sorted(busybox_image.present)).decode()
    assert containerd.ctr("run", "--rm", "--snapshotter", "overlayfs", name, "one", "/bin/sh", "-ec", script) == wanted


def test_entry_point_user_and_directory(containerd: Containerd, session_registry: Registry) -> None:
    name = f"{session_registry.address}/busybox:entry"
    containerd.ctr(*PULL, name)
    assert containerd.ctr("run", "--rm", name, "one") == "from cmd\n"
    shown = containerd.ctr("run", "--rm", name, "two", "/bin/sh", "-c", "id; pwd; echo $FOO").splitlines()
    assert shown == ["uid=1000(app) gid=1000(app) groups=1000(app),2000(extra)", "/home/app", "image"]


def test_a_docker_archive_can_be_imported(containerd: Containerd, busybox_image: BusyboxImage, tmp_path: Path) -> None:
    import gzip

    image = oci.read_image(busybox_image.layout, "docker")
    tars = [gzip.decompress(oci.blob_path(image.layout, layer.digest).read_bytes()) for layer in image.layers]
    diff_ids = oci.docker_archive(tmp_path / "saved.tar", ["saved:1"], tars, image.config["config"])
    assert diff_ids == image.diff_ids
    containerd.ctr("images", "import", tmp_path / "saved.tar")
    assert "saved:1" in containerd.ctr("images", "list", "--quiet")


def test_a_restart_keeps_images(containerd: Containerd, session_registry: Registry) -> None:
    name = f"{session_registry.address}/busybox:docker"
    containerd.ctr(*PULL, name)
    containerd.restart()
    assert name in containerd.ctr("images", "list", "--quiet").splitlines()


def test_stop_ends_running_containers(session_registry: Registry) -> None:
    with Containerd() as containerd:  # the check for leaks is the assertion here
        name = f"{session_registry.address}/busybox:docker"
        containerd.ctr(*PULL, name)
        containerd.ctr("run", "--detach", name, "sleeper", "/bin/sleep", "1000")
        assert "RUNNING" in containerd.ctr("tasks", "list")


def test_a_failing_command_shows_its_output(containerd: Containerd) -> None:
    with pytest.raises(CtrError, match="no/such"):
        containerd.ctr("run", "--rm", "no/such:image", "x")
    assert containerd.ctr_process("run", "--rm", "no/such:image", "x").returncode == 1


@pytest.mark.slow
def test_kubelet(registry: Registry, tmp_path: Path, rng: random.Random) -> None:
    pause = registry.push(pause_image(tmp_path / "pause"), TAG, "pause")
    app = app_image(tmp_path / "app", rng, 1)
    image = registry.push(app.layout, TAG, "app")
    with Containerd(cri=Cri(pause)) as containerd, Kubelet(containerd) as kubelet:
        assert kubelet.conditions() == {"RuntimeReady": True, "NetworkReady": False}
        kubelet.pull(image)
        assert [tag for found in kubelet.images() for tag in found.repo_tags] == [image]
        pod = kubelet.run_pod("pod")
        container = kubelet.run(pod, "one", image, "/bin/sh", "-c", "sleep 1000")
        assert kubelet.status(container).state == CONTAINER_RUNNING
        assert kubelet.execute(container, "/bin/sh", "-ec", app.check) == (0, app.listing.encode(), b"")
        assert kubelet.execute(container, "/bin/sh", "-c", "echo no >&2; exit 3") == (3, b"", b"no\n")
        kubelet.remove(container)
        kubelet.remove_pod(pod)
        for name in (image, pause):
            kubelet.remove_image(name)
        assert kubelet.images() == []
        assert containerd.ctr("content", "list", "--quiet", namespace=CRI_NAMESPACE) == ""
        # What follows is left to containerd's end, and the check for leaks is the assertion.
        kubelet.pull(image)
        kubelet.run(kubelet.run_pod("left"), "left", image, "/bin/sh", "-c", "sleep 1000")


def test_other_namespaces_end_too(session_registry: Registry) -> None:
    name = f"{session_registry.address}/busybox:docker"
    with Containerd() as containerd:
        other = containerd.other_namespace("two")
        containerd.ctr(*PULL, name, namespace=other)
        containerd.ctr("run", "--detach", name, "sleeper", "/bin/sleep", "1000", namespace=other)
        assert "RUNNING" in containerd.ctr("tasks", "list", namespace=other)
        assert containerd.ctr("containers", "list", "--quiet") == ""
