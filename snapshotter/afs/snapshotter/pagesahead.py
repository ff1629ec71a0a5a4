"""Having the kernel read what a start trace brought before the program asks for it.

A start trace brings chunks before the program wants them. A read of one that is here costs the program a question to afs_fused
and the copy all the same; with its pages in the page cache of afs_fused's file already, neither. Importing numpy and pandas on a
2-core VM, with all chunks here: 1.15 s, 0.86 s with the pages in the cache, 0.98 s from ext4 on a cold disk (medians).

Only for EROFS on files: loop devices read past that page cache, and the files of a tree are other inodes.

It is posix_fadvise(2) in this process, not FUSE_NOTIFY_STORE in afs_fused: that waits for the lock of a page of which a read is
being answered. An afs_fused that is killed while a thread of it waits so never ends: the thread waits for the read, the read for the
end of the connection, and the connection for the last thread.

State (one event loop): ``_ahead`` has, by layer, what is to be read once the layer is mounted so; ``_MOST`` ranges at most. One
thread at a time reads, for :meth:`PagesAhead.run`, which takes entries away before it awaits.
"""

import asyncio
import logging
import os
import time
from pathlib import Path
from typing import Any

from afs.layerstore.fillwire import MAX_LINE, decode, encode
from afs.snapshotter.backends import Backend
from afs.snapshotter.layermounts import LayerMounts

log = logging.getLogger(__name__)
_MOST = 16_384
_FRESH_S = 60.0  # an image whose trace is prefetched is mounted soon, or not at all
_PAUSE_S = 1.0  # before the layerstore is asked again
Ranges = list[tuple[int, int]]  # (offset, bytes)


class _Ahead:
    """Of one layer; ``since`` is when the first of it was told."""

    def __init__(self) -> None:
        self.ranges: Ranges = []
        self.since = time.monotonic()


class PagesAhead:
    """Of the layers of *mounts*, as the layerstore that listens at *socket* tells of them."""

    def __init__(self, socket: Path, mounts: LayerMounts) -> None:
        self._socket = socket
        self._mounts = mounts
        self._ahead: dict[str, _Ahead] = {}
        self._count = 0
        self._look = asyncio.Event()
        mounts.on_mounted = self._look.set

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch())
            group.create_task(self._read())

    async def _watch(self) -> None:
        while True:
            try:
                reader, writer = await asyncio.open_unix_connection(self._socket, limit=MAX_LINE << 4)
                try:
                    writer.write(encode({"id": 1, "op": "watch"}))
                    while line := await reader.readline():
                        self._told(decode(line))
                finally:
                    writer.close()
            except (
                OSError,
                ValueError,
                TypeError,
                KeyError,
            ) as error:  # it starts anew, or is not there yet; reads go on without this
                log.debug("layerstore at %s: %s", self._socket, error)
            await asyncio.sleep(_PAUSE_S)

    def _told(self, message: dict[str, Any]) -> None:
        if (diff_id := message.get("ahead")) is None:
            return
        ranges = [(int(offset), int(length)) for offset, length in message["ranges"]]
        self._ahead.setdefault(str(diff_id), _Ahead()).ranges.extend(ranges)
        self._count += len(ranges)
        while self._count > _MOST:  # the oldest, which perhaps will never be mounted
            self._take(next(iter(self._ahead)))
        self._look.set()

    def _take(self, diff_id: str) -> Ranges:
        """What is to be read of a layer; nothing of it if that was said too long ago, for it may be here no more."""
        ahead = self._ahead.pop(diff_id)
        self._count -= len(ahead.ranges)
        return ahead.ranges if time.monotonic() - ahead.since < _FRESH_S else []

    async def _read(self) -> None:
        while True:
            await self._look.wait()
            self._look.clear()
            for diff_id in list(self._ahead):
                layer = self._mounts.find(diff_id)
                if layer is None or diff_id not in self._ahead:
                    continue  # not yet, it may be on its way; or not any more
                ranges = self._take(diff_id)
                if layer.worker is not None and layer.backend is Backend.FILE:
                    await asyncio.to_thread(read_ahead, layer.worker.file(diff_id), ranges)


def read_ahead(path: Path, ranges: Ranges) -> None:
    """Have the kernel read *ranges* of a file into its page cache. Waits for nothing but the file being opened."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for offset, length in ranges:
                os.posix_fadvise(fd, offset, length, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(fd)
    except OSError as error:  # its afs_fused has died just now, say: whoever reads is told
        log.info("%s is not read ahead: %s", path, error.strerror)
