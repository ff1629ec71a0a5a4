"""Keeping the kernel ready to move processes between control groups while runs come and go.

Writing a pid to ``cgroup.procs`` takes cgroup_threadgroup_rwsem for writing (kernel/cgroup/cgroup.c), a per-CPU
semaphore: the first writer after a pause waits for an RCU grace period, 6 to 14 ms here, of the 18 ms that a whole
``runc run`` takes then. Until about one grace period after the last writer the next one waits for nothing
(kernel/rcu/sync.c). So while runs come, a thread writes its own process's pid to the group where that is anyway, which
changes nothing, every few milliseconds: measured with 60 interleaved ``runc run``, 30 ms apart, 18.7 ms without and 9.1
with it. The mount option ``favordynmods`` does the same for good, at the same price: forks and exits are a little slower.

State: ``_until`` (monotonic seconds) is written by the event loop and read by the thread, which sleeps on ``_wake`` once
it has passed. Nothing else is shared.
"""

import logging
import os
import threading
import time
from pathlib import Path

from afs.afslet.cgroups import hierarchies

log = logging.getLogger(__name__)
_EVERY_S = 0.006  # an RCU grace period is longer
_LINGER_S = 1.0  # after the last run: the next ones often come at once


class FastAttach:
    """Call :meth:`expect` when a run comes; :meth:`close` ends the thread."""

    def __init__(self) -> None:
        self._until = 0.0
        self._wake = threading.Event()
        self._closed = False
        self._file = _own_group()
        self._thread: threading.Thread | None = None
        if self._file is not None:
            self._thread = threading.Thread(target=self._run, name="fast attach", daemon=True)
            self._thread.start()

    def expect(self) -> None:
        """Processes will be moved soon."""
        self._until = time.monotonic() + _LINGER_S
        self._wake.set()

    def close(self) -> None:
        """End the thread."""
        self._closed = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _run(self) -> None:
        assert self._file is not None
        try:
            while not self._closed:
                os.write(self._file, b"0")  # the writer's own process
                if time.monotonic() < self._until:
                    time.sleep(_EVERY_S)
                else:
                    self._wake.clear()
                    if time.monotonic() >= self._until and not self._closed:  # as set before _wake was
                        self._wake.wait()
        except OSError as error:
            log.warning("containers start some milliseconds slower after a pause: %s", error)


def _own_group() -> int | None:
    """A descriptor of ``cgroup.procs`` of the group that this process is in; None if it cannot be written."""
    mounts = hierarchies()
    controller = "pids" if "pids" in mounts else next(iter(mounts))
    with open("/proc/self/cgroup", encoding="utf-8") as lines:
        groups = {
            name: path
            for _, names, path in (line.rstrip("\n").split(":", 2) for line in lines)
            for name in names.split(",")
        }
    path = Path(f"{mounts[controller]}{groups.get(controller, '/')}", "cgroup.procs")
    try:
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except OSError as error:
        log.info("containers start some milliseconds slower after a pause: %s", error)
        return None
