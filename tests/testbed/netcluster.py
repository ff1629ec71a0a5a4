"""Discovery, a registry and nodes, each on a host of its own in a network namespace; see `netns`.

Nodes are layerstores; the last one has a snapshotter, too, and is the one that reads. Deadlines are given: tests wait for
them. Unix sockets and mounts are the machine's, so tests talk to nodes over their sockets, whatever happens to the links.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import tempfile
import time
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from afs.core.cluster import Process, start_process
from afs.core.errors import AfsError
from afs.core.images import host as host_platform
from afs.core.mounts import list_mounts
from afs.core.rpc import calling, channel
from afs.core.run import stop
from afs.discovery.client import Peer
from afs.layerstore.afslyr.layout import CHUNK_SIZE
from afs.layerstore.fillwire import FillClient
from afs.layerstore.manifests import image_key
from afs.layerstore.placement import ranked
from afs.proto.v1 import layerstore_pb2 as pb
from afs.proto.v1.layerstore_pb2_grpc import LayerstoreNodeStub
from afs.proto.v1.mounts_pb2 import OpenImage
from afs.snapshotter.client import Mounts
from afs.snapshotter.messages import root_request
from tests.testbed import leaks, netns, oci, readers, tars
from tests.testbed.registry import Registry

if TYPE_CHECKING:
    import random
    from collections.abc import AsyncIterator, Callable, Iterator

    from tests.testbed.netns import Host
    from tests.testbed.readers import Reader

MIB = 1 << 20
GRACE = 30.0
"""Seconds within which what has to happen has happened, on a machine with other things to do."""
CAPACITY = 4 << 30
"""Of each node's cache, in bytes: their weight in placement."""
_DISCOVERY, _REGISTRY = 254, 250
_RATE = "40mbit"
"""12 MiB take two and a half seconds, so that there is something left when something happens; a chunk a twentieth of one."""
_PROXIES = [f"{name}_proxy" for name in ("http", "https", "grpc", "all")]


@dataclass(slots=True)
class Service:
    """A service on a host; it can be killed and started anew."""

    host: Host
    name: str
    module: str
    arguments: list[str]
    directory: Path
    process: Process | None = None

    async def start(self) -> None:
        """Start it, the first time or anew."""
        # A proxy of the machine's environment is out of reach.
        environment = ["env", *(f"-u{form}" for name in _PROXIES for form in (name, name.upper()))]
        prefix = [*self.host.prefix, *environment]
        self.process = await start_process(self.name, self.module, self.arguments, self.directory, prefix=prefix)

    @property
    def pid(self) -> int:
        """Of the process started last."""
        assert self.process is not None
        return self.process.popen.pid

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self.process is not None and self.process.popen.poll() is None

    def kill(self) -> None:
        """SIGKILL it and wait for its end."""
        assert self.process is not None
        self.process.popen.kill()
        self.process.popen.wait()

    async def stop(self) -> None:
        """SIGTERM it."""
        if self.process is not None:
            await stop(self.process.popen, 10.0)

    def log(self) -> str:
        """What it logged, over all starts."""
        path = self.directory / "logs" / f"{self.name}.log"
        return path.read_text() if path.exists() else ""


@dataclass(frozen=True, slots=True)
class Node:
    """A layerstore on its host, perhaps with a snapshotter."""

    host: Host
    directory: Path
    layerstore: Service
    snapshotter: Service | None

    @property
    def run_dir(self) -> Path:
        """Where the sockets and layer mounts are."""
        return self.directory / "run"

    def complete_path(self, image: NetworkImage) -> Path:
        """The layer's file, if it is complete here."""
        return self.directory / "layerstore/layers" / f"{image.hex}.afslyr"

    def partial_path(self, image: NetworkImage) -> Path:
        """The layer's directory, if it is partial here."""
        return self.directory / "layerstore/partial" / image.hex


@dataclass(frozen=True, slots=True)
class NetworkImage:
    """One layer, with files that nothing can compress."""

    name: str
    layer: oci.Layer
    files: dict[str, bytes]
    """Contents by path in the root."""

    @property
    def hex(self) -> str:
        """Of the diff_id."""
        return self.layer.diff_id.partition(":")[2]


