"""Running one container to its end with an OCI runtime: runc by default.

State: a :class:`Container` belongs to one task. Whatever ends that task (the command's exit, the timeout, a
cancellation), :func:`run_container` returns or raises only after every process of the container is dead, the runtime
has ended and the cgroup is gone.
"""

import asyncio
import errno
import json
import logging
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afs.afslet.cgroups import Cgroup, Counters, Limits, open_cgroup
from afs.core.errors import Internal
from afs.core.run import PIPE, Child, popen, wait

log = logging.getLogger(__name__)
Output = Callable[[str, bytes], Awaitable[None]]
_READ_SIZE = 1 << 16


@dataclass(frozen=True, slots=True)
class Runtime:
    """How containers are run here. *state_dir* is the runtime's own; *cgroup_parent* is a name below every hierarchy's root."""

    program: str
    state_dir: Path
    cgroup_parent: str
    term_grace: float  # seconds between SIGTERM and SIGKILL after a timeout
    max_files: int  # RLIMIT_NOFILE, hard: not more than this process has, or setting it would need CAP_SYS_RESOURCE


@dataclass(frozen=True, slots=True)
class Ended:
    """How a container ended. *status* is the exit code, 128 + n for signal n; *start_error* says why it never ran."""

    status: int
    timed_out: bool
    counters: Counters
    start_error: str


async def run_container(
    runtime: Runtime, name: str, bundle: Path, config: dict[str, Any], limits: Limits, timeout: float, output: Output
) -> Ended:
    """Run the container *name* described by *config* (its cgroupsPath is set here) for at most *timeout* seconds.

    *output* gets ("stdout" or "stderr", bytes) as they come; while it waits, the command's pipe fills and the command
    waits too. *bundle* is an existing empty directory.
    """
    cgroup = open_cgroup(runtime.cgroup_parent, name, limits)
    try:
        config["linux"]["cgroupsPath"] = cgroup.path
        (bundle / "config.json").write_text(json.dumps(config), encoding="utf-8")
        container = _Container(runtime, name, bundle, cgroup)
        status, timed_out = await container.run(timeout, output)
        return Ended(status, timed_out, cgroup.counters(), container.start_error())
    finally:
        await _kill_all(cgroup)
        await _remove(cgroup)


async def _kill_all(cgroup: Cgroup) -> None:
    while cgroup.kill():  # noqa: ASYNC110 - nothing signals the end of a process that is not ours
        await asyncio.sleep(0.001)


async def _remove(cgroup: Cgroup) -> None:
    """Remove the group; killed processes count as in it until they are reaped, so try for a while."""
    for _ in range(500):
        try:
            cgroup.remove()
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            await asyncio.sleep(0.01)
        else:
            return
    log.error("cgroup %s cannot be removed and stays behind", cgroup.path)


class _Container:
    def __init__(self, runtime: Runtime, name: str, bundle: Path, cgroup: Cgroup) -> None:
        self._runtime = runtime
        self._name = name
        self._bundle = bundle
        self._cgroup = cgroup
        self._log = bundle / "log.json"
        self._is_crun = Path(runtime.program).name == "crun"

    async def run(self, timeout: float, output: Output) -> tuple[int, bool]:
        """(status, timed out)."""
        process = self._start()
        assert process.stdout is not None
        assert process.stderr is not None
        copying = [
            asyncio.create_task(_copy("stdout", process.stdout, output)),
            asyncio.create_task(_copy("stderr", process.stderr, self._without_own_words(output))),
        ]
        timed_out = False
        try:
            try:
                everything = asyncio.gather(asyncio.gather(*copying), wait(process))
                await asyncio.wait_for(asyncio.shield(everything), timeout)
            except TimeoutError:
                timed_out = True
                await self._end(process)
                await _kill_all(self._cgroup)  # also if the runtime died before its container
            await asyncio.gather(*copying)
            status = process.wait()
        finally:
            await self._kill(process)
            for task in copying:
                task.cancel()
            await asyncio.gather(*copying, return_exceptions=True)
            process.stdout.close()
            process.stderr.close()
            await self._forget()
        if status < 0 and not timed_out:  # a command's signal arrives as 128 + n
            raise Internal(f"the runtime {self._runtime.program} was killed by signal {-status}")
        return (status if status >= 0 else 128 - status), timed_out

    def _start(self) -> Child:
        argv = [
            self._runtime.program,
            "--root",
            str(self._runtime.state_dir),
            "--log",
            str(self._log),
            "--log-format",
            "json",
        ]
        argv += ["run", "--bundle", str(self._bundle), self._name]
        try:
            # A session of its own: a terminal's Ctrl-C is for afslet, which ends its containers itself. An environment
            # of its own: with our NOTIFY_SOCKET runc would make /run/notify in the container's root.
            env = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
            return popen(argv, stdout=PIPE, stderr=PIPE, new_session=True, env=env)
        except OSError as error:
            raise Internal(f"cannot start the runtime {self._runtime.program}: {error.strerror}") from error

    def _without_own_words(self, output: Output) -> Output:
        """The runtime shares stderr with the command. It logs a failure before it prints it, so what comes after that
        log entry is the runtime's own and not the command's output."""

        async def filtered(source: str, data: bytes) -> None:
            if not self.start_error():
                await output(source, data)

        return filtered

    async def _end(self, process: Child) -> None:
        """After the timeout: SIGTERM through the runtime, which forwards it, then SIGKILL.

        The first process of a pid namespace does not even see a SIGTERM that it has no handler for (pid_namespaces(7)),
        so for most commands the grace is spent in vain; it is short.
        """
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(wait(process), self._runtime.term_grace)
            except TimeoutError:
                await self._kill(process)

    async def _kill(self, process: Child) -> None:
        """Kill the container's processes until the runtime ends; it reaps them and cleans up after itself."""
        if process.poll() is not None:
            return
        ending = asyncio.ensure_future(wait(process))
        pause = 0.001
        while not ending.done():
            self._cgroup.kill()
            await asyncio.wait([ending], timeout=pause)
            pause = min(pause * 2, 0.1)
            if pause == 0.1 and not self._cgroup.kill() and not ending.done():
                # Nothing runs in the container: the runtime itself is what hangs.
                process.kill()

    async def _forget(self) -> None:
        """Remove the runtime's state of the container if it was killed before it could."""
        state = self._runtime.state_dir / self._name
        if state.exists():
            from afs.core.files import remove_tree

            await asyncio.to_thread(remove_tree, state)

    def start_error(self) -> str:
        """The runtime's own message if it could not start the command, else ""."""
        try:
            if not self._log.stat().st_size:
                return ""
            lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return ""
        for line in reversed(lines):
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            message = str(entry.get("msg", ""))
            # A command's exit code no runtime logs. runc logs as errors also what it got over, but a failure to start so;
            # crun's errors are all failures, and have no common beginning.
            own = ("runc run failed", "unable to start container", "container_linux.go")
            if entry.get("level") == "error" and (self._is_crun or message.startswith(own)):
                return message
        return ""


async def _copy(source: str, pipe: Any, output: Output) -> None:
    """Read a pipe to its end without blocking the loop."""
    loop, fd = asyncio.get_running_loop(), pipe.fileno()
    os.set_blocking(fd, False)
    while True:
        try:
            data = os.read(fd, _READ_SIZE)
        except BlockingIOError:
            readable = asyncio.Event()
            loop.add_reader(fd, readable.set)
            try:
                await readable.wait()
            finally:
                loop.remove_reader(fd)
            continue
        if not data:
            return
        await output(source, data)
