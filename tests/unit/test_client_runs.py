"""The asyncio client against a server that follows a script: events, errors, retries, cancellation, back-pressure."""

from __future__ import annotations

import asyncio
import pickle
import socket
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, cast

import grpc
import pytest

from afs.client import (
    Accepted,
    AfsClient,
    DiffChunk,
    DiffStart,
    Done,
    Finished,
    InfrastructureError,
    Log,
    Outcome,
    Progress,
    Queued,
    RunCancelled,
    RunError,
    RunRejected,
    RunRequest,
    Upload,
)
from afs.core.errors import (
    AfsError,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from afs.proto.v1 import afslet_pb2 as pb
from tests.testbed.fakeafslet import Context, Script, abort, accepted, diff, done, fake_afslet, log, result

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

Requests = "AsyncIterator[pb.ExecuteRequest]"
Code = grpc.StatusCode


def script(*responses: pb.ExecuteResponse) -> Script:
    """Say *responses*; those after `accepted` when the client has sent everything."""

    async def say(start: pb.StartRequest, requests: Any, context: Context) -> AsyncIterator[pb.ExecuteResponse]:
        for response in responses:
            yield response
            if response.HasField("accepted"):
                async for _ in requests:
                    pass

    return say


def failing(times: int, code: Code, *before: pb.ExecuteResponse, outcome: Any = None, **fields: Any) -> Script:
    """Fail *times* times after *before*, then succeed."""
    left = times

    async def say(start: pb.StartRequest, requests: Any, context: Context) -> AsyncIterator[pb.ExecuteResponse]:
        nonlocal left
        if left:
            left -= 1
            for response in before:
                yield response
            await abort(context, code, "it is broken", outcome, **fields)
        yield accepted()
        async for _ in requests:
            pass
        yield result()
        yield done()

    return say


async def test_every_event_in_order() -> None:
    responses = [
        pb.ExecuteResponse(progress=pb.Progress(phase=pb.Progress.PHASE_QUEUED, position=2, queued=5)),
        accepted("n7", "r1"),
        pb.ExecuteResponse(progress=pb.Progress(phase=pb.Progress.PHASE_IMAGE, bytes_done=1, bytes_total=9)),
        pb.ExecuteResponse(progress=pb.Progress(phase=pb.Progress.PHASE_RUNNING)),
        pb.ExecuteResponse(progress=pb.Progress(phase=99)),  # type: ignore[arg-type]
        pb.ExecuteResponse(),
        log(b"\xff"),
        pb.ExecuteResponse(log=pb.LogMessage(source="stderr", data=b"x", truncated=True)),
        result(3, timings=pb.Timings(run_us=2_000_000), bytes_fetched=7, node_id="n7", stdout_dropped_bytes=4),
        *diff(b"tar"),
        done(timings=pb.Timings(diff_us=1_000_000), diff_bytes=3, diff_entries=1),
    ]
    async with fake_afslet(script(*responses)) as fake, AfsClient(fake.address) as client:
        events = [event async for event in client.execute("image", ["x"])]
    assert events == [
        Queued(2, 5),
        Accepted("n7", "r1"),
        Progress("image", 1, 9),
        Progress("running", 0, 0),
        Log("stdout", b"\xff"),
        Log("stderr", b"x", truncated=True),
        Finished(3, Outcome.EXITED, "", timings={"run": 2.0}, bytes_fetched=7, node_id="n7", stdout_dropped=4),
        DiffStart("writable-upper.tar.gz"),
        DiffChunk(b"tar"),
        Done({"diff": 1.0}, 3, 1),
    ]
    assert fake.starts[0].progress
    assert fake.starts[0].bytes_only


async def test_run_gives_one_result() -> None:
    responses = [
        accepted("n7", "r1"),
        log(b"a"),
        log(b"e", "stderr"),
        log(b"b"),
        result(4, timings=pb.Timings(run_us=5), peak_memory_bytes=6, signal=1, stdout_bytes=9, stdout_dropped_bytes=7),
        *diff(b"tar"),
        done(timings=pb.Timings(run_us=5, diff_us=3), diff_entries=2),
    ]
    async with fake_afslet(script(*responses)) as fake, AfsClient(fake.address) as client:
        got = await client.run("image")
    assert (got.node_id, got.run_id, got.exit_code, got.outcome, got.attempts) == ("n7", "r1", 4, Outcome.EXITED, 1)
    assert (got.stdout, got.stderr, got.diff, got.peak_memory, got.signal) == (b"ab", b"e", b"tar", 6, 1)
    assert (got.timings, got.diff_entries, got.diff_error) == ({"run": 5e-6, "diff": 3e-6}, 2, "")
    assert (got.stdout_bytes, got.stdout_dropped, got.stderr_bytes) == (9, 7, 1)
    assert not fake.starts[0].progress, "nobody would see it"


async def test_a_server_of_before_all_of_it() -> None:
    old = [
        pb.ExecuteResponse(accepted=pb.Accepted(accepted=True)),
        pb.ExecuteResponse(log=pb.LogMessage(source="stdout", message="ü")),
        pb.ExecuteResponse(result=pb.Result(exit_code=3)),
        *diff(b"tar"),
        pb.ExecuteResponse(done=pb.Done()),
    ]
    async with fake_afslet(script(*old)) as fake, AfsClient(fake.address) as client:
        got = await client.run("image")
    assert (got.exit_code, got.outcome, got.stdout, got.diff) == (3, Outcome.UNKNOWN, "ü".encode(), b"tar")
    assert (got.stdout_bytes, got.run_id, got.node_id) == (2, "", "")


async def test_a_diff_that_is_not_whole_is_none(tmp_path: Path) -> None:
    cut = script(accepted(), result(), *diff(b"ta"), done(diff_error="larger than 1 MiB"))
    async with fake_afslet(cut) as fake, AfsClient(fake.address) as client:
        got = await client.run("image", diff_to=tmp_path / "diff")
        assert (got.diff, got.diff_error, got.exit_code) == (None, "larger than 1 MiB", 0)
        assert not list(tmp_path.iterdir())
        got = await client.run("image")
        assert (got.diff, got.diff_error) == (None, "larger than 1 MiB")
        fake.script = script(accepted(), result(), *diff(b"tar"), done())
        assert (await client.run("image", diff_to=tmp_path / "diff")).diff is None
        assert (tmp_path / "diff").read_bytes() == b"tar"
        fake.script = script(accepted(), result(), done())
        assert (await client.run("image", diff_format="none")).diff is None
        assert fake.starts[-1].diff_format == pb.DIFF_NONE
        with pytest.raises(InvalidArgument, match="nothing for"):
            await client.run("image", diff_format="none", diff_to="x")


@pytest.mark.parametrize(
    ("responses", "why"),
    [
        ([result(replayed=True), done()], "the run was replayed: its changed files are not kept"),
        ([result(), done()], "no changed files came"),
        ([result(), *diff(b"ta")], "the run ended before its changed files were complete"),
    ],
)
async def test_a_diff_that_does_not_come_leaves_the_file_alone(
    responses: list[pb.ExecuteResponse], why: str, tmp_path: Path
) -> None:
    (tmp_path / "diff").write_bytes(b"of the first time")
    async with fake_afslet(script(accepted(), *responses)) as fake, AfsClient(fake.address) as client:
        got = await client.run("image", diff_to=tmp_path / "diff")
        assert (got.ok, got.diff, got.diff_error) == (True, None, why)
        assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("diff", b"of the first time")]
        fake.script = script(accepted(), result(replayed=True), done())
        assert (await client.run("image", diff_format="none")).diff_error == ""


