"""Standard input, terminals and the blocking client against a server that follows a script."""

from __future__ import annotations

import asyncio
import signal
import threading
from typing import TYPE_CHECKING, Any

import pytest

from afs.client import (
    Accepted,
    AfsClient,
    DiffStart,
    Finished,
    Log,
    RunCancelled,
    RunEnded,
    RunRequest,
    SyncAfsClient,
    Upload,
)
from afs.client.sync import _Loop
from afs.core.errors import FailedPrecondition, InvalidArgument, NotFound
from tests.testbed.fakeafslet import Context, abort, accepted, diff, done, fake_afslet, fake_in_thread, log, result

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from afs.proto.v1 import afslet_pb2 as pb


async def cat(start: pb.StartRequest, requests: Any, context: Context) -> AsyncIterator[pb.ExecuteResponse]:
    """What comes on standard input goes to stdout, sizes of the terminal to stderr, names of files come first."""
    yield accepted("n1", "r1")
    assert start.stdin
    uploading = True
    async for request in requests:
        kinds = [field.name for field, _ in request.ListFields()]
        assert len(kinds) == 1, request
        assert uploading or not request.WhichOneof("payload"), "the upload has ended"
        if request.HasField("file_begin"):
            yield log(request.file_begin.path.encode() + b"\n")
        if request.upload_end:
            assert uploading
            uploading = False
            yield log(b"ready\n")
        if request.HasField("terminal_size"):
            yield log(f"{request.terminal_size.rows}x{request.terminal_size.columns}".encode(), "stderr")
        if request.stdin:
            yield log(request.stdin)
        if request.stdin_end:
            break
    yield result()
    for response in (*diff(b"tar"), done()):
        yield response


async def deaf(start: pb.StartRequest, requests: Any, context: Context) -> AsyncIterator[pb.ExecuteResponse]:
    """Ends without reading its standard input."""
    yield accepted()
    yield result()
    yield done()


async def output_until(run: Any, size: int) -> bytes:
    """*size* bytes of stdout."""
    got = b""
    while len(got) < size:
        event = await anext(run)
        if isinstance(event, Log) and event.source == "stdout":
            got += event.data
    return got


async def test_a_conversation() -> None:
    async with fake_afslet(cat) as fake, AfsClient(fake.address) as client:
        async with client.open("image", ["cat"], stdin=True) as run:
            assert await anext(run) == Accepted("n1", "r1")
            assert run.run_id == "r1"
            assert await output_until(run, 6) == b"ready\n"
            for line in (b"one\n", b"\0\xff\n"):
                await run.write(line)
                assert await output_until(run, len(line)) == line
            await run.close_stdin()
            with pytest.raises(RunEnded, match="standard input was closed"):
                await run.write(b"more")
            rest = await run.result()
            assert (rest.exit_code, rest.stdout, rest.diff) == (0, b"", b"tar")
        with pytest.raises(StopAsyncIteration):
            await anext(run)


async def test_large_input_is_cut_into_messages_and_comes_back_whole() -> None:
    data = bytes(range(256)) * 8192
    async with fake_afslet(cat) as fake, AfsClient(fake.address) as client, client.open("image", stdin=True) as run:

        async def feed() -> None:
            await run.write(data)
            await run.close_stdin()

        feeding = asyncio.create_task(feed())
        got = await run.result()
        await feeding
    assert got.stdout == b"ready\n" + data


async def test_input_comes_after_the_upload() -> None:
    parts = [Upload(b"%d" % number, f"/f{number}") for number in range(600)]
    async with (
        fake_afslet(cat) as fake,
        AfsClient(fake.address) as client,
        client.open("image", stdin=True, upload=parts) as run,
    ):
        await run.write(b"input")
        await run.close_stdin()
        got = await run.result()
    assert got.stdout == b"".join(b"f%d\n" % number for number in range(600)) + b"ready\ninput"


async def test_terminals() -> None:
    async with fake_afslet(cat) as fake, AfsClient(fake.address) as client:
        async with client.open("image", stdin=True, tty=True, terminal_size=(24, 80)) as run:
            await run.resize(50, 132)
            await run.close_stdin()
            assert (await run.result()).stderr == b"50x132"
        size = fake.starts[0].terminal_size
        assert (fake.starts[0].tty, size.rows, size.columns) == (True, 24, 80)
        async with client.open("image", stdin=True) as run:
            with pytest.raises(InvalidArgument, match="no terminal"):
                await run.resize(1, 1)
        async with client.open("image", tty=True) as run:
            with pytest.raises(InvalidArgument, match="no standard input"):
                await run.resize(1, 1)


