"""containerd's own tests of a snapshotter: against its overlayfs, so that they are known to work here, and against ours."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from tests.testbed import conformance
from tests.testbed.cluster import cluster
from tests.testbed.containerd import Containerd
from tests.testbed.snapshots import Snapshots, mounted

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from afs.core.cluster import NodeProcesses
    from afs.proto.containerd.snapshots_pb2 import Info
    from tests.testbed.cluster import RealCluster

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(300)]  # the suite may have to be built first
SKIPPED_BY_CONTAINERD_1_6 = {"Rename"}
CASES = 21


@pytest.fixture(scope="module")
def suite(cache_dir: Path) -> Path:
    """The program."""
    return conformance.program(cache_dir)


@contextmanager
def snapshotter() -> Iterator[tuple[RealCluster, NodeProcesses, Path]]:
    """A node with a snapshotter that may be killed, and its socket."""
    with cluster(1, proxy=False, snapshotter_flags=("--keep-mounts",)) as running:
        (node,) = running.nodes
        yield running, node, node.run_dir / "snapshotter.sock"


def assert_passed(results: conformance.Results) -> None:
    """Nothing failed, and nothing was skipped that containerd itself does not skip."""
    assert not results.failed, results.tail()
    assert results.status == 0, results.tail()
    assert results.skipped == SKIPPED_BY_CONTAINERD_1_6
    assert len(results.cases) == CASES


@pytest.mark.containerd
def test_containerd_s_overlayfs(suite: Path, tmp_path: Path) -> None:
    with Containerd() as containerd:
        assert_passed(conformance.run(suite, containerd.socket, "overlayfs", tmp_path))


def test_afs_snapshotter(suite: Path, tmp_path: Path) -> None:
    with snapshotter() as (_, _, socket):
        assert_passed(conformance.run(suite, socket, "afs", tmp_path))


@dataclass(frozen=True)
class Kept:
    """Snapshots of every kind that live through everything, as they were when they were made."""

    api: Snapshots
    scratch: Path
    known: dict[str, tuple[Info, tuple[int, int]]]
    """What Stat and Usage said, by name."""
    mounts: dict[str, list[tuple[str, str, tuple[str, ...]]]]
    files: dict[str, dict[str, str]]
    """By key: what is to be read in a mounted snapshot."""

    def check(self) -> None:
        """They are as they were."""
        for name, (info, usage) in self.known.items():
            assert self.api.stat(name) == info
            assert self.api.usage(name) == usage
        for key, mounts in self.mounts.items():
            assert as_tuples(self.api, key) == mounts
        for key, files in self.files.items():
            with mounted(self.api.mounts(key), self.scratch / "kept") as at:
                assert {name: (at / name).read_text() for name in files} == files


def as_tuples(api: Snapshots, key: str) -> list[tuple[str, str, tuple[str, ...]]]:
    """A snapshot's mounts, to compare."""
    return [(mount.type, mount.source, tuple(mount.options)) for mount in api.mounts(key)]


def keep(api: Snapshots, scratch: Path) -> Kept:
    """Make them: committed ones with labels, with and without a parent, and active ones and views on them."""

    def write(key: str, **files: str) -> None:
        with mounted(api.mounts(key), scratch / "kept") as at:
            for name, text in files.items():
                (at / name).write_text(text)

    api.prepare("kept/first of all", labels={"a": "1", "empty": ""})
    write("kept/first of all", low="low", both="low")
    api.commit("kept/low", "kept/first of all", {"committed": "yes", "containerd.io/snapshot/other": "ü"})
    api.prepare("kept/second", "kept/low")
    write("kept/second", both="high", high="high")
    api.commit("kept/high", "kept/second")
    api.prepare("kept/alone", labels={"active": "alone"})
    write("kept/alone", alone="alone")
    api.prepare("kept/active", "kept/high", {"active": "yes"})
    write("kept/active", high="written", new="new")
    api.view("kept/view", "kept/high")
    api.view("kept/low view", "kept/low", {"view": "yes"})
    names = ("kept/low", "kept/high", "kept/alone", "kept/active", "kept/view", "kept/low view")
    return Kept(
        api,
        scratch,
        {name: (api.stat(name), api.usage(name)) for name in names},
        {key: as_tuples(api, key) for key in names[2:]},
        {
            "kept/alone": {"alone": "alone"},
            "kept/active": {"low": "low", "both": "high", "high": "written", "new": "new"},
            "kept/view": {"low": "low", "both": "high", "high": "high"},
            "kept/low view": {"low": "low", "both": "low"},
        },
    )


def test_killed_between_the_cases(suite: Path, tmp_path: Path) -> None:
    """Nothing of the snapshotter's state is lost, neither what a case left nor what lives through all of them."""
    cases = conformance.cases(suite, tmp_path)
    assert len(cases) == CASES
    with snapshotter() as (running, node, socket), Snapshots(socket) as api:
        kept = keep(api, tmp_path)
        skipped: frozenset[str] = frozenset()
        for case in cases:
            results = conformance.run(suite, socket, "afs", tmp_path, case)
            assert not results.failed, results.tail()
            assert results.cases == {case}, results.tail()
            skipped |= results.skipped
            before = api.infos()
            assert kept.known.keys() < before.keys()
            running.kill(node.snapshotter)
            asyncio.run(running.restart(node.snapshotter))
            assert api.infos() == before
            kept.check()
        assert skipped == SKIPPED_BY_CONTAINERD_1_6
