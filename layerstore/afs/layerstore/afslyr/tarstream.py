"""A streaming tar parser: v7, ustar, GNU and PAX, nothing kept but the entry at hand.

Unlike tarfile it keeps names as bytes, tells where data stands, reads what containerd reads and refuses the rest with
the entry's name. Ends as Go's archive/tar does, which containerd uses: at two zero blocks, or at the end of the stream.
"""

import stat
from collections.abc import Iterator
from dataclasses import dataclass, field

from afs.layerstore.afslyr import pax, sparse, tarheader
from afs.layerstore.afslyr.errors import CorruptLayer, LayerLimit
from afs.layerstore.afslyr.limits import DEFAULT_LIMITS, Limits
from afs.layerstore.afslyr.tarheader import BLOCK, UNKNOWN, ZERO_BLOCK, Entry

# Global records in force, and their bytes. They are merged into every entry, so many would cost much time: 250 extended
# attributes made each entry cost as much as 80 without.
MAX_DEFAULTS = 16
MAX_DEFAULT_BYTES = 64 << 10
MAX_RECORD = 1 << 20  # bytes of a long name or extended header, as in Go's archive/tar

_EXTENSIONS = b"xXgLK"
_WITH_DATA = b"0\x007SDV"  # the size field of all others says nothing about data


class ByteStream:
    """Blocks of any size as one stream with a position in bytes."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self._block, self._at = blocks, b"", 0
        self.position = 0

    def read(self, count: int) -> bytes:
        """*count* bytes, fewer only at the end."""
        end = self._at + count
        if end > len(self._block):
            return self._read_across(count)
        data = self._block[self._at : end]
        self._at = end
        self.position += count
        return data

    def _read_across(self, count: int) -> bytes:
        parts = []
        while count:
            if self._at == len(self._block) and not self._next():
                break
            part = self._block[self._at : self._at + count]
            self._at += len(part)
            self.position += len(part)
            count -= len(part)
            parts.append(part)
        return b"".join(parts)

    def skip(self, count: int) -> bool:
        """Pass over *count* bytes; False if the stream ends before."""
        while count > (left := len(self._block) - self._at):
            count -= left
            self.position += left
            if not self._next():
                return False
        self._at += count
        self.position += count
        return True

    def _next(self) -> bool:
        self._block, self._at = next(self._blocks, b""), 0
        return bool(self._block)


@dataclass(slots=True)
class _Extended:
    """What the headers in front of an entry say about it."""

    records: pax.Records = field(default_factory=list)
    name: bytes | None = None
    link: bytes | None = None


@dataclass(slots=True)
class _Defaults:
    """What the global headers so far say about every entry that follows."""

    records: dict[bytes, bytes] = field(default_factory=dict)
    xattrs: dict[bytes, bytes] = field(default_factory=dict)  # of those, decoded once

    def update(self, records: pax.Records) -> None:
        """Take another header's. ValueError if that makes too many."""
        self.records.update(records)
        size = sum(len(key) + len(value) for key, value in self.records.items())
        if len(self.records) > MAX_DEFAULTS or size > MAX_DEFAULT_BYTES:
            raise ValueError(f"more than {MAX_DEFAULTS} global records, or {MAX_DEFAULT_BYTES} bytes of them")
        self.xattrs = pax.xattrs(self.records) or {}


def entries(stream: ByteStream, *, limits: Limits = DEFAULT_LIMITS) -> Iterator[Entry]:
    """The entries of the tar in *stream*, in order.

    Afterwards *stream* stands behind the end marker. Raises CorruptLayer, naming the entry where there is one, and
    LayerLimit.
    """
    defaults = _Defaults()
    extended: _Extended | None = None
    left = limits.max_headers
    while True:
        block = stream.read(BLOCK)
        if len(block) < BLOCK or block == ZERO_BLOCK:
            _check_end(stream, block)
            break
        kind, entry = tarheader.decode(block)
        left -= 1
        if kind in _EXTENSIONS:
            if kind != b"g":
                extended = extended or _Extended()
            left -= _extend(stream, kind, entry, extended, defaults)
        if left < 0:
            raise LayerLimit("tar headers and PAX records", limits.max_headers)
        if kind in _EXTENSIONS:
            continue
        if kind == b"V":  # volume label
            _skip_data(stream, entry.size, entry.name)
            continue
        name = entry.name
        try:
            stored = _complete(stream, block, kind, entry, extended, defaults)
        except ValueError as error:
            raise CorruptLayer(str(error), entry=name) from error
        extended = None
        yield entry
        if stored:
            _skip_data(stream, stored, entry.name)
    if extended is not None:
        raise CorruptLayer("tar ends between an extended header and its entry")


def _check_end(stream: ByteStream, block: bytes) -> None:
    """CorruptLayer unless the tar may end with *block*, which stands where a header would."""
    if block and len(block) < BLOCK:
        raise CorruptLayer(f"tar is truncated: {len(block)} bytes of a header at {stream.position - len(block)}")
    if block and stream.read(BLOCK) not in {b"", ZERO_BLOCK}:
        raise CorruptLayer(f"tar has a lone zero block at {stream.position - 2 * BLOCK}")