# Faults

FAULTS: dict[str, tuple[Code, tuple[pb.ExecuteResponse, ...], Any, type[RunError], type[AfsError], bool]] = {
    "wrong request": (Code.INVALID_ARGUMENT, (), None, RunRejected, InvalidArgument, False),
    "no such image": (Code.NOT_FOUND, (accepted(),), None, RunRejected, NotFound, False),
    "no room": (Code.RESOURCE_EXHAUSTED, (), None, RunRejected, ResourceExhausted, True),
    "node died": (Code.UNAVAILABLE, (accepted(),), None, InfrastructureError, Unavailable, True),
    "cancelled by a server": (Code.CANCELLED, (accepted(),), None, RunCancelled, Cancelled, False),
    "typed rejection": (Code.UNAVAILABLE, (accepted(),), pb.OUTCOME_REJECTED, RunRejected, Unavailable, False),
    "typed fault": (Code.NOT_FOUND, (), pb.OUTCOME_INFRASTRUCTURE_ERROR, InfrastructureError, NotFound, False),
    "typed cancellation": (Code.ABORTED, (accepted(),), pb.OUTCOME_CANCELLED, RunCancelled, Cancelled, False),
}


@pytest.mark.parametrize("name", FAULTS)
async def test_faults_are_typed(name: str) -> None:
    code, before, outcome, kind, status, retryable = FAULTS[name]
    async with fake_afslet(failing(1, code, *before, outcome=outcome)) as fake, AfsClient(fake.address) as client:
        with pytest.raises(RunError, match=r"^it is broken$") as caught:
            await client.run("image", retries=0)
    error = caught.value
    assert isinstance(error, kind)
    assert isinstance(error, status)
    assert (error.retryable, error.run.retryable) == (retryable, retryable)
    assert error.outcome is error.run.outcome
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert (type(copy), str(copy), copy.run, copy.run_id) == (type(error), str(error), error.run, error.run_id)


