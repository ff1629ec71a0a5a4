"""The pool of ``afs_fused`` processes: starting, finding, watching and ending them.

A worker has a number, and in the pool's directory: ``<n>``, its mount point; ``<n>.lock``, flocked as long as it lives;
``<n>.sock``, its control socket (:mod:`afs.snapshotter.fusedwire`). The lock is taken before the process is started, which
inherits it, so a number has at no time two workers. Numbers ascend: names that lead into an old worker's file system, such
as the sources of mounts, never lead into a new one's. For that the last lock file stays until the pool is closed.

Workers outlive the snapshotter when it is killed: what is mounted on them goes on. :meth:`FusedWorkers.adopt` finds them.

State, on one event loop: ``_workers`` are the living ones by number. A process's end makes its pidfd readable, the loop
calls :meth:`FusedWorkers._end`, and that starts another one. ``_starting`` guards starts: at most ``count`` usable workers,
and each number is given away once.
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import select
import signal
import sys
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from afs.core.digests import hex_of
from afs.core.errors import AfsError, Internal, Unavailable
from afs.core.files import remove_tree
from afs.core.mounts import unmount
from afs.core.run import DEVNULL, Child, popen
from afs.snapshotter.fusedwire import PROTOCOL, ReadStats, ask

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)
_ANSWER_S = 5.0  # for what a worker says without asking anybody
_START_S = 20.0  # for a worker that was being started when its snapshotter was killed
# What the kernel reads ahead of readers of the FUSE mount; its default is 128. Importing numpy and pandas from partial layers
# of 1.3 GB, with EROFS on the files and with trees, touches 160 and 144 chunks with 128, 167 and 150 with 512, 173 and 151
# with 1024; reading a layer of 122 MB from end to end takes 935, 235 and 120 requests, and 0.35, 0.07 and 0.08 s of CPU.
_READ_AHEAD_KIB = 512
_GRACE_S = 5.0  # between SIGTERM and SIGKILL


class Worker:
    """One living ``afs_fused``. ``died`` is set when its process has ended, whatever ended it."""

    def __init__(self, directory: Path, number: int, pid: int, *, child: Child | None, usable: bool) -> None:
        self.number = number
        self.pid = pid
        self.usable = usable
        self.died = asyncio.Event()
        self.mountpoint = directory / str(number)
        self.socket = directory / f"{number}.sock"
        self.child = child
        self.layers: Counter[str] = Counter()  # what it was given to serve, and is not released yet
        self._pidfd = os.pidfd_open(pid)

    def file(self, diff_id: str) -> Path:
        """The layer as one read-only file."""
        return self.mountpoint / "f" / hex_of(diff_id)

    def tree(self, diff_id: str, *, user_xattrs: bool = False) -> Path:
        """The layer's tree; *user_xattrs*: with overlayfs's marks as those mounted with ``userxattr`` read them."""
        return self.mountpoint / ("u" if user_xattrs else "t") / hex_of(diff_id)

    @property
    def alive(self) -> bool:
        """Whether its process runs; asks the kernel, for the loop may not have come to notice its end yet."""
        if self.died.is_set():
            return False
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return not poll.poll(0)

    async def release(self, diff_id: str) -> None:
        """A mount that :meth:`FusedWorkers.place` gave this worker for is gone: the layer's files may be closed."""
        self.layers[diff_id] -= 1
        if self.layers[diff_id] > 0:
            return
        del self.layers[diff_id]
        if not self.alive or not self.usable:
            return
        try:
            await ask(self.socket, _ANSWER_S, op="release", diff_id=diff_id)
        except Unavailable as error:  # nothing is lost: it closes them when the kernel forgets the layer
            log.warning("%s", error.line)

    def watch(self, ended: "Callable[[Worker], None]") -> None:
        """Call *ended* when the process has ended."""
        asyncio.get_running_loop().add_reader(self._pidfd, ended, self)

    def forget(self) -> None:
        """Watch it no more; the process goes on."""
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)

    def end(self) -> str:
        """Note that the process has ended; its status for people, "unknown" if it was not our child."""
        self.forget()
        self.died.set()
        return "unknown" if self.child is None else str(self.child.wait())

    def signal(self, signum: int) -> None:
        """Send *signum*; nothing happens if the process has ended."""
        if not self.died.is_set():  # else the pidfd is closed, and its number perhaps another file's
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signum)


