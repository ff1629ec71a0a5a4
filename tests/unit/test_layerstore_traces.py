"""Start traces as values, as bytes and as files, and the recorder that they come from."""

import os
import random
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afs.layerstore.manifests import MAX_LAYERS
from afs.layerstore.tracefiles import TraceFiles
from afs.layerstore.tracerecorder import Recorder
from afs.layerstore.traces import MAX_BYTES, MAX_CHUNKS, BadTrace, Chunk, Trace, parse_trace

IMAGE, OTHER = "sha256:" + "1" * 64, "sha256:" + "2" * 64
A, B, C = (f"sha256:{number:064d}" for number in (1, 2, 3))


def trace(*chunks: tuple[str, int], image: str = IMAGE) -> Trace:
    """A trace of these chunks."""
    return Trace(image, tuple(Chunk(*chunk) for chunk in chunks))


# The model


@settings(derandomize=True, deadline=None, database=None)
@given(st.lists(st.tuples(st.sampled_from([A, B, C]), st.integers(0, 12) | st.integers(0, (1 << 32) - 1)), unique=True))
def test_what_is_written_is_read(chunks: list[tuple[str, int]]) -> None:
    written = trace(*chunks)
    assert parse_trace(written.encode(), IMAGE, [A, B, C]) == written


def test_a_run_is_one_entry() -> None:
    assert len(trace(*((A, number) for number in range(1000))).encode()) == len(trace((A, 0)).encode())


def test_the_largest_trace_keeps_the_limit() -> None:
    layers = [f"sha256:{number:064x}" for number in range(MAX_LAYERS)]
    largest = trace(*((layers[number % MAX_LAYERS], 2 * number) for number in range(MAX_CHUNKS)))
    assert len(largest.encode()) == MAX_BYTES < 50_000
    assert parse_trace(largest.encode(), IMAGE, layers) == largest


def raw(layers: list[str], runs: list[tuple[int, int, int]], run_count: int | None = None) -> bytes:
    """An encoded trace that may be wrong; runs are (layer, count, first)."""
    body = b"AFSTRC\0\2" + bytes.fromhex(IMAGE[7:])
    body += len(layers).to_bytes(2, "little") + (run_count or len(runs)).to_bytes(2, "little")
    body += b"".join(bytes.fromhex(layer[7:]) for layer in layers)
    for layer, count, first in runs:
        body += layer.to_bytes(2, "little") + count.to_bytes(2, "little") + first.to_bytes(4, "little")
    return body + zlib.crc32(body).to_bytes(4, "little")


def test_raw_writes_what_is_right() -> None:
    assert raw([A, B], [(0, 2, 5), (1, 1, 0)]) == trace((A, 5), (A, 6), (B, 0)).encode()


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "0 bytes"),
        (bytes(47), "47 bytes"),
        (bytes(48), "not a trace"),
        (bytes(MAX_BYTES + 1), f"{MAX_BYTES + 1} bytes"),
        (trace((A, 1)).encode().replace(b"C\0\2", b"C\0\1", 1), "unknown version"),
        (trace((A, 1)).encode()[:-1], "bytes for 1 layers and 1 runs"),
        (raw([A], [(0, 1, 1)], run_count=2), "bytes for 1 layers and 2 runs"),
        (trace((A, 1)).encode()[:-1] + b"x", "damaged"),
        (trace((A, 1), image=OTHER).encode(), f"it is that of {OTHER}"),
        (trace((C, 1)).encode(), "not the image's"),
        (raw([A, A], [(0, 1, 1), (1, 1, 2)]), "not the image's"),
        (raw([A], [(0, 0, 1)]), "a run of 0 chunks"),
        (raw([A], [(1, 1, 1)]), "a run of 1 chunks from 1 of layer 1"),
        (raw([A, B], [(1, 1, 1), (0, 1, 1)]), "a run of 1 chunks from 1 of layer 1"),
        (raw([A], [(0, 2, (1 << 32) - 1)]), "a run of 2 chunks"),
        (raw([A], [(0, 2, 3), (0, 1, 5)]), "a run of 1 chunks from 5"),
        (raw([A], [(0, 2, 3), (0, 1, 4)]), "a chunk twice"),
        (raw([A, B], [(0, 2, 3)]), "a layer without chunks"),
        (raw([], [(0, 1, 0)]), "a run of 1 chunks"),
        (raw([A], [(0, 4000, 0), (0, 97, 5000)]), "more than 4096 chunks"),
        (raw([A], [(0, 65535, 0)] * 4096), "more than 4096 chunks"),
    ],
)
def test_anything_else_is_refused(data: bytes, cause: str) -> None:
    with pytest.raises(BadTrace, match=f"^start trace of image {IMAGE}: .*{cause}") as caught:
        parse_trace(data, IMAGE, [A, B])
    assert caught.value.image == IMAGE


# Merging


@pytest.mark.parametrize(
    ("old", "demanded", "merged"),
    [
        ("", "cab", "cab"),
        ("abc", "", "abc"),
        ("abc", "cba", "abc"),
        ("abc", "xy", "abcxy"),
        ("abc", "axy", "axybc"),
        ("abc", "zaxcyb", "axbcyz"),
        ("abc", "axbyaz", "axzbyc"),
        ("abc", "xax", "axbc"),
    ],
)
def test_what_was_missed_comes_behind_what_was_demanded_before_it(old: str, demanded: str, merged: str) -> None:
    found = trace(*((A, ord(c)) for c in old)).merged(Chunk(A, ord(c)) for c in demanded)
    assert "".join(chr(chunk.number) for chunk in found.chunks) == merged


