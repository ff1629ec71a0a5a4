"""One afslet as the proxy sees it: what it reported last, what this proxy placed on it, and what is free by both.

The node itself admits; this is an estimate that has to be good enough not to be refused. Two things are known: what the
node reported, which is late, and what this proxy has under way on it, which is exact but knows nothing of other proxies.
``free`` is the lesser of limit - own runs, and what was reported as free less the own runs begun since, plus those ended.
"""

from dataclasses import dataclass, field, replace

import grpc.aio

from afs.afslet.requests import Resources
from afs.proto.v1 import afslet_pb2 as pb

_UNLIMITED = 1 << 62


@dataclass(slots=True)
class Room:
    """CPU in thousandths of a core, memory and disk in MiB, and how many runs."""

    cpu_millis: int = 0
    memory_mb: int = 0
    disk_mb: int = 0
    runs: int = 0

    def fits(self, wanted: Resources) -> bool:
        """Whether one more run that wants this fits into it."""
        return (
            self.cpu_millis >= wanted.cpu_millis
            and self.memory_mb >= wanted.memory_mb
            and self.disk_mb >= wanted.disk_mb
            and self.runs >= 1
        )

    def add(self, wanted: Resources, sign: int) -> None:
        """Add (1) or subtract (-1) one run in place."""
        self.cpu_millis += sign * wanted.cpu_millis
        self.memory_mb += sign * wanted.memory_mb
        self.disk_mb += sign * wanted.disk_mb
        self.runs += sign

    def copy(self) -> "Room":
        """As it is now."""
        return Room(self.cpu_millis, self.memory_mb, self.disk_mb, self.runs)


@dataclass(slots=True, eq=False)
class Reservation:
    """A run that waits for a node to have room for it; *others* is what was placed there meanwhile and still runs."""

    wanted: Resources
    others: Room = field(default_factory=Room)


@dataclass(slots=True, eq=False)
class Placement:
    """A run's place on a node; *wanted* is what it takes there, *held* is the reservation that it had to leave room for."""

    node: "AfsletNode"
    wanted: Resources
    held: Reservation | None = None


@dataclass(slots=True, eq=False)
class AfsletNode:
    """One afslet. *error* says why it is not reachable; *gone*: DNS does not name it any more."""

    endpoint: str
    channel: grpc.aio.Channel
    reachable: bool = False
    error: str = "not asked yet"
    status: pb.GetRuntimeStatusResponse = field(default_factory=pb.GetRuntimeStatusResponse)
    images: frozenset[int] = frozenset()
    limit: Room = field(default_factory=Room)
    gone: bool = False
    refused: bool = False  # it had no room although it should have: nothing is free until it reports
    failures: int = 0  # offers in a row that it could not take, for other reasons than room
    avoided_until: float = 0.0
    reservation: Reservation | None = None
    mine: Room = field(default_factory=Room)
    _reported: Room = field(default_factory=Room)
    _mine_then: Room = field(default_factory=Room)

    @property
    def usable(self) -> bool:
        """Whether it takes runs at all."""
        return self.reachable and not self.gone and not self.status.draining

    def report(self, status: pb.GetRuntimeStatusResponse) -> None:
        """Take in what the node says about itself."""
        self.reachable, self.error, self.refused = True, "", False
        if status.images != self.status.images:
            self.images = frozenset(status.images)
        self.status = status
        cpus = status.limit_cpu_millis or status.limit_cpu_cores * 1000
        used = status.used_cpu_millis or status.used_cpu_cores * 1000
        self.limit = Room(
            cpus, status.limit_memory_mb, status.limit_disk_mb or _UNLIMITED, status.limit_runs or _UNLIMITED
        )
        self._reported = Room(
            cpus - used,
            status.limit_memory_mb - status.used_memory_mb,
            self.limit.disk_mb - status.used_disk_mb,
            self.limit.runs - status.running_containers,
        )
        self._mine_then = self.mine.copy()

    def needs(self, wanted: Resources) -> Resources:
        """What a run that wants this takes here: the node counts its default disk for one that asks for none."""
        if wanted.disk_mb or not self.status.run_disk_mb:
            return wanted
        return replace(wanted, disk_mb=self.status.run_disk_mb)

    def could_take(self, wanted: Resources) -> bool:
        """Whether the run would fit if nothing else ran here."""
        return self.limit.fits(self.needs(wanted))

    def has_room(self, wanted: Resources) -> bool:
        """Whether the run should fit now, whatever is reserved."""
        return self.free().fits(self.needs(wanted))

    def free(self) -> Room:
        """What should be free now."""
        if self.refused:
            return Room()
        limit, mine, then, said = self.limit, self.mine, self._mine_then, self._reported
        return Room(
            min(limit.cpu_millis - mine.cpu_millis, said.cpu_millis - mine.cpu_millis + then.cpu_millis),
            min(limit.memory_mb - mine.memory_mb, said.memory_mb - mine.memory_mb + then.memory_mb),
            min(limit.disk_mb - mine.disk_mb, said.disk_mb - mine.disk_mb + then.disk_mb),
            min(limit.runs - mine.runs, said.runs - mine.runs + then.runs),
        )

    def offered(self) -> tuple[object, ...]:
        """All that decides whether a run can be placed here."""
        return self.usable, self.status.node_id, self.status.run_disk_mb, self.limit, self.free()

    def open_to(self, wanted: Resources) -> bool:
        """Whether there is room for a run for which nothing was reserved."""
        wanted = self.needs(wanted)
        if not self.free().fits(wanted):
            return False
        if self.reservation is None:
            return True
        # What the reserved run leaves over may be used meanwhile; what runs there already gives way by ending.
        held, others = self.needs(self.reservation.wanted), self.reservation.others
        left = Room(
            self.limit.cpu_millis - held.cpu_millis - others.cpu_millis,
            self.limit.memory_mb - held.memory_mb - others.memory_mb,
            self.limit.disk_mb - held.disk_mb - others.disk_mb,
            self.limit.runs - 1 - others.runs,
        )
        return left.fits(wanted)

    def load(self) -> float:
        """How full the node is: the fullest of its resources, 0 to 1."""
        free, limit = self.free(), self.limit
        return 1 - min(
            free.cpu_millis / max(limit.cpu_millis, 1),
            free.memory_mb / max(limit.memory_mb, 1),
            free.disk_mb / limit.disk_mb,
            free.runs / limit.runs,
        )

    def take(self, wanted: Resources) -> Placement:
        """Place a run here."""
        wanted = self.needs(wanted)
        self.mine.add(wanted, 1)
        if self.reservation is not None:
            self.reservation.others.add(wanted, 1)
        return Placement(self, wanted, self.reservation)

    def give_back(self, placement: Placement) -> None:
        """The run of *placement* ended, or was refused."""
        self.mine.add(placement.wanted, -1)
        if placement.held is not None:
            placement.held.others.add(placement.wanted, -1)
