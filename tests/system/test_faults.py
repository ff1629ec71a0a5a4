"""Services that die, are stopped or lie while a run is under way: a clear error, never wrong bytes, nothing left."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from afs.client import AfsClient, Log
from afs.core.errors import AfsError, Unavailable
from afs.core.mounts import list_mounts
from tests.system.test_mount_command import attached
from tests.testbed import mounts, oci, tars
from tests.testbed.cluster import cluster

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from afs.core.cluster import NodeProcesses, Process
    from tests.testbed.cluster import RealCluster
    from tests.testbed.images import BusyboxImage

pytestmark = pytest.mark.root
GRACE = 5.0


@pytest.fixture
def fragile(fragile_cluster: RealCluster, busybox_image: BusyboxImage) -> Iterator[RealCluster]:
    """That cluster, whole and idle before and after, with runs working on both nodes; node2 gets its layers from node1."""

    async def both_nodes_run() -> None:
        async with fragile_cluster.client() as client:
            deadline = time.monotonic() + GRACE
            while (await client.status())[0].summary.afslet_reachable < 2:  # has the proxy look at its nodes
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)  # a channel to a service that was down tries again after a while
            for node in fragile_cluster.nodes:
                assert (await client.run(busybox_image.reference, ["true"], node_id=node.node_id)).ok

    async def restart_what_ended() -> None:
        for process in reversed(fragile_cluster.cluster.processes()):  # discovery first
            if process.popen.poll() is not None:
                await fragile_cluster.restart(process)

    asyncio.run(both_nodes_run())
    yield fragile_cluster
    asyncio.run(restart_what_ended())
    asyncio.run(both_nodes_run())
    fragile_cluster.assert_idle()


@asynccontextmanager
async def run_under_way(running: RealCluster, image: str, node_id: str) -> AsyncIterator[asyncio.Task[Any]]:
    """A run on a node that has printed something and would last for ever."""
    started = asyncio.Event()

    async def follow() -> None:
        async with running.client() as client:
            async for event in client.execute(image, ["sh", "-c", "echo here; sleep 1000"], node_id=node_id):
                if isinstance(event, Log):
                    started.set()

    task = asyncio.create_task(follow())
    waiting = asyncio.create_task(started.wait())
    try:
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        assert started.is_set(), task
        yield task
    finally:
        for each in (task, waiting):
            each.cancel()
        await asyncio.gather(task, waiting, return_exceptions=True)


async def until(condition: Callable[[], bool], what: str) -> None:
    """Poll for what other processes do without an event for us."""
    deadline = time.monotonic() + GRACE
    while not condition():
        assert time.monotonic() < deadline, f"{what} not after {GRACE} s"
        await asyncio.sleep(0.02)


async def terminated(process: Process) -> int:
    """SIGTERM a service; its exit status."""
    process.popen.terminate()
    return await asyncio.to_thread(process.popen.wait, GRACE)


def cgroup_processes(running: RealCluster, node: NodeProcesses) -> list[int]:
    """What runs in the cgroups of a node's runs."""
    return running.processes_of_runs(node)


def roots(node: NodeProcesses) -> list[Path]:
    """The root file systems of a node's runs."""
    return list((node.directory / "snapshotter/roots").iterdir())


async def test_afslet_is_killed(fragile: RealCluster, busybox_image: BusyboxImage) -> None:
    node = fragile.nodes[0]
    async with run_under_way(fragile, busybox_image.reference, "node1") as task:
        assert cgroup_processes(fragile, node)
        assert roots(node)
        await asyncio.to_thread(fragile.kill, node.afslet)
        with pytest.raises(Unavailable, match=f"afslet {node.afslet.address}|Socket closed"):
            await asyncio.wait_for(task, GRACE)
        await until(lambda: not roots(node), "the root is given back")
        assert not list_mounts(str(node.directory / "snapshotter/roots"))
        await until(lambda: not cgroup_processes(fragile, node), "its keeper has killed the run")
        await fragile.restart(node.afslet)


async def test_other_node_takes_over_from_a_killed_afslet(fragile: RealCluster, busybox_image: BusyboxImage) -> None:
    node = fragile.nodes[0]
    await asyncio.to_thread(fragile.kill, node.afslet)
    async with fragile.client() as client:
        results = [await client.run(busybox_image.reference, ["true"]) for _ in range(4)]
        with pytest.raises(Unavailable, match="node 'node1' does not answer: "):
            await client.run(busybox_image.reference, ["true"], node_id="node1")
        assert {result.node_id for result in results} == {"node2"}
        summary = (await client.status())[0].summary
        assert (summary.afslet_instances, summary.afslet_reachable) == (2, 1)
    await fragile.restart(node.afslet)


