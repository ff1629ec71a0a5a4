"""A cluster whose second node serves a containerd: what the first node has, containerd gets without downloading it."""

from __future__ import annotations

import asyncio
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from afs.client import AfsClient
from tests.testbed import leaks, mounts
from tests.testbed.appimage import TAG, AppImage, pause_image
from tests.testbed.cluster import RealCluster, cluster, exempt
from tests.testbed.containerd import Containerd, Cri
from tests.testbed.containerdconfig import proxy_plugin
from tests.testbed.registry import Registry
from tests.testbed.snapshots import Snapshots

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from afs.core.cluster import NodeProcesses
    from tests.testbed.oci import Layer

SNAPSHOTTER = ("--snapshotter", "afs")
_RECONNECTED_WITHIN_S = 20.0


class LazyContainerd:
    """Made by `lazy_containerd`. All methods block; those with a `namespace` work in containerd's own one by default."""

    def __init__(self, running: RealCluster, containerd: Containerd, registry: Registry, pause: str) -> None:
        self.cluster = running
        self.containerd = containerd
        self.registry = registry
        """Has the pause image, and what tests push."""
        self.pause = pause
        self._printed: dict[str, int] = {}

    @property
    def first(self) -> NodeProcesses:
        """The node that gets images first."""
        return self.cluster.nodes[0]

    @property
    def node(self) -> NodeProcesses:
        """The node that serves containerd."""
        return self.cluster.nodes[1]

    @property
    def socket(self) -> Path:
        """Of the snapshotter that serves containerd."""
        return self.node.run_dir / "snapshotter.sock"

    def api(self) -> Snapshots:
        """A client of that snapshotter."""
        return Snapshots(self.socket)

    def push(self, image: AppImage, name: str, registry: Registry | None = None) -> str:
        """Push an image; returns the name to pull it by, which no other image has: the cluster believes a tag for a while."""
        return (registry or self.registry).push(image.layout, TAG, f"{name}-{image.chain_ids[-1][-12:]}")

    def seed(self, image: str) -> None:
        """Let the first node have an image, by running something in it."""

        async def run() -> None:
            async with AfsClient(self.first.afslet.address) as client:
                result = await client.run(image, ["true"], memory_mb=64)
                assert result.ok, result

        asyncio.run(run())

    def rpull(self, image: str, namespace: str = "") -> None:
        """Pull lazily, as far as the snapshotter can."""
        command = ("images", "rpull", "--plain-http", *SNAPSHOTTER, image)
        self.containerd.ctr(*command, namespace=namespace, program="ctr-remote")

    def pull(self, image: str, namespace: str = "") -> None:
        """Pull without any label for the snapshotter."""
        self.containerd.ctr("images", "pull", "--plain-http", *SNAPSHOTTER, image, namespace=namespace)

    def run(self, image: str, name: str, script: str, namespace: str = "", *, flags: Sequence[str] = ()) -> str:
        """What a shell script prints in a new container, which is removed; `flags` are for `ctr run`."""
        command = ("run", "--rm", *flags, *SNAPSHOTTER, image, name, "/bin/sh", "-ec", script)
        return self.containerd.ctr(*command, namespace=namespace)

    def start(self, image: str, name: str, script: str = "sleep 1000", namespace: str = "") -> None:
        """Start a container that stays."""
        command = ("run", "--detach", *SNAPSHOTTER, image, name, "/bin/sh", "-ec", script)
        self.containerd.ctr(*command, namespace=namespace)

    def execute(self, container: str, script: str, namespace: str = "") -> str:
        """What a shell script prints in a running container."""
        command = ("tasks", "exec", "--exec-id", "x", container, "/bin/sh", "-ec", script)
        return self.containerd.ctr(*command, namespace=namespace)

    def snapshots(self, *args: str | Path, namespace: str = "") -> str:
        """Run `ctr snapshots`."""
        return self.containerd.ctr("snapshots", *SNAPSHOTTER, *args, namespace=namespace)

    def usages(self) -> dict[str, tuple[int, int]]:
        """What `ctr snapshots usage` says: bytes and inodes of each snapshot."""
        lines = [line.split() for line in self.snapshots("usage", "-b").splitlines()[1:]]
        return {name: (int(size), int(inodes)) for name, size, inodes in lines}

    def content(self, namespace: str = "") -> set[str]:
        """Digests of the blobs in containerd's content store."""
        return set(self.containerd.ctr("content", "list", "--quiet", namespace=namespace).split())

    def assert_lazy(self, image: AppImage, namespace: str = "") -> None:
        """An image's layers are neither in the content store nor in the snapshotter's directories, yet known."""
        assert not image.blobs & self.content(namespace)
        with self.api() as api:
            infos = api.infos()
            assert set(image.chain_ids) <= set(infos)
        assert self.directories() == [], "there is nothing but layers of the cluster"

    def assert_no_layer_fetched(self, image: AppImage, registry: Registry | None = None) -> None:
        """Since the registry's last `forget` nobody fetched a layer of an image, not even a part."""
        asked = {request.digest for request in (registry or self.registry).requests("GET")}
        assert not asked & image.blobs

    def directories(self) -> list[str]:
        """Names of the directories that the snapshotter keeps for snapshots with files of their own."""
        return sorted(path.name for path in (self.node.directory / "snapshotter" / "snapshots").iterdir())

    def missing(self, layer: Layer) -> int:
        """How many chunks of a layer are not on the node that serves containerd."""
        store, name = self.node.directory / "layerstore", layer.diff_id.partition(":")[2]
        try:
            chunks = (store / "partial" / name / "chunks").read_bytes()
        except FileNotFoundError:  # it is not partial any more
            assert (store / "layers" / f"{name}.afslyr").exists()
            return 0
        return len(chunks) - sum(chunks)

    def stop_snapshotter(self, *, kill: bool) -> None:
        """End the snapshotter that serves containerd, cleanly or not."""
        if kill:
            self.cluster.kill(self.node.snapshotter)
        else:
            self.node.snapshotter.popen.terminate()
            assert self.node.snapshotter.popen.wait(20) == 0

    def start_snapshotter(self) -> None:
        """Start it anew, and wait until containerd is connected to it again.

        containerd tries that every three seconds at most, and until then it fails what needs the snapshotter.
        """
        asyncio.run(self.cluster.restart(self.node.snapshotter))
        deadline = time.monotonic() + _RECONNECTED_WITHIN_S
        # Of what it knows itself containerd would tell without asking.
        while (done := self.containerd.ctr_process("snapshots", *SNAPSHOTTER, "prepare", "connected")).returncode:
            assert "unavailable" in done.stderr, done.stderr
            assert time.monotonic() < deadline, done.stderr
            time.sleep(0.05)  # nobody tells
        self.snapshots("delete", "connected")
        self.collect()

    def print_log(self) -> None:
        """Print what the services and containerd wrote since the last time; pytest shows it if a test fails."""
        names = [process.name for process in self.cluster.cluster.processes()]
        logs = {name: self.cluster.log(name).splitlines() for name in names} | {"containerd": self.containerd.log()}
        for name, lines in logs.items():
            print(f"--- {name}", *lines[self._printed.get(name, 0) :], sep="\n")
            self._printed[name] = len(lines)

    def remove_everything(self) -> None:
        """Containers and images of all namespaces, and what containerd then finds that nobody needs."""
        namespaces = self.containerd.ctr("namespaces", "list", "--quiet").split()
        for namespace in namespaces:
            self.containerd.end_containers(namespace)
            if images := self.containerd.ctr("images", "list", "--quiet", namespace=namespace).split():
                self.containerd.ctr("images", "remove", *images, namespace=namespace)
        self.collect()

    def collect(self) -> None:
        """Have containerd collect garbage, in all namespaces, and wait for that: the end of a lease is how to ask for it."""
        self.containerd.ctr("leases", "create", "--id", "collect")
        self.containerd.ctr("leases", "delete", "--sync", "collect")

    def assert_empty(self) -> None:
        """Neither containerd nor the snapshotter has anything left of any image or container."""
        for namespace in self.containerd.ctr("namespaces", "list", "--quiet").split():
            assert self.content(namespace) == set()
            assert self.snapshots("list", namespace=namespace).splitlines()[1:] == []
            assert self.containerd.ctr("leases", "list", "--quiet", namespace=namespace).split() == []
        with self.api() as api:
            assert api.infos() == {}
        assert self.directories() == []
        self.cluster.assert_idle()  # roots of runs stay warm for a moment
        below, kept = f"{self.node.directory}/snapshotter/", f"{self.node.directory}/snapshotter/scratch/"
        assert [
            mount.target
            for mount in mounts.table()
            if (mount.target.startswith(below) and not mount.target.startswith(kept)) or below in mount.options
        ] == []
        assert mounts.cgroups(f"{self.containerd.namespace}*/*/") == set()


