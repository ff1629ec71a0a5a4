"""afs_cli as a process, against a server that follows a script: what a real cluster does only with luck and patience."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import signal
import subprocess
import termios
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from afs.core.errors import DeadlineExceeded
from afs.proto.v1 import afslet_pb2 as pb
from afs.proto.v1 import proxy_pb2, runs_pb2
from tests.testbed.cluster import BIN
from tests.testbed.fakeafslet import Context, FakeAfslet, abort, accepted, diff, done, fake_in_thread, log, result

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

Code = grpc.StatusCode
EXECUTE = ("execute", "--image", "image")


def cli(fake: FakeAfslet, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run afs_cli to its end."""
    environment = {**os.environ, "AFS_PROXY": fake.address}
    argv = [str(BIN / "afs_cli"), *arguments]
    return subprocess.run(argv, env=environment, capture_output=True, text=True, check=False, timeout=60, **options)


@contextmanager
def started(fake: FakeAfslet, *arguments: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """afs_cli under way; killed at the end of the block."""
    environment = {**os.environ, "AFS_PROXY": fake.address}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    popen: Any = subprocess.Popen  # which of its many forms depends on the options
    with popen([str(BIN / "afs_cli"), *arguments], env=environment, **streams) as process:
        try:
            yield process
        finally:
            process.kill()


def say(*responses: pb.ExecuteResponse) -> Any:
    """A script that says *responses*, those after `accepted` when the client has sent everything."""

    async def script(start: pb.StartRequest, requests: Any, context: Context) -> AsyncIterator[pb.ExecuteResponse]:
        for response in responses:
            yield response
            if response.HasField("accepted"):
                async for _ in requests:
                    pass

    return script


def read_until(fd: int, text: bytes) -> bytes:
    """What comes on *fd* up to *text*."""
    got = b""
    while text not in got:
        data = os.read(fd, 4096)
        assert data, got
        got += data
    return got


def test_every_flag_reaches_the_request(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f").touch()
    flags = [
        *("--cpu=0.5", "--memory-mb=64", "--disk-mb=10", "--pids=7", "--timeout=2s", "--grace=500ms", "--env=A=1"),
        *("--cwd=/tmp", "--user=app:app", "--group=1", "--group=adm", "--hostname=box", "--network=bridge"),
        *("--allow=10.0.0.1:80", "--userns", "--max-output=1K", f"--dir={tmp_path}/d", f"--file={tmp_path}/d/f:/x/y"),
        *("--copy", f"--out={tmp_path}/out", "--diff-format=zstd", "--include=*.o", "--exclude=t/", "--max-diff=1M"),
        *("--platform=linux/arm64/v8", "--node=n1", "--max-retries=3", "--queue-timeout=1m", "--priority=-4"),
        *("--tenant=t", "--key=k", "--label=a=b"),
    ]
    with fake_in_thread(say(accepted(), result(), *diff(b"tar"), done())) as fake:
        got = cli(fake, *EXECUTE, *flags, "--", "a", "--b")
        (start,) = fake.starts
    assert (got.returncode, got.stdout) == (0, ""), got.stderr
    assert got.stderr == f"afs_cli: changed files: {tmp_path}/out (3 B)\n"
    assert (tmp_path / "out").read_bytes() == b"tar"
    assert start == pb.StartRequest(
        image="image",
        command=["a", "--b"],
        cpu_cores=1,
        cpu_millis=500,
        memory_mb=64,
        disk_mb=10,
        pids_limit=7,
        timeout_ms=2000,
        term_grace_ms=500,
        env=["A=1"],
        cwd="/tmp",
        user="app:app",
        groups=["1", "adm"],
        hostname="box",
        network=pb.NETWORK_BRIDGE,
        egress_allow=["10.0.0.1:80"],
        user_namespace=pb.USER_NAMESPACE_ON,
        max_output_bytes=1024,
        upload_mode=pb.UPLOAD_COPY,
        diff_format=pb.DIFF_ZSTD,
        diff_include=["*.o"],
        diff_exclude=["t/"],
        diff_max_bytes=1 << 20,
        platform_os="linux",
        platform_arch="arm64",
        platform_variant="v8",
        node_id="n1",
        proxy_dispatch_max_retries=3,
        queue_timeout_ms=60_000,
        priority=-4,
        tenant="t",
        idempotency_key="k",
        labels={"a": "b"},
        bytes_only=True,
        progress=True,
    )


def test_notes_about_what_is_missing(tmp_path: Path) -> None:
    with fake_in_thread(say(accepted(), log(b"x"), result(stdout_dropped_bytes=2048), done())) as fake:
        got = cli(fake, *EXECUTE)
        assert (got.returncode, got.stdout) == (0, "x")
        assert got.stderr == "afs_cli: 2.0 KiB of stdout are missing: it exceeds --max-output\n"
        assert fake.starts[0].diff_format == pb.DIFF_NONE, "nobody wants it"
        for code, status in ((0, 75), (3, 3)):
            fake.script = say(accepted(), result(code), *diff(b"t"), done(diff_error="it exceeds 1 MiB"))
            got = cli(fake, *EXECUTE, f"--out={tmp_path}/out")
            assert (got.returncode, got.stderr) == (
                status,
                f"afs_cli: {tmp_path}/out was not written: it exceeds 1 MiB\n",
            )
    assert not list(tmp_path.iterdir())


async def broken(start: pb.StartRequest, requests: Any, context: Context) -> AsyncIterator[pb.ExecuteResponse]:
    """A fault after the node has taken the run; with output before it if the command says so."""
    yield accepted("n1", "r1")
    if start.command:
        yield log(b"output")
    await abort(
        context, Code.UNAVAILABLE, "node n1 is gone", pb.OUTCOME_INFRASTRUCTURE_ERROR, retryable=True, node_id="n1"
    )


def test_faults_as_json_and_as_a_line() -> None:
    with fake_in_thread(broken) as fake:
        got = cli(fake, *EXECUTE, "--json")
        assert (got.returncode, got.stderr) == (69, "")
        assert json.loads(got.stdout) == {
            "outcome": "infrastructure error",
            "code": "UNAVAILABLE",
            "error": "node n1 is gone",
            "retryable": True,
            "node_id": "n1",
            "run_id": "r1",
        }
        got = cli(fake, *EXECUTE)
        assert (got.returncode, got.stdout, got.stderr) == (69, "", "afs_cli: node n1 is gone\n")


def test_retries_only_before_output() -> None:
    with fake_in_thread(broken) as fake:
        got = cli(fake, *EXECUTE, "--retries=1")
        assert (got.returncode, got.stdout, len(fake.starts)) == (69, "", 2)
        assert got.stderr == "afs_cli: node n1 is gone; trying again\nafs_cli: node n1 is gone\n"
        got = cli(fake, *EXECUTE, "--retries=1", "--", "x")
        assert (got.returncode, got.stdout, len(fake.starts)) == (69, "output", 3)
        got = cli(fake, *EXECUTE, "--retries=1", "-i", "--", "x")
        assert (got.returncode, len(fake.starts)) == (64, 3)


# Ctrl-C and closed pipes


def slow_to_end(freed: threading.Event, fake: list[FakeAfslet]) -> Any:
    """A run that ends when it was cancelled and *freed* is set."""

    async def script(start: pb.StartRequest, requests: Any, context: Context) -> AsyncIterator[pb.ExecuteResponse]:
        cancelled = fake[0].cancelled["r1"] = asyncio.Event()
        yield accepted("n1", "r1")
        yield log(b"here\n")
        await cancelled.wait()
        await asyncio.to_thread(freed.wait)
        await abort(context, Code.CANCELLED, "the run was cancelled", pb.OUTCOME_CANCELLED)

    return script


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_waits_for_the_node_and_the_second_one_does_not(times: int) -> None:
    freed, fakes = threading.Event(), list[FakeAfslet]()
    with fake_in_thread(slow_to_end(freed, fakes)) as fake:
        fakes.append(fake)
        with started(fake, *EXECUTE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"here\n"
            process.send_signal(signal.SIGINT)
            for _ in range(1000):
                if fake.reasons:
                    break
                with pytest.raises(subprocess.TimeoutExpired):
                    process.wait(0.01)
            assert fake.reasons == ["interrupted"]
            if times == 2:
                process.send_signal(signal.SIGINT)
            else:
                freed.set()
            out, error = process.communicate(timeout=20)
            assert (process.returncode, out) == (76, b"")
            assert error == b"afs_cli: the run of image was cancelled\n"
        freed.set()


@pytest.mark.parametrize("retries", ["0", "3"])
def test_ctrl_c_works_when_the_proxy_cannot_cancel(retries: str, tmp_path: Path) -> None:
    """The call is cancelled instead, and no fault of an interrupted run is tried again."""

    async def script(start: pb.StartRequest, requests: Any, context: Context) -> AsyncIterator[pb.ExecuteResponse]:
        yield accepted("n1", "r1")
        async for _ in requests:  # sent by who has read that the run was accepted
            pass
        started_runs.release()
        await asyncio.Event().wait()

    started_runs = threading.Semaphore(0)
    (tmp_path / "file").write_bytes(b"x")
    with fake_in_thread(script) as fake:
        fake.cancel_fault = DeadlineExceeded("the node is slow")
        with started(fake, *EXECUTE, "--file", f"{tmp_path}/file:/f", "--retries", retries) as process:
            assert started_runs.acquire(timeout=20)
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 76
            assert process.stderr is not None
            assert process.stderr.read() == b"afs_cli: the run of image was cancelled\n"
        assert len(fake.starts) == 1


def test_an_interrupted_run_is_not_tried_again(tmp_path: Path) -> None:
    """The node dies while it is asked to cancel the run."""
    fakes = list[FakeAfslet]()
    (tmp_path / "file").write_bytes(b"x")

    async def script(start: pb.StartRequest, requests: Any, context: Context) -> AsyncIterator[pb.ExecuteResponse]:
        cancelled = fakes[0].cancelled["r1"] = asyncio.Event()
        yield accepted("n1", "r1")
        async for _ in requests:  # sent by who has read that the run was accepted
            pass
        started_runs.release()
        await cancelled.wait()
        await abort(context, Code.UNAVAILABLE, "the node is gone")

    started_runs = threading.Semaphore(0)
    with fake_in_thread(script) as fake:
        fakes.append(fake)
        with started(fake, *EXECUTE, "--file", f"{tmp_path}/file:/f", "--retries", "3") as process:
            assert started_runs.acquire(timeout=20)
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 69
            assert process.stderr is not None
            assert process.stderr.read() == b"afs_cli: the node is gone\n"
        assert len(fake.starts) == 1


async def chatty(start: pb.StartRequest, requests: Any, context: Context) -> AsyncIterator[pb.ExecuteResponse]:
    """Output without end."""
    yield accepted()
    while True:
        yield log(b"y\n" * 32768)


def test_a_reader_that_goes_away_cancels_the_run() -> None:
    with fake_in_thread(chatty) as fake, started(fake, *EXECUTE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert os.read(process.stdout.fileno(), 2) == b"y\n"
        process.stdout.close()
        assert process.stderr.read() == b"afs_cli: nobody reads the output any more: the run of image was cancelled\n"
        assert process.wait(20) == 76


def test_ctrl_c_while_nobody_reads_the_output() -> None:
    with fake_in_thread(chatty) as fake, started(fake, *EXECUTE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert os.read(process.stdout.fileno(), 2) == b"y\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 76
        assert process.stderr.read() == b"afs_cli: the run of image was cancelled\n"


# Terminals


@contextmanager
def terminal() -> Iterator[tuple[int, int]]:
    """A terminal: our side, and the side for a program."""
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (30, 100))
    try:
        yield ours, its
    finally:
        os.close(ours)
        os.close(its)


def test_progress_on_a_terminal() -> None:
    """Shown while the node prepares and sends the diff, and gone before the command's own output."""
    go = threading.Event()
    phases = pb.Progress

    async def script(start: pb.StartRequest, requests: Any, context: Context) -> AsyncIterator[pb.ExecuteResponse]:
        yield pb.ExecuteResponse(progress=phases(phase=phases.PHASE_QUEUED, position=3, queued=4))
        await asyncio.to_thread(go.wait)
        go.clear()
        yield accepted()
        yield pb.ExecuteResponse(progress=phases(phase=phases.PHASE_IMAGE, bytes_done=1 << 20, bytes_total=4 << 20))
        await asyncio.to_thread(go.wait)
        yield pb.ExecuteResponse(progress=phases(phase=phases.PHASE_RUNNING))
        for response in (log(b"output\n"), result(), done()):
            yield response

    with fake_in_thread(script) as fake, terminal() as (ours, its), started(fake, *EXECUTE, stderr=its) as process:
        assert process.stdout is not None
        read_until(ours, b"waiting for room, 3 of 4")
        go.set()
        read_until(ours, b"opening the image")
        go.set()
        assert process.stdout.read() == b"output\n"
        assert process.wait(20) == 0
    with fake_in_thread(say(accepted(), result(), done())) as fake:
        assert cli(fake, *EXECUTE).stderr == "", "no terminal"


def test_a_raw_terminal_is_restored_and_its_size_followed() -> None:
    async def script(start: pb.StartRequest, requests: Any, context: Context) -> AsyncIterator[pb.ExecuteResponse]:
        yield accepted("n1", "r1")
        yield log(f"{start.terminal_size.rows}x{start.terminal_size.columns} ready".encode())
        async for request in requests:
            if request.HasField("terminal_size"):
                yield log(f"{request.terminal_size.rows}x{request.terminal_size.columns}".encode())
            if request.stdin == b"\x03":
                break
        await abort(context, Code.UNAVAILABLE, "node n1 is gone")

    with fake_in_thread(script) as fake, terminal() as (ours, its):
        before = termios.tcgetattr(its)
        streams = {"stdin": its, "stdout": its, "stderr": its, "start_new_session": True}
        with started(fake, *EXECUTE, "-it", **streams) as process:
            read_until(ours, b"30x100 ready")
            assert termios.tcgetattr(its) != before
            termios.tcsetwinsize(ours, (40, 120))
            process.send_signal(signal.SIGWINCH)
            read_until(ours, b"40x120")
            os.write(ours, b"\x03")
            assert b"\r\n" in read_until(ours, b"afs_cli: node n1 is gone\r\n")
            assert process.wait(20) == 69
        assert termios.tcgetattr(its) == before


# The cluster


def nodes(running: int) -> list[proxy_pb2.StatusResponse]:
    """The status of one node."""
    layer = proxy_pb2.LayerInfo(digest="sha256:12", afs_size=1 << 20)
    return [
        proxy_pb2.StatusResponse(
            summary=proxy_pb2.StatusSummary(
                layerstore_instances=1, afslet_instances=1, afslet_reachable=1, total_layers=1, running=running, queued=2
            )
        ),
        proxy_pb2.StatusResponse(
            layerstore=proxy_pb2.LayerstoreInstance(
                node_id="n1", endpoint="h:1", layers=[layer], cached_images=["alpine:3.20 linux/amd64"]
            )
        ),
        proxy_pb2.StatusResponse(
            afslet=proxy_pb2.AfsletInstance(
                node_id="n1", endpoint="h:2", reachable=True, running_containers=running, limit_cpu_cores=4,
                used_cpu_cores=1, limit_memory_mb=4096, used_memory_mb=64, limit_cpu_millis=4000, used_cpu_millis=500,
                draining=True,
            )
        ),
    ]  # fmt: skip


def test_status_once_and_again_and_again() -> None:
    with fake_in_thread() as fake:
        fake.statuses = [nodes(1), nodes(2)]
        assert cli(fake, "status").stdout.splitlines() == [
            "1 layerstores, 1 layers; 1 of 1 afslets answer",
            "1 runs under way, 2 wait for room",
            "layerstore n1 h:1: 1 layers, 1.0 MiB",
            "afslet n1 h:2: 1 running, 0.5 of 4 CPUs, 64 of 4096 MiB in use, draining",
        ]
        lines = [json.loads(line) for line in cli(fake, "status", "--json").stdout.splitlines()]
        assert [list(line) for line in lines] == [["summary"], ["layerstore"], ["afslet"]]
        with started(fake, "status", "--watch", "--interval=10ms") as process:
            assert process.stdout is not None
            read_until(process.stdout.fileno(), b"n1 h:2: 2 running")
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
        with terminal() as (ours, its), started(fake, "status", "--watch", "--interval=10ms", stdout=its) as process:
            read_until(ours, b"draining")
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0


def test_images_runs_and_cancel() -> None:
    with fake_in_thread() as fake:
        fake.statuses = [nodes(1)]
        assert cli(fake, "images").stdout == "alpine:3.20 linux/amd64  n1\n"
        assert json.loads(cli(fake, "images", "--json").stdout) == {"image": "alpine:3.20 linux/amd64", "nodes": ["n1"]}
        assert cli(fake, "images", "--layers").stdout == "sha256:12     1.0 MiB  n1\n"
        fake.listed = [
            runs_pb2.Run(
                run_id="r1", node_id="n1", image="i", command=["sleep", "1"], phase="running", started_unix_ms=1000,
                cpu_millis=500, memory_mb=64, tenant="t", labels={"a": "b"},
            )
        ]  # fmt: skip
        head, row = cli(fake, "runs").stdout.splitlines()
        assert head.split() == ["RUN", "NODE", "PHASE", "SECONDS", "CPUS", "MIB", "TENANT", "IMAGE", "COMMAND"]
        assert re.fullmatch(r"r1 +n1 +running +\d+ +0.5 +64 +t +i +sleep 1", row)
        shown = json.loads(cli(fake, "runs", "--json").stdout)
        assert (shown["run_id"], shown["labels"], shown["command"]) == ("r1", {"a": "b"}, ["sleep", "1"])
        fake.cancelled["r1"] = asyncio.Event()
        assert cli(fake, "cancel", "--reason=enough", "r1").returncode == 0
        assert fake.reasons == ["enough"]
        got = cli(fake, "cancel", "r2")
        assert (got.returncode, got.stderr) == (66, "afs_cli: no run r2\n")


def test_completion() -> None:
    environment = {
        **os.environ,
        "_AFS_CLI_COMPLETE": "bash_complete",
        "COMP_WORDS": "afs_cli execute --im",
        "COMP_CWORD": "2",
    }
    argv = [str(BIN / "afs_cli")]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "plain,--image\n"
