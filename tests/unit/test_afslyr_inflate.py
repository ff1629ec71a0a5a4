"""Decompression: what counts as a whole stream, and bounded memory."""

import contextlib
import gzip
import io
import random
import struct
import zlib
from collections.abc import Callable

import pytest
import zstandard

from afs.layerstore.afslyr.errors import CorruptLayer
from afs.layerstore.afslyr.inflate import BLOCK_SIZE, inflate

DATA = random.Random(1).randbytes(300_000) + b"text " * 200_000  # noqa: S311 - not for secrets
SKIPPABLE = struct.pack("<II", 0x184D2A53, 5) + b"skip!"


def all_of(blob: bytes) -> bytes:
    """*blob* inflated."""
    return b"".join(inflate(io.BytesIO(blob).read))


def trickle(blob: bytes, step: int) -> Callable[[int], bytes]:
    """A source that gives at most *step* bytes at a time."""
    source = io.BytesIO(blob)
    return lambda count: source.read(min(count, step))


def zstd(data: bytes, *, write_checksum: bool = False, write_content_size: bool = True) -> bytes:
    """*data* as one frame."""
    compressor = zstandard.ZstdCompressor(write_checksum=write_checksum, write_content_size=write_content_size)
    return compressor.compress(data)


@pytest.mark.parametrize(
    "blob",
    [
        DATA,
        gzip.compress(DATA),
        gzip.compress(DATA[:1000]) + gzip.compress(b"") + gzip.compress(DATA[1000:]),
        gzip.compress(DATA) + bytes(600_000),
        b"".join(gzip.compress(DATA[at : at + 5000]) for at in range(0, len(DATA), 5000)),
        zstd(DATA),
        zstd(DATA, write_checksum=True),
        zstd(DATA, write_content_size=False),
        SKIPPABLE + zstd(DATA[:1000]) + SKIPPABLE + zstd(DATA[1000:]) + SKIPPABLE,
        zstandard.ZstdCompressor(level=19).compress(DATA),
    ],
    ids=["plain", "gzip", "members", "zeros", "estargz", "zstd", "checksum", "no-size", "frames", "level19"],
)
@pytest.mark.parametrize("step", [7, 1000, 1 << 20])
def test_whole_streams(blob: bytes, step: int) -> None:
    assert b"".join(inflate(trickle(blob, max(step, len(blob) // 20_000)))) == DATA


def test_nothing_is_an_empty_plain_stream() -> None:
    assert all_of(b"") == b""


@pytest.mark.parametrize("compress", [gzip.compress, zstd], ids=["gzip", "zstd"])
@pytest.mark.parametrize("cut", [1, 5, 9, 4000])
def test_truncated_streams_are_refused(compress: Callable[[bytes], bytes], cut: int) -> None:
    with pytest.raises(CorruptLayer, match="truncated"):
        all_of(compress(DATA)[:-cut])


def test_a_zstd_stream_cut_between_blocks_is_refused() -> None:
    blob = zstd(DATA)
    with pytest.raises(CorruptLayer, match="truncated"):
        all_of(blob[: len(blob) // 2])


@pytest.mark.parametrize("compress", [gzip.compress, zstd], ids=["gzip", "zstd"])
def test_garbage_behind_the_stream_is_refused(compress: Callable[[bytes], bytes]) -> None:
    with pytest.raises(CorruptLayer, match=r"garbage|damaged"):
        all_of(compress(DATA) + b"garbage")


def test_garbage_behind_zeros_is_refused() -> None:
    with pytest.raises(CorruptLayer, match="garbage"):
        all_of(gzip.compress(DATA) + bytes(300_000) + b"x")


@pytest.mark.parametrize("at", [-6, -2], ids=["crc", "length"])
def test_a_wrong_gzip_trailer_is_refused(at: int) -> None:
    blob = bytearray(gzip.compress(DATA))
    blob[at] ^= 1
    with pytest.raises(CorruptLayer, match="damaged"):
        all_of(bytes(blob))


def test_a_wrong_zstd_checksum_is_refused() -> None:
    blob = bytearray(zstd(DATA, write_checksum=True))
    blob[-1] ^= 1
    with pytest.raises(CorruptLayer, match="damaged"):
        all_of(bytes(blob))


def test_random_damage_never_raises_anything_else() -> None:
    chance = random.Random(2)  # noqa: S311 - not for secrets
    for compress in (gzip.compress, zstd):
        whole = compress(DATA[:20_000])
        for _ in range(200):
            blob = bytearray(whole)
            blob[chance.randrange(4, len(blob))] ^= 1 << chance.randrange(8)
            with contextlib.suppress(CorruptLayer):
                all_of(bytes(blob))


@pytest.mark.parametrize("compress", [gzip.compress, zstd, lambda data: zstd(data, write_content_size=False)])
def test_a_bomb_comes_in_small_blocks(compress: Callable[[bytes], bytes]) -> None:
    blob = compress(bytes(200 << 20))
    total = 0
    for block in inflate(io.BytesIO(blob).read):
        assert len(block) <= 2 * BLOCK_SIZE
        total += len(block)
    assert total == 200 << 20


def test_a_huge_zstd_window_is_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=28, write_content_size=0)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    with pytest.raises(CorruptLayer, match="damaged"):
        all_of(stream.compress(b"x" * 100) + stream.flush())


def test_a_raw_zlib_stream_counts_as_plain() -> None:
    blob = zlib.compress(DATA)
    assert all_of(blob) == blob


def test_a_gzip_header_without_end_is_refused_early() -> None:
    endless = io.BytesIO(b"\x1f\x8b\x08\x08" + bytes(6) + b"n" * (8 << 20))
    with pytest.raises(CorruptLayer, match="header exceeds"):
        list(inflate(endless.read))
    assert endless.tell() <= 2 << 20


@pytest.mark.parametrize("step", [1, 3, 7, 1 << 20])
def test_a_zstd_frame_that_is_shorter_than_it_says_is_refused(step: int) -> None:
    """However the bytes come: the library compares only if they come at once."""
    with pytest.raises(CorruptLayer, match="damaged"):
        list(inflate(trickle(bytes.fromhex("28b52ffd2037010000"), step)))
