"""Layers as AFS mounts them: one alone by mount(2), and the root of an image by the snapshotter's own code."""

from __future__ import annotations

import contextlib
import io
from typing import TYPE_CHECKING

from afs.layerstore.afslyr.convert import Converted, convert
from afs.snapshotter.fusedworkers import FusedWorkers
from afs.snapshotter.layermounts import LayerMounts
from afs.snapshotter.probe import find_backends
from afs.snapshotter.rootmount import RootRequest
from afs.snapshotter.roots import Roots
from tests.testbed import mounts, oci

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence
    from pathlib import Path


def convert_bytes(blob: bytes, out: Path) -> Converted:
    """A blob in memory as a layer file."""
    return convert(io.BytesIO(blob).read, out)


def convert_layer(layout: Path, layer: oci.Layer, out: Path) -> Converted:
    """A layer of a layout as a layer file, both digests checked."""
    with oci.blob_path(layout, layer.digest).open("rb") as blob:
        return convert(blob.read, out, diff_id=layer.diff_id, blob_digest=layer.digest)


@contextlib.contextmanager
def mounted(file: Path, at: Path) -> Iterator[Path]:
    """A layer file, mounted at the new directory `at`."""
    at.mkdir()
    mounts.mount(file, at, "erofs", read_only=True)
    try:
        yield at
    finally:
        mounts.umount(at)
        at.rmdir()


@contextlib.asynccontextmanager
async def merged(work: Path, layers: Sequence[tuple[str, Path]]) -> AsyncIterator[Path]:
    """The writable root of an image whose layers are pairs of diff_id and file, bottom up; `work` is a new directory.

    It differs from what other programs unpack in two things: `dev`, `proc` and `sys` are always there, and the time of
    the root directory is that of its upper directory.
    """
    work.mkdir()
    fused = FusedWorkers(work / "f", work / "faults", work / "fill.sock", 1.0)
    backends = find_backends(work, work, None)
    layer_mounts = LayerMounts(work / "l", fused, backends, 0)
    roots = Roots(work / "r", work / "base", layer_mounts)
    roots.prepare()
    try:
        async with contextlib.AsyncExitStack() as stack:
            found = [await stack.enter_async_context(layer_mounts.using(name, str(file))) for name, file in layers]
            yield (await roots.mount_root(stack, found, RootRequest())).path
    finally:
        await roots.close()
        await layer_mounts.close()
        await fused.close()
