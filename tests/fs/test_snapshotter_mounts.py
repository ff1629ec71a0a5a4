"""Layer mounts of real layer files, and roots over them."""

import asyncio
import contextlib
import errno
import io
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from typing_extensions import override

from afs.afslet.diff import Diff
from afs.core.digests import sha256_digest
from afs.core.errors import Internal
from afs.core.mounts import list_mounts, unmount_below
from afs.core.rpc import serving
from afs.layerstore.afslyr.convert import convert
from afs.layerstore.afslyr.layout import CHUNK_SIZE
from afs.layerstore.fillwire import decode, encode
from afs.proto.v1 import layerstore_pb2 as pb
from afs.proto.v1 import layerstore_pb2_grpc as pb_grpc
from afs.snapshotter import layermounts
from afs.snapshotter.fusedworkers import FusedWorkers
from afs.snapshotter.layermounts import LayerMounts
from afs.snapshotter.leases import report_mounts
from afs.snapshotter.overlay import mount_overlay
from afs.snapshotter.probe import find_backends
from afs.snapshotter.rootmount import RootRequest
from afs.snapshotter.roots import Roots
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
    fused = FusedWorkers(tmp_path / "f", tmp_path / "faults", tmp_path / "fill.sock", 1.0)
    backends = find_backends(tmp_path, tmp_path, None)
    mounts = LayerMounts(tmp_path / "l", fused, backends, keep)
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


def leased(mounts: LayerMounts) -> tuple[list[str], list[str]]:
    """In use and idle; `changed` has to be set for every new answer."""
    assert mounts.changed.is_set()
    mounts.changed.clear()
    update = mounts.leases()
    return list(update.in_use), list(update.idle)


async def test_leases_are_what_is_mounted(tmp_path: Path, layers: dict[str, str]) -> None:
    one, two, three = layers
    async with mounting(tmp_path, 2) as mounts:
        async with mounts.using(one, layers[one]):
            assert leased(mounts) == ([one], [])
            async with mounts.using(two, layers[two]):
                assert leased(mounts) == (sorted([one, two]), [])
            assert leased(mounts) == ([one], [two])
            await mounts.release([one, two, three])
            assert leased(mounts) == ([one], [])
            assert len(list_mounts(str(tmp_path))) == 1
            await mounts.release([one])
            assert leased(mounts) == ([one], []), "an answer, though nothing could go"
        assert leased(mounts) == ([], [one])
        with mounts.opening() as first, mounts.opening() as second:
            assert first < second
            update = mounts.leases()
            assert (update.last_opened, list(update.opening)) == (second, [first, second])
            mounts.opened(first, [two, three])
            mounts.opened(second, [one, two])
            assert leased(mounts) == (sorted(layers), []), "not mounted yet, but about to be"
        update = mounts.leases()
        assert (update.last_opened, list(update.opening)) == (second, [])
        assert leased(mounts) == ([], [one])
    assert leased(mounts) == ([], [])


async def test_a_second_container_changes_no_lease(tmp_path: Path, layers: dict[str, str]) -> None:
    """But for the number of its opening, which is told once, when it is over."""
    one, two, _ = layers
    async with mounting(tmp_path, 2) as mounts, mounts.using(one, layers[one]), mounts.using(two, layers[two]):
        before = leased(mounts)
        with mounts.opening() as number:
            mounts.opened(number, [one, two])
            async with mounts.using(one, layers[one]), mounts.using(two, layers[two]):
                assert not mounts.changed.is_set()
            assert not mounts.changed.is_set()
        assert leased(mounts) == before
        assert mounts.leases().last_opened == number


async def test_a_cancelled_release_still_unmounts(tmp_path: Path, layers: dict[str, str]) -> None:
    async with mounting(tmp_path, 3) as mounts:
        for diff_id, file in layers.items():
            async with mounts.using(diff_id, file):
                pass
        releasing = asyncio.create_task(mounts.release(list(layers)))
        await asyncio.sleep(0)
        releasing.cancel()
        await asyncio.wait([releasing])
        await asyncio.gather(*mounts._going)
        assert list_mounts(str(tmp_path)) == []
        assert not mounts.leases().idle


class Layerstore(pb_grpc.LayerstoreNodeServicer):
    """Takes reports, and asks for what a test says; nothing else is called."""

    OpenImage = CacheStatus = SupplyLayer = OpenLayers = LayerUsage = None  # type: ignore[assignment]

    def __init__(self) -> None:
        self.updates: asyncio.Queue[pb.LeaseUpdate] = asyncio.Queue()
        self.requests: asyncio.Queue[list[str]] = asyncio.Queue()

    @override
    async def Leases(
        self, request_iterator: AsyncIterator[pb.LeaseUpdate], context: Any
    ) -> AsyncIterator[pb.LeaseRequest]:
        async def read() -> None:
            async for update in request_iterator:
                self.updates.put_nowait(update)

        reading = asyncio.create_task(read())
        try:
            while True:
                yield pb.LeaseRequest(release=await self.requests.get())
        finally:
            reading.cancel()


