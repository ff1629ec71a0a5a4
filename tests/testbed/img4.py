"""IMG4, the reference image of the benchmarks: four layers of a Python development environment, made as overlay diffs."""

from __future__ import annotations

import base64
import os
import platform
import random
import shutil
import stat
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.testbed import build, debian, layertar, oci

if TYPE_CHECKING:
    from pathlib import Path

VERSION = "1"
TAG = "latest"
SOURCE_FILES = 8000
APT_PACKAGES = ("python3", "python3-pip", "python3-venv", "git", "gcc", "libc6-dev", "make", "curl")
PIP_PACKAGES = (
    "numpy==1.26.4",
    "scipy==1.13.1",
    "pandas==2.2.2",
    "sympy==1.12.1",
    "django==4.2.13",
    "matplotlib==3.9.0",
    "scikit-learn==1.5.0",
    "requests==2.32.3",
    "pytest==8.2.2",
    # What these need, as resolved once: the layer is to stay the same.
    "asgiref==3.13.0",
    "certifi==2026.10.18",
    "charset-normalizer==3.5.2",
    "cloudpickle==3.1.2",
    "contourpy==1.3.3",
    "cycler==0.12.1",
    "fonttools==4.68.0",
    "idna==3.20",
    "iniconfig==2.3.1",
    "joblib==1.6.0",
    "kiwisolver==1.5.1",
    "mpmath==1.3.0",
    "packaging==26.3",
    "pillow==13.0.0",
    "pluggy==1.7.0",
    "pyparsing==3.3.3",
    "python-dateutil==4.0.0",
    "pytz==2026.6",
    "sqlparse==0.6.1",
    "threadpoolctl==3.8.0",
    "tzdata==2026.6",
    "urllib3==2.8.0",
)
_APT = f"""
apt-get -qq update
apt-get -qq install --yes -o APT::Install-Recommends=true -o DPkg::Options::=--force-unsafe-io {" ".join(APT_PACKAGES)}
apt-get -qq clean
"""
_PLATFORMS = ("manylinux2014", "manylinux_2_17", "manylinux_2_28")


@dataclass(frozen=True)
class Img4:
    """IMG4 in a layout; the attributes are facts to check a mount of it against."""

    layout: Path
    tag: str
    layers: tuple[oci.Layer, ...]
    absent: tuple[str, ...] = ("/usr/share/doc", "/var/cache/apt")
    """Paths of lower layers that the top layer removes."""
    device: str = "/testbed/special/zero"
    fifo: str = "/testbed/special/fifo"
    hard_link: tuple[str, str] = ("/testbed/special/one", "/testbed/special/two")
    xattr: tuple[str, str, bytes] = ("/testbed/special/one", "user.testbed", b"IMG4")
    setuid: str = "/testbed/special/setuid"
    work: tuple[str, ...] = ("python3", "-c", 'import sys; sys.path.insert(0, "/opt/site"); import numpy, pandas')
    """The command W."""

    @property
    def reference(self) -> str:
        """The image as AFS commands name it."""
        return f"oci:{self.layout}:{self.tag}"


def img4(cache_dir: Path) -> Img4:
    """IMG4 (minutes the first time; needs root, overlayfs, a Debian mirror and a Python package index)."""
    key = f"{VERSION}-{build.source_key(sys.modules[__name__], debian, build, layertar, oci)}"

    def build_it(layout: Path) -> None:
        work = layout.with_name(f"{layout.name}-work")
        work.mkdir()
        try:
            _build(layout, work, debian.debian(cache_dir))
        finally:
            shutil.rmtree(work, ignore_errors=True)

    layout = build.cached(cache_dir, "img4", key, build_it)
    return Img4(layout, TAG, oci.read_image(layout, TAG).layers)


def _build(layout: Path, work: Path, base: debian.DebianImage) -> None:
    one, two, three, four = trees = [work / f"layer{n}" for n in (1, 2, 3, 4)]
    one.mkdir()
    blob = oci.blob_path(base.layout, base.layers[0].digest)
    build.run(["tar", "-xpzf", blob, "-C", one, "--numeric-owner", "--xattrs", "--xattrs-include=*"])
    build.run_in_overlay(_APT, [one], two)
    debian.normalise(two)
    three.mkdir()
    _pip_install(three / "opt" / "site")
    # .pyc files record their source's time, so they are made after it is fixed; some test data does not compile.
    build.run_in_overlay("python3 -m compileall -q -j 0 /opt/site >/dev/null || true", [two, one], three)
    four.mkdir()
    write_source_tree(four / "testbed")
    build.run_in_overlay("rm -rf /usr/share/doc /var/cache/apt", [three, two, one], four)
    builder = oci.LayoutBuilder(layout)
    layers = []
    for tree in trees:
        tar = work / f"{tree.name}.tar"
        layertar.write_layer(tree, tar, newest=build.EPOCH)
        layers.append(builder.add_layer(tar))
        tar.unlink()
    builder.add_image(
        TAG, layers, {"Env": ["PATH=/usr/local/bin:/usr/bin:/bin"], "Cmd": ["/bin/bash"], "WorkingDir": "/testbed"}
    )


def _pip_install(target: Path) -> None:
    """Install wheels for the image's Python, 3.11 in bookworm, with this Python's pip."""
    machine = platform.machine()
    options = [f"--platform={name}_{machine}" for name in _PLATFORMS]
    build.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--no-cache-dir", "--no-input"),
            *("--python-version=3.11", "--implementation=cp", "--only-binary=:all:", f"--target={target}"),
            *("--no-deps", *options, *PIP_PACKAGES),
        ],
        PIP_DISABLE_PIP_VERSION_CHECK="1",
    )
    for path in target.rglob("*"):
        os.utime(path, (build.EPOCH, build.EPOCH), follow_symlinks=False)


def write_source_tree(target: Path, files: int = SOURCE_FILES) -> None:
    """Write a source tree of `files` generated Python files, and one special file of each kind; same bytes each time."""
    chance = random.Random(4)  # noqa: S311 - it makes text
    words = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz_", k=chance.randint(3, 12))) for _ in range(2000)]
    for number in range(files):
        path = target / f"package{number % 40:02}" / f"sub{number // 40 % 10}" / f"module{number:05}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        functions = []
        for _ in range(int(chance.paretovariate(1.3))):
            names = chance.choices(words, k=8)
            functions.append(
                f"def {names[0]}({names[1]}, {names[2]}={chance.randint(0, 9999)}):\n"
                f'    """{" ".join(chance.choices(words, k=20))}."""\n'
                f"    {names[3]} = [{names[1]}.{names[4]}({names[2]}), {names[5]!r}, {chance.random():.6f}]\n"
                f"    return {names[3]} + {names[1]}.{names[6]}[{chance.randint(0, 99)}:]\n"
            )
        table = base64.b64encode(chance.randbytes(chance.randint(4000, 14000))).decode()  # what does not compress well
        path.write_text("\n\n".join([f'TABLE = """{table}"""\n', *functions[:200]]))
    special = target / "special"
    special.mkdir(parents=True)
    (special / "one").write_text("a file with two names\n")
    os.setxattr(special / "one", "user.testbed", b"IMG4")
    os.link(special / "one", special / "two")
    os.mkfifo(special / "fifo", 0o640)
    os.mknod(special / "zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    (special / "setuid").write_text("#!/bin/sh\nid\n")
    (special / "setuid").chmod(0o4755)
