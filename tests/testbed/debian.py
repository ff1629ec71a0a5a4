"""The image `debian`: one layer with Debian's minimal system, made by debootstrap."""

from __future__ import annotations

import re
import shutil
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.testbed import build, layertar, oci

if TYPE_CHECKING:
    from pathlib import Path

SUITE = "bookworm"
VERSION = "1"
TAG = "latest"

# What differs from one build to the next, or tells about the machine that built.
_VOLATILE_FILES = (
    "etc/machine-id",
    "var/cache/ldconfig/aux-cache",
    "var/lib/dbus/machine-id",
    "etc/passwd-",
    "etc/group-",
    "etc/shadow-",
    "etc/gshadow-",
)
_VOLATILE_CONTENTS = ("var/cache/apt/archives", "var/lib/apt/lists")
_DAYS = build.EPOCH // 86400


@dataclass(frozen=True)
class DebianImage:
    """A Debian base image in a layout."""

    layout: Path
    tag: str
    layers: tuple[oci.Layer, ...]
    suite: str = SUITE
    present: tuple[str, ...] = ("/usr/bin/apt-get", "/bin/sh", "/etc/debian_version", "/var/cache/apt/archives")
    """Some paths it has for certain."""

    @property
    def reference(self) -> str:
        """The image as AFS commands name it."""
        return f"oci:{self.layout}:{self.tag}"


def debian(cache_dir: Path) -> DebianImage:
    """Debian minbase as one gzip layer (about 30 s the first time; needs root, debootstrap and a Debian mirror)."""
    key = f"{VERSION}-{build.source_key(sys.modules[__name__], build, layertar, oci)}"
    layout = build.cached(cache_dir, "debian", key, _build)
    return DebianImage(layout, TAG, oci.read_image(layout, TAG).layers)


def _build(layout: Path) -> None:
    tree = layout.with_name(f"{layout.name}-tree")
    tar = layout.with_name(f"{layout.name}-tar")
    try:
        build.run([*build.NAMESPACE, "debootstrap", "--variant=minbase", SUITE, tree, build.debian_mirror()])
        normalise(tree)
        layertar.write_layer(tree, tar, newest=build.EPOCH)
        builder = oci.LayoutBuilder(layout)
        config = {"Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"], "Cmd": ["/bin/bash"]}
        builder.add_image(TAG, [builder.add_layer(tar)], config)
    finally:
        shutil.rmtree(tree, ignore_errors=True)
        tar.unlink(missing_ok=True)


def normalise(tree: Path) -> None:
    """Remove from a system's tree, or an overlay's upper directory, what changes from build to build."""
    for name in _VOLATILE_FILES:
        (tree / name).unlink(missing_ok=True)
    for name in _VOLATILE_CONTENTS:
        for path in (tree / name).rglob("*"):
            if path.is_file():
                path.unlink()
    for log in (tree / "var/log").rglob("*"):
        if log.is_file() and not log.is_symlink():
            log.write_bytes(b"")
    for name, text in (("etc/hostname", "localhost\n"), ("etc/resolv.conf", "")):
        if (tree / name).exists():
            (tree / name).write_text(text)
    shadow = tree / "etc/shadow"
    if shadow.exists():  # its third field is the day of the build
        shadow.write_text(re.sub(r"(?m)^([^:]*:[^:]*):\d+:", rf"\1:{_DAYS}:", shadow.read_text()))
