"""The pool of afs_fused processes: deaths, adoption by a new snapshotter, ends."""

import asyncio
import contextlib
import errno
import os
import random
import select
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from afs.core.errors import Internal
from afs.core.mounts import list_mounts, unmount
from afs.snapshotter import fusedworkers
from afs.snapshotter.fusedwire import PROTOCOL, ask
from afs.snapshotter.fusedworker import Worker
from afs.snapshotter.fusedworkers import FusedWorkers
from tests.testbed import tars
from tests.testbed.fillsource import CHUNK, FillSource, SourceLayer
from tests.testbed.fusedpool import bind, make_pool, program, running

pytestmark = pytest.mark.root
# Reads the same file again and again without the page cache; a line per round, or the error's number.
READER = """
import errno, mmap, os, sys
buffer = mmap.mmap(-1, 4096)
fd = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
for line in sys.stdin:
    try:
        print(os.preadv(fd, [buffer], 0), flush=True)
    except OSError as error:
        print(errno.errorcode[error.errno], flush=True)
"""
# Reads pages that are apart from each other, all at once and with no read-ahead.
STALLED = """
import os, sys, threading
fd = os.open(sys.argv[1], os.O_RDONLY)
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
threads = [threading.Thread(target=os.pread, args=(fd, 1, n << 15)) for n in range(int(sys.argv[2]))]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print("done", flush=True)
"""
# A snapshotter that places a layer and then waits to be killed.
OWNER = """
import asyncio, sys
from pathlib import Path
from afs.snapshotter.fusedwire import PROTOCOL
from afs.snapshotter.fusedworkers import FusedWorkers

async def main():
    directory, socket, diff_id = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    pool = FusedWorkers(directory / "fuse", directory / "faults", socket, 30.0, 2)
    await pool.adopt()
    worker = await pool.place(diff_id)
    print(worker.number, worker.pid, *sorted(other.pid for other in pool.workers), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""
GONE = {errno.errorcode[number] for number in (errno.EIO, errno.ENOTCONN, errno.ECONNABORTED)}


@pytest.fixture
async def source(tmp_path: Path) -> AsyncIterator[FillSource]:
    """Serves layers."""
    found = FillSource(tmp_path)
    async with found.serving():
        yield found


@pytest.fixture
def layers(source: FillSource, rng: random.Random) -> list[SourceLayer]:
    """Four small ones."""
    return [source.add(tars.tar_of({"file": rng.randbytes(CHUNK), "n": b"%d" % number})) for number in range(4)]


async def died(worker: Worker) -> None:
    """Wait until the pool knows."""
    try:
        async with asyncio.timeout(10):
            await worker.died.wait()
    except TimeoutError:
        skip_if_held_elsewhere(worker)
        raise


def skip_if_held_elsewhere(worker: Worker) -> None:
    """Mount namespaces that others made on this machine meanwhile have copies of our mounts, which nobody unmounts."""
    ours = os.readlink("/proc/self/ns/mnt")
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (
                os.readlink(process / "ns/mnt") != ours
                and str(worker.mountpoint) in (process / "mountinfo").read_text()
            ):
                pytest.skip(f"the mount namespace of pid {process.name} has a copy of {worker.mountpoint}")


def ended(pidfd: int) -> None:
    """Wait until the process has ended, and close its pidfd."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(10_000), "it goes on"
    os.close(pidfd)


def reap(worker: Worker) -> None:
    """Wait for a worker that a pool gave up: it is a child of this process all the same."""
    assert worker.child is not None
    worker.child.wait(30)


async def replaced(pool: FusedWorkers) -> None:
    """Wait until dead workers have been cleared up after and replaced."""
    await asyncio.gather(*pool._replacing)


async def test_layers_are_spread_and_released(tmp_path: Path, source: FillSource, layers: list[SourceLayer]) -> None:
    async with running(tmp_path, source, count=2) as pool:
        placed = [await pool.place(layer.diff_id) for layer in layers]
        device = (await asyncio.to_thread(placed[0].mountpoint.stat)).st_dev
        bdi = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}")
        assert (bdi / "read_ahead_kb").read_text() == "512\n"
        assert sorted(worker.number for worker in placed) == [0, 0, 1, 1]
        await placed[0].release(layers[0].diff_id)
        assert await pool.place(layers[0].diff_id) is placed[0], "it has the fewest now"


