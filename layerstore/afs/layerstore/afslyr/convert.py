"""From a layer's blob to an ``.afslyr`` file in one pass, with a few MiB of blocks in flight.

Two threads: one reads and inflates the blob; the caller's hashes, writes and parses the tar. Inflating, hashing and writing
release the GIL. The blob is hashed by whichever would wait for the other: which one that is differs from layer to layer, and it
took 5 % off the first and the fourth of IMG4. A third thread that parsed alone was slower: on two cores there is no room for
it, and it took the GIL from the others.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from afs.core.errors import Cancelled
from afs.core.files import unlinked_on_error
from afs.layerstore.afslyr.erofs import Index
from afs.layerstore.afslyr.errors import CorruptLayer, DigestMismatch, LayerLimit
from afs.layerstore.afslyr.inflate import READ_SIZE, inflate
from afs.layerstore.afslyr.layout import BLOCK_BITS, MAX_EROFS_END, TAR_OFFSET, align_up, make_layout
from afs.layerstore.afslyr.limits import DEFAULT_LIMITS, Limits
from afs.layerstore.afslyr.readahead import ReadAhead
from afs.layerstore.afslyr.sharedhash import SharedHash
from afs.layerstore.afslyr.tarstream import ByteStream, entries
from afs.layerstore.afslyr.tree import TreeBuilder
from afs.layerstore.afslyr.writer import LayerWriter

__all__ = ["Converted", "Limits", "convert"]

_DEPTH = 4  # blocks that may wait to be written
_UNHASHED = 4 << 20  # bytes of the blob that may wait to be hashed


@dataclass(frozen=True, slots=True)
class Converted:
    """What a conversion made. Sizes in bytes, digests with their ``sha256:`` prefix; ``entries`` counts the tar's."""

    diff_id: str
    blob_digest: str
    blob_size: int
    tar_size: int
    file_size: int
    entries: int
    root_digest: str


def convert(
    read: Callable[[int], bytes],
    out: Path,
    *,
    diff_id: str | None = None,
    blob_digest: str | None = None,
    limits: Limits = DEFAULT_LIMITS,
    cancelled: Callable[[], bool] = lambda: False,
    interrupt: Callable[[], None] = lambda: None,
) -> Converted:
    """Convert the blob behind *read* to the new file *out*.

    *read(n)* returns at most *n* bytes, and none at the end. It is called from another thread, *cancelled* from both. It must
    return or raise in finite time, or when *interrupt* is called, which says that nobody wants more. *out* must not exist;
    it is durable on return, its name is not. Given *diff_id* and *blob_digest* are compared with what came.

    Raises CorruptLayer (DigestMismatch among them, the blob's first), LayerLimit, Cancelled, FileExistsError, OSError from
    writing and whatever *read* raises. After any of them *out* does not exist and no thread is left.
    """
    blob = _Blob(read, cancelled)
    writer = LayerWriter(out, blob.check_cancelled)
    # With a digest to check, a corrupt layer's blob is read to its end.
    wake = interrupt if blob_digest is None else lambda: None
    with unlinked_on_error(out):
        try:
            return _Conversion(blob, writer, limits, wake).run(diff_id, blob_digest)
        finally:
            writer.close()


class _Blob:
    """The compressed bytes, hashed and counted as they pass."""

    def __init__(self, read: Callable[[int], bytes], cancelled: Callable[[], bool]) -> None:
        self._read, self._cancelled = read, cancelled
        self.hash = SharedHash(_UNHASHED)
        self.size = 0
        self.failed = False

    def read(self, count: int) -> bytes:
        """As the source's; raises Cancelled when asked to."""
        if self._cancelled():
            raise Cancelled("conversion of a layer was cancelled")
        try:
            data = self._read(count)
        except BaseException:
            self.failed = True
            raise
        self.hash.add(data)
        self.size += len(data)
        return data

    def check_cancelled(self) -> None:
        """Raise Cancelled when asked to."""
        if self._cancelled():
            raise Cancelled("conversion of a layer was cancelled")

    def drain(self, most: int) -> None:
        """Read what is left, *most* bytes at most, so that the digest covers it."""
        end = self.size + most
        while self.size < end and self.read(READ_SIZE):
            pass