def _extend(stream: ByteStream, kind: bytes, header: Entry, extended: _Extended | None, defaults: _Defaults) -> int:
    """Read an extended header ('x', 'X'; 'g' has no entry to extend) or a GNU long name ('L', 'K'); how many records."""
    size = header.size
    if not 0 <= size <= MAX_RECORD:
        raise CorruptLayer(f"extended header of {size} bytes, at most {MAX_RECORD} allowed", entry=header.name)
    data = stream.read(size)
    if len(data) < size or not stream.skip(-size % BLOCK):
        raise CorruptLayer("tar is truncated in an extended header", entry=header.name)
    if extended is not None and kind == b"L":
        extended.name = tarheader.text(data)
        return 0
    if extended is not None and kind == b"K":
        extended.link = tarheader.text(data)
        return 0
    try:
        records = pax.parse_records(data)
        if extended is None or kind == b"g":
            defaults.update(records)
        else:
            extended.records = records
    except ValueError as error:
        raise CorruptLayer(str(error), entry=header.name) from error
    return len(records)


def _skip_data(stream: ByteStream, size: int, name: bytes) -> None:
    if size < 0:
        raise CorruptLayer(f"negative size {size}", entry=name)
    if not stream.skip(size + -size % BLOCK):
        raise CorruptLayer("tar is truncated in the data", entry=name)


def _complete(
    stream: ByteStream, block: bytes, kind: bytes, entry: Entry, extended: _Extended | None, defaults: _Defaults
) -> int:
    """Complete what decode() made of *block*, and return how many bytes of data follow. ValueError if it makes no sense."""
    if entry.type == UNKNOWN:
        raise ValueError(f"unsupported tar entry type {kind!r}")
    records: dict[bytes, bytes] = {}
    if extended is not None or defaults.records:
        extended = extended or _Extended()
        own = dict(extended.records)
        records = {**defaults.records, **own}
        _apply(entry, extended, records)
        entry.xattrs = {**defaults.xattrs, **(pax.xattrs(own) or {})} or None
    stored = entry.size if kind in _WITH_DATA else 0
    if stored < 0:
        raise ValueError(f"negative size {stored}")
    if entry.type == stat.S_IFREG:
        if kind == b"S" or b"GNU.sparse.size" in records or b"GNU.sparse.realsize" in records:
            stored = _make_sparse(entry, stream, block, kind, extended or _Extended(), records)
        elif kind == b"\0" and entry.name.endswith(b"/"):
            entry.type = stat.S_IFDIR  # v7 had no type for directories
    # A header's own fields end at their first NUL.
    if extended is not None and (b"\0" in entry.name or b"\0" in entry.link):
        raise ValueError("NUL in a name")
    entry.offset = stream.position
    if entry.type != stat.S_IFREG:
        entry.size = 0
    return stored


def _apply(entry: Entry, extended: _Extended, records: dict[bytes, bytes]) -> None:
    """Let GNU's long names, and PAX *records* before all, override the header.

    An empty value of a record means the header's (POSIX: it deletes the default).
    """
    if extended.name is not None:
        entry.name = extended.name
    if extended.link is not None:
        entry.link = extended.link
    entry.name = records.get(b"path") or entry.name
    entry.link = records.get(b"linkpath") or entry.link
    if value := records.get(b"size"):
        entry.size = pax.integer(value)
    if value := records.get(b"uid"):
        entry.uid = pax.integer(value)
    if value := records.get(b"gid"):
        entry.gid = pax.integer(value)
    if value := records.get(b"mtime"):
        entry.mtime_ns = pax.time_ns(value)


def _make_sparse(
    entry: Entry,
    stream: ByteStream,
    block: bytes,
    kind: bytes,
    extended: _Extended,
    records: dict[bytes, bytes],
) -> int:
    """Set size and sparse map of *entry*, and return the bytes of data that follow."""

    def read_block() -> bytes:
        data = stream.read(BLOCK)
        if len(data) < BLOCK:
            raise ValueError("tar is truncated in a sparse map")
        return data

    stored = entry.size
    if kind == b"S":
        pairs, entry.size = sparse.old_gnu(block, read_block)
    else:
        entry.name = records.get(b"GNU.sparse.name") or entry.name
        entry.size = pax.integer(records.get(b"GNU.sparse.realsize") or records.get(b"GNU.sparse.size") or b"")
        if records.get(b"GNU.sparse.major", b"0") == b"0":
            pairs = sparse.pax_0(extended.records)
        elif (records[b"GNU.sparse.major"], records.get(b"GNU.sparse.minor")) == (b"1", b"0"):
            pairs, used = sparse.pax_1(read_block)
            stored -= used
        else:
            raise ValueError("unknown version of GNU sparse format")
    entry.sparse = sparse.checked(pairs, entry.size, stored)
    return stored