async def test_what_the_metadata_says_comes_with_the_error() -> None:
    fields = {"retryable": True, "node_id": "n9", "bytes_fetched": 5}
    broken = failing(1, Code.UNAVAILABLE, accepted("n9", "r5"), outcome=pb.OUTCOME_INFRASTRUCTURE_ERROR, **fields)
    async with fake_afslet(broken) as fake, AfsClient(fake.address) as client:
        with pytest.raises(InfrastructureError) as caught:
            async for _ in client.execute("image"):
                pass
    error = caught.value
    assert (error.retryable, error.node_id, error.run_id, error.run.bytes_fetched) == (True, "n9", "r5", 5)


async def test_nobody_answers() -> None:
    async with AfsClient("127.0.0.1:1") as client:
        with pytest.raises(RunRejected, match=r"^AFS at 127\.0\.0\.1:1 does not answer: ") as caught:
            await client.run("image", retries=0)
    assert isinstance(caught.value, Unavailable)
    assert caught.value.retryable


async def test_an_end_without_a_result() -> None:
    async with fake_afslet(script(accepted("n1"))) as fake, AfsClient(fake.address) as client:
        with pytest.raises(InfrastructureError, match="ended the run without a result") as caught:
            await client.run("image", retries=0)
    assert (caught.value.retryable, caught.value.node_id) == (True, "n1")


# Retries


@pytest.mark.parametrize(
    ("code", "before"),
    [
        (Code.UNAVAILABLE, (accepted(),)),
        (Code.UNAVAILABLE, ()),
        (Code.RESOURCE_EXHAUSTED, ()),
        (Code.INTERNAL, (accepted(),)),
    ],
)
async def test_retryable_faults_are_tried_again(code: Code, before: tuple[pb.ExecuteResponse, ...]) -> None:
    async with fake_afslet(failing(2, code, *before)) as fake, AfsClient(fake.address) as client:
        got = await client.run("image", idempotency_key="k", retry_backoff=0.001)
    assert (got.ok, got.attempts) == (True, 3)
    assert [start.idempotency_key for start in fake.starts] == ["k"] * 3


