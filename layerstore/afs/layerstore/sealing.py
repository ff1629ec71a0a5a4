"""fs-verity for layer files: the kernel checks each page of a sealed file as it comes from the disk; a bad one is EIO.

Kernel facts (Documentation/filesystems/fsverity.rst) that shape this:

- Sealing reads the file once and stores a tree of hashes behind its end, 0.8 % of its size. What the disk damaged before
  is sealed as it is: only a layer whose chunks were verified *after* that is guarded.
- A sealed file cannot be written by anybody, only replaced or removed; its times can be set.
- Descriptors and mounts that had it open before are guarded, too, but for the pages that are cached already.
- The root digest is stored on the same disk. This is against disks that change bytes, not against whoever writes to them.

State (one event loop): ``_refused`` has the layers that could not be sealed. Nobody reads a layer only to try again, but
whoever verifies it anyway does: the disk may have been full.
"""

import asyncio
import errno
import logging
import os
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from afs.core import syscalls
from afs.core.units import format_size
from afs.layerstore.store import CompleteLayer

log = logging.getLogger(__name__)
# The kernel or the file system lacks it, or (ENOPKG) the kernel's sha256.
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOPKG)
_NICE = 19


class Sealer:
    """Seals layers one after the other, in a thread that everything else on the machine comes before."""

    def __init__(self) -> None:
        self._refused: set[Path] = set()
        self._thread = ThreadPoolExecutor(1, "afs-seal", _be_nice)

    def may_seal(self, layer: CompleteLayer) -> bool:
        """Whether :meth:`seal` may succeed, as far as is known; it always tries."""
        return layer.path not in self._refused

    async def seal(self, layer: CompleteLayer) -> bool:
        """Seal the layer's file if it is not; whether it is. Its chunks are to be verified after that, not before."""
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, _seal, layer)
        except FileNotFoundError:  # evicted
            self._refused.discard(layer.path)
            return False
        except OSError as error:
            self._refused.add(layer.path)
            log.error("cannot seal layer %s: %s", layer.diff_id, error)
            return False
        self._refused.discard(layer.path)
        return True

    def close(self) -> None:
        """End when the layer under way is done."""
        self._thread.shutdown(cancel_futures=True)


def supported(directory: Path) -> bool:
    """Whether files in *directory* can be sealed, found by trying with a temporary one; why not is logged."""
    try:
        fd, name = tempfile.mkstemp(dir=directory)
        try:
            os.close(fd)  # nobody may have it open for writing
            _seal_file(Path(name))
        finally:
            os.unlink(name)
    except OSError as error:
        level = logging.INFO if error.errno in _UNSUPPORTED else logging.WARNING
        log.log(level, "layer files will not be sealed with fs-verity: %s: %s", directory, error.strerror)
        return False
    return True


def is_sealed(path: Path) -> bool:
    """Whether the kernel guards the file."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return syscalls.has_verity(fd)
    finally:
        os.close(fd)


def _seal(layer: CompleteLayer) -> None:
    started = time.monotonic()
    if _seal_file(layer.path):
        size, seconds = format_size(layer.layout.file_size), time.monotonic() - started
        log.info("sealed layer %s: %s in %.2f s", layer.diff_id, size, seconds)


def _seal_file(path: Path) -> bool:
    """Whether it was not sealed before."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if syscalls.has_verity(fd):
            return False
        syscalls.enable_verity(fd)
    finally:
        os.close(fd)
    return True


def _be_nice() -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