@pytest.mark.parametrize("node_id", ["node1", "node2"])
async def test_snapshotter_is_killed(fragile: RealCluster, busybox_image: BusyboxImage, node_id: str) -> None:
    node = next(node for node in fragile.nodes if node.node_id == node_id)
    async with run_under_way(fragile, busybox_image.reference, node_id) as task:
        await asyncio.to_thread(fragile.kill, node.snapshotter)
        with pytest.raises(Unavailable, match="snapshotter"):
            await asyncio.wait_for(task, GRACE)
        await until(lambda: not cgroup_processes(fragile, node), "the run is ended")
        assert list_mounts(str(node.directory))
        await fragile.restart(node.snapshotter)
        left = {mount.fstype for mount in list_mounts(str(node.directory))}
        assert left == {"fuse.afs", "erofs"}, "its workers, and layers for the next run; no root"
        assert not roots(node)
        assert "which a crash left" in fragile.log(f"{node_id}-snapshotter")


@pytest.mark.parametrize("node_id", ["node1", "node2"])
async def test_snapshotter_is_stopped(fragile: RealCluster, busybox_image: BusyboxImage, node_id: str) -> None:
    node = next(node for node in fragile.nodes if node.node_id == node_id)
    async with run_under_way(fragile, busybox_image.reference, node_id) as task:
        assert await terminated(node.snapshotter) == 0
        assert not list_mounts(str(node.directory))
        assert not roots(node)
        with pytest.raises(Unavailable, match="snapshotter"):
            await asyncio.wait_for(task, GRACE)
        await until(lambda: not cgroup_processes(fragile, node), "the run is ended")
    await fragile.restart(node.snapshotter)


async def test_afslet_is_stopped(fragile: RealCluster, busybox_image: BusyboxImage) -> None:
    node = fragile.nodes[1]
    async with run_under_way(fragile, busybox_image.reference, "node2") as task:
        assert await terminated(node.afslet) == 0
        with pytest.raises(AfsError):
            await asyncio.wait_for(task, GRACE)
        assert not cgroup_processes(fragile, node)
        assert not roots(node)
        assert [path.name for path in (node.directory / "afslet").iterdir()] == ["lock"]
        (name,) = [name for name in fragile.cgroups() if "-node2-" in name]
        assert not mounts.cgroups(name)
    await fragile.restart(node.afslet)


async def test_proxy_is_stopped(fragile: RealCluster, busybox_image: BusyboxImage) -> None:
    proxy = fragile.cluster.proxy
    assert proxy is not None
    async with run_under_way(fragile, busybox_image.reference, "node1") as task:
        assert await terminated(proxy) == 0
        with pytest.raises(AfsError):
            await asyncio.wait_for(task, GRACE)
        await asyncio.to_thread(fragile.assert_idle)
    await fragile.restart(proxy)


async def test_proxy_is_killed(fragile: RealCluster, busybox_image: BusyboxImage) -> None:
    proxy = fragile.cluster.proxy
    assert proxy is not None
    async with run_under_way(fragile, busybox_image.reference, "node1") as task:
        await asyncio.to_thread(fragile.kill, proxy)
        with pytest.raises(Unavailable):
            await asyncio.wait_for(task, GRACE)
        await asyncio.to_thread(fragile.assert_idle)
    await fragile.restart(proxy)


@pytest.mark.parametrize("how", ["terminated", "killed"])
async def test_layerstore_and_discovery_may_come_and_go(
    fragile: RealCluster, busybox_image: BusyboxImage, how: str
) -> None:
    """Runs that have what they need do not notice."""
    discovery = fragile.cluster.discovery
    assert discovery is not None
    async with run_under_way(fragile, busybox_image.reference, "node1") as task:
        for process in (fragile.nodes[0].layerstore, discovery):
            if how == "killed":
                await asyncio.to_thread(fragile.kill, process)
            else:
                assert await terminated(process) == 0
            await fragile.restart(process)
        async with fragile.client() as client:
            assert (await client.run(busybox_image.reference, ["true"], node_id="node1")).ok
        assert not task.done()


def corrupt(node: NodeProcesses, layer: oci.Layer, needle: bytes) -> None:
    """Flip every bit of *needle* in a layer's file on disk, below the node's services."""
    path = node.directory / "layerstore/layers" / f"{layer.diff_id.partition(':')[2]}.afslyr"
    at = path.read_bytes().index(needle)
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), bytes(255 - byte for byte in needle), at)
        os.fsync(file.fileno())


