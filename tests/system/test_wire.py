"""Clients that know the wire document only: what they send and get, through the proxy and at an afslet."""

from __future__ import annotations

import asyncio
import gzip
import io
import tarfile
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor import FieldDescriptor

from afs.proto.v1 import afslet_pb2, proxy_pb2
from tests.testbed import oldclient
from tests.testbed.oldclient import DIR, SYMLINK, OldClient, begin, chunk, end, pb, start

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.testbed.cluster import RealCluster
    from tests.testbed.images import BusyboxImage

INVALID = grpc.StatusCode.INVALID_ARGUMENT
FULL = "echo here; exec sleep 1000"
MODULES: dict[str, Any] = {"afsletpb": afslet_pb2, "afsproxy.v1": proxy_pb2}
MESSAGES = [(package, name) for package in MODULES for name in oldclient.read_document(package).messages]


def type_name(field: FieldDescriptor) -> str:
    """A field's type as the document writes it."""
    if field.message_type is not None:
        return str(field.message_type.name)
    if field.enum_type is not None:
        return str(field.enum_type.name)
    return next(
        name.removeprefix("TYPE_").lower()
        for name, value in vars(FieldDescriptor).items()
        if name.startswith("TYPE_") and value == field.type
    )


@pytest.mark.parametrize(("package", "name"), MESSAGES)
def test_message_is_the_document_s_and_new_fields_begin_at_100(package: str, name: str) -> None:
    known = oldclient.read_document(package).messages[name]
    descriptor = MODULES[package].DESCRIPTOR.message_types_by_name[name]
    assert descriptor.full_name == f"{package}.{name}"
    found = [
        oldclient.Field(
            field.number,
            field.name,
            type_name(field),
            field.is_repeated,
            field.containing_oneof.name if field.containing_oneof is not None else "",
        )
        for field in descriptor.fields
    ]
    assert [field for field in found if field.number < 100] == list(known)
    assert all(not field.oneof for field in found if field.number >= 100), "old clients read one payload per message"


@pytest.mark.parametrize("package", MODULES)
def test_services_and_enums_are_the_document_s(package: str) -> None:
    known, file = oldclient.read_document(package), MODULES[package].DESCRIPTOR
    rpcs = [
        oldclient.Rpc(
            service.name,
            method.name,
            method.input_type.name,
            method.output_type.name,
            method.client_streaming,
            method.server_streaming,
        )
        for service in file.services_by_name.values()
        for method in service.methods
    ]
    assert tuple(rpcs) == known.rpcs
    assert {service.full_name for service in file.services_by_name.values()} == {
        f"{package}.{rpc.service}" for rpc in known.rpcs
    }
    for name, values in known.enums.items():
        assert {value.name: value.number for value in file.enum_types_by_name[name].values} == values


@pytest.fixture(params=["proxy", "afslet"])
def address(request: pytest.FixtureRequest, shared_cluster: RealCluster) -> str:
    """Where both services' Execute is served."""
    return shared_cluster.proxy if request.param == "proxy" else shared_cluster.nodes[0].afslet.address


@asynccontextmanager
async def occupied(cluster: RealCluster, image: str, address: str = "") -> AsyncIterator[list[Any]]:
    """Runs that take every CPU of both nodes, by way of the proxy or directly."""
    async with AsyncExitStack() as stack:
        calls = []
        for node in cluster.nodes:
            client = await stack.enter_async_context(OldClient(address or node.afslet.address))
            request = start(image, "sh", "-c", FULL, cpu_cores=4, node_id=node.node_id)
            calls.append(await stack.enter_async_context(client.running(request)))
        yield calls


def entries(tar: bytes) -> dict[str, tarfile.TarInfo]:
    """The entries of a diff by name."""
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(tar))) as opened:
        return {member.name: member for member in opened}


