"""Converting the layers of an image, against inflating and hashing them in one process."""

from __future__ import annotations

import functools
import hashlib
import json
import statistics
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

from isal import igzip

from afs.layerstore.afslyr.convert import convert
from afs.layerstore.afslyr.erofs import Index
from afs.layerstore.afslyr.inflate import BLOCK_SIZE, inflate
from afs.layerstore.afslyr.tarstream import ByteStream, entries
from afs.layerstore.afslyr.tree import build
from benchmarks import measure, subjects

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SAMPLES = 7
LEAST_SPEED = 0.8  # of inflating and hashing
INDEX_ENTRIES, INDEX_SECONDS = 25_000, 0.1
MOST_OVERHEAD = 1.0  # percent of the tar
BASE = "ISA-L + sha256"


def run(name: str, samples: int | None) -> measure.Report:
    """Measure with each layer of the image *name*, which has to be gzip."""
    count = samples or SAMPLES
    series, targets, notes = [], [], []
    with tempfile.TemporaryDirectory(prefix="afs-bench-") as directory:
        for number, blob in enumerate(_layers(subjects.image(name).layout), 1):
            out = Path(directory) / "layer.afslyr"
            with blob.open("rb") as file:
                made = convert(file.read, out)
            out.unlink()
            work: dict[str, Callable[[], measure.Prepared]] = {
                "AFS": functools.partial(_converting, blob, out),
                BASE: measure.plain(functools.partial(_inflate_and_hash, blob)),
            }
            taken = measure.interleave(work, count, warm_up=1)
            prefix = f"layer {number}: "
            series += [measure.Series(prefix + each.name, each.unit, each.samples) for each in measure.seconds(taken)]
            targets.append(measure.ratio(taken, "AFS", BASE, 1 / LEAST_SPEED, prefix))
            index = [_index_seconds(blob) for _ in range(count)]
            series.append(measure.Series(f"{prefix}index", "s", index))
            per_entry = statistics.median(index) / made.entries
            targets.append(
                measure.Target(
                    f"{prefix}index of {INDEX_ENTRIES} entries", per_entry * INDEX_ENTRIES, INDEX_SECONDS, "s"
                )
            )
            over = 100 * (made.file_size / made.tar_size - 1)
            targets.append(measure.Target(f"{prefix}size over the tar", over, MOST_OVERHEAD, "%"))
            notes.append(f"Layer {number}: {made.tar_size / 2**20:.0f} MiB of tar, {made.entries} entries.")
    return measure.Report(f"convert-{name}", f"Converting the layers of {name}", series, targets, notes=notes)


def _layers(layout: Path) -> list[Path]:
    """The blobs of the layers of an OCI layout's only image."""
    blobs = layout / "blobs" / "sha256"
    index = json.loads((layout / "index.json").read_bytes())
    manifest = json.loads((blobs / index["manifests"][0]["digest"].removeprefix("sha256:")).read_bytes())
    return [blobs / layer["digest"].removeprefix("sha256:") for layer in manifest["layers"]]


@contextmanager
def _converting(blob: Path, out: Path) -> Iterator[Callable[[], object]]:
    with blob.open("rb", buffering=0) as file:
        yield lambda: convert(file.read, out)
    out.unlink()


def _inflate_and_hash(blob: Path) -> None:
    digest = hashlib.sha256()
    opened = cast("Callable[[Path, str], IO[bytes]]", igzip.open)  # isal has no types for it
    with opened(blob, "rb") as file:
        while block := file.read(BLOCK_SIZE):
            digest.update(block)


def _index_seconds(blob: Path) -> float:
    """What :func:`convert` does between the last entry and writing the metadata: sorting, numbering, packing."""
    with blob.open("rb") as file:
        tree = build(entries(ByteStream(inflate(file.read))))
    started = time.perf_counter()
    Index(tree.inodes).pack(0)
    return time.perf_counter() - started