async def test_other_ends_are_final() -> None:
    """A result is, whatever the outcome; so are faults of the request, and no room when the wait was limited."""
    async with fake_afslet() as fake, AfsClient(fake.address) as client:
        for outcome in (pb.OUTCOME_EXITED, pb.OUTCOME_SIGNALLED, pb.OUTCOME_TIMED_OUT, pb.OUTCOME_OUT_OF_MEMORY):
            fake.script = script(accepted(), result(137, outcome=outcome), done())
            assert (await client.run("image", retry_backoff=0.001)).exit_code == 137
        assert len(fake.starts) == 4
        fake.script = failing(9, Code.INVALID_ARGUMENT)
        with pytest.raises(InvalidArgument):
            await client.run("image", retry_backoff=0.001)
        assert len(fake.starts) == 5
        fake.script = failing(9, Code.RESOURCE_EXHAUSTED)
        for limited in (RunRequest("image", queue_timeout=1), RunRequest("image", max_retries=3)):
            with pytest.raises(ResourceExhausted):
                await client.run(limited, retry_backoff=0.001)
        fake.script = failing(9, Code.DEADLINE_EXCEEDED, outcome=pb.OUTCOME_REJECTED, retryable=True)
        with pytest.raises(DeadlineExceeded):
            await client.run("image", queue_timeout=1, retry_backoff=0.001)
        assert len(fake.starts) == 8
        fake.script = failing(9, Code.RESOURCE_EXHAUSTED)
        with pytest.raises(ResourceExhausted):
            await client.run("image", retries=3, retry_backoff=0.001)
        assert len(fake.starts) == 12
        fake.script = failing(9, Code.UNAVAILABLE, accepted(), result(), *diff(b"ta"))
        with pytest.raises(Unavailable):
            await client.run("image", retry_backoff=0.001)
        assert len(fake.starts) == 13, "the result is known already"
        with pytest.raises(InvalidArgument, match="retries must not be negative"):
            await client.run("image", retries=-1)


async def test_an_upload_that_is_read_once_is_not_repeated() -> None:
    async with fake_afslet(failing(9, Code.UNAVAILABLE)) as fake, AfsClient(fake.address) as client:
        with pytest.raises(InvalidArgument, match="an iterator cannot be repeated"):
            await client.run("image", upload=iter([Upload(b"x", "/f")]), retries=1)
        assert not fake.starts
        with pytest.raises(Unavailable):
            await client.run("image", upload=iter([Upload(b"x", "/f")]), retry_backoff=0.001)
        assert len(fake.starts) == 1
        with pytest.raises(Unavailable):
            await client.run("image", upload=[Upload(b"x", "/f")], retries=1, retry_backoff=0.001)
        assert len(fake.starts) == 3


def test_pauses_grow_and_chance_shortens_them() -> None:
    from afs.client.retrying import pauses

    longest = pauses(1.0, lambda: 1.0)
    assert [next(longest) for _ in range(6)] == [1.0, 2.0, 4.0, 8.0, 10.0, 10.0]
    shortest = pauses(1.0, lambda: 0.0)
    assert [next(shortest) for _ in range(3)] == [0.5, 1.0, 2.0]


# Cancellation


def endless(cancelled: dict[str, asyncio.Event], freed: asyncio.Event | None = None) -> Script:
    """A run that ends by Runs.Cancel alone; it takes until *freed* to give back what it took."""

    async def say(start: pb.StartRequest, requests: Any, context: Context) -> AsyncIterator[pb.ExecuteResponse]:
        cancelled["r1"] = asyncio.Event()
        yield accepted("n1", "r1")
        yield log(b"here")
        await cancelled["r1"].wait()
        if freed is not None:
            await freed.wait()
        await abort(context, Code.CANCELLED, "the run was cancelled", pb.OUTCOME_CANCELLED, node_id="n1")

    return say


async def test_cancel_waits_until_the_node_has_given_everything_back() -> None:
    freed = asyncio.Event()
    async with fake_afslet() as fake, AfsClient(fake.address) as client:
        fake.script = endless(fake.cancelled, freed)
        async with client.open("image") as run:
            assert [type(await anext(run)) for _ in range(2)] == [Accepted, Log]
            reading = asyncio.create_task(anext(run))
            cancelling = asyncio.create_task(run.cancel("enough"))
            await fake.cancelled["r1"].wait()
            assert not cancelling.done()
            freed.set()
            await cancelling
            with pytest.raises(RunCancelled, match=r"^the run was cancelled$"):
                await reading
            with pytest.raises(RunCancelled):
                await run.result()
            await run.cancel()
        assert fake.reasons == ["enough"]


async def test_cancel_before_a_node_has_it_and_at_an_old_server() -> None:
    async def old(start: pb.StartRequest, requests: Any, context: Context) -> AsyncIterator[pb.ExecuteResponse]:
        yield accepted("n1")
        await asyncio.Event().wait()

    async with fake_afslet(old) as fake, AfsClient(fake.address) as client:
        async with client.open("image") as run:
            await anext(run)
            await run.cancel()
            with pytest.raises(RunCancelled, match=r"^the run of image was cancelled$") as caught:
                await run.result()
            assert not caught.value.retryable
        await fake.ended.acquire()


