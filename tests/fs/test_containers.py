"""One container by the runtime: how it ends, what it reads and writes, and that nothing of it stays."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import uuid
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from afs.afslet.bundle import NEW_NETWORK, Process, Sandbox, runtime_config
from afs.afslet.cgroups import Limits, clean_up, hierarchies
from afs.afslet.rootfs import User
from afs.afslet.runc import Ended, Job, Runtime, become_subreaper, run_container
from afs.afslet.runtimebinary import RuntimeBinary
from afs.afslet.stdio import Pipes, Stdio, Terminal, Window
from afs.core import syscalls
from afs.core.errors import FailedPrecondition
from tests.testbed import capabilities

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

pytestmark = pytest.mark.root
BUSYBOX = shutil.which("busybox") or "/bin/busybox"
PROGRAMS = ("sh", "cat", "echo", "sleep", "dd", "true", "id", "stty", "kill", "ulimit", "yes", "head", "hostname")
PATH = "PATH=/bin"


class Bench:
    """Runs commands in a root with busybox."""

    def __init__(self, directory: Path, runtime: Runtime) -> None:
        self.directory = directory
        self.runtime = runtime
        self.root = directory / "root"
        self.streams = {"stdout": bytearray(), "stderr": bytearray()}
        self.arrived = asyncio.Event()

    async def output(self, source: str, data: bytes) -> None:
        """Collect."""
        self.streams[source] += data
        self.arrived.set()

    async def until(self, text: bytes) -> None:
        """Wait until the command has written *text*."""
        while text not in self.streams["stdout"]:
            self.arrived.clear()
            await self.arrived.wait()

    async def run(
        self,
        *argv: str,
        timeout: float = 60.0,
        grace: float = 60.0,
        memory: int = 64 << 20,
        stdio: Stdio | None = None,
        output: Callable[[str, bytes], Awaitable[None]] | None = None,
        started: Callable[[], None] = lambda: None,
    ) -> Ended:
        """One container to its end."""
        name = uuid.uuid4().hex[:12]
        bundle = self.directory / name
        bundle.mkdir()
        process = Process(argv, (PATH,), "/", User(0, 0, (), "/"))
        streams = stdio or Pipes()
        terminal = (5, 7) if isinstance(streams, Terminal) else None
        config = runtime_config(process, str(self.root), Sandbox(1024, network=NEW_NETWORK, terminal=terminal))
        job = Job(name, bundle, config, Limits(1.0, memory, 100), timeout, grace, streams)
        try:
            return await run_container(self.runtime, job, output or self.output, started)
        finally:
            assert not (self.runtime.state_dir / name).exists()
            for mount in set(hierarchies().values()):
                assert not (mount / self.runtime.cgroup_parent / name).exists()


def our_children() -> set[int]:
    """The children of this process, zombies among them."""
    found = set()
    for thread in Path("/proc/self/task").iterdir():
        found |= {int(pid) for pid in (thread / "children").read_text().split()}
    return found


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """A place to run in; afterwards this process has no child more than before."""
    capabilities.require("root", "cgroup", "runc")
    for name in ("bin", "dev", "proc", "sys", "tmp"):
        (tmp_path / "root" / name).mkdir(parents=True)
    shutil.copy2(BUSYBOX, tmp_path / "root/bin/busybox")
    for name in PROGRAMS:
        (tmp_path / "root/bin" / name).symlink_to("busybox")
    become_subreaper()
    parent = f"afs-test-{uuid.uuid4().hex[:8]}"
    binary = RuntimeBinary("runc")
    before = our_children()
    yield Bench(tmp_path, Runtime(binary, tmp_path / "state", parent, 1024))
    assert our_children() <= before
    syscalls.set_child_subreaper(enabled=False)  # or other tests' orphans become ours
    binary.close()
    assert clean_up(parent) == 0


@pytest.mark.parametrize("code", [0, 1, 125, 137, 139, 255])
async def test_exit_codes_are_the_command_s(bench: Bench, code: int) -> None:
    ended = await bench.run("sh", "-c", f"exit {code}")
    assert (ended.code, ended.signal, ended.timed_out, ended.start_error) == (code, 0, False, "")
    assert ended.counters.cpu_us > 0
    assert ended.counters.peak_memory > 0


async def test_a_signal_is_told_from_an_exit(bench: Bench) -> None:
    """Only the kernel itself signals the first process of a namespace that has no handler: here for want of CPU time."""
    ended = await bench.run("sh", "-c", "ulimit -c 0; ulimit -t 1; while :; do :; done")
    assert (ended.code, ended.signal) == (128 + ended.signal, ended.signal)
    assert ended.signal in (signal.SIGXCPU, signal.SIGKILL)
    assert not ended.counters.oom


async def test_out_of_memory_is_told(bench: Bench) -> None:
    ended = await bench.run("dd", "if=/dev/zero", "of=/dev/null", "bs=200M", "count=1", memory=32 << 20)
    assert ended.signal == signal.SIGKILL
    assert ended.counters.oom


async def test_output_is_byte_for_byte_and_apart(bench: Bench) -> None:
    ended = await bench.run("sh", "-c", r"printf 'a\000\377\n\r'; printf 'no newline' >&2; printf b")
    assert ended.code == 0
    assert bench.streams == {"stdout": b"a\0\xff\n\rb", "stderr": b"no newline"}


async def test_output_comes_at_once(bench: Bench) -> None:
    running = asyncio.create_task(bench.run("sh", "-c", "printf 'no line'; sleep 1000"))
    await bench.until(b"no line")
    running.cancel()
    await asyncio.wait([running])
    assert running.cancelled()


async def test_a_slow_reader_holds_the_command_back(bench: Bench) -> None:
    """Of what a command writes, no more than two pipes' worth and one message are on the way."""
    released, got = asyncio.Event(), bytearray()

    async def output(source: str, data: bytes) -> None:
        await released.wait()
        got.extend(data)

    started = asyncio.Event()
    script = "dd if=/dev/zero bs=64k count=160 2>/dev/null; echo x > /tmp/done"
    running = asyncio.create_task(bench.run("sh", "-c", script, output=output, started=started.set))
    await started.wait()
    for _ in range(200):
        await asyncio.sleep(0)  # whatever could be read has been
    assert not (bench.root / "tmp/done").exists()
    released.set()
    assert (await running).code == 0
    assert len(got) == 160 << 16


