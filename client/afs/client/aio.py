"""The asyncio client."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import grpc.aio

from afs.client.events import Accepted, DiffChunk, DiffStart, Done, Event, Finished, Log, Outcome, RunResult
from afs.client.files import upload_messages
from afs.core.errors import AfsError, Internal
from afs.core.rpc import EOF, calling, channel
from afs.proto.v1 import afslet_pb2 as pb
from afs.proto.v1 import proxy_pb2
from afs.proto.v1.afslet_pb2_grpc import AfsletStub
from afs.proto.v1.proxy_pb2_grpc import AfsProxyStub

DEFAULT_PROXY = "127.0.0.1:62051"
_OUTCOMES = {
    pb.OUTCOME_EXITED: Outcome.EXITED,
    pb.OUTCOME_SIGNALLED: Outcome.SIGNALLED,
    pb.OUTCOME_TIMED_OUT: Outcome.TIMED_OUT,
    pb.OUTCOME_OUT_OF_MEMORY: Outcome.OUT_OF_MEMORY,
    pb.OUTCOME_COMMAND_NOT_FOUND: Outcome.COMMAND_NOT_FOUND,
    pb.OUTCOME_COMMAND_NOT_EXECUTABLE: Outcome.COMMAND_NOT_EXECUTABLE,
}


class AfsClient:
    """A connection to ``afs_proxy`` (or to one ``afslet``); usable by many tasks at once."""

    def __init__(self, address: str = DEFAULT_PROXY) -> None:
        self._peer = f"AFS at {address}"
        self._channel = channel(address)
        self._afslet = AfsletStub(self._channel)
        self._proxy = AfsProxyStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; runs on it are cancelled."""
        await self._channel.close()

    async def execute(
        self,
        image: str,
        command: Sequence[str] = (),
        *,
        tag: str = "",
        cpu: int = 1,
        memory_mb: int = 512,
        timeout: float = 0,
        env: Mapping[str, str] | None = None,
        upload: Path | str | None = None,
        upload_to: str = "/",
        platform: tuple[str, str, str] = ("", "", ""),
        node_id: str = "",
        max_retries: int = 0,
        backoff: float = 0,
        force_local_fetch: bool = False,
    ) -> AsyncIterator[Event]:
        """Run *command* (the image's own if empty) and yield what happens, ending with :class:`Done`.

        *timeout* and *backoff* are in seconds, *memory_mb* in MiB. The directory *upload* is placed at *upload_to* in the
        container's root. While no node has room the proxy tries again, *max_retries* times (0: as long as this iterator
        lives). Closing the iterator early cancels the run. Raises AfsError if the cluster could not run it.
        """
        start = pb.StartRequest(
            image=image,
            tag=tag,
            command=command,
            cpu_cores=cpu,
            memory_mb=memory_mb,
            timeout_ms=int(timeout * 1000),
            node_id=node_id,
            platform_os=platform[0],
            platform_arch=platform[1],
            platform_variant=platform[2],
            proxy_dispatch_max_retries=max_retries,
            proxy_dispatch_backoff_ms=int(backoff * 1000),
            env=[f"{name}={value}" for name, value in (env or {}).items()],
            force_local_fetch=force_local_fetch,
            no_upload=upload is None,
            bytes_only=True,
        )
        files = upload_messages(Path(upload), upload_to) if upload is not None else None
        call = self._afslet.Execute()
        sending = asyncio.create_task(_send(call, start, files))
        try:
            with calling(self._peer):
                while (response := await call.read()) is not EOF:
                    event = _event(cast("pb.ExecuteResponse", response))
                    if event is not None:
                        yield event
        except (AfsError, asyncio.CancelledError):
            # A local fault of the upload cancelled the call, which read() reports as it does a cancellation of this
            # task: that fault is the cause.
            if sending.done() and not sending.cancelled() and (cause := sending.exception()) is not None:
                raise cause from None
            raise
        finally:
            call.cancel()
            sending.cancel()
            await asyncio.wait([sending])

    async def run(
        self,
        image: str,
        command: Sequence[str] = (),
        *,
        diff_to: Path | str | None = None,
        **options: Any,
    ) -> RunResult:
        """:meth:`execute` to its end, as one result. The diff goes to the file *diff_to* if given, else into the result."""
        streams = {"stdout": bytearray(), "stderr": bytearray()}
        node_id, finished, diff = "", None, bytearray()
        with contextlib.ExitStack() as stack:
            out = stack.enter_context(written_whole(Path(diff_to))) if diff_to is not None else None
            async with contextlib.aclosing(self.execute(image, command, **options)) as events:  # type: ignore[type-var]
                async for event in events:
                    match event:
                        case Accepted():
                            node_id = event.node_id
                        case Log():
                            streams[event.source] += event.data
                        case Finished():
                            finished = event
                        case DiffChunk():
                            out.write(event.data) if out is not None else diff.extend(event.data)
                        case DiffStart() | Done():
                            pass
        if finished is None:
            raise Internal(f"{self._peer} ended the run without a result")
        return RunResult(
            node_id,
            finished.exit_code,
            finished.outcome,
            finished.error,
            bytes(streams["stdout"]),
            bytes(streams["stderr"]),
            None if diff_to is not None else bytes(diff),
            finished.peak_memory,
            finished.cpu_time,
            finished.timings,
        )

    async def status(self) -> list[proxy_pb2.StatusResponse]:
        """The cluster's layerstores and afslets."""
        with calling(self._peer):
            request = proxy_pb2.StatusRequest(include_layerstores=True, include_afslets=True)
            return [response async for response in self._proxy.Status(request, timeout=10.0)]

    async def reconcile(self, image: str, replicas: int, *, tag: str = "") -> proxy_pb2.ReconcileImageReplicaResponse:
        """Have *replicas* nodes hold every layer of *image* completely."""
        with calling(self._peer):
            request = proxy_pb2.ReconcileImageReplicaRequest(image=image, tag=tag, replica=replicas)
            return await self._proxy.ReconcileImageReplica(request)