async def test_a_run_of_another_proxy_is_cancelled_by_its_call() -> None:
    async def foreign(start: pb.StartRequest, requests: Any, context: Context) -> AsyncIterator[pb.ExecuteResponse]:
        yield accepted("n1", "unknown here")
        await asyncio.Event().wait()

    async with fake_afslet(foreign) as fake, AfsClient(fake.address) as client, client.open("image") as run:
        await anext(run)
        await run.cancel()
        with pytest.raises(RunCancelled):
            await anext(run)
        await fake.ended.acquire()


@pytest.mark.parametrize("fault", [DeadlineExceeded("slow"), Internal("broken"), ResourceExhausted("full")])
async def test_what_cannot_be_cancelled_by_asking_is_cancelled_by_its_call(fault: AfsError) -> None:
    async with fake_afslet() as fake, AfsClient(fake.address) as client:
        fake.script, fake.cancel_fault = endless(fake.cancelled), fault
        async with client.open("image") as run:
            await anext(run)
            await run.cancel()
            with pytest.raises(RunCancelled):
                await run.result()
        await fake.ended.acquire()


async def test_cancel_after_the_client_was_closed() -> None:
    async with fake_afslet() as fake, AfsClient(fake.address) as client:
        fake.script = endless(fake.cancelled)
        async with client.open("image") as run:
            await anext(run)
            await client.close()
            await run.cancel()
            with pytest.raises(RunCancelled):
                await run.result()


@pytest.mark.parametrize("how", ["break", "task", "close"])
async def test_who_leaves_early_cancels_the_run(how: str) -> None:
    async with fake_afslet() as fake, AfsClient(fake.address) as client:
        fake.script = endless(fake.cancelled)
        if how == "break":
            async with aclosing(client.execute("image")) as events:
                async for event in events:
                    if isinstance(event, Log):
                        break
        else:
            seen = asyncio.Event()

            async def follow() -> None:
                async for event in client.execute("image"):
                    if isinstance(event, Log):
                        seen.set()

            task = asyncio.create_task(follow())
            await seen.wait()
            if how == "task":
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            else:
                await client.close()
                with pytest.raises(RunCancelled, match="the client was closed"):
                    await task
        await fake.ended.acquire()


@pytest.mark.parametrize("upload", [None, [Upload(b"x", "/f")]])
async def test_closing_while_it_connects(upload: list[Upload] | None) -> None:
    """The peer accepts the connection and says nothing: no message of a call can be sent before its settings come."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.setblocking(False)
        client = AfsClient(f"127.0.0.1:{silent.getsockname()[1]}")
        running = asyncio.create_task(client.run("image", upload=upload))
        connection, _ = await asyncio.get_running_loop().sock_accept(silent)
        with connection:
            await client.close()
        async with asyncio.timeout(10):
            with pytest.raises(RunCancelled, match="the client was closed"):
                await running


async def test_a_closed_client_says_so() -> None:
    async with fake_afslet() as fake:
        client = AfsClient(fake.address)
        assert (await client.run("image")).ok
        await client.close()
        with pytest.raises(FailedPrecondition, match="the client is closed"):
            await client.run("image")
        with pytest.raises(FailedPrecondition, match="the client is closed"):
            await client.runs()
        await client.close()


async def test_another_one_s_run_can_be_listed_and_cancelled() -> None:
    from afs.proto.v1 import runs_pb2

    async with fake_afslet() as fake, AfsClient(fake.address) as client:
        fake.script = endless(fake.cancelled)
        fake.listed = [
            runs_pb2.Run(
                run_id="r1", node_id="n1", image="i", command=["a"], phase="running", cpu_millis=500, labels={"k": "v"}
            )
        ]
        async with client.open("image") as run:
            await anext(run)
            (info,) = await client.runs()
            assert (info.run_id, info.command, info.phase, info.cpu, info.labels) == (
                "r1",
                ("a",),
                "running",
                0.5,
                {"k": "v"},
            )
            await client.cancel("r1", "because")
            with pytest.raises(RunCancelled):
                await run.result()
        assert fake.reasons == ["because"]
        with pytest.raises(NotFound, match="no run r2"):
            await client.cancel("r2")


# Back-pressure and uploads


async def test_a_slow_consumer_holds_the_output_back() -> None:
    """What the server has sent is never much more than what the consumer has taken: only gRPC's window is between."""
    block, total, window = b"x" * 65536, 1024, 24 << 20
    sent = 0

    async def yes(start: pb.StartRequest, requests: Any, context: Context) -> AsyncIterator[pb.ExecuteResponse]:
        nonlocal sent
        yield accepted()
        for _ in range(total):
            sent += len(block)
            yield log(block)
        yield result()
        yield done()

    taken = most = 0
    async with fake_afslet(yes) as fake, AfsClient(fake.address) as client:
        async for event in client.execute("image"):
            if isinstance(event, Log):
                taken += len(event.data)
                most = max(most, sent - taken)
                for _ in range(10):  # the server may go on
                    await asyncio.sleep(0)
    assert taken == len(block) * total
    assert most < window < taken // 2


