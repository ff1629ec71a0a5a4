"""Chunks over plain connections: questions, answers, errors, and peers that are silent, gone or talk nonsense."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import os
import socket
import threading
from typing import TYPE_CHECKING

import pytest

from afs.core.errors import (
    AfsError,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from afs.layerstore.chunkclient import ChunkClient, wait_for
from afs.layerstore.chunkserver import Range, serving_chunks
from afs.layerstore.chunkwire import (
    ANSWER_SIZE,
    MOST_AHEAD,
    QUESTION_SIZE,
    Question,
    pack_chunk,
    pack_error,
    pack_question,
    parse_answer,
    parse_error,
    parse_question,
)
from afs.layerstore.errors import DamagedLayer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence
    from pathlib import Path

    from afs.layerstore.chunkclient import Exchange

DIFF_ID = "sha256:" + "5a" * 32
SIZE = 1 << 18
CHUNKS = [bytes([number]) * (SIZE - number) for number in range(32)]
FIRST = Question(DIFF_ID, 0)


class Source:
    """What a server reads from."""

    def __init__(self) -> None:
        self.asked: list[Question] = []
        self.error: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.reading = 0
        self.most = 0

    async def read(self, question: Question) -> bytes:
        """A chunk, once the gate is open."""
        self.asked.append(question)
        self.reading += 1
        self.most = max(self.most, self.reading)
        try:
            await self.gate.wait()
        finally:
            self.reading -= 1
        if self.error is not None:
            raise self.error
        return CHUNKS[question.index]


class Dumb:
    """A server that says *answer* to the first bytes that come, and then nothing any more."""

    def __init__(self, answer: bytes = b"") -> None:
        self.answer = answer
        self.connected = asyncio.Event()
        self.asked = asyncio.Event()
        self.left = asyncio.Event()

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """With one client."""
        self.connected.set()
        with contextlib.suppress(OSError):
            if await reader.read(QUESTION_SIZE):
                self.asked.set()
                writer.write(self.answer)
                await reader.read()
        self.left.set()
        writer.close()

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[tuple[str, int]]:
        """Its address."""
        server = await asyncio.start_server(self.talk, "127.0.0.1", 0)
        async with server:
            yield server.sockets[0].getsockname()[:2]


@pytest.fixture
async def source() -> Source:
    """See Source."""
    return Source()


@pytest.fixture
async def address(source: Source) -> AsyncIterator[tuple[str, int]]:
    """Of a server."""
    async with serving_chunks("127.0.0.1", 0, source.read) as port:
        yield "127.0.0.1", port


@pytest.fixture
async def client() -> AsyncIterator[ChunkClient]:
    """Eight questions at once."""
    opened = ChunkClient(SIZE, 4)
    yield opened
    opened.close()


def checked(data: memoryview, digest: bytes) -> bytes:
    """The bytes."""
    assert hashlib.sha256(data).digest() == digest
    return bytes(data)


async def ask(
    client: ChunkClient, address: tuple[str, int], question: Question = FIRST, timeout: float = 30.0
) -> bytes:
    """A chunk."""
    return await client.ask(address, question, timeout, checked)


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop go round until *condition*."""
    while not condition():  # noqa: ASYNC110 - there is no event
        await asyncio.sleep(0)


# What goes over the wire


@pytest.mark.parametrize("question", [Question(DIFF_ID, 0), Question(DIFF_ID, (1 << 32) - 1, was_bad=True)])
def test_a_question_round_trips(question: Question) -> None:
    data = pack_question(question)
    assert len(data) == QUESTION_SIZE
    assert parse_question(data) == question


@pytest.mark.parametrize(("at", "value"), [(0, b"B"), (4, b"\2"), (5, b"\2")], ids=["magic", "version", "was bad"])
def test_what_is_no_question_is_refused(at: int, value: bytes) -> None:
    data = pack_question(FIRST)
    with pytest.raises(InvalidArgument):
        parse_question(data[:at] + value + data[at + 1 :])


