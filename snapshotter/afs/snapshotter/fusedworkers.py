"""The pool of ``afs_fused`` processes: starting, finding, watching and ending them.

A worker has a number, and in the pool's directory: ``<n>``, its mount point; ``<n>.lock``, flocked as long as it lives;
``<n>.sock``, its control socket (:mod:`afs.snapshotter.fusedwire`). The lock is taken before the process is started, which
inherits it, so a number has at no time two workers. Numbers ascend: names that lead into an old worker's file system, such
as the sources of mounts, never lead into a new one's. For that the last lock file stays until the pool is closed, and
longer while mounts are left, were they of dead workers only.

Workers outlive the snapshotter when it is killed: what is mounted on them goes on. :meth:`FusedWorkers.adopt` finds them.

State, on one event loop: ``_workers`` are the living ones by number. A process's end makes its pidfd readable, the loop
calls :meth:`FusedWorkers._end`, and that starts another one. ``_starting`` guards starts: at most ``count`` usable workers,
and each number is given away once.
"""

import asyncio
import fcntl
import logging
import os
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
from afs.snapshotter.fusedtuning import tune
from afs.snapshotter.fusedwire import PROTOCOL, ReadStats, ask
from afs.snapshotter.fusedworker import Worker, clear_dead, clear_number, is_held, numbers

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Any

log = logging.getLogger(__name__)
_ANSWER_S = 5.0  # for what a worker says without asking anybody
_START_S = 20.0  # for a worker that was being started when its snapshotter was killed
_READY_S = 60.0  # for one that we start, on a machine with much else to do
_STABLE_S = 60.0  # one that lived so long does not die because it was started
_LONGEST_PAUSE_S = 64.0  # before the next of a row that all died soon
_GRACE_S = 5.0  # between SIGTERM and SIGKILL


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
        given = numbers(self._directory)
        self._next = max(given, default=-1) + 1
        await asyncio.gather(*(self._find(number) for number in given))
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
            await asyncio.to_thread(clear_number, self._directory, number, keep_lock=number == self._next - 1)
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
        while is_held(lock):
            try:
                worker = await self._greet(number)
            except Unavailable:
                if asyncio.get_running_loop().time() > deadline:
                    raise
                await asyncio.sleep(0.05)  # it may be starting: there is nothing that tells when it has a socket
                continue
            if is_held(lock):  # so the pid was still its own when the pidfd was made
                return worker
            worker.forget()
        return None

    async def _greet(self, number: int) -> Worker:
        """The worker that answers on the socket of *number*; Unavailable if none does, or not as a worker would."""
        hello = await ask(self._directory / f"{number}.sock", _ANSWER_S, op="hello")
        try:
            layers = Counter[str](hello["layers"])
            worker = Worker(self._directory, number, hello["pid"], child=None, usable=hello["protocol"] == PROTOCOL)
        except (
            LookupError,
            TypeError,
            ValueError,
            OverflowError,
            OSError,
        ) as error:  # of all versions, or there is no such process
            raise Unavailable(f"afs_fused {number} said {hello}: {error!r}") from error
        worker.layers = layers
        return worker

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
        for usable in self._usable():
            if not usable.in_place:
                self._give_up(usable)
        worker = self._least_loaded()
        if worker is None:
            async with self._starting:
                worker = self._least_loaded() or await self._start()
        worker.layers[diff_id] += 1
        return worker

    def _usable(self) -> list[Worker]:
        return [worker for worker in self._workers.values() if worker.usable and not worker.unmounted and worker.alive]

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

    async def _start(self, row: int = 0) -> Worker:
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
            await asyncio.to_thread(clear_number, self._directory, number, keep_lock=True)
            raise
        finally:
            os.close(ready)
        worker = self._workers[number] = Worker(self._directory, number, process.pid, child=process, usable=True)
        worker.row = row
        worker.watch(self._end)
        await asyncio.to_thread(tune, worker.mountpoint)
        return worker

    def _give_up(self, worker: Worker) -> None:
        """Somebody unmounted it: what is mounted through it goes on, and it ends with that. Another one takes its place."""
        if worker.alive:  # else the unmounting is the end of a dead one
            worker.unmounted = True
            log.error("afs_fused %d (pid %d) was unmounted by somebody: starting another", worker.number, worker.pid)
            self._in_background(self._fill_up(), worker)

    def _end(self, worker: Worker) -> None:
        status = worker.end()
        del self._workers[worker.number]
        # One that nobody mounts on ends with its last mount, which may be gone before release().
        if self._closing or not worker.usable or worker.unmounted:
            log.info("afs_fused %d (pid %d) ended with status %s", worker.number, worker.pid, status)
            if worker.unmounted and not self._closing:
                self._in_background(self._clear(worker), worker)
            return
        self.deaths += 1
        served = f"{len(worker.layers)} layers were mounted on it"
        log.error("afs_fused %d (pid %d) died with status %s; %s", worker.number, worker.pid, status, served)
        self._in_background(self._replace(worker), worker)

    def _in_background(self, work: "Coroutine[Any, Any, None]", worker: Worker) -> None:
        task = asyncio.create_task(work, name=f"replace afs_fused {worker.number}")
        self._replacing.add(task)
        task.add_done_callback(self._replacing.discard)

    async def _clear(self, dead: Worker) -> None:
        await asyncio.to_thread(clear_number, self._directory, dead.number, keep_lock=dead.number == self._next - 1)

    async def _replace(self, dead: Worker) -> None:
        await self._clear(dead)
        lived_s = asyncio.get_running_loop().time() - dead.since
        row = dead.row + 1 if lived_s < _STABLE_S else 0
        await asyncio.sleep(_pause_s(row))
        await self._fill_up(row)

    async def _fill_up(self, row: int = 0) -> None:
        try:
            async with self._starting:
                if len(self._usable()) < self._count:
                    await self._start(row)
        except (AfsError, OSError) as error:  # the next mount tries again, and tells its caller
            log.error("cannot replace a worker: %s", error)

    async def close(self, keep: Collection[Worker] = ()) -> None:
        """End all workers but *keep*, which are those that mounts are left of, dead or alive."""
        self._closing = True
        for task in self._replacing:
            task.cancel()
        await asyncio.gather(*self._replacing, return_exceptions=True)
        ending = [worker for worker in self._workers.values() if worker not in keep]
        await asyncio.gather(*(self._stop(worker) for worker in ending))
        for worker in keep:
            if self._workers.pop(worker.number, None) is not None:
                worker.forget()
        await asyncio.to_thread(clear_dead, self._directory, anew=not keep)
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


def _pause_s(row: int) -> float:
    """How long to wait before another is started after *row* that died soon: the first death may be an accident."""
    return 0.0 if row < 2 else min(2.0 ** min(row - 2, 10), _LONGEST_PAUSE_S)


async def _started(ready: int, process: Child) -> None:
    """Wait until *process* says so through the pipe *ready*; Internal if it died before, or is not ready in time."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(ready, readable.set)
    try:
        async with asyncio.timeout(_READY_S):
            await readable.wait()
    except TimeoutError:
        raise Internal(f"afs_fused did not start within {_READY_S:g} s") from None
    finally:
        loop.remove_reader(ready)
    if not os.read(ready, 1):  # EOF without a byte: it died
        raise Internal(f"afs_fused did not start: status {process.wait()}")