class FusedWorkers:
    """Owns *directory* and *faults*, where workers mark failed reads. *count* workers share the mounts.

    *deadline* is how many seconds a read waits for the layerstore at *fill_socket*; workers that were adopted keep theirs.
    """

    def __init__(self, directory: Path, faults: Path, fill_socket: Path, deadline: float, count: int = 2) -> None:
        self._directory = directory
        self._faults = faults
        self._fill_socket = fill_socket
        self._deadline = deadline
        self._count = count
        self._workers: dict[int, Worker] = {}
        self._next = 0
        self._starting = asyncio.Lock()
        self._replacing: set[asyncio.Task[None]] = set()
        self._closing = False
        self.deaths = 0

    async def adopt(self) -> None:
        """Take over the living workers of an earlier snapshotter, clear up after dead ones, start those that lack.

        A worker that speaks another protocol, or does not answer, serves what it serves and ends with that.
        """
        for directory in (self._directory, self._faults):
            directory.mkdir(parents=True, exist_ok=True)
            directory.chmod(0o700)  # all images of the node
        for mark in self._faults.iterdir():
            mark.unlink()
        numbers = _numbers(self._directory)
        self._next = max(numbers, default=-1) + 1
        await asyncio.gather(*(self._find(number) for number in numbers))
        async with self._starting:
            await asyncio.gather(*(self._start() for _ in range(self._count - len(self._usable()))))

    async def _find(self, number: int) -> None:
        try:
            worker = await self._ask_for(number)
        except AfsError as error:
            log.error("leaving a worker alone: %s", error.line)
            await asyncio.to_thread(unmount, str(self._directory / str(number)))
            return
        if worker is None:
            await asyncio.to_thread(_clear, self._directory, number, keep_lock=number == self._next - 1)
            return
        self._workers[number] = worker
        worker.watch(self._end)
        if worker.usable:
            log.info("adopted afs_fused %d (pid %d) with %d layers", number, worker.pid, len(worker.layers))
        else:
            log.warning("afs_fused %d (pid %d) is of another version: no new mounts on it", number, worker.pid)
            await asyncio.to_thread(unmount, str(worker.mountpoint))

    async def _ask_for(self, number: int) -> Worker | None:
        """The living worker *number*, or None if it is dead; Unavailable if it does not say who it is."""
        lock = self._directory / f"{number}.lock"
        deadline = asyncio.get_running_loop().time() + _START_S
        while _is_held(lock):
            try:
                hello = await ask(self._directory / f"{number}.sock", _ANSWER_S, op="hello")
                worker = Worker(self._directory, number, hello["pid"], child=None, usable=hello["protocol"] == PROTOCOL)
            except (Unavailable, ProcessLookupError):
                if asyncio.get_running_loop().time() > deadline:
                    raise
                await asyncio.sleep(0.05)  # it may be starting: there is nothing that tells when it has a socket
                continue
            if _is_held(lock):  # so the pid was still its own when the pidfd was made
                worker.layers.update(hello["layers"])
                return worker
            worker.forget()
        return None

    @property
    def workers(self) -> list[Worker]:
        """The living workers, by number."""
        return [self._workers[number] for number in sorted(self._workers)]

    def find(self, number: int) -> Worker | None:
        """The living worker with that number, whose layers are mounted from ``afs/<number>`` or its directory."""
        return self._workers.get(number)

    async def place(self, diff_id: str) -> Worker:
        """The worker for a new mount of a layer: of the living ones the one with the fewest; Internal if none starts.

        Whoever mounts calls :meth:`Worker.release` when the mount is gone.
        """
        worker = self._least_loaded()
        if worker is None:
            async with self._starting:
                worker = self._least_loaded() or await self._start()
        worker.layers[diff_id] += 1
        return worker

    def _usable(self) -> list[Worker]:
        return [worker for worker in self._workers.values() if worker.usable and worker.alive]

    def _least_loaded(self) -> Worker | None:
        return min(self._usable(), key=lambda worker: len(worker.layers), default=None)

    def faults(self, diff_id: str) -> int:
        """How many reads of a layer failed since the snapshotter started."""
        try:
            return (self._faults / hex_of(diff_id)).stat().st_size
        except FileNotFoundError:
            return 0

    async def stats(self) -> dict[str, ReadStats]:
        """What reads came to, by diff_id, over the living workers."""
        asked = [worker for worker in self._workers.values() if worker.usable]
        answers = await asyncio.gather(
            *(ask(worker.socket, _ANSWER_S, op="stats") for worker in asked), return_exceptions=True
        )
        merged: dict[str, ReadStats] = {}
        for answer in answers:
            if isinstance(answer, Unavailable):  # it may have died meanwhile
                log.warning("%s", answer.line)
                continue
            if isinstance(answer, BaseException):
                raise answer
            for diff_id, counted in answer["layers"].items():
                merged.setdefault(diff_id, ReadStats()).add(ReadStats(**counted))
        return merged

    async def _start(self) -> Worker:
        """Start a worker; the caller holds ``_starting``."""
        number, self._next = self._next, self._next + 1
        mountpoint = self._directory / str(number)
        mountpoint.mkdir(parents=True, exist_ok=True)
        lock = os.open(self._directory / f"{number}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        ready, child_end = os.pipe()
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            argv = [sys.executable, "-m", "afs.snapshotter.fused", f"--directory={self._directory}"]
            argv += [f"--number={number}", f"--lock-fd={lock}", f"--ready-fd={child_end}", f"--faults={self._faults}"]
            argv += [f"--fill-socket={self._fill_socket}", f"--deadline={self._deadline}"]
            # It outlives us: whoever waits for the end of our stdout must not wait for its.
            process = popen(argv, stdout=DEVNULL, pass_fds=[lock, child_end], new_session=True)
        except BaseException:
            os.close(ready)
            raise
        finally:
            os.close(lock)  # the process has it
            os.close(child_end)
        try:
            await _started(ready, process)
        except BaseException:
            process.kill()
            process.wait()
            await asyncio.to_thread(_clear, self._directory, number, keep_lock=True)
            raise
        finally:
            os.close(ready)
        worker = self._workers[number] = Worker(self._directory, number, process.pid, child=process, usable=True)
        worker.watch(self._end)
        await asyncio.to_thread(_set_read_ahead, worker.mountpoint)
        return worker

    def _end(self, worker: Worker) -> None:
        status = worker.end()
        del self._workers[worker.number]
        if self._closing or not worker.usable:  # it ends with its last mount, which may be gone before release()
            log.info("afs_fused %d (pid %d) ended with status %s", worker.number, worker.pid, status)
            return
        self.deaths += 1
        served = f"{len(worker.layers)} layers were mounted on it"
        log.error("afs_fused %d (pid %d) died with status %s; %s", worker.number, worker.pid, status, served)
        task = asyncio.create_task(self._replace(worker), name=f"replace afs_fused {worker.number}")
        self._replacing.add(task)
        task.add_done_callback(self._replacing.discard)

    async def _replace(self, dead: Worker) -> None:
        await asyncio.to_thread(_clear, self._directory, dead.number, keep_lock=dead.number == self._next - 1)
        try:
            async with self._starting:
                if len(self._usable()) < self._count:
                    await self._start()
        except (AfsError, OSError) as error:  # the next mount tries again, and tells its caller
            log.error("cannot replace a worker: %s", error)

    async def close(self, keep: Collection[Worker] = ()) -> None:
        """End all workers but *keep*; call it when no mount uses them any more."""
        self._closing = True
        for task in self._replacing:
            task.cancel()
        await asyncio.gather(*self._replacing, return_exceptions=True)
        ending = [worker for worker in self._workers.values() if worker not in keep]
        await asyncio.gather(*(self._stop(worker) for worker in ending))
        for worker in keep:
            if self._workers.pop(worker.number, None) is not None:
                worker.forget()
        await asyncio.to_thread(_clear_dead, self._directory)
        if not keep:
            await asyncio.to_thread(remove_tree, self._faults)

    async def _stop(self, worker: Worker) -> None:
        await asyncio.to_thread(unmount, str(worker.mountpoint))
        # Without it too it would end, unless a mount namespace made meanwhile has a copy of the mount.
        worker.signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(worker.died.wait(), _GRACE_S)
        except TimeoutError:
            log.warning("afs_fused %d (pid %d) ignores SIGTERM: killing it", worker.number, worker.pid)
            worker.signal(signal.SIGKILL)
            await worker.died.wait()


async def _started(ready: int, process: Child) -> None:
    """Wait until *process* says so through the pipe *ready*; Internal if it died before."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(ready, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(ready)
    if not os.read(ready, 1):  # EOF without a byte: it died
        raise Internal(f"afs_fused did not start: status {process.wait()}")


def _set_read_ahead(mountpoint: Path) -> None:
    """Blocking: it asks the worker."""
    try:
        device = mountpoint.stat().st_dev
        setting = f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb"
        Path(setting).write_text(str(_READ_AHEAD_KIB))
    except OSError as error:  # /sys may be read-only, as in containers; or the worker has died, which is told elsewhere
        log.warning("%s keeps the kernel's read-ahead: %s", mountpoint, error)


def _is_held(lock: Path) -> bool:
    """Whether a living process has *lock*."""
    try:
        fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _numbers(directory: Path) -> list[int]:
    """Those that have been given away, as far as anything of theirs is left."""
    if not directory.exists():  # no worker was ever needed
        return []
    return sorted({int(path.stem) for path in directory.iterdir() if path.stem.isdecimal()})


def _clear_dead(directory: Path) -> None:
    """Remove what dead workers left; their lock files too if none lives, so that the next pool begins at 0. Blocking."""
    dead = [number for number in _numbers(directory) if not _is_held(directory / f"{number}.lock")]
    last = len(dead) == len(_numbers(directory))
    for number in dead:
        _clear(directory, number, keep_lock=not last)


def _clear(directory: Path, number: int, *, keep_lock: bool) -> None:
    """Remove what a dead worker left. Blocking."""
    mountpoint = directory / str(number)
    unmount(str(mountpoint))
    with contextlib.suppress(FileNotFoundError):
        mountpoint.rmdir()
    (directory / f"{number}.sock").unlink(missing_ok=True)
    if not keep_lock:
        (directory / f"{number}.lock").unlink(missing_ok=True)
