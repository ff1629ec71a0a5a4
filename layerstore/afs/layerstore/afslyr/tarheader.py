"""The 512-byte tar header: POSIX ustar (pax(1), "ustar Interchange Format"), v7, GNU and star variants."""

import functools
import struct
import zlib
from dataclasses import dataclass

from afs.layerstore.afslyr.errors import CorruptLayer

BLOCK = 512
ZERO_BLOCK = bytes(BLOCK)
_FIELDS = struct.Struct("100s8s8s8s12s12s8sc100s6s2s64x8s8s155s12s")
_CHECKSUM = slice(148, 156)
_ADLER_PRIME = 65521


@dataclass(slots=True)
class Header:
    """The fields of one header, numbers parsed; ``mtime`` in seconds, ``size`` in bytes, ``kind`` is the typeflag."""

    name: bytes
    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    kind: bytes
    link: bytes
    devmajor: int
    devminor: int


@functools.lru_cache(4096)  # owners, modes and times repeat: a third of the parser's time
def number(field: bytes) -> int:
    """A numeric field: octal with spaces and NULs around it, or GNU's base-256 (first bit set, two's complement).

    An empty field is 0. Raises ValueError for anything else.
    """
    first = field[0]
    if first & 0x80:
        bits = 8 * len(field) - 1
        value = int.from_bytes(field, "big") & ((1 << bits) - 1)
        return value - (1 << bits) if first & 0x40 else value
    digits = field.strip(b" \0").partition(b"\0")[0].rstrip(b" ")
    if not digits:
        return 0
    if not digits.isdigit():  # int() would take signs, underscores and prefixes too
        raise ValueError(f"not an octal number: {field!r}")
    return int(digits, 8)


def text(field: bytes) -> bytes:
    """A text field up to its first NUL."""
    return field.partition(b"\0")[0]


def checksum_ok(block: bytes, stated: int) -> bool:
    """Whether *stated* is the sum of the header's bytes, its own field counted as spaces.

    Some historic tars summed signed chars; both count, as POSIX advises.
    """
    own = sum(block[_CHECKSUM])
    # Adler-32's low half is 1 + the sum of all bytes modulo a prime: ten times faster than sum(). That it cannot tell
    # sums 65521 apart does not matter: a checksum is no defence against intent, and chance does not hit that.
    if zlib.adler32(block) & 0xFFFF == (1 + stated - 8 * 0x20 + own) % _ADLER_PRIME:
        return True
    rest = block[: _CHECKSUM.start] + block[_CHECKSUM.stop :]
    signed = sum(rest) + 8 * 0x20 - 256 * sum(byte >> 7 for byte in rest)
    return stated == signed


def decode(block: bytes) -> Header:
    """The header in *block* (512 bytes, not all zero). CorruptLayer for bad checksums and numbers."""
    (name, mode, uid, gid, size, mtime, check, kind, link, magic, _version, major, minor, prefix, tail) = (
        _FIELDS.unpack(block)
    )
    try:
        stated = number(check)
    except ValueError as error:
        raise CorruptLayer("not a tar header: its checksum is no number") from error
    if not checksum_ok(block, stated):
        raise CorruptLayer("not a tar header: bad checksum")
    name = text(name)
    if magic == b"ustar\0" and prefix[0]:
        # star keeps times in the last 24 bytes of the prefix and says so at the end of the block.
        prefix = text(prefix[:131] if tail.endswith(b"tar\0") else prefix)
        name = prefix + b"/" + name
    is_device = kind in b"34"
    try:
        return Header(
            name,
            number(mode) & 0o7777,
            number(uid),
            number(gid),
            number(size),
            number(mtime),
            kind,
            text(link),
            number(major) if is_device else 0,
            number(minor) if is_device else 0,
        )
    except ValueError as error:
        raise CorruptLayer(str(error), entry=name) from error
