"""``afs_mount --stats``: what the snapshotter has mounted, with what the layerstore knows of the same layers."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click

from afs.core.errors import AfsError
from afs.core.rpc import calling, channel
from afs.core.units import format_size
from afs.proto.v1 import layerstore_pb2, mounts_pb2
from afs.proto.v1.layerstore_pb2_grpc import LayerstoreNodeStub
from afs.snapshotter.client import Mounts


@dataclass(slots=True)
class LayerStats:
    """One layer of this node, mounted or in the cache or both. Sizes in bytes; counted since the services started.

    *state* is ``complete``, ``partial``, or ``unknown`` if the layerstore does not tell; *backend* is "" if the layer is not
    mounted.
    """

    diff_id: str
    state: str = "unknown"
    backend: str = ""
    lazy: bool = False
    users: int = 0
    worker: int | None = None
    fallback: str = ""
    reads: int = 0
    bytes_read: int = 0
    waits: int = 0
    failed_reads: int = 0
    bytes_local: int = 0
    chunks: int = 0
    chunks_local: int = 0
    bytes_from_peers: dict[str, int] = field(default_factory=dict)
    bytes_from_source: int = 0
    demanded_chunks: int = 0
    prefetched_chunks: int = 0
    hedges: int = 0
    failovers: int = 0
    bad_chunks: int = 0

    def add_mount(self, layer: mounts_pb2.MountedLayer) -> None:
        """Take over what the snapshotter says."""
        self.backend, self.lazy, self.users, self.fallback = layer.backend, layer.lazy, layer.users, layer.fallback
        self.worker = layer.worker if layer.HasField("worker") else None
        self.reads, self.bytes_read, self.waits = layer.reads, layer.bytes_read, layer.waits
        self.failed_reads = layer.faults

    def add_cached(self, layer: layerstore_pb2.CachedLayer) -> None:
        """Take over what the layerstore says."""
        self.state = "complete" if layer.complete else "partial"
        self.bytes_local, self.chunks, self.chunks_local = layer.used_bytes, layer.chunks, layer.chunks_here
        self.bytes_from_peers = dict(layer.bytes_from_peers)
        self.bytes_from_source = layer.bytes_from_source
        self.demanded_chunks, self.prefetched_chunks = layer.demanded_chunks, layer.prefetched_chunks
        self.hedges, self.failovers, self.bad_chunks = layer.hedges, layer.failovers, layer.bad_chunks


def merge(mounted: Sequence[mounts_pb2.MountedLayer], cached: Sequence[layerstore_pb2.CachedLayer]) -> list[LayerStats]:
    """The layers that either of the two knows, mounted ones first."""
    found: dict[str, LayerStats] = {}
    for layer in mounted:
        found.setdefault(layer.diff_id, LayerStats(layer.diff_id)).add_mount(layer)
    for each in cached:
        found.setdefault(each.diff_id, LayerStats(each.diff_id)).add_cached(each)
    return list(found.values())


async def show_stats(run_dir: Path, *, as_json: bool) -> None:
    """Print them. Without a snapshotter Unavailable; without a layerstore what is known without it."""
    mounts = Mounts(f"unix:{run_dir}/mounts.sock")
    try:
        stats = await mounts.stats()
    finally:
        await mounts.close()
    cached: Sequence[layerstore_pb2.CachedLayer] = ()
    try:
        cached = await _cached(f"unix:{run_dir}/layerstore.sock")
    except AfsError as error:
        click.echo(f"afs_mount: nothing of where bytes came from: {error.line}", err=True)
    layers = merge(stats.layers, cached)
    if as_json:
        click.echo(json.dumps(_as_object(stats, layers)))
    else:
        click.echo(_as_text(stats, layers))


async def _cached(address: str) -> Sequence[layerstore_pb2.CachedLayer]:
    opened = channel(address)
    try:
        with calling(f"layerstore {address}"):
            return (await LayerstoreNodeStub(opened).CacheStatus(layerstore_pb2.CacheStatusRequest())).layers
    finally:
        await opened.close()


def _as_object(stats: mounts_pb2.StatsResponse, layers: Sequence[LayerStats]) -> dict[str, Any]:
    attached = [
        {
            "target": os.fsdecode(root.target),
            "image": root.image,
            "upper": os.fsdecode(root.upper) or None,
            "layers": list(root.layers),
        }
        for root in stats.attached
    ]
    workers = [
        {"number": worker.number, "pid": worker.pid, "alive": worker.alive, "layers": worker.layers}
        for worker in stats.workers
    ]
    return {
        "layers": [asdict(layer) for layer in layers],
        "roots": stats.roots,
        "attached": attached,
        "workers": workers,
        "worker_deaths": stats.worker_deaths,
    }


_HEAD = ("LAYER", "STATE", "MOUNTED", "USERS", "LOCAL", "CHUNKS", "SOURCE", "READS", "READ", "WAITED", "FAILED")


def _as_text(stats: mounts_pb2.StatsResponse, layers: Sequence[LayerStats]) -> str:
    rows: list[tuple[str, ...]] = [_HEAD]
    notes: list[str] = []
    for layer in layers:
        name = layer.diff_id.removeprefix("sha256:")[:12]
        counts = (layer.reads, format_size(layer.bytes_read), layer.waits, layer.failed_reads)
        rows.append(
            (
                name,
                layer.state,
                (layer.backend or "-") + (" lazy" if layer.lazy else ""),
                str(layer.users),
                format_size(layer.bytes_local),
                f"{layer.chunks_local}/{layer.chunks}" if layer.chunks else "-",
                format_size(layer.bytes_from_source),
                *map(str, counts),
            )
        )
        notes += [f"{name}: {format_size(size)} from {peer}" for peer, size in sorted(layer.bytes_from_peers.items())]
        notes += [f"{name}: {layer.fallback}"] if layer.fallback else []
    notes += [f"{root.image} is attached at {os.fsdecode(root.target)}" for root in stats.attached]
    notes += [
        f"afs_fused {worker.number} (pid {worker.pid}){'' if worker.alive else ', dead'}: {worker.layers} layers"
        for worker in stats.workers
    ]
    notes.append(f"{stats.roots} roots, {stats.worker_deaths} deaths of afs_fused")
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join((*table, *notes))