class NetworkCluster:
    """Made by `network_cluster`. `nodes[-1]` is the one with a snapshotter."""

    def __init__(
        self,
        directory: Path,
        hosts: dict[int, Host],
        registry: Registry,
        nodes: int,
        layerstore_deadline: float,
        fused_deadline: float,
    ) -> None:
        self.directory = directory
        self.fused_deadline = fused_deadline
        self.registry_host = hosts[_REGISTRY]
        self.registry = registry
        address = f"{hosts[_DISCOVERY].address}:60051"
        arguments = [f"--listen={address}", "--insecure", "--heartbeat=200ms", "--ttl=1s"]
        self.discovery = Service(hosts[_DISCOVERY], "discovery", "afs.discovery", arguments, directory)
        self.nodes: list[Node] = []
        self.exemptions: ExitStack | None = None
        self.last_image: NetworkImage | None = None
        self._images = self._probes = 0
        for number in range(1, nodes + 1):
            host, below = hosts[number], directory / f"n{number}"
            arguments = [
                *(f"--root={below}/layerstore", f"--run-dir={below}/run", f"--node-id=node{number}"),
                *(f"--listen={host.address}:50051", "--insecure", f"--discovery={address}"),
                *(f"--read-deadline={layerstore_deadline}s", f"--plain-http={registry.address}"),
                *(f"--capacity={CAPACITY}", "--reserve=1MiB"),
            ]
            layerstore = Service(host, f"node{number}-layerstore", "afs.layerstore", arguments, directory)
            arguments = [
                *(f"--root={below}/snapshotter", f"--run-dir={below}/run"),
                *(f"--read-deadline={fused_deadline}s", "--keep-layers=0"),
            ]
            snapshotter = Service(host, f"node{number}-snapshotter", "afs.snapshotter", arguments, directory)
            self.nodes.append(Node(host, below, layerstore, snapshotter if number == nodes else None))

    @property
    def reader(self) -> Node:
        """The node whose mounts are read."""
        return self.nodes[-1]

    @property
    def snapshotter(self) -> Service:
        """That node's."""
        assert self.reader.snapshotter is not None
        return self.reader.snapshotter

    @property
    def patience(self) -> float:
        """Seconds after which a read that has not ended hangs."""
        return self.fused_deadline + GRACE

    def services(self) -> list[Service]:
        """All, in the order in which they start."""
        return [self.discovery, *(node.layerstore for node in self.nodes), self.snapshotter]

    def hosts(self) -> list[Host]:
        """All."""
        return [self.discovery.host, self.registry_host, *(node.host for node in self.nodes)]

    async def start(self) -> None:
        """Start the services that do not run."""
        for tier in ([self.discovery], [*(node.layerstore for node in self.nodes), self.snapshotter]):
            await asyncio.gather(*(self.start_service(service) for service in tier if not service.running))

    async def start_service(self, service: Service) -> None:
        """Start one anew. Not from a worker thread: services end with the thread that starts them."""
        await service.start()
        if self.exemptions is not None:
            self.exemptions.enter_context(leaks.exempt(pids=[service.pid]))

    async def stop(self) -> None:
        """Stop everything, in reverse order."""
        for service in reversed(self.services()):
            await service.stop()

    async def image(self, rng: random.Random, *holders: Node) -> NetworkImage:
        """A new image of 12 MiB, pulled by each of `holders` from the registry and known to discovery."""
        self._images += 1
        files = {name: rng.randbytes(4 * MIB - 1000) for name in ("a", "b", "c")}
        layout = Path(tempfile.mkdtemp(dir=self.directory))
        builder = oci.LayoutBuilder(layout)
        layer = builder.add_layer(tars.tar_of(dict(files)), "plain")
        builder.add_image("latest", [layer], {})
        tag = f"v{self._images}"
        name = self.registry_host.call(lambda: self.registry.push(layout, "latest", "app", tag))
        shutil.rmtree(layout)
        self.last_image = image = NetworkImage(name, layer, files)
        for node in holders:
            await self.hold(image, node)
        return image

    async def hold(self, image: NetworkImage, node: Node) -> None:
        """Have the image's layer complete on a node and known to discovery."""
        opened = await self.open(image, node, local=True)
        assert all(layer.path for layer in opened.layers)
        await self.heard_of(node)

    async def hold_partly(self, image: NetworkImage, node: Node) -> None:
        """Have every chunk of the image's layer on a node that holds it as a partial one, and known to discovery."""
        opened = await self.open(image, node)
        assert not any(layer.path for layer in opened.layers), "it was pulled"
        client = FillClient(str(node.run_dir / "fill.sock"), GRACE)
        try:
            count = (node.partial_path(image) / "chunks").stat().st_size
            await client.ask(op="fill", diff_id=image.layer.diff_id, first=0, count=count)
        finally:
            await client.close()
        await self.heard_of(node)

    async def open(self, image: NetworkImage, node: Node, *, local: bool = False) -> pb.OpenImageResponse:
        """What a node's layerstore gives its snapshotter."""
        return await self._open(image.name, node, local=local)

    async def _open(self, name: str, node: Node, *, local: bool = False) -> pb.OpenImageResponse:
        address = f"unix:{node.run_dir}/layerstore.sock"
        async with channel(address) as opened:
            with calling(f"layerstore {address}"):
                request = pb.OpenImageRequest(name=pb.ImageName(image=name), force_local_fetch=local)
                return await LayerstoreNodeStub(opened).OpenImage(request, timeout=GRACE)

    async def heard_of(self, *nodes: Node) -> None:
        """Wait until discovery answers these nodes, for all that their logs say."""

        def silent() -> list[str]:
            said = {
                node.layerstore.name: re.findall("no heartbeat: |discovery .* is back", node.layerstore.log())
                for node in nodes
            }
            return [name for name, lines in said.items() if lines and lines[-1].startswith("no heartbeat")]

        await until(lambda: not silent(), "heartbeats are answered")

    async def reached(self, node: Node) -> None:
        """Wait until the reading node's layerstore calls another one without an error.

        After a failure it connects again only in a second, and what it opens until then it pulls by itself.
        """
        peers = [Peer(f"node{number}", "", CAPACITY) for number in range(1, len(self.nodes) + 1)]
        wanted, address = f"node{self.nodes.index(node) + 1}", f"{node.host.address}:50051"
        deadline = time.monotonic() + GRACE
        while True:
            self._probes += 1
            name = f"{self.registry.address}/nothing:v{self._probes}"
            if ranked(image_key(name, host_platform()), peers)[0].node_id != wanted:
                continue
            with contextlib.suppress(AfsError):  # there is no such image; the owner of its name is asked
                await self._open(name, self.reader)
            if f"image {name}: " not in self.reader.layerstore.log() and self.reader.host.connected_to(address):
                return
            assert time.monotonic() < deadline, f"{wanted} is not reached: {self.reader.layerstore.log()[-4000:]}"
            await asyncio.sleep(0.05)

    def blob_fetches(self, image: NetworkImage) -> int:
        """How often the image's layer was read from the registry."""
        return self.registry_host.call(self.registry.blob_fetches)[image.layer.digest]

    @asynccontextmanager
    async def rooted(self, image: NetworkImage, *, faultless: bool = False) -> AsyncIterator[Path]:
        """A read-only root of the image on the reading node; unmounted at the end.

        If `faultless`, not one read of its layer may have failed: else the kernel, which tries again, may hide it.
        """
        mounts = Mounts(f"unix:{self.reader.run_dir}/mounts.sock")
        try:
            async with mounts.holding() as hold:
                await hold.open(OpenImage(image=image.name))
                yield (await hold.mount(root_request(read_only=True))).path
                if faultless:
                    await hold.check()
        finally:
            await mounts.close()

    @asynccontextmanager
    async def reading(
        self, image: NetworkImage, rng: random.Random, *, faultless: bool = False
    ) -> AsyncIterator[list[Reader]]:
        """Readers in every mode on a root of the image; see `rooted`."""
        async with self.rooted(image, faultless=faultless) as root, readers.reading(root, image.files, rng) as found:
            yield found

    @asynccontextmanager
    async def mid_read(
        self, image: NetworkImage, rng: random.Random, *slow: Node, faultless: bool = False
    ) -> AsyncIterator[list[Reader]]:
        """Readers that have begun and have not all that they need, for these nodes send slowly; see `rooted`."""
        for node in slow:
            node.host.slow(_RATE)
        async with self.reading(image, rng, faultless=faultless) as found:
            await found[0].more(1, GRACE)
            yield found

    def assert_unfinished(self, image: NetworkImage) -> None:
        """Fail if the reading node has all of the image: what happened to its peers then came too late to matter."""
        assert not self.reader.complete_path(image).exists(), self.reader.layerstore.log()[-4000:]
        assert not all((self.reader.partial_path(image) / "chunks").read_bytes())

    async def all_right(self, found: list[Reader]) -> None:
        """Every reader has read all of its file."""
        await asyncio.gather(*(reader.right(self.patience) for reader in found))

    async def all_failed(self, found: list[Reader]) -> None:
        """Every reader got an I/O error, and nothing wrong before it."""
        await asyncio.gather(*(reader.failed(self.patience) for reader in found))

    async def none_wrong(self, found: list[Reader]) -> None:
        """Every reader has ended, rightly or with an I/O error."""
        await asyncio.gather(*(reader.right_or_failed(self.patience) for reader in found))

    async def heal(self) -> None:
        """Undo what happened to links and services."""
        for host in self.hosts():
            host.heal()
        await self.start()
        await self.heard_of(*self.nodes)
        for node in self.nodes[:-1]:
            await self.reached(node)

    async def assert_works(self, rng: random.Random) -> None:
        """Mount the last image anew and read all of it, again while that fails because connections are recovering."""
        image = self.last_image
        assert image is not None, "no image was made"
        deadline = time.monotonic() + GRACE
        while True:
            async with self.reading(image, rng) as found:
                done = await asyncio.gather(*(reader.right_or_failed(self.patience) for reader in found))
            if all(done):
                break
            assert time.monotonic() < deadline, "the node does not work again"
        await until(lambda: not self.busy(), "everything is given back")

    def busy(self) -> list[str]:
        """What is there of roots, and of downloads."""
        roots = self.reader.directory / "snapshotter/roots"
        found = [*map(str, roots.iterdir()), *(mount.target for mount in list_mounts(str(roots)))]
        return found + [str(path) for node in self.nodes for path in (node.directory / "layerstore/tmp").iterdir()]


