"""``afs_fused``: partial layers as read-only files over FUSE, for EROFS mounts on top of them.

One flat directory; a file's name is the hex of its diff_id. A read whose chunks are here is one pread; otherwise the
layerstore is asked to fill them, and the read waits. No gRPC, and no state that another process needs: the chunk map is
shared memory with the layerstore (see :mod:`afs.layerstore.partial`).

State, on one event loop: ``_inodes`` maps inode numbers to open layers, ``_by_name`` names to inode numbers. Numbers are
never reused, because the kernel may ask about one until it forgot it. That may be long after the last mount on the file
went; so its descriptors are closed with the last open file, or an evicted layer would keep its space on the disk.
"""

import contextlib
import errno
import functools
import logging
import mmap
import os
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import click
import pyfuse3
from typing_extensions import override

from afs.core.service import raise_file_limit
from afs.layerstore.fillwire import FillClient, FillError
from afs.snapshotter.fusedwire import PROTOCOL, serving

log = logging.getLogger(__name__)
_REOPENS = 3
_FILES = pyfuse3.ROOT_INODE + 1
_FOREVER_S = 86400.0  # layers never change, so the kernel may keep names and attributes
Handler = TypeVar("Handler", bound=Callable[..., Any])


@dataclass(slots=True)
class _Layer:
    diff_id: str
    size: int
    chunk_size: int
    data: int  # -1: closed
    chunks: mmap.mmap | None  # None: complete when it was opened
    lookups: int = 0
    opens: int = 0

    def missing(self, offset: int, end: int) -> tuple[int, int] | None:
        """(first, count) of a run of chunks that covers what is missing of [offset, end), or None."""
        if self.chunks is None:
            return None
        first, last = offset // self.chunk_size, min((end - 1) // self.chunk_size, len(self.chunks) - 1)
        absent = [index for index in range(first, last + 1) if not self.chunks[index]]
        return (absent[0], absent[-1] - absent[0] + 1) if absent else None

    def close(self) -> None:
        if self.data >= 0:
            os.close(self.data)
        if self.chunks is not None:
            self.chunks.close()
        self.data, self.chunks = -1, None

    def take(self, other: "_Layer") -> bool:
        """Read from the files of *other* from now on; false, and it is closed, if that cannot be the same layer."""
        if other.size != self.size:
            other.close()
            return False
        self.close()
        self.data, self.chunks = other.data, other.chunks
        return True


def _fail(error: Exception) -> NoReturn:
    """The one place where failures become what the kernel sees. Anything but ENOENT is an I/O error to a reader."""
    number = getattr(error, "errno", None)
    raise pyfuse3.FUSEError(errno.ENOENT if number == errno.ENOENT else errno.EIO) from error


