"""One tar in the encodings that registries hold: gzip, zstd and their seekable kinds, the same bytes each time."""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from typing import TYPE_CHECKING

import zstandard

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_BLOCK = 512
_SKIPPABLE = 0x184D2A50
_FOOTER_MAGIC = b"GNUlInUx"  # zstd:chunked's


def encodings(tar: bytes) -> Mapping[str, bytes]:
    """`tar` by the name of its encoding; all of them inflate to it."""
    pieces = _cut(tar)
    return {
        "plain": tar,
        "gzip-0": _gzip(tar, level=0),
        "gzip-1": _gzip(tar, level=1),
        "gzip-9": _gzip(tar, level=9),
        "gzip-named": _named(tar),
        "gzip-members": b"".join(_gzip(piece) for piece in pieces),
        "gzip-empty-members": _gzip(b"") + b"".join(_gzip(piece) + _gzip(b"") for piece in pieces),
        "gzip-padded": _gzip(tar) + bytes(4096),
        "estargz": estargz(tar),
        "zstd-1": zstandard.ZstdCompressor(level=1).compress(tar),
        "zstd-19": zstandard.ZstdCompressor(level=19, write_checksum=True).compress(tar),
        "zstd-unsized": _unsized(tar),
        "zstd-frames": b"".join(zstandard.ZstdCompressor().compress(piece) for piece in pieces),
        "zstd-skippable": _skippable(b"first") + zstandard.ZstdCompressor().compress(tar) + _skippable(b""),
        "zstd-chunked": zstd_chunked(tar),
    }


def estargz(tar: bytes) -> bytes:
    """As eStargz lays out a blob: a gzip member for each piece, and one with nothing but an extra field as the footer."""
    body = b"".join(_gzip(piece) for piece in _cut(tar))
    # stargz-snapshotter, docs/estargz.md, "Footer": subfield SG with the offset of the table of contents
    extra = b"SG" + struct.pack("<H", 22) + b"%016xSTARGZ" % len(body)
    header = b"\x1f\x8b\x08\x04" + bytes(4) + b"\0\xff" + struct.pack("<H", len(extra)) + extra
    return body + header + b"\x01\0\0\xff\xff" + bytes(8)


def zstd_chunked(tar: bytes) -> bytes:
    """As zstd:chunked lays out a blob: a frame for each piece, its manifest and a footer in skippable frames."""
    compress = zstandard.ZstdCompressor().compress
    pieces = _cut(tar)
    body = b"".join(compress(piece) for piece in pieces)
    manifest = compress(json.dumps({"version": 1, "entries": [{"size": len(piece)} for piece in pieces]}).encode())
    footer = struct.pack("<QQQQQ", len(body) + 8, len(manifest), len(manifest), 1, 0) + _FOOTER_MAGIC
    return body + _skippable(manifest) + _skippable(footer)


def _cut(tar: bytes) -> Sequence[bytes]:
    """`tar` in pieces of one block, two blocks, three blocks, ..."""
    pieces = []
    at, size = 0, _BLOCK
    while at < len(tar):
        pieces.append(tar[at : at + size])
        at, size = at + size, size + _BLOCK
    return pieces or [b""]


def _gzip(data: bytes, level: int = 6) -> bytes:
    return gzip.compress(data, level, mtime=0)


def _named(data: bytes) -> bytes:
    """With all optional fields of the header: extra field, name, comment, checksum of the header (RFC 1952, 2.3)."""
    header = b"\x1f\x8b\x08\x1e" + struct.pack("<I", 1_700_000_000) + b"\x02\x03" + struct.pack("<H", 4) + b"XX\0\0"
    header += b"layer.tar\0a comment\0"
    header += struct.pack("<H", zlib.crc32(header) & 0xFFFF)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    trailer = struct.pack("<II", zlib.crc32(data), len(data) & 0xFFFFFFFF)
    return header + packer.compress(data) + packer.flush() + trailer


def _unsized(data: bytes) -> bytes:
    """As a stream: without the size in the frame's header, and flushed in the middle."""
    packer = zstandard.ZstdCompressor().compressobj()
    half = len(data) // 2
    out = packer.compress(data[:half]) + packer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    return out + packer.compress(data[half:]) + packer.flush()


def _skippable(data: bytes) -> bytes:
    """RFC 8878, 3.1.2."""
    return struct.pack("<II", _SKIPPABLE, len(data)) + data
