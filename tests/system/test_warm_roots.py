"""Roots that are mounted before a run asks: they serve the next run, and nothing of an earlier one is in them."""

from __future__ import annotations

import asyncio
import json
import shutil
from typing import TYPE_CHECKING

import pytest

from afs.core.mounts import list_mounts
from tests.testbed import oci, tars
from tests.testbed.cluster import cluster, exempt

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator
    from pathlib import Path

    from afs.client import RunResult
    from tests.testbed.cluster import RealCluster
    from tests.testbed.images import BusyboxImage
    from tests.testbed.registry import Registry

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def node() -> Iterator[RealCluster]:
    """A node of its own, so that nobody else takes roots."""
    with cluster(1) as running, exempt(running):
        yield running


@pytest.fixture(scope="module")
def image(session_registry: Registry) -> str:
    """busybox by way of a registry: what local directories hold may change without notice, so that is not kept."""
    return f"{session_registry.address}/busybox:latest"


def roots(node: RealCluster) -> set[str]:
    """Where roots are mounted."""
    return {mount.target for mount in list_mounts(str(node.nodes[0].directory / "snapshotter/roots"))}


def run(node: RealCluster, image: str, script: str, **options: object) -> RunResult:
    """One command to its end."""
    with node.sync_client() as client:
        return client.run(image, ["sh", "-c", script], memory_mb=64, **options)  # type: ignore[arg-type]


def test_a_root_that_nobody_wrote_to_serves_the_next_run(node: RealCluster, image: str) -> None:
    assert run(node, image, "cat /data/hello.txt > /dev/null").ok
    before = roots(node)
    assert len(before) == 1
    assert run(node, image, "find / -xdev > /dev/null; cat /data/hello.txt").ok
    assert roots(node) == before


@pytest.mark.parametrize(
    "script",
    [
        "echo secret > /written",
        "rm /data/hello.txt",
        "echo x > /gone; rm /gone",
        "chmod 700 /",
        "touch /",
        "mkdir -p /a/b && rmdir /a/b /a",
        "chown 5:5 /data",
    ],
)
def test_a_root_that_was_written_to_does_not(node: RealCluster, image: str, script: str) -> None:
    show = "stat -c '%a %u' / /data; ls /; cat /data/hello.txt"
    clean = run(node, image, show)
    assert clean.ok
    before = roots(node)
    assert run(node, image, script).ok
    assert len(before - roots(node)) == 1
    assert run(node, image, show).stdout == clean.stdout


def test_many_at_once_never_share_a_root(node: RealCluster, image: str) -> None:
    async def everything() -> list[RunResult]:
        script = "ls /mine 2> /dev/null && exit 1; echo $$ > /mine; ls / | grep -c mine"
        async with node.client() as client:
            work = [client.run(image, ["sh", "-c", script], cpu=0.2, memory_mb=64) for _ in range(24)]
            return await asyncio.gather(*work)

    assert [(result.exit_code, result.stdout) for result in asyncio.run(everything())] == [(0, b"1\n")] * 24


def test_runs_of_other_limits_get_other_roots(node: RealCluster, image: str) -> None:
    assert run(node, image, "true").ok
    before = roots(node)
    limited = run(node, image, "dd if=/dev/zero of=/big bs=1M count=20", disk_mb=8)
    assert limited.exit_code == 1
    assert b"No space left on device" in limited.stderr
    assert before <= roots(node)


def test_an_upload_is_over_a_root_of_its_own(node: RealCluster, image: str, tmp_path: Path) -> None:
    (tmp_path / "up").write_text("mine")
    assert run(node, image, "cat /up", upload=tmp_path).stdout == b"mine"
    assert run(node, image, "ls /up").exit_code == 1


def test_a_local_image_may_change_between_two_runs(
    node: RealCluster, busybox_image: BusyboxImage, tmp_path: Path
) -> None:
    layout = tmp_path / "layout"
    shutil.copytree(busybox_image.layout, layout)
    name = f"oci:{layout}:{busybox_image.tag}"
    assert run(node, name, "cat /data/hello.txt").ok
    index = json.loads((layout / "index.json").read_text())
    other = next(entry for entry in index["manifests"] if entry["annotations"][oci.REF_NAME] == "entry")
    for entry in index["manifests"]:
        if entry["annotations"][oci.REF_NAME] == busybox_image.tag:
            entry.update(digest=other["digest"], size=other["size"], mediaType=other["mediaType"])
    (layout / "index.json").write_text(json.dumps(index))
    with node.sync_client() as client:
        assert client.run(name, ["sh", "-c", "echo $FOO"], memory_mb=64).stdout == b"image\n"


def test_idle_roots_make_room_in_the_cache(
    busybox_image: BusyboxImage, registry: Registry, tmp_path: Path, rng: random.Random
) -> None:
    """A cache that holds one of two images: the next one is not refused because roots of the first wait for a run."""
    builder, names = oci.LayoutBuilder(oci.copy_layout(busybox_image.layout, tmp_path / "layout")), []
    for number in range(2):
        layer = builder.add_layer(tars.tar_of({"data": rng.randbytes(12 << 20)}), "plain")
        builder.add_image(f"v{number}", [*busybox_image.layers, layer], {"Env": ["PATH=/bin"]})
        names.append(registry.push(builder.directory, f"v{number}", f"image{number}"))
    with cluster(1, layerstore_flags=(f"--capacity={22 << 20}", "--reserve=1M")) as running:
        for name in (*names, *names):
            assert run(running, name, "sha256sum /data").ok


def test_what_a_run_fetched_is_told(busybox_image: BusyboxImage, session_registry: Registry) -> None:
    image = f"{session_registry.address}/busybox:latest"
    with cluster(1) as running:
        first, second = run(running, image, "true"), run(running, image, "true")
    blobs = sum({layer.digest: layer.size for layer in busybox_image.layers}.values())
    assert (first.bytes_fetched, second.bytes_fetched) == (blobs, 0)