async def test_reports_and_releases_over_restarts_of_the_layerstore(tmp_path: Path, layers: dict[str, str]) -> None:
    address = f"unix:{tmp_path}/s"
    one, two, _ = layers
    async with mounting(tmp_path, 3) as mounts, mounts.using(one, layers[one]):
        async with mounts.using(two, layers[two]):
            reporting = asyncio.create_task(report_mounts(address, mounts))  # nobody is there yet
            for _ in range(50):  # in which it could make its report, were it not for the connection
                await asyncio.sleep(0)
        await mounts.release([two])
        for _ in range(2):
            store = Layerstore()

            def register(server: grpc.aio.Server, store: Layerstore = store) -> None:
                pb_grpc.add_LayerstoreNodeServicer_to_server(store, server)

            async with serving([address], register, grace_s=0):
                update = await store.updates.get()
                assert (list(update.in_use), list(update.idle)) == ([one], []), "in full, at first"
                async with mounts.using(two, layers[two]):
                    while list(update.in_use) != sorted([one, two]):
                        update = await store.updates.get()
                while list(update.idle) != [two]:
                    update = await store.updates.get()
                store.requests.put_nowait([one, two])
                while list(update.idle):
                    update = await store.updates.get()
                assert list(update.in_use) == [one]
        reporting.cancel()
        await asyncio.wait([reporting])


async def test_what_cannot_be_mounted_leaves_nothing(tmp_path: Path, layers: dict[str, str]) -> None:
    diff_id = next(iter(layers))
    (tmp_path / "bad").write_bytes(bytes(8192))
    async with mounting(tmp_path, 1) as mounts:
        with pytest.raises(Internal, match=f"^layer {diff_id}: cannot mount {tmp_path}/bad as erofs-file: "):
            async with mounts.using(diff_id, str(tmp_path / "bad")):
                pass
        assert mounts.mounted() == []
        assert list((tmp_path / "l").iterdir()) == []
        async with mounts.using(diff_id, layers[diff_id]):
            pass


@pytest.mark.parametrize("faults", ["faults", "nothing"])
async def test_a_partial_layer_that_the_disk_cannot_read_is_an_error_to_the_reader(tmp_path: Path, faults: str) -> None:
    """With a directory in place of the file every read(2) of it fails; and faults cannot be noted where nothing is."""
    (tmp_path / "faults").mkdir()
    writers = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        while line := await reader.readline():
            number = decode(line)["id"]
            writer.write(
                encode({"id": number, "size": 1, "chunk_size": CHUNK_SIZE, "data": str(tmp_path), "chunks": ""})
            )

    server = await asyncio.start_unix_server(answer, tmp_path / "fill.sock")
    fused = FusedWorkers(tmp_path / "f", tmp_path / faults, tmp_path / "fill.sock", 1.0)
    diff_id = "sha256:" + "a" * 64
    try:
        file = (await fused.place(diff_id)).file(diff_id)
        reader = await asyncio.create_subprocess_exec("cat", file, stderr=asyncio.subprocess.PIPE)
        try:
            async with asyncio.timeout(20):
                _, message = await reader.communicate()
            assert b"Input/output error" in message
            assert bool(fused.faults(diff_id)) == (faults == "faults")
        finally:
            if reader.returncode is None:
                reader.kill()
    finally:
        await fused.close()
        server.close()
        for writer in writers:
            writer.close()


@contextlib.asynccontextmanager
async def making_roots(tmp_path: Path, mounts: LayerMounts) -> AsyncIterator[Roots]:
    """Roots, prepared."""
    roots = Roots(tmp_path / "r", tmp_path / "base", mounts)
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
            assert b"".join(Diff(root.upper, root.lower).chunks())
        assert roots.count == 0
        assert list((tmp_path / "r").iterdir()) == []


@pytest.mark.parametrize("read_only", [False, True])
async def test_a_root_of_an_image_without_layers(tmp_path: Path, read_only: bool) -> None:
    async with mounting(tmp_path, 1) as mounts, making_roots(tmp_path, mounts) as roots:
        async with contextlib.AsyncExitStack() as stack:
            root = await roots.mount_root(stack, [], RootRequest(read_only=read_only))
            assert sorted(path.name for path in root.path.iterdir()) == ["dev", "proc", "sys"]
            assert list(root.lower) == [tmp_path / "base"]
            expected = pytest.raises(OSError, match="Read-only") if read_only else contextlib.nullcontext()
            with expected:
                (root.path / "x").touch()
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


async def test_an_unmount_that_failed_is_tried_again(
    tmp_path: Path, layers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise OSError(errno.EBUSY, "busy", str(path))

    one = next(iter(layers))
    async with mounting(tmp_path, 1) as mounts:
        async with mounts.using(one, layers[one]):
            pass
        with monkeypatch.context() as patched, pytest.raises(OSError, match="busy"):
            patched.setattr(layermounts, "unmount_layer", fail)
            await mounts.release([one])
        assert leased(mounts) == ([], [one]), "it is still there, and holds the file"
        await mounts.release([one])
        assert leased(mounts) == ([], [])
        assert list_mounts(str(tmp_path)) == []
