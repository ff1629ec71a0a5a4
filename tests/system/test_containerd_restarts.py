"""containerd's containers and images over restarts of the snapshotter, of the layerstore and of containerd itself."""

from __future__ import annotations

import asyncio
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.testbed.appimage import app_image
from tests.testbed.containerd import CtrError
from tests.testbed.lazycontainerd import SNAPSHOTTER

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator
    from pathlib import Path

    from tests.testbed.appimage import AppImage
    from tests.testbed.lazycontainerd import LazyContainerd

pytestmark = [pytest.mark.root, pytest.mark.containerd, pytest.mark.slow]
AT_ONCE = 8


@pytest.fixture
def app(tmp_path: Path, rng: random.Random) -> AppImage:
    """An image that nobody knows."""
    return app_image(tmp_path / "app", rng)


@pytest.fixture
def image(lazy: LazyContainerd, app: AppImage) -> str:
    """Its name; containerd has pulled it lazily."""
    name = lazy.push(app, "app")
    lazy.seed(name)
    lazy.registry.forget()
    lazy.rpull(name)
    lazy.assert_lazy(app)
    return name


class Reader:
    """A container in the foreground that reads everything in its image once it is told to."""

    def __init__(self, lazy: LazyContainerd, process: subprocess.Popen[str], name: str) -> None:
        self._lazy = lazy
        self._process = process
        self._name = name

    def read(self) -> str:
        """Let it read; what it printed at its end."""
        self._lazy.execute(self._name, "touch /go")
        output, errors = self._process.communicate(timeout=60)
        assert self._process.returncode == 0, errors
        return output


@contextmanager
def reader(lazy: LazyContainerd, image: str, app: AppImage, name: str) -> Iterator[Reader]:
    """A running container that has read nothing yet but what its start needs."""
    script = f"echo ready; while ! test -e /go; do usleep 10000; done; {app.check}"
    command = lazy.containerd.ctr_command("run", *SNAPSHOTTER, image, name, "/bin/sh", "-ec", script)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield Reader(lazy, process, name)
        finally:
            process.kill()


@pytest.mark.parametrize("kill", [False, True], ids=["stopped", "killed"])
def test_snapshotter_restarts(lazy: LazyContainerd, app: AppImage, image: str, kill: bool) -> None:
    """Containers read on while it is away, and after it; and it knows all that it knew."""
    with reader(lazy, image, app, "without") as one, reader(lazy, image, app, "after") as two:
        with lazy.api() as api:
            before = api.infos()
        lazy.stop_snapshotter(kill=kill)
        assert lazy.missing(app.layers[1])
        assert one.read() == app.listing
        lazy.start_snapshotter()
        with lazy.api() as api:
            assert api.infos() == before
        assert two.read() == app.listing
        lazy.start(image, "new")
        assert lazy.execute("new", f"echo x > /x; {app.check}") == app.listing
    lazy.assert_no_layer_fetched(app)


@pytest.mark.parametrize("kill", [False, True], ids=["stopped", "killed"])
def test_all_of_the_node_restarts(lazy: LazyContainerd, app: AppImage, image: str, kill: bool) -> None:
    """Only afs_fused and the containers stay: a read waits for the layerstore."""
    with reader(lazy, image, app, "one") as running:
        lazy.stop_snapshotter(kill=kill)
        if kill:
            lazy.cluster.kill(lazy.node.layerstore)
        else:
            lazy.node.layerstore.popen.terminate()
            lazy.node.layerstore.popen.wait(20)
        asyncio.run(lazy.cluster.restart(lazy.node.layerstore))
        lazy.start_snapshotter()
        assert lazy.missing(app.layers[1])
        assert running.read() == app.listing
    assert lazy.run(image, "two", app.check) == app.listing
    lazy.assert_no_layer_fetched(app)


def test_containerd_restarts(lazy: LazyContainerd, app: AppImage, image: str) -> None:
    lazy.start(image, "one")
    lazy.execute("one", "echo written > /written")
    lazy.containerd.restart()
    assert lazy.execute("one", f"cat /written; {app.check}") == f"written\n{app.listing}"
    assert lazy.run(image, "two", app.check) == app.listing
    lazy.assert_no_layer_fetched(app)


def test_killed_while_containers_start(lazy: LazyContainerd, app: AppImage, image: str) -> None:
    """Some starts fail then; none is wrong, and what they left goes."""

    def run(name: str) -> str:
        try:
            return lazy.run(image, name, app.check)
        except CtrError:
            return "failed"

    with ThreadPoolExecutor(AT_ONCE) as pool:
        first, *others = [pool.submit(run, f"first-{n}") for n in range(AT_ONCE)]
        assert first.result() == app.listing
        lazy.cluster.kill(lazy.node.snapshotter)
        found = {other.result() for other in others}
        assert found <= {app.listing, "failed"}
        lazy.start_snapshotter()
        again = pool.map(run, [f"second-{n}" for n in range(AT_ONCE)])
        assert set(again) == {app.listing}


def test_pull_without_a_snapshotter(lazy: LazyContainerd, app: AppImage) -> None:
    """It fails; when the snapshotter is back it is as if nobody had tried."""
    name = lazy.push(app, "app")
    lazy.seed(name)
    lazy.stop_snapshotter(kill=True)
    with pytest.raises(CtrError):
        lazy.rpull(name)
    lazy.start_snapshotter()
    lazy.rpull(name)
    lazy.assert_lazy(app)
    assert lazy.run(name, "one", app.check) == app.listing