@pytest.mark.root
async def test_responses_come_in_order(address: str, busybox_image: BusyboxImage) -> None:
    async with OldClient(address) as client:
        command = ["sh", "-c", "echo $A; echo err >&2; echo x > /made; exit 7"]
        reply = await client.execute(
            start(
                f"oci:{busybox_image.layout}",
                *command,
                tag="latest",
                env=["A=out"],
                timeout_ms=30_000,
                discovery_addr="127.0.0.1:1",
                fuse_max_read_ahead_bytes=1 << 20,
                platform_os="linux",
                platform_arch="amd64",
            )
        )
    assert reply.code is grpc.StatusCode.OK, reply
    assert reply.responses[0].accepted.accepted
    assert [kind for kind in reply.kinds if kind != "log"] == ["accepted", "result", "tar_header", "tar_chunk", "done"]
    assert reply.kinds.index("log") == 1
    assert (reply.output(), reply.output("stderr")) == ("out\n", "err\n")
    assert (reply.result.success, reply.result.exit_code, reply.result.error) == (False, 7, "")
    header = next(response.tar_header for response in reply.responses if response.HasField("tar_header"))
    assert header.name == "writable-upper.tar.gz"
    assert list(entries(reply.tar)) == ["made"]


@pytest.mark.root
async def test_success_and_an_empty_diff(address: str, busybox_image: BusyboxImage) -> None:
    async with OldClient(address) as client:
        reply = await client.execute(start(busybox_image.reference, "true"))
    assert (reply.result.success, reply.result.exit_code, reply.result.error) == (True, 0, "")
    assert reply.kinds == ["accepted", "result", "tar_header", "tar_chunk", "done"]
    assert entries(reply.tar) == {}


@pytest.mark.root
@pytest.mark.parametrize("with_end", [True, False], ids=["file_end", "no-file_end"])
async def test_upload_with_and_without_file_end_after_directories_and_symlinks(
    address: str, busybox_image: BusyboxImage, with_end: bool
) -> None:
    last = [end()] if with_end else []
    async with OldClient(address) as client:
        reply = await client.execute(
            start(busybox_image.reference, "sh", "-c", "cat /up/link; stat -c '%a %u %g %Y' /up/f; stat -c %a /up"),
            *(begin("up", DIR, mode=0o750), *last),
            *(begin("up/link", SYMLINK, symlink_target="f"), *last),
            *(begin("up/f", mode=0o640, uid=7, gid=8, mtime_unix=1234), chunk(b"one "), chunk(b"two\n"), end()),
            *(begin("up/sub", DIR), *last),
            *(begin("up/empty"), end()),
        )
    assert reply.output() == "one two\n640 7 8 1234\n750\n", reply


STARTS: dict[str, tuple[dict[str, Any], str]] = {
    "cpu missing": ({"cpu_cores": 0}, "cpu_cores must be positive, not 0"),
    "cpu negative": ({"cpu_cores": -1}, "cpu_cores must be positive, not -1"),
    "memory missing": ({"memory_mb": 0}, "memory_mb must be positive, not 0"),
    "memory negative": ({"memory_mb": -5}, "memory_mb must be positive, not -5"),
    "image missing": ({"image": ""}, "image is missing"),
    "timeout negative": ({"timeout_ms": -1}, "timeout_ms must not be negative"),
    "retries negative": ({"proxy_dispatch_max_retries": -1}, "proxy_dispatch_max_retries must not be negative"),
    "env": ({"env": ["NOVALUE"]}, "env entry 'NOVALUE' is not NAME=value"),
    "too many CPUs": ({"cpu_cores": 5}, "5 CPUs and 256 MiB asked for, but"),
    "too much memory": ({"memory_mb": 5000}, "1 CPUs and 5000 MiB asked for, but"),
}


@pytest.mark.root
@pytest.mark.parametrize("name", STARTS)
async def test_start_that_can_never_work(address: str, busybox_image: BusyboxImage, name: str) -> None:
    fields, message = STARTS[name]
    async with OldClient(address) as client:
        reply = await client.execute(start(**{"image": busybox_image.reference, **fields}))
    assert (reply.code, reply.responses) == (INVALID, [])
    assert message in reply.details


