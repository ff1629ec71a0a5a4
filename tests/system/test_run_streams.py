"""Talking with a run: standard input and terminals, from the SDK and from afs_cli, through every service."""

from __future__ import annotations

import asyncio
import os
import pty
import re
import subprocess
import termios
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from afs.client import Log, RunCancelled, RunEnded
from tests.testbed.cluster import BIN

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.testbed.cluster import RealCluster
    from tests.testbed.images import BusyboxImage

pytestmark = pytest.mark.root


async def output_until(run: Any, text: bytes) -> bytes:
    """Output up to *text*."""
    got = b""
    while text not in got:
        event = await anext(run)
        if isinstance(event, Log):
            got += event.data
    return got


async def test_lines_go_in_and_come_out(shared_cluster: RealCluster, busybox_image: BusyboxImage) -> None:
    script = 'while read line; do echo "got $line"; done; echo end'
    command = ["sh", "-c", script]
    async with shared_cluster.client() as client, client.open(busybox_image.reference, command, stdin=True) as run:
        for word in (b"one", b"two"):
            await run.write(word + b"\n")
            assert await output_until(run, b"\n") == b"got " + word + b"\n"
        await run.write(b"last\n")
        await run.close_stdin()
        result = await run.result()
    assert (result.exit_code, result.stdout, result.stderr) == (0, b"got last\nend\n", b"")


async def test_bytes_come_back_whole(shared_cluster: RealCluster, busybox_image: BusyboxImage) -> None:
    data = bytes(range(256)) * 16384
    async with shared_cluster.client() as client, client.open(busybox_image.reference, ["cat"], stdin=True) as run:

        async def feed() -> None:
            await run.write(data)
            await run.close_stdin()

        feeding = asyncio.create_task(feed())
        result = await run.result()
        await feeding
    assert result.stdout == data


async def test_without_stdin_it_is_empty(shared_cluster: RealCluster, busybox_image: BusyboxImage) -> None:
    async with shared_cluster.client() as client:
        result = await client.run(busybox_image.reference, ["cat"])
    assert (result.exit_code, result.stdout) == (0, b"")


async def test_input_after_an_upload(shared_cluster: RealCluster, busybox_image: BusyboxImage, tmp_path: Any) -> None:
    (tmp_path / "f").write_bytes(b"file\n")
    async with (
        shared_cluster.client() as client,
        client.open(busybox_image.reference, ["cat", "/f", "-"], stdin=True, upload=tmp_path) as run,
    ):
        await run.write(b"input\n")
        await run.close_stdin()
        assert (await run.result()).stdout == b"file\ninput\n"


async def test_a_command_that_ends_without_reading(shared_cluster: RealCluster, busybox_image: BusyboxImage) -> None:
    async with shared_cluster.client() as client, client.open(busybox_image.reference, ["true"], stdin=True) as run:
        with pytest.raises(RunEnded):
            while True:
                await run.write(b"x" * 65536)
                if run.finished is None:
                    await anext(run)
        assert (await run.result()).ok


async def test_a_terminal_and_its_size(shared_cluster: RealCluster, busybox_image: BusyboxImage) -> None:
    script = "stty size; trap 'stty size; exit 0' WINCH; echo ready; while :; do read line; done"
    async with shared_cluster.client() as client:
        command = ["sh", "-c", script]
        async with client.open(busybox_image.reference, command, stdin=True, tty=True, terminal_size=(31, 101)) as run:
            assert (await output_until(run, b"ready")).startswith(b"31 101\r\n")
            await run.resize(43, 97)
            result = await run.result()
    assert (result.exit_code, result.stderr) == (0, b"")
    assert b"43 97\r\n" in result.stdout


async def test_ctrl_c_at_a_terminal_reaches_the_command(
    shared_cluster: RealCluster, busybox_image: BusyboxImage
) -> None:
    script = "trap 'echo caught; exit 9' INT; echo ready; while :; do sleep 0.1; done"
    async with (
        shared_cluster.client() as client,
        client.open(busybox_image.reference, ["sh", "-c", script], stdin=True, tty=True) as run,
    ):
        await output_until(run, b"ready")
        await run.write(b"\x03")
        result = await run.result()
    assert result.exit_code == 9
    assert b"caught" in result.stdout


async def test_cancelling_gives_everything_back(shared_cluster: RealCluster, busybox_image: BusyboxImage) -> None:
    async with shared_cluster.client() as client:
        command = ["sh", "-c", "echo here; sleep 1000"]
        async with client.open(busybox_image.reference, command) as run:
            await output_until(run, b"here")
            await run.cancel()
            with pytest.raises(RunCancelled):
                await run.result()
    assert await asyncio.to_thread(shared_cluster.busy) == []


# afs_cli


def test_cli_pipes_stdin(shared_cluster: RealCluster, busybox_image: BusyboxImage) -> None:
    done = shared_cluster.cli(
        "execute", "-i", "--image", busybox_image.reference, "--", "tr", "a-z", "A-Z", input="some text\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "SOME TEXT\n", "")


@contextmanager
def at_a_terminal(cluster: RealCluster, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], int, int]]:
    """afs_cli on a terminal of its own: the process, our side of it, and the side that it has."""
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (31, 101))
    environment = {**os.environ, "AFS_PROXY": cluster.proxy}
    argv = [str(BIN / "afs_cli"), *arguments]
    with subprocess.Popen(argv, stdin=its, stdout=its, stderr=its, env=environment, start_new_session=True) as process:
        try:
            yield process, ours, its
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            os.close(ours)
            os.close(its)


def read_until(fd: int, text: bytes) -> bytes:
    """What comes on *fd* up to *text*."""
    got = b""
    while text not in got:
        data = os.read(fd, 4096)
        assert data, got
        got += data
    return got


def test_cli_at_a_terminal(shared_cluster: RealCluster, busybox_image: BusyboxImage) -> None:
    script = "stty size; echo ready; read line; echo got $line; exit 6"
    command = ["execute", "-it", "--image", busybox_image.reference, "--", "sh", "-c", script]
    with at_a_terminal(shared_cluster, *command) as (process, ours, its):
        before = termios.tcgetattr(its)
        assert re.search(rb"31 101\r\nready", read_until(ours, b"ready"))
        assert termios.tcgetattr(its) != before, "raw"
        os.write(ours, b"word\r")
        read_until(ours, b"got word")
        assert process.wait(20) == 6
        assert termios.tcgetattr(its) == before
