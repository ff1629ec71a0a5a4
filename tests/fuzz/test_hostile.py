"""Damaged and arbitrary input: an answer or a typed error, within the limits, and nothing left behind.

A hang is a failure by pytest's timeout; nothing here waits for anything.
"""

import io
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from afs.layerstore.afslyr.check import check_layer
from afs.layerstore.afslyr.convert import Converted, convert
from afs.layerstore.afslyr.errors import LayerLimit
from afs.layerstore.afslyr.index import read_index
from afs.layerstore.afslyr.limits import Limits
from tests.fuzz.effort import EFFORT, SEED, examples
from tests.fuzz.mutate import mutated, mutated_tar
from tests.fuzz.seeds import files, seeds, small_tars
from tests.fuzz.targets import LIMITS, REFUSALS, TARGETS, check_answers
from tests.testbed import tars

TARS = [*small_tars(), tars.every_kind_tar()[:60_000]]
ENCODINGS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gzip": tars.gzipped,
    "zstd": zstandard.compress,
}


def generator(name: str) -> random.Random:
    """Chance for one test, told if it fails."""
    seed = f"{SEED} {name}"
    print(f"seed: {seed!r}")
    return random.Random(seed)  # noqa: S311 - not for secrets


def outcome(blob: bytes, directory: Path, limits: Limits = LIMITS) -> Converted | None:
    """Convert *blob*, check all that was promised about the result, and remove it; None if it was refused."""
    out = directory / "layer"
    try:
        made = convert(io.BytesIO(blob).read, out, limits=limits)
    except REFUSALS:
        assert list(directory.iterdir()) == []
        return None
    with out.open("rb") as file:
        layout, _ = check_layer(file.fileno(), limits=limits)
        index = read_index(file.fileno(), layout, limits)
        check_answers(index)
    out.unlink()
    assert made.blob_size == len(blob)
    assert made.tar_size == layout.tar_length <= limits.max_tar_bytes
    assert made.entries <= made.tar_size // 512
    assert index.inodes <= limits.max_entries + 1
    assert layout.extras_length <= limits.max_extras_bytes
    assert layout.erofs_end - layout.meta_offset < limits.max_metadata_bytes + 4096
    return made


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_damaged_tars(tmp_path: Path, encoding: str) -> None:
    rng = generator(f"tars {encoding}")
    accepted = 0
    count = 150 * EFFORT
    for _ in range(count):
        accepted += outcome(ENCODINGS[encoding](mutated_tar(rng, TARS)), tmp_path) is not None
    assert count // 20 < accepted < count  # or the damage is too great or too small to tell anything
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("afslyr")]


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
def test_damaged_streams(tmp_path: Path, encoding: str) -> None:
    rng = generator(f"streams {encoding}")
    blobs = [ENCODINGS[encoding](tar) for tar in TARS]
    for _ in range(150 * EFFORT):
        outcome(mutated(rng, rng.choice(blobs), blobs), tmp_path)


def test_small_limits(tmp_path: Path) -> None:
    """Each limit at a random place: what passes keeps it."""
    rng = generator("limits")
    refused = 0
    for _ in range(100 * EFFORT):
        limits = Limits(
            max_tar_bytes=rng.choice((1 << 12, 1 << 20)),
            max_entries=rng.choice((1, 3, 100)),
            max_depth=rng.choice((1, 2, 20)),
            max_extras_bytes=rng.choice((0, 4096, 1 << 20)),
            max_metadata_bytes=rng.choice((600, 1500, 1 << 16)),
            max_extents=rng.choice((1, 10, 100)),
        )
        refused += outcome(rng.choice(TARS), tmp_path, limits) is None
    assert 0 < refused < 100 * EFFORT


@examples(150)
@given(st.one_of(st.binary(max_size=3000), st.binary(max_size=1200).map(lambda data: TARS[0][:512] + data)))
def test_arbitrary_bytes(tmp_path_factory: pytest.TempPathFactory, blob: bytes) -> None:
    outcome(blob, tmp_path_factory.mktemp("any"))


@pytest.mark.parametrize("target", TARGETS)
def test_damaged_inputs_of_each_target(target: str) -> None:
    """What `make fuzz` does with coverage to guide it, here for a moment and by chance alone."""
    rng = generator(f"target {target}")
    good = seeds(target)
    for data in good:
        TARGETS[target](data)
    for _ in range((100 if target == "file" else 500) * EFFORT):
        data = mutated_tar(rng, good) if target == "tar" else mutated(rng, rng.choice(good), good)
        try:
            TARGETS[target](data)
        except BaseException:
            print(f"input: {data!r}")
            raise


def test_a_deep_tree_costs_no_recursion(tmp_path: Path) -> None:
    deep = tars.pax([("path", "d/" * 1000 + "f")]) + tars.file("x", b"deep") + tars.END
    assert outcome(deep, tmp_path, Limits()) is not None
    with pytest.raises(LayerLimit):
        convert(io.BytesIO(deep).read, tmp_path / "out", limits=Limits(max_depth=999))


@pytest.mark.parametrize("length", [0, 1, 511, 512, 1024, 4095, 4096, 4160])
def test_every_short_file_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "layer"
    path.write_bytes(files()[0][:length])
    fd = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(REFUSALS):
            check_layer(fd)
    finally:
        os.close(fd)