@pytest.mark.root
async def test_frames_out_of_order(address: str, busybox_image: BusyboxImage) -> None:
    first = start(busybox_image.reference, "true")
    async with OldClient(address) as client:
        for requests in ([], [begin("f")], [end()], [pb.ExecuteRequest()]):
            reply = await client.execute(*requests)
            assert (reply.code, reply.responses) == (INVALID, []), requests
            assert reply.details == "the first request must be start"
        reply = await client.execute(first, first)
        assert (reply.code, reply.details) == (INVALID, "a second start")
        reply = await client.execute(first, pb.ExecuteRequest())
        assert (reply.code, reply.details) == (INVALID, "a request without payload")


@pytest.mark.root
async def test_afslet_without_room_says_so_at_once(shared_cluster: RealCluster, busybox_image: BusyboxImage) -> None:
    image = busybox_image.reference
    async with occupied(shared_cluster, image), OldClient(shared_cluster.nodes[0].afslet.address) as client:
        reply = await client.execute(start(image, "true"))
    assert (reply.code, reply.responses) == (grpc.StatusCode.RESOURCE_EXHAUSTED, [])
    assert reply.details == "1 CPUs and 256 MiB asked for, but 0 CPUs and 3840 MiB are free"


@pytest.mark.root
@pytest.mark.parametrize("by_proxy", [True, False], ids=["known-to-proxy", "unknown-to-proxy"])
async def test_proxy_gives_up_after_the_tries_asked_for(
    shared_cluster: RealCluster, busybox_image: BusyboxImage, by_proxy: bool
) -> None:
    image, proxy = busybox_image.reference, shared_cluster.proxy
    async with occupied(shared_cluster, image, proxy if by_proxy else ""), OldClient(proxy) as client:
        request = start(image, "true", proxy_dispatch_max_retries=2, proxy_dispatch_backoff_ms=1)
        reply = await client.execute(request)
    assert (reply.code, reply.responses) == (grpc.StatusCode.RESOURCE_EXHAUSTED, [])
    assert reply.details.endswith("free (tried 3 times)") or reply.details.endswith("free now (tried 3 times)")


@pytest.mark.root
async def test_proxy_tries_until_the_deadline(shared_cluster: RealCluster, busybox_image: BusyboxImage) -> None:
    image, proxy = busybox_image.reference, shared_cluster.proxy
    async with occupied(shared_cluster, image, proxy), OldClient(proxy) as client:
        reply = await client.execute(start(image, "true", proxy_dispatch_backoff_ms=1), timeout=0.5)
    assert (reply.code, reply.responses) == (grpc.StatusCode.DEADLINE_EXCEEDED, [])


@pytest.mark.root
@pytest.mark.parametrize("by_proxy", [True, False], ids=["known-to-proxy", "unknown-to-proxy"])
async def test_proxy_waits_for_room(shared_cluster: RealCluster, busybox_image: BusyboxImage, by_proxy: bool) -> None:
    image, proxy = busybox_image.reference, shared_cluster.proxy
    async with occupied(shared_cluster, image, proxy if by_proxy else "") as calls, OldClient(proxy) as client:
        waiting = asyncio.create_task(client.execute(start(image, "echo", "ran", proxy_dispatch_backoff_ms=20)))
        done, _ = await asyncio.wait({waiting}, timeout=0.3)
        assert not done
        calls[1].cancel()
        reply = await waiting
    assert reply.output() == "ran\n"


@pytest.mark.root
async def test_deadline_ends_a_run(address: str, busybox_image: BusyboxImage) -> None:
    async with OldClient(address) as client:
        reply = await client.execute(start(busybox_image.reference, "sleep", "1000"), timeout=1.0)
    assert reply.code is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.root
async def test_node_id_chooses_the_node(shared_cluster: RealCluster, busybox_image: BusyboxImage) -> None:
    image = busybox_image.reference
    async with OldClient(shared_cluster.proxy) as client, OldClient(shared_cluster.nodes[1].afslet.address) as node2:
        async with client.running(start(image, "sh", "-c", FULL, node_id="node2")):
            assert (await node2.runtime_status()).running_containers == 1
        reply = await client.execute(start(image, "true", node_id="node9"))
    assert (reply.code, reply.details) == (grpc.StatusCode.NOT_FOUND, "no afslet that answers is node 'node9'")