def _answered(handler: Handler) -> Handler:
    """*handler* with every exception an I/O error to the reader.

    pyfuse3's asyncio mode ends a task of the session at any other exception than FUSEError, without a word and without an
    answer to the kernel: the reader would hang for ever, even when it is killed.
    """

    @functools.wraps(handler)
    async def answered(*args: Any, **kwargs: Any) -> Any:
        try:
            return await handler(*args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except Exception as error:
            log.exception("%s", handler)
            raise pyfuse3.FUSEError(errno.EIO) from error

    return cast("Handler", answered)


class LayerFiles(pyfuse3.Operations):
    """The file system; *client* asks the layerstore, *faults* is a directory with a byte per failed read of a layer."""

    enable_writeback_cache = False

    def __init__(self, client: FillClient, faults: str) -> None:
        super().__init__()
        self._client = client
        self._faults = faults
        self._inodes: dict[int, _Layer] = {}
        self._by_name: dict[bytes, int] = {}
        self._next = _FILES + 1

    def control(self, message: dict[str, Any]) -> dict[str, Any]:
        """The answer to a question on the control socket."""
        layers = list(self._inodes.values())
        match message.get("op"):
            case "hello":
                names = [layer.diff_id for layer in layers if layer.opens]
                return {"protocol": PROTOCOL, "pid": os.getpid(), "layers": names}
            case "stats":
                return {"layers": {}}
            case "release":
                return {}
            case operation:
                raise ValueError(f"no operation {operation!r}")

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.entry_timeout = entry.attr_timeout = _FOREVER_S
        if inode in (pyfuse3.ROOT_INODE, _FILES):
            entry.st_mode = stat.S_IFDIR | 0o500
            entry.st_nlink = 2
            return entry
        layer = self._inodes.get(inode)
        if layer is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        entry.st_mode = stat.S_IFREG | 0o400
        entry.st_nlink = 1
        entry.st_size = layer.size
        return entry

    @override
    @_answered
    async def getattr(self, inode: int, ctx: Any = None) -> pyfuse3.EntryAttributes:
        return self._attributes(inode)

    @override
    @_answered
    async def lookup(self, parent_inode: int, name: bytes, ctx: Any = None) -> pyfuse3.EntryAttributes:
        if name in (b".", b".."):
            return self._attributes(pyfuse3.ROOT_INODE)
        if parent_inode == pyfuse3.ROOT_INODE:
            if name == b"f":
                return self._attributes(_FILES)
            raise pyfuse3.FUSEError(errno.ENOENT)
        inode = self._by_name.get(name)
        if inode is None:
            try:
                layer = await self._open_layer(name.decode("ascii"))
            except (FillError, OSError, ValueError) as error:
                log.warning("cannot open layer %r: %s", name, error)
                _fail(error)
            inode = self._by_name.get(name)  # another lookup may have been quicker
            if inode is None:
                inode, self._next = self._next, self._next + 1
                self._inodes[inode] = layer
                self._by_name[name] = inode
            else:
                layer.close()
        self._inodes[inode].lookups += 1
        return self._attributes(inode)

    async def _open_layer(self, name: str) -> _Layer:
        diff_id = f"sha256:{name}"
        answer = await self._client.ask(op="open", diff_id=diff_id)
        data = os.open(answer["data"], os.O_RDONLY | os.O_CLOEXEC)
        try:
            chunks = None
            if answer["chunks"]:
                fd = os.open(answer["chunks"], os.O_RDONLY | os.O_CLOEXEC)
                try:
                    chunks = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
                finally:
                    os.close(fd)
            return _Layer(diff_id, int(answer["size"]), int(answer["chunk_size"]), data, chunks)
        except BaseException:
            os.close(data)
            raise

    async def _reopen(self, layer: _Layer) -> None:
        """Read from the files that the layer has now; FillError if they cannot be the same layer's."""
        if not layer.take(await self._open_layer(layer.diff_id.removeprefix("sha256:"))):
            raise FillError(f"layer {layer.diff_id} has another size than before", errno.EIO)

    @override
    @_answered
    async def open(self, inode: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise pyfuse3.FUSEError(errno.EROFS)
        layer = self._inodes[inode]
        layer.opens += 1
        if layer.data < 0:
            try:
                await self._reopen(layer)
            except (FillError, OSError, ValueError) as error:
                log.warning("cannot open layer %s again: %s", layer.diff_id, error)
                layer.opens -= 1
                _fail(error)
        # Layers never change, so pages stay valid over close and reopen.
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    @override
    @_answered
    async def read(self, fh: int, off: int, size: int) -> bytes:
        layer = self._inodes[fh]
        end = min(off + size, layer.size)
        try:
            if off < end and layer.missing(off, end) is not None:
                await self._fill(layer, off, end)
            return os.pread(layer.data, size, off)
        except (FillError, OSError, ValueError) as error:
            log.error("layer %s, bytes %d to %d: %s", layer.diff_id, off, end, error)
            self._note_fault(layer)
            _fail(error)

    def _note_fault(self, layer: _Layer) -> None:
        """Leave a mark that outlives this process: whoever ran on the layer has to know that it was not all there."""
        try:
            with open(os.path.join(self._faults, layer.diff_id.removeprefix("sha256:")), "ab") as marks:
                marks.write(b".")
        except OSError as error:  # the reader gets its error all the same
            log.error("cannot note that a read of layer %s failed: %s", layer.diff_id, error)

    async def _fill(self, layer: _Layer, off: int, end: int) -> None:
        """Have the chunks of [off, end) in the file that *layer* has open; what is not there must never be read.

        The layerstore may say that it filled them and mean another file: one that it made anew, or the complete layer,
        while we still have an older one open. Then that one is opened; the bytes of a layer are the same everywhere.
        """
        for _ in range(_REOPENS):
            while (missing := layer.missing(off, end)) is not None:
                seen = layer.data
                await self._client.ask(op="fill", diff_id=layer.diff_id, first=missing[0], count=missing[1])
                if layer.data == seen and layer.missing(off, end) == missing:
                    break  # nothing came into the file that we have
            if missing is None:
                return
            await self._reopen(layer)
        raise FillError(f"layer {layer.diff_id} was filled, but not where we can see it", errno.EIO)

    @override
    @_answered
    async def release(self, fh: int) -> None:
        layer = self._inodes[fh]
        layer.opens -= 1
        if layer.opens == 0:
            layer.close()

    @override
    async def forget(self, inode_list: Any) -> None:
        try:
            for inode, count in inode_list:
                self._forget(inode, count)
        except Exception:  # has no answer, so not even a FUSEError may leave it
            log.exception("forget failed")

    def _forget(self, inode: int, count: int) -> None:
        layer = self._inodes.get(inode)
        if layer is None:
            return
        layer.lookups -= count
        if layer.lookups <= 0:
            del self._inodes[inode]
            self._by_name = {name: number for name, number in self._by_name.items() if number != inode}
            layer.close()


async def _serve(
    directory: Path, number: int, fill_socket: str, faults: str, deadline: float, lock_fd: int, ready_fd: int
) -> None:
    os.truncate(lock_fd, 0)
    os.pwrite(lock_fd, b"%d\n" % os.getpid(), 0)
    client = FillClient(fill_socket, deadline)
    options = {*pyfuse3.default_options, f"fsname=afs/{number}", "subtype=afs", "ro"}
    options.discard("default_permissions")  # one owner, one mode: nothing to check
    files = LayerFiles(client, faults)
    pyfuse3.init(files, str(directory / str(number)), options)
    try:
        async with serving(directory / f"{number}.sock", files.control):
            os.write(ready_fd, b"R")
            os.close(ready_fd)
            await pyfuse3.main()
    finally:
        pyfuse3.close(unmount=True)
        await client.close()


@click.command(help="Serve layers over FUSE. Started and watched by afs_snapshotter.")
@click.version_option(package_name="afs-cluster", prog_name="afs_fused")
@click.option("--directory", type=Path, required=True, help="Directory of the mount points.")
@click.option("--number", type=int, required=True, help="Mount point, control socket and lock are named by it.")
@click.option("--fill-socket", required=True)
@click.option("--faults", required=True, help="Directory that gets a byte in a layer's file for each failed read.")
@click.option("--deadline", default=40.0, help="Seconds that a read waits for the layerstore before EIO.")
@click.option("--lock-fd", type=int, required=True, help="The locked lock file, to keep open.")
@click.option("--ready-fd", type=int, required=True, help="Gets one byte when the file system is mounted.")
@click.option("--log-level", default="INFO")
def main(
    directory: Path,
    number: int,
    fill_socket: str,
    faults: str,
    deadline: float,
    lock_fd: int,
    ready_fd: int,
    log_level: str,
) -> None:
    """Run until the file system is unmounted or SIGTERM comes."""
    import asyncio
    import signal

    import pyfuse3.asyncio

    raise_file_limit()  # an open layer takes two
    logging.basicConfig(level=log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    pyfuse3.asyncio.enable()

    async def run() -> None:
        loop = asyncio.get_running_loop()
        serving_files = _serve(directory, number, fill_socket, faults, deadline, lock_fd, ready_fd)
        task = asyncio.ensure_future(serving_files)
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
        # A terminal's Ctrl-C reaches the whole group; mounts need this process until the snapshotter has unmounted them.
        loop.add_signal_handler(signal.SIGINT, lambda: None)
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(run())


if __name__ == "__main__":
    main()