def test_corrupt_peer_never_gives_wrong_bytes(busybox_image: BusyboxImage, tmp_path: Path) -> None:
    secret = os.urandom(3 << 20)
    layout = oci.copy_layout(busybox_image.layout, tmp_path / "layout")
    builder = oci.LayoutBuilder(layout)
    layer = builder.add_layer(tars.tar_of({"first": b"first\n", "pad": os.urandom(4 << 20), "data": secret}))
    builder.add_image("bad", [*busybox_image.layers, layer], {"Env": ["PATH=/bin"]})
    image = f"oci:{layout}:bad"

    async def run(node: NodeProcesses, *command: str) -> tuple[int, bytes, bytes]:
        async with AfsClient(node.afslet.address) as client:
            result = await client.run(image, command)
            return result.exit_code, result.stdout, result.stderr

    with cluster(1, proxy=False, layerstore_flags=("--read-deadline=1s",)) as running:
        assert asyncio.run(run(running.nodes[0], "true"))[0] == 0
        corrupt(running.nodes[0], layer, secret[: 1 << 16])
        node2 = running.start_node(2)
        assert asyncio.run(run(node2, "cat", "/first"))[1] == b"first\n"
        status, data, error = asyncio.run(run(node2, "cat", "/data"))
        assert secret.startswith(data), "wrong bytes"
        assert (status, data) == (0, secret), error  # pulled again from its source
        log = running.log("node1-layerstore")
        assert f"layer {layer.diff_id}: chunks [" in log, "node1 noticed, and served nothing of it"
        assert "served a bad chunk" not in running.log("node2-layerstore")


@pytest.mark.slow
def test_fuse_readers_see_no_hole_when_the_layer_was_pulled_meanwhile(
    busybox_image: BusyboxImage, tmp_path: Path
) -> None:
    """afs_fused outlives the layerstore, with the old partial file open; zeros from it would be wrong bytes."""
    secret = os.urandom(3 << 20)
    layout = oci.copy_layout(busybox_image.layout, tmp_path / "layout")
    builder = oci.LayoutBuilder(layout)
    files: dict[str, bytes | str | None] = {
        "first": secret,
        "pad": os.urandom(4 << 20),
        "late": secret[::-1],
        "later": secret,
    }
    layer = builder.add_layer(tars.tar_of(files))
    builder.add_image("big", [*busybox_image.layers, layer], {"Env": ["PATH=/bin"]})

    image, target, diff_id = f"oci:{layout}:big", tmp_path / "root", layer.diff_id.partition(":")[2]
    target.mkdir()
    with cluster(1, proxy=False) as running, attached(running.nodes[0], image, target):
        node2, target2 = running.start_node(2), tmp_path / "root2"
        target2.mkdir()
        with attached(node2, "--read-only", image, target2):
            assert (target2 / "first").read_bytes() == secret
            (lazy,) = [mount for mount in list_mounts(str(node2.run_dir / "l")) if mount.source.endswith(diff_id)]
            running.kill(running.nodes[0].layerstore)
            assert (target2 / "late").read_bytes() == secret[::-1]  # nobody has it any more: pulled here
            assert (node2.directory / f"layerstore/layers/{diff_id}.afslyr").exists()
            running.kill(node2.layerstore)
            asyncio.run(running.restart(node2.layerstore))
            assert (target2 / "later").read_bytes() == secret
            assert lazy in list_mounts(str(node2.run_dir / "l"))


def test_upper_directories_are_closed_to_other_users(fragile: RealCluster) -> None:
    """A setuid file in an upper directory would be one of the host's to whoever could reach it."""
    for node in fragile.nodes:
        for name in ("snapshotter/roots", "afslet/runs"):
            assert (node.directory / name).stat().st_mode & 0o777 == 0o700


def test_a_read_that_failed_is_no_result(busybox_image: BusyboxImage, tmp_path: Path) -> None:
    """The command sees an I/O error and exits with 1: that must not look like its own failure."""
    layout = oci.copy_layout(busybox_image.layout, tmp_path / "layout")
    builder = oci.LayoutBuilder(layout)
    layer = builder.add_layer(
        tars.tar_of({"first": b"first\n", "pad": os.urandom(4 << 20), "late": os.urandom(1 << 20)})
    )
    builder.add_image("lost", [*busybox_image.layers, layer], {"Env": ["PATH=/bin"]})

    async def run(node: NodeProcesses, command: str) -> bytes:
        async with AfsClient(node.afslet.address) as client:
            return (await client.run(f"oci:{layout}:lost", ["sh", "-c", command])).stdout

    with cluster(1, proxy=False, layerstore_flags=("--read-deadline=1s",)) as running:
        asyncio.run(run(running.nodes[0], "true"))
        node2 = running.start_node(2)
        assert asyncio.run(run(node2, "cat /first")) == b"first\n"
        running.kill(running.nodes[0].layerstore)
        (layout / "blobs" / "sha256" / layer.digest.partition(":")[2]).unlink()  # nobody can pull it again
        with pytest.raises(Unavailable, match=f"layer {layer.diff_id} could not be read during the run"):
            asyncio.run(run(node2, "cat /late; true"))
        assert asyncio.run(run(node2, "cat /first")) == b"first\n", "the fault was the other run's"
