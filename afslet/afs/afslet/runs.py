"""The runs that are under way on this node, and what the node tells about itself.

State, on one event loop: a :class:`Run` belongs to the task that serves it; others may read it and :meth:`Run.end` it.
:class:`Runs` has them all, from the start request until everything was given back.
"""

import asyncio
import logging
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass, field

from afs.afslet.admission import Admission, Capacity, Reservation
from afs.afslet.requests import Resources, image_hash
from afs.core.errors import AfsError, Cancelled, NotFound, Unavailable
from afs.proto.v1 import afslet_pb2 as pb
from afs.proto.v1 import runs_pb2

log = logging.getLogger(__name__)
QUEUED, PREPARING, RUNNING, DIFF = "queued", "preparing", "running", "diff"  # phases of a run
_IMAGES = 256  # how many images are remembered


@dataclass(slots=True, eq=False)
class Run:
    """One run. *wanted* and *pids* are what it gets, the node's defaults filled in; *owner* is who holds the lease."""

    start: pb.StartRequest
    owner: str
    wanted: Resources
    pids: int
    run_id: str = field(default_factory=lambda: secrets.token_hex(8))
    phase: str = QUEUED
    began: float = field(default_factory=time.time)
    queue_us: int = 0
    accepted: bool = False
    reservation: Reservation | None = None
    task: "asyncio.Task[None] | None" = None
    ending: AfsError | None = None

    def release(self) -> None:
        """Give back what was reserved; once is enough."""
        if self.reservation is not None:
            self.reservation.release()

    def end(self, error: AfsError) -> None:
        """Have it end early, as if its client had gone; its call ends with *error*.

        The first one counts: a second cancellation of the task would interrupt what clears up after the first.
        """
        if self.ending is None and self.task is not None and not self.task.done():
            self.ending = error
            self.task.cancel()

    def message(self, node_id: str) -> runs_pb2.Run:
        """What a list of runs shows of it."""
        start = self.start
        separator = "@" if ":" in start.tag else ":"
        return runs_pb2.Run(
            run_id=self.run_id,
            node_id=node_id,
            image=f"{start.image}{separator}{start.tag}" if start.tag else start.image,
            command=start.command,
            tenant=start.tenant,
            owner=self.owner,
            phase=self.phase,
            started_unix_ms=int(self.began * 1000),
            cpu_millis=self.wanted.cpu_millis,
            memory_mb=self.wanted.memory_mb,
            labels=start.labels,
        )


class Runs:
    """See the module. *max_queued* runs wait for room at most."""

    def __init__(self, node_id: str, limit: Capacity, max_queued: int = 0) -> None:
        self.node_id = node_id
        self.admission = Admission(limit, max_queued, self.notify)
        self.draining = False
        self._runs: dict[str, Run] = {}
        self._images: OrderedDict[int, None] = OrderedDict()
        self._idle = asyncio.Event()
        self._idle.set()
        self._change = asyncio.Event()  # replaced after each change, so every waiter sees it
        self._status: pb.GetRuntimeStatusResponse | None = None  # until the next change

    def add(self, start: pb.StartRequest, owner: str) -> Run:
        """A new run; InvalidArgument if it never fits here."""
        run = Run(start, owner, self.admission.limit.wanted(start), start.pids_limit or self.admission.limit.run_pids)
        self._runs[run.run_id] = run
        self._idle.clear()
        return run

    def remove(self, run: Run) -> None:
        """It has ended, and given back what it took."""
        run.release()
        del self._runs[run.run_id]
        if not self._runs:
            self._idle.set()

    def accept(self, run: Run) -> None:
        """It has its reservation: its image is likely to be wanted again."""
        wanted = image_hash(run.start)
        self._images[wanted] = None
        self._images.move_to_end(wanted)
        if len(self._images) > _IMAGES:
            self._images.popitem(last=False)
        self.notify()

    def all(self) -> list[Run]:
        """What is under way, oldest first."""
        return list(self._runs.values())

    def cancel(self, run_id: str, reason: str) -> None:
        """End a run for its user; NotFound if it is not under way."""
        run = self._runs.get(run_id)
        if run is None:
            raise NotFound(f"run {run_id!r} is not under way on node {self.node_id}")
        run.end(Cancelled(f"run {run_id} was cancelled{f': {reason}' if reason else ''}"))

    def drain(self) -> None:
        """Take no more runs. Those that wait have to go elsewhere, those under way are not touched."""
        if not self.draining:
            self.draining = True
            log.info("draining: %d runs are under way", self.admission.running)
            self.admission.refuse(f"node {self.node_id} is draining")

    def resume(self) -> None:
        """Take runs again."""
        if self.draining:
            self.draining = False
            log.info("taking runs again")
            self.admission.refuse("")

    async def end_all(self, timeout_s: float, hurry: asyncio.Event) -> None:
        """Take no more runs, wait for those under way, but after *timeout_s* or *hurry* end them; then nothing is left."""
        self.drain()
        hurried = asyncio.create_task(hurry.wait(), name="hurry")
        idle = asyncio.create_task(self._idle.wait(), name="idle")
        try:
            await asyncio.wait([hurried, idle], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if left := self.all():
                log.warning("ending %d runs that are still under way", len(left))
            for run in left:
                run.end(Unavailable(f"node {self.node_id} is stopping"))
            await idle
        finally:
            hurried.cancel()
            idle.cancel()

    async def changed(self, since: pb.GetRuntimeStatusResponse, timeout_s: float) -> None:
        """Wait until the status is another one than *since*, at most *timeout_s*."""
        if self._status is since:
            waiting = self._change
            try:
                async with asyncio.timeout(timeout_s):
                    await waiting.wait()
            except TimeoutError:
                return

    def notify(self) -> None:
        """The status has changed: wake who waits for that."""
        self._status = None
        change, self._change = self._change, asyncio.Event()
        change.set()

    def status(self) -> pb.GetRuntimeStatusResponse:
        """The node's status; the same object until it changes."""
        if self._status is None:
            admission = self.admission
            limit, used, free = admission.limit, admission.used, admission.available
            self._status = pb.GetRuntimeStatusResponse(
                running_containers=admission.running,
                limit_cpu_cores=limit.cpu_millis // 1000,
                limit_memory_mb=limit.memory_mb,
                used_cpu_cores=-(-used.cpu_millis // 1000),
                used_memory_mb=used.memory_mb,
                available_cpu_cores=free.cpu_millis // 1000,
                available_memory_mb=free.memory_mb,
                node_id=self.node_id,
                limit_cpu_millis=limit.cpu_millis,
                used_cpu_millis=used.cpu_millis,
                limit_disk_mb=limit.disk_mb,
                used_disk_mb=used.disk_mb,
                limit_runs=limit.runs,
                queued_runs=admission.queued,
                draining=self.draining,
                images=self._images,
                run_disk_mb=limit.run_disk_mb,
            )
        return self._status
