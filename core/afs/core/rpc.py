"""gRPC set-up and the mapping between AfsError and gRPC status; no other module knows status codes.

Addresses are ``host:port`` or ``unix:PATH``. Without certificates a server binds loopback addresses and unix sockets
only, unless told ``insecure``.
"""

import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any, Never

import grpc
import grpc.aio
from typing_extensions import override

from afs.core.errors import (
    AfsError,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    error_for_grpc,
    one_line,
    status_of,
)

log = logging.getLogger(__name__)

EOF: object = getattr(grpc.aio, "EOF")  # noqa: B009 - what read() gives at the end; type stubs disagree on it
_NO_CONNECTION = (
    "failed to connect",
    "Socket closed",
    "Stream removed",
    "recvmsg:",
    "Connection reset",
    "connections to all backends failing",
)
MAX_MESSAGE = 16 << 20
_MAX_DETAILS = 1000  # characters; details travel as a header, percent-encoded, and gRPC refuses headers over 8 KiB
_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.max_send_message_length", MAX_MESSAGE),
    ("grpc.so_reuseport", 0),  # a second server on the port must fail, not share it
    ("grpc.http2.lookahead_bytes", 4 << 20),  # one window holds a message of 1 MiB with room to spare
    # A peer that loses power sends no reset: without keepalive a call to it waits for ever.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # or a minute: the other one is TCP's, whose peer's kernel answers
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # or a stream that is silent for 40 s is broken off
    ("grpc.http2.max_ping_strikes", 0),  # nor for a client that was told a shorter time to live
)
MIN_LEASE_TTL_S = 1.0  # below it a busy machine alone breaks connections off


def _options(lease_ttl: float | None) -> list[tuple[str, int]]:
    """The options of a server or channel whose connections end *lease_ttl* seconds after the other side fell silent.

    An HTTP/2 ping is answered by the library, not by the kernel: a process that is stopped does not answer, whose TCP
    still acknowledges. The timeout is TCP_USER_TIMEOUT as well, which ends a connection whose other side has stopped
    reading: behind a full window no ping gets through. What is left of the time is for noticing and clearing up.
    """
    if lease_ttl is None:
        return list(_OPTIONS)
    if lease_ttl < MIN_LEASE_TTL_S:
        raise InvalidArgument(f"a lease of {lease_ttl:g} s is too short: at least {MIN_LEASE_TTL_S:g} s")
    part = int(lease_ttl * 400)
    changed = dict.fromkeys(("grpc.keepalive_time_ms", "grpc.keepalive_timeout_ms", "grpc.http2.ping_timeout_ms"), part)
    return list((dict(_OPTIONS) | changed).items())


def to_afs_error(error: grpc.aio.AioRpcError, peer: str) -> AfsError:
    """The AfsError that *error* carries; a connection failure names the *peer* that was called."""
    details = error.details() or ""
    cls = error_for_grpc(error.code().name)
    # What gRPC itself says when nobody is there; a peer's own words are passed on as they are.
    if error.code() is grpc.StatusCode.UNAVAILABLE and (not details or details.startswith(_NO_CONNECTION)):
        return cls(f"{peer} does not answer: {details or 'no connection'}")
    return cls(details or f"{peer} answered {error.code().name}")


CALL_ENDED = (grpc.aio.AioRpcError, grpc.aio.BaseError, asyncio.InvalidStateError)
"""What :func:`send` raises if the call has ended, on either side; the call's status comes with the read."""


async def send(call: Any, message: bytes) -> None:
    """Write a serialized *message* to a streaming *call* of grpc.aio; waits while the other side does not read.

    One of CALL_ENDED if the call has ended, also if this side has cancelled it; CancelledError if the task was cancelled.

    The call's own write() says INTERNAL in place of the server's status if the server ends the call meanwhile, and why a
    run was refused would be lost; and it waits for ever if the call is cancelled while it connects, since that ends the
    task that would have told that the connection is there (grpcio 1.85, aio/_call.py).
    """
    connected: asyncio.Event = call._metadata_sent
    if not connected.is_set():
        call.add_done_callback(lambda _: connected.set())
        await connected.wait()
    if call.done():
        raise asyncio.InvalidStateError("the call has ended")
    await call._cython_call.send_serialized_message(message)