async def until(condition: Callable[[], bool], what: str) -> None:
    """Poll for what other processes do without an event for us; AssertionError after GRACE seconds."""
    deadline = time.monotonic() + GRACE
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not after {GRACE} s"
        await asyncio.sleep(0.01)


def flip(path: Path) -> None:
    """Flip the bits of a byte in every chunk of a layer's file but the first, which has the header."""
    with path.open("r+b") as file:
        for offset in range(CHUNK_SIZE + 5000, path.stat().st_size, CHUNK_SIZE):
            (byte,) = os.pread(file.fileno(), 1, offset)
            os.pwrite(file.fileno(), bytes([255 - byte]), offset)


@contextmanager
def network_cluster(nodes: int = 3, *, layerstore_deadline: float, fused_deadline: float) -> Iterator[NetworkCluster]:
    """A running cluster; deadlines in seconds are what a chunk may take, and how long a reader waits for it."""
    with (
        netns.hosts([*range(1, nodes + 1), _DISCOVERY, _REGISTRY]) as hosts,
        Registry(host=hosts[_REGISTRY]) as registry,
    ):
        directory = Path(tempfile.mkdtemp(prefix="afs-", dir="/tmp"))
        running = NetworkCluster(directory, hosts, registry, nodes, layerstore_deadline, fused_deadline)
        try:
            asyncio.run(running.start())
            pids = [registry.pid, *(service.pid for service in running.services())]
            with leaks.exempt([directory], pids), ExitStack() as running.exemptions:
                yield running
        except BaseException:
            for log in sorted(directory.glob("logs/*.log")):
                print(f"--- {log.name}\n{log.read_text()[-4000:]}")
            raise
        finally:
            asyncio.run(running.stop())
            assert not list_mounts(str(directory)), "mounts are left below the cluster's directory"
            assert not (left := _processes_of(directory)), f"processes are left: {left}"
            shutil.rmtree(directory)


def _processes_of(directory: Path) -> list[str]:
    """Command lines with the directory in them."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            command = Path("/proc", pid, "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:  # it ended
            continue
        if str(directory) in command:
            found.append(command)
    return found
