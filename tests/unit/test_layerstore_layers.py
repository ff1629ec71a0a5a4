"""Layers between nodes: stores in temporary directories, real gRPC servers and a real discovery in this process."""

import asyncio
import contextlib
import dataclasses
import errno
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from afs.core.digests import hex_of
from afs.core.errors import DataLoss, NotFound, ResourceExhausted, Unavailable
from afs.layerstore.afslyr.layout import ChunkTable
from afs.layerstore.errors import LayerUnavailable
from afs.layerstore.fillserver import serving_fills
from afs.layerstore.fillwire import FillClient, FillError, decode, encode
from afs.layerstore.origins import Origin
from afs.layerstore.partial import PartialLayer
from afs.layerstore.scheduling import Priority, Ticket
from afs.layerstore.scrub import Scrubber
from afs.layerstore.store import CompleteLayer, LayerStore
from tests.testbed import mounts
from tests.testbed.faults import Fault
from tests.testbed.layernodes import OTHER, World, complete_of, open_partial, running_world


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A cluster without nodes."""
    async with running_world(tmp_path) as running:
        yield running


# Pulling


async def test_a_pull_is_shared(world: World) -> None:
    node, gate = await world.node("n1"), threading.Event()
    world.server.add(Fault("blobs", gate=gate))
    pulls = [asyncio.create_task(node.puller.pull(world.origin.ref, world.origin.layer)) for _ in range(3)]
    await asyncio.sleep(0)
    pulls[0].cancel()
    gate.set()
    results = await asyncio.gather(*pulls, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert isinstance(results[1], CompleteLayer)
    assert results[1] is results[2]
    assert world.reads == 1


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (Fault("blobs", status=404), NotFound, "app:v1 not found"),
        (Fault("blobs", cut=0), Unavailable, "reading layer sha256:[0-9a-f]+ failed"),
        (Fault("blobs", corrupt=100_000), DataLoss, "image 127.0.0.1:[0-9]+/app:v1: .*the blob's digest is"),
        (Fault("blobs", truncate=100_000), DataLoss, "app:v1 is corrupt: .* bytes but has 100000"),
    ],
    ids=["missing", "cut", "corrupt", "short"],
)
async def test_a_failed_pull_leaves_nothing(world: World, fault: Fault, error: type[Exception], message: str) -> None:
    node = await world.node("n1")
    world.server.add(fault)
    with pytest.raises(error, match=message):
        await node.puller.pull(world.origin.ref, world.origin.layer)
    assert list((node.store.root / "tmp").iterdir()) == []
    assert node.store.complete_ids() == []
    world.server.clear()
    assert (await node.puller.pull(world.origin.ref, world.origin.layer)).diff_id == world.diff_id


@pytest.mark.root
async def test_a_disk_that_is_too_small_is_not_even_tried(world: World) -> None:
    root = world.tmp_path / "n1"
    root.mkdir()
    mounts.mount("tmpfs", root, "tmpfs", "size=1m")
    try:
        node = await world.node("n1")
        with pytest.raises(
            ResourceExhausted, match=f"^cache of node n1 is full: layer {world.diff_id} needs 1.3 MiB, "
        ):
            await node.puller.pull(world.origin.ref, world.origin.layer)
        assert list((root / "tmp").iterdir()) == []
        assert node.store.complete_ids() == []
        assert world.reads == 0
    finally:
        mounts.umount(root, detach=True)


# Peers


async def test_a_layer_comes_from_the_peer_that_has_it(world: World) -> None:
    one, two = await world.node("n1"), await world.node("n2")
    complete = await one.layers.open(world.origin, local=True)
    assert isinstance(complete, CompleteLayer)
    partial = await open_partial(world, two)
    assert world.reads == 1
    assert not set(partial.metadata_chunks()) & set(partial.missing())
    await two.layers.fill(world.diff_id, 1, 2)
    assert partial.read(1) == complete.read_chunk(1)
    await two.layers.fill(world.diff_id, 4, 1000)  # more than there are
    assert partial.has(partial.table.count - 1)
    assert two.layers.find(world.diff_id) is partial
    with pytest.raises(NotFound, match=f"layer {OTHER} is not on this node"):
        await two.layers.fill(OTHER, 0, 1)
    await one.layers.fill(world.diff_id, 0, 1)  # complete: nothing to do


async def test_the_owner_pulls_and_others_read_from_it(world: World) -> None:
    """Placement decides; with this weight it is n1."""
    one = await world.node("n1", capacity=1 << 60)
    two = await world.node("n2", capacity=1)
    await open_partial(world, two)
    assert one.store.complete(world.diff_id) is not None
    assert two.store.complete(world.diff_id) is None
    assert world.reads == 1


async def test_an_owner_that_is_gone_is_stood_in_for(world: World) -> None:
    one = await world.node("n1", capacity=1 << 60)
    two = await world.node("n2", capacity=1)
    await one.stop_serving()
    assert isinstance(await two.layers.open(world.origin, local=False), CompleteLayer)
    assert world.reads == 1


async def test_a_bad_chunk_is_taken_from_another_peer(world: World, caplog: pytest.LogCaptureFixture) -> None:
    one, two = await world.node("n1"), await world.node("n2")
    for node in (one, two):
        await node.layers.open(world.origin, local=True)
    three = await world.node("n3")
    partial = await open_partial(world, three)
    three.layers._supply.watch._of(two.address).running = 1  # so the other one is asked first
    one.service.spoil = True
    one.service.chunks.clear()
    await three.layers.fill(world.diff_id, 1, 3)
    assert [partial.read(i) for i in (1, 2, 3)] == [complete_of(two, world).read_chunk(i) for i in (1, 2, 3)]
    assert f"layerstore {one.announcer.me.endpoint} served a bad chunk" in caplog.text
    one.service.chunks.clear()
    await three.layers.fill(world.diff_id, 4, 1)
    assert one.service.chunks == []  # it is avoided


async def test_readers_get_an_error_when_everybody_is_gone(world: World) -> None:
    one = await world.node("n1")
    await one.layers.open(world.origin, local=True)
    two = await world.node("n2", deadline=1.0)  # time to be refused at least once
    partial = await open_partial(world, two)
    await one.stop_serving()
    world.server.add(Fault("", status=404))
    with pytest.raises(LayerUnavailable, match=f"^layer {world.diff_id} cannot be read: ") as caught:
        await two.layers.fill(world.diff_id, 1, 1)
    assert f"layerstore 127.0.0.1:{one.announcer.me.chunk_port} does not answer" in caught.value.line
    assert not partial.has(1)


async def test_a_lost_layer_is_pulled_once_and_read_locally(world: World) -> None:
    one = await world.node("n1")
    await one.layers.open(world.origin, local=True)
    two = await world.node("n2")
    partial = await open_partial(world, two)
    await one.stop_serving()
    world.directory.leave("n1", one.announcer._incarnation)
    await two.announcer.flush()
    for _ in range(2):
        await two.layers.fill(world.diff_id, 1, 2)
        assert [partial.read(index) for index in (1, 2)] == [complete_of(two, world).read_chunk(n) for n in (1, 2)]
    assert world.reads == 2  # once by n1, once by n2
    await asyncio.gather(*two.layers._background)
    assert two.store.partial_ids() == [], "the complete one is there for whoever reads on"
    await two.layers.fill(world.diff_id, 3, 1)
    assert two.announcer._held[world.diff_id][1]


@pytest.mark.parametrize("how", ["open", "ensure"])
async def test_another_image_that_claims_a_layer_neither_delays_nor_fails_it(world: World, how: str) -> None:
    """An image's configuration can claim any diff_id; its blob shows only when it comes."""
    node, gate = await world.node("n1"), threading.Event()
    other = world.origins[1]
    claim = dataclasses.replace(other, layer=dataclasses.replace(other.layer, diff_id=world.diff_id))
    world.server.add(Fault(f"blobs/{other.layer.blob_digest}", gate=gate))

    def bring(origin: Origin) -> asyncio.Task[object]:
        async def run() -> object:
            return await (node.layers.open(origin, local=True) if how == "open" else node.layers.ensure(origin))

        return asyncio.create_task(run())

    bad = bring(claim)
    await bring(world.origin)
    gate.set()
    with pytest.raises(DataLoss):
        await bad
    await bring(claim)  # it is there
    path = complete_of(node, world).path
    with path.open("r+b") as file:
        file.write(b"damage")
    with path.open("r+b") as file:
        file.seek(1 << 18)
        file.write(b"damage")
    assert await node.layers.repairs.check(complete_of(node, world)), "from the place that gave it"
    for task in (bring(claim), bring(world.origin)):
        await task


