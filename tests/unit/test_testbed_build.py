"""The cache of built images, and what builders share."""

from __future__ import annotations

import io
import os
import stat
import tarfile
import threading
import types
from typing import TYPE_CHECKING

import pytest

from tests.testbed import build, capabilities, img4, layertar
from tests.testbed.daemon import Daemon, DaemonError

if TYPE_CHECKING:
    from pathlib import Path


def test_a_directory_is_built_once_by_many(tmp_path: Path) -> None:
    built: list[Path] = []

    def make(directory: Path) -> None:
        built.append(directory)
        (directory / "file").write_text("done")

    threads = [threading.Thread(target=build.cached, args=(tmp_path, "thing", "k1", make)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert (build.cached(tmp_path, "thing", "k1", make) / "file").read_text() == "done"
    build.cached(tmp_path, "thing", "k2", make)
    assert len(built) == 2


def test_a_failed_or_killed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(directory: Path) -> None:
        (directory / "half").touch()
        raise ValueError("no")

    (tmp_path / "thing.tmp-old").mkdir()
    (tmp_path / "thing.tmp-old-tar").touch()
    with pytest.raises(ValueError, match="no"):
        build.cached(tmp_path, "thing", "k", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["thing.lock"]


def test_a_source_key_changes_with_code_alone(tmp_path: Path) -> None:
    def key(text: str) -> str:
        path = tmp_path / "module.py"
        path.write_text(text)
        module = types.ModuleType("module")
        module.__file__ = str(path)
        return build.source_key(module)

    plain = key('"""Says this."""\nX = 1\ndef f():\n    return X\n')
    assert key('"""Says that."""\nX = 1  # one\n\n\ndef f():\n    """Doc."""\n    return X\n') == plain
    assert key("X = 2\ndef f():\n    return X\n") != plain


def test_a_failing_program_shows_its_output() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)exit 3.*what happened"):
        build.run(["sh", "-c", "echo what happened; exit 3"])


def test_a_tree_becomes_a_sorted_tar_with_clamped_times(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "b" / "deep").mkdir(parents=True)
    (tree / "b" / "one").write_text("data")
    os.link(tree / "b" / "one", tree / "b" / "two")
    (tree / "a").symlink_to("b/one")
    os.mkfifo(tree / "pipe")
    os.utime(tree / "b" / "one", (5, 5))
    assert layertar.write_layer(tree, tmp_path / "out.tar", newest=1000) == 6
    with tarfile.open(tmp_path / "out.tar") as tar:
        members = {member.name: member for member in tar}
    assert list(members) == ["a", "b", "b/deep", "b/one", "b/two", "pipe"]
    assert members["b/two"].islnk()
    assert members["b/two"].linkname == "b/one"
    assert members["a"].linkname == "b/one"
    assert members["pipe"].isfifo()
    assert (members["b/one"].mtime, members["b"].mtime) == (5, 1000)


def test_the_source_tree_of_img4_is_the_same_each_time(tmp_path: Path) -> None:
    capabilities.require("root")
    tars = []
    for name in ("x", "y"):
        img4.write_source_tree(tmp_path / name, files=100)
        target = tmp_path / f"{name}.tar"
        layertar.write_layer(tmp_path / name, target, newest=0)
        tars.append(target.read_bytes())
    assert tars[0] == tars[1]
    with tarfile.open(fileobj=io.BytesIO(tars[0])) as tar:
        assert sum(member.isreg() for member in tar if "package" in member.name) == 100
        zero = tar.getmember("special/zero")
        assert (zero.ischr(), zero.devmajor, zero.devminor) == (True, 1, 5)
        assert tar.getmember("special/setuid").mode & stat.S_ISUID
        assert tar.getmember("special/one").pax_headers["SCHILY.xattr.user.testbed"] == "IMG4"
        assert tar.getmember("special/two").islnk()


def test_a_daemon_is_followed_and_stopped() -> None:
    with Daemon(["sh", "-c", "echo ready on 42; exec sleep 60"]) as daemon:
        assert daemon.wait_for(r"ready on (\d+)").group(1) == "42"
        assert daemon.lines() == ["ready on 42"]
        assert os.path.exists(f"/proc/{daemon.pid}")
    with pytest.raises(DaemonError, match="not started"):
        _ = daemon.pid


def test_a_daemon_that_ends_says_what_it_wrote() -> None:
    with Daemon(["sh", "-c", "echo broken; exit 1"]) as daemon, pytest.raises(DaemonError, match=r"(?s)ended.*broken"):
        daemon.wait_for("ready")


def test_require_skips_or_fails_under_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    def probe() -> None:
        raise capabilities.CapabilityMissing("there is none")

    monkeypatch.setitem(capabilities.PROBES, "unicorn", probe)
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="needs unicorn: there is none"):
        capabilities.require("unicorn")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="CI lacks unicorn: there is none"):
        capabilities.require("unicorn")
    assert not capabilities.have("unicorn")
