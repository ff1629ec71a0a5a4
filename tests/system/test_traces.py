"""Start traces in a cluster: one node runs an image and records, the next one has what it needs before anybody reads."""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from typing import TYPE_CHECKING

import pytest

from afs.client import AfsClient
from afs.core.rpc import channel
from afs.layerstore.afslyr.layout import CHUNK_SIZE
from afs.layerstore.traces import parse_trace
from afs.proto.v1 import layerstore_pb2 as pb
from afs.proto.v1.layerstore_pb2_grpc import LayerstoreNodeStub, LayerstorePeerStub
from tests.testbed import oci, tars
from tests.testbed.cluster import cluster

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from afs.core.cluster import NodeProcesses
    from tests.testbed.images import BusyboxImage
    from tests.testbed.registry import Registry

pytestmark = pytest.mark.root
MIB = 1 << 20
READ = ("/big/40", "/big/07", "/big/21")
DEADLINE_S = 10.0


async def run(node: NodeProcesses, image: str, *command: str) -> bytes:
    """What a command prints on a node."""
    async with AfsClient(node.afslet.address) as client:
        result = await client.run(image, command, memory_mb=128)
        assert result.ok, result
        return result.stdout


async def until(node: NodeProcesses, condition: Callable[[pb.TraceStatus], bool]) -> pb.TraceStatus:
    """Poll for what the node's services tell each other."""
    deadline = time.monotonic() + DEADLINE_S
    async with channel(f"unix:{node.run_dir}/layerstore.sock") as opened:
        stub = LayerstoreNodeStub(opened)
        while True:
            found = (await stub.CacheStatus(pb.CacheStatusRequest(), wait_for_ready=True, timeout=DEADLINE_S)).traces
            if condition(found):
                return found
            assert time.monotonic() < deadline, found
            await asyncio.sleep(0.02)


def present(node: NodeProcesses, layer: oci.Layer) -> set[int]:
    """The chunks of a partial layer that are on a node."""
    chunks = node.directory / "layerstore/partial" / layer.diff_id.partition(":")[2] / "chunks"
    return {number for number, here in enumerate(chunks.read_bytes()) if here}


async def open_image(node: NodeProcesses, image: str) -> pb.OpenImageResponse:
    """What a snapshotter asks before it mounts; here nobody does."""
    async with channel(f"unix:{node.run_dir}/layerstore.sock") as opened:
        return await LayerstoreNodeStub(opened).OpenImage(pb.OpenImageRequest(name=pb.ImageName(image=image)))


@pytest.mark.slow
def test_a_node_has_what_another_one_s_start_read(
    registry: Registry, busybox_image: BusyboxImage, tmp_path: Path
) -> None:
    rng = random.Random("traces")  # noqa: S311 - not for secrets
    files: dict[str, bytes | str | None] = {f"big/{n:02}": rng.randbytes(MIB) for n in range(48)}
    builder = oci.LayoutBuilder(oci.copy_layout(busybox_image.layout, tmp_path / "layout"))
    layer = builder.add_layer(tars.tar_of(files), "plain")
    builder.add_image("big", [*busybox_image.layers, layer], {"Env": ["PATH=/bin"]})
    image = registry.push(builder.directory, "big", "big")
    listing = "".join(
        f"{hashlib.sha256(data).hexdigest()}  {path}\n"
        for path in READ
        if isinstance(data := files[path.removeprefix("/")], bytes)
    )

    async def scenario() -> None:
        one = running.nodes[0]
        await run(one, image, "true")
        assert (await until(one, lambda _: True)).kept == 0, "complete layers leave no demands"

        two, three = await asyncio.gather(*(running.cluster.start_node(number) for number in (2, 3)))
        assert (await run(two, image, "sha256sum", *READ)).decode() == listing
        # The recording ends when the snapshotter reports that the last user of the image left.
        recorded = await until(two, lambda traces: traces.recorded == 1)
        assert (recorded.used, recorded.recording, recorded.kept) == (0, 0, 1)
        await asyncio.to_thread(running.kill, two.layerstore)
        await running.restart(two.layerstore)

        opened = await open_image(three, image)
        digest, diff_ids = opened.image.manifest_digest, [each.diff_id for each in opened.image.layers]
        async with channel(two.layerstore.address) as peer:
            answer = await LayerstorePeerStub(peer).ReadTrace(pb.ReadTraceRequest(manifest_digest=digest))
        trace = parse_trace(answer.trace, digest, diff_ids)
        chunks = {chunk.number for chunk in trace.chunks if chunk.diff_id == layer.diff_id}
        assert len(READ) * MIB <= len(chunks) * CHUNK_SIZE < len(present(two, layer)) * CHUNK_SIZE < 30 * MIB
        await until(three, lambda traces: traces.prefetched_chunks >= len(chunks))
        found = await until(three, lambda _: True)
        assert (found.used, found.from_peers, found.refused) == (1, 1, 0)
        assert found.demanded_chunks == 0, "nobody has mounted it, let alone read"
        assert chunks <= present(three, layer)
        assert (await run(three, image, "sha256sum", *READ)).decode() == listing

    with cluster(1, proxy=False, layerstore_flags=("--completion=never",)) as running:
        asyncio.run(scenario())
        assert registry.blob_fetches()[layer.digest] == 1
