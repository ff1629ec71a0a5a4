"""Whoever vanishes or stops during a run, nothing of it is left after the lease's time to live."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import tarfile
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import grpc
import pytest

from afs.core.cluster import start_process
from afs.core.rpc import EOF
from afs.proto.v1 import afslet_pb2 as pb
from tests.testbed import capabilities, leaks, netns
from tests.testbed.cluster import BIN
from tests.testbed.leaseclient import BRIDGED, PHASES, TALKING, reached, start
from tests.testbed.leased import GRACE, calling, end, fault_of, keeper_of, nothing_left, other_flags, until

if TYPE_CHECKING:
    import random
    from collections.abc import AsyncIterator

    from afs.core.cluster import Process
    from tests.testbed.cluster import RealCluster
    from tests.testbed.images import BusyboxImage

pytestmark = pytest.mark.root
KILL, STOP = signal.SIGKILL, signal.SIGSTOP
HOW = [pytest.param(KILL, id="killed"), pytest.param(STOP, id="stopped")]


def slow_unless(phase: str, how: signal.Signals) -> Any:
    """A stopped process costs the lease's time, so but for one phase that is slow."""
    marks = [pytest.mark.slow] if how is STOP and phase != "run" else []
    return pytest.param(phase, how, id=f"{phase}-{'stopped' if how is STOP else 'killed'}", marks=marks)


EVERY = pytest.mark.parametrize(("phase", "how"), [slow_unless(phase, how) for how in (KILL, STOP) for phase in PHASES])


@EVERY
async def test_client(leased: RealCluster, busybox_image: BusyboxImage, phase: str, how: signal.Signals) -> None:
    """Its kernel acknowledges what comes, stopped or not."""
    async with reached(leased.proxy, busybox_image.reference, phase) as client:
        assert leased.left_by_runs(leased.nodes[0])
        client.send_signal(how)
        await nothing_left(leased)


@EVERY
async def test_client_of_a_node(
    leased: RealCluster, busybox_image: BusyboxImage, phase: str, how: signal.Signals
) -> None:
    async with reached(leased.nodes[0].afslet.address, busybox_image.reference, phase) as client:
        client.send_signal(how)
        await nothing_left(leased)


@EVERY
async def test_proxy(leased: RealCluster, busybox_image: BusyboxImage, phase: str, how: signal.Signals) -> None:
    proxy = leased.cluster.proxy
    assert proxy is not None
    async with reached(leased.proxy, busybox_image.reference, phase):
        proxy.popen.send_signal(how)
        await nothing_left(leased)
        await end(proxy)


@EVERY
async def test_afslet(leased: RealCluster, busybox_image: BusyboxImage, phase: str, how: signal.Signals) -> None:
    """Its keeper sees to it, also if it does not move any more."""
    afslet = leased.nodes[0].afslet
    async with reached(leased.proxy, busybox_image.reference, phase):
        afslet.popen.send_signal(how)
        assert await asyncio.to_thread(afslet.popen.wait, GRACE) == -KILL
        await nothing_left(leased)
    directory = leased.nodes[0].directory
    assert not (directory / "afslet/runs").exists()
    assert not (directory / "run/runtime").exists()


@EVERY
async def test_snapshotter(leased: RealCluster, busybox_image: BusyboxImage, phase: str, how: signal.Signals) -> None:
    """Mounts are its own business, so they go when it goes on, or with the next one."""
    node = leased.nodes[0]
    mine = (str(node.directory / "snapshotter"), f"mount {node.directory / 'snapshotter'}")
    async with reached(leased.proxy, busybox_image.reference, phase):
        node.snapshotter.popen.send_signal(how)
        await until(lambda: all(left.startswith(mine) for left in leased.left_by_runs(node)), "the run is ended")
    if how is STOP:
        node.snapshotter.popen.send_signal(signal.SIGCONT)
    else:
        await asyncio.to_thread(node.snapshotter.popen.wait, GRACE)
        await leased.restart(node.snapshotter)
    await nothing_left(leased)


