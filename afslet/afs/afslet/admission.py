"""What a node has to give, and what of it is taken. One event loop, no await between check and reservation: no lock."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from afs.core.errors import InvalidArgument, ResourceExhausted


@dataclass(frozen=True, slots=True)
class Capacity:
    """CPU in cores, memory in MiB."""

    cpus: float
    memory_mb: int


class Admission:
    """Reservations against *limit*."""

    def __init__(self, limit: Capacity) -> None:
        self.limit = limit
        self.used = Capacity(0, 0)
        self.running = 0

    @property
    def available(self) -> Capacity:
        """What is free now."""
        return Capacity(self.limit.cpus - self.used.cpus, self.limit.memory_mb - self.used.memory_mb)

    @contextlib.contextmanager
    def reserve(self, cpus: float, memory_mb: int) -> Iterator[None]:
        """Hold the reservation while the block runs.

        InvalidArgument if the node could never give it, ResourceExhausted if it cannot now.
        """
        if cpus > self.limit.cpus or memory_mb > self.limit.memory_mb:
            limit = f"{self.limit.cpus} CPUs and {self.limit.memory_mb} MiB"
            raise InvalidArgument(f"{cpus} CPUs and {memory_mb} MiB asked for, but this node has {limit}")
        free = self.available
        if cpus > free.cpus or memory_mb > free.memory_mb:
            raise ResourceExhausted(
                f"{cpus} CPUs and {memory_mb} MiB asked for, but {free.cpus} CPUs and {free.memory_mb} MiB are free"
            )
        self.used = Capacity(self.used.cpus + cpus, self.used.memory_mb + memory_mb)
        self.running += 1
        try:
            yield
        finally:
            self.used = Capacity(self.used.cpus - cpus, self.used.memory_mb - memory_mb)
            self.running -= 1
