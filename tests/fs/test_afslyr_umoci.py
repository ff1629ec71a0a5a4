"""Fidelity: a converted layer, mounted, equals what umoci unpacks from the same tar."""

import hashlib
import io
import json
import os
import stat
import subprocess
from pathlib import Path

import pytest

from afs.layerstore.afslyr.convert import convert
from tests.testbed import capabilities, tars

pytestmark = pytest.mark.root


@pytest.fixture(autouse=True)
def _umoci() -> None:
    capabilities.require("umoci")  # under CI=true a missing one is a failure


def busybox_like() -> bytes:
    """A small root file system of kinds that umoci takes."""
    tar = tars.directory("./", mtime=1_700_000_000)
    for name, mode in (("bin", 0o755), ("etc", 0o755), ("tmp", 0o1777), ("root", 0o700), ("usr/share/doc", 0o755)):
        tar += tars.directory(name + "/", mode, mtime=1_600_000_000)
    tar += tars.file("bin/busybox", bytes(range(256)) * 5000, mode=0o755, mtime=1_500_000_000)
    for applet in ("sh", "ls", "cat", "mount"):
        tar += tars.hard_link(f"bin/{applet}", "bin/busybox")
    tar += tars.symlink("etc/mtab", "../proc/mounts", mtime=9) + tars.symlink("usr/bin", "/bin", mtime=9)
    tar += tars.file("usr/bin/through", b"symlink", mtime=8)
    tar += tars.pax([("mtime", "1234567890.987654321"), ("SCHILY.xattr.user.a", "b")]) + tars.file("etc/ns", b"ns")
    tar += tars.pax([("SCHILY.xattr.security.capability", tars.CAPABILITY)]) + tars.file(
        "bin/ping", b"p", mode=0o755, mtime=7
    )
    tar += tars.file("bin/su", b"su", mode=0o4755, uid=0, gid=10, mtime=6)
    tar += tars.header("null", b"3", mode=0o666, major=1, minor=3, mtime=5)
    tar += tars.header("pipe", b"6", mode=0o600, uid=5, gid=6, mtime=5)
    tar += tars.pax([("path", "n" * 200 + "/" + "m" * 255)]) + tars.file("x", b"long", mtime=4)
    return tar + tars.file("tmp/twice", b"1", mtime=3) + tars.file("tmp/twice", b"22", uid=9, mtime=3) + tars.END


def write_layout(at: Path, tar: bytes) -> None:
    """An OCI image layout at *at* with one layer, tagged ``t``."""

    def blob(data: bytes, kind: str) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        (at / "blobs/sha256" / digest).write_bytes(data)
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": f"sha256:{digest}", "size": len(data)}

    (at / "blobs/sha256").mkdir(parents=True)
    (at / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    rootfs = {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(tar).hexdigest()]}
    config = blob(
        json.dumps({"architecture": "amd64", "os": "linux", "config": {}, "rootfs": rootfs}).encode(), "config.v1+json"
    )
    manifest = {"schemaVersion": 2, "config": config, "layers": [blob(tars.gzipped(tar), "layer.v1.tar+gzip")]}
    entry = blob(json.dumps(manifest).encode(), "manifest.v1+json")
    entry["annotations"] = {"org.opencontainers.image.ref.name": "t"}
    (at / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))


def state(root: Path) -> dict[str, object]:
    """Everything that can be told about each path below *root*; implied directories' times are the unpacker's own."""
    inodes: dict[tuple[int, int], str] = {}
    found: dict[str, object] = {}
    for here, directories, files in os.walk(root):
        for name in sorted(directories + files):
            path = Path(here, name)
            seen = path.lstat()
            kind = stat.S_IFMT(seen.st_mode)
            relative = str(path.relative_to(root))
            found[relative] = (
                oct(seen.st_mode),
                (seen.st_uid, seen.st_gid, seen.st_rdev),
                None if kind == stat.S_IFDIR else (seen.st_size, seen.st_mtime_ns, seen.st_nlink),
                inodes.setdefault((seen.st_dev, seen.st_ino), relative),
                path.readlink() if kind == stat.S_IFLNK else None,
                path.read_bytes() if kind == stat.S_IFREG else None,
                {
                    key: os.getxattr(path, key, follow_symlinks=False)
                    for key in os.listxattr(path, follow_symlinks=False)
                },
            )
    return found


def test_a_mounted_layer_equals_umocis_unpack(tmp_path: Path) -> None:
    tar = busybox_like()
    write_layout(tmp_path / "image", tar)
    subprocess.run(
        ["umoci", "unpack", "--image", f"{tmp_path}/image:t", tmp_path / "bundle"], check=True, capture_output=True
    )
    convert(io.BytesIO(tar).read, tmp_path / "layer")
    (tmp_path / "mnt").mkdir()
    subprocess.run(["mount", "-t", "erofs", "-o", "ro", tmp_path / "layer", tmp_path / "mnt"], check=True)
    try:
        mounted = state(tmp_path / "mnt")
    finally:
        subprocess.run(["umount", tmp_path / "mnt"], check=True)
    assert mounted == state(tmp_path / "bundle/rootfs")
