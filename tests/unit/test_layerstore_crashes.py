"""The cache directory after a kill, and after a full disk, at every single call that changes it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from typing_extensions import override

from afs.core.digests import sha256_digest
from afs.core.errors import AfsError, ResourceExhausted
from afs.core.images import Platform
from afs.layerstore.afslyr.check import check_and_sync
from afs.layerstore.afslyr.convert import convert
from afs.layerstore.afslyr.layout import FOOTER_SIZE, HEADER_AREA
from afs.layerstore.afslyr.reader import verify_layer
from afs.layerstore.leases import Leases
from afs.layerstore.manifests import Image, build_image
from afs.layerstore.partial import Description, PartialLayer
from afs.layerstore.quota import Quota
from afs.layerstore.repair import Copy, FromPeers, Pause, damaged_chunks, repair, replace
from afs.layerstore.room import Room
from afs.layerstore.scrub import Scrubber
from afs.layerstore.store import CompleteLayer, LayerStore
from tests.testbed import oci, tars
from tests.testbed.crashes import Scenario, crash_everywhere

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from afs.layerstore.scheduling import Ticket

OLD = tars.tar_of({"old": bytes(range(256)) * 5000})
NEW = tars.tar_of({"new": bytes(reversed(range(256))) * 9000, "small": b"x"})
OLD_ID, NEW_ID = sha256_digest(OLD), sha256_digest(NEW)


def pull(store: LayerStore, tar: bytes) -> CompleteLayer:
    """What the pull worker and the puller do."""
    temporary = store.temporary()
    try:
        convert(io.BytesIO(tar).read, temporary, diff_id=sha256_digest(tar))
        return store.commit(temporary, sha256_digest(tar))
    finally:
        temporary.unlink(missing_ok=True)


class CacheScenario(Scenario):
    """With one complete layer beforehand, which must survive everything."""

    keeps_old = True

    @override
    def prepare(self, root: Path) -> None:
        with contextlib.closing(LayerStore(root)) as store:
            pull(store, OLD)
            self.before(store)

    def before(self, store: LayerStore) -> None:
        """Make more."""

    @override
    def work(self, root: Path) -> None:
        with contextlib.closing(LayerStore(root)) as store:
            self.act(store)

    def act(self, store: LayerStore) -> None:
        """Do what is interrupted."""
        raise NotImplementedError

    @override
    def failed(self, root: Path, error: Exception) -> None:
        full = isinstance(error, ResourceExhausted) or (isinstance(error, OSError) and error.errno == errno.ENOSPC)
        assert full, f"a full disk came out as {error!r}"
        assert [path for path in root.rglob("*") if path.parent.name == "tmp" or path.name.startswith(".")] == []

    @override
    def check(self, root: Path) -> None:
        with contextlib.closing(LayerStore(root)) as store:
            assert list((root / "tmp").iterdir()) == []
            if self.keeps_old:
                assert OLD_ID in store.complete_ids()
            self.check_complete(store)
            for diff_id in store.partial_ids():
                self.check_partial(store, diff_id)
            for named in store.load_images():
                assert named.image == IMAGE
            self.act(store)
            self.after(store)

    def check_complete(self, store: LayerStore) -> None:
        """Every complete layer is whole."""
        for diff_id in store.complete_ids():
            assert store.complete(diff_id) is not None
            with store.layer_path(diff_id).open("rb") as file:
                verify_layer(file.fileno())

    def check_partial(self, store: LayerStore, diff_id: str) -> None:
        """What is marked is right, or the layer cannot be opened and is dropped, as at a start."""
        try:
            partial = PartialLayer.open(diff_id, store.partial_dir(diff_id))
        except (AfsError, OSError, ValueError):
            store.drop_partial(diff_id)
            return
        for index in range(partial.table.count):
            assert not partial.has(index) or partial.table.verify(index, partial.read(index))
        partial.close()

    def after(self, store: LayerStore) -> None:
        """The work was done again, and this time to its end."""
        with store.layer_path(NEW_ID).open("rb") as file:
            verify_layer(file.fileno())


class Pull(CacheScenario):
    """A second layer is pulled."""

    @override
    def act(self, store: LayerStore) -> None:
        pull(store, NEW)


class Whole:
    """The layer's file outside the cache, as a peer has it."""

    def __init__(self, store: LayerStore) -> None:
        self.path = store.root.parent / "peer"
        if not self.path.exists():
            convert(io.BytesIO(NEW).read, self.path)
        self.data = self.path.read_bytes()

    async def fetch(self, partial: PartialLayer, index: int, ticket: Ticket) -> bytes:
        """For `PartialLayer.fill`."""
        offset, length = partial.table.chunk_range(index, partial.layout)
        return self.data[offset : offset + length]

    def create(self, store: LayerStore) -> PartialLayer:
        """A partial layer of it."""
        with self.path.open("rb") as file:
            _, table = verify_layer(file.fileno())
        said = Description(len(self.data), self.data[:HEADER_AREA], table, self.data[-FOOTER_SIZE:])
        return PartialLayer.create(NEW_ID, store.partial_dir(NEW_ID), said)

    def opened(self, store: LayerStore) -> PartialLayer:
        """The partial layer that is there, or a new one."""
        if NEW_ID in store.partial_ids():
            with contextlib.suppress(AfsError, OSError, ValueError):
                return PartialLayer.open(NEW_ID, store.partial_dir(NEW_ID))
        return self.create(store)


class Create(CacheScenario):
    """A partial layer is made."""

    @override
    def before(self, store: LayerStore) -> None:
        Whole(store)

    @override
    def act(self, store: LayerStore) -> None:
        Whole(store).create(store).close()

    @override
    def after(self, store: LayerStore) -> None:
        assert store.partial_ids() == [NEW_ID]


