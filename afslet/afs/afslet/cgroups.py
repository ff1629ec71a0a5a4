"""The control group of one run: limits, what happened to them, and an end of every process in it.

AFS makes the group and its limits, the runtime only puts the container into it: a runtime that ends when the command has
started removes nothing, so the counters (peak memory, CPU time, OOM kills) are there after the command's end. (A group of
ours around one of the runtime's cost two more directories in each of v1's ten hierarchies.)

cgroup v1: Documentation/admin-guide/cgroup-v1/memory.rst; v2: cgroup-v2.rst. On a hybrid machine ("unified" beside v1)
the v1 controllers count, as for runc.
"""

import contextlib
import errno
import functools
import logging
import os
import re
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from afs.core.errors import FailedPrecondition

log = logging.getLogger(__name__)
CPU_PERIOD_US = 100_000


@dataclass(frozen=True, slots=True)
class Limits:
    """*cpus* may be a fraction; memory is in bytes, *swap* how much more may be on disk."""

    cpus: float
    memory: int
    pids: int
    swap: int = 0


@dataclass(frozen=True, slots=True)
class Counters:
    """*oom* tells whether the kernel killed for want of memory; peak in bytes, CPU time in microseconds.

    *machine_oom*: it did so, but not because of this group's limit: the machine, or a group around ours, had no memory left.
    """

    oom: bool
    peak_memory: int
    cpu_us: int
    machine_oom: bool = False


class Cgroup(Protocol):
    """The group of one run."""

    path: str  # what the runtime gets as cgroupsPath

    def counters(self) -> Counters:
        """Read after the command ended."""
        ...

    def pids(self) -> list[int]:
        """The processes in it."""
        ...

    def kill(self) -> bool:
        """SIGKILL every process in it; False if there was none."""
        ...

    def remove(self) -> None:
        """Remove the group; its processes must be dead."""
        ...


@functools.cache  # they are mounted at boot and stay; reading mountinfo was 4 % of a warm run's CPU in afslet
def hierarchies() -> dict[str, Path]:
    """Mount points by v1 controller; ``{"": path}`` on a machine with cgroup v2 only."""
    found: dict[str, Path] = {}
    unified = None
    with open("/proc/self/mountinfo", encoding="utf-8") as lines:
        for line in lines:
            before, _, after = line.partition(" - ")
            target = Path(before.split(" ")[4])
            fstype, _, options = after.split(" ")[:3]
            if fstype == "cgroup2":
                unified = target
            elif fstype == "cgroup":
                # Named hierarchies without a controller show name=systemd.
                for controller in options.strip().split(","):
                    if controller not in ("rw", "ro", "xattr", "clone_children"):
                        found[controller] = target
    if "memory" in found:
        # The bare v2 hierarchy gets the runtime's groups too, and has to be cleaned like the others.
        return found | ({"unified": unified} if unified else {})
    if unified is None:
        raise FailedPrecondition("no cgroup hierarchy with a memory controller is mounted")
    return {"": unified}


def open_cgroup(parent: str, name: str, limits: Limits) -> Cgroup:
    """Make the group ``/parent/name`` with *limits*."""
    mounts = hierarchies()
    return CgroupV2(mounts[""], parent, name, limits) if "" in mounts else CgroupV1(mounts, parent, name, limits)


def clean_up(parent: str, patience_s: float = 10.0) -> int:
    """Kill what is left in groups below ``/parent`` and remove them all; returns how many runs were left.

    Blocks until the processes are dead: OSError (EBUSY) if they are not after *patience_s* seconds, e.g. because a disk
    does not answer.
    """
    runs = 0
    deadline = time.monotonic() + patience_s
    for mount in set(hierarchies().values()):
        top = mount / parent
        if not top.is_dir():
            continue
        runs = max(runs, sum(1 for entry in top.iterdir() if entry.is_dir()))
        while True:
            alive = _kill_tree(str(top), f"/{parent}")
            try:
                if not alive:
                    _remove_tree(str(top))
                    break
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise
            if alive and time.monotonic() > deadline:
                raise OSError(errno.EBUSY, "processes do not die", str(top))
            time.sleep(0.001)
    return runs