@contextlib.contextmanager
def calling(peer: str) -> Iterator[None]:
    """Turn gRPC errors of the block into AfsErrors; *peer* says who was called, e.g. ``layerstore 127.0.0.1:50051``."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise to_afs_error(error, peer) from None


async def abort(context: "grpc.aio.ServicerContext[Any, Any]", error: BaseException) -> Never:
    """End the call with the status of *error*. Only unforeseen exceptions are logged with their traceback."""
    told = as_afs_error(error)
    if not isinstance(error, AfsError) and not isinstance(told, ResourceExhausted):
        log.error("unexpected %s", type(error).__name__, exc_info=error)
    line = told.line
    if len(line) > _MAX_DETAILS:
        line = line[:_MAX_DETAILS] + " ..."
    await context.abort(grpc.StatusCode[status_of(told).grpc], line)


def as_afs_error(error: BaseException) -> AfsError:
    """The AfsError that callers get for *error*: a full disk is no bug, other foreign exceptions are Internal."""
    if isinstance(error, AfsError):
        return error
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return ResourceExhausted(f"no space left: {error}") if full else Internal(one_line(str(error)))
    return Internal(f"internal error: {type(error).__name__}: {error}")


class _ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Maps exceptions of every handler; handlers themselves just raise AfsErrors."""

    def __init__(self) -> None:
        self._guarded: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}  # by method; made once, not for each call

    @override
    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any] | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        method = str(handler_call_details.method)
        if method not in self._guarded:
            handler = await self._guard(continuation, handler_call_details)
            if handler is None:
                return None
            self._guarded[method] = handler
        return self._guarded[method]

    async def _guard(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any] | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        if handler.response_streaming:
            inner = handler.stream_stream if handler.request_streaming else handler.unary_stream
            make = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
            return make(_guard_stream(inner), handler.request_deserializer, handler.response_serializer)
        inner = handler.stream_unary if handler.request_streaming else handler.unary_unary
        make = (
            grpc.stream_unary_rpc_method_handler if handler.request_streaming else grpc.unary_unary_rpc_method_handler
        )
        return make(_guard_unary(inner), handler.request_deserializer, handler.response_serializer)


def _guard_unary(inner: Any) -> Any:
    async def guarded(request: Any, context: Any) -> Any:
        try:
            return await inner(request, context)
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Exception as error:
            await abort(context, error)

    return guarded


def _guard_stream(inner: Any) -> Any:
    # A coroutine that writes, not a generator that yields: a call that is cancelled while a message is being sent then
    # raises here, inside the aclosing. gRPC drops a generator without closing it, and the handler would give back what it
    # holds whenever the garbage collector comes, in a task that nobody waits for.
    async def guarded(request: Any, context: Any) -> None:
        try:
            async with contextlib.aclosing(inner(request, context)) as messages:
                async for message in messages:
                    await context.write(message)
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Exception as error:
            await abort(context, error)

    return guarded


def check_address(address: str, insecure: bool) -> None:
    """InvalidArgument unless *address* is a unix socket, a loopback address, or served in the clear on purpose."""
    if address.startswith("unix:") or insecure:
        return
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not port.isdigit():
        raise InvalidArgument(f"not an address: {address!r}; write HOST:PORT or unix:PATH")
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback:
            return
    if host != "localhost":
        raise InvalidArgument(
            f"{address} is not a loopback address: give certificates or --insecure to serve it in the clear"
        )


def _clear_socket(path: str) -> None:
    """Remove what a killed server left. A live server's socket is refused by its lock at a higher level, or replaced."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise InvalidArgument(f"{path} is in the way: not a socket")
        os.unlink(path)


@contextlib.asynccontextmanager
async def serving(
    addresses: list[str],
    register: Callable[[grpc.aio.Server], None],
    *,
    insecure: bool = False,
    grace_s: float = 1.0,
    options: Sequence[tuple[str, Any]] = (),
    lease_ttl: float | None = None,
) -> AsyncIterator[list[str]]:
    """Serve on all *addresses* while the block runs and give the bound ones (port 0 becomes the real port).

    Unix sockets get mode 0600. On exit running calls have *grace_s* seconds, then they are cancelled. *options* are gRPC's,
    instead of or besides those that all servers have. Calls of a client that vanished are cancelled within *lease_ttl*
    seconds (15 s if None).
    """
    for address in addresses:
        check_address(address, insecure)
    chosen = {**dict(_options(lease_ttl)), **dict(options)}
    server = grpc.aio.server(interceptors=[_ErrorInterceptor()], options=list(chosen.items()))
    register(server)
    bound: list[str] = []
    try:
        for address in addresses:
            bound.append(_bind(server, address))  # noqa: PERF401 - what is bound when a later one fails has to go
        await server.start()
        yield bound
    finally:
        await server.stop(grace_s)
        for address in bound:
            if address.startswith("unix:"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(address.removeprefix("unix:"))


def _bind(server: grpc.aio.Server, address: str) -> str:
    """Bind *address* and return it, with the port that it got."""
    is_socket = address.startswith("unix:")
    if is_socket:
        path = address.removeprefix("unix:")
        if len(os.fsencode(path)) > 107:  # sun_path of unix(7)
            raise InvalidArgument(f"socket path is longer than 107 bytes: {path}")
        _clear_socket(path)
    old = os.umask(0o177)  # for sockets; ports do not care
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise AddressInUse(f"cannot listen on {address}: {error}") from None
    finally:
        os.umask(old)
    return address if is_socket else f"{address.rpartition(':')[0]}:{port}"


class AddressInUse(FailedPrecondition):
    """A server could not bind its address."""


def channel(address: str, *, shared: bool = True, lease_ttl: float | None = None) -> grpc.aio.Channel:
    """A channel to *address*; it connects at the first call and reconnects within a second after a restart.

    Channels to one address share a TCP connection, unless not *shared*. Calls to a server that vanished fail within
    *lease_ttl* seconds (15 s if None).
    """
    options = (
        *_options(lease_ttl),
        ("grpc.initial_reconnect_backoff_ms", 100),
        # A socket of this machine costs nothing to try, and its server is back in a moment.
        ("grpc.max_reconnect_backoff_ms", 200 if address.startswith("unix:") else 1000),
        ("grpc.use_local_subchannel_pool", 0 if shared else 1),
    )
    return grpc.aio.insecure_channel(address, options=options)
