"""HTTP/1.1 as far as monitoring needs it: GET and HEAD, one request per connection, small bounds on everything.

Each connection is a task of its own that ends within the timeout; there is no state besides their number.
"""

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit

from afs.core.errors import AfsError, InvalidArgument, Unavailable
from afs.core.rpc import AddressInUse

log = logging.getLogger(__name__)
_MAX_HEAD = 8192  # bytes of a request, or of the head of an answer
_MAX_BODY = 16 << 20
_TIMEOUT_S = 10.0
_MAX_CONNECTIONS = 64
_REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed", 503: "Service Unavailable"}
JSON, TEXT = "application/json", "text/plain; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Answer:
    """A response."""

    body: bytes
    kind: str = TEXT
    code: int = 200


def json_answer(document: object) -> Answer:
    """*document* as indented JSON."""
    return Answer((json.dumps(document, indent=1) + "\n").encode(), JSON)


Handler = Callable[[dict[str, list[str]]], Awaitable[Answer]]


@contextlib.asynccontextmanager
async def serving_http(address: str, handlers: dict[str, Handler]) -> AsyncIterator[str]:
    """Serve *handlers* by path, called with the query, on HOST:PORT while the block runs; the bound address."""
    host, port = split_address(address)
    open_now: set[asyncio.Task[Any]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        open_now.add(task)
        try:
            if len(open_now) <= _MAX_CONNECTIONS:
                async with asyncio.timeout(_TIMEOUT_S):
                    await _serve_one(reader, writer, handlers)
        except (TimeoutError, OSError) as error:
            log.debug("HTTP: %r", error)
            writer.transport.abort()  # close() would wait for as long as the other side does not read
        finally:
            open_now.discard(task)
            writer.transport.abort() if writer.is_closing() else writer.close()

    try:
        server = await asyncio.start_server(serve, host, port, limit=_MAX_HEAD)
    except OSError as error:
        raise AddressInUse(f"cannot listen on {address}: {error.strerror or error}") from None
    try:
        yield f"{address.rpartition(':')[0]}:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in list(open_now):
            task.cancel()
        await asyncio.gather(*open_now, return_exceptions=True)


def split_address(address: str) -> tuple[str, int]:
    """``HOST:PORT``; InvalidArgument."""
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and int(port) < 65536):
        raise InvalidArgument(f"not an address: {address!r}; write HOST:PORT")
    return host.strip("[]"), int(port)


async def _serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, handlers: dict[str, Handler]) -> None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return  # it said nothing, or half of something
    except asyncio.LimitOverrunError:
        answer, method = Answer(b"the request is too long\n", code=400), "GET"
    else:
        method, answer = await _answer(head, handlers)
    lines = [
        f"HTTP/1.1 {answer.code} {_REASONS[answer.code]}",
        f"Content-Type: {answer.kind}",
        f"Content-Length: {len(answer.body)}",
        "Connection: close",
        "Cache-Control: no-store",
    ]
    writer.write("\r\n".join([*lines, "", ""]).encode() + (b"" if method == "HEAD" else answer.body))
    await writer.drain()


async def _answer(head: bytes, handlers: dict[str, Handler]) -> tuple[str, Answer]:
    words = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        return "GET", Answer(b"not an HTTP/1.1 request\n", code=400)
    method, target, _ = words
    if method not in ("GET", "HEAD"):
        return method, Answer(b"only GET and HEAD\n", code=405)
    try:
        url = urlsplit(target)
        query = parse_qs(url.query, max_num_fields=16)
    except ValueError:
        return method, Answer(b"not a URL\n", code=400)
    handler = handlers.get(url.path)
    if handler is None:
        return method, Answer(f"there is {', '.join(handlers)}\n".encode(), code=404)
    try:
        return method, await handler(query)
    except AfsError as error:
        return method, Answer(f"{error.line}\n".encode(), code=503)


async def get(address: str, path: str, timeout: float) -> bytes:
    """The body of ``http://address/path``; Unavailable if it is not there within *timeout* seconds."""
    host, port = split_address(address)
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_connection(host, port, limit=_MAX_HEAD)
            try:
                writer.write(f"GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n".encode())
                head = await reader.readuntil(b"\r\n\r\n")
                if head.split(b" ", 2)[1:2] != [b"200"]:
                    raise Unavailable(f"{address} answered {head.split(bytes([13]))[0][:100].decode('latin-1')}")
                body = bytearray()
                while part := await reader.read(1 << 16):
                    body += part
                    if len(body) > _MAX_BODY:
                        raise Unavailable(f"{address} answered more than {_MAX_BODY} bytes")
                return bytes(body)
            finally:
                writer.transport.abort()
    except TimeoutError:
        raise Unavailable(f"{address} does not answer within {timeout:g} s") from None
    except OSError as error:  # asyncio puts words of its own in place of the system's
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise Unavailable(f"{address} does not answer: {why}") from None
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
        raise Unavailable(f"{address} does not answer: {error}") from None
