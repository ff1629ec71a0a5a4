"""The cache of running nodes: small ones, full ones, damaged ones, and services that are killed over them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from afs.client import AfsClient, Finished, Log
from afs.core.errors import ResourceExhausted
from afs.core.rpc import channel
from afs.layerstore.afslyr.reader import verify_layer
from afs.proto.v1 import layerstore_pb2 as pb
from afs.proto.v1.layerstore_pb2_grpc import LayerstoreNodeStub
from tests.testbed import oci, tars
from tests.testbed.cluster import cluster
from tests.testbed.faults import Fault, FaultServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from afs.core.cluster import NodeProcesses
    from tests.testbed.cluster import RealCluster
    from tests.testbed.images import BusyboxImage
    from tests.testbed.registry import Registry

pytestmark = pytest.mark.root
MIB = 1 << 20
SIZE = 8 * MIB
GRACE = 10.0


@dataclass(frozen=True)
class Images:
    """Four images over busybox, each with a layer of 8 MiB of its own that holds `/data`."""

    layout: Path
    base: tuple[oci.Layer, ...]
    layers: tuple[oci.Layer, ...]
    digests: tuple[str, ...]
    """sha256 of each `/data`."""

    def name(self, number: int) -> str:
        """For a run."""
        return f"oci:{self.layout}:v{number}"


@pytest.fixture(scope="module")
def images(busybox_image: BusyboxImage, tmp_path_factory: pytest.TempPathFactory) -> Images:
    """The images as a layout."""
    rng = random.Random("cache")  # noqa: S311 - not for secrets
    layout = oci.copy_layout(busybox_image.layout, tmp_path_factory.mktemp("images") / "layout")
    builder, layers, digests = oci.LayoutBuilder(layout), [], []
    for number in range(4):
        data = rng.randbytes(SIZE)
        layers.append(builder.add_layer(tars.tar_of({"data": data}), "plain"))
        digests.append(hashlib.sha256(data).hexdigest())
        builder.add_image(f"v{number}", [*busybox_image.layers, layers[-1]], {"Env": ["PATH=/bin"]})
    return Images(layout, tuple(busybox_image.layers), tuple(layers), tuple(digests))


async def run(node: NodeProcesses, image: str, *command: str) -> bytes:
    """What a command prints on a node."""
    async with AfsClient(node.afslet.address) as client:
        result = await client.run(image, command, memory_mb=128)
        assert result.ok, result
        return result.stdout


async def check(node: NodeProcesses, images: Images, number: int) -> None:
    """Run an image, which reads all of its own layer."""
    assert (await run(node, images.name(number), "sha256sum", "/data")).split()[0].decode() == images.digests[number]


async def status(node: NodeProcesses) -> pb.CacheStatusResponse:
    """The state of a node's cache."""
    async with channel(f"unix:{node.run_dir}/layerstore.sock") as opened:
        return await LayerstoreNodeStub(opened).CacheStatus(pb.CacheStatusRequest(), wait_for_ready=True, timeout=GRACE)


async def until(node: NodeProcesses, condition: Callable[[pb.CacheStatusResponse], bool]) -> pb.CacheStatusResponse:
    """Poll for what the node's services tell each other."""
    deadline = time.monotonic() + GRACE
    while not condition(found := await status(node)):
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.02)
    return found


def own_layers(found: pb.CacheStatusResponse, images: Images) -> dict[int, bool]:
    """The images whose own layer is there, and whether it is leased."""
    numbers = {layer.diff_id: number for number, layer in enumerate(images.layers)}
    return {numbers[layer.diff_id]: layer.leased for layer in found.layers if layer.diff_id in numbers}