async def test_command_that_is_stopped(leased: RealCluster, busybox_image: BusyboxImage) -> None:
    node = leased.nodes[0]
    async with reached(leased.proxy, busybox_image.reference, "run") as client:
        for pid in leased.processes_of_runs(node):
            os.kill(pid, STOP)
        client.kill()
        await nothing_left(leased)


@pytest.mark.parametrize("who", ["client", "afslet", "runtime"])
async def test_runtime_that_hangs(leased: RealCluster, busybox_image: BusyboxImage, tmp_path: Path, who: str) -> None:
    """It is in no cgroup of the run, and nobody waits for it when its afslet was killed."""
    node = leased.nodes[0]
    runtime = tmp_path / "runc"
    runtime.write_text('#!/bin/sh\nkill -STOP $$\nexec /usr/sbin/runc "$@"\n')
    runtime.chmod(0o755)
    async with (
        other_flags(leased, f"--runtime={runtime}"),
        calling(node.afslet.address, start(busybox_image.reference, "true")) as call,
    ):
        await until(lambda: bool(leased.runtimes(node)), "the runtime is started")
        (pid,) = leased.runtimes(node)
        if who == "client":
            call.cancel()
        elif who == "afslet":
            await end(node.afslet)
        else:
            os.kill(pid, KILL)
            code, result = await fault_of(call)
            assert (code, result.outcome) == (grpc.StatusCode.INTERNAL, pb.OUTCOME_INFRASTRUCTURE_ERROR)
            assert result.error == "the runtime runc was killed by signal 9"
        await nothing_left(leased)


@pytest.mark.parametrize("how", HOW)
async def test_keeper(leased: RealCluster, busybox_image: BusyboxImage, how: signal.Signals) -> None:
    """Runs do not notice, and there is another one soon."""
    node = leased.nodes[0]
    keeper = keeper_of(node.afslet)
    async with reached(leased.proxy, busybox_image.reference, "run"):
        os.kill(keeper, how)
        await until(lambda: keeper_of(node.afslet) not in (0, keeper), "another one is there")
        assert leased.processes_of_runs(node)
        await end(node.afslet)
        await nothing_left(leased)


async def test_afslet_and_keeper(leased: RealCluster, busybox_image: BusyboxImage) -> None:
    """Then it is the next afslet that clears up, before it serves."""
    node = leased.nodes[0]
    async with reached(leased.proxy, busybox_image.reference, "run"):
        os.kill(keeper_of(node.afslet), KILL)
        await end(node.afslet)
        assert leased.processes_of_runs(node)
        await leased.restart(node.afslet)
        assert not leased.left_by_runs(node)
        assert "killed 1 runs that an earlier afslet left" in leased.log("node1-afslet")


async def test_the_next_afslet_starts_while_the_keeper_clears_up(
    leased: RealCluster, busybox_image: BusyboxImage
) -> None:
    node = leased.nodes[0]
    for _ in range(3):
        async with reached(node.afslet.address, busybox_image.reference, "run"):
            await end(node.afslet)
            await leased.restart(node.afslet)
            assert not leased.left_by_runs(node)
        async with reached(node.afslet.address, busybox_image.reference, "run"):
            assert leased.processes_of_runs(node), "no keeper of an earlier afslet ends it"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
async def test_a_service_manager_s_signals_do_not_end_the_keeper(leased: RealCluster, signum: signal.Signals) -> None:
    keeper = keeper_of(leased.nodes[0].afslet)
    os.kill(keeper, signum)
    assert os.getsid(keeper) == keeper
    assert keeper_of(leased.nodes[0].afslet) == keeper
    assert int(Path(f"/proc/{keeper}/status").read_text().partition("VmRSS:")[2].split()[0]) < 14000, "KiB"


async def test_client_that_stops_reading(leased: RealCluster, busybox_image: BusyboxImage) -> None:
    """Behind a full window no ping gets through."""
    async with reached(leased.nodes[0].afslet.address, busybox_image.reference, TALKING) as client:
        client.send_signal(STOP)
        await nothing_left(leased)


