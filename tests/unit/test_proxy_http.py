"""The proxy's HTTP server and its questions to peers, and results of idempotency keys over time."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from afs.core.errors import InvalidArgument, Unavailable
from afs.core.rpc import AddressInUse
from afs.proto.v1 import afslet_pb2 as pb
from afs.proxy import httpd
from afs.proxy.httpd import Answer, json_answer, serving_http
from afs.proxy.idempotency import Ended, Runs, fingerprint
from afs.proxy.peers import PeerWatch
from tests.testbed.proxynodes import Clock, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

Query = dict[str, list[str]]
LOOPBACK = "127.0.0.1:0"


@asynccontextmanager
async def served() -> AsyncIterator[str]:
    """A page that repeats its query, and one that cannot be had."""

    async def page(query: Query) -> Answer:
        return json_answer(query)

    async def broken(query: Query) -> Answer:
        raise Unavailable("discovery is away")

    async with serving_http(LOOPBACK, {"/page": page, "/broken": broken}) as address:
        yield address


async def exchange(address: str, request: bytes) -> bytes:
    """What comes back until the server closes."""
    reader, writer = await asyncio.open_connection(*httpd.split_address(address))
    try:
        writer.write(request)
        return await asyncio.wait_for(reader.read(), 5)
    finally:
        writer.close()


async def test_get() -> None:
    async with served() as address:
        assert json.loads(await httpd.get(address, "/page?a=1&a=2", 5)) == {"a": ["1", "2"]}
        with pytest.raises(Unavailable, match=r"answered HTTP/1.1 503 Service Unavailable$"):
            await httpd.get(address, "/broken", 5)


@pytest.mark.parametrize(
    ("request_line", "code", "body"),
    [
        (b"GET /page HTTP/1.1", b"200", b"{}\n"),
        (b"GET /page HTTP/1.0", b"200", b"{}\n"),
        (b"HEAD /page HTTP/1.1", b"200", b""),
        (b"GET /nothing HTTP/1.1", b"404", b"there is /page, /broken\n"),
        (b"GET /broken HTTP/1.1", b"503", b"discovery is away\n"),
        (b"POST /page HTTP/1.1", b"405", b"only GET and HEAD\n"),
        (b"GET /page HTTP/2", b"400", b"not an HTTP/1.1 request\n"),
        (b"\xff\xfe", b"400", b"not an HTTP/1.1 request\n"),
        (b"GET /page?" + b"a&" * 99 + b" HTTP/1.1", b"400", b"not a URL\n"),
        (b"GET //[ HTTP/1.1", b"400", b"not a URL\n"),
        (b"GET /" + b"x" * 9000 + b" HTTP/1.1", b"400", b"the request is too long\n"),
    ],
)
async def test_requests(request_line: bytes, code: bytes, body: bytes) -> None:
    async with served() as address:
        answer = await exchange(address, request_line + b"\r\nHost: x\r\n\r\n")
    head, _, rest = answer.partition(b"\r\n\r\n")
    assert head.split(b" ")[1] == code
    assert rest == body
    assert b"Connection: close" in head


async def test_who_says_nothing_or_half_of_it_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(httpd, "_TIMEOUT_S", 0.05)
    async with served() as address:
        assert await exchange(address, b"") == b""
        assert await exchange(address, b"GET /page HTT") == b""
        assert json.loads(await httpd.get(address, "/page", 5)) == {}


async def test_who_does_not_read_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(httpd, "_TIMEOUT_S", 0.05)
    body = bytes(32 << 20)  # more than the kernel buffers

    async def large(query: Query) -> Answer:
        return Answer(body)

    async with serving_http(LOOPBACK, {"/": large}) as address:
        before = len(asyncio.all_tasks())
        reader, writer = await asyncio.open_connection(*httpd.split_address(address), limit=1024)
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        await until(lambda: len(asyncio.all_tasks()) > before)
        await until(lambda: len(asyncio.all_tasks()) == before)
        assert len(await asyncio.wait_for(reader.read(), 5)) < len(body)
        writer.close()


async def test_an_address_that_is_taken() -> None:
    async with served() as address:
        with pytest.raises(AddressInUse, match=f"^cannot listen on {address}: "):
            async with serving_http(address, {}):
                pass


@asynccontextmanager
async def peer(own_id: str, queued: int, running: int) -> AsyncIterator[str]:
    """Another proxy's status."""

    async def status(query: Query) -> Answer:
        assert query == {"local": ["1"]}, "it must not ask us in turn"
        return json_answer({"id": own_id, "queue": {"queued": queued, "running": running}})

    async with serving_http(LOOPBACK, {"/status": status}) as address:
        yield address