def test_an_answer_says_how_long_it_is() -> None:
    assert parse_answer(pack_chunk(SIZE), SIZE) == (SIZE, False)
    told = pack_error(NotFound("nothing"))
    assert parse_answer(told[:ANSWER_SIZE], 0) == (len(told) - ANSWER_SIZE, True)
    for bad in (pack_chunk(SIZE + 1), b"\0\0\0\0\2\0\0\0", (5000).to_bytes(4, "little") + b"\1\0\0\0"):
        with pytest.raises(DataLoss, match="makes no sense"):
            parse_answer(bad, SIZE)


@pytest.mark.parametrize(
    ("error", "kind", "line"),
    [
        (NotFound("chunk 1 is not here"), NotFound, "chunk 1 is not here"),
        (
            DamagedLayer(DIFF_ID, "chunk 1"),
            DataLoss,
            f"layer {DIFF_ID}: chunk 1 is damaged on disk, and not repaired yet",
        ),
        (Unavailable("two\nlines"), Unavailable, "two lines"),
        (ValueError("a fault"), Internal, "ValueError: a fault"),
        (NotFound("ü" * 5000), NotFound, None),
    ],
)
def test_an_error_keeps_its_class_and_its_line(error: Exception, kind: type[AfsError], line: str | None) -> None:
    told = parse_error(pack_error(error)[ANSWER_SIZE:])
    assert type(told) is kind
    assert line is None or told.line == line


# Between two nodes


async def test_chunks_come_as_they_are(client: ChunkClient, source: Source, address: tuple[str, int]) -> None:
    for number, was_bad in ((0, False), (31, True), (5, False)):
        assert await ask(client, address, Question(DIFF_ID, number, was_bad)) == CHUNKS[number]
    assert source.asked == [Question(DIFF_ID, 0), Question(DIFF_ID, 31, was_bad=True), Question(DIFF_ID, 5)]
    assert len(client._idle) == 1, "one after the other, on one connection"


