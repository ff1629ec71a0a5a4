"""What several benchmarks use: the images by name, an SDK client on a loop of its own, and containerd's commands."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.testbed import build, images

from afs.client import AfsClient, Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from tests.testbed.containerd import Containerd
    from tests.testbed.registry import Registry

TRUE = ("/bin/true",)
_names = itertools.count()


@dataclass(frozen=True)
class Image:
    """An image in an OCI layout. *commands* are what `first` runs in it, by the name that results have."""

    name: str
    layout: Path
    tag: str
    commands: dict[str, tuple[str, ...]]

    @property
    def reference(self) -> str:
        """As AFS commands name it."""
        return f"oci:{self.layout}:{self.tag}"

    def push(self, registry: Registry) -> str:
        """Push it and give its name there."""
        return registry.push(self.layout, self.tag, self.name)


def image(name: str) -> Image:
    """busybox, debian or img4; built first if need be, which takes minutes for img4."""
    cache = build.default_cache_dir()
    if name == "busybox":
        small = images.busybox(cache)
        return Image(name, small.layout, small.tag, {"true": TRUE})
    if name == "debian":
        base = images.debian(cache)
        return Image(name, base.layout, base.tag, {"true": TRUE})
    big = images.img4(cache)
    return Image(name, big.layout, big.tag, {"true": TRUE, "W": big.work})


class Client:
    """The SDK's client, connected, on a loop that runs only while a run is under way."""

    def __init__(self, loop: asyncio.AbstractEventLoop, client: AfsClient) -> None:
        self._loop = loop
        self._client = client

    def run(self, reference: str, command: Sequence[str] = TRUE, *, node: str = "") -> None:
        """Run a command to its `done`; it has to succeed."""
        result = self._loop.run_until_complete(self._client.run(reference, command, node_id=node))
        if result.exit_code or result.outcome is not Outcome.EXITED:
            raise RuntimeError(f"{command} in {reference}: {result}")

    def have_everywhere(self, reference: str, nodes: int) -> None:
        """Have all of an image on *nodes* nodes, as peers of ours have it after a pull."""
        answer = self._loop.run_until_complete(self._client.reconcile(reference, nodes))
        if not answer.ensured:
            raise RuntimeError(f"{reference} is on {answer.current_replica} nodes, not {nodes}")

    def run_many(self, reference: str, count: int, at_once: int) -> None:
        """*count* runs of /bin/true, *at_once* at a time; all have to succeed."""
        numbers = iter(range(count))

        async def work() -> None:
            for _ in numbers:
                result = await self._client.run(reference, TRUE, memory_mb=64)
                if not result.ok:
                    raise RuntimeError(f"{reference}: {result}")

        async def everything() -> None:
            await asyncio.gather(*(work() for _ in range(at_once)))

        self._loop.run_until_complete(everything())


@contextmanager
def connected(address: str, *, proxy: bool = True) -> Iterator[Client]:
    """A client whose connection to afs_proxy (or to an afslet) is open."""
    loop = asyncio.new_event_loop()

    async def make() -> AfsClient:
        client = AfsClient(address)
        if proxy:
            await client.status()
        return client

    client = loop.run_until_complete(make())
    try:
        yield Client(loop, client)
    finally:
        loop.run_until_complete(client.close())
        loop.close()


def ctr_pull(containerd: Containerd, reference: str) -> None:
    """`ctr images pull`."""
    containerd.ctr("images", "pull", "--plain-http", reference, timeout=600)


def ctr_run(containerd: Containerd, reference: str, command: Sequence[str] = TRUE) -> None:
    """`ctr run --rm` on overlayfs, in a container with a name of its own."""
    containerd.ctr("run", "--rm", "--snapshotter", "overlayfs", reference, f"run{next(_names)}", *command)
