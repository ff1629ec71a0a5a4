"""Roots of IMG4 to run commands in: as AFS mounts its layers, and as overlayfs over directories of ext4."""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
import subprocess
import tarfile
import tempfile
import threading
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tests.testbed import build, images, mounts, oci, unpackers
from tests.testbed.fillsource import FillSource
from tests.testbed.ourmounts import layer_mounts, roots_over
from tests.testbed.ourroots import convert_layer

from afs.snapshotter.overlay import mount_overlay
from afs.snapshotter.rootmount import RootRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from afs.snapshotter.backends import Backend

_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONDONTWRITEBYTECODE": "1", "LC_ALL": "C"}
_OPAQUE, _WHITEOUT = ".wh..wh..opq", ".wh."


@contextmanager
def converted() -> Iterator[dict[str, Path]]:
    """The layers of IMG4 as complete layer files, by diff_id and bottom up."""
    image = images.img4(build.default_cache_dir())
    with tempfile.TemporaryDirectory(dir=build.default_cache_dir(), prefix="afs-bench-") as name:
        files = {layer.diff_id: Path(name, f"layer{number}") for number, layer in enumerate(image.layers)}
        for layer in image.layers:
            convert_layer(image.layout, layer, files[layer.diff_id])
        yield files


@contextmanager
def afs_root(files: Mapping[str, Path], backend: Backend) -> Iterator[Path]:
    """A writable root over layer files. The loop that serves afs_fused runs in a thread meanwhile."""
    with tempfile.TemporaryDirectory(dir=build.default_cache_dir(), prefix="afs-bench-") as name:
        source = FillSource(Path(name))
        for diff_id, file in files.items():
            source.add_file(diff_id, file)
        with _mounted(source, backend) as root:
            yield root


@contextmanager
def _mounted(source: FillSource, backend: Backend) -> Iterator[Path]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    stack = AsyncExitStack()

    async def make() -> Path:
        layers = await stack.enter_async_context(layer_mounts(source, backend))
        roots = await stack.enter_async_context(roots_over(layers, source.directory))
        using = [layers.using(layer.diff_id, str(layer.whole)) for layer in source.layers.values()]
        found = [await stack.enter_async_context(one) for one in using]
        return (await roots.mount_root(stack, found, RootRequest())).path

    try:
        yield asyncio.run_coroutine_threadsafe(make(), loop).result()
    finally:
        asyncio.run_coroutine_threadsafe(stack.aclose(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextmanager
def unpacked_root() -> Iterator[Path]:
    """A writable root of overlayfs over unpacked layers, mounted as AFS does it."""
    lower = sorted(unpacked_layers().iterdir(), reverse=True)
    with tempfile.TemporaryDirectory(dir=build.default_cache_dir(), prefix="afs-bench-") as name:
        parts = [Path(name, part) for part in ("merged", "upper", "work")]
        for part in parts:
            part.mkdir()
        mount_overlay(parts[0], lower, *parts[1:])
        try:
            yield parts[0]
        finally:
            mounts.umount(parts[0])


def unpacked_layers() -> Path:
    """A directory per layer of IMG4, unpacked by umoci, with overlayfs's marks; made once and kept (1.4 GB)."""
    image = images.img4(build.default_cache_dir())

    def unpack(into: Path) -> None:
        for number, layer in enumerate(image.layers):
            with tempfile.TemporaryDirectory(dir=into.parent, prefix="afs-bench-") as name:
                builder = oci.LayoutBuilder(Path(name))
                shutil.copy(oci.blob_path(image.layout, layer.digest), oci.blob_path(builder.directory, layer.digest))
                builder.add_image("t", [layer])
                unpackers.umoci(builder.directory, "t", into / str(number))
            _mark(oci.blob_path(image.layout, layer.digest), into / str(number))

    return build.cached(build.default_cache_dir(), "img4-unpacked", build.source_key(images), unpack)


def _mark(blob: Path, tree: Path) -> None:
    """What umoci leaves out of a single layer: the marks of what it removes."""
    with tarfile.open(blob, "r:gz") as tar:
        for entry in tar:
            parent, name = os.path.split(entry.name)
            if name == _OPAQUE:
                os.setxattr(tree / parent, "trusted.overlay.opaque", b"y")
            elif name.startswith(_WHITEOUT):
                os.mknod(tree / parent / name.removeprefix(_WHITEOUT), stat.S_IFCHR, 0)


def command(root: Path, argv: Sequence[str]) -> Callable[[], object]:
    """Runs a command in a root, by chroot(8) and nothing else; it has to succeed."""

    def run() -> None:
        subprocess.run(["chroot", root, *argv], check=True, stdout=subprocess.DEVNULL, env=_ENVIRONMENT)

    return run
