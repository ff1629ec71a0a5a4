"""Fixtures for all tests: images, registries, capabilities, and the check that tests leave nothing behind."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.testbed import build, capabilities, images, leaks
from tests.testbed.cluster import RealCluster, cluster, exempt
from tests.testbed.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Iterator

_TESTS = Path(__file__).parent
_SEED = os.environ.get("AFS_TEST_SEED", "0")
os.environ[leaks.TAG_VARIABLE] = f"t{os.getpid()}"  # before any child: what it starts is known by it
# A shell without job control lets what it starts with & ignore Ctrl-C, and children inherit that: tests that interrupt
# something would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> list[str]:
    """Say how to repeat the run."""
    return [f"afs: AFS_TEST_SEED={_SEED}, images in {build.default_cache_dir()}"]


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Chance for one test: the same in every run with one AFS_TEST_SEED, whatever other tests run."""
    return random.Random(f"{_SEED} {request.node.nodeid}")  # noqa: S311 - not for secrets


@pytest.fixture(scope="session")
def cache_dir() -> Path:
    """Where built images stay between runs."""
    return build.default_cache_dir()


@pytest.fixture(scope="session")
def busybox_image(cache_dir: Path) -> images.BusyboxImage:
    """A small image that runs; see `images.busybox` for its tags."""
    return images.busybox(cache_dir)


@pytest.fixture(scope="session")
def debian_image(cache_dir: Path) -> images.DebianImage:
    """Debian minbase; half a minute when it is built for the first time."""
    capabilities.require("root", "debootstrap")
    return images.debian(cache_dir)


@pytest.fixture(scope="session")
def every_kind_image(cache_dir: Path) -> images.EveryKindImage:
    """An image with every kind of tar entry."""
    return images.every_kind(cache_dir)


@pytest.fixture
def registry() -> Iterator[Registry]:
    """An empty registry for one test."""
    capabilities.require("docker-registry")
    with Registry() as running:
        yield running


@pytest.fixture(scope="session")
def session_registry(busybox_image: images.BusyboxImage) -> Iterator[Registry]:
    """A registry for the whole session that holds every tag of the busybox image as `busybox:TAG`."""
    capabilities.require("docker-registry")
    with Registry() as running, leaks.exempt(pids=[running.pid]):
        for tag in busybox_image.tags:
            running.push(busybox_image.layout, tag, "busybox")
        yield running


@pytest.fixture(scope="session")
def session_cluster() -> Iterator[RealCluster]:
    """Two nodes for the whole session; use it through `shared_cluster`."""
    capabilities.require("root", "fuse", "overlay", "erofs", "cgroup", "runc")
    with cluster(2) as running, exempt(running):
        yield running


@pytest.fixture
def shared_cluster(session_cluster: RealCluster) -> Iterator[RealCluster]:
    """The session's cluster; afterwards it has to be idle again, with nothing left of any run."""
    yield session_cluster
    session_cluster.assert_idle()


@pytest.fixture(scope="session")
def fragile_cluster() -> Iterator[RealCluster]:
    """Two nodes whose services tests kill and start anew; attached roots stay when a snapshotter stops."""
    capabilities.require("root", "fuse", "overlay", "erofs", "cgroup", "runc")
    with cluster(2, snapshotter_flags=("--keep-mounts",)) as running, exempt(running):
        yield running


@pytest.fixture(autouse=True)
def _capabilities_of_markers(request: pytest.FixtureRequest) -> None:
    """Skip tests marked `root` or `containerd` where that cannot be had (under CI=true: fail them)."""
    if request.node.get_closest_marker("root"):
        capabilities.require("root", "overlay", "cgroup")
    if request.node.get_closest_marker("containerd"):
        capabilities.require("root", "containerd", "runc")


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fail a test of tests/system that leaves mounts, cgroups, processes or the like behind.

    Fixtures of wider scope are set up before this one, so what they hold is in its first look.
    """
    if not request.path.is_relative_to(_TESTS / "system"):
        yield
        return
    before = leaks.snapshot(paths=[tmp_path_factory.getbasetemp()])
    yield
    leaks.assert_no_new(before)
