"""Child processes, readiness and the frame of a daemon."""

import asyncio
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from afs.core.cluster import start_process
from afs.core.errors import Cancelled, DeadlineExceeded, Internal, NotFound
from afs.core.run import PIPE, CommandFailed, ask, popen, run, stop, wait
from afs.core.service import notify, raise_file_limit, run_service

# Running


def test_run_returns_stdout() -> None:
    assert run(["cat"], stdin=b"\x00\xff") == b"\x00\xff"
    assert run(["sh", "-c", "echo $X; pwd; echo noise >&2"], env={"X": "1"}, cwd="/") == b"1\n/\n"


def test_a_failure_carries_what_is_needed_to_repeat_it(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(CommandFailed) as caught:
        run(["sh", "-c", "echo out; echo 'why not' >&2; exit 3"])
    error = caught.value
    assert (error.returncode, error.stderr, error.argv[0]) == (3, "why not\n", "sh")
    assert str(error) == "sh -c 'echo out; echo '\"'\"'why not'\"'\"' >&2; exit 3' failed with status 3: why not"
    assert isinstance(error, Internal)
    assert [record.message for record in caplog.records] == [error.line]


def test_a_failure_without_words() -> None:
    with pytest.raises(CommandFailed, match=r"^false failed with status 1: no message$"):
        run(["false"])
    with pytest.raises(CommandFailed, match="failed with status -9: ") as caught:
        run(["sh", "-c", "kill -9 $$"])
    assert caught.value.returncode == -signal.SIGKILL


def test_a_missing_program_is_the_system_s_error() -> None:
    with pytest.raises(FileNotFoundError):
        run(["/no/such/program"])


async def test_wait_gives_the_status() -> None:
    assert await wait(popen(["sh", "-c", "exit 7"])) == 7
    child = popen(["sleep", "100"])
    child.kill()
    assert await wait(child) == -signal.SIGKILL
    assert await wait(child) == -signal.SIGKILL  # again, when it is reaped


async def test_waiting_blocks_nobody_and_can_be_given_up() -> None:
    child = popen(["cat"], stdin=PIPE)
    before = len(os.listdir("/proc/self/fd"))
    waiting = asyncio.create_task(wait(child))
    await asyncio.sleep(0)  # it runs
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert len(os.listdir("/proc/self/fd")) == before
    assert child.poll() is None
    assert child.stdin is not None
    child.stdin.close()
    assert await wait(child) == 0


def test_a_program_that_does_not_answer_is_killed_with_its_children(tmp_path: Path) -> None:
    with pytest.raises(DeadlineExceeded, match=r"did not answer within 1 s"):
        ask(["sh", "-c", f"sleep 1000 & echo $! > {tmp_path}/pid; wait"], stdin=b"", timeout=1)
    assert not Path("/proc", (tmp_path / "pid").read_text().strip(), "cwd").exists()


def test_an_interrupted_question_ends_its_program(tmp_path: Path) -> None:
    """It has a session of its own, so Ctrl-C does not reach it."""

    def interrupt(*_: object) -> None:
        raise Cancelled("interrupted")

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(Cancelled):
            ask(["sh", "-c", f"echo $$ > {tmp_path}/pid; kill -USR1 $PPID; exec sleep 1000"], stdin=b"", timeout=60)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert not Path("/proc", (tmp_path / "pid").read_text().strip()).exists()


async def test_stop_asks_first() -> None:
    child = popen(["sh", "-c", "trap 'exit 5' TERM; echo ready; while :; do read x; done"], stdin=PIPE, stdout=PIPE)
    assert child.stdout is not None
    assert child.stdin is not None
    assert child.stdout.readline() == b"ready\n"
    child.stdin.write(b"\n")
    child.stdin.close()
    child.stdout.close()
    assert await stop(child, 10) == 5


async def test_stop_kills_what_does_not_listen(caplog: pytest.LogCaptureFixture) -> None:
    child = popen(["sh", "-c", "trap '' TERM; echo ready; exec sleep 100"], stdout=PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    child.stdout.close()
    assert await stop(child, 0.05) == -signal.SIGKILL
    assert [r.message for r in caplog.records] == [f"pid {child.pid} ignores SIGTERM for 0 s: killing it"]
    assert await stop(child, 0.05) == -signal.SIGKILL  # it is over


def test_children_get_no_descriptors_but_those_named() -> None:
    kept, other = os.pipe()
    try:
        argv = [sys.executable, "-c", f"import os; os.fstat({kept}); os.fstat({other})"]
        child = popen(argv, pass_fds=[kept], stderr=PIPE)
        assert child.stderr is not None
        with child.stderr:
            assert b"Bad file descriptor" in child.stderr.read().splitlines()[-1]
        assert child.wait() == 1
    finally:
        os.close(kept)
        os.close(other)


# Readiness


def test_notify_sends_one_datagram(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        notify("READY=1\nSTATUS=serving")
        assert receiver.recv(100) == b"READY=1\nSTATUS=serving"


def test_notify_knows_abstract_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"afs-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(f"\0{name}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        notify("STOPPING=1")
        assert receiver.recv(100) == b"STOPPING=1"


def test_notify_without_a_manager_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", "")
    notify("READY=1")


# Daemons


def run_daemon(body: str, tmp_path: Path) -> "subprocess.CompletedProcess[str]":
    """A process that runs ``serve``, whose body is given, as a daemon."""
    program = tmp_path / "daemon.py"
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    program.write_text(
        "import os, signal, sys\nfrom afs.core.errors import NotFound\nfrom afs.core.service import run_service\n"
        f"async def serve(stop):\n{lines}\nsys.exit(run_service('daemon', serve))\n"
    )
    return subprocess.run([sys.executable, program], check=False, capture_output=True, text=True)


def test_a_signal_stops_a_daemon(tmp_path: Path) -> None:
    done = run_daemon("os.kill(os.getpid(), signal.SIGTERM)\nawait stop.wait()\nprint('cleaned')", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "cleaned\n", "")


def test_how_errors_end_a_daemon(capsys: pytest.CaptureFixture[str]) -> None:
    async def missing(_: asyncio.Event) -> None:
        raise NotFound("no\nsuch thing")

    async def broken(_: asyncio.Event) -> None:
        raise PermissionError(13, "Permission denied", "/x")

    async def bug(_: asyncio.Event) -> None:
        raise KeyError("x")

    assert run_service("afs_x", missing) == 66
    assert run_service("afs_x", broken) == 70
    assert capsys.readouterr().err == "afs_x: no such thing\nafs_x: [Errno 13] Permission denied: '/x'\n"
    with pytest.raises(KeyError):
        run_service("afs_x", bug)


async def test_a_process_that_dies_shows_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(Internal) as caught:
        await start_process("store", "afs.layerstore", ["--count=x"], tmp_path)
    log = tmp_path / "logs" / "store.log"
    last = log.read_text().splitlines()[-1]
    assert "--count" in last
    assert str(caught.value) == f"store ended with status 64: {last} (log: {log})"
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


async def test_a_process_tells_its_address(tmp_path: Path) -> None:
    process = await start_process("discovery", "afs.discovery", ["--listen=127.0.0.1:0"], tmp_path)
    try:
        assert process.address.startswith("127.0.0.1:")
        assert not process.address.endswith(":0")
    finally:
        assert await stop(process.popen, 10) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


def test_the_file_limit_is_raised_as_far_as_may_be() -> None:
    before = soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, hard - 1), hard))
    try:
        raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