async def test_a_layer_comes_from_another_place_when_one_fails(world: World) -> None:
    one, two = await world.node("n1"), await world.node("n2")
    await one.layers.open(world.origin, local=True)
    other = world.origins[1]
    claim = dataclasses.replace(other, layer=dataclasses.replace(other.layer, diff_id=world.diff_id))
    assert isinstance(await two.layers.open(claim, local=False), PartialLayer)
    partial = await open_partial(world, two)
    await one.stop_serving()
    world.directory.leave("n1", one.announcer._incarnation)
    await two.announcer.flush()
    await two.layers.fill(world.diff_id, 1, 1)
    assert partial.read(1) == complete_of(two, world).read_chunk(1)


async def test_a_partial_layer_without_metadata_is_not_opened(world: World) -> None:
    one, two = await world.node("n1"), await world.node("n2", deadline=0.2)
    await one.layers.open(world.origin, local=True)
    one.service.spoil = True
    world.server.add(Fault("", status=404))
    for _ in range(2):
        with pytest.raises((LayerUnavailable, NotFound)):
            await two.layers.open(world.origin, local=False)
    one.service.spoil = False
    two.layers._supply._avoided.clear()
    partial = await open_partial(world, two)
    assert set(partial.metadata_chunks()).isdisjoint(partial.missing())


