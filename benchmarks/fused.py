"""Memory of the afs_fused processes that serve a hundred layers, each as a file and as a tree."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tests.testbed import mounts, oci, tars
from tests.testbed.fillsource import FillSource
from tests.testbed.ourroots import convert_layer

from afs.core.mounts import unmount
from afs.snapshotter.fusedworkers import FusedWorkers
from benchmarks import measure, subjects

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SAMPLES = 3
LAYERS = 100
FILES = 500
LIMIT_MIB = 120.0
_FIELDS = {"resident": ("status", "VmRSS"), "share": ("smaps_rollup", "Pss")}


def run(name: str, samples: int | None) -> measure.Report:
    """The layers of the image *name*, and small ones up to a hundred."""
    image = subjects.image(name)
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="afs-bench-") as directory:
        source = FillSource(Path(directory))
        for number, layer in enumerate(oci.read_image(image.layout, image.tag).layers):
            file = Path(directory, f"image{number}")
            convert_layer(image.layout, layer, file)
            source.add_file(layer.diff_id, file)
        while len(source.layers) < LAYERS:
            number = len(source.layers)
            files = (tars.file(f"d{n % 20}/{number}-{n}", b"%d" % n) for n in range(FILES))
            source.add(b"".join(files) + tars.END)
        for _ in range(samples or SAMPLES):
            with tempfile.TemporaryDirectory(prefix="pool-", dir=directory) as work:
                asyncio.run(_sample(Path(work), source, found))
    series = [measure.Series(label, "MiB", values) for label, values in found.items()]
    target = measure.Target("all workers, everything read, resident", max(found["read: resident"]), LIMIT_MIB, "MiB")
    return measure.Report(f"fused-{name}", f"Memory of afs_fused with {LAYERS} layers mounted", series, [target])


async def _sample(directory: Path, source: FillSource, found: dict[str, list[float]]) -> None:
    pool = FusedWorkers(directory / "fuse", directory / "faults", source.socket, 30.0)
    async with source.serving():
        try:
            await pool.adopt()
            pids = [worker.pid for worker in pool.workers]
            _note("started", pids, found)
            with contextlib.ExitStack() as stack:
                trees = []
                for number, diff_id in enumerate(source.layers):
                    worker = await pool.place(diff_id)
                    at = directory / f"erofs{number}"
                    await asyncio.to_thread(stack.enter_context, _mounted(worker.file(diff_id), at))
                    trees += [at, worker.tree(diff_id)]
                    await asyncio.to_thread(os.stat, worker.tree(diff_id))
                _note("mounted", pids, found)
                await asyncio.to_thread(_read_all, trees)
                _note("read", pids, found)
        finally:
            await pool.close()


@contextlib.contextmanager
def _mounted(file: Path, at: Path) -> Iterator[None]:
    at.mkdir()
    mounts.mount(file, at, "erofs", read_only=True)
    try:
        yield
    finally:
        unmount(str(at))


def _read_all(trees: Sequence[Path]) -> None:
    """Look at every name in *trees*, and read the beginning of every file."""
    for tree in trees:
        for directory, _, names in os.walk(tree):
            for name in names:
                path = os.path.join(directory, name)
                if os.path.isfile(path) and not os.path.islink(path):
                    with open(path, "rb") as file:
                        file.read(4096)


def _note(state: str, pids: Sequence[int], found: dict[str, list[float]]) -> None:
    for field, (name, key) in _FIELDS.items():
        total = 0
        for pid in pids:
            match = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc", str(pid), name).read_text(), re.MULTILINE)
            assert match is not None, f"no {key} of {pid}"
            total += int(match.group(1))
        found.setdefault(f"{state}: {field}", []).append(total / 1024)
