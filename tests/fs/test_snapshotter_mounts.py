"""Layer mounts of real layer files, and roots over them."""

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from afs.afslet.diff import diff_chunks
from afs.core.digests import sha256_digest
from afs.core.errors import Internal
from afs.core.mounts import list_mounts, unmount, unmount_below
from afs.layerstore.afslyr.convert import convert
from afs.snapshotter.fusedprocess import FusedProcess
from afs.snapshotter.layermounts import LayerMounts
from afs.snapshotter.overlay import mount_overlay
from afs.snapshotter.roots import RootRequest, Roots
from tests.testbed import tars

pytestmark = pytest.mark.root


@pytest.fixture
def layers(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Three layer files by diff_id, and a look that nothing stays mounted."""
    found = {}
    for name in "abc":
        tar = tars.tar_of({name: name.encode(), "same": name.encode()})
        convert(io.BytesIO(tar).read, tmp_path / name)
        found[sha256_digest(tar)] = str(tmp_path / name)
    yield found
    left = list_mounts(str(tmp_path))
    unmount_below(tmp_path)
    assert left == []


@contextlib.asynccontextmanager
async def mounting(tmp_path: Path, keep: int) -> AsyncIterator[LayerMounts]:
    """Layer mounts that are closed at the end."""
    fused = FusedProcess(tmp_path / "f", tmp_path / "faults", tmp_path / "fill.sock", 1.0)
    mounts = LayerMounts(tmp_path / "l", fused, keep)
    try:
        yield mounts
    finally:
        await mounts.close()
        await fused.close()


async def test_users_share_a_mount(tmp_path: Path, layers: dict[str, str]) -> None:
    diff_id, file = next(iter(layers.items()))
    async with mounting(tmp_path, 1) as mounts:
        async with contextlib.AsyncExitStack() as stack:
            entering = [stack.enter_async_context(mounts.using(diff_id, file)) for _ in range(4)]
            used = await asyncio.gather(*entering)
            assert len({layer.path for layer in used}) == 1
            assert (used[0].users, used[0].backend) == (4, "erofs-file")
            assert (used[0].path / "a").read_bytes() == b"a"
            assert len(list_mounts(str(tmp_path))) == 1
        assert [(layer.diff_id, layer.users) for layer in mounts.mounted()] == [(diff_id, 0)]
        async with mounts.using(diff_id, file) as again:
            assert again is used[0]


async def test_the_least_recently_used_goes_first(tmp_path: Path, layers: dict[str, str]) -> None:
    one, two, three = layers
    async with mounting(tmp_path, 2) as mounts:
        for diff_id in (one, two, one, three):
            async with mounts.using(diff_id, layers[diff_id]):
                pass
        assert [layer.diff_id for layer in mounts.mounted()] == [one, three]
        assert len(list_mounts(str(tmp_path))) == 2


async def test_what_is_used_stays(tmp_path: Path, layers: dict[str, str]) -> None:
    one, two, _ = layers
    async with mounting(tmp_path, 0) as mounts, mounts.using(one, layers[one]) as held:
        async with mounts.using(two, layers[two]):
            assert len(mounts.mounted()) == 2
        assert [layer.diff_id for layer in mounts.mounted()] == [one]
        assert (held.path / "a").exists()


async def test_what_cannot_be_mounted_leaves_nothing(tmp_path: Path, layers: dict[str, str]) -> None:
    diff_id = next(iter(layers))
    (tmp_path / "bad").write_bytes(bytes(8192))
    async with mounting(tmp_path, 1) as mounts:
        with pytest.raises(Internal, match=f"^cannot mount layer {diff_id} from {tmp_path}/bad: "):
            async with mounts.using(diff_id, str(tmp_path / "bad")):
                pass
        assert mounts.mounted() == []
        assert list((tmp_path / "l").iterdir()) == []
        async with mounts.using(diff_id, layers[diff_id]):
            pass


@contextlib.asynccontextmanager
async def making_roots(tmp_path: Path, mounts: LayerMounts) -> AsyncIterator[Roots]:
    """Roots, prepared."""
    roots = Roots(tmp_path / "r", tmp_path / "base", mounts, f"unix:{tmp_path}/none")
    roots.prepare()
    try:
        yield roots
    finally:
        await roots.close()


async def test_a_root(tmp_path: Path, layers: dict[str, str]) -> None:
    extra = tmp_path / "extra"
    extra.mkdir()
    (extra / "same").write_text("extra")
    async with mounting(tmp_path, 1) as mounts, making_roots(tmp_path, mounts) as roots:
        async with contextlib.AsyncExitStack() as stack:
            used = [await stack.enter_async_context(mounts.using(*layer)) for layer in layers.items()]
            root = await roots.mount_root(stack, [*used, used[0]], RootRequest())  # a layer may come twice
            view = await roots.mount_root(stack, used, RootRequest([str(extra)], read_only=True))
            assert roots.count == 2
            assert sorted(path.name for path in root.path.iterdir()) == ["a", "b", "c", "dev", "proc", "same", "sys"]
            assert (root.path / "same").read_text() == "a"
            assert (view.path / "same").read_text() == "extra"
            assert view.upper is None
            assert root.upper is not None
            (root.path / "dev" / "x").touch()
            assert (root.upper / "dev" / "x").exists()
            with pytest.raises(OSError, match="Read-only"):
                (view.path / "x").touch()
            assert b"".join(diff_chunks(root.upper, root.lower))
        assert roots.count == 0
        assert list((tmp_path / "r").iterdir()) == []


async def test_prepare_clears_what_a_crash_left(tmp_path: Path, layers: dict[str, str]) -> None:
    async with mounting(tmp_path, 1) as mounts:
        home = tmp_path / "r" / "7"
        for name in ("upper", "work", "merged"):
            (home / name).mkdir(parents=True)
        (tmp_path / "base").mkdir()
        mount_overlay(home / "merged", [tmp_path / "base"], home / "upper", home / "work")
        (home / "merged" / "file").touch()
        async with making_roots(tmp_path, mounts):
            assert list((tmp_path / "r").iterdir()) == []
            assert sorted(path.name for path in (tmp_path / "base").iterdir()) == ["dev", "proc", "sys"]
            assert list_mounts(str(tmp_path)) == []


@pytest.mark.parametrize("name", ["co:lon", "com,ma", "back\\slash", "sp ace", "a\\:b,c"])
def test_odd_names_mount(tmp_path: Path, name: str) -> None:
    top = tmp_path / name
    for part in ("lower", "lower2", "upper", "work", "merged"):
        (top / part).mkdir(parents=True)
    (top / "lower" / "file").write_text("x")
    (top / "lower2" / "other").touch()
    mount_overlay(top / "merged", [top / "lower", top / "lower2"], top / "upper", top / "work")
    try:
        assert sorted(path.name for path in (top / "merged").iterdir()) == ["file", "other"]
        (top / "merged" / "new").touch()
        assert (top / "upper" / "new").exists()
    finally:
        unmount(str(top / "merged"))
