"""Many runs from one client: all of them, bounded in number and in memory, faults in their places, nothing left."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from afs.client import AfsClient, Outcome, RunRejected, RunRequest
from afs.core.errors import InvalidArgument, Unavailable
from tests.testbed.fakeafslet import Context, abort, accepted, done, fake_afslet, log, result

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from afs.proto.v1 import afslet_pb2 as pb


def numbered(count: int) -> Iterator[RunRequest]:
    """Requests whose command is their number."""
    return (RunRequest("image", [str(number)]) for number in range(count))


async def echo(start: pb.StartRequest, requests: Any, context: Context) -> AsyncIterator[pb.ExecuteResponse]:
    """The command's first word."""
    for response in (accepted(), log(start.command[0].encode()), result(), done()):
        yield response


async def test_two_thousand_runs() -> None:
    async with fake_afslet(echo) as fake, AfsClient(fake.address) as client:
        ends = {end.index: end.get().stdout async for end in client.map(numbered(2000), concurrency=50)}
        assert ends == {number: b"%d" % number for number in range(2000)}
        assert fake.most <= 50


async def test_a_thousand_at_once() -> None:
    """All wait at the server at the same time, over connections of at most 100 streams each."""
    everybody = asyncio.Event()

    async def wait(start: pb.StartRequest, requests: Any, context: Context) -> AsyncIterator[pb.ExecuteResponse]:
        if len(fake.starts) == 1000:
            everybody.set()
        await everybody.wait()
        for response in (accepted(), result(), done()):
            yield response

    async with fake_afslet(wait) as fake, AfsClient(fake.address) as client:
        async with asyncio.timeout(60):
            ends = [end async for end in client.map(numbered(1000), concurrency=1000)]
            assert all(end.ok for end in ends)
            assert fake.most == 1000
            assert len(client._connections) == 12, "90 runs for each connection"
            assert (await client.runs()) == []


async def test_async_requests_and_faults_in_their_places() -> None:
    async def some() -> AsyncIterator[RunRequest]:
        for request in numbered(30):
            await asyncio.sleep(0)
            yield request

    async def third(start: pb.StartRequest, requests: Any, context: Context) -> AsyncIterator[pb.ExecuteResponse]:
        if int(start.command[0]) % 3 == 0:
            await abort(context, grpc.StatusCode.INVALID_ARGUMENT, "no threes")
        for response in (accepted(), result(int(start.command[0]) % 3), done()):
            yield response

    async with fake_afslet(third) as fake, AfsClient(fake.address) as client:
        ends = sorted([end async for end in client.map(some(), concurrency=4)], key=lambda end: end.index)
    assert [end.index for end in ends] == list(range(30))
    for end in ends:
        if end.index % 3:
            assert (end.get().exit_code, end.outcome, end.ok) == (end.index % 3, Outcome.EXITED, False)
        else:
            assert (end.result, end.outcome, end.ok) == (None, Outcome.REJECTED, False)
            with pytest.raises(RunRejected, match="no threes"):
                end.get()


async def test_runs_are_tried_again() -> None:
    broken = itertools.count()

    async def every_other(start: pb.StartRequest, requests: Any, context: Context) -> AsyncIterator[pb.ExecuteResponse]:
        if next(broken) % 2 == 0:
            await abort(context, grpc.StatusCode.UNAVAILABLE, "away")
        for response in (accepted(), result(), done()):
            yield response

    async with fake_afslet(every_other) as fake, AfsClient(fake.address) as client:
        ends = [end async for end in client.map(numbered(20), concurrency=1, retry_backoff=0.001)]
        assert [end.get().attempts for end in ends] == [2] * 20
        ends = [end async for end in client.map(numbered(4), concurrency=1, retries=0)]
        assert [(end.error is not None) for end in ends] == [True, False, True, False]
        assert isinstance(ends[0].error, Unavailable)


async def test_a_slow_consumer_stops_new_runs() -> None:
    """Requests are taken from the iterator only as places come free, so it may be endless and results do not pile up."""
    async with fake_afslet(echo) as fake, AfsClient(fake.address) as client:
        endless = (RunRequest("image", [str(number)]) for number in itertools.count())
        async with aclosing(client.map(endless, concurrency=5)) as ends:
            taken = 0
            async for _ in ends:
                taken += 1
                # Each worker holds one, the queue one.
                assert len(fake.starts) <= taken + 6
                if taken == 100:
                    break
        assert len(fake.starts) <= 106


@pytest.mark.parametrize("how", ["close", "cancel"])
async def test_leaving_cancels_all(how: str) -> None:
    started = asyncio.Event()

    async def stuck(start: pb.StartRequest, requests: Any, context: Context) -> AsyncIterator[pb.ExecuteResponse]:
        if fake.under_way == 10:
            started.set()
        if start.command[0] == "0":
            await started.wait()
            for response in (accepted(), result(), done()):
                yield response
            return
        await asyncio.Event().wait()

    async with fake_afslet(stuck) as fake, AfsClient(fake.address) as client:
        ends = client.map(numbered(100), concurrency=10)
        assert (await anext(ends)).index == 0
        if how == "close":
            await ends.aclose()
        else:
            task = asyncio.ensure_future(anext(ends))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        for _ in range(len(fake.starts)):
            await asyncio.wait_for(fake.ended.acquire(), 10)
        assert fake.under_way == 0
        assert len(asyncio.all_tasks()) < 20, "no worker is left"


async def test_what_is_no_fault_of_the_cluster_ends_it_all(tmp_path: Any) -> None:
    def bad() -> Iterator[RunRequest]:
        yield from numbered(3)
        raise KeyError("a bug of the caller")

    async with fake_afslet(echo) as fake, AfsClient(fake.address) as client:
        with pytest.raises(KeyError):
            async for _ in client.map(bad(), concurrency=2):
                pass
        with pytest.raises(FileNotFoundError):
            async for _ in client.map([RunRequest("image", ["x"], diff_to=tmp_path / "no" / "diff")]):
                pass
        with pytest.raises(InvalidArgument, match="concurrency must be positive"):
            await anext(client.map([], concurrency=0))
        assert [end async for end in client.map([])] == []
