"""The 512-byte tar header: POSIX ustar (pax(1), "ustar Interchange Format"), v7, GNU and star variants.

Written for speed where that costs no clarity: a layer has one header per file, and this is half of the parser's time.
"""

import functools
import stat
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from afs.layerstore.afslyr.errors import CorruptLayer

if TYPE_CHECKING:
    from afs.layerstore.afslyr.sparse import SparseMap

BLOCK = 512
ZERO_BLOCK = bytes(BLOCK)
HARD_LINK = 0  # Entry.type of hard links; all others are stat's S_IF numbers
UNKNOWN = -1  # Entry.type of what is no file
_FIELDS = struct.Struct("100s24s12s12s8sc100s6s")  # name, mode and owner, size, mtime, checksum, type, link, magic
_DEVICE = struct.Struct("8s8s")
_DEVICE_AT = 329
_PREFIX = slice(345, 500)
_STAR_PREFIX = slice(345, 476)
_CHECKSUM = slice(148, 156)
_ADLER_PRIME = 65521
_CACHE = 4096  # owners, modes and times repeat: without a cache numbers were a third of the parser's time


_NANO = 1_000_000_000
_TYPES = {
    b"0": stat.S_IFREG,
    b"\0": stat.S_IFREG,
    b"7": stat.S_IFREG,  # contiguous: regular everywhere but on RTU
    b"S": stat.S_IFREG,
    b"1": HARD_LINK,
    b"2": stat.S_IFLNK,
    b"3": stat.S_IFCHR,
    b"4": stat.S_IFBLK,
    b"5": stat.S_IFDIR,
    b"D": stat.S_IFDIR,  # GNU incremental: a directory with a list of names as its data
    b"6": stat.S_IFIFO,
}


@dataclass(slots=True)
class Entry:
    """One file of a tar: what its header says, and the headers in front of that.

    ``type`` is an S_IF number, HARD_LINK or UNKNOWN, ``mode`` the low 12 bits, ``mtime_ns`` nanoseconds, ``size`` the file's
    bytes, ``link`` the target of a hard or symbolic link, ``offset`` where the data starts in the tar. With ``sparse`` set
    the tar holds only those pieces of the file.
    """

    name: bytes
    type: int
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    size: int = 0
    mtime_ns: int = 0
    link: bytes = b""
    devmajor: int = 0
    devminor: int = 0
    offset: int = 0
    xattrs: dict[bytes, bytes] | None = None
    sparse: "SparseMap | None" = None


def number(field: bytes) -> int:
    """A numeric field: octal with spaces and NULs around it, or GNU's base-256 (first bit set, two's complement).

    An empty field is 0. Raises ValueError for anything else.
    """
    first = field[0]
    if first & 0x80:
        bits = 8 * len(field) - 1
        value = int.from_bytes(field, "big") & ((1 << bits) - 1)
        return value - (1 << bits) if first & 0x40 else value
    digits = field.strip(b" \0")
    if not digits.isdigit():  # int() would take signs, underscores and prefixes too
        digits = digits.partition(b"\0")[0].rstrip(b" ")
        if not digits:
            return 0
        if not digits.isdigit():
            raise ValueError(f"not an octal number: {field!r}")
    return int(digits, 8)


@functools.lru_cache(_CACHE)
def _time_ns(field: bytes) -> int:
    return number(field) * _NANO


@functools.lru_cache(_CACHE)
def _mode_and_owner(fields: bytes) -> tuple[int, int, int]:
    """Mode (12 bits), uid and gid, which stand side by side."""
    return number(fields[:8]) & 0o7777, number(fields[8:16]), number(fields[16:])


@functools.lru_cache(_CACHE)
def _adler_of(field: bytes) -> int:
    """What the low half of a header's Adler-32 has to be for its checksum field to be right.

    That half is 1 + the sum of all bytes modulo a prime, and ten times faster than sum(). That it cannot tell sums 65521
    apart does not matter: a checksum is no defence against intent, and chance does not hit that.
    """
    return (1 + number(field) - 8 * 0x20 + sum(field)) % _ADLER_PRIME


def text(field: bytes) -> bytes:
    """A text field up to its first NUL."""
    return field.partition(b"\0")[0]


def _check(block: bytes, field: bytes) -> None:
    """Raise CorruptLayer unless the checksum *field* is the sum of the header's bytes, its own counted as spaces.

    Some historic tars summed signed chars; both count, as POSIX advises.
    """
    rest = block[: _CHECKSUM.start] + block[_CHECKSUM.stop :]
    if number(field) != sum(rest) + 8 * 0x20 - 256 * sum(byte >> 7 for byte in rest):
        raise CorruptLayer("not a tar header: bad checksum")


def decode(block: bytes) -> tuple[bytes, Entry]:
    """The typeflag and the fields of the header in *block* (512 bytes, not all zero).

    CorruptLayer for bad checksums and numbers. Entry's size is that field's, whatever it says about data.
    """
    name, owner, size, mtime, check, kind, link, magic = _FIELDS.unpack_from(block)
    try:
        if zlib.adler32(block) & 0xFFFF != _adler_of(check):
            _check(block, check)
    except ValueError as error:
        raise CorruptLayer("not a tar header: its checksum is no number") from error
    name = name.partition(b"\0")[0]
    if block[_PREFIX.start] and magic == b"ustar\0":
        # star keeps times in the last 24 bytes of the prefix and says so at the end of the block.
        name = text(block[_STAR_PREFIX if block.endswith(b"tar\0") else _PREFIX]) + b"/" + name
    try:
        mode, uid, gid = _mode_and_owner(owner)
        target = text(link) if link[0] else b""
        entry = Entry(name, _TYPES.get(kind, UNKNOWN), mode, uid, gid, number(size), _time_ns(mtime), target)
        if kind in b"34":
            major, minor = _DEVICE.unpack_from(block, _DEVICE_AT)
            entry.devmajor, entry.devminor = number(major), number(minor)
    except ValueError as error:
        raise CorruptLayer(str(error), entry=name) from error
    return kind, entry