class Fill(Create):
    """Its chunks come."""

    @override
    def before(self, store: LayerStore) -> None:
        Whole(store).create(store).close()

    @override
    def act(self, store: LayerStore) -> None:
        whole = Whole(store)
        partial = whole.opened(store)
        try:
            asyncio.run(partial.fill(range(partial.table.count), whole.fetch))
        finally:
            partial.close()

    @override
    def after(self, store: LayerStore) -> None:
        with (store.partial_dir(NEW_ID) / "data").open("rb") as file:
            verify_layer(file.fileno())


class Promote(Fill):
    """It becomes complete."""

    @override
    def before(self, store: LayerStore) -> None:
        super().before(store)
        super().act(store)

    @override
    def act(self, store: LayerStore) -> None:
        if store.complete(NEW_ID) is None:
            super().act(store)
            partial = Whole(store).opened(store)
            try:
                check_and_sync(partial.data_path)
                store.commit(partial.data_path, NEW_ID)
            finally:
                partial.close()
        store.drop_partial(NEW_ID)

    @override
    def after(self, store: LayerStore) -> None:
        assert store.partial_ids() == []
        CacheScenario.after(self, store)


class Evict(CacheScenario):
    """Both of a layer's forms go."""

    keeps_old = False

    @override
    def before(self, store: LayerStore) -> None:
        Whole(store).create(store).close()
        pull(store, NEW)

    @override
    def act(self, store: LayerStore) -> None:
        room = Room(store, Quota(1), Leases(0.0), headroom=0)
        room.restore({*store.complete_ids(), *store.partial_ids()})
        asyncio.run(room.tidy())

    @override
    def after(self, store: LayerStore) -> None:
        assert store.complete_ids() == store.partial_ids() == []


class SaveImage(CacheScenario):
    """An image is remembered."""

    @override
    def act(self, store: LayerStore) -> None:
        store.save_image("registry.example.com/app:v1", AMD64, IMAGE)

    @override
    def after(self, store: LayerStore) -> None:
        assert [named.image for named in store.load_images()] == [IMAGE]


class Repair(CacheScenario):
    """Two chunks are damaged: one comes from a peer, one from the source."""

    @override
    def before(self, store: LayerStore) -> None:
        Whole(store)
        path = pull(store, NEW).path
        with path.open("r+b") as file:
            os.pwrite(file.fileno(), b"damage", 5000)
            os.pwrite(file.fileno(), b"damage", (1 << 18) + 5000)

    @override
    def check_complete(self, store: LayerStore) -> None:
        layer = store.complete(NEW_ID)
        assert layer is not None
        assert set(asyncio.run(damaged_chunks(layer))) <= {0, 1}

    @override
    def act(self, store: LayerStore) -> None:
        layer, whole = store.complete(NEW_ID), Whole(store)
        assert layer is not None

        async def from_peers(layer: CompleteLayer, index: int) -> bytes | None:
            offset, length = layer.table.chunk_range(index, layer.layout)
            return whole.data[offset : offset + length] if index == 0 else None

        @contextlib.asynccontextmanager
        async def copy() -> AsyncIterator[Path]:
            temporary = store.temporary()
            try:
                convert(io.BytesIO(NEW).read, temporary, diff_id=NEW_ID)
                yield temporary
            finally:
                temporary.unlink(missing_ok=True)

        async def run() -> None:
            await self.mend(store, layer, from_peers, copy)

        asyncio.run(run())

    async def mend(self, store: LayerStore, layer: CompleteLayer, from_peers: FromPeers, copy: Copy) -> None:
        """What a node does."""
        await repair(layer, await damaged_chunks(layer), from_peers, copy)


class Replace(Repair):
    """The same by a new file, as for one that the kernel lets nobody write."""

    @override
    async def mend(self, store: LayerStore, layer: CompleteLayer, from_peers: FromPeers, copy: Copy) -> None:
        await replace(store, layer, store.temporary(), from_peers, copy)


class Scrub(CacheScenario):
    """The time of a verification is noted."""

    @override
    def act(self, store: LayerStore) -> None:
        async def whole(layer: CompleteLayer, pause: Pause) -> bool:
            return True

        async def run() -> None:
            scrubber = Scrubber(store, Leases(0.0), whole, 100.0, boot="boot", now=lambda: 5.0)
            layer = store.complete(OLD_ID)
            assert layer is not None
            await scrubber.scrub(layer)

        asyncio.run(run())

    @override
    def after(self, store: LayerStore) -> None:
        assert json.loads((store.root / "scrubbed.json").read_bytes()) == {
            OLD_ID: {"at": 5.0, "boot": "boot", "sealed": False}
        }


AMD64 = Platform("linux", "amd64")


def _image() -> Image:
    config = json.dumps(oci.image_config([], {}, oci.AMD64)).encode()
    manifest = {"config": {"mediaType": oci.OCI_CONFIG, "digest": sha256_digest(config)}, "layers": []}
    return build_image("registry.example.com/app:v1", AMD64, json.dumps(manifest).encode(), config, 42)


IMAGE = _image()


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory in memory, if there is one: hundreds of files come and go, and no disk matters here."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as directory:
        yield Path(directory)


@pytest.mark.parametrize("scenario", [Pull, Create, Fill, Promote, Evict, SaveImage, Repair, Replace, Scrub])
def test_at_every_call(memory: Path, scenario: type[Scenario]) -> None:
    killed, starved = crash_everywhere(scenario, memory)
    print(f"{scenario.__name__}: killed at {killed} calls, out of space at {starved}")
    assert min(killed, starved) > 1
