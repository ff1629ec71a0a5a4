"""Verifying layers in the background: once after each boot and once per interval, what is mounted first; sealing."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from typing import TYPE_CHECKING

import pytest

from afs.core import syscalls
from afs.layerstore import repair as repairing
from afs.layerstore import scrub, sealing
from afs.layerstore.afslyr.layout import CHUNK_SIZE
from afs.layerstore.scrub import MOUNTED_RATE, Scrubber
from afs.layerstore.sealing import Sealer
from tests.testbed.layernodes import Node, World, flip, pull, running_world, verified

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection
    from pathlib import Path

    from afs.layerstore.repair import Pause
    from afs.layerstore.scrub import Check
    from afs.layerstore.store import CompleteLayer


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A cluster without nodes."""
    async with running_world(tmp_path) as running:
        yield running


class Scrubbers:
    """Scrubbers of a node, each as a new process would start it: in the same boot if not told otherwise."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.now = 1_000_000.0
        self.boot = "boot 1"

    def start(self, check: Check | None = None, sealer: Sealer | None = None) -> Scrubber:
        """Another one, every 100 s."""
        self.node.layers.repairs.sealer = sealer
        check = check or self.node.layers.repairs.check
        return Scrubber(
            self.node.store,
            self.node.leases,
            check,
            100.0,
            boot=self.boot,
            sealer=sealer,
            now=lambda: self.now,
            rate=1e9,
        )

    def mount(self, *layers: CompleteLayer, idle: Collection[CompleteLayer] = ()) -> None:
        """Have the snapshotter tell what it has mounted."""
        self.node.leases.connect(release := lambda diff_ids: None)
        self.node.leases.report(release, [layer.diff_id for layer in layers], [layer.diff_id for layer in idle])


async def run_until(scrubber: Scrubber, event: asyncio.Event) -> None:
    """Let it run until *event*, and the few steps to its next sleep."""
    running = asyncio.create_task(scrubber.run())
    await asyncio.wait([running, asyncio.create_task(event.wait())], return_when=asyncio.FIRST_COMPLETED)
    assert not running.done()
    await asyncio.sleep(0)
    running.cancel()
    await asyncio.wait([running])


async def test_scrubbing_finds_and_repairs_and_goes_on_where_it_was(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    node = await world.node("n1")
    scrubbers = Scrubbers(node)
    scrubber = scrubbers.start()
    assert scrubber.due() == (100.0, None)
    first = await pull(world, node, 0)
    assert scrubber.due() == (100.0, first), "it was verified when it came"
    scrubbers.now += 10
    second = await pull(world, node, 1)
    assert scrubber.due() == (90.0, first)
    scrubbers.now += 95
    flip(first.path, 100)
    scrubber = scrubbers.start()
    assert scrubber.due() == (0.0, first), "a restart does not begin anew"
    await scrubber.scrub(first)
    verified(first.path)
    assert f"scrubbed layer {first.diff_id}: whole" in caplog.text
    assert scrubbers.start().due() == (5.0, second)
    await node.room.drop(first.diff_id)
    assert scrubber.due() == (5.0, second)
    assert list(json.loads((node.store.root / "scrubbed.json").read_bytes())) == [second.diff_id]


@pytest.mark.parametrize(
    "damage", [b"[]", b"{", b'{"x": null}', b'{"x": 5.0}', b'{"x": {"at": 5.0, "boot": "boot 1"}}']
)
async def test_what_a_lost_or_damaged_file_does_not_know_is_verified_now(world: World, damage: bytes) -> None:
    node = await world.node("n1")
    scrubbers = Scrubbers(node)
    layer = await pull(world, node, 0)
    assert scrubbers.start().due() == (0.0, layer)
    (node.store.root / "scrubbed.json").write_bytes(damage)
    scrubber = scrubbers.start()
    assert scrubber.due() == (0.0, layer)
    await scrubber.scrub(layer)
    assert scrubbers.start().due() == (100.0, layer)


async def test_after_a_boot_all_is_verified_once_and_what_is_mounted_first(world: World) -> None:
    node = await world.node("n1")
    scrubbers = Scrubbers(node)
    before = scrubbers.start()
    layers = [await pull(world, node, number) for number in range(4)]
    scrubbers.mount(layers[0])
    assert before.due()[0] == 100.0
    assert before.urgent() is None, "it came in this boot"
    scrubbers.boot = "boot 2"
    scrubber = scrubbers.start()
    scrubbers.mount()
    assert scrubber.urgent() is None
    assert scrubber.due()[0] == 0.0
    scrubbers.mount(layers[2], idle=[layers[1]])
    node.leases.hand_over(7, [layers[3].diff_id])
    order = []
    while (layer := scrubber.urgent()) is not None:
        await scrubber.scrub(layer)
        order.append(layers.index(layer))
    assert sorted(order) == [1, 2, 3]
    assert scrubber.due() == (0.0, layers[0]), "nobody waits for it, but it comes, too"
    await scrubber.scrub(layers[0])
    assert scrubber.due()[0] == 100.0
    assert scrubbers.start().due()[0] == 100.0, "known over a restart"


async def test_a_layer_that_is_mounted_while_it_is_scrubbed_gets_the_higher_rate(world: World) -> None:
    node = await world.node("n1")
    scrubbers = Scrubbers(node)
    layer = await pull(world, node, 0)
    pauses = []

    async def check(layer: CompleteLayer, pause: Pause) -> bool:
        pauses.append(pause())
        scrubbers.mount(layer)
        pauses.append(pause())
        return True

    await scrubbers.start(check).scrub(layer)
    assert pauses == [0.25e-9, 0.25 / MOUNTED_RATE], "seconds for a quarter of a MiB"


async def test_damage_that_a_boot_brought_is_repaired_while_the_layer_is_mounted(world: World) -> None:
    node = await world.node("n1")
    scrubbers = Scrubbers(node)
    layer = await pull(world, node, 0)
    flip(layer.path, CHUNK_SIZE)
    scrubbers.mount(layer)
    scrubber = scrubbers.start()
    checked = asyncio.Event()
    scrubber._save = checked.set  # type: ignore[method-assign]
    await run_until(scrubber, checked)
    verified(layer.path)


async def test_an_empty_cache_is_looked_at_again_long_before_the_interval_is_over(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = await world.node("n1")
    scrubbers = Scrubbers(node)
    looked, slept, checked = asyncio.Event(), [0.0], asyncio.Event()
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        looked.set()
        await real(0)

    async def check(layer: CompleteLayer, pause: Pause) -> bool:
        checked.set()
        return True

    scrubber = scrubbers.start(check)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    running = asyncio.create_task(scrubber.run())
    await looked.wait()
    await pull(world, node, 0)
    looked.clear()
    await looked.wait()  # it was seen
    scrubbers.now += 100
    await checked.wait()
    running.cancel()
    await asyncio.wait([running])
    assert max(slept) == scrub.LOOK_S < 100.0


async def test_a_layer_whose_header_is_gone_does_not_keep_the_scrubber_busy(world: World) -> None:
    node = await world.node("n1")
    node.store.layer_path(world.diff_id).write_bytes(b"x")
    scrubbers = Scrubbers(node)
    scrubber = scrubbers.start()
    assert scrubber.due() == (0.0, None)
    assert scrubber.due() == (100.0, None)


# Sealing


class FakeVerity:
    """A kernel that seals; which layers' files are sealed. What it does to reads and writes is shown in tests/fs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sealed: set[int] = set()
        self.error = 0
        monkeypatch.setattr(syscalls, "enable_verity", self.enable)
        monkeypatch.setattr(syscalls, "has_verity", lambda fd: os.fstat(fd).st_ino in self.sealed)

    def enable(self, fd: int) -> None:
        """FS_IOC_ENABLE_VERITY."""
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        self.sealed.add(os.fstat(fd).st_ino)