async def test_writing_to_a_run_that_has_ended() -> None:
    async with fake_afslet(deaf) as fake, AfsClient(fake.address) as client:
        async with client.open("image", stdin=True) as run:
            assert (await run.result()).ok
            for write in (run.write(b"x"), run.close_stdin()):
                with pytest.raises(RunEnded, match="the run has ended"):
                    await write
        async with client.open("image") as run:
            with pytest.raises(InvalidArgument, match="no standard input: give it stdin=True"):
                await run.write(b"x")


async def test_a_command_that_does_not_read_holds_the_writer_back() -> None:
    """At most gRPC's window is under way; when the run ends the writer is told."""
    go = asyncio.Event()

    async def wait(start: pb.StartRequest, requests: Any, context: Context) -> AsyncIterator[pb.ExecuteResponse]:
        yield accepted()
        await go.wait()
        await abort(context, pytest.importorskip("grpc").StatusCode.INTERNAL, "broken")

    written = 0
    async with fake_afslet(wait) as fake, AfsClient(fake.address) as client, client.open("image", stdin=True) as run:

        async def feed() -> None:
            nonlocal written
            while True:
                await run.write(b"x" * 65536)
                written += 65536

        feeding = asyncio.create_task(feed())
        await anext(run)
        while True:  # until it cannot go on
            before = written
            await asyncio.wait([feeding], timeout=0.2)
            if written == before:
                break
        assert 0 < written < 24 << 20
        go.set()
        with pytest.raises(RunEnded):
            await feeding


async def test_writing_after_the_upload_has_failed() -> None:
    """The writer learns why, as the reader does."""
    async with (
        fake_afslet(cat) as fake,
        AfsClient(fake.address) as client,
        client.open("image", stdin=True, upload="/does not exist") as run,
    ):
        for use in (run.write(b"x"), run.result(), run.close_stdin()):
            with pytest.raises(InvalidArgument, match="does not exist"):
                await use


async def test_writing_to_a_run_that_was_cancelled_here() -> None:
    async with fake_afslet(cat) as fake, AfsClient(fake.address) as client, client.open("image", stdin=True) as run:
        run._call.cancel()
        with pytest.raises(RunEnded, match="the run has ended"):
            await run.write(b"x")


# The blocking client


def test_sync_conversation_from_two_threads() -> None:
    with (
        fake_in_thread(cat) as fake,
        SyncAfsClient(fake.address) as client,
        client.open("image", stdin=True, tty=True) as run,
    ):

        def feed() -> None:
            run.resize(2, 3)
            run.write(b"hello")
            run.close_stdin()

        writer = threading.Thread(target=feed)
        writer.start()
        events = list(run)
        writer.join()
        assert b"".join(e.data for e in events if isinstance(e, Log) and e.source == "stdout") == b"ready\nhello"
        assert {DiffStart, Finished, Accepted} <= {type(event) for event in events}
        assert (run.run_id, run.accepted, run.finished) == ("r1", Accepted("n1", "r1"), run.finished)
        assert run.result().exit_code == 0


def test_sync_client_in_many_threads() -> None:
    async def echo(start: pb.StartRequest, requests: Any, context: Context) -> AsyncIterator[pb.ExecuteResponse]:
        for response in (accepted(), log(start.command[0].encode()), result(), done()):
            yield response

    got: dict[int, bytes] = {}
    with fake_in_thread(echo) as fake, SyncAfsClient(fake.address) as client:

        def work(number: int) -> None:
            for step in range(5):
                got[number * 5 + step] = client.run("image", [str(number * 5 + step)]).stdout

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert got == {number: b"%d" % number for number in range(40)}
        requests = [RunRequest("image", [str(number)]) for number in range(50)]
        ends = {end.index: end.get().stdout for end in client.map(requests, concurrency=7)}
        assert ends == {number: b"%d" % number for number in range(50)}
        assert [type(event) for event in client.execute("image", ["x"])][:2] == [Accepted, Log]


