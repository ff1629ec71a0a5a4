"""A client as the user base has it: built from the wire document alone, without the project's generated code.

`DOCUMENT` repeats what the clients know of `afsletpb` and `afsproxy.v1`. The message classes are made from it, so a
request has only its field numbers, and a field that the project adds is unknown to this client.
"""

from __future__ import annotations

import re
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self, cast

import grpc
import grpc.aio
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping

DOCUMENT: Mapping[str, str] = {
    "afsletpb": """
        service Afslet: Execute stream ExecuteRequest -> stream ExecuteResponse
        service Afslet: GetRuntimeStatus GetRuntimeStatusRequest -> GetRuntimeStatusResponse
        enum FileType: FILE_TYPE_DIR=0, FILE_TYPE_FILE=1, FILE_TYPE_SYMLINK=2
        ExecuteRequest: 1 start StartRequest (oneof payload); 2 file_begin FileEntryBegin (oneof payload); 3 file_chunk FileChunk (oneof payload); 4 file_end FileEntryEnd (oneof payload)
        StartRequest: 1 image string; 2 tag string; 3 command repeated string; 4 cpu_cores int64; 5 memory_mb int64; 6 timeout_ms int64; 7 discovery_addr string; 8 force_local_fetch bool; 9 node_id string; 10 platform_os string; 11 platform_arch string; 12 platform_variant string; 13 proxy_dispatch_max_retries int64; 14 proxy_dispatch_backoff_ms int64; 15 env repeated string; 16 fuse_max_read_ahead_bytes int64
        FileEntryBegin: 1 path string; 2 type FileType; 3 mode uint32; 4 uid uint32; 5 gid uint32; 6 mtime_unix int64; 7 symlink_target string
        FileChunk: 1 data bytes
        FileEntryEnd: empty
        ExecuteResponse: 1 log LogMessage (oneof payload); 2 result Result (oneof payload); 3 tar_header TarHeader (oneof payload); 4 tar_chunk TarChunk (oneof payload); 5 done Done (oneof payload); 6 accepted Accepted (oneof payload)
        Accepted: 1 accepted bool
        LogMessage: 1 source string; 2 message string
        Result: 1 success bool; 2 exit_code int32; 3 error string
        TarHeader: 1 name string
        TarChunk: 1 data bytes
        Done: empty
        GetRuntimeStatusRequest: empty
        GetRuntimeStatusResponse: 1 running_containers int64; 2 limit_cpu_cores int64; 3 limit_memory_mb int64; 4 used_cpu_cores int64; 5 used_memory_mb int64; 6 available_cpu_cores int64; 7 available_memory_mb int64
        """,
    "afsproxy.v1": """
        service AfsProxy: Status StatusRequest -> stream StatusResponse
        service AfsProxy: ReconcileImageReplica ReconcileImageReplicaRequest -> ReconcileImageReplicaResponse
        StatusRequest: 1 include_layerstores bool; 2 include_afslets bool
        ReconcileImageReplicaRequest: 1 image string; 2 tag string; 3 platform_os string; 4 platform_arch string; 5 platform_variant string; 6 replica int32
        ReconcileImageReplicaResponse: 1 image_key string; 2 current_replica int32; 3 requested_replica int32; 4 ensured bool; 5 layers repeated ReconciledLayerPlacement
        ReconciledLayerPlacement: 1 digest string; 2 instances repeated LayerstoreTarget
        LayerstoreTarget: 1 node_id string; 2 endpoint string
        StatusSummary: 1 layerstore_instances int64; 2 afslet_instances int64; 3 afslet_reachable int64; 4 total_layers int64
        LayerstoreInstance: 1 node_id string; 2 endpoint string; 3 last_seen_unix int64; 4 cache_max_bytes int64; 5 layers repeated LayerInfo; 6 cached_images repeated string
        LayerInfo: 1 digest string; 2 afs_size int64
        AfsletInstance: 1 endpoint string; 2 reachable bool; 3 error string; 4 running_containers int64; 5 limit_cpu_cores int64; 6 limit_memory_mb int64; 7 used_cpu_cores int64; 8 used_memory_mb int64; 9 available_cpu_cores int64; 10 available_memory_mb int64
        StatusError: 1 source string; 2 message string
        StatusResponse: 1 summary StatusSummary (oneof payload); 2 layerstore LayerstoreInstance (oneof payload); 3 afslet AfsletInstance (oneof payload); 4 error StatusError (oneof payload)
        """,
}