@contextlib.asynccontextmanager
async def running_image(node: NodeProcesses, images: Images, number: int) -> AsyncIterator[Callable[[], None]]:
    """A run that has not read `/data` yet; call what is given to let it, and it has to find it whole."""
    ready = asyncio.Event()
    script = "echo ready; while ! test -e /go; do usleep 10000; done; sha256sum /data"

    async def follow() -> bytes:
        output = b""
        async with AfsClient(node.afslet.address) as client:
            async for event in client.execute(images.name(number), ["sh", "-c", script], memory_mb=128):
                if isinstance(event, Log):
                    output += event.data
                    ready.set()
                if isinstance(event, Finished):
                    assert event.exit_code == 0, output
        return output

    before = set(node.directory.glob("snapshotter/roots/*/merged"))
    task = asyncio.create_task(follow())
    waiting = asyncio.create_task(ready.wait())
    await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    (root,) = set(node.directory.glob("snapshotter/roots/*/merged")) - before
    try:
        yield (root / "go").touch
        output = await asyncio.wait_for(task, GRACE)
        assert output.split()[1].decode() == images.digests[number]
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def test_images_that_ran_make_room_and_running_ones_stay(images: Images) -> None:
    async def scenario(node: NodeProcesses) -> None:
        async with running_image(node, images, 0) as go:
            for number in (1, 2, 3):
                await check(node, images, number)
            found = await until(node, lambda found: not own_layers(found, images).get(3))
            assert own_layers(found, images) == {0: True, 3: False}
            assert found.used_bytes <= found.capacity_bytes
            assert found.evicted_layers == 2
            async with running_image(node, images, 3) as other:
                with pytest.raises(ResourceExhausted, match="cache of node node1 is full: layer sha256:"):
                    await check(node, images, 1)
                assert own_layers(await status(node), images) == {0: True, 3: True}
                other()
            go()
        await until(node, lambda found: found.leased_bytes == 0)
        await check(node, images, 1)

    with cluster(1, proxy=False, layerstore_flags=(f"--capacity={22 * MIB}", "--reserve=1M")) as running:
        asyncio.run(scenario(running.nodes[0]))
        running.assert_idle()


def test_restarts_lose_no_lease(images: Images) -> None:
    async def scenario(running: RealCluster) -> None:
        node = running.nodes[0]
        async with running_image(node, images, 0) as go:
            await asyncio.to_thread(running.kill, node.layerstore)
            await running.restart(node.layerstore)
            for number in (1, 2):  # there is room for one of them
                await check(node, images, number)
            assert own_layers(await status(node), images)[0]
            go()
        await asyncio.to_thread(running.kill, node.snapshotter)
        await until(node, lambda found: not found.snapshotter_connected)
        found = await status(node)
        assert found.leased_bytes == found.used_bytes, "they may all be mounted, whatever became of the snapshotter"
        await running.restart(node.snapshotter)
        await until(node, lambda found: found.snapshotter_connected and found.leased_bytes == 0)
        for number in (0, 1):
            await check(node, images, number)

    with cluster(1, proxy=False, layerstore_flags=(f"--capacity={22 * MIB}", "--reserve=1M")) as running:
        asyncio.run(scenario(running))


def largest(directory: Path) -> int:
    """Bytes of the largest file, whatever comes and goes."""
    sizes = [0]
    for path in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):
            sizes.append(path.stat().st_size)
    return max(sizes)


def test_a_layerstore_killed_in_the_middle_of_a_pull(images: Images) -> None:
    async def scenario(running: RealCluster, server: FaultServer) -> None:
        node, name = running.nodes[0], f"{server.address}/app:v0"
        blob = f"blobs/{images.layers[0].digest}"
        server.add(Fault(blob, cut=4 * MIB, gate=(gate := threading.Event())))
        task = asyncio.create_task(run(node, name, "true"))
        deadline = time.monotonic() + GRACE
        tmp = node.directory / "layerstore/tmp"
        while largest(tmp) < 3 * MIB:  # more than the base's layers
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
        await asyncio.to_thread(running.kill, node.layerstore)
        await asyncio.gather(task, return_exceptions=True)
        gate.set()
        server.clear()
        await running.restart(node.layerstore)
        assert list(tmp.iterdir()) == []
        output = await run(node, name, "sha256sum", "/data")
        assert output.split()[0].decode() == images.digests[0]
        assert server.count(blob) == 2

    with FaultServer(images.layout) as server, cluster(1, proxy=False) as running:
        asyncio.run(scenario(running, server))