class _Conversion:
    """One run of the pipeline."""

    def __init__(self, blob: _Blob, writer: LayerWriter, limits: Limits, wake: Callable[[], None]) -> None:
        self._blob, self._writer, self._limits, self._wake = blob, writer, limits, wake
        self._tar_hash = hashlib.sha256()
        self._tar_size = 0
        self._max_tar = min(limits.max_tar_bytes, MAX_EROFS_END)  # block numbers of data have 32 bits

    def run(self, diff_id: str | None, blob_digest: str | None) -> Converted:
        """Do everything."""
        try:
            builder = self._stream()
        except CorruptLayer as error:
            if blob_digest is not None and not self._blob.failed:
                # A damaged blob makes a damaged tar: the digest is the better thing to tell.
                self._blob.drain(self._limits.max_tar_bytes)
                _compare("blob", blob_digest, self._blob.hash.digest, error)
            raise
        actual = "sha256:" + self._tar_hash.hexdigest()
        _compare("blob", blob_digest, self._blob.hash.digest)
        _compare("uncompressed tar", diff_id, actual)
        return self._finish(builder, actual)

    # The pass over the tar

    def _stream(self) -> TreeBuilder:
        """Read, hash, write and parse all of the blob."""
        builder = TreeBuilder(self._limits)
        with ReadAhead(inflate(self._blob.read), _DEPTH, "afslyr-inflate", self._wake, self._blob.hash.work) as blocks:
            written = self._written(blocks)
            for entry in entries(ByteStream(written), limits=self._limits):
                builder.add(entry)
            for _ in written:  # behind the end marker: part of the tar, but not parsed
                pass
        return builder

    def _written(self, blocks: Iterable[bytes]) -> Iterator[bytes]:
        """Hash and write each block of the tar before it is parsed."""
        for block in blocks:
            self._tar_size += len(block)
            if self._tar_size > self._max_tar:
                raise LayerLimit("uncompressed tar", self._max_tar, "bytes")
            self._blob.check_cancelled()
            self._tar_hash.update(block)
            self._writer.append(block)
            yield block

    # What follows the tar

    def _finish(self, builder: TreeBuilder, diff_id: str) -> Converted:
        writer = self._writer
        index = Index(builder.finish())
        if index.length > self._limits.max_metadata_bytes:
            raise LayerLimit("metadata", self._limits.max_metadata_bytes, "bytes")
        writer.pad(align_up(TAR_OFFSET + self._tar_size))
        extras_offset = writer.offset
        self._append_extras(builder, index)
        layout = make_layout(diff_id, self._tar_size, writer.offset - extras_offset, index.length)
        if layout.erofs_end > MAX_EROFS_END:
            raise LayerLimit("file", MAX_EROFS_END, "bytes")
        writer.pad(layout.meta_offset)
        writer.append(index.pack(layout.meta_offset))
        self._blob.check_cancelled()
        table = writer.finish(layout, index.count)
        return Converted(
            diff_id=diff_id,
            blob_digest=self._blob.hash.digest,
            blob_size=self._blob.size,
            tar_size=self._tar_size,
            file_size=layout.file_size,
            entries=builder.entries,
            root_digest=table.root_digest,
        )

    def _append_extras(self, builder: TreeBuilder, index: Index) -> None:
        """Expand the sparse files that are still reachable, each from an aligned offset on."""
        writer = self._writer
        inodes = builder.inodes
        found = [file for file in builder.sparse if index.is_reachable(file[0])]
        most = min(self._limits.max_extras_bytes, MAX_EROFS_END - writer.offset)
        if sum(align_up(inodes.size[node]) for node, _, _ in found) > most:
            raise LayerLimit("expanded sparse files", most, "bytes")
        for node, pieces, offset in found:
            self._blob.check_cancelled()
            inodes.addr[node] = writer.offset >> BLOCK_BITS
            writer.append_sparse(pieces, inodes.size[node], TAR_OFFSET + offset)
            writer.pad(align_up(writer.offset))


def _compare(what: str, expected: str | None, actual: str, cause: BaseException | None = None) -> None:
    if expected is not None and expected != actual:
        raise DigestMismatch(f"the {what}'s digest", expected, actual) from cause