@dataclass(frozen=True)
class Field:
    """One field as the document has it."""

    number: int
    name: str
    type: str
    repeated: bool = False
    oneof: str = ""


@dataclass(frozen=True)
class Rpc:
    """One method as the document has it."""

    service: str
    name: str
    request: str
    response: str
    request_stream: bool
    response_stream: bool


@dataclass(frozen=True)
class Package:
    """One proto package as the document has it."""

    messages: Mapping[str, tuple[Field, ...]]
    enums: Mapping[str, Mapping[str, int]]
    rpcs: tuple[Rpc, ...]


def _field(text: str) -> Field:
    match = re.fullmatch(r"(\d+) (\w+) (repeated )?(\w+)(?: \(oneof (\w+)\))?", text)
    assert match is not None, text
    return Field(int(match[1]), match[2], match[4], bool(match[3]), match[5] or "")


def _rpc(service: str, text: str) -> Rpc:
    match = re.fullmatch(r"(\w+) (stream )?(\w+) -> (stream )?(\w+)", text)
    assert match is not None, text
    return Rpc(service, match[1], match[3], match[5], bool(match[2]), bool(match[4]))


def read_document(package: str) -> Package:
    """A package of `DOCUMENT`, parsed."""
    messages: dict[str, tuple[Field, ...]] = {}
    enums: dict[str, Mapping[str, int]] = {}
    rpcs = []
    for line in DOCUMENT[package].strip().splitlines():
        head, _, rest = line.strip().partition(": ")
        kind, _, name = head.rpartition(" ")
        if kind == "service":
            rpcs.append(_rpc(name, rest))
        elif kind == "enum":
            enums[name] = {key: int(value) for key, _, value in (entry.partition("=") for entry in rest.split(", "))}
        else:
            messages[name] = () if rest == "empty" else tuple(_field(text) for text in rest.split("; "))
    return Package(messages, enums, tuple(rpcs))


def _descriptors(package: str, content: Package) -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(name=f"old/{package}.proto", package=package, syntax="proto3")
    for enum, values in content.enums.items():
        made = file.enum_type.add(name=enum)
        for key, number in values.items():
            made.value.add(name=key, number=number)
    kinds = descriptor_pb2.FieldDescriptorProto
    for message, fields in content.messages.items():
        target = file.message_type.add(name=message)
        for entry in fields:
            added = target.field.add(name=entry.name, number=entry.number)
            added.label = kinds.LABEL_REPEATED if entry.repeated else kinds.LABEL_OPTIONAL
            if entry.type in content.messages or entry.type in content.enums:
                added.type = kinds.TYPE_MESSAGE if entry.type in content.messages else kinds.TYPE_ENUM
                added.type_name = f".{package}.{entry.type}"
            else:
                added.type = kinds.Type.Value(f"TYPE_{entry.type.upper()}")
            if entry.oneof:
                if not target.oneof_decl:
                    target.oneof_decl.add(name=entry.oneof)
                added.oneof_index = 0
    return file


class _Messages:
    """The document's message classes as attributes."""

    def __init__(self) -> None:
        pool = descriptor_pool.DescriptorPool()
        self._classes: dict[str, Any] = {}
        for package in DOCUMENT:
            content = read_document(package)
            pool.Add(_descriptors(package, content))
            for name in content.messages:
                found = pool.FindMessageTypeByName(f"{package}.{name}")
                self._classes[name] = message_factory.GetMessageClass(found)

    def __getattr__(self, name: str) -> Any:
        return self._classes[name]


pb = _Messages()
DIR, FILE, SYMLINK = 0, 1, 2


@dataclass
class Reply:
    """What a call gave until it ended, and how it ended."""

    code: grpc.StatusCode
    details: str
    responses: list[Any] = field(repr=False)

    @property
    def kinds(self) -> list[str]:
        """The responses' payloads by name; runs of one kind count once."""
        found = [response.WhichOneof("payload") for response in self.responses]
        return [kind for before, kind in zip([None, *found], found, strict=False) if kind != before]

    def output(self, source: str = "stdout") -> str:
        """The text of a log."""
        return "".join(
            response.log.message
            for response in self.responses
            if response.HasField("log") and response.log.source == source
        )

    @property
    def result(self) -> Any:
        """The result; fails with the call's status if there is none."""
        found = [response.result for response in self.responses if response.HasField("result")]
        assert len(found) == 1, self
        return found[0]

    @property
    def tar(self) -> bytes:
        """All tar_chunks."""
        return b"".join(response.tar_chunk.data for response in self.responses if response.HasField("tar_chunk"))


