"""Resident memory of each service, before and after it had to do with a big image."""

from __future__ import annotations

import os
import re
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from tests.testbed.cluster import cluster
from tests.testbed.registry import Registry

from benchmarks import measure, subjects

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.testbed.cluster import RealCluster

SAMPLES = 4
LIMIT_MIB = 80.0
_QUIET_S, _QUIET_SHARE, _PATIENCE_S = 2.0, 0.05, 60.0
_FIELDS = {"resident": ("status", "VmRSS"), "share": ("smaps_rollup", "Pss"), "peak": ("status", "VmHWM")}
_STATES = {"started": ("resident", "share"), "after": ("resident", "share", "peak")}


def run(name: str, samples: int | None) -> measure.Report:
    """Measure with the image *name*; every sample is a new cluster of two nodes, so services of nodes give two figures."""
    image = subjects.image(name)
    work = list(image.commands.values())[-1]
    found: dict[str, list[float]] = defaultdict(list)
    with Registry() as registry:
        reference = image.push(registry)
        for _ in range(samples or SAMPLES):
            with cluster(2) as running, subjects.connected(running.proxy) as client:
                _read(running, "started", found)
                for node in running.nodes:
                    client.run(reference, work, node=node.node_id)
                running.assert_idle()
                _wait_until_quiet(running)
                _read(running, "after", found)
    series = [measure.Series(label, "MiB", found[label]) for label in sorted(found)]
    targets = [
        measure.Target(f"{each.name}, the most", max(each.samples), LIMIT_MIB, "MiB")
        for each in series
        if each.name.endswith("resident")
    ]
    return measure.Report(f"memory-{name}", f"Memory of the services around a run of {name}", series, targets)


def _processes(running: RealCluster) -> Iterator[tuple[int, str]]:
    """Every service and its children, which are services too, as (pid, name)."""
    for process in running.cluster.processes():
        yield process.popen.pid, process.name.rpartition("-")[2]
        for task in Path("/proc", str(process.popen.pid), "task").iterdir():
            for child in (task / "children").read_text().split():
                argv = Path("/proc", child, "cmdline").read_text().split("\0")
                yield int(child), next((arg for arg in argv if arg.startswith("afs.")), argv[0]).rpartition(".")[2]


def _read(running: RealCluster, state: str, found: dict[str, list[float]]) -> None:
    for pid, name in _processes(running):
        for field in _STATES[state]:
            file, key = _FIELDS[field]
            match = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc", str(pid), file).read_text(), re.MULTILINE)
            assert match is not None, f"no {key} in {file} of {name}"
            found[f"{name}: {state}, {field}"].append(int(match.group(1)) / 1024)


def _cpu_seconds(running: RealCluster) -> float:
    ticks = 0
    for pid, _ in _processes(running):
        after_name = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
        ticks += int(after_name[11]) + int(after_name[12])  # utime and stime of proc(5)
    return ticks / os.sysconf("SC_CLK_TCK")


def _wait_until_quiet(running: RealCluster) -> None:
    """Until what the services do in the background has ended: it has no event for us, but it takes CPU time."""
    deadline = time.monotonic() + _PATIENCE_S
    before = _cpu_seconds(running)
    while time.monotonic() < deadline:
        time.sleep(_QUIET_S)
        now = _cpu_seconds(running)
        if now - before < _QUIET_S * _QUIET_SHARE * len(running.nodes):
            return
        before = now
    raise RuntimeError(f"the services are still busy after {_PATIENCE_S:.0f} s")