async def test_peers_are_added_up_without_oneself_and_the_silent_are_named() -> None:
    async with peer("me", 100, 100) as own, peer("b", 2, 3) as two, peer("c", 4, 5) as three, served() as other:
        watch = PeerWatch([own, two, three, "127.0.0.1:1", other], own_id="me")
        found = await watch.ask()
        await watch.close()
    assert (found.queued, found.running, found.answering) == (6, 8, [two, three])
    assert found.unreachable["127.0.0.1:1"] == "127.0.0.1:1 does not answer: Connection refused"
    assert found.unreachable[other] == f"{other} answered HTTP/1.1 404 Not Found"
    assert len(found.unreachable) == 2


async def test_something_else_than_a_proxy_is_named() -> None:
    async def status(query: Query) -> Answer:
        return Answer(b"[1]")

    async with serving_http(LOOPBACK, {"/status": status}) as address:
        watch = PeerWatch([address])
        found = await watch.ask()
    assert found.unreachable[address].startswith(f"{address} is no afs_proxy: TypeError")


def ended(code: int) -> Ended:
    """A run that ended with *code*."""
    accepted = pb.ExecuteResponse(accepted=pb.Accepted(accepted=True, node_id="n")).SerializeToString()
    return Ended(accepted, pb.ExecuteResponse(result=pb.Result(exit_code=code)).SerializeToString())


async def test_results_of_keys_are_forgotten_after_a_while_and_when_there_are_many() -> None:
    clock = Clock()
    runs = Runs(10.0, 2, clock)
    mark = fingerprint(pb.StartRequest(image="i", command=["c"]))
    for number in range(3):
        assert runs.begin(("t", str(number)), mark) is None
        runs.end(("t", str(number)), ended(number))
        clock.now += 1
    assert runs.begin(("t", "0"), mark) is None, "the oldest of three"
    runs.end(("t", "0"), None)
    found = runs.begin(("t", "2"), mark)
    assert isinstance(found, Ended)
    _, result, _ = (pb.ExecuteResponse.FromString(data) for data in found.replay())
    assert (result.result.exit_code, result.result.replayed) == (2, True)
    with pytest.raises(InvalidArgument, match="was used for another image or command"):
        runs.begin(("t", "2"), fingerprint(pb.StartRequest(image="i", command=["other"])))
    clock.now += 8.5
    assert runs.begin(("t", "1"), mark) is None, "after ten seconds"
    runs.end(("t", "1"), None)
    clock.now += 1
    assert runs.begin(("t", "2"), mark) is None
    runs.end(("t", "2"), None)


async def test_who_waits_for_a_key_asks_again_when_it_is_free() -> None:
    runs = Runs(10.0, 2)
    key, mark = ("t", "k"), fingerprint(pb.StartRequest(image="i"))
    assert runs.begin(key, mark) is None
    waiting = [runs.begin(key, mark) for _ in range(3)]
    assert all(isinstance(each, asyncio.Future) and not each.done() for each in waiting)
    assert isinstance(waiting[0], asyncio.Future)
    runs.give_up(key, waiting[0])
    runs.end(key, None)
    assert [each.done() for each in waiting if isinstance(each, asyncio.Future)] == [False, True, True]
    assert runs.begin(key, mark) is None
    assert isinstance(runs.begin(key, mark), asyncio.Future)
