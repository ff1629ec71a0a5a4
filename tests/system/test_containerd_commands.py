"""``afs_snapshotter config`` and ``check`` with Debian's containerd, and the daemon beside them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from typing_extensions import override

from tests.testbed import capabilities
from tests.testbed.cluster import BIN
from tests.testbed.containerd import Containerd

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.testbed.cluster import RealCluster

pytestmark = [pytest.mark.root, pytest.mark.containerd, pytest.mark.slow]
PROGRAM = str(BIN / "afs_snapshotter")
OLD = "io.containerd.grpc.v1.cri"
DEBIAN = f"""# Debian's file
version = 2

[plugins]
  [plugins."{OLD}"]
    [plugins."{OLD}".cni]
      bin_dir = "/usr/lib/cni"   # not /opt/cni/bin
"""


def call(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run afs_snapshotter to its end."""
    argv = [PROGRAM, *map(str, arguments)]
    env = {**os.environ, **environment}
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=90, env=env)


def dump(path: Path) -> dict[str, Any]:
    """What the installed containerd makes of a file."""
    done = subprocess.run(
        ["containerd", "--config", path, "config", "dump"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return tomllib.loads(done.stdout)


# config


def test_the_installed_release_is_the_default() -> None:
    printed = call("config")
    assert (printed.returncode, printed.stderr) == (0, "")
    installed = subprocess.run(["containerd", "--version"], capture_output=True, text=True, check=True).stdout
    assert call("config", "--containerd-version", installed).stdout == printed.stdout


def test_the_settings_of_the_daemon_are_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "afs.toml"
    file.write_text('[snapshotter]\nroot = "/data/afs"\nrun_dir = "/run/other"\n')
    for done in (
        call("--config", file, "config", "--containerd-version", "1.7"),
        call("config", "--containerd-version", "1.7", AFS_CONFIG=str(file)),
        call("--root=/data/afs", "config", "--containerd-version=1.7", "--address=unix:///run/other/snapshotter.sock"),
    ):
        plugin = tomllib.loads(done.stdout)["proxy_plugins"]["afs"]
        assert (plugin["address"], plugin["exports"]["root"]) == ("/run/other/snapshotter.sock", "/data/afs")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["config", "--name", "afs-soci"], 64, "the name 'afs-soci' contains 'soci': nerdctl would pull"),
        (["config", "--address", "afs.sock"], 64, "the socket is not an absolute path: 'afs.sock'"),
        (["config", "--containerd-version", "newest"], 64, "not a version of containerd: 'newest'"),
        (["config", "--containerd-version", "1.4"], 68, "containerd 1.4 is older than 1.6"),
        (["config", "--force"], 64, "--force goes with --write"),
        (["--config", "/none", "config"], 64, "cannot read configuration /none"),
        (["--fuse-workers", "x", "config"], 64, ""),
        (["nothing"], 64, ""),
    ],
)
def test_wrong_arguments(arguments: list[str], code: int, says: str) -> None:
    done = call(*arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(f"afs_snapshotter: {says}" if says else "Usage:"), done.stderr


def test_without_containerd(tmp_path: Path) -> None:
    done = call("config", PATH=str(tmp_path))
    assert done.returncode == 67
    assert done.stderr == (
        "afs_snapshotter: cannot ask containerd for its version: No such file or directory; give it with "
        "--containerd-version\n"
    )


@pytest.mark.parametrize("before", ["", DEBIAN, "default"])
def test_containerd_reads_what_was_written(before: str, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    if before == "default":  # all of containerd's settings, spelled out
        before = subprocess.run(["containerd", "config", "default"], capture_output=True, text=True, check=True).stdout
    if before:
        path.write_text(before)
    done = call("config", "--write", path)
    assert (done.returncode, done.stderr) == (0, "")
    kept = f", what it was is in {path}.afs-1" if before else ""
    assert done.stdout.splitlines()[-1] == f"{path} is changed{kept}; restart containerd"
    seen = dump(path)
    assert seen["proxy_plugins"]["afs"] == {"type": "snapshot", "address": "/run/afs/snapshotter.sock"}
    cri = seen["plugins"][OLD]
    assert cri["containerd"]["snapshotter"] == "afs"
    assert cri["containerd"]["disable_snapshot_annotations"] is False
    if before == DEBIAN:
        assert cri["cni"]["bin_dir"] == "/usr/lib/cni"
        assert path.read_text().startswith(DEBIAN)
    written = path.read_bytes()
    again = call("config", "--write", path)
    assert (again.returncode, again.stdout) == (0, f"{path} has it all; nothing is changed\n")
    assert path.read_bytes() == written
    assert len(list(tmp_path.iterdir())) == (2 if before else 1)


def test_what_others_chose_is_kept_unless_forced(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    text = f'{DEBIAN}[plugins."{OLD}".containerd]\nsnapshotter = "stargz"\n'
    path.write_text(text)
    done = call("config", "--write", path)
    assert (done.returncode, done.stdout) == (67, "")
    assert done.stderr == (
        f'afs_snapshotter: {path}: plugins."{OLD}".containerd.snapshotter is "stargz", not "afs"; --force changes it, '
        "--no-cri leaves CRI alone\n"
    )
    assert (path.read_text(), len(list(tmp_path.iterdir()))) == (text, 1)
    assert call("config", "--no-cri", "--write", path).returncode == 0
    assert dump(path)["plugins"][OLD]["containerd"]["snapshotter"] == "stargz"
    assert call("config", "--force", "--write", path).returncode == 0
    assert dump(path)["plugins"][OLD]["containerd"]["snapshotter"] == "afs"


def test_an_import_has_the_last_word(tmp_path: Path) -> None:
    path, imported = tmp_path / "config.toml", tmp_path / "more.toml"
    text = f'version = 2\n[plugins."{OLD}".containerd]\nsnapshotter = "native"\n'
    imported.write_text(text)
    path.write_text(f'version = 2\nimports = ["{imported}"]\n')
    done = call("config", "--write", path)
    assert done.returncode == 0
    notes = [line for line in done.stdout.splitlines() if line.startswith("note: ")]
    assert (
        notes[0] == f'note: plugins."{OLD}".containerd.snapshotter is "native" for containerd: an imported file says so'
    )
    assert imported.read_text() == text


def test_a_file_that_containerd_refuses_stays(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    text = 'version = 2\ndisabled_plugins = ["cri"]\n'  # a name of version 1
    path.write_text(text)
    done = call("config", "--write", path)
    assert done.returncode == 67
    assert "containerd does not take the new file, so the old one stays: " in done.stderr
    assert (path.read_text(), len(list(tmp_path.iterdir()))) == (text, 1)


# check


class Foreign(grpc.GenericRpcHandler):
    """A snapshotter that knows nothing and does as little as a test wants of it; all else is UNIMPLEMENTED."""

    def __init__(self, socket: Path, prepare_s: float) -> None:
        self.socket = socket
        self.asked = threading.Event()
        """Set when something is to be prepared."""
        self._prepare_s = prepare_s

    @override
    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        match handler_call_details.method.rpartition("/")[2]:
            case "Stat":
                return grpc.unary_unary_rpc_method_handler(
                    lambda _, context: context.abort(grpc.StatusCode.NOT_FOUND, "no such snapshot")
                )
            case "List":
                return grpc.unary_stream_rpc_method_handler(lambda _request, _context: iter(()))
            case "Cleanup":
                return grpc.unary_unary_rpc_method_handler(lambda _request, _context: b"")
            case "Prepare":
                return grpc.unary_unary_rpc_method_handler(self._prepare)
        return None

    def _prepare(self, _: bytes, context: grpc.ServicerContext) -> bytes:
        self.asked.set()
        deadline = time.monotonic() + self._prepare_s
        while context.is_active() and time.monotonic() < deadline:
            time.sleep(0.02)  # as one does that waits for a network
        context.abort(grpc.StatusCode.INTERNAL, "the disk is on fire")


@contextmanager
def foreign(prepare_s: float = 0) -> Iterator[Foreign]:
    """A foreign snapshotter that serves."""
    with tempfile.TemporaryDirectory(prefix="afs-test-") as directory:
        snapshotter = Foreign(Path(directory, "foreign.sock"), prepare_s)
        server = grpc.server(ThreadPoolExecutor(4), handlers=[snapshotter])
        server.add_insecure_port(f"unix:{snapshotter.socket}")
        server.start()
        try:
            yield snapshotter
        finally:
            server.stop(None).wait()


@contextmanager
def containerd_with(path: Path) -> Iterator[Containerd]:
    """A containerd whose snapshotter afs is at *path*, as `config` says it."""
    printed = call("config", "--no-cri", "--address", path)
    assert printed.returncode == 0, printed.stderr
    with Containerd(printed.stdout.replace("version = 2\n", "")) as running:
        yield running


def check(containerd: Containerd, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command on a containerd, in a namespace that ends with it."""
    return call("check", *where(containerd), *arguments, **environment)


def where(containerd: Containerd) -> list[str]:
    """Flags that say what to check."""
    return ["--containerd-address", str(containerd.socket), "--namespace", namespace(containerd)]


def namespace(containerd: Containerd) -> str:
    """Where checks are made."""
    return containerd.other_namespace("check")


def steps(done: subprocess.CompletedProcess[str]) -> dict[str, bool]:
    """What was printed as ok and as FAILED; without what is behind the colon."""
    lines = [line.partition(":")[0] for line in done.stdout.splitlines()]
    return {line[8:]: line.startswith("ok ") for line in lines}


def assert_clean(containerd: Containerd) -> None:
    """Nothing of a check is left."""
    assert namespace(containerd) not in containerd.ctr("namespaces", "ls", "--quiet").split()


@pytest.fixture
def plain() -> Iterator[Containerd]:
    """A containerd without AFS."""
    with Containerd() as running:
        yield running


def test_check_of_afs(shared_cluster: RealCluster) -> None:
    path = shared_cluster.nodes[0].run_dir / "snapshotter.sock"
    with containerd_with(path) as containerd:
        done = check(containerd, "--address", path)
        assert (done.returncode, done.stderr) == (0, "")
        assert steps(done) == dict.fromkeys(
            [
                f"afs_snapshotter serves on {path}",
                f"containerd serves on {containerd.socket}",
                "containerd has the snapshotter afs",
                f"the namespace {namespace(containerd)} is free",
                "an image can be unpacked into it",
                "a container starts from it",
                "all of it is removed again",
            ],
            True,
        )
        assert_clean(containerd)


def test_check_of_containerds_own(plain: Containerd) -> None:
    done = check(plain, "--name", "overlayfs", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)["steps"]
    assert [step["ok"] for step in found] == [True] * 6
    assert found[1]["detail"] == f"root {plain.root}/io.containerd.snapshotter.v1.overlayfs"
    assert_clean(plain)


def test_nobody_serves(plain: Containerd, tmp_path: Path) -> None:
    done = check(plain, "--address", tmp_path / "none.sock")
    assert (done.returncode, list(steps(done).values())) == (69, [False])
    assert done.stderr == (
        f"afs_snapshotter: afs_snapshotter has no socket {tmp_path}/none.sock; start it, or say where it is with --address\n"
    )
    done = call("check", "--name", "overlayfs", "--containerd-address", tmp_path / "none.sock")
    assert (done.returncode, list(steps(done).values())) == (69, [False])
    assert f"containerd has no socket {tmp_path}/none.sock; start it" in done.stderr


def test_something_else_serves(plain: Containerd, tmp_path: Path) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_insecure_port(f"unix:{tmp_path}/s.sock")
    server.start()
    done = check(plain, "--address", tmp_path / "s.sock")
    server.stop(None).wait()
    assert done.returncode == 69
    assert done.stderr == f"afs_snapshotter: what serves on {tmp_path}/s.sock is no snapshotter\n"


def test_containerd_does_not_know_afs(plain: Containerd) -> None:
    with foreign() as other:
        done = check(plain, "--address", other.socket)
    assert done.returncode == 66
    assert done.stderr == (
        "afs_snapshotter: containerd knows no snapshotter afs, only native, overlayfs; `afs_snapshotter config --write` "
        "and a restart of containerd help\n"
    )
    assert_clean(plain)


def test_containerd_asks_somewhere_else() -> None:
    with foreign() as one, foreign() as other, containerd_with(other.socket) as containerd:
        done = check(containerd, "--address", one.socket)
    assert done.returncode == 67
    assert f"containerd asks for afs at {other.socket}, and not at {one.socket}; " in done.stderr


def test_a_snapshotter_that_fails() -> None:
    with foreign() as failing, containerd_with(failing.socket) as containerd:
        done = check(containerd, "--address", failing.socket)
        assert done.returncode == 70
        assert list(steps(done).values()) == [True] * 4 + [False, True]
        assert "importing an image with the snapshotter afs failed: " in done.stderr
        assert "the disk is on fire" in done.stderr
        assert_clean(containerd)


def test_a_step_takes_too_long() -> None:
    with foreign(prepare_s=60) as hanging, containerd_with(hanging.socket) as containerd:
        done = check(containerd, "--address", hanging.socket, "--timeout", "2s")
        assert done.returncode == 74
        assert "did not answer within 2 s" in done.stderr
        assert_clean(containerd)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_check_removes_everything(signum: int) -> None:
    with foreign(prepare_s=60) as hanging, containerd_with(hanging.socket) as containerd:
        with under_way(containerd, hanging) as process:
            process.send_signal(signum)
            _, stderr = process.communicate(timeout=30)
        assert process.returncode == 76
        assert f"interrupted by {signal.Signals(signum).name}" in stderr
        assert_clean(containerd)


def test_a_killed_check_is_cleaned_up_by_the_next() -> None:
    with foreign(prepare_s=60) as hanging, containerd_with(hanging.socket) as containerd:
        with under_way(containerd, hanging) as process:
            other = check(containerd, "--name", "overlayfs")
            assert other.returncode == 67
            assert "of another check, which runs; give a free one with --namespace" in other.stderr
            kill_with_children(process)
        done = check(containerd, "--name", "overlayfs")
        assert (done.returncode, done.stderr) == (0, "")
        assert_clean(containerd)


@contextmanager
def under_way(containerd: Containerd, snapshotter: Foreign) -> Iterator[subprocess.Popen[str]]:
    """A check that waits for the snapshotter to prepare something."""
    argv = [PROGRAM, "check", *where(containerd), "--address", str(snapshotter.socket)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert snapshotter.asked.wait(30)
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def kill_with_children(process: subprocess.Popen[str]) -> None:
    """SIGKILL for a check and the ctr that it runs."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    for child in children:
        os.kill(int(child), signal.SIGKILL)


def test_namespaces_of_others_are_left_alone(plain: Containerd) -> None:
    plain.ctr("namespaces", "create", namespace(plain))
    done = check(plain, "--name", "overlayfs")
    assert done.returncode == 0
    assert namespace(plain) in plain.ctr("namespaces", "ls", "--quiet").split(), "it was there before"
    snapshots = ("snapshots", "--snapshotter", "overlayfs")
    plain.ctr(*snapshots, "prepare", "a snapshot", namespace=namespace(plain))
    done = check(plain, "--name", "overlayfs")
    assert done.returncode == 67
    assert f"containerd's namespace {namespace(plain)} has snapshots of others; give a free one" in done.stderr
    assert "a snapshot" in plain.ctr(*snapshots, "ls", namespace=namespace(plain))
    plain.ctr(*snapshots, "rm", "a snapshot", namespace=namespace(plain))
    plain.ctr("leases", "create", "--id", "pulling", namespace=namespace(plain))
    done = check(plain, "--name", "overlayfs")
    assert done.returncode == 67
    assert "has leases of others" in done.stderr
    plain.ctr("leases", "rm", "pulling", namespace=namespace(plain))


def test_without_ctr(plain: Containerd, tmp_path: Path) -> None:
    done = check(plain, "--name", "overlayfs", PATH=str(tmp_path))
    assert done.returncode == 67
    assert "cannot run ctr: No such file or directory; it comes with containerd, and has to be on PATH" in done.stderr


# The daemon


def test_the_daemon_needs_no_command(tmp_path: Path) -> None:
    capabilities.require("fuse", "overlay", "erofs")
    flags = [f"--root={tmp_path}/root", f"--run-dir={tmp_path}/run", f"--layerstore-root={tmp_path}"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.settimeout(20)
        notified.bind(f"{tmp_path}/notify")
        env = {**os.environ, "NOTIFY_SOCKET": f"{tmp_path}/notify"}
        with subprocess.Popen([PROGRAM, *flags], stderr=subprocess.PIPE, text=True, env=env) as process:
            try:
                assert notified.recv(100).startswith(b"READY=1")
                assert (tmp_path / "run" / "snapshotter.sock").is_socket()
            finally:
                process.terminate()
            _, stderr = process.communicate(timeout=20)
    assert process.returncode == 0, stderr
