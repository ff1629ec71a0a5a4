"""The cache directory of a node.

::

    ROOT/CACHEDIR.TAG
    ROOT/lock                     flock: one layerstore per directory
    ROOT/layers/<hex>.afslyr      complete layers, by diff_id; appear by rename only
    ROOT/partial/<hex>/           header, table, footer, data (sparse), chunks (one byte per chunk, 1 = verified and written)
    ROOT/images/<hex>.json        resolved images, by sha256 of their key
    ROOT/tmp/                     files under construction; emptied at start

Nothing here awaits, and one process owns the directory, so a method is atomic towards the event loop. Files change
state by one rename each: a crash at any point leaves the old state or the new one.
"""

import base64
import contextlib
import fcntl
import json
import logging
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from afs.core.digests import hex_of, is_digest
from afs.core.errors import AfsError, FailedPrecondition
from afs.core.files import fsync_dir, remove_tree, write_atomic
from afs.core.images import Platform, parse_image
from afs.layerstore.afslyr.errors import CorruptLayer
from afs.layerstore.afslyr.layout import ChunkTable, Layout
from afs.layerstore.afslyr.reader import read_layer
from afs.layerstore.manifests import Image, build_image

log = logging.getLogger(__name__)
_TAG = b"Signature: 8a477f597d28d172789f06886806bc55\n# The cache of an AFS layerstore; backups may skip it.\n"


class StoreLocked(FailedPrecondition):
    """Another layerstore uses the directory."""

    def __init__(self, root: Path) -> None:
        super().__init__(f"{root} is in use by another afs_layerstore_grpcd")


@dataclass(frozen=True, slots=True)
class CompleteLayer:
    """A verified layer file. Its bytes never change; eviction unlinks it, open descriptors keep working."""

    diff_id: str
    path: Path
    layout: Layout
    table: ChunkTable

    def read_chunk(self, index: int) -> bytes:
        """Chunk *index* from disk. Blocking; the receiver checks it against the table."""
        offset, length = self.table.chunk_range(index, self.layout)
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.pread(fd, length, offset)
        finally:
            os.close(fd)


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
        for leftover in (root / "tmp").iterdir():
            log.info("removing %s, which a crash left", leftover)
            remove_tree(leftover) if leftover.is_dir() else leftover.unlink()
        self._complete: dict[str, CompleteLayer] = {}

    def close(self) -> None:
        """Release the directory."""
        os.close(self._lock)

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
        """The layer if all of it is here. A file whose header or table is damaged is removed and counts as absent."""
        layer = self._complete.get(diff_id)
        if layer is not None:
            return layer
        path = self.layer_path(diff_id)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            layout, table = read_layer(fd)
            if layout.diff_id != diff_id:
                raise CorruptLayer(f"the file holds layer {layout.diff_id}", layer=diff_id)
        except AfsError as error:
            log.error("removing %s: %s", path, error.line)
            path.unlink()
            return None
        except OSError as error:  # a bad sector: not ours to judge, but no reason not to serve the others
            log.error("cannot read %s: %s", path, error)
            return None
        finally:
            os.close(fd)
        layer = self._complete[diff_id] = CompleteLayer(diff_id, path, layout, table)
        return layer

    def commit(self, temporary: Path, diff_id: str) -> CompleteLayer:
        """Make the synced file *temporary* the complete layer; the rename is durable on return."""
        path = self.layer_path(diff_id)
        temporary.rename(path)
        fsync_dir(path.parent)
        layer = self.complete(diff_id)
        if layer is None:
            raise FailedPrecondition(f"layer {diff_id} vanished while it was committed")
        return layer

    def drop_partial(self, diff_id: str) -> None:
        """Remove the partial layer's files; open descriptors keep working."""
        remove_tree(self.partial_dir(diff_id))

    def complete_ids(self) -> list[str]:
        """The diff_ids of all complete layers."""
        found = [f"sha256:{path.stem}" for path in sorted((self.root / "layers").glob("*.afslyr"))]
        return [diff_id for diff_id in found if is_digest(diff_id)]

    def partial_ids(self) -> list[str]:
        """The diff_ids of all partial layers."""
        found = sorted((self.root / "partial").iterdir())
        for path in found:
            if path.name.startswith("."):  # was being made when the process died
                remove_tree(path)
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

    def _image_path(self, key: str) -> Path:
        import hashlib

        return self.root / "images" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"

    def load_images(self) -> Iterator[Image]:
        """Every remembered image; a damaged file is removed and logged."""
        for path in sorted((self.root / "images").glob("*.json")):
            try:
                document = json.loads(path.read_bytes())
                platform = Platform(*document["platform"])
                parse_image(document["name"])
                manifest, config, index = (base64.b64decode(document[part]) for part in ("manifest", "config", "index"))
                yield build_image(
                    document["name"],
                    platform,
                    manifest,
                    config,
                    min(int(document["resolved_unix"]), int(time.time())),
                    index,
                )
            except (AfsError, ValueError, KeyError, TypeError, AttributeError) as error:
                log.error("removing %s: %s", path, error)
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()