@pytest.fixture
def verity(monkeypatch: pytest.MonkeyPatch) -> FakeVerity:
    """A kernel with fs-verity."""
    return FakeVerity(monkeypatch)


async def test_a_layer_is_sealed_and_then_verified_a_minute_after_it_came(
    world: World, verity: FakeVerity, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    node = await world.node("n1")
    scrubbers, sealer = Scrubbers(node), Sealer()
    scrubber = scrubbers.start(sealer=sealer)
    layer = await pull(world, node, 0)
    assert scrubber.due() == (60.0, layer)
    scrubbers.now += 60
    assert scrubber.due() == (0.0, layer)
    flip(layer.path, CHUNK_SIZE)  # before it was sealed: verifying behind it finds that
    await scrubber.scrub(layer)
    verified(layer.path)
    assert f"sealed layer {layer.diff_id}" in caplog.text
    assert not sealing.is_sealed(layer.path), "it was replaced"
    assert scrubber.due() == (60.0, layer)
    scrubbers.now += 60
    await scrubber.scrub(layer)
    assert sealing.is_sealed(layer.path)
    assert scrubber.due() == (100.0, layer)
    scrubbers.boot = "boot 2"
    scrubbers.mount(layer)
    scrubber = scrubbers.start(sealer=sealer)
    assert scrubber.urgent() is None, "the kernel checks what is read"
    assert scrubber.due() == (0.0, layer)
    verity.sealed.clear()  # somebody copied the file
    assert scrubbers.start(sealer=sealer).urgent() is not None
    sealer.close()


@pytest.mark.parametrize("source", ["peer", "registry"])
@pytest.mark.usefixtures("verity")
async def test_a_sealed_layer_is_repaired_by_another_file(world: World, source: str) -> None:
    node = await world.node("n1")
    layer = await pull(world, node, 0)
    if source == "peer":
        await pull(world, await world.node("n2"), 0)
    reads = world.reads
    sealer = node.layers.repairs.sealer = Sealer()
    assert await node.layers.repairs.check(layer)
    assert sealing.is_sealed(layer.path)
    with layer.path.open("rb") as mounted:
        flip(layer.path, 2 * CHUNK_SIZE + 5)
        bad = mounted.read()
        assert await node.layers.repairs.check(layer)
        mounted.seek(0)
        assert mounted.read() == bad, "the old one was not written"
    verified(layer.path)
    assert world.reads == reads + (source == "registry")
    assert list((node.store.root / "tmp").iterdir()) == []
    (status,) = node.room.status().layers
    assert status.used == layer.path.stat().st_blocks * 512
    flip(layer.path, layer.layout.table_offset)
    assert await node.layers.repairs.check(layer)
    verified(layer.path)
    sealer.close()


async def test_a_sealed_layer_that_cannot_be_repaired_leaves_nothing(world: World, verity: FakeVerity) -> None:
    node = await world.node("n1", quota=9 * CHUNK_SIZE)
    layer = await pull(world, node, 0)
    with layer.path.open("rb") as file:
        verity.enable(file.fileno())
    flip(layer.path, CHUNK_SIZE)
    with node.leases.pinned([layer.diff_id]):
        assert not await node.layers.repairs.check(layer), "there is no room for a second file of 5 MiB"
        assert node.layers.repairs.is_damaged(layer.diff_id)
    assert list((node.store.root / "tmp").iterdir()) == []


@pytest.mark.parametrize("how", ["replaced", "evicted"])
async def test_another_file_in_the_place_of_a_sealed_one_is_not_sealed(
    world: World, verity: FakeVerity, how: str
) -> None:
    node = await world.node("n1")
    scrubbers, sealer = Scrubbers(node), Sealer()
    scrubber = scrubbers.start(sealer=sealer)
    layer = await pull(world, node, 0)
    assert scrubber.due() == (60.0, layer)
    await scrubber.scrub(layer)
    assert scrubber.due() == (100.0, layer)
    if how == "replaced":
        flip(layer.path, CHUNK_SIZE)
        assert await node.layers.repairs.check(layer), "a reader found that"
    else:
        await node.room.drop(layer.diff_id)
        await pull(world, node, 0)
    verity.sealed.clear()  # the file system may give the new file the number of the old one
    found = node.store.complete(layer.diff_id)
    assert found is not layer
    assert scrubber.due() == (60.0, found)
    sealer.close()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.ETXTBSY])
