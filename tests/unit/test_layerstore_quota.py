"""The sums of the cache, its leases, and what they allow to be evicted."""

import asyncio
from collections.abc import Collection
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from typing_extensions import override

from afs.layerstore.errors import CacheFull
from afs.layerstore.keptlayers import KeptLayers
from afs.layerstore.leases import LEASE_S, Leases
from afs.layerstore.quota import Quota, Reservation
from afs.layerstore.room import HIGH, LOW, Room
from afs.layerstore.store import LayerStore
from tests.testbed.layernodes import Clock

KIB = 1024
A, B, C, D = (f"sha256:{letter * 64}" for letter in "abcd")


def test_the_oldest_go_first() -> None:
    quota = Quota(100)
    for diff_id, used in ((A, 10), (B, 20), (C, 30)):
        quota.put(diff_id, used, 0.0)
    assert quota.used == 60
    quota.touch(A, 5.0)
    assert quota.layers() == [B, C, A]
    assert quota.oldest(1, lambda _: True) == [B]
    assert quota.oldest(21, lambda _: True) == [B, C]
    assert quota.oldest(21, lambda diff_id: diff_id != B) == [C]
    assert quota.oldest(1000, lambda _: True) == [B, C, A]
    assert quota.oldest(0, lambda _: True) == []
    quota.put(B, 25, 9.0)  # it grew; that alone is no use
    assert (quota.used, quota.layers()[0], quota.last_use(B)) == (65, B, 0.0)
    quota.remove(B)
    quota.remove(B)
    quota.touch(B, 10.0)
    assert (quota.used, quota.used_by(B), quota.layers()) == (40, 0, [C, A])


def test_a_guess_counts_apart_from_what_is_certain() -> None:
    quota = Quota(100)
    pull = quota.reserve(A, 10, 40)
    plain = quota.reserve(B, 10, 10)
    assert (quota.least, quota.likely) == (20, 50)
    pull.least = pull.likely = 30
    assert (quota.least, quota.likely) == (40, 40)
    quota.release(pull)
    quota.release(pull)
    quota.release(plain)
    assert (quota.least, quota.likely) == (0, 0)


class QuotaMachine(RuleBasedStateMachine):
    """Against a plain model: sums and order."""

    def __init__(self) -> None:
        super().__init__()
        self.quota = Quota(1000)
        self.model: dict[str, int] = {}
        self.promises: list[Reservation] = []

    @rule(name=st.sampled_from("abcd"), used=st.integers(0, 50))
    def put(self, name: str, used: int) -> None:
        """A layer comes or grows."""
        self.quota.put(name, used, 0.0)
        self.model[name] = used

    @rule(name=st.sampled_from("abcd"))
    def touch(self, name: str) -> None:
        """A layer is used."""
        self.quota.touch(name, 1.0)
        if name in self.model:
            self.model[name] = self.model.pop(name)

    @rule(name=st.sampled_from("abcd"))
    def remove(self, name: str) -> None:
        """A layer goes."""
        self.quota.remove(name)
        self.model.pop(name, None)

    @rule(least=st.integers(0, 50), more=st.integers(0, 50))
    def reserve(self, least: int, more: int) -> None:
        """A pull begins."""
        self.promises.append(self.quota.reserve("x", least, least + more))

    @precondition(lambda self: self.promises)
    @rule()
    def release(self) -> None:
        """A pull ends."""
        self.quota.release(self.promises.pop())

    @invariant()
    def sums(self) -> None:
        """The quota and the model agree."""
        assert self.quota.used == sum(self.model.values())
        assert self.quota.layers() == list(self.model)
        assert self.quota.least == sum(promise.least for promise in self.promises)
        assert self.quota.likely == sum(promise.likely for promise in self.promises)


TestQuotaMachine = QuotaMachine.TestCase
TestQuotaMachine.settings = settings(derandomize=True, deadline=None, database=None, max_examples=40)


# Leases


class Snapshotter:
    """A stream of leases: what was asked of it, and what it reports."""

    def __init__(self, leases: Leases) -> None:
        self.leases = leases
        self.asked: list[set[str]] = []
        self.was_asked = asyncio.Event()
        self.answers = True
        self.in_use: set[str] = set()
        self.idle: set[str] = set()

    def release(self, diff_ids: Collection[str]) -> None:
        """As the layerstore asks."""
        self.asked.append(set(diff_ids))
        self.was_asked.set()
        if self.answers:
            self.report(self.in_use, self.idle - set(diff_ids))

    def connect(self) -> None:
        """Begin the stream."""
        self.stream = self.release
        self.leases.connect(self.stream)

    def report(self, in_use: set[str], idle: set[str]) -> Collection[str]:
        """Say what is mounted."""
        self.in_use, self.idle = in_use, idle
        return self.leases.report(self.stream, in_use, idle)

    def disconnect(self) -> None:
        """End the stream."""
        self.leases.disconnect(self.stream)


