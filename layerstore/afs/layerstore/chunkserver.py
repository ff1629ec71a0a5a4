"""Answering peers who want chunks; see :mod:`afs.layerstore.chunkwire`.

State (one event loop): one task per connection, which answers one question after the other. A peer that is silent for
``IDLE_S`` or takes no bytes for ``SEND_S`` is let go; it connects again when it wants something.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

from afs.core.errors import AfsError, FailedPrecondition, InvalidArgument, status_of
from afs.layerstore.chunkwire import QUESTION_SIZE, Question, pack_chunk, pack_error, parse_question

log = logging.getLogger(__name__)
IDLE_S = 300.0
SEND_S = 60.0
_MOST = 1024  # connections

# Gives a chunk, or raises an AfsError for the asker.
Read = Callable[[Question], Awaitable[bytes]]


@contextlib.asynccontextmanager
async def serving_chunks(host: str, port: int, read: Read) -> AsyncIterator[int]:
    """Answer on *host* and *port* (0: the kernel's choice) with what *read* gives; the port."""
    (family, _, _, _, address), *_ = await asyncio.get_running_loop().getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    try:
        listener = socket.create_server(address, family=family, backlog=128)
    except OSError as error:
        raise FailedPrecondition(f"cannot listen on {host}:{port} for chunks: {error.strerror}") from None
    with listener:
        listener.setblocking(False)
        accepting = asyncio.create_task(_accept(listener, read), name=f"chunks on {host}:{port}")
        try:
            yield listener.getsockname()[1]
        finally:
            accepting.cancel()
            await asyncio.wait([accepting])


async def _accept(listener: socket.socket, read: Read) -> None:
    loop, connections = asyncio.get_running_loop(), set[asyncio.Task[None]]()
    try:
        while True:
            try:
                connection, (host, *_) = await loop.sock_accept(listener)
            except OSError as error:  # such as EMFILE, or one that was gone before it was accepted
                log.error("cannot accept a connection for chunks: %s", error)
                await asyncio.sleep(0.1)
                continue
            if len(connections) >= _MOST:
                log.warning("%d connections for chunks: refusing %s", _MOST, host)
                connection.close()
                continue
            task = asyncio.create_task(_serve(connection, read), name=f"chunks for {host}")
            connections.add(task)
            task.add_done_callback(connections.discard)
    finally:
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)


async def _serve(connection: socket.socket, read: Read) -> None:
    loop = asyncio.get_running_loop()
    question = bytearray(QUESTION_SIZE)
    with connection:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            while await _receive(connection, memoryview(question)):
                head, data = await _answer(bytes(question), read)
                async with asyncio.timeout(SEND_S):
                    await loop.sock_sendall(connection, head)
                    await loop.sock_sendall(connection, data)
        except (OSError, InvalidArgument) as error:
            log.info("chunks: %s", error)


async def _receive(connection: socket.socket, view: memoryview) -> bool:
    """Fill *view*; false at the end of the connection, or if nothing came for long."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(IDLE_S):
            while view:
                got = await loop.sock_recv_into(connection, view)
                if not got:
                    return False
                view = view[got:]
    except TimeoutError:
        return False
    return True


async def _answer(question: bytes, read: Read) -> tuple[bytes, bytes]:
    """Head and body. Raises InvalidArgument if it is no question: who asked does not speak our language."""
    wanted = parse_question(question)
    try:
        data = await read(wanted)
    except Exception as error:
        if not isinstance(error, AfsError):
            log.error("chunk %d of layer %s: %s", wanted.index, wanted.diff_id, status_of(error).grpc, exc_info=error)
        return pack_error(error), b""
    return pack_chunk(len(data)), data