async def test_an_error_is_told_and_the_connection_stays(
    client: ChunkClient, source: Source, address: tuple[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    await ask(client, address)
    (connection,) = client._idle
    source.error = NotFound("no such chunk")
    with pytest.raises(NotFound, match=r"^no such chunk$"):
        await ask(client, address)
    assert caplog.records == [], "that is no fault"
    source.error = ValueError("a fault")
    with pytest.raises(Internal, match=r"^ValueError: a fault$"):
        await ask(client, address)
    assert "ValueError: a fault" in caplog.text
    source.error = None
    assert await ask(client, address) == CHUNKS[0]
    assert list(client._idle) == [connection]


async def test_an_error_of_who_takes_it_is_not_the_peer_s(client: ChunkClient, address: tuple[str, int]) -> None:
    def take(data: memoryview, digest: bytes) -> None:
        raise DataLoss("not what I wanted")

    with pytest.raises(DataLoss, match="not what I wanted"):
        await client.ask(address, FIRST, 30.0, take)
    assert len(client._idle) == 1
    assert await ask(client, address) == CHUNKS[0]


async def test_many_ask_at_once(source: Source, address: tuple[str, int]) -> None:
    """More than there are threads on either side."""
    client = ChunkClient(SIZE, 4)
    source.gate.clear()
    asking = [asyncio.create_task(ask(client, address, Question(DIFF_ID, number))) for number in range(32)]
    await until(lambda: source.reading == 32)
    source.gate.set()
    assert await asyncio.gather(*asking) == CHUNKS
    assert len(client._idle) == 4, "more are not kept"
    client.close()
    assert not client._idle


async def test_who_does_not_speak_the_language_is_let_go(source: Source, address: tuple[str, int]) -> None:
    reader, writer = await asyncio.open_connection(*address)
    writer.write(b"GET / HTTP/1.1\r\nHost: somebody\r\n\r\n".ljust(QUESTION_SIZE))
    assert await reader.read() == b""
    writer.close()
    assert source.asked == []


async def test_an_answer_that_is_longer_than_a_chunk_is_refused(client: ChunkClient) -> None:
    dumb = Dumb(pack_chunk(SIZE + 1))
    async with dumb.serving() as address:
        with pytest.raises(DataLoss, match=f"an answer of {SIZE + 1} bytes makes no sense"):
            await ask(client, address)
        await dumb.left.wait()
    assert not client._idle


async def test_what_comes_behind_an_answer_is_no_part_of_it(client: ChunkClient) -> None:
    """Else a whole chunk that is said to be one byte long would have the right digest."""
    dumb = Dumb(pack_chunk(1) + CHUNKS[3])
    async with dumb.serving() as address:
        with pytest.raises(DataLoss, match="bytes came behind an answer"):
            await ask(client, address)
        await dumb.left.wait()
    assert not client._idle


async def test_connections_that_are_idle_for_long_are_closed(
    client: ChunkClient, address: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("afs.layerstore.chunkclient._IDLE_S", 0.01)
    await ask(client, address)
    assert len(client._idle) == 1
    while client._idle:  # noqa: ASYNC110 - a timer of the event loop
        await asyncio.sleep(0.001)
    assert client._aging is None
    assert await ask(client, address) == CHUNKS[0]


@pytest.mark.parametrize("answer", [b"", pack_chunk(SIZE)[:3], pack_chunk(SIZE) + b"some"])
async def test_a_silent_peer_costs_the_timeout(client: ChunkClient, answer: bytes) -> None:
    dumb = Dumb(answer)
    async with dumb.serving() as address:
        with pytest.raises(DeadlineExceeded, match=r"^layerstore 127.0.0.1:[0-9]+ did not answer within 0.2 s$"):
            await ask(client, address, timeout=0.2)
        await dumb.left.wait()
    assert not client._idle


async def test_a_peer_that_ends_in_mid_answer_is_unavailable(client: ChunkClient) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(QUESTION_SIZE)
        writer.write(pack_chunk(SIZE) + b"some")
        writer.close()

    async with await asyncio.start_server(talk, "127.0.0.1", 0) as server:
        with pytest.raises(Unavailable, match="does not answer: it closed the connection"):
            await ask(client, server.sockets[0].getsockname()[:2])
    assert not client._idle


async def test_whoever_gives_up_frees_the_connection(address: tuple[str, int]) -> None:
    client, dumb = ChunkClient(SIZE), Dumb()
    async with dumb.serving() as silent:
        asking = asyncio.create_task(ask(client, silent))
        await dumb.asked.wait()
        assert await ask(client, address) == CHUNKS[0], "who is silent holds up nobody"
        assert len(client._idle) == 1
        asking.cancel()
        await asyncio.wait([asking])
        assert asking.cancelled()
        await dumb.left.wait()
        assert [connection.address for connection in client._idle] == [address]
    client.close()


async def test_giving_up_while_it_connects(client: ChunkClient) -> None:
    """A full backlog: the kernel answers nobody."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, contextlib.ExitStack() as stack:
        address = listener.getsockname()
        loop = asyncio.get_running_loop()
        for _ in range(2):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                filler.connect(address)
        with pytest.raises(DeadlineExceeded):
            await ask(client, address, timeout=0.1)
        asking = loop.create_task(ask(client, address))
        await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait([asking])
        assert asking.cancelled()
    assert not client._idle


# What is at hand


class Shelf:
    """Chunks in a file, which threads find."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(b"".join(CHUNKS))
        self.file = path.open("rb")
        self.found: list[tuple[int, str]] = []
        self.longer = 0

    def find(self, question: Question) -> Range | None:
        """All but chunk 0."""
        self.found.append((question.index, threading.current_thread().name))
        if question.index == 0:
            return None
        if question.index == 31:
            raise ValueError("a fault")
        offset = sum(map(len, CHUNKS[: question.index]))
        return Range(self.file, offset, len(CHUNKS[question.index]) + self.longer)


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Shelf]:
    """See Shelf."""
    made = Shelf(tmp_path / "shelf")
    yield made
    made.file.close()


async def test_what_is_at_hand_does_not_go_through_the_event_loop(
    client: ChunkClient, source: Source, shelf: Shelf
) -> None:
    async with serving_chunks("127.0.0.1", 0, source.read, shelf.find) as port:
        for number in (1, 0, 7):
            assert await ask(client, ("127.0.0.1", port), Question(DIFF_ID, number)) == CHUNKS[number]
    assert source.asked == [FIRST]
    assert [number for number, _ in shelf.found] == [1, 0, 7]
    assert all(name.startswith("chunks-") for _, name in shelf.found)


async def test_a_slow_receiver_gets_it_in_pieces_and_holds_up_nobody(
    client: ChunkClient, source: Source, shelf: Shelf
) -> None:
    async with serving_chunks("127.0.0.1", 0, source.read, shelf.find) as port:
        with contextlib.ExitStack() as stack:
            slow = []
            for number in range(1, 17):  # more than there are threads
                sock = stack.enter_context(socket.socket())
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                sock.connect(("127.0.0.1", port))
                sock.sendall(pack_question(Question(DIFF_ID, number)))
                slow.append((number, sock))
            assert await ask(client, ("127.0.0.1", port), Question(DIFF_ID, 20)) == CHUNKS[20]
            for number, sock in slow:
                wanted = pack_chunk(len(CHUNKS[number])) + CHUNKS[number]
                got = await asyncio.to_thread(sock.recv, len(wanted), socket.MSG_WAITALL)
                assert got == wanted


@pytest.mark.parametrize(("number", "longer"), [(31, 0), (30, 1 << 20)], ids=["a mistake of ours", "a shorter file"])
async def test_a_fault_at_one_connection_ends_that(
    client: ChunkClient, source: Source, shelf: Shelf, number: int, longer: int
) -> None:
    client = ChunkClient(1 << 21)
    async with serving_chunks("127.0.0.1", 0, source.read, shelf.find) as port:
        shelf.longer = longer
        with pytest.raises(Unavailable):
            await ask(client, ("127.0.0.1", port), Question(DIFF_ID, number))
        shelf.longer = 0
        assert await ask(client, ("127.0.0.1", port), Question(DIFF_ID, 2)) == CHUNKS[2]
    client.close()


async def test_who_takes_no_bytes_is_let_go(
    source: Source, shelf: Shelf, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr("afs.layerstore.chunkserver.SEND_S", 0.05)
    shelf.longer = 64 << 20
    os.truncate(shelf.file.name, 2 * shelf.longer)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        async with serving_chunks("127.0.0.1", 0, source.read, shelf.find) as port:
            sock.connect(("127.0.0.1", port))
            sock.sendall(pack_question(Question(DIFF_ID, 1)))
            await until(lambda: "chunks for 127.0.0.1: [Errno 32] Broken pipe" in caplog.text)
            got = 0
            while data := await asyncio.to_thread(sock.recv, 1 << 20):
                got += len(data)
    assert got < shelf.longer, "only what was in the socket"


async def test_a_chunk_that_cannot_be_read_any_more_is_looked_at(
    client: ChunkClient, source: Source, shelf: Shelf
) -> None:
    """It was compared once, and is sent without being looked at; the disk may fail after that."""
    async with serving_chunks("127.0.0.1", 0, source.read, shelf.find) as port:
        os.truncate(shelf.file.name, SIZE)
        with pytest.raises(Unavailable):
            await ask(client, ("127.0.0.1", port), Question(DIFF_ID, 5))
        await until(lambda: source.asked == [Question(DIFF_ID, 5, was_bad=True)])
        assert await ask(client, ("127.0.0.1", port)) == CHUNKS[0]


async def test_a_question_is_begun_only_on_a_connection_that_is_there(
    client: ChunkClient, address: tuple[str, int], source: Source
) -> None:
    assert client.begin(address, FIRST, 30.0, checked) is None
    await ask(client, address)
    exchange = client.begin(address, Question(DIFF_ID, 3), 30.0, checked)
    assert exchange is not None
    assert client.begin(address, FIRST, 30.0, checked) is None, "it is used"
    assert await wait_for(exchange) == CHUNKS[3]
    source.gate.clear()
    exchange = client.begin(address, Question(DIFF_ID, 4), 30.0, checked)
    assert exchange is not None
    await until(lambda: source.reading == 1)
    exchange.cancel()
    await asyncio.wait([exchange.done])
    assert exchange.done.cancelled()
    assert not client._idle


# Several in one go


async def begin_run(
    client: ChunkClient, address: tuple[str, int], numbers: Sequence[int]
) -> tuple[Exchange[object], dict[int, bytes]]:
    """A run on a connection that is there, and what comes, by number."""
    came: dict[int, bytes] = {}

    def take(number: int, data: memoryview, digest: bytes) -> None:
        came[number] = checked(data, digest)
        if number == 9:
            raise DataLoss("not what it should be")

    takes = [functools.partial(take, number) for number in numbers]
    exchange = client.begin_run(address, [Question(DIFF_ID, number) for number in numbers], 30.0, takes)
    assert exchange is not None
    return exchange, came


async def test_several_come_in_one_exchange(client: ChunkClient, source: Source, shelf: Shelf) -> None:
    async with serving_chunks("127.0.0.1", 0, source.read, shelf.find) as port:
        address = ("127.0.0.1", port)
        assert client.begin_run(address, [FIRST], 30.0, [checked]) is None, "there is no connection"
        await ask(client, address)
        numbers = [30, 0, 7, 0, *range(1, 6)]  # of different lengths; the event loop has 0
        exchange, came = await begin_run(client, address, numbers)
        assert client.begin(address, FIRST, 30.0, checked) is None, "the connection is used"
        await wait_for(exchange)
        assert came == {number: CHUNKS[number] for number in numbers}
        assert await ask(client, address, Question(DIFF_ID, 2)) == CHUNKS[2]
        assert len(client._idle) == 1, "all of that was on one connection"


async def test_what_is_the_matter_with_one_is_not_with_others(
    client: ChunkClient, source: Source, address: tuple[str, int]
) -> None:
    await ask(client, address)
    exchange, came = await begin_run(client, address, [3, 99, 9, 4])
    await wait_for(exchange)
    assert came == {number: CHUNKS[number] for number in (3, 9, 4)}
    assert await ask(client, address, Question(DIFF_ID, 2)) == CHUNKS[2]
    assert len(client._idle) == 1


@pytest.mark.parametrize(
    ("answers", "kind"),
    [
        (pack_chunk(3) + b"abc" + pack_chunk(5) + b"some", Unavailable),
        (pack_chunk(3) + b"abc" + pack_chunk(1) + b"some", DataLoss),
        (pack_chunk(3) + b"abc" + pack_chunk(SIZE + 1), DataLoss),
    ],
    ids=["it closed the connection", "bytes behind the last", "too long"],
)
async def test_what_came_before_a_connection_failed_is_taken(
    client: ChunkClient, answers: bytes, kind: type[AfsError]
) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(QUESTION_SIZE)
        writer.write(pack_chunk(1) + b"x")
        await reader.readexactly(2 * QUESTION_SIZE)
        writer.write(answers)
        writer.write_eof()
        await reader.read()
        writer.close()

    async with await asyncio.start_server(talk, "127.0.0.1", 0) as server:
        address = server.sockets[0].getsockname()[:2]
        assert await ask(client, address) == b"x"
        exchange, came = await begin_run(client, address, [1, 2])
        with pytest.raises(kind):
            await wait_for(exchange)
    assert came == {1: b"abc"}
    assert not client._idle


async def test_a_run_that_is_given_up(client: ChunkClient, address: tuple[str, int], source: Source) -> None:
    await ask(client, address)
    source.gate.clear()
    exchange, came = await begin_run(client, address, [1, 2, 3])
    await until(lambda: source.reading == 1)
    exchange.cancel()
    await asyncio.wait([exchange.done])
    assert exchange.done.cancelled()
    assert not came
    assert not client._idle


async def test_more_questions_than_it_takes_at_once(source: Source, shelf: Shelf) -> None:
    async with serving_chunks("127.0.0.1", 0, source.read, shelf.find) as port:
        numbers = [number % 5 for number in range(3 * MOST_AHEAD)]
        questions = b"".join(pack_question(Question(DIFF_ID, number)) for number in numbers)
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.sendall(questions[:-1])
            for number in numbers[:-1]:
                wanted = pack_chunk(len(CHUNKS[number])) + CHUNKS[number]
                assert await asyncio.to_thread(sock.recv, len(wanted), socket.MSG_WAITALL) == wanted
            sock.sendall(questions[-1:])
            wanted = pack_chunk(len(CHUNKS[numbers[-1]]))
            assert await asyncio.to_thread(sock.recv, len(wanted), socket.MSG_WAITALL) == wanted


# Servers come and go


@pytest.fixture
def port() -> int:
    """One that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        number: int = listener.getsockname()[1]
        return number


async def test_nobody_listens(client: ChunkClient, port: int) -> None:
    with pytest.raises(
        Unavailable, match=f"^layerstore 127.0.0.1:{port} does not answer: .*refused|Connect call failed"
    ):
        await ask(client, ("127.0.0.1", port))
    with pytest.raises(Unavailable, match=r"^layerstore nowhere\.invalid:1 does not answer: "):
        await ask(client, ("nowhere.invalid", 1))


async def test_a_server_starts_anew(client: ChunkClient, source: Source, port: int) -> None:
    """Its old connections are closed: the question is asked on a new one, and nobody sees an error."""
    address = "127.0.0.1", port
    for _ in range(2):
        async with serving_chunks(*address, source.read):
            assert await ask(client, address) == CHUNKS[0]
    assert len(source.asked) == 2
    with pytest.raises(Unavailable):
        await ask(client, address)


async def test_a_connection_that_was_closed_while_it_was_idle(
    client: ChunkClient, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("afs.layerstore.chunkserver.IDLE_S", 0.01)
    async with serving_chunks("127.0.0.1", 0, source.read) as port:
        await ask(client, ("127.0.0.1", port))
        (connection,) = client._idle
        assert connection.sock is not None
        await readable(connection.sock)
        assert await ask(client, ("127.0.0.1", port)) == CHUNKS[0]
    assert source.asked == [FIRST, FIRST], "each reached it once"


async def readable(sock: socket.socket) -> None:
    """Wait until the peer has closed the connection."""
    ready, loop = asyncio.Event(), asyncio.get_running_loop()
    loop.add_reader(sock, ready.set)
    await ready.wait()
    loop.remove_reader(sock)


async def test_a_port_that_is_taken(source: Source, address: tuple[str, int]) -> None:
    with pytest.raises(
        FailedPrecondition, match=f"^cannot listen on 127.0.0.1:{address[1]} for chunks: Address already"
    ):
        async with serving_chunks(*address, source.read):
            pass


async def test_the_end_of_a_server_ends_what_it_reads(client: ChunkClient, source: Source) -> None:
    source.gate.clear()
    async with serving_chunks("127.0.0.1", 0, source.read) as port:
        asking = asyncio.create_task(ask(client, ("127.0.0.1", port)))
        await until(lambda: source.reading == 1)
    assert source.reading == 0
    with pytest.raises(Unavailable):
        await asking


@pytest.mark.parametrize("limit", ["_MOST", "_MOST_OF_ONE"])
async def test_more_connections_than_it_takes(
    source: Source, address: tuple[str, int], monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(f"afs.layerstore.chunkserver.{limit}", 1)
    client = ChunkClient(SIZE)
    source.gate.clear()
    first = asyncio.create_task(ask(client, address))
    await until(lambda: source.reading == 1)
    with pytest.raises(Unavailable):
        await ask(client, address)
    source.gate.set()
    assert await first == CHUNKS[0]
    client.close()


def test_nothing_is_left_open() -> None:
    """All descriptors of a client and a server are closed with them."""

    async def scenario() -> None:
        source = Source()
        async with serving_chunks("127.0.0.1", 0, source.read) as port:
            client = ChunkClient(SIZE)
            await asyncio.gather(*(ask(client, ("127.0.0.1", port), Question(DIFF_ID, n)) for n in range(8)))
            client.close()

    asyncio.run(scenario())
    before = set(os.listdir("/proc/self/fd"))
    asyncio.run(scenario())
    assert set(os.listdir("/proc/self/fd")) == before
