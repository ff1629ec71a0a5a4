"""The systemd units and tmpfiles: lines that something depends on, each with the reason, and what systemd says of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.testbed import capabilities
from tests.testbed.cluster import BIN

PACKAGING = Path(__file__).resolve().parents[2] / "packaging"
UNITS = sorted((PACKAGING / "systemd").glob("*.service"))
SNAPSHOTTER, LAYERSTORE, DISCOVERY = "afs-snapshotter", "afs-layerstore", "afs-discovery"
# systemd.exec(5): each of them gives a service a mount namespace of its own, from which no mount gets out.
SANDBOXES = (
    "BindPaths",
    "BindReadOnlyPaths",
    "DynamicUser",
    "ExecPaths",
    "ExtensionImages",
    "InaccessiblePaths",
    "LogNamespace",
    "MountFlags",
    "MountImages",
    "NoExecPaths",
    "PrivateDevices",
    "PrivateIPC",
    "PrivateTmp",
    "ProtectControlGroups",
    "ProtectHome",
    "ProtectHostname",
    "ProtectKernelLogs",
    "ProtectKernelModules",
    "ProtectKernelTunables",
    "ProtectProc",
    "ProtectSystem",
    "ProcSubset",
    "ReadOnlyPaths",
    "ReadWritePaths",
    "RootDirectory",
    "RootImage",
    "TemporaryFileSystem",
)


def unit(name: str) -> dict[str, list[str]]:
    """The settings of a unit, with all values of each."""
    found: dict[str, list[str]] = {}
    for line in (PACKAGING / "systemd" / f"{name}.service").read_text().splitlines():
        if line and line[0] not in "#[":
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


@pytest.mark.parametrize(
    ("name", "key", "value", "reason"),
    [
        (SNAPSHOTTER, "Type", "notify", "units behind it start when its sockets answer, not before"),
        (SNAPSHOTTER, "Before", "containerd.service", "containerd goes first at shutdown, while roots can be read"),
        (SNAPSHOTTER, "After", "afs-layerstore.service", "what was mounted is restored with the layerstore's help"),
        (SNAPSHOTTER, "Wants", "afs-layerstore.service", "and mounts do not go with it, as with Requires"),
        (SNAPSHOTTER, "KillMode", "process", "afs_fused serves containers that run on"),
        (SNAPSHOTTER, "OOMPolicy", "continue", "one afs_fused that is killed must not stop the others"),
        (SNAPSHOTTER, "OOMScoreAdjust", "-999", "a container goes before what all containers read from"),
        (SNAPSHOTTER, "PrivateMounts", "no", "containerd and runc have to see the mounts"),
        (SNAPSHOTTER, "Restart", "always", "no container of the node starts without it"),
        (SNAPSHOTTER, "StartLimitIntervalSec", "0", "nor after it failed five times"),
        (SNAPSHOTTER, "RuntimeDirectoryPreserve", "yes", "mounts are in /run/afs, and stay there when it stops"),
        (SNAPSHOTTER, "StateDirectory", "afs/snapshotter", "its default root"),
        (SNAPSHOTTER, "StateDirectoryMode", "0700", "containers write setuid programs there"),
        (SNAPSHOTTER, "LimitNOFILE", "1048576", "512 Ki files, systemd's limit, are too few for a large node"),
        (SNAPSHOTTER, "TasksMax", "infinity", "every read that waits has a thread"),
        (LAYERSTORE, "Type", "notify", "the snapshotter starts when it answers"),
        (LAYERSTORE, "RuntimeDirectoryPreserve", "yes", "the mounts in /run/afs are the snapshotter's"),
        (LAYERSTORE, "StateDirectory", "afs/layerstore", "its default root"),
        (LAYERSTORE, "OOMPolicy", "continue", "a converter that is killed is one failed pull"),
        (LAYERSTORE, "Restart", "always", "reads of partial layers wait for it, for some time"),
        (LAYERSTORE, "After", "network.target afs-discovery.service", "order alone: discovery may be elsewhere"),
        (DISCOVERY, "Type", "notify", "layerstores behind it find it"),
        (DISCOVERY, "DynamicUser", "yes", "it needs no rights"),
        *((name, "Environment", "AFS_CONFIG=/etc/afs/config.toml", "one file for all services")
          for name in (SNAPSHOTTER, LAYERSTORE, DISCOVERY)),
    ],
)  # fmt: skip
def test_lines_that_matter(name: str, key: str, value: str, reason: str) -> None:
    assert unit(name)[key] == [value], reason


def test_the_mounts_are_the_machines_own() -> None:
    assert not set(SANDBOXES) & set(unit(SNAPSHOTTER)), "mounts of a private namespace are seen by nobody"
    assert not set(SANDBOXES) & set(unit(LAYERSTORE)), "it repairs layers in the mounts that others use"


def test_they_share_one_directory_of_sockets() -> None:
    for name in (SNAPSHOTTER, LAYERSTORE):
        assert unit(name)["RuntimeDirectory"] == ["afs"]
        assert unit(name)["RuntimeDirectoryMode"] == ["0700"], "systemd sets it at every start: it has to be the same"
    assert "d /run/afs 0700 root root -" in (PACKAGING / "tmpfiles" / "afs.conf").read_text().splitlines()


def test_they_start_what_is_installed() -> None:
    programs = tomllib.loads((PACKAGING.parent / "pyproject.toml").read_text())["project"]["scripts"]
    started = {path.stem: unit(path.stem)["ExecStart"] for path in UNITS}
    assert started == {
        DISCOVERY: ["afs_discovery_grpcd"],
        LAYERSTORE: ["afs_layerstore_grpcd"],
        SNAPSHOTTER: ["afs_snapshotter"],
    }, "without a path: systemd looks in /usr/local/bin and /usr/bin"
    assert {name for names in started.values() for name in names} <= set(programs)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A directory with the units and tmpfiles where a package would put them; programs are those of this environment."""
    units, tmpfiles = tmp_path / "units", tmp_path / "usr/lib/tmpfiles.d"
    units.mkdir()
    tmpfiles.mkdir(parents=True)
    for path in UNITS:
        (units / path.name).write_text(path.read_text().replace("ExecStart=", f"ExecStart={BIN}/"))
    shutil.copy(PACKAGING / "tmpfiles" / "afs.conf", tmpfiles)
    return tmp_path


def test_systemd_accepts_the_units(root: Path) -> None:
    capabilities.require("systemd")
    names = [str(root / "units" / path.name) for path in UNITS]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--recursive-errors=no", *names],
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{root / 'units'}:"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_systemd_makes_the_directories(root: Path) -> None:
    capabilities.require("root", "systemd")
    argv = ["systemd-tmpfiles", "--create", f"--root={root}", "afs.conf"]  # this file alone: others clean /tmp
    for _ in range(2):
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        modes = {
            name: (root / name).stat().st_mode & 0o777
            for name in ("run/afs", "var/lib/afs", "var/lib/afs/snapshotter", "var/lib/afs/layerstore", "etc/afs")
        }
        assert list(modes.values()) == [0o700, 0o755, 0o700, 0o700, 0o755]
    config = root / "etc/afs/config.toml"
    assert tomllib.loads(config.read_text()) == {}, "a file that every service can read, and that says nothing yet"
    config.write_text("[snapshotter]\n")
    subprocess.run(argv, check=True)
    assert config.read_text() == "[snapshotter]\n"
