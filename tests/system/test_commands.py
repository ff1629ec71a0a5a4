"""The commands as a user meets them: exit codes, one line on stderr, Ctrl-C, help, and nothing left."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
import tomllib
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from afs.afslet.cgroups import hierarchies
from afs.core.mounts import list_mounts
from tests.testbed import mounts, oci
from tests.testbed.cluster import BIN
from tests.testbed.images import BUSYBOX

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.testbed.cluster import RealCluster
    from tests.testbed.images import BusyboxImage

REPOSITORY = Path(__file__).parents[2]
COMMANDS = sorted(tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"])


def call(name: str, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command of the project to its end."""
    argv = [str(BIN / name), *map(str, arguments)]
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60, **options)


@contextmanager
def started(name: str, *arguments: str | Path, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A command under way; it gets SIGKILL if it still runs at the end of the block."""
    argv = [str(BIN / name), *map(str, arguments)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def interrupted(process: subprocess.Popen[str], signum: int = signal.SIGINT) -> tuple[int, str]:
    """Exit code and stderr after a signal."""
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=20)
    return process.returncode, stderr


def read_until(stream: Any, text: str) -> str:
    """Lines up to one that contains *text*."""
    found = ""
    line: str
    for line in stream:
        found += line
        if text in line:
            return found
    raise AssertionError(f"no {text!r} in {found!r}")


@pytest.mark.parametrize("name", COMMANDS)
def test_version_and_help(name: str) -> None:
    version = call(name, "--version")
    assert version.returncode == 0, version.stderr
    assert re.fullmatch(rf"{name}, version \d+\.\d+\S*\n", version.stdout)
    shown = call(name, "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith(f"Usage: {name}")


@pytest.mark.parametrize("name", ["afs_discovery_grpcd", "afs_layerstore_grpcd", "afslet", "afs_proxy"])
def test_service_refuses_the_open_network_in_the_clear(name: str, tmp_path: Path) -> None:
    directories = {
        "afs_layerstore_grpcd": [f"--root={tmp_path}/root", f"--run-dir={tmp_path}", "--chunk-port=0"],
        "afslet": [f"--root={tmp_path}/root", f"--run-dir={tmp_path}"],
    }
    done = call(name, "--listen=0.0.0.0:0", *directories.get(name, []))
    assert (done.returncode, done.stdout) == (64, "")
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"{name}: 0.0.0.0:0 is not a loopback address: ")
    assert "--insecure" in last
    wrong = call(name, "--listen=nowhere", *directories.get(name, []))
    assert wrong.returncode == 64
    assert "not an address: 'nowhere'" in wrong.stderr


@pytest.mark.parametrize("content", [None, "{}"])
def test_afslet_does_not_start_with_a_bad_seccomp_profile(tmp_path: Path, content: str | None) -> None:
    profile = tmp_path / "profile.json"
    if content is not None:
        profile.write_text(content)
    flags = [f"--root={tmp_path}/root", f"--run-dir={tmp_path}", "--listen=127.0.0.1:0", f"--seccomp={profile}"]
    done = call("afslet", *flags)
    why = "No such file or directory" if content is None else "it has no syscalls"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (64, f"afslet: seccomp profile {profile}: {why}")


# afs_runc


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    """A root directory with busybox."""
    root = tmp_path / "rootfs"
    for name in ("bin", "dev", "proc", "sys", "tmp"):
        (root / name).mkdir(parents=True)
    shutil.copy2(BUSYBOX, root / "bin/busybox")
    for name in ("sh", "cat", "echo", "sleep", "dd", "seq"):
        (root / "bin" / name).symlink_to("busybox")
    return root


def runc_cgroups() -> set[Path]:
    """The cgroups of runs of afs_runc."""
    return mounts.cgroups("afs-runc-*")


RUNS = {
    "success": (["cat", "/in"], 0, "from the root\n", ""),
    "status": (["sh", "-c", "echo err >&2; exit 9"], 9, "", "err\n"),
    "not found": (["nothing"], 127, "", "afs_runc: command 'nothing' not found in {root}\n"),
    "not executable": (
        *(["/in"], 126, ""),
        "afs_runc: command '/in' in {root} cannot be executed: it has no execute permission\n",
    ),
    "timeout": (["sleep", "1000"], 124, "", "afs_runc: command 'sleep' timed out after 0.2 s\n"),
    "memory": (
        ["dd", "if=/dev/zero", "of=/tmp/x", "bs=200M", "count=1"],
        *(137, "", "afs_runc: command 'dd' ran out of memory: the limit is 64 MiB\n"),
    ),
}


@pytest.mark.root
@pytest.mark.parametrize("name", RUNS)
def test_afs_runc(rootfs: Path, name: str) -> None:
    argv, status, stdout, stderr = RUNS[name]
    before = runc_cgroups()
    (rootfs / "in").write_text("from the root\n")
    timeout = "200ms" if name == "timeout" else "1m"
    done = call("afs_runc", f"--rootfs={rootfs}", f"--timeout={timeout}", "--memory-mb=64", "--", *argv)
    assert (done.returncode, done.stdout, done.stderr) == (status, stdout, stderr.format(root=rootfs))
    assert runc_cgroups() == before


@pytest.mark.root
def test_afs_runc_refuses_a_root_whose_dev_leads_elsewhere(rootfs: Path, tmp_path: Path) -> None:
    """runc would make its links there."""
    (tmp_path / "trap").mkdir()
    (rootfs / "dev").rmdir()
    (rootfs / "dev").symlink_to(tmp_path / "trap")
    done = call("afs_runc", f"--rootfs={rootfs}", "--", "echo", "x")
    assert (done.returncode, done.stderr) == (64, f"afs_runc: {rootfs}: /dev is not a directory\n")
    assert list((tmp_path / "trap").iterdir()) == []


@pytest.mark.root
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_afs_runc_interrupted(rootfs: Path, signum: int) -> None:
    before = runc_cgroups()
    with started("afs_runc", f"--rootfs={rootfs}", "--", "sh", "-c", "echo here; sleep 1000") as process:
        read_until(process.stdout, "here")
        status, stderr = interrupted(process, signum)
    assert (status, stderr) == (76, "afs_runc: command 'sh' was cancelled\n")
    assert runc_cgroups() == before


@pytest.mark.root
def test_afs_runc_killed_leaves_nothing(rootfs: Path) -> None:
    """The fixture that looks for leaks looks for its processes and directories."""
    before = runc_cgroups()
    with started("afs_runc", f"--rootfs={rootfs}", "--", "sh", "-c", "echo here; sleep 1000") as process:
        read_until(process.stdout, "here")
        homes = set(Path(tempfile.gettempdir()).glob("afs-runc-*"))
        process.kill()
        process.wait()
    deadline = time.monotonic() + 20
    while runc_cgroups() != before or any(home.exists() for home in homes):
        assert time.monotonic() < deadline
        time.sleep(0.02)  # its keeper has no event for us


@pytest.mark.root
def test_afs_runc_takes_an_image_s_settings(rootfs: Path, tmp_path: Path) -> None:
    (rootfs / "etc").mkdir()
    (rootfs / "etc/passwd").write_text("app:x:1000:1000::/home/app:/bin/sh\n")
    (rootfs / "etc/group").write_text("app:x:1000:\nextra:x:50:\n")
    config = tmp_path / "config.json"
    settings = {
        "Entrypoint": ["sh", "-c"],
        "Cmd": ["id; pwd; echo $A"],
        "User": "app",
        "WorkingDir": "/w",
        "Env": ["A=image"],
    }
    config.write_text(json.dumps({"config": settings}))
    (rootfs / "bin/id").symlink_to("busybox")
    done = call("afs_runc", f"--rootfs={rootfs}", f"--image-config={config}", "--group=extra")
    groups = "uid=1000(app) gid=1000(app) groups=50(extra)"
    assert (done.returncode, done.stdout) == (0, f"{groups}\n/w\nimage\n"), done.stderr
    done = call(
        *("afs_runc", f"--rootfs={rootfs}", f"--image-config={config}", "--env=A=flag", "--user=0:7", "--cwd=/tmp"),
        *("--hostname=here", "--", "sh", "-c", "id -u; id -g; pwd; echo $A $HOSTNAME"),
    )
    assert done.stdout == "0\n7\n/tmp\nflag here\n", done.stderr
    config.write_text("[]")
    done = call("afs_runc", f"--rootfs={rootfs}", f"--image-config={config}")
    assert (done.returncode, done.stderr) == (64, f"afs_runc: --image-config {config}: its config makes no sense\n")


@pytest.mark.root
def test_afs_runc_passes_input_on(rootfs: Path) -> None:
    done = call("afs_runc", f"--rootfs={rootfs}", "-i", "--", "cat", input="through\n")
    assert (done.returncode, done.stdout) == (0, "through\n"), done.stderr
    assert call("afs_runc", f"--rootfs={rootfs}", "--", "cat", input="not read\n").stdout == ""


@pytest.mark.root
def test_afs_runc_gives_a_terminal(rootfs: Path) -> None:
    (rootfs / "bin/stty").symlink_to("busybox")
    done = call("afs_runc", f"--rootfs={rootfs}", "-t", "--", "sh", "-c", "stty size; test -t 1 && echo terminal")
    assert (done.returncode, done.stdout) == (0, "24 80\nterminal\n"), done.stderr


@pytest.mark.root
def test_afs_runc_tells_signals_and_limits_processes(rootfs: Path) -> None:
    killed = call("afs_runc", f"--rootfs={rootfs}", "--", "sh", "-c", "ulimit -t 1; while :; do :; done")
    assert (killed.returncode, killed.stderr) == (128 + signal.SIGKILL, "")
    script = "for i in $(seq 20); do sleep 1000 & done; true"
    limited = call("afs_runc", f"--rootfs={rootfs}", "--pids=16", "--", "sh", "-c", script)
    assert "can't fork" in limited.stderr


@pytest.mark.root
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--runtime=none-such"], "the OCI runtime none-such is not installed"),
        (["--cpu=0"], "--cpu, --memory-mb, --swap-mb and --pids must be positive"),
        (["--seccomp=/none"], "seccomp profile /none: No such file or directory"),
        (["--user=who"], "{root}: user 'who' is not in its /etc/passwd"),
        (["--timeout=soon"], "not a duration: 'soon'"),
    ],
)
def test_afs_runc_refuses(rootfs: Path, flags: list[str], message: str) -> None:
    done = call("afs_runc", f"--rootfs={rootfs}", *flags, "--", "echo")
    assert 64 <= done.returncode <= 77
    assert message.format(root=rootfs) in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.root
@pytest.mark.skipif("" not in hierarchies(), reason="crun works with cgroup v2 alone")
def test_afs_runc_with_crun(rootfs: Path) -> None:
    before = runc_cgroups()
    done = call("afs_runc", f"--rootfs={rootfs}", "--runtime=crun", "--", "sh", "-c", "echo out; exit 7")
    assert (done.returncode, done.stdout) == (7, "out\n"), done.stderr
    assert runc_cgroups() == before


@pytest.mark.root
def test_afs_runc_without_a_root(tmp_path: Path) -> None:
    done = call("afs_runc", f"--rootfs={tmp_path}/nowhere", "--", "true")
    assert (done.returncode, done.stderr) == (64, f"afs_runc: --rootfs {tmp_path}/nowhere is not a directory\n")


# afs_mount


@pytest.fixture
def run_dir(shared_cluster: RealCluster) -> str:
    """afs_mount's flag for node1."""
    return f"--run-dir={shared_cluster.nodes[0].run_dir}"


@pytest.mark.root
def test_afs_mount(run_dir: str, busybox_image: BusyboxImage, tmp_path: Path) -> None:
    target = tmp_path / "at"
    target.mkdir()
    with started("afs_mount", run_dir, busybox_image.reference, target) as process:
        read_until(process.stderr, f"{busybox_image.reference} is mounted at {target}")
        for path, content in busybox_image.present.items():
            assert (target / path[1:]).read_bytes() == content
        assert not any((target / path[1:]).exists() for path in busybox_image.absent)
        (target / "data/hello.txt").write_text("changed\n")
        (target / "new").write_text("new\n")
        assert (target / "data/hello.txt").read_text() == "changed\n"
        assert interrupted(process) == (0, "")
    assert list(target.iterdir()) == []
    assert not list_mounts(str(target))


@pytest.mark.root
def test_afs_mount_with_extra_directories_and_read_only(
    run_dir: str, busybox_image: BusyboxImage, tmp_path: Path
) -> None:
    target, top, below = (tmp_path / name for name in ("at", "top", "below"))
    for path in (target, top / "etc", below / "etc"):
        path.mkdir(parents=True)
    (top / "etc/passwd").write_text("top\n")
    (below / "etc/passwd").write_text("below\n")
    (below / "etc/extra").write_text("extra\n")
    flags = [run_dir, "--read-only", f"--extra-dir={top}", f"--extra-dir={below}"]
    with started("afs_mount", *flags, busybox_image.reference, target) as process:
        read_until(process.stderr, "is mounted at")
        assert (target / "etc/passwd").read_text() == "top\n"
        assert (target / "etc/extra").read_text() == "extra\n"
        assert (target / "etc/group").exists()
        with pytest.raises(OSError, match="Read-only file system"):
            (target / "new").write_text("")
        assert interrupted(process, signal.SIGTERM) == (0, "")
    assert not list_mounts(str(target))
    assert (top / "etc/passwd").read_text() == "top\n"


@pytest.mark.root
def test_afs_mount_that_fails(run_dir: str, busybox_image: BusyboxImage, tmp_path: Path) -> None:
    missing = call("afs_mount", run_dir, f"oci:{busybox_image.layout}:nope", tmp_path)
    assert missing.returncode == 66
    assert re.fullmatch(r"afs_mount: image oci:\S+:nope not found: no such tag; .*\n", missing.stderr)
    extra = call("afs_mount", run_dir, f"--extra-dir={tmp_path}/no", busybox_image.reference, tmp_path)
    assert (extra.returncode, extra.stderr) == (64, f"afs_mount: not a directory: {tmp_path}/no\n")
    alone = call("afs_mount", f"--run-dir={tmp_path}", busybox_image.reference, tmp_path)
    assert alone.returncode == 69
    where = f"no afs_snapshotter at {tmp_path}/mounts.sock; is it running? (--run-dir / AFS_RUN_DIR)"
    assert alone.stderr == f"afs_mount: {where}\n"
    assert not list_mounts(str(tmp_path))


# afs_layer


@pytest.mark.root
def test_afs_layer_makes_what_the_kernel_mounts(busybox_image: BusyboxImage, tmp_path: Path) -> None:
    layer = busybox_image.layers[0]
    out, target, tar = tmp_path / "l.afslyr", tmp_path / "at", tmp_path / "l.tar"
    made = call("afs_layer", "convert", oci.blob_path(busybox_image.layout, layer.digest), out)
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith(layer.diff_id)
    target.mkdir()
    subprocess.run(["mount", "-t", "erofs", "-o", "ro", out, target], check=True)
    try:
        assert (target / "bin/busybox").read_bytes() == BUSYBOX.read_bytes()
        assert (target / "bin/sh").readlink() == Path("busybox")
    finally:
        subprocess.run(["umount", target], check=True)
    assert call("afs_layer", "verify", out).returncode == 0
    assert json.loads(call("afs_layer", "inspect", "--json", out).stdout)["diff_id"] == layer.diff_id
    assert call("afs_layer", "export", out, tar).returncode == 0
    assert f"sha256:{hashlib.sha256(tar.read_bytes()).hexdigest()}" == layer.diff_id
    again = call("afs_layer", "convert", tar, out)
    assert (again.returncode, again.stderr) == (73, f"afs_layer: {out} exists; --force replaces it\n")


# afs up


@pytest.fixture
def state_dir() -> Iterator[Path]:
    """A directory with a name short enough for unix sockets."""
    directory = Path(tempfile.mkdtemp(prefix="afs-", dir="/tmp"))
    yield directory
    assert not list_mounts(str(directory))
    shutil.rmtree(directory)


@pytest.mark.root
def test_afs_up_runs_a_command_and_stops(state_dir: Path, busybox_image: BusyboxImage) -> None:
    run = f"{BIN}/afs_cli execute --image {busybox_image.reference} -- sh -c 'echo inside; exit 5'"
    up = ["up", "--any-port", "--nodes=1", f"--state-dir={state_dir}"]
    done = call("afs", *up, "--", "sh", "-c", run)
    assert (done.returncode, done.stdout) == (5, "inside\n"), done.stderr
    assert re.match(r"afs: 1 nodes are up, proxy on 127\.0\.0\.1:\d+, logs in ", done.stderr)


@pytest.mark.root
def test_afs_up_until_ctrl_c(state_dir: Path, busybox_image: BusyboxImage) -> None:
    with started("afs", "up", "--any-port", "--nodes=1", f"--state-dir={state_dir}") as up:
        address = re.search(r"proxy on (\S+),", read_until(up.stderr, "nodes are up"))
        assert address is not None
        environment = {**os.environ, "AFS_PROXY": address[1]}
        command = ["execute", "--image", busybox_image.reference, "--", "sh", "-c", "echo here; sleep 1000"]
        with started("afs_cli", *command, env=environment) as cli:
            read_until(cli.stdout, "here")
            status, stderr = interrupted(up)
            assert status == 0, stderr
            cli.communicate(timeout=20)
            assert cli.returncode in (69, 76)
    assert not list_mounts(str(state_dir))


def test_afs_up_with_a_wrong_flag(state_dir: Path) -> None:
    done = call("afs", "up", "--nodes=0", f"--state-dir={state_dir}")
    assert (done.returncode, done.stderr) == (64, "afs: --nodes must be at least 1\n")


# afs_cli


@pytest.mark.root
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_afs_cli_interrupted(shared_cluster: RealCluster, busybox_image: BusyboxImage, signum: int) -> None:
    image = busybox_image.reference
    command = ["sh", "-c", "echo here; sleep 1000"]
    with shared_cluster.popen_cli("execute", "--image", image, "--", *command) as process:
        read_until(process.stdout, "here")
        assert interrupted(process, signum) == (76, f"afs_cli: the run of {image} was cancelled\n")
    shared_cluster.assert_idle()


@pytest.mark.root
def test_afs_cli_json(shared_cluster: RealCluster, busybox_image: BusyboxImage) -> None:
    image = busybox_image.reference
    done = shared_cluster.cli("execute", "--json", "--image", image, "--", "sh", "-c", "echo out; exit 4")
    shown = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (4, "")
    assert (shown["exit_code"], shown["outcome"], shown["stdout"], shown["error"]) == (4, "exited", "out\n", "")
    late = shared_cluster.cli("execute", "--json", "--image", image, "--timeout=200ms", "--", "sleep", "1000")
    shown = json.loads(late.stdout)
    assert (late.returncode, shown["exit_code"], shown["outcome"]) == (124, 124, "timed out")
    assert shown["error"] == "command 'sleep' timed out after 0.2 s"
    missing = shared_cluster.cli("execute", "--json", "--image", f"oci:{busybox_image.layout}:nope", "--", "true")
    shown = json.loads(missing.stdout)
    assert (missing.returncode, missing.stderr) == (66, "")
    assert (shown["outcome"], shown["code"], shown["retryable"]) == ("rejected", "NOT_FOUND", False)
    assert re.match(r"image oci:\S+:nope not found: ", shown["error"])


@pytest.mark.root
def test_afs_cli_refuses_what_is_wrong_on_this_side(
    shared_cluster: RealCluster, busybox_image: BusyboxImage, tmp_path: Path
) -> None:
    execute = ["execute", "--image", busybox_image.reference]
    os.mkfifo(tmp_path / "fifo")
    wrong = {
        (f"--dir={tmp_path}/no",): f"cannot upload {tmp_path}/no: neither a directory nor a file",
        (f"--dir={tmp_path}",): f"cannot upload {tmp_path}/fifo: neither file, directory nor symlink",
        ("--timeout=soon",): "not a duration: 'soon'; write it like 30s, 1m30s or 250ms",
        ("--env=NO_SUCH_VARIABLE_HERE",): "--env 'NO_SUCH_VARIABLE_HERE' is not NAME=value",
    }
    for flags, message in wrong.items():
        done = shared_cluster.cli(*execute, *flags, "--", "true")
        assert (done.returncode, done.stdout, done.stderr) == (64, "", f"afs_cli: {message}\n")
    out = shared_cluster.cli(*execute, f"--out={tmp_path}/no/out.tar.gz", "--", "true")
    assert (out.returncode, out.stdout) == (64, "")
    assert f"{tmp_path}/no/" in out.stderr


def test_afs_cli_without_a_proxy() -> None:
    done = call("afs_cli", "status", env={**os.environ, "AFS_PROXY": "127.0.0.1:1"})
    assert done.returncode == 69
    assert re.fullmatch(r"afs_cli: AFS at 127\.0\.0\.1:1 does not answer: .*\n", done.stderr)
