"""The image `numpy`: Debian, numpy from its wheel, and a layer that removes and changes some of both."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.testbed import build, debian, layertar, oci

if TYPE_CHECKING:
    from pathlib import Path

VERSION = "1"
TAG = "latest"
PACKAGE = "numpy==1.26.4"
SITE = "opt/site"
# Everything that an overlay diff expresses: removed and replaced files and directories, moved trees, links, attributes.
_CHANGES = """
rm -r /usr/share/doc /opt/site/numpy/f2py
rm /etc/issue && mkdir /etc/issue && touch /etc/issue/now-a-directory
rm -r /etc/opt && echo file >/etc/opt
mv /opt/site/numpy/tests /opt/site/numpy/moved && mkdir /opt/site/numpy/tests && touch /opt/site/numpy/tests/new
rm -r /opt/site/numpy/ma && ln -s core /opt/site/numpy/ma
chmod 2775 /srv && chown 1000:1001 /srv
ln /opt/site/numpy/version.py /srv/version.py
mkfifo /srv/fifo
echo appended >>/opt/site/numpy/__init__.py
"""


@dataclass(frozen=True)
class NumpyImage:
    """The image in a layout; layers lie bottom up."""

    layout: Path
    tag: str
    layers: tuple[oci.Layer, ...]


def numpy(cache_dir: Path) -> NumpyImage:
    """Three gzip layers of 47, 18 and 1 MB (10 s the first time; needs root, overlayfs, a Debian mirror and PyPI)."""
    key = f"{VERSION}-{build.source_key(sys.modules[__name__], debian, build, layertar, oci)}"

    def build_it(layout: Path) -> None:
        work = layout.with_name(f"{layout.name}-work")
        work.mkdir()
        try:
            _build(layout, work, debian.debian(cache_dir))
        finally:
            shutil.rmtree(work, ignore_errors=True)

    layout = build.cached(cache_dir, "numpy", key, build_it)
    return NumpyImage(layout, TAG, oci.read_image(layout, TAG).layers)


def _build(layout: Path, work: Path, base: debian.DebianImage) -> None:
    one, two, three = (work / f"layer{number}" for number in (1, 2, 3))
    one.mkdir()
    blob = oci.blob_path(base.layout, base.layers[0].digest)
    build.run(["tar", "-xpzf", blob, "-C", one, "--numeric-owner", "--xattrs", "--xattrs-include=*"])
    _install(two / SITE)
    build.run_in_overlay(_CHANGES, [two, one], three)
    builder = oci.LayoutBuilder(layout)
    layers = []
    for tree in (one, two, three):
        tar = work / f"{tree.name}.tar"
        layertar.write_layer(tree, tar, newest=build.EPOCH)
        layers.append(builder.add_layer(tar))
        tar.unlink()
    builder.add_image(TAG, layers)


def _install(target: Path) -> None:
    """The wheel for Debian's Python 3.11, unpacked by this Python's pip."""
    build.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--no-input", "--no-deps"),
            *("--python-version=3.11", "--implementation=cp", "--only-binary=:all:", f"--target={target}"),
            *(f"--platform=manylinux_2_17_{platform.machine()}", PACKAGE),
        ],
        PIP_DISABLE_PIP_VERSION_CHECK="1",
    )
    for path in target.rglob("*"):
        os.utime(path, (build.EPOCH, build.EPOCH), follow_symlinks=False)