async def test_ensure_completes_from_peers_and_promotes(world: World) -> None:
    one, two = await world.node("n1"), await world.node("n2")
    await one.layers.open(world.origin, local=True)
    await open_partial(world, two)
    complete, pulled = await two.layers.ensure(world.origin)
    assert not pulled
    assert world.reads == 1
    assert complete.path.read_bytes() == complete_of(one, world).path.read_bytes()
    assert two.layers.find(world.diff_id) is complete
    assert two.store.partial_ids() == []
    assert (await two.layers.ensure(world.origin)) == (complete, False)
    located = await one.announcer.locate([world.diff_id])
    assert world.diff_id in located.complete


async def test_ensure_pulls_what_nobody_has(world: World) -> None:
    node = await world.node("n1")
    results = await asyncio.gather(*(node.layers.ensure(world.origin) for _ in range(3)))
    assert [pulled for _, pulled in results] == [True] * 3
    assert world.reads == 1


async def test_ensure_pulls_when_the_peer_lies(world: World) -> None:
    one, two = await world.node("n1"), await world.node("n2", deadline=0.1)
    await one.layers.open(world.origin, local=True)
    one.service.spoil = True
    complete, pulled = await two.layers.ensure(world.origin)
    assert pulled
    assert complete.path.read_bytes() == complete_of(one, world).path.read_bytes()


