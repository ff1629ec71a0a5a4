"""Layers that one node has and another one reads: from the registry once, over the network as far as they are touched."""

from __future__ import annotations

import asyncio
import filecmp
import hashlib
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from afs.client import AfsClient, Finished, Log
from afs.core.mounts import list_mounts
from afs.core.rpc import channel
from afs.layerstore.afslyr.layout import CHUNK_SIZE
from afs.proto.v1 import layerstore_pb2 as pb
from afs.proto.v1.layerstore_pb2_grpc import LayerstoreNodeStub
from afs.snapshotter.client import Mounts
from tests.testbed import oci, tars
from tests.testbed.cluster import cluster

if TYPE_CHECKING:
    from afs.client import RunResult
    from afs.core.cluster import NodeProcesses
    from tests.testbed.cluster import RealCluster
    from tests.testbed.images import BusyboxImage
    from tests.testbed.registry import Registry

pytestmark = pytest.mark.root
MIB = 1 << 20
FILES = 64


@dataclass(frozen=True)
class BigImage:
    """One layer of 64 files of 1 MiB that nothing can compress, over busybox."""

    name: str
    layer: oci.Layer
    digests: dict[str, str]
    """sha256 by path."""

    @property
    def listing(self) -> bytes:
        """What `sha256sum /big/*` prints."""
        return "".join(f"{digest}  {path}\n" for path, digest in sorted(self.digests.items())).encode()


@pytest.fixture(scope="module")
def big_layout(busybox_image: BusyboxImage, tmp_path_factory: pytest.TempPathFactory) -> BigImage:
    """The image as a layout, named by its directory."""
    rng = random.Random("big")  # noqa: S311 - not for secrets
    contents: dict[str, bytes | str | None] = {f"big/{n:02}": rng.randbytes(MIB) for n in range(FILES)}
    layout = oci.copy_layout(busybox_image.layout, tmp_path_factory.mktemp("big") / "layout")
    builder = oci.LayoutBuilder(layout)
    layer = builder.add_layer(tars.tar_of(contents | {"small": b"small\n"}), "plain")
    builder.add_image("big", [*busybox_image.layers, layer], {"Env": ["PATH=/bin"]})
    digests = {f"/{path}": hashlib.sha256(data).hexdigest() for path, data in contents.items() if type(data) is bytes}
    return BigImage(str(layout), layer, digests)


@pytest.fixture
def big_image(big_layout: BigImage, registry: Registry) -> BigImage:
    """The image in a registry of the test's own."""
    return replace(big_layout, name=registry.push(Path(big_layout.name), "big", "big"))


async def run_on(node: NodeProcesses, image: str, *command: str) -> RunResult:
    """Run a command at a node's own afslet."""
    async with AfsClient(node.afslet.address) as client:
        return await client.run(image, command, memory_mb=256)


def chunk_map(node: NodeProcesses, layer: oci.Layer) -> bytes:
    """One byte per chunk of a partial layer: 1 if it is on the node."""
    return (node.directory / "layerstore/partial" / layer.diff_id.partition(":")[2] / "chunks").read_bytes()


async def mounted(node: NodeProcesses) -> dict[str, tuple[str, bool]]:
    """How each layer is mounted on a node, by diff_id: the backend, and whether on what a worker serves."""
    mounts = Mounts(f"unix:{node.run_dir}/mounts.sock")
    try:
        return {layer.diff_id: (layer.backend, layer.lazy) for layer in (await mounts.stats()).layers}
    finally:
        await mounts.close()


def test_second_node_never_asks_the_registry(registry: Registry, busybox_image: BusyboxImage) -> None:
    image = registry.push(busybox_image.layout, "latest", "app")
    with cluster(1, proxy=False) as running:
        assert asyncio.run(run_on(running.nodes[0], image, "cat", "/data/hello.txt")).ok
        assert all("(node1)" in request.user_agent for request in registry.requests("GET"))
        registry.forget()
        node2 = running.start_node(2)
        result = asyncio.run(run_on(node2, image, "cat", "/data/hello.txt"))
        assert (result.node_id, result.stdout) == ("node2", busybox_image.present["/data/hello.txt"])
        assert registry.requests() == []
        assert {mount.fstype for mount in list_mounts(str(node2.run_dir))} == {"fuse.afs", "erofs"}
        diff_ids = {layer.diff_id for layer in busybox_image.layers}
        assert asyncio.run(mounted(node2)) == dict.fromkeys(diff_ids, ("erofs-file", True))
        assert asyncio.run(mounted(running.nodes[0])) == dict.fromkeys(diff_ids, ("erofs-file", False))
        registry.stop()
        node3 = running.start_node(3)
        assert asyncio.run(run_on(node3, image, "cat", "/data/hello.txt")).stdout == result.stdout


