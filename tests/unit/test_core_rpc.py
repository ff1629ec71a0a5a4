"""Serving and calling with real gRPC servers in this process."""

import asyncio
import errno
import logging
import os
import re
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from typing_extensions import override

from afs.core.errors import (
    STATUS,
    AfsError,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    Unavailable,
    Unimplemented,
    status_of,
)
from afs.core.rpc import _OPTIONS, AddressInUse, calling, channel, serving

LOOPBACK = "127.0.0.1:0"
Handler = Callable[[bytes], Awaitable[bytes]]


class Service(grpc.GenericRpcHandler):
    """``/test/Unary`` and ``/test/Stream``, both answered by *handler*; the stream says "first" before."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self.closed = asyncio.Event()

    @override
    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[Any, Any] | None":
        if handler_call_details.method == "/test/Unary":
            return grpc.unary_unary_rpc_method_handler(self._unary)
        if handler_call_details.method == "/test/Stream":
            return grpc.unary_stream_rpc_method_handler(self._stream)
        return None

    async def _unary(self, request: bytes, context: Any) -> bytes:
        return await self._handler(request)

    async def _stream(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        try:
            yield b"first"
            yield await self._handler(request)
        finally:
            self.closed.set()

    def register(self, server: grpc.aio.Server) -> None:
        """For `serving`."""
        server.add_generic_rpc_handlers((self,))


def raising(error: BaseException) -> Service:
    """A service whose calls fail with *error*."""

    async def fail(_: bytes) -> bytes:
        raise error

    return Service(fail)


async def echo(request: bytes) -> bytes:
    """A handler that works."""
    return request


async def ask(address: str, method: str = "/test/Unary") -> list[bytes]:
    """Everything that a call answers."""
    async with channel(address) as opened:
        with calling(f"test {address}"):
            if method == "/test/Stream":
                stream: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = opened.unary_stream(method)
                return [part async for part in stream(b"x")]
            unary: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = opened.unary_unary(method)
            return [await unary(b"x")]


@pytest.mark.parametrize("method", ["/test/Unary", "/test/Stream"])
@pytest.mark.parametrize("cls", list(STATUS))
async def test_every_error_arrives_as_it_was_raised(
    cls: type[AfsError], method: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving([LOOPBACK], raising(cls("layer x:\n  is broken")).register) as (address,):
        with pytest.raises(cls, match=r"^layer x: is broken$") as caught:
            await ask(address, method)
    assert type(caught.value) is (Internal if cls is AfsError else cls)
    assert not caplog.records  # errors on purpose are the client's business


@pytest.mark.parametrize("method", ["/test/Unary", "/test/Stream"])
async def test_a_bug_is_logged_with_its_traceback(method: str, caplog: pytest.LogCaptureFixture) -> None:
    async with serving([LOOPBACK], raising(KeyError("field")).register) as (address,):
        with pytest.raises(Internal, match=r"^internal error: KeyError: 'field'$"):
            await ask(address, method)
    (record,) = caplog.records
    assert (record.levelno, record.message) == (logging.ERROR, "unexpected KeyError")
    assert record.exc_info is not None


async def test_an_error_of_the_system_keeps_its_words(caplog: pytest.LogCaptureFixture) -> None:
    async with serving([LOOPBACK], raising(OSError(errno.EIO, "Input/output error", "/x")).register) as (address,):
        with pytest.raises(Internal, match=re.escape("[Errno 5] Input/output error: '/x'")):
            await ask(address)
    assert [record.message for record in caplog.records] == ["unexpected OSError"]


@pytest.mark.parametrize("error", [InvalidArgument("no \ud800 here"), OSError(errno.EIO, "broken", "/x\udcff")])
async def test_what_utf8_cannot_say_arrives_escaped(error: Exception) -> None:
    async with serving([LOOPBACK], raising(error).register) as (address,), channel(address) as opened:
        unary: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = opened.unary_unary("/test/Unary")
        with pytest.raises(grpc.aio.AioRpcError, match=r"\\ud800|\\udcff"):
            await unary(b"", timeout=10)


async def test_unknown_methods_are_unimplemented() -> None:
    async with serving([LOOPBACK], Service(echo).register) as (address,):
        assert await ask(address) == [b"x"]
        assert await ask(address, "/test/Stream") == [b"first", b"x"]
        with pytest.raises(Unimplemented):
            await ask(address, "/test/Nothing")


async def test_a_handler_has_cleaned_up_when_its_client_went_away() -> None:
    blocked = asyncio.Event()

    async def hang(_: bytes) -> bytes:
        blocked.set()
        await asyncio.Event().wait()
        return b""

    service = Service(hang)
    async with serving([LOOPBACK], service.register) as (address,), channel(address) as opened:
        stream: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = opened.unary_stream("/test/Stream")
        call = stream(b"x")
        assert await call.read() == b"first"
        await blocked.wait()
        call.cancel()
        await asyncio.wait_for(service.closed.wait(), 10)


async def test_stopping_cancels_calls_after_the_grace() -> None:
    started = asyncio.Event()

    async def hang(_: bytes) -> bytes:
        started.set()
        await asyncio.Event().wait()
        return b""

    async with serving([LOOPBACK], Service(hang).register, grace_s=0) as (address,):
        call = asyncio.create_task(ask(address))
        await started.wait()
    with pytest.raises((Unavailable, AfsError)):
        await call


# Addresses


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.1:0", "example.com:0"])
async def test_other_than_loopback_addresses_need_a_word(address: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{re.escape(address)} is not a loopback address: give certificates"):
        async with serving([address], Service(echo).register):
            pass


async def test_insecure_serves_every_address() -> None:
    async with serving(["0.0.0.0:0"], Service(echo).register, insecure=True) as (address,):
        assert address.startswith("0.0.0.0:")
        assert not address.endswith(":0")
        assert await ask(f"127.0.0.1:{address.rpartition(':')[2]}") == [b"x"]


@pytest.mark.parametrize("address", ["", "localhost", "localhost:", "localhost:http", "127.0.0.1"])
async def test_what_is_no_address(address: str) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(f"not an address: {address!r}; write HOST:PORT or unix:PATH")):
        async with serving([address], Service(echo).register):
            pass


async def test_a_port_in_use_is_told() -> None:
    async with serving([LOOPBACK], Service(echo).register) as (address,):
        with pytest.raises(AddressInUse, match=f"^cannot listen on {address}: ") as caught:
            async with serving([address], Service(echo).register):
                pass
    assert isinstance(caught.value, FailedPrecondition)
    assert status_of(caught.value).exit_code == 67


async def test_a_port_is_free_again_at_once() -> None:
    async with serving([LOOPBACK], Service(echo).register) as (address,):
        await ask(address)
    async with serving([address], Service(echo).register) as again:
        assert again == [address]


async def test_sockets_are_private_and_go_away(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    mask = os.umask(0o022)
    os.umask(mask)
    async with serving([f"unix:{path}", LOOPBACK], Service(echo).register) as bound:
        assert bound[0] == f"unix:{path}"
        assert stat.S_IMODE(path.lstat().st_mode) == 0o600
        assert await ask(f"unix:{path}") == await ask(bound[1]) == [b"x"]
    assert list(tmp_path.iterdir()) == []
    after = os.umask(mask)
    assert after == mask


async def test_a_socket_of_a_killed_server_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert path.is_socket()
    async with serving([f"unix:{path}"], Service(echo).register):
        assert await ask(f"unix:{path}") == [b"x"]


async def test_a_file_is_not_taken_for_a_socket(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(InvalidArgument, match=f"^{path} is in the way: not a socket$"):
        async with serving([f"unix:{path}"], Service(echo).register):
            pass
    assert path.read_text() == "data"


async def test_a_long_socket_path_is_told(tmp_path: Path) -> None:
    path = str(tmp_path / "x").ljust(108, "x")
    with pytest.raises(InvalidArgument, match=f"^socket path is longer than 107 bytes: {path}$"):
        async with serving([f"unix:{path}"], Service(echo).register):
            pass


async def test_a_socket_in_a_missing_directory_is_told(tmp_path: Path) -> None:
    with pytest.raises(AddressInUse, match=f"^cannot listen on unix:{tmp_path}/no/s.sock: "):
        async with serving([f"unix:{tmp_path}/no/s.sock"], Service(echo).register):
            pass


async def test_a_failure_takes_back_what_was_bound_before(tmp_path: Path) -> None:
    addresses = [f"unix:{tmp_path}/a.sock", f"unix:{tmp_path}/no/b.sock"]
    with pytest.raises(AddressInUse):
        async with serving(addresses, Service(echo).register):
            pass
    assert list(tmp_path.iterdir()) == []


async def test_calling_nobody_names_the_peer(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=f"^test unix:{tmp_path}/none does not answer: "):
        await ask(f"unix:{tmp_path}/none")


def test_grpc_knows_every_option() -> None:
    """It ignores others in silence: a misspelt one once broke streams off that had been silent for 40 s."""
    (library,) = Path(grpc.__file__).parent.glob("_cython/cygrpc*.so")
    code = library.read_bytes()
    assert [name for name, _ in _OPTIONS if f"{name}\0".encode() not in code] == []


async def test_a_lease_must_be_longer_than_a_busy_machine_s_pauses() -> None:
    with pytest.raises(InvalidArgument, match=r"a lease of 0\.5 s is too short"):
        channel("127.0.0.1:1", lease_ttl=0.5)
    with pytest.raises(InvalidArgument, match=r"a lease of 0\.5 s is too short"):
        async with serving([LOOPBACK], Service(echo).register, lease_ttl=0.5):
            pass
    async with serving([LOOPBACK], Service(echo).register, lease_ttl=1) as (address,):
        assert await ask(address) == [b"x"]