async def test_waiting_readers_of_one_layer_do_not_stop_those_of_another(
    tmp_path: Path, source: FillSource, layers: list[SourceLayer]
) -> None:
    readers = 110  # the kernel's default is 12 buffered reads at once, pyfuse3's 99 requests
    slow = source.add(tars.tar_of({"file": bytes(readers << 15)}), partial=True)
    async with running(tmp_path, source) as pool:
        worker = await pool.place(slow.diff_id)
        await pool.place(layers[0].diff_id)
        slow.gate.clear()
        async with program(STALLED, worker.file(slow.diff_id), readers) as stalled, asyncio.timeout(30):
            while len(slow.asked) < readers:
                slow.questioned.clear()
                await slow.questioned.wait()
            fast = worker.file(layers[0].diff_id)
            assert await asyncio.to_thread(fast.read_bytes) == layers[0].whole.read_bytes()
            slow.gate.set()
            assert await stalled.line() == "done"


async def test_one_of_two_is_killed_while_both_are_read(
    tmp_path: Path, source: FillSource, layers: list[SourceLayer], caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tmp_path, source, count=2) as pool, contextlib.AsyncExitStack() as stack:
        dying, living = [await pool.place(layer.diff_id) for layer in layers[:2]]
        paths = [dying.tree(layers[0].diff_id) / "file", dying.file(layers[0].diff_id)]
        paths += [living.tree(layers[1].diff_id) / "file", living.file(layers[1].diff_id)]
        readers = [await stack.enter_async_context(program(READER, path)) for path in paths]
        for _ in range(3):
            for reader in readers:
                reader.say("read")
            assert [await reader.line() for reader in readers] == ["4096"] * 4
        os.kill(dying.pid, signal.SIGKILL)
        await died(dying)
        assert (dying.alive, living.alive, pool.deaths) == (False, True, 1)
        assert f"afs_fused {dying.number} (pid {dying.pid}) died with status -9; 1 layers were mounted" in caplog.text
        await replaced(pool)
        assert not dying.mountpoint.exists(), "detached and removed"
        for reader in readers:
            reader.say("read")
        found = [await reader.line() for reader in readers]
        assert set(found[:2]) <= GONE
        assert found[2:] == ["4096"] * 2
        again = await pool.place(layers[0].diff_id)
        assert again.number == 2, "a new one, which has the fewest layers"
        assert await asyncio.to_thread((again.tree(layers[0].diff_id) / "n").read_bytes) == b"0"
        assert [mount.source for mount in list_mounts(str(tmp_path))] == [f"afs/{living.number}", "afs/2"]


async def test_the_only_one_is_killed_and_asked_for_at_once(
    tmp_path: Path, source: FillSource, layers: list[SourceLayer]
) -> None:
    async with running(tmp_path, source) as pool:
        first = await pool.place(layers[0].diff_id)
        os.kill(first.pid, signal.SIGKILL)
        os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # noqa: ASYNC222 - on purpose: the loop gets no turn
        assert not first.alive, "known before the event loop had a turn"
        second = await pool.place(layers[0].diff_id)
        assert second.number > first.number
        assert await asyncio.to_thread((second.tree(layers[0].diff_id) / "n").read_bytes) == b"0"
        await died(first)
        await replaced(pool)
        assert pool.find(first.number) is None
        assert pool.find(second.number) is second
        assert len(pool._workers) == 1, "one was wanted, and there was one when the death was noticed"


@contextlib.asynccontextmanager
async def killed_owner(tmp_path: Path, source: FillSource, diff_id: str) -> AsyncIterator[list[int]]:
    """A snapshotter had a pool of two, whose pids are given, and a layer on one of them; then it was killed."""
    async with program(OWNER, tmp_path, source.socket, diff_id) as owner:
        number, _, *pids = map(int, (await owner.line()).split())
        await asyncio.to_thread((tmp_path / "fuse" / str(number) / "t" / diff_id[7:]).stat)
    yield pids


async def test_workers_outlive_a_killed_snapshotter(
    tmp_path: Path, source: FillSource, layers: list[SourceLayer]
) -> None:
    diff_id = layers[0].diff_id
    async with program(OWNER, tmp_path, source.socket, diff_id) as owner:
        number, pid, *pids = map(int, (await owner.line()).split())
        path = tmp_path / "fuse" / str(number) / "t" / diff_id[7:] / "file"
        reader_context = program(READER, path)
        reader = await reader_context.__aenter__()
        try:
            reader.say("read")
            assert await reader.line() == "4096"
            owner.process.kill()
            await owner.process.wait()
            reader.say("read")
            assert await reader.line() == "4096", "nobody owns it, and it serves"
            async with running(tmp_path, source, count=2) as pool:
                found = pool.find(number)
                assert found is not None
                assert (found.pid, found.alive, list(found.layers)) == (pid, True, [diff_id])
                assert sorted(worker.pid for worker in pool.workers) == pids, "none was started"
                reader.say("read")
                assert await reader.line() == "4096"
                assert (await pool.stats())[diff_id].reads >= 3
                assert (await pool.place(layers[1].diff_id)).number != number
                os.kill(pid, signal.SIGKILL)
                await died(found)
                await replaced(pool)
                assert pool.deaths == 1
                assert max(pool._workers) == 2, "numbers ascend"
                reader.say("read")
                assert await reader.line() in GONE
        finally:
            await reader_context.__aexit__(None, None, None)