async def test_a_forged_index_is_found_out_when_the_layer_is_complete(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """A peer's table is right for its own chunks, and its tar is right too; only the file modes are not."""
    good = world.forge("n1")
    one, two = await world.node("n1"), await world.node("n2")
    complete, pulled = await two.layers.ensure(world.origin)
    assert len(one.service.chunks) == complete.table.count
    assert pulled
    assert complete.path.read_bytes() == good
    assert "the index does not belong to the tar: metadata" in caplog.text
    assert two.store.partial_ids() == []


async def test_opening_and_ensuring_at_once_make_one_layer(world: World) -> None:
    one, two = await world.node("n1"), await world.node("n2")
    await one.layers.open(world.origin, local=True)
    opening = [asyncio.create_task(two.layers.open(world.origin, local=False)) for _ in range(3)]
    complete, pulled = await two.layers.ensure(world.origin)
    opened = await asyncio.gather(*opening)
    assert not pulled
    assert two.layers.find(world.diff_id) is complete
    assert len({id(layer) for layer in opened}) == 1
    assert two.store.partial_ids() == []
    assert sorted(one.service.chunks) == list(range(complete.table.count))  # each chunk once


# Restarts


async def test_a_restarted_node_goes_on_where_it_was(world: World) -> None:
    one = await world.node("n1")
    await one.layers.open(world.origin, local=True)
    other = contextlib.AsyncExitStack()
    outer, world.stack = world.stack, other
    async with other:
        partial = await open_partial(world, await world.node("n2"))
        missing = partial.missing()
    world.stack = outer
    one.service.chunks.clear()
    two = await world.node("n2")
    again = two.layers.find(world.diff_id)
    assert isinstance(again, PartialLayer)
    assert again.missing() == missing
    await two.layers.ensure(world.origin)
    assert sorted(one.service.chunks) == missing


async def test_a_partial_layer_beside_the_complete_one_goes_at_the_next_start(world: World) -> None:
    one = await world.node("n1")
    await one.layers.open(world.origin, local=True)
    outer = world.stack
    async with contextlib.AsyncExitStack() as world.stack:
        two = await world.node("n2")
        await open_partial(world, two)
        await two.puller.pull(world.origin.ref, world.origin.layer)
        assert two.store.partial_ids() == [world.diff_id]
    world.stack = outer
    two = await world.node("n2")
    assert two.store.partial_ids() == []
    await one.announcer.flush()
    assert two.announcer._held[world.diff_id][1]


async def test_a_damaged_partial_layer_is_dropped(world: World, caplog: pytest.LogCaptureFixture) -> None:
    store = LayerStore(world.tmp_path / "n1")
    store.partial_dir(OTHER).mkdir()
    (store.partial_dir(OTHER) / "data").write_bytes(b"x")
    store.close()
    node = await world.node("n1")
    assert node.store.partial_ids() == []
    assert f"dropping the partial layer {OTHER}: " in caplog.text


# The fill socket


async def test_too_many_open_files_say_nothing_about_a_partial_layer(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = await world.node("n1")
    await one.layers.open(world.origin, local=True)
    outer = world.stack
    async with contextlib.AsyncExitStack() as world.stack:
        await open_partial(world, await world.node("n2"))

        def fail(*_: object) -> PartialLayer:
            raise OSError(errno.EMFILE, "Too many open files")

        monkeypatch.setattr(PartialLayer, "open", fail)
        with pytest.raises(OSError, match="Too many open files"):
            (await world.node("n2b")).layers._partials.restore(world.diff_id)
    monkeypatch.undo()
    world.stack = outer
    assert isinstance((await world.node("n2")).layers.find(world.diff_id), PartialLayer)


@pytest.mark.parametrize(
    "what", ["image is a directory", "image is a loop", "dot file", "partial is a file", "layer is a directory",
             "scrubbed is a directory", "link in tmp"],
)  # fmt: skip
async def test_files_that_somebody_left_do_not_stop_it(world: World, what: str) -> None:
    root, name = world.tmp_path / "n1", hex_of(world.diff_id)
    for directory in ("layers", "partial", "images", "tmp"):
        (root / directory).mkdir(parents=True)
    match what:
        case "image is a directory":
            (root / "images" / "x.json").mkdir()
        case "image is a loop":
            (root / "images" / "x.json").symlink_to("x.json")
        case "dot file":
            (root / "partial" / ".nfs1").touch()
        case "partial is a file":
            (root / "partial" / name).touch()
        case "layer is a directory":
            (root / "layers" / f"{name}.afslyr" / "x").mkdir(parents=True)
        case "scrubbed is a directory":
            (root / "scrubbed.json").mkdir()
        case _:
            (root / "tmp" / "link").symlink_to(world.tmp_path)
    node = await world.node("n1")
    assert node.store.default_capacity() > 0
    Scrubber(node.store, node.leases, node.layers.repairs.check, 1.0, boot="boot").due()
    await node.layers.open(world.origin, local=True)
    assert world.tmp_path.exists()


async def test_fills_over_the_socket(world: World) -> None:
    one, two = await world.node("n1"), await world.node("n2")
    complete = await one.layers.open(world.origin, local=True)
    partial = await open_partial(world, two)
    path = world.tmp_path / "fill.sock"
    client = FillClient(str(path), 5.0)
    async with serving_fills(path, two.layers):
        assert path.stat().st_mode & 0o777 == 0o600
        answer = await client.ask(op="open", diff_id=world.diff_id)
        assert answer["size"] == partial.layout.file_size
        assert (answer["data"], answer["chunks"]) == (str(partial.data_path), str(partial.map_path))
        await asyncio.gather(*(client.ask(op="fill", diff_id=world.diff_id, first=i, count=1) for i in range(5)))
        assert [partial.has(index) for index in range(5)] == [True] * 5
        for message, number, text in (
            ({"op": "open", "diff_id": OTHER}, errno.ENOENT, f"layer {OTHER} is not on this node"),
            ({"op": "fill", "diff_id": OTHER, "first": 0, "count": 1}, errno.ENOENT, "is not on this node"),
            ({"op": "dance", "diff_id": OTHER}, errno.EINVAL, "no operation 'dance'"),
            ({"op": "open", "diff_id": "../x"}, errno.EINVAL, "not a sha256 digest"),
            ({"op": "open"}, errno.EINVAL, "not a sha256 digest: 'None'"),
        ):
            with pytest.raises(FillError, match=text) as caught:
                await client.ask(**message)
            assert caught.value.errno == number
        assert isinstance(complete, CompleteLayer)
    assert not path.exists()
    async with serving_fills(path, one.layers):  # another process on the same path: the client notices
        answer = await client.ask(op="open", diff_id=world.diff_id)
        assert (answer["data"], answer["chunks"]) == (str(complete.path), "")
    await client.close()


async def test_a_mistake_of_ours_fails_one_question_and_no_other(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await (await world.node("n1")).layers.open(world.origin, local=True)
    two = await world.node("n2")
    await open_partial(world, two)
    gate, real = asyncio.Event(), two.layers.fill

    async def fill(diff_id: str, first: int, count: int, *, beside: bool, here: object) -> None:
        if first == 1:
            raise OverflowError("too large")
        await gate.wait()
        await real(diff_id, first, count)

    monkeypatch.setattr(two.layers, "fill", fill)
    path = world.tmp_path / "fill.sock"
    client = FillClient(str(path), 60.0)
    async with serving_fills(path, two.layers):
        slow = asyncio.create_task(client.ask(op="fill", diff_id=world.diff_id, first=2, count=1))
        with pytest.raises(FillError, match="OverflowError: too large") as caught:
            await client.ask(op="fill", diff_id=world.diff_id, first=1, count=1)
        assert caught.value.errno == errno.EIO
        assert "Traceback" in caplog.text
        gate.set()
        await slow
        await client.close()


async def test_a_mistake_of_ours_does_not_end_what_goes_on_in_the_background(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    node = await world.node("n1")

    async def fail() -> None:
        raise KeyError("no such thing")

    node.layers._in_background(fail)
    (task,) = node.layers._background
    await task
    assert "KeyError: 'no such thing'" in caplog.text


async def test_an_index_with_too_many_chunks_is_no_mistake_of_ours(world: World) -> None:
    one, two = await world.node("n1"), await world.node("n2")
    await one.layers.open(world.origin, local=True)
    partial = await open_partial(world, two)
    count = partial.table.count
    partial.table = ChunkTable(partial.table.digests + bytes(32))
    await two.layers._supply.pull(world.origin)
    with pytest.raises(DataLoss, match="an index that is not its own"):
        await two.layers._supply.fetch(partial, count, Ticket(Priority.DEMAND))


async def test_questions_wait_while_the_server_is_away(world: World) -> None:
    node = await world.node("n1")
    complete = await node.layers.open(world.origin, local=True)
    assert isinstance(complete, CompleteLayer)
    path = world.tmp_path / "fill.sock"
    client = FillClient(str(path), 10.0)
    asking = [asyncio.create_task(client.ask(op="open", diff_id=world.diff_id)) for _ in range(2)]
    await asyncio.sleep(0)
    async with serving_fills(path, node.layers):
        assert {answer["data"] for answer in await asyncio.gather(*asking)} == {str(complete.path)}
    await client.close()


async def test_a_question_has_a_deadline(tmp_path: Path) -> None:
    client = FillClient(str(tmp_path / "none"), 0.05)
    with pytest.raises(FillError, match=f"^layerstore at {tmp_path}/none did not answer within 0 s$") as caught:
        await client.ask(op="open", diff_id=OTHER)
    assert caught.value.errno == errno.ETIMEDOUT
    await client.close()


async def test_an_unanswered_question_is_asked_again_on_the_next_connection(tmp_path: Path) -> None:
    """The first server breaks off after it read the question, as a crash would; garbage counts as that too."""
    path, questions = tmp_path / "s", list[dict[str, Any]]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        question = decode(await reader.readline())
        questions.append(question)
        if len(questions) == 2:
            writer.write(b"garbage\n")
        elif len(questions) > 2:
            writer.write(encode({"id": 999}) + encode({"id": question["id"], "size": 7}))
        writer.close()

    async with await asyncio.start_unix_server(serve, path):
        client = FillClient(str(path), 10.0)
        assert (await client.ask(op="open"))["size"] == 7
        await client.close()
    assert len({question["id"] for question in questions}) == len(questions) == 3


def test_the_wire_is_one_object_per_line() -> None:
    assert encode({"id": 1, "x": "ü\n"}).count(b"\n") == 1
    assert decode(encode({"id": 1, "x": "ü\n"})) == {"id": 1, "x": "ü\n"}
    for line in (b"", b"[]\n", b"3\n", b"{\n", b"\xff\n"):
        with pytest.raises(ValueError, match=r"object|JSON|value|decode|property"):
            decode(line)
