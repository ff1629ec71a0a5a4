"""The database of snapshots."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from afs.core.errors import AlreadyExists, DataLoss, FailedPrecondition, InvalidArgument, NotFound
from afs.snapshotter.snapshots.clusterlayer import ClusterLayer, Name
from afs.snapshotter.snapshots.metadata import Kind, LayerMount, Metadata

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LAYER = ClusterLayer(
    "sha256:" + "1" * 64, "sha256:" + "2" * 64, "sha256:" + "3" * 64, (Name("a/b", os="linux"), Name("c"))
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "snapshots.db"


@pytest.fixture
def metadata(file: Path) -> Iterator[Metadata]:
    opened = Metadata(file)
    yield opened
    opened.close()


def committed(metadata: Metadata, name: str, parent: str = "") -> int:
    active = metadata.create(Kind.ACTIVE, f"active {name}", parent, {})
    return metadata.commit(name, active.name, {}).id


def test_what_is_written_is_there_after_a_restart(file: Path) -> None:
    before = time.time_ns()
    first = Metadata(file)
    base = committed(first, "base")
    made = [
        first.create(Kind.ACTIVE, "a /:'\"é", "base", {"k": "v", "": "x"}),
        first.create(Kind.VIEW, "view", "base", {}),
        first.create(Kind.COMMITTED, "layer", "base", {"l": "1"}, layer=LAYER),
    ]
    first.set_usage(base, 4096, 7)
    first.close()
    again = Metadata(file)
    assert again.snapshots()[1:] == made
    found = again.stat("base")
    assert (found.size, found.inodes, found.kind, found.parent) == (4096, 7, Kind.COMMITTED, "")
    assert before <= found.created == found.updated <= time.time_ns()
    assert again.stat("layer").layer == LAYER
    again.close()


def test_a_killed_process_loses_nothing_it_was_told_is_done(file: Path) -> None:
    program = """
import os, signal, sys
from pathlib import Path
from afs.snapshotter.snapshots.metadata import Kind, Metadata
metadata = Metadata(Path(sys.argv[1]))
for number in range(20):
    metadata.create(Kind.ACTIVE, str(number), "", {})