async def test_what_dead_workers_left_is_cleared(tmp_path: Path, source: FillSource, layers: list[SourceLayer]) -> None:
    async with killed_owner(tmp_path, source, layers[0].diff_id) as pids:
        for pid in pids:
            pidfd = os.pidfd_open(pid)
            os.kill(pid, signal.SIGKILL)
            await asyncio.to_thread(ended, pidfd)
        (tmp_path / "faults" / "x").write_bytes(b".")
        async with running(tmp_path, source) as pool:
            assert list(pool._workers) == [2]
            assert [mount.source for mount in list_mounts(str(tmp_path))] == ["afs/2"]
            assert sorted(path.name for path in (tmp_path / "fuse").iterdir()) == ["1.lock", "2", "2.lock", "2.sock"]
            assert list((tmp_path / "faults").iterdir()) == []
            assert (pool.deaths, await pool.stats()) == (0, {})


async def test_another_version_s_workers_serve_until_they_are_unused(
    tmp_path: Path, source: FillSource, layers: list[SourceLayer], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path, source) as old:
        worker = await old.place(layers[0].diff_id)
        await asyncio.to_thread(bind, worker.tree(layers[0].diff_id), tmp_path / "bound")
        await old.close(keep=[worker])
        monkeypatch.setattr(fusedworkers, "PROTOCOL", PROTOCOL + 1)
        async with running_besides(tmp_path, source) as pool:
            adopted = pool.find(worker.number)
            assert adopted is not None
            assert (adopted.usable, adopted.alive) == (False, True)
            assert (await pool.place(layers[1].diff_id)).number == worker.number + 1
            assert await pool.stats() == {}, "the other one is not asked"
            assert (tmp_path / "bound" / "n").read_bytes() == b"0"
            await asyncio.to_thread(unmount, str(tmp_path / "bound"))
            await died(adopted)
            assert pool.deaths == 0
        reap(worker)


@contextlib.asynccontextmanager
async def running_besides(tmp_path: Path, source: FillSource) -> AsyncIterator[FusedWorkers]:
    """A second pool in the directory of one that gave its workers up."""
    pool = make_pool(tmp_path, source)
    try:
        await pool.adopt()
        yield pool
    finally:
        await pool.close()


