"""An fsck.erofs that knows blocks smaller than a page: the machine's own, or one from a newer Debian.

Debian 12 has erofs-utils 1.5, which refuses them; 1.6 was the first to take them. The newer packages are unpacked into the
cache with the libraries that they need, and nothing is installed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

from tests.testbed import build

if TYPE_CHECKING:
    from pathlib import Path

SUITE = "trixie"
_OLDEST = (1, 6)
_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
_FIELDS = ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")


def fsck(cache_dir: Path) -> list[str]:
    """The command line of fsck.erofs without its arguments (10 s the first time; needs a Debian mirror).

    Raises:
        RuntimeError: the machine's own is too old and the mirror gave none.
        LookupError: apt has no source for Debian.

    """
    own = shutil.which("fsck.erofs")
    if own is not None and _version(own) >= _OLDEST:
        return [own]
    tree = build.cached(cache_dir, "erofs-utils", f"{SUITE}-{build.source_key(sys.modules[__name__], build)}", _build)
    (loader,) = tree.glob("usr/lib/*-linux-gnu*/ld-linux*.so.*")
    return [str(loader), "--library-path", str(loader.parent), str(tree / "usr/bin/fsck.erofs")]


def _version(program: str) -> tuple[int, ...]:
    done = subprocess.run([program, "--version"], check=False, capture_output=True, text=True)
    found = re.search(r"(\d+)\.(\d+)", done.stdout + done.stderr)
    return tuple(map(int, found.groups())) if found else (0,)


def _build(tree: Path) -> None:
    """Download erofs-utils and all that it depends on with an apt that has state and sources of its own."""
    work = tree.with_name(f"{tree.name}-apt")
    try:
        for name in ("lists/partial", "cache/archives/partial", "debs"):
            (work / name).mkdir(parents=True)
        (work / "sources.list").write_text(f"deb [signed-by={_KEYRING}] {build.debian_mirror()} {SUITE} main\n")
        options = [
            *("-o", f"Dir::Etc::sourcelist={work}/sources.list", "-o", "Dir::Etc::sourceparts=-"),
            *("-o", f"Dir::State::lists={work}/lists", "-o", f"Dir::Cache={work}/cache"),
            *("-o", "APT::Sandbox::User=root", "-o", "Acquire::Languages=none"),
            *("-o", "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false"),
        ]
        build.run(["apt-get", *options, "-qq", "update"])
        found = build.run(
            ["apt-cache", *options, "depends", "--recurse", *(f"--no-{field}" for field in _FIELDS), "erofs-utils"]
        )
        packages = sorted({line for line in found.splitlines() if re.fullmatch(r"[a-z0-9][a-z0-9+.-]+", line)})
        build.run(["sh", "-ec", 'cd "$0" && exec apt-get "$@"', work / "debs", *options, "-qq", "download", *packages])
        for package in sorted((work / "debs").glob("*.deb")):
            build.run(["dpkg-deb", "--extract", package, tree])
    finally:
        shutil.rmtree(work, ignore_errors=True)
