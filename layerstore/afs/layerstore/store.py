"""The cache directory of a node.

::

    ROOT/CACHEDIR.TAG
    ROOT/lock                     flock: one layerstore per directory
    ROOT/layers/<hex>.afslyr      complete layers, by diff_id; appear by rename only
    ROOT/partial/<hex>/           header, table, footer, data (sparse), chunks (one byte per chunk, 1 = verified and written)
    ROOT/images/<hex>.json        resolved images, by sha256 of their key
    ROOT/traces/<hex>             start traces, by the manifest digest of their image (tracefiles.py)
    ROOT/scrubbed.json            when and in which boot each complete layer was verified last, by diff_id
    ROOT/tmp/                     files under construction, and evicted ones; emptied at start

The mtime of ``<hex>.afslyr`` and ``data`` is the layer's last use. Not the atime: that changes with any reader, a backup
or the scrubber too, and on noatime mounts with none.

Nothing here awaits, and one process owns the directory, so a method is atomic towards the event loop. Files change
state by one rename each: a crash at any point leaves the old state or the new one.
"""

import base64
import contextlib
import errno
import fcntl
import json
import logging
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from afs.core.digests import hex_of, is_digest
from afs.core.errors import AfsError, FailedPrecondition
from afs.core.files import fsync_dir, remove_tree, write_atomic
from afs.core.images import Platform, parse_image
from afs.layerstore.afslyr.errors import CorruptLayer
from afs.layerstore.afslyr.layout import ChunkTable, Layout, pack_footer
from afs.layerstore.afslyr.reader import read_layer
from afs.layerstore.manifests import Image, NamedImage, build_image

log = logging.getLogger(__name__)
_MOST_ABSENT = 10_000
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_TAG = b"Signature: 8a477f597d28d172789f06886806bc55\n# The cache of an AFS layerstore; backups may skip it.\n"


class StoreLocked(FailedPrecondition):
    """Another layerstore uses the directory."""

    def __init__(self, root: Path) -> None:
        super().__init__(f"{root} is in use by another afs_layerstore_grpcd")


@dataclass(frozen=True, slots=True)
class CompleteLayer:
    """A layer file that was verified when it came. Its bytes never change, except back to what they were.

    Eviction unlinks it; open descriptors keep working. All methods block.
    """

    diff_id: str
    path: Path
    layout: Layout
    table: ChunkTable

    def open_data(self) -> int:
        """A descriptor of the file, for who reads it in a thread. Raises FileNotFoundError."""
        return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)

    def read_chunk(self, index: int, *, from_disk: bool = False, verify: bool = True) -> bytes | None:
        """Chunk *index*, verified; None if it is damaged, an unreadable sector included. Raises FileNotFoundError.

        *from_disk*: not what the page cache remembers of it. Not *verify*: whoever gets it does that.
        """
        offset, length = self.table.chunk_range(index, self.layout)
        fd = self.open_data()
        try:
            if from_disk:  # of no use to us behind it either; what is mounted has pages of its own
                os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)
            data = os.pread(fd, length, offset)
            if from_disk:
                os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            log.error("cannot read chunk %d of %s: %s", index, self.path, error)
            return None
        finally:
            os.close(fd)
        return data if not verify or self.table.verify(index, data) else None

    def write_chunk(self, index: int, data: bytes) -> None:
        """Put a chunk right in place, for whoever has the file open or mounted; durable on return.

        PermissionError if the file is sealed.
        """
        offset, _ = self.table.chunk_range(index, self.layout)
        self._write(data, offset)

    def has_tail(self) -> bool:
        """Whether table and footer are on the disk as they were when the file was opened."""
        tail = self._tail()
        with self.path.open("rb") as file:
            try:
                return os.pread(file.fileno(), len(tail), self.layout.table_offset) == tail
            except OSError as error:
                log.error("cannot read the chunk table of %s: %s", self.path, error)
                return False

    def write_tail(self) -> None:
        """Write table and footer, as they were when the file was opened; durable on return."""
        self._write(self._tail(), self.layout.table_offset)

    def _tail(self) -> bytes:
        return self.table.digests + pack_footer(self.layout, bytes.fromhex(hex_of(self.table.root_digest)))

    def _write(self, data: bytes, offset: int) -> None:
        fd = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            write_all(fd, data, offset)
            os.fsync(fd)
        finally:
            os.close(fd)


