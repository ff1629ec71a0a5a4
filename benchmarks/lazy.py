"""IMG4 on a node that has nothing of it, read from a peer on the same machine, against overlayfs over ext4.

One node has the image; a second one is new for every sample, and the page cache is empty but for programs. Measured: the mount
of the image until its root can be listed, the same once more (a second container), W in it, and reading one large file of a
layer from front to back. Nothing is prefetched from a trace and nothing completed in the background.

*Touched* are the pages of the layers' files that the kernel has in its cache after W (mincore(2)): all that it asked afs_fused
for, its own read-ahead included. The metadata region counts neither there nor in what was fetched, which is the chunk maps' sum.
"""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from tests.testbed.cluster import cluster
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
LARGE = "opt/site/scipy.libs"
"""A directory of IMG4; its largest file is read from front to back."""
MIB = 1 << 20


def run(name: str, samples: int | None) -> measure.Report:
    """Measure with the image *name*, which is img4."""
    image, taken = subjects.image(name), dict[str, list[float]]()
    with (
        imageroots.unpacked_root() as tree,
        Registry() as registry,
        cluster(1, proxy=False, layerstore_flags=("--completion=never", "--no-traces")) as running,
    ):
        reference = image.push(registry)
        pull(running.nodes[0], reference)
        for number in range(samples or SAMPLES):
            for subject in (_ext4, _lazy) if number % 2 else (_lazy, _ext4):
                for what, value in subject(running, number + 2, reference, tree, image.commands["W"]).items():
                    taken.setdefault(what, []).append(value)
    series = [measure.Series(what, "x" if " / " in what else "s", values) for what, values in taken.items()]
    medians = {each.name: each.median for each in series}
    targets = [
        measure.Target("mount until usable", medians["mount from a peer"], 0.15, "s"),
        measure.Target("second container", medians["second mount"], 0.01, "s"),
        measure.Target("W cold from a peer / ext4", medians["W from a peer"] / medians["W on ext4"], 1.5),
        measure.Target("fetched / touched", medians["fetched / touched"], 1.6),
        measure.Target("read from a peer / local", medians["read from a peer"] / medians["read a complete layer"], 2.5),
    ]
    return measure.Report(f"lazy-{name}", f"Reading {name} from a peer", series, targets)


def pull(node: NodeProcesses, reference: str) -> None:
    """Make all layers complete on *node*."""
    with grpc.insecure_channel(f"unix:{node.run_dir}/layerstore.sock") as channel:
        request = pb.OpenImageRequest(name=pb.ImageName(image=reference), force_local_fetch=True)
        LayerstoreNodeStub(channel).OpenImage(request, timeout=600)


def _large(root: Path) -> Path:
    return max((root / LARGE).iterdir(), key=lambda path: path.stat().st_size)


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


def _ext4(running: RealCluster, number: int, reference: str, tree: Path, work: tuple[str, ...]) -> dict[str, float]:
    measure.drop_caches()
    return {"W on ext4": timed(in_root(tree, work))}


def _lazy(running: RealCluster, number: int, reference: str, tree: Path, work: tuple[str, ...]) -> dict[str, float]:
    local, node = running.nodes[0], running.start_node(number)
    try:
        found = asyncio.run(_partial(node, reference, work))
        return found | asyncio.run(_complete(local, reference))
    finally:
        asyncio.run(stop_node(running, node))


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
        measure.drop_caches()
        found["read from a peer"] = await asyncio.to_thread(timed, lambda: _read(_large(root)))
    await mounts.close()
    return found


async def _complete(node: NodeProcesses, reference: str) -> dict[str, float]:
    mounts = Mounts(f"unix:{node.run_dir}/mounts.sock")
    async with mounts.holding() as hold:
        await hold.open(OpenImage(image=reference))
        root = Path((await hold.mount()).path)
        measure.drop_caches()
        taken = await asyncio.to_thread(timed, lambda: _read(_large(root)))
    await mounts.close()
    return {"read a complete layer": taken}


def _moved(node: NodeProcesses) -> tuple[int, int]:
    """Bytes of chunks that came, and bytes of pages that the kernel asked for, of all partial layers without metadata."""
    fetched = touched = 0
    for partial in (node.directory / "layerstore/partial").iterdir():
        with (partial / "data").open("rb") as file:
            layout, _ = read_layer(file.fileno())
        data = layout.meta_offset // layout.chunk_size
        fetched += sum((partial / "chunks").read_bytes()[:data]) * layout.chunk_size
        mounted = [Path(mount.target) for mount in list_mounts(str(node.run_dir / "fuse"))]
        shown = next(
            path for root in mounted for path in (root / partial.name, root / "f" / partial.name) if path.exists()
        )
        touched += sum(_resident(shown)[: data * layout.chunk_size // mmap.PAGESIZE]) * mmap.PAGESIZE
    return fetched, touched


def _resident(path: Path) -> list[int]:
    """1 for every page of a file that is in the page cache."""
    libc: Any = ctypes.CDLL(None, use_errno=True)
    size = path.stat().st_size
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    with path.open("rb") as file:
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    pages = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
    if libc.mincore(address, size, pages):
        raise OSError(ctypes.get_errno(), "mincore")
    libc.munmap(address, size)
    return [page & 1 for page in pages.raw]