async def _send(call: Any, start: pb.StartRequest, files: Iterator[pb.ExecuteRequest] | None) -> None:
    try:
        await call.write(pb.ExecuteRequest(start=start))
        while files is not None and (message := await asyncio.to_thread(next, files, None)) is not None:
            await call.write(message)
        await call.done_writing()
    except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError):
        return  # the other side ended the call; its status comes with the read
    except BaseException:
        call.cancel()
        raise


@contextlib.contextmanager
def written_whole(path: Path) -> "Iterator[Any]":
    """A file to write that appears at *path* when the block succeeds, and leaves nothing when it fails."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as out:
            yield out
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _event(response: pb.ExecuteResponse) -> Event | None:
    match response.WhichOneof("payload"):
        case "accepted":
            return Accepted(response.accepted.node_id)
        case "log":
            # A server of before the bytes field sends text only.
            return Log(response.log.source, response.log.data or response.log.message.encode())
        case "result":
            return _finished(response.result)
        case "tar_header":
            return DiffStart(response.tar_header.name)
        case "tar_chunk":
            return DiffChunk(response.tar_chunk.data)
        case "done":
            return Done()
        case _:
            return None  # of a newer server


def _finished(result: pb.Result) -> Finished:
    timings = {field.name.removesuffix("_us"): value / 1e6 for field, value in result.timings.ListFields()}
    return Finished(
        result.exit_code,
        _OUTCOMES.get(result.outcome, Outcome.UNKNOWN),
        result.error,
        result.signal,
        result.peak_memory_bytes,
        result.cpu_time_us / 1e6,
        timings,
    )


def to_json(result: RunResult) -> str:
    """*result* without its diff as one line of JSON; output as text, undecodable bytes replaced."""
    document = {
        "node_id": result.node_id,
        "exit_code": result.exit_code,
        "outcome": result.outcome.value,
        "error": result.error,
        "stdout": result.stdout.decode(errors="replace"),
        "stderr": result.stderr.decode(errors="replace"),
        "peak_memory_bytes": result.peak_memory,
        "cpu_time_s": result.cpu_time,
        "timings_s": result.timings,
    }
    return json.dumps(document)