def delete(path: Path) -> None:
    """Remove a file or a directory tree; a missing one is no error."""
    if path.is_dir() and not path.is_symlink():
        remove_tree(path)
    else:
        path.unlink(missing_ok=True)


def delete_all(paths: Iterable[Path]) -> None:
    """:func:`delete` each. What cannot be is logged: below ``tmp/`` it is tried again at the next start."""
    for path in paths:
        try:
            delete(path)
        except (AfsError, OSError) as error:
            log.error("cannot remove %s: %s", path, error)


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """All of *data* at *offset* of *fd*; the kernel may take it in parts."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


class LayerStore:
    """Opens *root*, making it if need be, and holds its lock until :meth:`close`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("layers", "partial", "images", "tmp"):
            (root / name).mkdir(parents=True, exist_ok=True)
        self._lock = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise StoreLocked(root) from None
        if not (root / "CACHEDIR.TAG").exists():
            write_atomic(root / "CACHEDIR.TAG", _TAG)
        leftovers = list((root / "tmp").iterdir())
        if leftovers:
            log.info("removing %d files from %s, which a crash left", len(leftovers), root / "tmp")
        delete_all(leftovers)
        self._complete: dict[str, CompleteLayer] = {}
        self._absent: set[str] = set()  # asked for, and not there: every miss of a partial layer asks several times

    def close(self) -> None:
        """Release the directory."""
        os.close(self._lock)

    @property
    def traces_dir(self) -> Path:
        """For :class:`~afs.layerstore.tracefiles.TraceFiles`."""
        return self.root / "traces"

    # Layers

    def layer_path(self, diff_id: str) -> Path:
        """Where the complete layer is or would be."""
        return self.root / "layers" / f"{hex_of(diff_id)}.afslyr"

    def partial_dir(self, diff_id: str) -> Path:
        """Where the partial layer's files are or would be."""
        return self.root / "partial" / hex_of(diff_id)

    def temporary(self) -> Path:
        """A new name in ``tmp/``, on the file system of the layers."""
        return self.root / "tmp" / secrets.token_hex(8)

    def complete(self, diff_id: str) -> CompleteLayer | None:
        """The layer if all of it is here. A file whose header or table is damaged is removed and counts as absent.

        It is read at the first look-up only. A mount that an earlier process gave it to goes on reading the removed file.
        """
        layer = self._complete.get(diff_id)
        if layer is not None or diff_id in self._absent:
            return layer
        path = self.layer_path(diff_id)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            if len(self._absent) >= _MOST_ABSENT:  # peers may ask for anything
                self._absent.clear()
            self._absent.add(diff_id)
            return None
        try:
            layout, table = read_layer(fd)
            if layout.diff_id != diff_id:
                raise CorruptLayer(f"the file holds layer {layout.diff_id}", layer=diff_id)
        except AfsError as error:
            log.error("removing %s: %s", path, error.line)
            path.unlink()
            return None
        except IsADirectoryError:  # somebody's hand; no layer could take its place
            log.error("removing %s: it is a directory", path)
            delete_all([path])
            return None
        except OSError as error:  # a bad sector: not ours to judge, but no reason not to serve the others
            log.error("cannot read %s: %s", path, error)
            return None
        finally:
            os.close(fd)
        layer = self._complete[diff_id] = CompleteLayer(diff_id, path, layout, table)
        return layer

    def commit(self, temporary: Path, diff_id: str, *, replace: bool = False) -> CompleteLayer:
        """Make the synced file *temporary* the complete layer; the rename is durable on return.

        If there is one already it stays, for it may be mounted, and *temporary* goes; unless it is to *replace* that.
        """
        if replace:
            self._complete.pop(diff_id, None)
        elif (known := self.complete(diff_id)) is not None:
            temporary.unlink()
            return known
        path = self.layer_path(diff_id)
        self._absent.discard(diff_id)
        temporary.rename(path)
        fsync_dir(path.parent)
        layer = self.complete(diff_id)
        if layer is None:
            raise FailedPrecondition(f"layer {diff_id} vanished while it was committed")
        return layer

    def drop_partial(self, diff_id: str) -> None:
        """Remove the partial layer's files; open descriptors keep working."""
        delete(self.partial_dir(diff_id))

    def detach(self, diff_id: str) -> list[Path]:
        """Take the layer out of the directory, complete and partial; what is to be deleted. Renames only: it is quick."""
        self._complete.pop(diff_id, None)
        taken = []
        for path in (self.layer_path(diff_id), self.partial_dir(diff_id)):
            temporary = self.temporary()
            try:
                path.rename(temporary)
                taken.append(temporary)
            except FileNotFoundError:
                pass
            except OSError as error:
                if error.errno not in NO_SPACE:
                    raise
                delete(path)  # a disk so full that it has no room for a name; here and now, then
        return taken

    # Space

    def usage(self, diff_id: str) -> tuple[int, float]:
        """(bytes on disk, last use in seconds since the epoch) of a layer's files; (0, 0) if there are none."""
        used, last_use = 0, 0.0
        name = hex_of(diff_id)
        # Strings, not Paths, which cost more than the system calls: this comes with every chunk.
        for path in (f"layers/{name}.afslyr", f"partial/{name}/data", f"partial/{name}/chunks"):
            try:
                status = os.stat(f"{self.root}/{path}")
            except (FileNotFoundError, NotADirectoryError):
                continue
            used += status.st_blocks * 512  # partial layers are sparse
            last_use = max(last_use, status.st_mtime)
        return used, last_use

    def stamp(self, diff_id: str, now: float) -> None:
        """Note on disk that the layer was used at *now*."""
        for path in (self.layer_path(diff_id), self.partial_dir(diff_id) / "data"):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.utime(path, (now, now))

    def default_capacity(self) -> int:
        """Nine tenths of what the cache could have: the free space and what it has already."""
        here = {*self.complete_ids(), *self.partial_ids()}
        return (self.free() + sum(self.usage(diff_id)[0] for diff_id in here)) * 9 // 10

    def default_headroom(self) -> int:
        """A twentieth of the file system, at most 1 GiB."""
        status = os.statvfs(self.root)
        return min(status.f_blocks * status.f_frsize // 20, 1 << 30)

    def free(self) -> int:
        """Bytes that the file system has left for us."""
        status = os.statvfs(self.root)
        return status.f_bavail * status.f_frsize

    def complete_ids(self) -> list[str]:
        """The diff_ids of all complete layers."""
        found = [f"sha256:{path.stem}" for path in sorted((self.root / "layers").glob("*.afslyr"))]
        return [diff_id for diff_id in found if is_digest(diff_id)]

    def partial_ids(self) -> list[str]:
        """The diff_ids of all partial layers."""
        found = sorted((self.root / "partial").iterdir())
        delete_all(path for path in found if path.name.startswith("."))  # was being made when the process died
        return [diff_id for path in found if is_digest(diff_id := f"sha256:{path.name}")]

    # Images

    def save_image(self, name: str, platform: Platform, image: Image) -> None:
        """Remember a resolved image across restarts."""
        document = {
            "name": name,
            "platform": [platform.os, platform.architecture, platform.variant],
            "manifest": base64.b64encode(image.manifest).decode(),
            "config": base64.b64encode(image.config).decode(),
            "index": base64.b64encode(image.index).decode(),
            "resolved_unix": image.resolved_unix,
        }
        write_atomic(self._image_path(image.key), json.dumps(document).encode(), durable=False)

    def forget_image(self, key: str) -> None:
        """Remove a remembered image."""
        self._image_path(key).unlink(missing_ok=True)

    def _image_path(self, key: str) -> Path:
        import hashlib

        return self.root / "images" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"

    def load_images(self) -> Iterator[NamedImage]:
        """Every remembered image; a damaged file is removed and logged."""
        for path in sorted((self.root / "images").glob("*.json")):
            try:
                document = json.loads(path.read_bytes())
                platform = Platform(*document["platform"])
                ref = parse_image(document["name"])
                manifest, config, index = (base64.b64decode(document[part]) for part in ("manifest", "config", "index"))
                resolved = min(int(document["resolved_unix"]), int(time.time()))
                image = build_image(document["name"], platform, manifest, config, resolved, index)
                yield NamedImage(ref, platform, image)
            except (AfsError, ValueError, KeyError, TypeError, AttributeError) as error:
                log.error("removing %s: %s", path, error)
                delete_all([path])
            except OSError as error:  # not ours to judge, but no reason not to serve the others
                log.error("cannot read %s: %s", path, error)
