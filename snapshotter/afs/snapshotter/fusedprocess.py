"""Starting, finding and ending the ``afs_fused`` process.

State: at most one process is current. A process that died is noticed at the next :meth:`FusedProcess.directory`, which
starts another one at a new mount point; what was mounted on the old one answers EIO until its users leave.
"""

import asyncio
import logging
import os
import sys
from pathlib import Path

from afs.core.digests import hex_of
from afs.core.errors import Internal
from afs.core.mounts import unmount
from afs.core.run import Child, popen, stop

log = logging.getLogger(__name__)


class FusedProcess:
    """Owns ``DIRECTORY/<n>``, the mount points of afs_fused, and *faults*, where it marks failed reads."""

    def __init__(self, directory: Path, faults: Path, fill_socket: Path, deadline: float) -> None:
        self._directory = directory
        self._faults = faults
        self._fill_socket = fill_socket
        self._deadline = deadline
        self._process: Child | None = None
        self._mountpoints: list[Path] = []
        self._starting = asyncio.Lock()

    async def directory(self) -> Path:
        """The directory in which partial layers are files; starts the process if it does not run."""
        async with self._starting:
            if self._process is not None and self._process.poll() is not None:
                log.error("afs_fused (pid %d) died with status %d", self._process.pid, self._process.returncode)
                self._process = None
            if self._process is None:
                await self._start()
            return self._mountpoints[-1]

    def serves(self, mountpoint: Path) -> bool:
        """Whether *mountpoint*, which :meth:`directory` gave, still answers."""
        alive = self._process is not None and self._process.poll() is None
        return alive and mountpoint == self._mountpoints[-1]

    def faults(self, diff_id: str) -> int:
        """How many reads of a layer failed since the snapshotter started."""
        try:
            return (self._faults / hex_of(diff_id)).stat().st_size
        except FileNotFoundError:
            return 0

    async def _start(self) -> None:
        mountpoint = self._directory / str(len(self._mountpoints))
        mountpoint.mkdir(parents=True, exist_ok=True)
        ready, child_end = os.pipe()
        argv = [sys.executable, "-m", "afs.snapshotter.fused", f"--mountpoint={mountpoint}"]
        argv += [
            f"--faults={self._faults}",
            f"--fill-socket={self._fill_socket}",
            f"--deadline={self._deadline}",
            f"--ready-fd={child_end}",
        ]
        try:
            process = popen(argv, pass_fds=[child_end], new_session=True)
        finally:
            os.close(child_end)
        try:
            # EOF without a byte means that it died.
            if not await asyncio.to_thread(os.read, ready, 1):
                raise Internal(f"afs_fused did not start: status {process.wait()}")
        finally:
            os.close(ready)
        self._process = process
        self._mountpoints.append(mountpoint)

    async def close(self) -> None:
        """Unmount and end the process; call it when no EROFS mount uses it any more."""
        for mountpoint in reversed(self._mountpoints):
            await asyncio.to_thread(unmount, str(mountpoint))
        if self._process is not None:
            await stop(self._process, 5.0)
        for mountpoint in self._mountpoints:
            mountpoint.rmdir()
        self._mountpoints.clear()
