"""How fast a command's output comes, and what memory that takes."""

from __future__ import annotations

import asyncio
import resource
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from tests.testbed.cluster import cluster
from tests.testbed.registry import Registry

from afs.client import AfsClient, Log
from benchmarks import measure, subjects

if TYPE_CHECKING:
    from collections.abc import Mapping

SAMPLES = 5
SIZE_MIB = 500
COMMAND = ("dd", "if=/dev/zero", "bs=1M", f"count={SIZE_MIB}")


def run(name: str, samples: int | None) -> measure.Report:
    """`dd` to stdout, through the proxy; the client throws it away."""
    with ExitStack() as stack:
        registry = stack.enter_context(Registry())
        reference = subjects.image(name).push(registry)
        running = stack.enter_context(cluster(1))
        pids = {process.name: process.popen.pid for process in running.cluster.processes()}
        rates, memory = asyncio.run(_measure(running.proxy, reference, samples or SAMPLES, pids))
    series = [measure.Series("stdout", "MiB/s", rates)]
    series += [measure.Series(f"VmHWM of {process}", "MiB", [peak]) for process, peak in memory.items()]
    targets = [
        measure.Target("stdout", series[0].median, 150.0, "MiB/s", least=True),
        measure.Target("VmHWM of each process", max(memory.values()), 150.0, "MiB"),
    ]
    return measure.Report(f"output-{name}", f"{SIZE_MIB} MiB of output", series, targets)


async def _measure(
    address: str, reference: str, samples: int, pids: Mapping[str, int]
) -> tuple[list[float], dict[str, float]]:
    rates = []
    async with AfsClient(address) as client:
        for number in range(-1, samples):
            started, size = time.perf_counter(), 0
            async for event in client.execute(reference, COMMAND, memory_mb=64):
                if isinstance(event, Log) and event.source == "stdout":
                    size += len(event.data)
            assert size == SIZE_MIB << 20, size
            if number >= 0:
                rates.append(SIZE_MIB / (time.perf_counter() - started))
    memory = {name: _peak(pid) for name, pid in pids.items()}
    return rates, memory | {"client": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def _peak(pid: int) -> float:
    """MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024