async def test_a_layer_that_cannot_be_sealed_is_verified_as_before(
    world: World, verity: FakeVerity, caplog: pytest.LogCaptureFixture, error: int
) -> None:
    node = await world.node("n1")
    verity.error = error
    scrubbers, sealer = Scrubbers(node), Sealer()
    scrubber = scrubbers.start(sealer=sealer)
    layer = await pull(world, node, 0)
    flip(layer.path, CHUNK_SIZE)
    await scrubber.scrub(layer)
    verified(layer.path)
    assert f"cannot seal layer {layer.diff_id}" in caplog.text
    assert scrubber.due() == (100.0, layer), "it is not tried again and again"
    verity.error = 0
    scrubbers.now += 100
    assert scrubber.due() == (0.0, layer)
    await scrubber.scrub(layer)
    assert sealing.is_sealed(layer.path), "but whenever it is verified"
    sealer.close()


@pytest.mark.parametrize(
    ("error", "level"), [(errno.EOPNOTSUPP, "INFO"), (errno.ENOTTY, "INFO"), (errno.ENOSPC, "WARNING")]
)
def test_without_fs_verity_nothing_is_sealed(
    tmp_path: Path, verity: FakeVerity, caplog: pytest.LogCaptureFixture, error: int, level: str
) -> None:
    caplog.set_level("INFO")
    assert sealing.supported(tmp_path)
    verity.sealed.clear()  # an inode number comes again
    verity.error = error
    assert not sealing.supported(tmp_path)
    assert [record.levelname for record in caplog.records] == [level]
    assert list(tmp_path.iterdir()) == []


async def test_repairs_have_idle_mounts_taken_down(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    node = await world.node("n1")
    layer = await pull(world, node, 0)
    released: list[Collection[str]] = []

    def release(diff_ids: Collection[str]) -> None:
        released.append(diff_ids)
        node.leases.report(release, [], [])

    node.leases.connect(release)
    node.leases.report(release, [], [layer.diff_id])
    forgotten: list[Path] = []
    monkeypatch.setattr(repairing, "forget_pages", forgotten.append)
    assert await node.layers.repairs.check(layer)
    assert (released, forgotten) == ([], [])
    flip(layer.path, CHUNK_SIZE)
    assert await node.layers.repairs.check(layer)
    assert (released, forgotten) == ([[layer.diff_id]], [layer.path])