def test_before_the_snapshotter_reported_everything_is_leased() -> None:
    clock = Clock()
    leases = Leases(30.0, clock)
    assert leases.is_leased(A)
    clock.now += 29
    assert leases.is_leased(A)
    leases.serve()  # only from here on could it report
    clock.now += 29
    assert leases.is_leased(A)
    clock.now += 1
    assert leases.is_free(A)


def test_what_is_reported_counts_as_long_as_the_stream_and_a_while_after() -> None:
    clock = Clock()
    leases = Leases(30.0, clock)
    snapshotter = Snapshotter(leases)
    snapshotter.connect()
    assert snapshotter.report({A}, {A, B}) == set()
    assert (leases.is_leased(A), leases.is_leased(B), leases.is_leased(C)) == (True, False, False)
    assert (leases.is_idle_mount(A), leases.is_idle_mount(B), leases.is_free(B)) == (False, True, False)
    clock.now += 1000
    assert leases.is_leased(A)
    snapshotter.disconnect()
    assert not leases.connected
    assert leases.is_leased(A)
    assert leases.is_leased(B), "nobody is there to unmount it"
    clock.now += 29
    assert leases.is_leased(A)
    clock.now += 1
    assert leases.is_free(A)
    assert leases.is_free(B)


def test_what_attached_roots_need_stays_until_the_next_report(tmp_path: Path) -> None:
    """However long the snapshotter is away, and over a restart, but not of the machine."""
    clock = Clock()
    file = KeptLayers(tmp_path / "kept.json", "boot")
    leases = Leases(30.0, clock, file.load())
    leases.remember = file.save
    snapshotter = Snapshotter(leases)
    snapshotter.connect()
    leases.report(snapshotter.stream, [A, B], [], kept=[A])
    snapshotter.disconnect()
    clock.now += 1000
    assert (leases.is_leased(A), leases.is_leased(B), leases.is_mounted(A)) == (True, False, True)
    restarted = Leases(0.0, clock, file.load())
    restarted.remember = file.save
    assert (restarted.is_leased(A), restarted.is_leased(B), restarted.is_mounted(A)) == (True, False, True)
    assert KeptLayers(tmp_path / "kept.json", "another").load() == frozenset()
    successor = Snapshotter(restarted)
    successor.connect()
    successor.report(set(), set())
    assert restarted.is_free(A)
    assert file.load() == frozenset()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"boot": "boot", "layers": ["../../x"]}', b'{"boot": "boot"}'])
