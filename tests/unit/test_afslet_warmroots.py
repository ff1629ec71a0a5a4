"""Which roots are kept for which runs, with a snapshotter that only counts; real ones are in tests/system."""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, cast

import pytest

from afs.afslet import warmroots
from afs.afslet.warmroots import WarmRoots
from afs.core.errors import ResourceExhausted, Unavailable
from afs.proto.v1.mounts_pb2 import MountRoot, OpenedImage, OpenImage
from afs.snapshotter.messages import MountedRoot

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

IMAGE, OTHER, WANTED = OpenImage(image="host/a"), OpenImage(image="host/b"), MountRoot()


class Hold:
    """One call; its roots are directories."""

    def __init__(self, mounts: Mounts) -> None:
        self._mounts = mounts
        self.lost = self.released = False
        self.bytes_fetched = 0
        self.tell: Callable[[], object] = lambda: None

    def _root(self) -> MountedRoot:
        self._mounts.made += 1
        upper = self._mounts.directory / str(self._mounts.made)
        upper.mkdir()
        return MountedRoot(upper, upper, ())

    async def open_and_mount(self, image: OpenImage, wanted: MountRoot) -> tuple[OpenedImage, MountedRoot]:
        if self._mounts.full and any(not hold.released for hold in self._mounts.holds if hold is not self):
            raise ResourceExhausted("the cache is full")
        return OpenedImage(config=b'{"config": {"User": "x"}}', manifest_digest="sha256:1"), self._root()

    async def mount(self, wanted: MountRoot) -> MountedRoot:
        return self._root()

    async def unmount(self, root: MountedRoot) -> None:
        os.rename(root.path, f"{root.path}-gone")

    def when_lost(self, callback: Callable[[], object]) -> None:
        self.tell = callback

    async def release(self) -> None:
        self.released = True


class Mounts:
    """The snapshotter."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.holds: list[Hold] = []
        self.made = 0
        self.full = False

    def hold(self) -> Hold:
        self.holds.append(Hold(self))
        return self.holds[-1]


@pytest.fixture
def mounts(tmp_path: Path) -> Mounts:
    """A snapshotter."""
    return Mounts(tmp_path)


def roots_of(mounts: Mounts, most: int = 2) -> WarmRoots:
    """The pool over it."""
    return WarmRoots(cast("Any", mounts), most)


async def used(roots: WarmRoots, image: OpenImage = IMAGE, *, write: bool = False) -> Path:
    """A run: where its root was."""
    async with roots.taking(image, WANTED) as taken:
        if write:
            (taken.root.path / "file").touch()
        return taken.root.path


async def test_an_unused_root_serves_the_next_run(mounts: Mounts) -> None:
    roots = roots_of(mounts)
    assert await used(roots) == await used(roots)
    assert await used(roots, OTHER) != await used(roots)
    await roots.close()
    assert all(hold.released for hold in mounts.holds)


async def test_a_root_that_was_written_to_is_never_seen_again(mounts: Mounts) -> None:
    roots = roots_of(mounts)
    places = [await used(roots, write=True) for _ in range(4)]
    assert len(set(places)) == 4
    await roots.close()


async def test_a_run_that_failed_takes_its_root_along(mounts: Mounts) -> None:
    roots = roots_of(mounts)
    with pytest.raises(Unavailable):
        async with roots.taking(IMAGE, WANTED):
            raise Unavailable("the node is stopping")
    assert mounts.holds[0].released
    await roots.close()


async def test_at_most_so_many_are_kept(mounts: Mounts) -> None:
    roots = roots_of(mounts, most=2)
    async with AsyncExitStack() as stack:
        for _ in range(4):
            await stack.enter_async_context(roots.taking(IMAGE, WANTED))
    for _ in range(3):
        await asyncio.sleep(0)
    assert sum(not hold.released for hold in mounts.holds) == 2
    await roots.close()
    assert all(hold.released for hold in mounts.holds)


async def test_none_is_kept_if_none_is_to_be(mounts: Mounts) -> None:
    roots = roots_of(mounts, most=0)
    assert await used(roots) != await used(roots)
    assert all(hold.released for hold in mounts.holds)


async def test_a_root_whose_time_is_over_is_not_given_away(mounts: Mounts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even in the turn of the event loop in which its timer goes off."""
    monkeypatch.setattr(warmroots, "_IDLE_S", 0.0)
    roots = roots_of(mounts)
    for number in range(20):
        await used(roots)
        for _ in range(number % 4):
            await asyncio.sleep(0)
        async with roots.taking(IMAGE, WANTED):
            for _ in range(3):
                await asyncio.sleep(0)
            assert not mounts.holds[-1].released
    await roots.close()


async def test_idle_roots_give_way_to_another_image(mounts: Mounts) -> None:
    roots = roots_of(mounts)
    await used(roots)
    mounts.full = True
    await used(roots, OTHER)
    assert mounts.holds[0].released
    async with roots.taking(OTHER, WANTED):
        with pytest.raises(ResourceExhausted):
            await used(roots)
    await roots.close()


async def test_what_the_snapshotter_lost_is_not_given_away(mounts: Mounts) -> None:
    roots = roots_of(mounts)
    await used(roots)
    mounts.holds[0].lost = True
    mounts.holds[0].tell()
    await used(roots)
    assert len(mounts.holds) == 2
    told: list[str] = []
    async with roots.taking(IMAGE, WANTED) as taken:
        taken.on_lost = lambda: told.append("lost")
        mounts.holds[1].tell()
    assert told == ["lost"]
    await roots.close()


async def test_local_images_by_tag_are_opened_each_time(mounts: Mounts) -> None:
    roots = roots_of(mounts)
    for image, kept in (("oci:/d:tag", 2), ("oci:/d@sha256:1", 1), ("docker-archive:/f", 2)):
        mounts.holds.clear()
        for _ in range(2):
            await used(roots, OpenImage(image=image))
        assert len(mounts.holds) == kept, image
    await roots.close()
