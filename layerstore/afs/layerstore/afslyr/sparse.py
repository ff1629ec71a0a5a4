"""Sparse files in tars: old GNU headers ('S') and GNU's PAX formats 0.0, 0.1 and 1.0 (GNU tar manual, "Sparse Formats").

A map is a tuple of (offset, length) pairs in bytes: where the pieces that the tar holds, one after the other, belong in
the file. All functions raise ValueError for maps that make no sense.
"""

from collections.abc import Callable

from afs.layerstore.afslyr import pax
from afs.layerstore.afslyr.tarheader import BLOCK, number

SparseMap = tuple[tuple[int, int], ...]

MAX_MAP = 4 << 20  # bytes of one map in the tar
_ENTRY = 24
_OLD_ENTRIES = (386, 4)  # where, how many
_OLD_MORE = 482
_OLD_SIZE = slice(483, 495)
_EXTENSION_ENTRIES = (0, 21)
_EXTENSION_MORE = 504


def checked(pairs: list[tuple[int, int]], size: int, stored: int) -> SparseMap:
    """*pairs* as a map of a file of *size* bytes of which the tar holds *stored*; empty pieces are left out."""
    end = total = 0
    for offset, length in pairs:
        if offset < end or length < 0 or offset + length > size:
            raise ValueError("sparse map is not ascending within the file")
        end = offset + length
        total += length
    if total != stored:
        raise ValueError(f"sparse map covers {total} bytes, the tar holds {stored}")
    return tuple(pair for pair in pairs if pair[1])


def old_gnu(block: bytes, read_block: Callable[[], bytes]) -> tuple[list[tuple[int, int]], int]:
    """Pairs and file size of an 'S' header; *read_block* gives the extension blocks that follow it."""
    size = number(block[_OLD_SIZE])
    pairs = _old_entries(block, *_OLD_ENTRIES)
    more, room = block[_OLD_MORE], MAX_MAP
    while more:
        room -= BLOCK
        if room < 0:
            raise ValueError("sparse map is too long")
        extension = read_block()
        pairs += _old_entries(extension, *_EXTENSION_ENTRIES)
        more = extension[_EXTENSION_MORE]
    return pairs, size


def _old_entries(block: bytes, at: int, count: int) -> list[tuple[int, int]]:
    pairs = []
    for start in range(at, at + count * _ENTRY, _ENTRY):
        if not block[start]:  # unused entries are NUL
            break
        pairs.append((number(block[start : start + 12]), number(block[start + 12 : start + _ENTRY])))
    return pairs


def pax_0(records: pax.Records) -> list[tuple[int, int]]:
    """Pairs of formats 0.0 (repeated offset and numbytes records) and 0.1 (one map record)."""
    numbers: list[int] = []
    for key, value in records:
        if key == b"GNU.sparse.map":
            numbers = [pax.integer(item) for item in value.split(b",")] if value else []
        elif key in {b"GNU.sparse.offset", b"GNU.sparse.numbytes"}:
            if (len(numbers) % 2 == 0) != (key == b"GNU.sparse.offset"):
                raise ValueError("sparse offsets and lengths do not alternate")
            numbers.append(pax.integer(value))
    return _paired(numbers)


def pax_1(read_block: Callable[[], bytes]) -> tuple[list[tuple[int, int]], int]:
    """Pairs of format 1.0, whose map stands in front of the data as decimal lines, and the bytes that it takes."""
    text, used, wanted = b"", 0, None
    lines: list[bytes] = []
    while wanted is None or len(lines) < wanted:
        if used >= MAX_MAP or len(text) > BLOCK:
            raise ValueError("sparse map is too long")
        block = read_block()
        used += BLOCK
        *more, text = (text + block).split(b"\n")
        lines += more
        if wanted is None and lines:
            wanted = 1 + 2 * pax.integer(lines[0])
    return _paired([pax.integer(line) for line in lines[1:wanted]]), used


def _paired(numbers: list[int]) -> list[tuple[int, int]]:
    if len(numbers) % 2:
        raise ValueError("sparse map has an odd number of fields")
    return list(zip(numbers[::2], numbers[1::2], strict=True))