def make(number):
    print(number, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
metadata.create(Kind.ACTIVE, "half", "", {}, make=make)
"""
    done = subprocess.run([sys.executable, "-c", program, str(file)], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-9, "21\n")
    metadata = Metadata(file)
    assert [snapshot.name for snapshot in metadata.snapshots()] == [str(number) for number in range(20)]
    metadata.close()


def test_numbers_are_never_given_twice(metadata: Metadata) -> None:
    first = metadata.create(Kind.ACTIVE, "a", "", {})
    metadata.remove("a")
    assert metadata.create(Kind.ACTIVE, "a", "", {}).id > first.id


def test_parents(metadata: Metadata) -> None:
    committed(metadata, "base")
    metadata.create(Kind.ACTIVE, "active", "base", {})
    with pytest.raises(NotFound, match="nobody"):
        metadata.create(Kind.ACTIVE, "x", "nobody", {})
    with pytest.raises(InvalidArgument, match="active"):
        metadata.create(Kind.ACTIVE, "x", "active", {})
    with pytest.raises(AlreadyExists, match="active"):
        metadata.create(Kind.VIEW, "active", "", {})
    with pytest.raises(FailedPrecondition, match="remove"):
        metadata.remove("base")
    metadata.remove("active")
    metadata.remove("base")
    with pytest.raises(NotFound, match="base"):
        metadata.remove("base")
    assert metadata.snapshots() == []


def test_a_chain(metadata: Metadata) -> None:
    committed(metadata, "0")
    for number in range(1, 130):
        committed(metadata, str(number), str(number - 1))
    assert [snapshot.name for snapshot in metadata.chain("129")] == [str(number) for number in reversed(range(130))]
    with pytest.raises(NotFound):
        metadata.chain("none")


def test_commit(metadata: Metadata) -> None:
    active = metadata.create(Kind.ACTIVE, "active", "", {"old": "1"})
    metadata.create(Kind.VIEW, "view", "", {})
    metadata.add_mounts("active", active.id, [LayerMount(LAYER.diff_id, "/x")], "boot")
    with pytest.raises(NotFound, match="none"):
        metadata.commit("new", "none", {})
    with pytest.raises(FailedPrecondition, match="view"):
        metadata.commit("new", "view", {})
    with pytest.raises(AlreadyExists, match="view"):
        metadata.commit("view", "active", {})
    assert metadata.stat("active") == active
    done = metadata.commit("new", "active", {"new": "2"})
    assert metadata.stat("new") == done
    assert done.labels == {"new": "2"}
    assert active.updated < done.created == done.updated
    assert metadata.mounts("boot") == {}
    with pytest.raises(NotFound):
        metadata.stat("active")
    with pytest.raises(FailedPrecondition, match="not active"):
        metadata.commit("newer", "new", {})


def test_commit_with_another_parent(metadata: Metadata) -> None:
    committed(metadata, "one")
    committed(metadata, "two")
    metadata.create(Kind.ACTIVE, "active", "one", {})
    metadata.create(Kind.ACTIVE, "free", "", {})
    with pytest.raises(InvalidArgument, match="cannot be changed"):
        metadata.commit("new", "active", {}, "two")
    with pytest.raises(NotFound, match="none"):
        metadata.commit("new", "free", {}, "none")
    with pytest.raises(FailedPrecondition, match="active"):
        metadata.commit("new", "free", {}, "active")
    assert metadata.commit("same", "active", {}, "one").parent == "one"
    metadata.commit("new", "free", {}, "two")
    assert metadata.stat("new").parent == "two"


def test_labels(metadata: Metadata) -> None:
    before = metadata.create(Kind.ACTIVE, "a", "", {"x": "1", "y": "2"})
    after = metadata.set_labels("a", lambda labels: {**labels, "x": "3"})
    assert after.labels == {"x": "3", "y": "2"}
    assert before.created == after.created < after.updated
    with pytest.raises(NotFound):
        metadata.set_labels("b", lambda labels: labels)


def test_looking_by_a_label(metadata: Metadata) -> None:
    key = "containerd.io/snapshot.ref"
    for name, value in (("a", "1"), ("b", "2"), ("c", "1")):
        metadata.create(Kind.ACTIVE, name, "", {key: value, "other": "1"})
    assert [snapshot.name for snapshot in metadata.snapshots((key, "1"))] == ["a", "c"]
    assert metadata.snapshots((key, "3")) == []


def test_what_fails_while_files_are_made_leaves_no_row(metadata: Metadata) -> None:
    def fail(number: int) -> None:
        raise OSError(28, os.strerror(28))

    with pytest.raises(OSError, match="No space"):
        metadata.create(Kind.ACTIVE, "a", "", {}, make=fail)
    assert metadata.snapshots() == []
    assert metadata.create(Kind.ACTIVE, "a", "", {}).id


def test_layer_mounts_of_this_boot(metadata: Metadata) -> None:
    one, two = (LayerMount(LAYER.diff_id, path) for path in ("/1", "/2"))
    a = metadata.create(Kind.ACTIVE, "a", "", {}, mounts=[one], boot="now")
    b = metadata.create(Kind.ACTIVE, "b", "", {}, mounts=[one, two], boot="before")
    metadata.add_mounts("a", a.id, [two], "now")
    with pytest.raises(NotFound):
        metadata.add_mounts("a", b.id, [two], "now")
    assert metadata.mounts("now") == {a.id: [one, two]}
    metadata.remove("a")
    assert metadata.mounts("now") == {}


def test_a_damaged_file_is_named_and_left_alone(file: Path) -> None:
    metadata = Metadata(file)
    for number in range(100):
        metadata.create(Kind.ACTIVE, str(number), "", {"label": "x" * 200})
    metadata.close()
    data = bytearray(file.read_bytes())
    data[4096:] = b"\xff" * len(data[4096:])
    file.write_bytes(data)
    with pytest.raises(DataLoss, match=r"snapshots\.db"):
        Metadata(file)
    assert file.read_bytes() == data
    file.write_bytes(b"something else" * 1000)
    with pytest.raises(DataLoss, match=r"snapshots\.db"):
        Metadata(file)


def test_a_later_version_is_refused(file: Path) -> None:
    Metadata(file).close()
    with sqlite3.connect(file) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(FailedPrecondition, match="version 99"):
        Metadata(file)