def test_sync_lists_and_cancellation() -> None:
    async def wait(start: pb.StartRequest, requests: Any, context: Context) -> AsyncIterator[pb.ExecuteResponse]:
        yield accepted("n1", "r1")
        await asyncio.Event().wait()

    with fake_in_thread(wait) as fake, SyncAfsClient(fake.address) as client:
        with client.open("image") as run:
            assert next(iter(run)) == Accepted("n1", "r1")
            run.cancel("enough")  # NOT_FOUND at Runs.Cancel: the call is cancelled
            with pytest.raises(RunCancelled):
                run.result()
        assert client.runs() == []
        with pytest.raises(NotFound):
            client.cancel("r9")
        assert (client.status(), client.contents().images) == ([], ())
        assert client.reconcile("image", 2).ensured
        events = client.execute("image")
        assert next(events) == Accepted("n1", "r1")
    with pytest.raises(FailedPrecondition, match="the client is closed"):
        client.runs()
    with pytest.raises(FailedPrecondition, match="the client is closed"):
        next(events)
    client.close()


def stuck(started: threading.Event) -> Any:
    """A script that never ends. Who gives a command has read that it was accepted when *started* is set."""

    async def script(start: pb.StartRequest, requests: Any, context: Context) -> AsyncIterator[pb.ExecuteResponse]:
        if start.command:
            yield accepted("n1", "r1")
        async for _ in requests:  # an upload waits for being accepted
            pass
        started.set()
        await asyncio.Event().wait()

    return script


def talk(client: SyncAfsClient) -> None:
    with client.open("image", ["x"], upload=[Upload(b"x", "/f")]) as run:
        run.result()


@pytest.mark.parametrize(
    "use",
    [
        lambda client: client.run("image", ["x"]),
        lambda client: list(client.execute("image")),
        lambda client: list(client.map([RunRequest("image")])),
        talk,
    ],
    ids=["run", "execute", "map", "open"],
)
def test_sync_client_closed_by_another_thread(use: Callable[[SyncAfsClient], Any]) -> None:
    started, ends = threading.Event(), list[BaseException]()
    with fake_in_thread(stuck(started)) as fake:
        client = SyncAfsClient(fake.address)

        def work() -> None:
            try:
                use(client)
            except BaseException as error:
                ends.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        assert started.wait(10)
        client.close()
        thread.join(10)
        assert not thread.is_alive()
    assert [type(end) for end in ends] == [RunCancelled]
    assert str(ends[0]) == "the run was cancelled: the client was closed"


def test_nothing_is_begun_while_a_client_is_being_closed() -> None:
    loop, ending, go = _Loop(), threading.Event(), threading.Event()
    tasks: list[asyncio.Task[None]] = []

    async def last() -> None:
        # What it leaves behind is cancelled, too.
        tasks.append(asyncio.create_task(asyncio.Event().wait()))  # type: ignore[arg-type]
        ending.set()
        await asyncio.to_thread(go.wait)

    closing = [threading.Thread(target=loop.close, args=(last,)) for _ in range(2)]
    for thread in closing:
        thread.start()
    assert ending.wait(10)
    try:
        with pytest.raises(FailedPrecondition, match="the client is closed"):
            loop.call(asyncio.sleep(0))
    finally:
        go.set()
        for thread in closing:
            thread.join(10)
    assert not any(thread.is_alive() for thread in closing)
    assert tasks[0].cancelled()


@pytest.mark.parametrize("how", ["map", "execute"])
def test_ctrl_c_in_a_blocking_iterator(how: str) -> None:
    """Closing the iterator waits for the step that was interrupted."""
    main = threading.main_thread().ident
    assert main is not None
    ended = threading.Semaphore(0)

    async def interrupt(start: pb.StartRequest, requests: Any, context: Context) -> AsyncIterator[pb.ExecuteResponse]:
        try:
            async for _ in requests:
                pass
            signal.pthread_kill(main, signal.SIGINT)
            await asyncio.Event().wait()
            yield accepted()
        finally:
            ended.release()

    with fake_in_thread(interrupt) as fake, SyncAfsClient(fake.address) as client:
        events: Any = client.map([RunRequest("image")]) if how == "map" else client.execute("image")
        with pytest.raises(KeyboardInterrupt):
            next(events)
        assert ended.acquire(timeout=10)