# Plain strings and descriptors below: with pathlib, making and removing a group took twice as long, and a run does both.
def _write(path: str, value: object) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, f"{value}\n".encode("ascii"))
    finally:
        os.close(fd)


def _read(path: str) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 1 << 16).decode("ascii")
    finally:
        os.close(fd)


def _pids_below(top: str) -> Iterator[int]:
    try:
        if os.stat(top).st_nlink == 2:  # no directory below it: walking through the kernel's own files takes longer
            yield from _pids_in(top)
            return
    except FileNotFoundError:
        return
    for directory, _, _ in os.walk(top, topdown=False):
        yield from _pids_in(directory)


def _pids_in(directory: str) -> list[int]:
    try:
        with open(f"{directory}/cgroup.procs", encoding="ascii") as lines:
            return [pid for pid in map(int, lines) if pid]  # 0: of another pid namespace, not ours to see
    except OSError as error:
        # The runtime removed the group before it was opened, or (ENODEV) while it was read.
        if error.errno not in (errno.ENOENT, errno.ENODEV):
            raise
        return []


def signal_members(group: str, pids: Iterable[int], signum: int) -> bool:
    """Send *signum* to those of *pids* that are in *group* (``/parent/name``) or below it; False if there was none.

    Processes end and numbers are used again while a list of them is gone through, so each is held by a descriptor first and
    has to be in the group then.
    """
    found = False
    for pid in pids:
        try:
            fd = os.pidfd_open(pid)
        except OSError as error:
            if error.errno not in (errno.ESRCH, errno.EINVAL):  # EINVAL: not the leader of its threads
                raise
            continue
        try:
            if _is_member(pid, group):
                signal.pidfd_send_signal(fd, signum)
                found = True
        except ProcessLookupError:
            pass
        finally:
            os.close(fd)
    return found


def _is_member(pid: int, group: str) -> bool:
    try:
        with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="replace") as lines:
            return any(f"{group}/" in f"{line.rstrip()}/" for line in lines)
    except (FileNotFoundError, ProcessLookupError):
        return False


def _kill_tree(top: str, group: str) -> bool:
    return signal_members(group, list(_pids_below(top)), signal.SIGKILL)


def _remove_group(top: str) -> None:
    """Remove a run's group, which as a rule has nothing below it."""
    try:
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(top)
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.ENOTEMPTY):
            raise
        _remove_tree(top)


def _remove_tree(top: str) -> None:
    """rmdir the group and its children. EBUSY for a moment after the last process died is normal: zombies count.

    Raises it after a millisecond or so; callers that can wait try again.
    """
    for directory, _, _ in os.walk(top, topdown=False):
        for attempt in range(200):
            try:
                os.rmdir(directory)
            except FileNotFoundError:
                pass
            except OSError as error:
                if error.errno != errno.EBUSY or attempt == 199:
                    raise
                os.sched_yield()
                continue
            break