async def test_a_slow_reader_does_not_make_it_a_timeout(bench: Bench) -> None:
    released, full = asyncio.Event(), asyncio.Event()

    async def output(source: str, data: bytes) -> None:
        full.set()
        await released.wait()

    async def release() -> None:
        await full.wait()
        await asyncio.sleep(1.0)  # longer than the timeout: the command has ended, its output is still in the pipe
        released.set()

    releasing = asyncio.create_task(release())
    ended = await bench.run("echo", "short", timeout=0.9, output=output)
    await releasing
    assert (ended.code, ended.timed_out) == (0, False)


async def test_standard_input(bench: Bench) -> None:
    stdio = Pipes(stdin=True)
    running = asyncio.create_task(bench.run("cat", stdio=stdio))
    payload = os.urandom(1 << 20)
    await stdio.write(payload)
    stdio.end_input()
    assert (await running).code == 0
    assert bench.streams["stdout"] == payload


async def test_input_that_nobody_reads_is_dropped(bench: Bench) -> None:
    stdio = Pipes(stdin=True)
    running = asyncio.create_task(bench.run("true", stdio=stdio))
    await stdio.write(b"x" * (1 << 20))  # more than the pipe holds
    assert (await running).code == 0


async def test_without_input_it_is_at_its_end(bench: Bench) -> None:
    assert (await bench.run("cat")).code == 0
    assert not bench.streams["stdout"]