async def test_two_runs_of_a_new_image_share_one_download(
    shared_cluster: RealCluster, registry: Registry, images: Images
) -> None:
    name = registry.push(images.layout, "v1", "app")
    node = shared_cluster.nodes[0]
    outputs = await asyncio.gather(*(run(node, name, "sha256sum", "/data") for _ in range(3)))
    assert {output.split()[0].decode() for output in outputs} == {images.digests[1]}
    fetches = registry.blob_fetches()
    assert {fetches[layer.digest] for layer in (*images.base, images.layers[1])} <= {0, 1}
    assert fetches[images.layers[1].digest] == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 file system of 48 MiB in a file."""
    from tests.testbed.build import run as call

    file, target = tmp_path / "disk", tmp_path / "mnt"
    target.mkdir()
    with file.open("wb") as out:
        out.truncate(48 * MIB)
    call(["mkfs.ext4", "-q", "-m", "0", file])
    call(["mount", "-o", "loop", file, target])
    yield target
    call(["umount", target])


def test_a_disk_that_runs_full(images: Images, small_disk: Path, busybox_image: BusyboxImage, tmp_path: Path) -> None:
    """A layer whose blob promises less than it holds, on a real file system."""
    layout = oci.copy_layout(busybox_image.layout, tmp_path / "bomb")
    builder = oci.LayoutBuilder(layout)
    layer = builder.add_layer(tars.tar_of({"zeros": b"\1" * (40 * MIB)}), "gzip")
    builder.add_image("bomb", [*busybox_image.layers, layer], {"Env": ["PATH=/bin"]})

    async def scenario(node: NodeProcesses) -> None:
        await check(node, images, 0)
        async with running_image(node, images, 0) as go:
            with pytest.raises(
                ResourceExhausted, match=f"^layer {layer.diff_id} of .*: no space left in {small_disk}$"
            ):
                await run(node, f"oci:{layout}:bomb", "true")
            assert list((small_disk / "tmp").iterdir()) == []
            go()
        await check(node, images, 1)

    with cluster(1, proxy=False, layerstore_flags=(f"--root={small_disk}", "--reserve=1M")) as running:
        asyncio.run(scenario(running.nodes[0]))


@pytest.mark.slow
def test_evicting_a_partial_layer_gives_its_space_back(images: Images) -> None:
    """afs_fused must not keep the files of what is not mounted any more open."""
    # Far from each other and backwards, so that nobody reads ahead and the layer stays partial.
    part = "for n in 6 4 2 0; do dd if=/data bs=65536 count=1 skip=$((16 * n)) 2>/dev/null; done | wc -c"
    name = images.layers[0].diff_id.partition(":")[2]

    def held(node: NodeProcesses) -> list[str]:
        """The files of the first layer, deleted or not, that some process but the layerstore has open."""
        found = []
        for link in Path("/proc").glob("[0-9]*/fd/*"):
            with contextlib.suppress(OSError):
                target = os.readlink(link)
                mine = int(link.parts[2]) != node.layerstore.popen.pid
                if mine and target.startswith(f"{node.directory}/layerstore/partial/{name}/"):
                    found.append(target)
        return found

    async def scenario(running: RealCluster) -> None:
        for number in (0, 1, 2):
            await check(running.nodes[0], images, number)
        node = await running.cluster.start_node(2)
        assert await run(node, images.name(0), "sh", "-c", part) == b"262144\n"
        (layer,) = (layer for layer in (await status(node)).layers if layer.diff_id == images.layers[0].diff_id)
        assert 0 < layer.chunks_here < layer.chunks
        assert len(held(node)) == 2, "it is mounted still: the data, and the map of what is there"
        for number in (1, 2):
            await check(node, images, number)
        await until(node, lambda found: 0 not in own_layers(found, images))
        await until(node, lambda _: not held(node))  # afs_fused is told of a close and answers nothing
        await check(node, images, 0)

    with cluster(1, proxy=False) as running:
        # Only the second node is small: the base and the two that are read whole take less than a MiB less.
        running.cluster.settings = replace(
            running.cluster.settings,
            layerstore_flags=(f"--capacity={19 * MIB + MIB // 2}", "--reserve=1M", "--completion=never"),
        )
        asyncio.run(scenario(running))


def test_a_flipped_byte_heals_while_it_is_mounted(images: Images) -> None:
    """The kernel reads the file behind our back; what a peer asks for is checked, and repaired in place."""

    async def scenario(running: RealCluster) -> None:
        one = running.nodes[0]
        await check(one, images, 0)
        path = one.directory / "layerstore/layers" / f"{images.layers[0].diff_id.partition(':')[2]}.afslyr"
        with path.open("r+b") as file:
            os.pwrite(file.fileno(), b"damage", 3 * MIB)
        await asyncio.to_thread(node2.append, await running.cluster.start_node(2))
        await check(node2[0], images, 0)
        await until(one, lambda found: found.damaged_layers == 0 and any(layer.complete for layer in found.layers))
        with path.open("rb") as file:
            verify_layer(file.fileno())

    node2: list[NodeProcesses] = []
    with cluster(1, proxy=False, layerstore_flags=("--read-deadline=5s",)) as running:
        asyncio.run(scenario(running))
        assert f"layer {images.layers[0].diff_id} is whole again" in running.log("node1-layerstore")
