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
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # or a stream that is silent for 40 s is broken off
)


def to_afs_error(error: grpc.aio.AioRpcError, peer: str) -> AfsError:
    """The AfsError that *error* carries; a connection failure names the *peer* that was called."""
    details = error.details() or ""
    cls = error_for_grpc(error.code().name)
    # What gRPC itself says when nobody is there; a peer's own words are passed on as they are.
    if error.code() is grpc.StatusCode.UNAVAILABLE and (not details or details.startswith(_NO_CONNECTION)):
        return cls(f"{peer} does not answer: {details or 'no connection'}")
    return cls(details or f"{peer} answered {error.code().name}")


@contextlib.contextmanager
def calling(peer: str) -> Iterator[None]:
    """Turn gRPC errors of the block into AfsErrors; *peer* says who was called, e.g. ``layerstore 127.0.0.1:50051``."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise to_afs_error(error, peer) from None


async def abort(context: "grpc.aio.ServicerContext[Any, Any]", error: BaseException) -> Never:
    """End the call with the status of *error*. Only unforeseen exceptions are logged with their traceback."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        error = ResourceExhausted(f"no space left: {error}")
    if not isinstance(error, AfsError):
        log.error("unexpected %s", type(error).__name__, exc_info=error)
        error = error if isinstance(error, OSError) else Internal(f"internal error: {type(error).__name__}: {error}")
    line = error.line if isinstance(error, AfsError) else one_line(str(error))
    if len(line) > _MAX_DETAILS:
        line = line[:_MAX_DETAILS] + " ..."
    await context.abort(grpc.StatusCode[status_of(error).grpc], line)


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
) -> AsyncIterator[list[str]]:
    """Serve on all *addresses* while the block runs and give the bound ones (port 0 becomes the real port).

    Unix sockets get mode 0600. On exit running calls have *grace_s* seconds, then they are cancelled. *options* are gRPC's,
    instead of or besides those that all servers have.
    """
    for address in addresses:
        check_address(address, insecure)
    server = grpc.aio.server(
        interceptors=[_ErrorInterceptor()], options=list({**dict(_OPTIONS), **dict(options)}.items())
    )
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


def channel(address: str, *, shared: bool = True) -> grpc.aio.Channel:
    """A channel to *address*; it connects at the first call and reconnects within a second after a restart.

    Channels to one address share a TCP connection, unless not *shared*.
    """
    options = (
        *_OPTIONS,
        ("grpc.initial_reconnect_backoff_ms", 100),
        # A socket of this machine costs nothing to try, and its server is back in a moment.
        ("grpc.max_reconnect_backoff_ms", 200 if address.startswith("unix:") else 1000),
        ("grpc.use_local_subchannel_pool", 0 if shared else 1),
    )
    return grpc.aio.insecure_channel(address, options=options)