async def numbers(client: OldClient) -> tuple[int, ...]:
    """GetRuntimeStatus as numbers, in the order of the fields."""
    status = await client.runtime_status()
    return tuple(getattr(status, field.name) for field in status.DESCRIPTOR.fields)


@pytest.mark.root
async def test_runtime_status_of_a_node_and_of_the_cluster(
    shared_cluster: RealCluster, busybox_image: BusyboxImage
) -> None:
    request = start(busybox_image.reference, "sh", "-c", FULL, cpu_cores=3, memory_mb=1000, node_id="node1")
    async with OldClient(shared_cluster.nodes[0].afslet.address) as node, OldClient(shared_cluster.proxy) as proxy:
        await eventually(node, (0, 4, 4096, 0, 0, 4, 4096))
        async with proxy.running(request):
            assert await numbers(node) == (1, 4, 4096, 3, 1000, 1, 3096)
            await eventually(proxy, (1, 8, 8192, 3, 1000, 5, 7192))
        await eventually(proxy, (0, 8, 8192, 0, 0, 8, 8192))


async def eventually(client: OldClient, wanted: tuple[int, ...]) -> None:
    """The proxy polls its nodes once a second and a cancelled run takes a moment to end; neither has an event for us."""
    for _ in range(100):
        if await numbers(client) == wanted:
            return
        await asyncio.sleep(0.05)
    assert await numbers(client) == wanted


@pytest.mark.root
async def test_status(shared_cluster: RealCluster, busybox_image: BusyboxImage) -> None:
    async with OldClient(shared_cluster.proxy) as client:
        await client.execute(start(busybox_image.reference, "true"))
        brief = await client.status()
        assert [response.WhichOneof("payload") for response in brief] == ["summary"]
        summary = brief[0].summary
        assert (summary.layerstore_instances, summary.afslet_instances, summary.afslet_reachable) == (2, 2, 2)
        assert summary.total_layers >= 3
        stores = [r.layerstore for r in await client.status(include_layerstores=True) if r.HasField("layerstore")]
        nodes = [r.afslet for r in await client.status(include_afslets=True) if r.HasField("afslet")]
    assert {store.node_id for store in stores} == {"node1", "node2"}
    held = {layer.digest: layer.afs_size for store in stores for layer in store.layers}
    assert all(held[layer.diff_id] > 0 for layer in busybox_image.layers)
    assert any(busybox_image.reference in key for store in stores for key in store.cached_images)
    assert all(store.cache_max_bytes > 0 and store.last_seen_unix > 0 for store in stores)
    assert {node.endpoint for node in nodes} == {node.afslet.address for node in shared_cluster.nodes}
    assert all((node.reachable, node.limit_cpu_cores, node.error) == (True, 4, "") for node in nodes)


@pytest.mark.root
async def test_reconcile(shared_cluster: RealCluster, busybox_image: BusyboxImage) -> None:
    async with OldClient(shared_cluster.proxy) as client:
        answer = await client.reconcile(image=f"oci:{busybox_image.layout}", tag="latest", replica=2)
        assert (answer.ensured, answer.current_replica, answer.requested_replica) == (True, 2, 2)
        assert busybox_image.reference in answer.image_key
        assert {layer.digest for layer in answer.layers} == {layer.diff_id for layer in busybox_image.layers}
        endpoints = {node.node_id: node.layerstore.address for node in shared_cluster.nodes}
        assert all({t.node_id: t.endpoint for t in layer.instances} == endpoints for layer in answer.layers)
        more = await client.reconcile(image=busybox_image.reference, replica=3)
        assert (more.ensured, more.current_replica, more.requested_replica) == (False, 2, 3)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.reconcile(image=busybox_image.reference)
    assert caught.value.code() is INVALID
    assert caught.value.details() == "replica must be positive, not 0"


@pytest.mark.root
async def test_unknown_method(shared_cluster: RealCluster) -> None:
    async with OldClient(shared_cluster.proxy) as client:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.unary("/afsletpb.Afslet/Nothing", pb.Done(), pb.Done)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
