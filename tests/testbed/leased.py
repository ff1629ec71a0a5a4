"""What tests of leases and drains do with a cluster: calls read by hand, ends of processes, and what is left of runs."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc.aio
import pytest

from afs.afslet.faults import from_metadata
from afs.core.rpc import EOF, channel
from afs.proto.v1 import afslet_pb2 as pb
from afs.proto.v1.afslet_pb2_grpc import AfsletStub
from afs.proto.v1.runs_pb2_grpc import RunsStub

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from afs.core.cluster import Process
    from tests.testbed.cluster import RealCluster

TTL = 2.0
"""Of the leases of the cluster, in seconds."""
GRACE = 8.0
"""For what takes no time, or the lease's, on a machine with other things to do."""
FOREVER = "echo here; sleep 1000"


async def until(condition: Callable[[], bool], what: str) -> None:
    """Poll for what other processes do without an event for us."""
    deadline = time.monotonic() + GRACE
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not after {GRACE} s"
        await asyncio.sleep(0.02)


async def nothing_left(running: RealCluster) -> None:
    """Wait until there is nothing of any run: no process, cgroup, mount or file."""
    (node,) = running.nodes
    left = list[str]()

    def gone() -> bool:
        left[:] = running.left_by_runs(node)
        return not left

    try:
        await until(gone, "everything is gone")
    except AssertionError as error:
        raise AssertionError(f"{error}: {left}\n{running.log('node1-afslet')[-3000:]}") from None


async def end(process: Process) -> None:
    """SIGKILL it, also if it is stopped, and wait for its end."""
    process.popen.kill()
    await asyncio.to_thread(process.popen.wait, GRACE)


@asynccontextmanager
async def other_flags(running: RealCluster, *flags: str) -> AsyncIterator[None]:
    """Have the node's afslet started anew with these flags besides; afterwards the next start is without them."""
    afslet = running.nodes[0].afslet
    arguments: Any = afslet.popen.args
    await end(afslet)
    await nothing_left(running)
    afslet.popen.args = [*arguments, *flags]
    await running.restart(afslet)
    try:
        yield
    finally:
        if afslet.popen.poll() is None:
            await end(afslet)
        afslet.popen.args = arguments


def keeper_of(process: Process) -> int:
    """The keeper of an afslet."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            command = (path.parent / "cmdline").read_bytes()
        except OSError:  # it ended
            continue
        if parent == process.popen.pid and b"afs.afslet.keeper" in command:
            return int(path.parent.name)
    return 0


@asynccontextmanager
async def runs_of(address: str) -> AsyncIterator[Any]:
    """A node's Runs."""
    async with channel(address) as opened:
        yield RunsStub(opened)


@asynccontextmanager
async def calling(address: str, *requests: pb.ExecuteRequest, **options: Any) -> AsyncIterator[Any]:
    """A call with these requests; cancelled at the end."""
    async with channel(address, shared=False) as opened:
        call = AfsletStub(opened).Execute(**options)
        for request in requests:
            await call.write(request)
        await call.done_writing()
        yield call
        call.cancel()


async def until_log(call: Any) -> pb.Accepted:
    """Read until the command has written something."""
    accepted = pb.Accepted()
    while (response := await call.read()) is not EOF:
        if response.HasField("accepted"):
            accepted = response.accepted
        if response.HasField("log"):
            return accepted
    raise AssertionError(await call.details())


async def fault_of(call: Any) -> tuple[grpc.StatusCode, pb.Result]:
    """Read to the end, which is an error: its code and the Result in its metadata."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        while await call.read() is not EOF:
            pass
    result = from_metadata(caught.value.trailing_metadata())
    assert result is not None, caught.value
    assert result.error == caught.value.details()
    return caught.value.code(), result


async def rest(call: Any) -> AsyncIterator[pb.ExecuteResponse]:
    """What is still to be read of a call."""
    while (response := await call.read()) is not EOF:
        yield response


def kill_sleep(running: RealCluster) -> None:
    """End the sleep of a run, so that its shell goes on."""
    for pid in running.processes_of_runs(running.nodes[0]):
        if b"sleep\x001000" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
            return
    raise AssertionError("nobody sleeps")