def test_only_what_is_touched_comes_over_the_network(registry: Registry, big_image: BigImage) -> None:
    with cluster(1) as running:
        assert asyncio.run(run_on(running.nodes[0], big_image.name, "true")).ok
        node2 = running.start_node(2)
        assert asyncio.run(run_on(node2, big_image.name, "cat", "/small")).stdout == b"small\n"
        touched = chunk_map(node2, big_image.layer)
        assert len(touched) > FILES
        assert 1 <= sum(touched) <= 6, "superblock, metadata, the file, and what the kernel reads ahead"
        result = asyncio.run(run_on(node2, big_image.name, "sh", "-c", "sha256sum /big/*"))
        assert result.stdout == big_image.listing
        assert registry.blob_fetches()[big_image.layer.digest] == 1
        running.restart_proxy()
        with running.sync_client() as client:
            assert client.run(big_image.name, ["true"], node_id="node2").ok
        assert running.cli("reconcile", "--replicas", "2", big_image.name).returncode == 0
        one, two = (node.directory / "layerstore/layers" for node in running.nodes)
        names = sorted(path.name for path in one.iterdir())
        assert names
        assert filecmp.cmpfiles(one, two, names, shallow=False) == (names, [], [])
        assert list((node2.directory / "layerstore/partial").iterdir()) == []
        # What is mounted stays as it is, and reads from the complete file.
        assert asyncio.run(run_on(node2, big_image.name, "sh", "-c", "sha256sum /big/*")).stdout == big_image.listing
        assert registry.blob_fetches()[big_image.layer.digest] == 1


def test_registry_sees_each_layer_once_however_many_ask(
    registry: Registry, busybox_image: BusyboxImage, big_image: BigImage
) -> None:
    async def all_at_once(running: RealCluster) -> list[RunResult]:
        async with running.client() as client:
            runs = [
                client.run(big_image.name, ["sha256sum", f"/big/{n:02}"], node_id=f"node{n % 2 + 1}", memory_mb=128)
                for n in range(8)
            ]
            return list(await asyncio.gather(*runs))

    with cluster(2) as running:
        results = asyncio.run(all_at_once(running))
    for n, result in enumerate(results):
        assert result.stdout.split()[0].decode() == big_image.digests[f"/big/{n:02}"]
    fetches = registry.blob_fetches()
    for layer in (*busybox_image.layers, big_image.layer):
        assert fetches.pop(layer.digest) == 1
    assert set(fetches.values()) <= {1}, "the config"
    assert len(fetches) == 1


@pytest.mark.parametrize("kind", ["gzip", "zstd", "plain", "docker", "index", "docker-index"])
async def test_encodings_and_manifests_over_http(
    shared_cluster: RealCluster, session_registry: Registry, busybox_image: BusyboxImage, tmp_path: Path, kind: str
) -> None:
    oci.copy_layout(busybox_image.layout, tmp_path / "layout")
    builder = oci.LayoutBuilder(tmp_path / "layout")
    content = f"{kind} {tmp_path}\n".encode()
    compression: oci.Compression = "zstd" if kind == "zstd" else "plain" if kind == "plain" else "gzip"
    layer = builder.add_layer(tars.tar_of({"kind": content}), compression)
    base = oci.read_image(busybox_image.layout, "gzip").layers
    config = {"Env": ["PATH=/bin"]}
    image = builder.add_image("v1", [*base, layer], config, docker="docker" in kind)
    if "index" in kind:
        other = builder.add_image(None, base, config, oci.ARM64, docker="docker" in kind)
        builder.add_index("v1", {oci.ARM64: other, oci.AMD64: image}, docker="docker" in kind)
    name = session_registry.push(tmp_path / "layout", "v1", f"kinds/{kind}")
    async with shared_cluster.client() as client:
        result = await client.run(name, ["cat", "/kind", "/data/hello.txt"])
        by_digest = await client.run(f"{name.rpartition(':')[0]}@{image.digest}", ["cat", "/kind"])
    assert result.stdout == content + busybox_image.present["/data/hello.txt"], result
    assert by_digest.stdout == content
    assert session_registry.blob_fetches()[layer.digest] == 1