class CgroupV1:
    """One directory per hierarchy; the limits are in memory, cpu and pids."""

    def __init__(self, mounts: dict[str, Path], parent: str, name: str, limits: Limits) -> None:
        self.path = f"/{parent}/{name}"
        self._directories = {mount: f"{mount}/{parent}/{name}" for mount in set(mounts.values())}
        self._memory = self._directories[mounts["memory"]]
        self._cpuacct = self._directories[mounts["cpuacct"]] if "cpuacct" in mounts else None
        self._oom = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            for controller in ("memory", "cpu", "pids"):
                os.makedirs(self._directories[mounts[controller]], exist_ok=True)
            self._limit(self._directories[mounts["cpu"]], self._directories[mounts["pids"]], limits)
        except KeyError as error:
            self.remove()
            raise FailedPrecondition(f"cgroup controller {error} is not mounted") from None
        except BaseException:
            self.remove()
            raise

    def _limit(self, cpu: str, pids: str, limits: Limits) -> None:
        _write(f"{self._memory}/memory.limit_in_bytes", limits.memory)
        with contextlib.suppress(FileNotFoundError):  # absent without swap accounting
            _write(f"{self._memory}/memory.memsw.limit_in_bytes", limits.memory + limits.swap)
        _write(f"{cpu}/cpu.cfs_period_us", CPU_PERIOD_US)
        _write(f"{cpu}/cpu.cfs_quota_us", max(int(limits.cpus * CPU_PERIOD_US), 1000))  # the kernel's least
        _write(f"{pids}/pids.max", limits.pids)
        # The eventfd is signalled when the limit of this group is what memory was wanting for.
        control = os.open(f"{self._memory}/memory.oom_control", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _write(f"{self._memory}/cgroup.event_control", f"{self._oom} {control}")
        finally:
            os.close(control)

    def counters(self) -> Counters:
        killed = False
        with contextlib.suppress(FileNotFoundError):  # the runtime removes the group if it cannot start the command
            killed = (
                re.search(r"^oom_kill [1-9]", _read(f"{self._memory}/memory.oom_control"), re.MULTILINE) is not None
            )
        try:
            limit = os.eventfd_read(self._oom) > 0  # also when a group is removed, so it counts only with a kill
        except BlockingIOError:
            limit = False
        cpu = 0
        if self._cpuacct is not None:
            with contextlib.suppress(FileNotFoundError):  # the runtime never came so far as to make it
                cpu = int(_read(f"{self._cpuacct}/cpuacct.usage")) // 1000
        peak = 0
        with contextlib.suppress(FileNotFoundError):  # the runtime removes the group if it cannot start the command
            peak = int(_read(f"{self._memory}/memory.max_usage_in_bytes"))
        return Counters(killed and limit, peak, cpu, killed and not limit)

    def pids(self) -> list[int]:
        return list(_pids_below(self._memory))

    def kill(self) -> bool:
        return _kill_tree(self._memory, self.path)

    def remove(self) -> None:
        if self._oom >= 0:
            os.close(self._oom)
            self._oom = -1
        for directory in self._directories.values():
            _remove_group(directory)


class CgroupV2:
    """One directory; controllers have to be enabled from the root down."""

    def __init__(self, mount: Path, parent: str, name: str, limits: Limits) -> None:
        self.path = f"/{parent}/{name}"
        self._directory = f"{mount}/{parent}/{name}"
        try:
            os.makedirs(self._directory)
            for ancestor in (str(mount), f"{mount}/{parent}"):
                _write(f"{ancestor}/cgroup.subtree_control", "+cpu +memory +pids")
            _write(f"{self._directory}/memory.max", limits.memory)
            with contextlib.suppress(FileNotFoundError):  # absent without swap accounting
                _write(f"{self._directory}/memory.swap.max", limits.swap)
            _write(f"{self._directory}/cpu.max", f"{max(int(limits.cpus * CPU_PERIOD_US), 1000)} {CPU_PERIOD_US}")
            _write(f"{self._directory}/pids.max", limits.pids)
        except BaseException:
            self.remove()
            raise

    def counters(self) -> Counters:
        events = self._table("memory.events")
        peak = 0
        with contextlib.suppress(FileNotFoundError):  # before kernel 5.19
            peak = int(_read(f"{self._directory}/memory.peak"))
        killed, limit = events.get("oom_kill", 0) > 0, events.get("oom", 0) > 0
        return Counters(killed and limit, peak, self._table("cpu.stat").get("usage_usec", 0), killed and not limit)

    def _table(self, name: str) -> dict[str, int]:
        if not os.path.isdir(self._directory):  # the runtime removes it if it cannot start the command
            return {}
        return {key: int(value) for key, value in re.findall(r"(\w+) (\d+)", _read(f"{self._directory}/{name}"))}

    def pids(self) -> list[int]:
        return list(_pids_below(self._directory))

    def kill(self) -> bool:
        return _kill_tree(self._directory, self.path)

    def remove(self) -> None:
        _remove_group(self._directory)
