"""IMG4 on a node that has nothing of it, read from a peer on the same machine, against overlayfs over ext4.

One node has the image; a second one is new for every sample, and the page cache is empty but for programs. Measured: the mount
of the image until its root can be listed, the same once more (a second container), W in it, and, on one more new node, reading
the largest layer from front to back as afs_fused shows it. Nothing is prefetched from a trace and nothing completed in the background.

*Touched* are the pages of the layers' files that the kernel has in its cache after W (mincore(2)): all that it asked afs_fused
for, its own read-ahead included. The metadata region counts neither there nor in what was fetched, which is the chunk maps' sum.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from tests.testbed.cluster import cluster
from tests.testbed.pagecache import resident
from tests.testbed.registry import Registry

from afs.core.mounts import list_mounts
from afs.core.run import stop
from afs.layerstore.afslyr.reader import read_layer
from afs.proto.v1 import layerstore_pb2 as pb
from afs.proto.v1.layerstore_pb2_grpc import LayerstoreNodeStub
from afs.proto.v1.mounts_pb2 import OpenImage
from afs.snapshotter.client import Mounts
from benchmarks import imageroots, measure, subjects

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.testbed.cluster import RealCluster

    from afs.core.cluster import NodeProcesses

SAMPLES = 5
MIB = 1 << 20


def run(name: str, samples: int | None) -> measure.Report:
    """Measure with the image *name*, which is img4."""
    image, taken = subjects.image(name), dict[str, list[float]]()
    with (
        Registry() as registry,
        cluster(1, proxy=False, layerstore_flags=("--completion=never", "--no-traces")) as running,
    ):
        reference = image.push(registry)
        pull(running.nodes[0], reference)
        for number in range(samples or SAMPLES):
            for subject in (_ext4, _lazy, _layer) if number % 2 else (_layer, _lazy, _ext4):
                for what, value in subject(running, number + 2, reference, image.commands["W"]).items():
                    taken.setdefault(what, []).append(value)
    series = [measure.Series(what, "x" if " / " in what else "s", values) for what, values in taken.items()]
    medians = {each.name: each.median for each in series}
    targets = [
        measure.Target("mount until usable", medians["mount from a peer"], 0.15, "s"),
        measure.Target("second container", medians["second mount"], 0.01, "s"),
        measure.Target("W cold from a peer / ext4", medians["W from a peer"] / medians["W on ext4"], 1.5),
        measure.Target("fetched / touched", medians["fetched / touched"], 1.6),
        measure.Target("layer from a peer / disk", medians["layer from a peer"] / medians["layer from the disk"], 2.5),
    ]
    return measure.Report(f"lazy-{name}", f"Reading {name} from a peer", series, targets)


def pull(node: NodeProcesses, reference: str) -> None:
    """Make all layers complete on *node*."""
    with grpc.insecure_channel(f"unix:{node.run_dir}/layerstore.sock") as channel:
        request = pb.OpenImageRequest(name=pb.ImageName(image=reference), force_local_fetch=True)
        LayerstoreNodeStub(channel).OpenImage(request, timeout=600)


def timed(action: Callable[[], object]) -> float:
    """The seconds that *action* takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def in_root(root: Path, command: tuple[str, ...]) -> Callable[[], object]:
    """Runs *command* in *root*."""
    return lambda: subprocess.run(["chroot", str(root), *command], check=True)


def _read(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(MIB)
        while file.readinto(buffer):
            pass


def on_ext4(command: tuple[str, ...]) -> float:
    """The seconds that *command* takes in a new root over the unpacked layers: W writes byte code, which a second W would find."""
    with imageroots.unpacked_root() as root:
        measure.drop_caches()
        return timed(in_root(root, command))


def _ext4(running: RealCluster, number: int, reference: str, work: tuple[str, ...]) -> dict[str, float]:
    return {"W on ext4": on_ext4(work)}


def _lazy(running: RealCluster, number: int, reference: str, work: tuple[str, ...]) -> dict[str, float]:
    node = running.start_node(number)
    try:
        return asyncio.run(_partial(node, reference, work))
    finally:
        asyncio.run(stop_node(running, node))


def _layer(running: RealCluster, number: int, reference: str, work: tuple[str, ...]) -> dict[str, float]:
    """The largest layer's file from front to back: as afs_fused shows it, and the complete one on the other node."""
    local, node = running.nodes[0].directory / "layerstore/layers", running.start_node(number)
    try:
        return asyncio.run(_whole(node, reference, max(local.iterdir(), key=lambda path: path.stat().st_size)))
    finally:
        asyncio.run(stop_node(running, node))


async def _whole(node: NodeProcesses, reference: str, complete: Path) -> dict[str, float]:
    found: dict[str, float] = {}
    mounts = Mounts(f"unix:{node.run_dir}/mounts.sock")
    async with mounts.holding() as hold:
        await hold.open(OpenImage(image=reference))
        for what, path in (("layer from a peer", _shown(node, complete.stem)), ("layer from the disk", complete)):
            measure.drop_caches()
            found[what] = await asyncio.to_thread(timed, lambda path=path: _read(path))  # type: ignore[misc]
    await mounts.close()
    return found


def _shown(node: NodeProcesses, name: str) -> Path:
    """The file that afs_fused shows of a layer."""
    workers = [Path(mount.target) / "f" / name for mount in list_mounts(str(node.run_dir / "fuse"))]
    mounted = {mount.source for mount in list_mounts(str(node.run_dir / "l"))}
    return next(path for path in workers if str(path) in mounted)


async def stop_node(running: RealCluster, node: NodeProcesses) -> None:
    """Stop one node and remove all that it has."""
    for process in (node.afslet, node.snapshotter, node.layerstore):
        await stop(process.popen, 10.0)
    running.cluster.nodes.remove(node)
    shutil.rmtree(node.directory)


async def _partial(node: NodeProcesses, reference: str, work: tuple[str, ...]) -> dict[str, float]:
    found: dict[str, float] = {}
    mounts = Mounts(f"unix:{node.run_dir}/mounts.sock")
    await mounts.stats()  # connected
    measure.drop_caches()
    started = time.perf_counter()
    async with mounts.holding() as first:
        await first.open(OpenImage(image=reference))
        root = Path((await first.mount()).path)
        os.listdir(root)
        found["mount from a peer"] = time.perf_counter() - started
        started = time.perf_counter()
        async with mounts.holding() as second:
            await second.open(OpenImage(image=reference))
            os.listdir((await second.mount()).path)
            found["second mount"] = time.perf_counter() - started
        measure.drop_caches()
        found["W from a peer"] = await asyncio.to_thread(timed, in_root(root, work))
        fetched, touched = _moved(node)
        found["fetched / touched"] = fetched / touched
    await mounts.close()
    return found


def _moved(node: NodeProcesses) -> tuple[int, int]:
    """Bytes of chunks that came, and bytes of pages that the kernel asked for, of all partial layers without metadata."""
    fetched = touched = 0
    for partial in (node.directory / "layerstore/partial").iterdir():
        with (partial / "data").open("rb") as file:
            layout, _ = read_layer(file.fileno())
        data = layout.meta_offset // layout.chunk_size
        fetched += sum((partial / "chunks").read_bytes()[:data]) * layout.chunk_size
        touched += (
            sum(resident(_shown(node, partial.name))[: data * layout.chunk_size // mmap.PAGESIZE]) * mmap.PAGESIZE
        )
    return fetched, touched
