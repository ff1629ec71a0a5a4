"""Every command in docs/containerd.md runs as printed, in order, on a machine of its own with Debian's containerd.

The machine is this one with other mounts: /etc, /run, /usr/local and the data directories are as a new one has them. Only
systemd is missing there (tests/testbed/servicemanager.py starts what its unit files say), and the image comes from a
registry of this machine.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.testbed import capabilities

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.testbed.images import BusyboxImage
    from tests.testbed.registry import Registry

pytestmark = [pytest.mark.root, pytest.mark.containerd, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "containerd.md").read_text()
DEBIAN = """version = 2

[plugins]
  [plugins."io.containerd.grpc.v1.cri"]
    [plugins."io.containerd.grpc.v1.cri".cni]
      bin_dir = "/usr/lib/cni"
      conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.internal.v1.opt"]
    path = "/var/lib/containerd/opt"
"""
CONTAINERD = """[Service]
ExecStart=/usr/bin/containerd
Type=notify
"""


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture
def no_cgroups() -> Iterator[None]:
    """Containers' cgroups are in one that is called as containerd's namespace; it stays when they end."""
    parents = [Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").glob("*/")]
    there = {parent for parent in parents if (parent / "default").exists()}
    yield
    for parent in set(parents) - there:
        with suppress(OSError):  # not in this hierarchy
            (parent / "default").rmdir()


def machine(directory: Path) -> str:
    """A shell script that makes it: run it in namespaces for mounts and processes."""
    lines = ["mount --make-rprivate /", "mount -t tmpfs -o mode=755 tmpfs /run", "mkdir /run/lock"]
    (directory / "lib").mkdir()
    lines.append(f"mount --bind {directory / 'lib'} /var/lib")
    for changed in ("/etc", "/usr/local"):
        parts = {part: directory / f"{part}{changed.replace('/', '-')}" for part in ("upper", "work")}
        for path in parts.values():
            path.mkdir()
        options = f"lowerdir={changed},upperdir={parts['upper']},workdir={parts['work']}"
        lines.append(f"mount -t overlay overlay -o {options} {changed}")
    return "\n".join(lines) + "\n"


def test_the_page(tmp_path: Path, session_registry: Registry, busybox_image: BusyboxImage, no_cgroups: None) -> None:
    capabilities.require("fuse", "erofs", "ctr-remote", "systemd", "docker-registry")
    image = session_registry.push(busybox_image.layout, "latest", "library/alpine", as_tag="3.20")
    files = {
        "/etc/containerd/config.toml": DEBIAN,
        "/etc/systemd/system/containerd.service": CONTAINERD,
        # Other tests run on this machine, with the default ports perhaps.
        "/etc/afs/config.toml": (
            f'[discovery]\nlisten = "127.0.0.1:{(port := free_port())}"\n'
            f'[layerstore]\ndiscovery = "127.0.0.1:{port}"\nlisten = "127.0.0.1:0"\nchunk_port = 0\ncapacity = "1GiB"\n'
        ),
    }
    setup = machine(tmp_path)
    for name, text in files.items():
        (tmp_path / "files" / name[1:]).parent.mkdir(parents=True)
        (tmp_path / "files" / name[1:]).write_text(text)
        setup += f"mkdir -p {Path(name).parent}; cp {tmp_path}/files{name} {name}\n"
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("systemctl", "journalctl"):
        (programs / name).write_text(f"#!{sys.executable}\n{(ROOT / 'tests/testbed/servicemanager.py').read_text()}")
        (programs / name).chmod(0o755)
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == PAGE.count("```") / 2, "a block in another language would not be run"
    script = "".join(blocks).replace("docker.io/library/alpine:3.20", image)
    script = f"{setup}\nsystemctl start containerd\n{script}\nsystemctl stop containerd\n"
    checkout = tmp_path / "afs"
    checkout.mkdir()
    for name in (".venv", "packaging"):
        (checkout / name).symlink_to(ROOT / name)
    # What is printed first is looked for on PATH by the services, too.
    path = f"{programs}:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    done = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-eux", "-c", script],
        cwd=checkout,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    sys.stdout.write(done.stdout)
    assert "/etc/containerd/config.toml is changed, what it was is in /etc/containerd/config.toml.afs-1" in done.stdout
    assert done.stdout.count("\nok ") == 7
    assert "\nhello\n" in done.stdout, "the container ran"
    assert done.stdout.count("from the cluster") == len(re.findall(r"sha256:\w+: from the cluster", done.stdout)) > 0
    assert done.stdout.rstrip().endswith("\nKEY PARENT KIND"), "no snapshot is left"
    assert (tmp_path / "lib" / "containerd").exists()
    assert not (tmp_path / "lib" / "afs").exists()