async def test_a_worker_that_does_not_answer_is_left_alone(
    tmp_path: Path, source: FillSource, layers: list[SourceLayer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fusedworkers, "_ANSWER_S", 0.05)
    monkeypatch.setattr(fusedworkers, "_START_S", 0.1)
    async with running(tmp_path, source) as old:
        worker = await old.place(layers[0].diff_id)
        await asyncio.to_thread(bind, worker.tree(layers[0].diff_id), tmp_path / "bound")
        await old.close(keep=[worker])
        pidfd = os.pidfd_open(worker.pid)
        os.kill(worker.pid, signal.SIGSTOP)
        async with running_besides(tmp_path, source) as pool:
            assert list(pool._workers) == [worker.number + 1]
            os.kill(worker.pid, signal.SIGCONT)
            assert (tmp_path / "bound" / "n").read_bytes() == b"0"
            await asyncio.to_thread(unmount, str(tmp_path / "bound"))
            try:
                await asyncio.to_thread(ended, pidfd)
            except AssertionError:
                skip_if_held_elsewhere(worker)
                raise
        reap(worker)


@pytest.mark.parametrize("change", [{"pid": 1 << 22}, {"pid": "x"}, {"pid": None}, {"layers": 3}, {"nothing": 1}])
async def test_a_worker_that_says_nonsense_is_left_alone(
    tmp_path: Path, source: FillSource, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    """Above all the start goes on."""
    async with killed_owner(tmp_path, source, source.add(tars.tar_of({"n": b"0"})).diff_id) as pids:

        async def nonsense(path: Path, timeout_s: float, **message: object) -> dict[str, Any]:
            answer = await ask(path, timeout_s, **message)
            return change if "nothing" in change else {**answer, **change}

        pidfds = [os.pidfd_open(pid) for pid in pids]
        with monkeypatch.context() as patched:
            patched.setattr(fusedworkers, "_START_S", 0.0)
            patched.setattr(fusedworkers, "ask", nonsense)
            async with running(tmp_path, source) as pool:
                assert list(pool._workers) == [2]
        for pidfd in pidfds:
            await asyncio.to_thread(ended, pidfd)


async def test_a_worker_ends_when_everybody_has_unmounted_it(
    tmp_path: Path, source: FillSource, layers: list[SourceLayer]
) -> None:
    async with running(tmp_path, source) as pool:
        worker = await pool.place(layers[0].diff_id)
        await asyncio.to_thread(bind, worker.tree(layers[0].diff_id), tmp_path / "bound")
        await asyncio.to_thread(unmount, str(worker.mountpoint))
        assert (tmp_path / "bound" / "n").read_bytes() == b"0"
        assert worker.alive
        await asyncio.to_thread(unmount, str(tmp_path / "bound"))
        await died(worker)
        await replaced(pool)
        assert (await pool.place(layers[0].diff_id)).number == worker.number + 1


async def test_a_worker_that_somebody_unmounted_is_replaced(
    tmp_path: Path, source: FillSource, layers: list[SourceLayer]
) -> None:
    async with running(tmp_path, source) as pool:
        worker = await pool.place(layers[0].diff_id)
        await asyncio.to_thread(bind, worker.tree(layers[0].diff_id), tmp_path / "bound")
        await asyncio.to_thread(unmount, str(worker.mountpoint))
        other = await pool.place(layers[1].diff_id)
        assert other.number == worker.number + 1
        assert await asyncio.to_thread((other.tree(layers[1].diff_id) / "n").read_bytes) == b"1"
        assert (tmp_path / "bound" / "n").read_bytes() == b"0", "what was mounted goes on"
        assert (worker.alive, pool.deaths) == (True, 0)
        await asyncio.to_thread(unmount, str(tmp_path / "bound"))
        await worker.release(layers[0].diff_id)
        await died(worker)
        await replaced(pool)
        assert (pool.deaths, pool.workers) == (0, [other])


async def test_a_worker_that_does_not_start(
    tmp_path: Path, source: FillSource, layers: list[SourceLayer], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path, source) as pool:
        worker = await pool.place(layers[0].diff_id)
        with monkeypatch.context() as patched:
            patched.setattr(sys, "executable", "/bin/false")
            os.kill(worker.pid, signal.SIGKILL)
            await died(worker)
            await replaced(pool)
            with pytest.raises(Internal, match="afs_fused did not start: status 1"):
                await pool.place(layers[0].diff_id)
            assert [path.suffix for path in (tmp_path / "fuse").iterdir()] == [".lock"] * 3
        assert (await pool.place(layers[0].diff_id)).alive


async def test_a_worker_that_is_not_ready_in_time(
    tmp_path: Path, source: FillSource, layers: list[SourceLayer], monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging = tmp_path / "hanging"
    hanging.write_text("#!/bin/sh\nexec sleep 600\n")
    hanging.chmod(0o755)
    pool = make_pool(tmp_path, source)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "executable", str(hanging))
        patched.setattr(fusedworkers, "_READY_S", 0.05)
        with pytest.raises(Internal, match=r"afs_fused did not start within 0\.05 s"):
            await pool.place(layers[0].diff_id)
    assert pool.workers == []
    await pool.close()


async def test_workers_that_die_soon_are_replaced_ever_later(
    tmp_path: Path, source: FillSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses = [fusedworkers._pause_s(row) for row in (0, 1, 2, 3, 7, 8, 9, 5000)]
    assert pauses == [0, 0, 1, 2, 32, 64, 64, 64]
    rows: list[int] = []

    def note(row: int) -> float:
        rows.append(row)
        return 0.0

    monkeypatch.setattr(fusedworkers, "_pause_s", note)
    async with running(tmp_path, source) as pool:
        for stable_s in (60.0, 60.0, 0.0, 60.0):
            monkeypatch.setattr(fusedworkers, "_STABLE_S", stable_s)
            (worker,) = pool.workers
            os.kill(worker.pid, signal.SIGKILL)
            await died(worker)
            await replaced(pool)
        assert rows == [1, 2, 0, 1]


async def test_workers_that_are_kept_go_to_the_next_pool(
    tmp_path: Path, source: FillSource, layers: list[SourceLayer]
) -> None:
    async with running(tmp_path, source, count=2) as first:
        kept = await first.place(layers[0].diff_id)
        await asyncio.to_thread((kept.tree(layers[0].diff_id) / "n").read_bytes)
        await first.close(keep=[kept])
        assert [mount.source for mount in list_mounts(str(tmp_path))] == [f"afs/{kept.number}"]
        async with running_besides(tmp_path, source) as second:
            found = second.find(kept.number)
            assert found is not None
            assert (found.pid, found.layers[layers[0].diff_id]) == (kept.pid, 1)
        reap(kept)
