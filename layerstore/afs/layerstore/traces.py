"""Start traces: which chunks of an image are touched after a mount, in the order of the first touch.

A trace belongs to one image, named by its manifest digest, from which its platform and its layers follow. It is a hint:
a wrong one makes a node fetch what nobody needs, and nothing else. What the bytes look like is in docs/traces.md; there is
one encoding of a trace, so what :func:`parse_trace` accepts, :meth:`Trace.encode` gives back byte for byte.
"""

import itertools
import struct
import zlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Self

from afs.core.digests import hex_of
from afs.core.errors import DataLoss
from afs.layerstore.manifests import MAX_LAYERS

MAX_CHUNKS = 4096  # 1 GiB; the start of a Python program with numpy and pandas demands some 390
MAGIC = b"AFSTRC\0\2"  # the last byte is the version: another one with another size of chunks
_HEAD = struct.Struct("<8s32sHH")  # magic, manifest digest, layers, runs
_RUN = struct.Struct("<HHI")  # layer, chunks, first chunk
_SUM = struct.Struct("<I")
MAX_BYTES = _HEAD.size + 32 * MAX_LAYERS + _RUN.size * MAX_CHUNKS + _SUM.size
_END = 1 << 32  # of chunk numbers


class Chunk(NamedTuple):
    """One chunk of a layer."""

    diff_id: str
    number: int


class BadTrace(DataLoss):
    """Bytes that are no trace, or the trace of another image than *image* (a manifest digest)."""

    def __init__(self, image: str, cause: str) -> None:
        self.image = image
        super().__init__(f"start trace of image {image}: {cause}")


@dataclass(frozen=True, slots=True)
class Trace:
    """*image* is a manifest digest; *chunks* are in the order of their first touch, each once, at most MAX_CHUNKS."""

    image: str
    chunks: tuple[Chunk, ...] = ()

    def merged(self, demanded: Iterable[Chunk]) -> Self:
        """This trace with what a node that prefetched it had to demand all the same, in that order.

        A new chunk comes behind the one that was demanded before it, or last if none was: whatever was demanded before
        that one had been prefetched, and left no mark. Beyond MAX_CHUNKS the end is cut off.
        """
        known, last = set(self.chunks), list[Chunk]()
        behind: dict[Chunk, list[Chunk]] = {}
        into = last
        for chunk in demanded:
            if chunk in known:
                into = behind.setdefault(chunk, [])
            else:
                into.append(chunk)
        order = itertools.chain.from_iterable((chunk, *behind.get(chunk, ())) for chunk in self.chunks)
        found = dict.fromkeys(itertools.chain(order, last))
        return type(self)(self.image, tuple(itertools.islice(found, MAX_CHUNKS)))

    def encode(self) -> bytes:
        """As :func:`parse_trace` reads it; at most MAX_BYTES."""
        layers = {diff_id: number for number, diff_id in enumerate(dict.fromkeys(c.diff_id for c in self.chunks))}
        runs = [_RUN.pack(layers[diff_id], count, first) for diff_id, first, count in _runs(self.chunks)]
        head = _HEAD.pack(MAGIC, bytes.fromhex(hex_of(self.image)), len(layers), len(runs))
        body = b"".join((head, *(bytes.fromhex(hex_of(diff_id)) for diff_id in layers), *runs))
        return body + _SUM.pack(zlib.crc32(body))


@dataclass(slots=True)
class TraceCounts:
    """What a node did with traces since its start; see TraceStatus."""

    recorded: int = 0
    used: int = 0
    from_peers: int = 0
    refused: int = 0
    prefetched_chunks: int = 0


def _runs(chunks: Iterable[Chunk]) -> Iterator[tuple[str, int, int]]:
    """(diff_id, first chunk, count) of consecutive chunks of one layer, as long as can be."""
    diff_id, first, count = "", 0, 0
    for chunk in chunks:
        if count and chunk == (diff_id, first + count):
            count += 1
            continue
        if count:
            yield diff_id, first, count
        diff_id, first, count = chunk.diff_id, chunk.number, 1
    if count:
        yield diff_id, first, count


def parse_trace(data: bytes, image: str, diff_ids: Collection[str]) -> Trace:
    """The trace of *image* (a manifest digest), whose layers are *diff_ids*; BadTrace if *data* is anything else.

    Whether a layer has a chunk of that number shows only where the layer is.
    """
    if not _HEAD.size + _SUM.size <= len(data) <= MAX_BYTES:
        raise BadTrace(image, f"{len(data)} bytes")
    magic, manifest, layer_count, run_count = _HEAD.unpack_from(data)
    if magic != MAGIC:
        raise BadTrace(image, "not a trace, or one of an unknown version")
    if len(data) != _HEAD.size + 32 * layer_count + _RUN.size * run_count + _SUM.size:
        raise BadTrace(image, f"{len(data)} bytes for {layer_count} layers and {run_count} runs")
    if _SUM.unpack_from(data, len(data) - _SUM.size)[0] != zlib.crc32(data[: -_SUM.size]):
        raise BadTrace(image, "damaged")
    if manifest.hex() != hex_of(image):
        raise BadTrace(image, f"it is that of sha256:{manifest.hex()}")
    at = range(_HEAD.size, _HEAD.size + 32 * layer_count, 32)
    layers = [f"sha256:{data[start : start + 32].hex()}" for start in at]
    if len(set(layers)) < len(layers) or not set(layers) <= set(diff_ids):
        raise BadTrace(image, "its layers are not the image's")
    body = memoryview(data)[_HEAD.size + 32 * layer_count : -_SUM.size]
    return Trace(image, _chunks(image, layers, list(_RUN.iter_unpack(body))))


def _chunks(image: str, layers: list[str], runs: list[tuple[int, int, int]]) -> tuple[Chunk, ...]:
    """The chunks of runs (layer, count, first), if they are as :meth:`Trace.encode` would write them."""
    if sum(count for _, count, _ in runs) > MAX_CHUNKS:
        raise BadTrace(image, f"more than {MAX_CHUNKS} chunks")
    found: dict[Chunk, None] = {}
    total, seen, follows = 0, 0, (-1, -1)
    for layer, count, first in runs:
        # Layers are numbered in the order of their first run, and runs are as long as can be.
        if not count or first + count > _END or layer > min(seen, len(layers) - 1) or (layer, first) == follows:
            raise BadTrace(image, f"a run of {count} chunks from {first} of layer {layer}")
        seen, follows = max(seen, layer + 1), (layer, first + count)
        found.update(dict.fromkeys(Chunk(layers[layer], number) for number in range(first, first + count)))
        total += count
    if seen != len(layers) or len(found) != total:
        raise BadTrace(image, "a layer without chunks, or a chunk twice")
    return tuple(found)
