"""The images that tests use, in OCI layouts, each built once into a cache directory, with facts to check mounts against."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.testbed import build, oci
from tests.testbed.debian import DebianImage, debian
from tests.testbed.img4 import Img4, img4

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tests.testbed.tars import Expected

__all__ = ["BusyboxImage", "DebianImage", "EveryKindImage", "Img4", "busybox", "debian", "every_kind", "img4"]

BUSYBOX = Path("/bin/busybox")
_DIRECTORIES = ("bin", "etc", "home", "opt/old", "root", "var/tmp")
_PASSWD = "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000:App:/home/app:/bin/sh\n"
_GROUP = "root:x:0:\napp:x:1000:\nextra:x:2000:app\n"


@dataclass(frozen=True)
class BusyboxImage:
    """A small image that runs; its tags differ in configuration and encoding, see `busybox`."""

    layout: Path
    tag: str
    layers: tuple[oci.Layer, ...]
    """Of tag `latest`, bottom up: gzip, zstd, plain."""
    present: Mapping[str, bytes] = field(
        default_factory=lambda: {
            "/etc/passwd": _PASSWD.encode(),
            "/data/hello.txt": b"hello from layer 2\n",
            "/data/replaced.txt": b"new\n",
            "/opt/old/new.txt": b"after the opaque directory\n",
            "/home/app/.profile": b"export APP=1\n",
        }
    )
    """Files of the merged tree and what is in them."""
    absent: tuple[str, ...] = ("/data/removed.txt", "/opt/old/lower.txt", "/opt/old/deep")
    """What lower layers have and upper ones remove: by whiteout, and by an opaque directory."""
    tags: tuple[str, ...] = ("latest", "gzip", "entry", "multi", "arm64only", "docker", "docker-multi")
    user: tuple[int, int, tuple[int, ...]] = (1000, 1000, (2000,))
    """uid, gid and supplementary groups of the user `app`."""
    arm64_marker: str = "/arm64"
    """A file that only the arm64 images have."""

    @property
    def reference(self) -> str:
        """The image as AFS commands name it."""
        return f"oci:{self.layout}:{self.tag}"


@dataclass(frozen=True)
class EveryKindImage:
    """One layer with every kind of tar entry (tests.testbed.tars)."""

    layout: Path
    tag: str
    layers: tuple[oci.Layer, ...]
    expected: Mapping[bytes, Expected] = field(repr=False)
    """What each path must look like once mounted."""

    @property
    def reference(self) -> str:
        """The image as AFS commands name it."""
        return f"oci:{self.layout}:{self.tag}"


class _Tar:
    """A tar in memory; times are fixed."""

    def __init__(self) -> None:
        self._bytes = io.BytesIO()
        self._tar = tarfile.open(fileobj=self._bytes, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115

    def add(self, name: str, data: bytes | str = b"", mode: int = 0o644, owner: int = 0) -> None:
        data = data.encode() if isinstance(data, str) else data
        info = self._info(name, tarfile.REGTYPE, mode, owner)
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))

    def directory(self, name: str, mode: int = 0o755, owner: int = 0) -> None:
        self._tar.addfile(self._info(name, tarfile.DIRTYPE, mode, owner))

    def symlink(self, name: str, target: str) -> None:
        info = self._info(name, tarfile.SYMTYPE, 0o777, 0)
        info.linkname = target
        self._tar.addfile(info)

    def finish(self) -> bytes:
        self._tar.close()
        return self._bytes.getvalue()

    def _info(self, name: str, kind: bytes, mode: int, owner: int) -> tarfile.TarInfo:
        info = tarfile.TarInfo(name)
        info.type, info.mode, info.uid, info.gid, info.mtime = kind, mode, owner, owner, build.EPOCH
        return info


def busybox(cache_dir: Path) -> BusyboxImage:
    """Debian's static busybox in three layers, under a second.

    Tags: `latest` (Cmd only), `gzip` (the same, all layers in gzip, which is what umoci can unpack), `entry` (Entrypoint, Cmd, User, WorkingDir, Env), `multi` (index: amd64, arm64),
    `arm64only` (index: arm64), `docker` (Docker media types, the same tars in gzip), `docker-multi` (manifest list).
    """
    program = hashlib.sha256(BUSYBOX.read_bytes()).hexdigest()[:8]
    key = f"{build.source_key(sys.modules[__name__], oci)}-{program}"
    layout = build.cached(cache_dir, "busybox", key, _build_busybox)
    return BusyboxImage(layout, "latest", oci.read_image(layout, "latest").layers)


def every_kind(cache_dir: Path) -> EveryKindImage:
    """One gzip layer made by tests.testbed.tars.every_kind, with what it says must come of it."""
    from tests.testbed import tars

    tar, expected = tars.every_kind()
    key = f"{build.source_key(oci)}-{hashlib.sha256(tar).hexdigest()[:8]}"

    def write(layout: Path) -> None:
        builder = oci.LayoutBuilder(layout)
        builder.add_image("latest", [builder.add_layer(tar)])

    layout = build.cached(cache_dir, "every-kind", key, write)
    return EveryKindImage(layout, "latest", oci.read_image(layout, "latest").layers, expected)


def _build_busybox(layout: Path) -> None:
    builder = oci.LayoutBuilder(layout)
    tars = (_base_tar(), _data_tar(), _opaque_tar())
    layers = [builder.add_layer(tars[0]), builder.add_layer(tars[1], "zstd"), builder.add_layer(tars[2], "plain")]
    plain = {"Env": ["PATH=/bin", "IMAGE=busybox"], "WorkingDir": "/", "Cmd": ["/bin/sh", "-c", "echo default"]}
    entry: dict[str, Any] = {
        "Entrypoint": ["/bin/sh", "-c", 'echo "$0 $*"'],
        "Cmd": ["from", "cmd"],
        "User": "app:app",
        "WorkingDir": "/home/app",
        "Env": ["PATH=/bin", "FOO=image"],
    }
    amd64 = builder.add_image("latest", layers, plain)
    builder.add_image("entry", layers, entry)
    other = _Tar()
    other.add("arm64", "another architecture\n")
    arm_layers = [*layers, builder.add_layer(other.finish())]
    arm64 = builder.add_image(None, arm_layers, plain, oci.ARM64)
    builder.add_index("multi", {oci.AMD64: amd64, oci.ARM64: arm64})
    builder.add_index("arm64only", {oci.ARM64: arm64})
    gzip_layers = [builder.add_layer(tar) for tar in tars]
    builder.add_image("gzip", gzip_layers, plain)
    docker = builder.add_image("docker", gzip_layers, plain, docker=True)
    builder.add_index("docker-multi", {oci.AMD64: docker}, docker=True)


def _base_tar() -> bytes:
    tar = _Tar()
    for name in _DIRECTORIES:
        tar.directory(name)
    tar.directory("tmp", 0o1777)
    tar.directory("home/app", 0o750, owner=1000)
    tar.add("home/app/.profile", "export APP=1\n", owner=1000)
    tar.add("bin/busybox", BUSYBOX.read_bytes(), 0o755)
    applets = subprocess.run([BUSYBOX, "--list"], check=True, capture_output=True, text=True).stdout.split()
    for applet in sorted(set(applets) - {"busybox"}):
        tar.symlink(f"bin/{applet}", "busybox")
    tar.add("etc/passwd", _PASSWD)
    tar.add("etc/group", _GROUP)
    tar.directory("data")
    tar.add("data/removed.txt", "layer 2 removes this\n")
    tar.add("data/replaced.txt", "old\n")
    tar.add("opt/old/lower.txt", "layer 3 hides this\n")
    tar.directory("opt/old/deep")
    tar.add("opt/old/deep/file.txt", "and this\n")
    return tar.finish()


def _data_tar() -> bytes:
    tar = _Tar()
    tar.directory("data")
    tar.add("data/hello.txt", "hello from layer 2\n")
    tar.add("data/replaced.txt", "new\n")
    tar.add("data/.wh.removed.txt")
    tar.add("data/numbers.txt", "".join(f"{n}\n" for n in range(100_000)))
    return tar.finish()


def _opaque_tar() -> bytes:
    tar = _Tar()
    tar.directory("opt/old")
    tar.add("opt/old/.wh..wh..opq")
    tar.add("opt/old/new.txt", "after the opaque directory\n")
    return tar.finish()


def main() -> None:
    """Build the images named on the command line (`python -m tests.testbed.images debian img4`), and print them."""
    builders: dict[str, Callable[[Path], BusyboxImage | DebianImage | EveryKindImage | Img4]]
    builders = {"busybox": busybox, "debian": debian, "every_kind": every_kind, "img4": img4}
    for name in sys.argv[1:] or builders:
        print(builders[name](build.default_cache_dir()).reference)


if __name__ == "__main__":
    main()