def start(image: str, *command: str, **fields: Any) -> Any:
    """A start request for one CPU and 256 MiB, unless *fields* say otherwise."""
    wanted = {"image": image, "command": command, "cpu_cores": 1, "memory_mb": 256, **fields}
    return pb.ExecuteRequest(start=pb.StartRequest(**wanted))


def begin(path: str, kind: int = FILE, **fields: Any) -> Any:
    """A file_begin request."""
    return pb.ExecuteRequest(file_begin=pb.FileEntryBegin(path=path, type=kind, **fields))


def chunk(data: bytes) -> Any:
    """A file_chunk request."""
    return pb.ExecuteRequest(file_chunk=pb.FileChunk(data=data))


def end() -> Any:
    """A file_end request."""
    return pb.ExecuteRequest(file_end=pb.FileEntryEnd())


def _serialized(message: Any) -> bytes:
    return cast("bytes", message.SerializeToString())


class OldClient:
    """Raw gRPC to one address; use it with `async with`."""

    def __init__(self, address: str) -> None:
        self._channel: Any = grpc.aio.insecure_channel(address)  # Any: the stubs want generated messages

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    def open(self, timeout: float | None = 60.0) -> Any:
        """An Execute call to write to and read from."""
        method = self._channel.stream_stream(
            "/afsletpb.Afslet/Execute",
            request_serializer=_serialized,
            response_deserializer=pb.ExecuteResponse.FromString,
        )
        return method(timeout=timeout)

    async def execute(self, *requests: Any, timeout: float | None = 60.0) -> Reply:
        """A whole Execute call: send *requests*, half-close, read to the end."""
        call = self.open(timeout)
        try:
            for request in requests:
                await call.write(request)
            await call.done_writing()
        except (grpc.aio.AioRpcError, grpc.aio.UsageError):
            pass  # refused before all was sent; the status comes with the read
        return await finish(call)

    @asynccontextmanager
    async def running(self, *requests: Any) -> AsyncIterator[Any]:
        """A run that has written something (the command must), while the block runs; then it is cancelled."""
        call = self.open()
        try:
            for request in requests:
                await call.write(request)
            await call.done_writing()
            while True:
                response = await call.read()
                assert response is not grpc.aio.EOF, await call.details()
                if response.HasField("log"):
                    break
            yield call
        finally:
            call.cancel()

    async def unary(self, method: str, request: Any, response: Any, timeout: float = 30.0) -> Any:
        """One unary call; raises AioRpcError."""
        made = self._channel.unary_unary(
            method,
            request_serializer=_serialized,
            response_deserializer=response.FromString,
        )
        return await made(request, timeout=timeout)

    async def runtime_status(self) -> Any:
        """GetRuntimeStatus."""
        request = pb.GetRuntimeStatusRequest()
        return await self.unary("/afsletpb.Afslet/GetRuntimeStatus", request, pb.GetRuntimeStatusResponse)

    async def status(self, **fields: bool) -> list[Any]:
        """AfsProxy.Status."""
        method = self._channel.unary_stream(
            "/afsproxy.v1.AfsProxy/Status",
            request_serializer=_serialized,
            response_deserializer=pb.StatusResponse.FromString,
        )
        return [response async for response in method(pb.StatusRequest(**fields), timeout=30.0)]

    async def reconcile(self, **fields: Any) -> Any:
        """AfsProxy.ReconcileImageReplica."""
        request = pb.ReconcileImageReplicaRequest(**fields)
        return await self.unary(
            "/afsproxy.v1.AfsProxy/ReconcileImageReplica", request, pb.ReconcileImageReplicaResponse
        )


async def finish(call: Any, before: Iterable[Any] = ()) -> Reply:
    """Read an Execute call to its end."""
    responses = list(before)
    try:
        while (response := await call.read()) is not grpc.aio.EOF:
            responses.append(response)
    except grpc.aio.AioRpcError:
        pass  # the status below
    return Reply(await call.code(), await call.details() or "", responses)