@contextmanager
def lazy_containerd(*snapshotter_flags: str) -> Iterator[LazyContainerd]:
    """Two nodes, a containerd with CRI whose snapshotter is the second node's, and a registry."""
    with ExitStack() as stack:
        registry = stack.enter_context(Registry())
        with tempfile.TemporaryDirectory(prefix="afs-test-pause-") as directory:
            pause = registry.push(pause_image(Path(directory, "layout")), TAG, "pause")
        # By its size the first node owns all layers, and nothing but a reader makes the second one fetch anything.
        common = ("--completion=never", "--no-traces")
        flags = {
            "layerstore_flags": ("--capacity=1048576GiB", *common),
            "snapshotter_flags": ("--keep-mounts", *snapshotter_flags),
        }
        running = stack.enter_context(cluster(1, proxy=False, **flags))
        running.cluster.settings = replace(running.cluster.settings, layerstore_flags=("--capacity=1GiB", *common))
        running.start_node(2)
        socket = running.nodes[1].run_dir / "snapshotter.sock"
        containerd = stack.enter_context(Containerd(proxy_plugin(socket), cri=Cri(pause, "afs")))
        stack.enter_context(exempt(running))
        stack.enter_context(leaks.exempt([containerd.directory, containerd.namespace], [containerd.pid, registry.pid]))
        yield LazyContainerd(running, containerd, registry, pause)