@asynccontextmanager
async def afslet_on(host: netns.Host, running: RealCluster, *flags: str) -> AsyncIterator[Process]:
    """The node's afslet on a host of its own instead, with more `flags`."""
    afslet = running.nodes[0].afslet
    afslet.popen.terminate()
    await asyncio.to_thread(afslet.popen.wait, GRACE)
    arguments = [*map(str, cast("list[str]", afslet.popen.args)[3:]), f"--listen={host.address}:61051", "--insecure"]
    arguments += flags
    remote = await start_process("remote-afslet", "afs.afslet", arguments, running.directory, prefix=host.prefix)
    with leaks.exempt(pids=[remote.popen.pid]):
        try:
            yield remote
        finally:
            remote.popen.terminate()
            await asyncio.to_thread(remote.popen.wait, GRACE)


@pytest.mark.parametrize("side", ["client", "node"])
async def test_a_link_is_cut(leased: RealCluster, busybox_image: BusyboxImage, side: str) -> None:
    """Nobody is told."""
    capabilities.require("netns")
    with netns.hosts([1, 2]) as hosts:
        async with (
            afslet_on(hosts[1], leased) as afslet,
            reached(afslet.address, busybox_image.reference, "run", hosts[2].prefix),
        ):
            assert leased.processes_of_runs(leased.nodes[0])
            hosts[2 if side == "client" else 1].cut()
            await nothing_left(leased)


async def test_a_run_on_the_bridge(leased: RealCluster, busybox_image: BusyboxImage, tmp_path: Path) -> None:
    """It reaches what operator and request allow, not its node, and what the runtime mounts on is not in its diff."""
    capabilities.require("netns")
    with netns.hosts([1, 2]) as hosts:
        there = hosts[2].address
        server = hosts[2].call(lambda: socket.create_server((there, 8080)))

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"hello\n")

        script = (
            f"nc {there} 8080; nc {there} 8081 || echo closed; nc {hosts[1].address} 61051 || echo closed; touch /made"
        )
        with server:
            async with afslet_on(hosts[1], leased, f"--egress-allow={there}") as afslet:
                answering = asyncio.create_task(asyncio.to_thread(answer))
                flags = ["--network=bridge", f"--allow={there}:8080", f"--out={tmp_path}/diff.tar.gz", "--memory-mb=64"]
                argv = [
                    str(BIN / "afs_cli"),
                    "execute",
                    f"--proxy={afslet.address}",
                    f"--image={busybox_image.reference}",
                ]
                out = await asyncio.to_thread(hosts[1].run, *argv, *flags, "--", "sh", "-c", script)
                await answering
        assert out == "hello\nclosed\nclosed\n"
    with tarfile.open(tmp_path / "diff.tar.gz") as tar:
        assert {"etc/hosts", "etc/resolv.conf"}.isdisjoint(tar.getnames())
        assert "made" in tar.getnames()


async def test_networks_of_a_killed_afslet(leased: RealCluster, busybox_image: BusyboxImage) -> None:
    capabilities.require("netns")
    with netns.hosts([1]) as hosts:

        def there() -> list[str]:
            text = hosts[1].run("ip", "-brief", "link") + hosts[1].run("nft", "list", "tables")
            return [line for line in text.splitlines() if "afs" in line]

        async with (
            afslet_on(hosts[1], leased) as afslet,
            reached(afslet.address, busybox_image.reference, BRIDGED, hosts[1].prefix),
        ):
            assert there()
            await end(afslet)
            await nothing_left(leased)
            await until(lambda: not there(), "interfaces and tables are gone")


async def test_runs_that_are_ended_at_any_moment(
    leased: RealCluster, busybox_image: BusyboxImage, rng: random.Random
) -> None:
    address = leased.nodes[0].afslet.address

    async def once(pause: float) -> None:
        async with calling(address, start(busybox_image.reference, "echo here; touch /new", cpu_millis=100)) as call:

            async def read() -> None:
                while await call.read() is not EOF:
                    pass

            reading = asyncio.create_task(read())
            await asyncio.wait([reading], timeout=pause)
            call.cancel()
            await asyncio.wait([reading])
            if not reading.cancelled():
                reading.exception()

    for _ in range(10):
        await asyncio.gather(*(once(rng.uniform(0, 0.3)) for _ in range(5)))
    await nothing_left(leased)
    await asyncio.to_thread(leased.assert_idle)