@pytest.mark.slow
def test_a_layer_in_use_is_completed_and_its_story_is_told(registry: Registry, big_image: BigImage) -> None:
    """While a container runs on it, and without a word from anybody."""

    async def run_until_complete(running: RealCluster, node2: NodeProcesses) -> pb.CachedLayer:
        script = "echo ready; while ! test -e /go; do usleep 10000; done"
        cached = pb.CachedLayer()
        async with (
            AfsClient(node2.afslet.address) as client,
            channel(f"unix:{node2.run_dir}/layerstore.sock") as opened,
        ):
            async for event in client.execute(big_image.name, ["sh", "-c", script]):
                if isinstance(event, Log):
                    while not cached.complete:  # another process has no event for us
                        found = await LayerstoreNodeStub(opened).CacheStatus(pb.CacheStatusRequest())
                        (cached,) = [each for each in found.layers if each.diff_id == big_image.layer.diff_id]
                    (root,) = node2.directory.glob("snapshotter/roots/*/merged")
                    (root / "go").touch()
                if isinstance(event, Finished):
                    assert event.exit_code == 0
        return cached

    with cluster(1, proxy=False, layerstore_flags=("--completion=always", "--completion-rate=0")) as running:
        assert asyncio.run(run_on(running.nodes[0], big_image.name, "true")).ok
        node2 = running.start_node(2)
        cached = asyncio.run(run_until_complete(running, node2))
        assert cached.chunks_here == cached.chunks > FILES * MIB // CHUNK_SIZE
        assert list(cached.bytes_from_peers) == [running.nodes[0].layerstore.address]
        assert cached.bytes_from_peers[running.nodes[0].layerstore.address] >= FILES * MIB
        metadata = 2  # chunks that came with the description
        assert cached.prefetched_chunks + cached.demanded_chunks == cached.chunks - metadata
        assert (cached.bytes_from_source, cached.bad_chunks) == (0, 0)
        one, two = [n.directory / "layerstore/layers" / f"{big_image.layer.diff_id[7:]}.afslyr" for n in running.nodes]
        assert filecmp.cmp(one, two, shallow=False)
        running.nodes[0].layerstore.popen.kill()
        result = asyncio.run(run_on(node2, big_image.name, "sh", "-c", "sha256sum /big/*"))
        assert result.stdout == big_image.listing, "nobody else is needed any more"
    assert registry.blob_fetches()[big_image.layer.digest] == 1


@pytest.mark.slow
def test_reader_goes_on_when_the_peer_s_layerstore_comes_back(big_image: BigImage) -> None:
    script = "echo ready; while ! test -e /go; do usleep 10000; done; sha256sum /big/*"

    async def read_while_the_peer_restarts(running: RealCluster, node2: NodeProcesses) -> bytes:
        output = b""
        async with AfsClient(node2.afslet.address) as client:
            async for event in client.execute(big_image.name, ["sh", "-c", script]):
                if isinstance(event, Log):
                    output += event.data
                    if output == b"ready\n":
                        peer = running.nodes[0].layerstore
                        await asyncio.to_thread(running.kill, peer)
                        (root,) = node2.directory.glob("snapshotter/roots/*/merged")
                        (root / "go").touch()  # from here on it reads what nobody has to give
                        await running.restart(peer)
                if isinstance(event, Finished):
                    assert event.exit_code == 0, output
        return output

    with cluster(1, proxy=False) as running:
        assert asyncio.run(run_on(running.nodes[0], big_image.name, "true")).ok
        node2 = running.start_node(2)
        output = asyncio.run(read_while_the_peer_restarts(running, node2))
        assert output.removeprefix(b"ready\n") == big_image.listing
        # All of it was read, so it becomes complete at about this time.
        complete = node2.directory / "layerstore/layers" / f"{big_image.layer.diff_id.partition(':')[2]}.afslyr"
        assert complete.exists() or sum(chunk_map(node2, big_image.layer)) > FILES