def test_a_merged_trace_loses_its_end_at_the_limit() -> None:
    full = trace(*((A, number) for number in range(MAX_CHUNKS)))
    merged = full.merged([Chunk(A, 0), Chunk(B, 0)])
    assert merged.chunks == (Chunk(A, 0), Chunk(B, 0), *full.chunks[1:-1])
    assert full.merged([Chunk(B, 0)]) == full


def test_a_trace_converges() -> None:
    """Starts that each touch other chunks, some of which are here already: what was recorded once is never missed again."""
    rng = random.Random("converge")  # noqa: S311 - not for secrets
    known = trace()
    for _ in range(40):
        here = set(rng.sample(range(200), 150))
        misses = [n for n in rng.sample(range(200), 120) if n not in here and Chunk(A, n) not in known.chunks]
        known = known.merged(Chunk(A, number) for number in misses)
    assert {chunk.number for chunk in known.chunks} == set(range(200))


# Recording


def test_a_demand_counts_for_every_image_that_has_the_layer() -> None:
    recorder = Recorder()
    assert recorder.begin(IMAGE, [A, B])
    recorder.demanded(A, 1)
    assert recorder.begin(OTHER, [A, C])
    for chunk in ((A, 2), (B, 0), (C, 0), (A, 1), (A, 2)):
        recorder.demanded(*chunk)
    recorder.demanded("sha256:" + "9" * 64, 0)  # of an image that is not recorded
    assert len(recorder) == 2
    assert recorder.end(IMAGE) == ((A, 1), (A, 2), (B, 0))
    recorder.demanded(B, 3)
    recorder.demanded(C, 3)
    assert recorder.end(OTHER) == ((A, 2), (C, 0), (A, 1), (C, 3))
    assert recorder.demanded_chunks == 7
    assert recorder.begin(IMAGE, [A])
    assert recorder.end(IMAGE) == ()


def test_recordings_are_bounded() -> None:
    recorder = Recorder(most=2)
    assert [recorder.begin(image, [A]) for image in (IMAGE, OTHER, A)] == [True, True, False]
    for number in range(MAX_CHUNKS + 10):
        recorder.demanded(A, number)
    assert len(recorder.end(IMAGE)) == MAX_CHUNKS
    assert recorder.begin(A, [A])


# Files


@pytest.fixture
def files(tmp_path: Path) -> TraceFiles:
    """An empty directory of traces."""
    found = TraceFiles(tmp_path / "traces")
    assert found.restore({}) == {}
    return found


def reopened(files: TraceFiles, *images: str, most: int = 10) -> tuple[TraceFiles, dict[str, int]]:
    """As after a restart of a node that knows *images*, each of layers A and B."""
    again = TraceFiles(files._directory, most)
    return again, again.restore({image: [A, B] for image in images})


def test_traces_survive_a_restart(files: TraceFiles) -> None:
    assert files.load(IMAGE, [A]) is None
    assert files.save(trace((A, 1))) == []
    assert files.save(trace((A, 1), (B, 2))) == []
    assert files.load(IMAGE, [A, B]) == trace((A, 1), (B, 2))
    again, found = reopened(files, IMAGE, OTHER)
    assert found == {IMAGE: 2}
    assert again.load(IMAGE, [A, B]) == trace((A, 1), (B, 2))
    assert again.read(IMAGE) == trace((A, 1), (B, 2)).encode()
    again.drop(IMAGE)
    assert (again.load(IMAGE, [A, B]), again.read(IMAGE), len(again)) == (None, b"", 0)


def test_traces_of_images_that_are_gone_go(files: TraceFiles) -> None:
    files.save(trace((A, 1)))
    (files._directory / ".half.17.tmp").write_bytes(b"what a crash left")
    (files._directory / "somebody's").mkdir()
    assert reopened(files, OTHER)[1] == {}
    assert list(files._directory.iterdir()) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-8],
        lambda data: bytes(len(data)),
        lambda data: b"",
        lambda data: data + bytes(MAX_BYTES),
        lambda _: trace((C, 1)).encode(),
    ],
    ids=["short", "zeros", "empty", "enormous", "other-layers"],
)
def test_a_damaged_file_is_dropped(
    files: TraceFiles, caplog: pytest.LogCaptureFixture, damage: Callable[[bytes], bytes]
) -> None:
    files.save(trace((A, 1)))
    (path,) = files._directory.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    again, found = reopened(files, IMAGE)
    assert (found, len(again), path.exists()) == ({}, 0, False)
    assert [record.message for record in caplog.records if record.message.startswith(f"dropping {path}: ")]


def test_the_traces_used_last_stay(files: TraceFiles) -> None:
    images = [f"sha256:{number:064d}" for number in range(5)]
    small = TraceFiles(files._directory, 3)
    assert small.restore({}) == {}
    for image in images[:3]:
        assert small.save(trace((A, 1), image=image)) == []
    assert small.load(images[0], [A])
    assert small.save(trace((A, 1), image=images[3])) == [images[1]]
    for number, image in enumerate((images[2], images[0], images[3])):
        os.utime(small._path(image), (number, number))
    again, found = reopened(files, *images, most=2)
    assert set(found) == {images[0], images[3]}
    assert images[2] not in again
    assert len(list(files._directory.iterdir())) == 2