def test_a_damaged_note_of_what_attached_roots_need(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    (tmp_path / "kept.json").write_bytes(content)
    assert KeptLayers(tmp_path / "kept.json", "boot").load() == frozenset()
    assert "what attached roots need is unknown" in caplog.text


def test_the_newest_stream_speaks_for_the_node() -> None:
    leases = Leases(0.0, Clock())
    old, new = Snapshotter(leases), Snapshotter(leases)
    old.connect()
    old.report({A}, set())
    new.connect()
    assert leases.is_leased(A), "it has not said anything yet"
    assert new.report({B}, set()) == {A}, "no longer in use"
    assert old.report({C}, set()) == ()
    old.disconnect()
    assert leases.connected
    assert (leases.is_leased(A), leases.is_leased(B), leases.is_leased(C)) == (False, True, False)


def test_pins_are_counted_and_timed_leases_end() -> None:
    clock = Clock()
    leases = Leases(0.0, clock)
    with leases.pinned([A, B]), leases.pinned([A]):
        with leases.pinned([A]):
            pass
        assert leases.is_leased(A)
        clock.now += 10 * LEASE_S
        assert leases.is_leased(B)
    assert leases.is_free(A)
    leases.lease(A)
    clock.now += LEASE_S - 1
    assert leases.is_leased(A)
    leases.lease(A)
    clock.now += LEASE_S - 1
    assert leases.is_leased(A)
    clock.now += 1
    assert leases.is_free(A)
    leases.lease(A)
    leases.forget(A)
    assert leases.is_free(A)


def test_a_handover_ends_when_the_snapshotter_is_done_with_that_call() -> None:
    clock = Clock()
    leases = Leases(0.0, clock)
    snapshotter = Snapshotter(leases)
    snapshotter.connect()
    for number, diff_id in ((11, A), (12, B), (13, C)):
        leases.hand_over(number, [diff_id])
    leases.report(snapshotter.stream, set(), set(), 12, [12])
    assert [leases.is_leased(diff_id) for diff_id in (A, B, C)] == [False, True, True], (
        "13 came after the report was sent"
    )
    leases.report(snapshotter.stream, {B}, set(), 13, [])
    assert [leases.is_leased(diff_id) for diff_id in (A, B, C)] == [False, True, False]
    leases.hand_over(14, [D])
    leases.hand_over(0, [C])
    clock.now += LEASE_S - 1
    assert [leases.is_leased(diff_id) for diff_id in (C, D)] == [True, True]
    clock.now += 1
    assert [leases.is_leased(diff_id) for diff_id in (C, D)] == [False, False], "nobody waits that long"


async def test_waiting_for_the_first_report_ends_with_it_or_with_the_grace_period() -> None:
    leases = Leases(1000.0)
    waiting = asyncio.create_task(leases.known())
    await asyncio.sleep(0)
    snapshotter = Snapshotter(leases)
    snapshotter.connect()
    assert not waiting.done()
    snapshotter.report(set(), set())
    await waiting
    await Leases(0.0).known()


async def test_releasing_ends_with_the_report_or_the_stream() -> None:
    leases = Leases(1000.0)
    snapshotter = Snapshotter(leases)
    await leases.release([A], 1000.0)  # nobody to ask
    snapshotter.connect()
    snapshotter.report(set(), {A, B})
    await leases.release([A], 1000.0)
    assert snapshotter.asked == [{A}]
    assert (leases.is_free(A), leases.is_idle_mount(B)) == (True, True)
    snapshotter.answers = False
    await leases.release([B], 0.0)  # it takes too long
    assert leases.is_idle_mount(B)
    waiting = asyncio.create_task(leases.release([B], 1000.0))
    await asyncio.sleep(0)
    snapshotter.report({B}, set())  # somebody uses it meanwhile
    await waiting
    assert leases.is_leased(B)
    snapshotter.report(set(), {B})
    waiting = asyncio.create_task(leases.release([B], 1000.0))
    await asyncio.sleep(0)
    snapshotter.disconnect()
    await waiting


# Room


class FakeStore(LayerStore):
    """A real directory, whose file system has as much room as a test says."""

    available = 1 << 40

    @override
    def free(self) -> int:
        """What the test says."""
        return self.available


class World:
    """A room of 100 KiB with files of one size."""

    def __init__(self, root: Path, *, headroom: int = 0) -> None:
        self.store = FakeStore(root)
        self.quota = Quota(100 * KIB)
        self.clock = Clock()
        self.room = Room(self.store, self.quota, Leases(0.0, self.clock), headroom=headroom, node="n")

    def put(self, diff_id: str, size: int = 20 * KIB) -> None:
        """A layer's file."""
        self.store.layer_path(diff_id).write_bytes(bytes(size))
        self.room.note(diff_id)

    def here(self) -> set[str]:
        """What is on disk."""
        assert list((self.store.root / "tmp").iterdir()) == []
        return set(self.store.complete_ids())


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Without layers."""
    return World(tmp_path)


async def test_a_reservation_evicts_what_it_needs(world: World) -> None:
    for diff_id in (A, B, C, D):
        world.put(diff_id)
    world.room.use(A)
    async with world.room.reserved("x", 20 * KIB):
        assert world.here() == {A, B, C, D}, "it fits"
    async with world.room.reserved("x", 21 * KIB):
        assert world.here() == {A, C, D}
    async with world.room.reserved("x", 15 * KIB, compressed=True):
        assert world.here() == {A, D}, "60 KiB are likely"
    async with world.room.reserved("x", 90 * KIB, compressed=True):
        assert world.here() == set(), "360 KiB would be likely, but 90 fit"
    assert world.room.status().evicted == 4
    assert world.quota.likely == 0


async def test_nothing_goes_for_a_layer_that_would_not_fit_anyway(world: World) -> None:
    world.put(A)
    world.put(B)
    with world.room.leases.pinned([A]):
        with pytest.raises(
            CacheFull,
            match=f"^cache of node n is full: layer {C} needs 90.0 KiB, 40.0 KiB of 100.0 KiB are used and leased, ",
        ) as caught:
            async with world.room.reserved(C, 90 * KIB):
                raise AssertionError
        assert world.here() == {A, B}
        assert (caught.value.needed, caught.value.used) == (90 * KIB, 40 * KIB)
        assert world.quota.least == 0
        async with world.room.reserved(C, 80 * KIB):
            assert world.here() == {A}


async def test_the_true_size_may_be_refused_too(world: World) -> None:
    world.put(A, 60 * KIB)
    with world.room.leases.pinned([A]):
        async with world.room.reserved(B, 10 * KIB, compressed=True) as reservation:
            await world.room.correct(reservation, 40 * KIB)
            with pytest.raises(CacheFull):
                await world.room.correct(reservation, 44 * KIB)
    async with world.room.reserved(B, 10 * KIB) as reservation:
        await world.room.correct(reservation, 44 * KIB)
        assert world.here() == set()
        world.put(B, 44 * KIB)
        world.room.settle(reservation)
        assert (world.quota.used, world.quota.likely) == (44 * KIB, 0)


async def test_what_grows_beyond_the_guess_needs_more_room(world: World) -> None:
    world.put(A, 40 * KIB)
    world.put(B, 20 * KIB)
    path = world.store.temporary()
    with world.room.leases.pinned([B]):
        async with world.room.reserved("x", 4 * KIB, compressed=True, path=path) as reservation:
            await world.room.grow(reservation)  # nothing is written yet
            for size, left in ((16, {A, B}), (20, {A, B}), (60, {B})):
                path.write_bytes(bytes(size * KIB))
                await world.room.grow(reservation)
                assert set(world.store.complete_ids()) == left
            path.write_bytes(bytes(140 * KIB))
            with pytest.raises(CacheFull):
                await world.room.grow(reservation)
            path.unlink()


async def test_two_at_once_count_on_different_victims(world: World) -> None:
    for diff_id in (A, B, C, D):
        world.put(diff_id)

    async def pull(name: str, gate: asyncio.Barrier) -> None:
        async with world.room.reserved(name, 30 * KIB):
            await gate.wait()

    gate = asyncio.Barrier(2)
    await asyncio.gather(pull("x", gate), pull("y", gate))
    assert world.here() == {C, D}


async def test_the_file_system_s_free_space_counts_as_well(tmp_path: Path) -> None:
    world = World(tmp_path, headroom=10 * KIB)
    for diff_id in (A, B):
        world.put(diff_id)
    world.store.available = 30 * KIB
    path = world.store.temporary()
    async with world.room.reserved("x", 20 * KIB, path=path):
        assert world.here() == {A, B}
        path.write_bytes(bytes(8 * KIB))
        world.store.available -= 8 * KIB
        async with world.room.reserved("y", 0):  # what is written is not promised any more
            path.unlink()
            assert world.here() == {A, B}
    world.store.available = 29 * KIB
    with (
        world.room.leases.pinned([A, B]),
        pytest.raises(CacheFull, match=r"29\.0 KiB free on the disk, of which 10\.0 KiB stay free$"),
    ):
        async with world.room.reserved("x", 20 * KIB):
            raise AssertionError
    assert world.here() == {A, B}


async def test_idle_mounts_are_released_before_they_go(world: World) -> None:
    for diff_id in (A, B, C, D):
        world.put(diff_id)
    snapshotter = Snapshotter(world.room.leases)
    snapshotter.connect()
    snapshotter.report({A}, {B, C})
    async with world.room.reserved("x", 50 * KIB):
        assert snapshotter.asked == [{B, C}]
        assert world.here() == {A, D}
    world.put(B)
    world.put(C)
    snapshotter.report({A}, {B})
    snapshotter.answers = False
    snapshotter.was_asked.clear()
    releasing = asyncio.create_task(reserve(world, 61 * KIB))
    await snapshotter.was_asked.wait()
    snapshotter.report({A, B}, set())  # it is used again: it stays
    with pytest.raises(CacheFull):
        await releasing
    assert {A, B} <= world.here()


async def reserve(world: World, size: int) -> None:
    """Have room for a moment."""
    async with world.room.reserved("x", size):
        pass


async def test_a_lease_that_begins_while_others_are_released_counts(world: World) -> None:
    world.put(A, 40 * KIB)
    world.put(B, 40 * KIB)
    snapshotter = Snapshotter(world.room.leases)
    snapshotter.connect()
    snapshotter.report(set(), {A, B})
    snapshotter.answers = False
    making = asyncio.create_task(reserve(world, 30 * KIB))
    await snapshotter.was_asked.wait()
    assert snapshotter.asked == [{A}]
    world.room.leases.lease(A)  # OpenImage has just answered with it
    snapshotter.answers = True
    snapshotter.report(set(), {B})
    await making
    assert world.here() == {A}


async def test_it_waits_for_the_snapshotter_s_first_report(world: World, tmp_path: Path) -> None:
    world.room.leases = Leases(1000.0)
    world.put(A)
    world.put(B)
    making = asyncio.create_task(reserve(world, 70 * KIB))
    await asyncio.sleep(0)
    snapshotter = Snapshotter(world.room.leases)
    snapshotter.connect()
    snapshotter.report({A}, set())
    await making
    assert world.here() == {A}


async def test_above_the_high_mark_it_evicts_down_to_the_low_one(world: World) -> None:
    for diff_id in (A, B, C, D):
        world.put(diff_id, 23 * KIB // 4096 * 4096)
    assert world.quota.used < HIGH * 100 * KIB
    await world.room.tidy()
    assert world.here() == {A, B, C, D}
    world.put(D, 40 * KIB)
    await world.room.tidy()
    assert world.here() == {B, C, D}
    assert world.quota.used <= LOW * 100 * KIB


async def test_the_background_task_follows_what_grows(world: World) -> None:
    evicted = asyncio.Event()

    def detach(diff_id: str) -> list[Path]:
        evicted.set()
        return world.store.detach(diff_id)

    world.room.detach = detach
    running = asyncio.create_task(world.room.run())
    for diff_id in (A, B):
        world.put(diff_id, 40 * KIB)
    await asyncio.sleep(0)
    assert world.here() == {A, B}
    with world.room.leases.pinned([A]):
        world.put(B, 60 * KIB)
        await evicted.wait()
        await world.room.tidy()  # after the files are deleted
        assert world.here() == {A}
    running.cancel()
    await asyncio.wait([running])


def test_what_one_wrote_beyond_its_promise_is_no_room_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, quota = LayerStore(tmp_path), Quota(1 << 40)
    room = Room(store, quota, Leases(0.0), headroom=0)
    monkeypatch.setattr(store, "free", lambda: 100 * KIB)
    (tmp_path / "a").write_bytes(bytes(128 * KIB))
    room._paths[quota.reserve(A, 64 * KIB, 64 * KIB)] = tmp_path / "a"
    quota.reserve(B, 128 * KIB, 128 * KIB)
    assert room._short_of(1.0) == 28 * KIB
    store.close()


@pytest.mark.parametrize("steps", range(6))
async def test_the_background_task_ends_when_it_is_cancelled(tmp_path: Path, steps: int) -> None:
    """At any moment after it was woken up; asyncio.wait_for of Python 3.11 takes a cancellation for a result at one."""
    room = Room(LayerStore(tmp_path), Quota(1 << 40), Leases(0.0), headroom=0)
    running = asyncio.create_task(room.run())
    for _ in range(5):
        await asyncio.sleep(0)
    room._look.set()
    for _ in range(steps):
        await asyncio.sleep(0)
    running.cancel()
    ended, _ = await asyncio.wait([running], timeout=5)
    running.cancel()
    assert ended


async def test_on_a_full_disk_something_goes_whatever_the_sums_say(world: World) -> None:
    assert not await world.room.on_full_disk(1)
    world.put(A)
    world.put(B)
    assert await world.room.on_full_disk(1)
    assert world.here() == {B}
    with world.room.leases.pinned([B]):
        assert not await world.room.on_full_disk(1)


def test_the_order_survives_a_restart(tmp_path: Path) -> None:
    world = World(tmp_path)
    for diff_id in (A, B, C):
        world.put(diff_id)
    for number, diff_id in enumerate((B, A, C)):
        world.store.stamp(diff_id, 1000.0 + number)
        world.store.layer_path(diff_id).read_bytes()  # reading is not using
    world.store.close()
    world = World(tmp_path)
    world.room.restore(world.store.complete_ids())
    assert world.quota.layers() == [B, A, C]
    assert world.quota.used == 60 * KIB
    world.room.use(B)
    assert world.store.usage(B)[1] > 1e9
    world.store.close()
