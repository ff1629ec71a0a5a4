"""What a request may say about its process and its limits, through every service."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import struct
import tempfile
from typing import TYPE_CHECKING

import pytest

from afs.client import Finished, InfrastructureError, Log, Outcome
from afs.core.errors import InvalidArgument
from tests.testbed.cluster import cluster

if TYPE_CHECKING:
    from pathlib import Path

    from afs.client import AfsClient, RunResult
    from tests.testbed.cluster import RealCluster
    from tests.testbed.images import BusyboxImage

pytestmark = pytest.mark.root


async def shell(cluster: RealCluster, image: str, script: str, **options: object) -> RunResult:
    """A shell script's result."""
    async with cluster.client() as client:
        return await client.run(image, ["sh", "-c", script], memory_mb=64, **options)  # type: ignore[arg-type]


async def test_who_and_where(shared_cluster: RealCluster, busybox_image: BusyboxImage) -> None:
    script = "id -u; id -g; id -G; pwd; hostname; echo $HOSTNAME $HOME"
    options = {"user": "1000:5", "groups": ["7", "2000"], "cwd": "/made/here", "hostname": "some-name"}
    result = await shell(shared_cluster, busybox_image.reference, script, **options)
    assert result.stdout.decode().split("\n")[:5] == ["1000", "5", "5 7 2000", "/made/here", "some-name"], result
    assert b"some-name /" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"user": "nobody-such"}, "user 'nobody-such' is not in its /etc/passwd"),
        ({"groups": ["none-such"]}, "group 'none-such' is not in its /etc/group"),
        ({"cwd": "relative"}, "cwd 'relative' is not an absolute path"),
        ({"cwd": "/data/hello.txt"}, "its working directory /data/hello.txt is not a directory"),
        ({"hostname": "-bad"}, "hostname '-bad' is not one"),
        ({"pids_limit": 3}, "pids_limit must be at least 16"),
        ({"pids_limit": 1 << 20}, "1048576 processes asked for"),
        ({"disk_mb": 1 << 20}, "1048576 MiB of disk asked for"),
    ],
)
async def test_what_cannot_be(
    shared_cluster: RealCluster, busybox_image: BusyboxImage, options: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await shell(shared_cluster, busybox_image.reference, "true", **options)
    assert message in caught.value.line


async def test_fractions_of_a_cpu(shared_cluster: RealCluster, busybox_image: BusyboxImage) -> None:
    script = "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done"
    result = await shell(shared_cluster, busybox_image.reference, script, cpu=0.25)
    assert result.ok, result
    assert result.cpu_time <= result.timings["run"] * 0.25 + 0.1


async def test_sixteen_quarters_of_a_cpu_fit_on_a_node(
    shared_cluster: RealCluster, busybox_image: BusyboxImage
) -> None:
    async with shared_cluster.client() as client:

        async def one() -> None:
            async for event in client.execute(
                busybox_image.reference, ["sh", "-c", "echo up; sleep 1000"], cpu=0.25, memory_mb=16, node_id="node1"
            ):
                if isinstance(event, Log):
                    await asyncio.wait_for(together.wait(), 30)
                    return

        together = asyncio.Barrier(16)
        await asyncio.gather(*(one() for _ in range(16)))


async def test_processes_are_limited(shared_cluster: RealCluster, busybox_image: BusyboxImage) -> None:
    script = "for i in $(seq 20); do sleep 1000 & done; true"
    result = await shell(shared_cluster, busybox_image.reference, script, pids_limit=16)
    assert b"can't fork" in result.stderr
    assert result.outcome is Outcome.EXITED


async def test_what_is_written_is_limited(shared_cluster: RealCluster, busybox_image: BusyboxImage) -> None:
    script = "dd if=/dev/zero of=/big bs=1M count=64; ls -l /big"
    result = await shell(shared_cluster, busybox_image.reference, script, disk_mb=16)
    assert b"No space left on device" in result.stderr
    size = int(result.stdout.split()[4])
    assert 12 << 20 < size <= 17 << 20


async def test_output_is_capped_per_stream(shared_cluster: RealCluster, busybox_image: BusyboxImage) -> None:
    script = "dd if=/dev/zero bs=1000 count=1000 2> /dev/null; echo kept >&2; exit 3"
    async with shared_cluster.client() as client:
        events = [
            event
            async for event in client.execute(
                busybox_image.reference, ["sh", "-c", script], memory_mb=64, max_output_bytes=5000
            )
        ]
    out = [event for event in events if isinstance(event, Log) and event.source == "stdout"]
    assert sum(len(event.data) for event in out) == 5000
    assert [event.truncated for event in out] == [False] * (len(out) - 1) + [True]
    finished = next(event for event in events if isinstance(event, Finished))
    assert finished.exit_code == 3
    assert (finished.stdout_bytes, finished.stdout_dropped) == (1000_000, 995_000)
    assert (finished.stderr_bytes, finished.stderr_dropped) == (5, 0)


async def test_the_grace_is_the_request_s(shared_cluster: RealCluster, busybox_image: BusyboxImage) -> None:
    script = "trap 'sleep 0.3; echo cleaned; exit 9' TERM; echo ready; while :; do sleep 0.05; done"
    result = await shell(shared_cluster, busybox_image.reference, script, timeout=1.0, term_grace=60)
    assert (result.outcome, result.exit_code) == (Outcome.TIMED_OUT, 124)
    assert result.stdout == b"ready\ncleaned\n"


async def test_phases_are_timed(shared_cluster: RealCluster, busybox_image: BusyboxImage) -> None:
    result = await shell(shared_cluster, busybox_image.reference, "echo x > /made; sleep 0.2")
    assert {"image", "run", "diff"} <= result.timings.keys(), result.timings
    assert result.timings["run"] >= 0.2
    assert result.peak_memory > 0
    assert result.node_id in {"node1", "node2"}


async def cancel_when_it_runs(client: AfsClient, image: str) -> None:
    """Leave a run whose command has begun."""
    async with client.open(image, ["sh", "-c", "echo up; sleep 1000"], memory_mb=64) as run:
        async for event in run:
            if isinstance(event, Log):
                return


async def test_leaving_early_cancels(shared_cluster: RealCluster, busybox_image: BusyboxImage) -> None:
    async with shared_cluster.client() as client:
        await cancel_when_it_runs(client, busybox_image.reference)
    # The fixture looks: nothing is left on either node.


# Exits with 7 by way of int 0x80: the smallest static program for 32 bits.
I386 = (
    b"\x7fELF\x01\x01\x01" + bytes(9) + struct.pack("<HHIIIIIHHHHHH", 2, 3, 1, 0x8048054, 52, 0, 0, 52, 32, 1, 0, 0, 0)
    + struct.pack("<IIIIIIII", 1, 0, 0x8048000, 0x8048000, 96, 96, 5, 4096)
    + b"\xb8\x01\x00\x00\x00\xbb\x07\x00\x00\x00\xcd\x80"
)  # fmt: skip


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="programs for i386")
async def test_32bit_programs_run_where_they_are_expected(
    shared_cluster: RealCluster, busybox_image: BusyboxImage, tmp_path: Path
) -> None:
    (tmp_path / "tool").write_bytes(I386)
    (tmp_path / "tool").chmod(0o755)
    image = busybox_image.reference
    async with shared_cluster.client() as client:
        itself = await client.run(image, ["/tool"], memory_mb=64, upload=tmp_path)
        assert (itself.outcome, itself.exit_code) == (Outcome.EXITED, 7), itself
        unexpected = await client.run(image, ["sh", "-c", "/tool; exit $?"], memory_mb=64, upload=tmp_path)
        assert unexpected.exit_code == 128 + signal.SIGSYS
        (tmp_path / "lib").mkdir()
        (tmp_path / "lib/ld-linux.so.2").touch()
        expected = await client.run(image, ["sh", "-c", "/tool; exit $?"], memory_mb=64, upload=tmp_path)
        assert expected.exit_code == 7


def test_a_full_disk_of_the_node_is_no_result(busybox_image: BusyboxImage) -> None:
    """Of the run's own 10 GiB it gets 256 MiB, for the snapshotter has to leave the rest of the disk alone."""
    free = shutil.disk_usage(tempfile.gettempdir()).free
    script = "dd if=/dev/zero of=/big bs=1M count=2048"
    with (
        cluster(1, snapshotter_flags=(f"--reserve={free - (256 << 20)}",)) as running,
        running.sync_client() as client,
        pytest.raises(InfrastructureError, match="the node's disk was full during the run") as caught,
    ):
        client.run(busybox_image.reference, ["sh", "-c", script], memory_mb=64, retries=0)
    assert caught.value.retryable