async def test_uploads_arrive_in_pieces_and_in_order(tmp_path: Path) -> None:
    got: dict[str, bytes] = {}

    async def keep(start: pb.StartRequest, requests: Any, context: Context) -> AsyncIterator[pb.ExecuteResponse]:
        name = ""
        yield accepted()
        async for request in requests:
            if request.HasField("file_begin"):
                name = request.file_begin.path
                got[name] = b""
            got[name] += request.file_chunk.data
        yield result()
        yield done()

    (tmp_path / "tree" / "sub").mkdir(parents=True)
    for number in range(300):
        (tmp_path / "tree" / "sub" / f"{number:03}").write_bytes(b"%d" % number)
    (tmp_path / "one").write_bytes(b"1" * 3_000_000)
    parts = [Upload(tmp_path / "tree", "/work"), Upload(tmp_path / "one", "/bin/one"), Upload(b"text", "/etc/text")]
    async with fake_afslet(keep) as fake, AfsClient(fake.address) as client, client.open("image", upload=parts) as run:
        assert (await run.result()).ok
        assert run.uploaded == sum(map(len, got.values())) == 3_000_004 + sum(len(str(n)) for n in range(300))
    assert list(got)[:2] == ["work/sub", "work/sub/000"]
    assert (len(got), got["bin/one"], got["etc/text"]) == (303, b"1" * 3_000_000, b"text")


async def test_why_an_upload_was_refused_is_never_lost() -> None:
    """The server ends the call while the client writes; what it said has to arrive."""

    async def refuse(start: pb.StartRequest, requests: Any, context: Context) -> AsyncIterator[pb.ExecuteResponse]:
        yield accepted()
        await anext(requests)
        await abort(context, Code.INVALID_ARGUMENT, "a path leads outside")

    parts = [Upload(b"x" * 1000, f"/{number}") for number in range(200)]
    async with fake_afslet(refuse) as fake, AfsClient(fake.address) as client:
        for _ in range(50):
            with pytest.raises(RunRejected, match="a path leads outside"):
                await client.run("image", upload=parts)


async def test_an_upload_that_fails_here(tmp_path: Path) -> None:
    async with fake_afslet() as fake, AfsClient(fake.address) as client:
        for upload, message in (
            (tmp_path / "none", "none: (not|neither) a directory"),
            ([Upload(b"x", "/f"), Upload(tmp_path / "gone", "/x")], "gone: (not|neither) a directory"),
            ([Upload(b"x", "/")], "it needs a name"),
        ):
            with pytest.raises(InvalidArgument, match=message) as caught:
                await client.run("image", upload=upload)
            assert not isinstance(caught.value, RunError)
        task = asyncio.create_task(client.run("image", upload=tmp_path))
        assert (await task).ok


async def test_a_request_that_no_message_can_hold() -> None:
    async with AfsClient("127.0.0.1:1") as client:
        for wrong in (
            RunRequest("image", cpu=float("inf")),
            RunRequest("image", cpu=float("nan")),
            RunRequest("image", memory_mb=1 << 70),
            RunRequest("image", network=cast("Any", "moon")),
        ):
            with pytest.raises(InvalidArgument, match="the request for image 'image' makes no sense"):
                await client.run(wrong)
        with pytest.raises(InvalidArgument, match="needs open"):
            await client.run(RunRequest("image", stdin=True))