async def test_a_terminal(bench: Bench) -> None:
    stdio = Terminal(bench.directory / "tty", Window(33, 44))
    script = "stty size; read line; echo got $line; stty size; exit 5"
    running = asyncio.create_task(bench.run("sh", "-c", script, stdio=stdio))
    await bench.until(b"33 44")
    stdio.resize(Window(50, 60))
    await stdio.write(b"typed\n")
    ended = await running
    assert ended.code == 5
    assert b"got typed\r\n50 60\r\n" in bench.streams["stdout"]
    assert not (bench.directory / "tty").exists()


async def test_end_of_input_on_a_terminal(bench: Bench) -> None:
    stdio = Terminal(bench.directory / "tty", Window(24, 80))
    stdio.end_input()
    assert (await bench.run("cat", stdio=stdio)).code == 0


async def test_timeout_gives_a_handler_its_grace(bench: Bench) -> None:
    script = "trap 'echo caught; exit 3' TERM; echo ready; while :; do sleep 0.05; done"
    ended = await bench.run("sh", "-c", script, timeout=1.0)
    assert (ended.timed_out, ended.code) == (True, 3)
    assert bench.streams["stdout"] == b"ready\ncaught\n"


async def test_timeout_kills_what_ignores_the_signal(bench: Bench) -> None:
    script = "trap 'echo caught' TERM; echo ready; while :; do sleep 0.05; done"
    ended = await bench.run("sh", "-c", script, timeout=1.0, grace=0.2)
    assert (ended.timed_out, ended.signal) == (True, signal.SIGKILL)
    assert bench.streams["stdout"].startswith(b"ready\ncaught\n")


async def test_timeout_of_what_has_no_handler_needs_no_grace(bench: Bench) -> None:
    async with asyncio.timeout(30):
        ended = await bench.run("sleep", "1000", timeout=0.2, grace=1000.0)
    assert (ended.timed_out, ended.signal) == (True, signal.SIGKILL)


async def test_processes_left_behind_end_with_the_first(bench: Bench) -> None:
    ended = await bench.run("sh", "-c", "sleep 1000 & sleep 1000 & echo started")
    assert ended.code == 0
    assert bench.streams["stdout"] == b"started\n"


async def test_what_the_runtime_cannot_start(bench: Bench) -> None:
    ended = await bench.run("/bin/none")
    assert "no such file or directory" in ended.start_error
    assert not bench.streams["stderr"], "the runtime's words are not the command's"


@pytest.mark.parametrize("turns", range(0, 60, 6))
async def test_cancelled_at_any_time(bench: Bench, turns: int) -> None:
    """Whatever the moment, nothing stays: the bench looks for it."""
    async with AsyncExitStack() as stack:
        running = asyncio.create_task(bench.run("sleep", "1000"))
        stack.callback(running.cancel)
        for _ in range(turns):
            await asyncio.sleep(0.001)  # steps through the start, which takes a few dozens of these
        running.cancel()
        await asyncio.wait([running])
        assert running.cancelled()


def test_a_runtime_that_is_not_there() -> None:
    with pytest.raises(FailedPrecondition, match=r"^the OCI runtime nothing-such is not installed$"):
        RuntimeBinary("nothing-such")


@pytest.mark.skipif("" in hierarchies(), reason="crun works with cgroup v2 alone")
def test_crun_is_refused_where_it_cannot_work() -> None:
    capabilities.require("crun")
    with pytest.raises(FailedPrecondition, match=r"^crun runs on machines with cgroup v2 alone"):
        RuntimeBinary("crun")


def test_a_replaced_runtime_is_copied_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "runc"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    binary = RuntimeBinary("runc")
    assert Path(binary.path()).read_text() == "#!/bin/sh\nexit 1\n"
    with pytest.raises(PermissionError):
        Path(binary.path()).write_text("other")
    (tmp_path / "new").write_text("#!/bin/sh\nexit 22\n")
    (tmp_path / "new").chmod(0o755)
    (tmp_path / "new").rename(program)
    assert Path(binary.path()).read_text() == "#!/bin/sh\nexit 22\n"
    binary.close()
