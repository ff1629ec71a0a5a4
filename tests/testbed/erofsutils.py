"""An fsck.erofs that knows blocks smaller than a page: the machine's own, or one from a newer Debian.

Debian 12 has erofs-utils 1.5, which refuses them; 1.6 was the first to take them. The newer packages are unpacked into the
cache with the libraries that they need, and nothing is installed.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

from tests.testbed import build, debs

if TYPE_CHECKING:
    from pathlib import Path

SUITE = "trixie"
_OLDEST = (1, 6)


def fsck(cache_dir: Path) -> list[str]:
    """The command line of fsck.erofs without its arguments (10 s the first time; needs a Debian mirror).

    Raises:
        RuntimeError: the machine's own is too old and the mirror gave none.
        LookupError: apt has no source for Debian.

    """
    own = shutil.which("fsck.erofs")
    if own is not None and _version(own) >= _OLDEST:
        return [own]
    key = f"{SUITE}-{build.source_key(sys.modules[__name__], build, debs)}"
    tree = build.cached(cache_dir, "erofs-utils", key, functools.partial(debs.unpack, SUITE, "erofs-utils"))
    (loader,) = tree.glob("usr/lib/*-linux-gnu*/ld-linux*.so.*")
    return [str(loader), "--library-path", str(loader.parent), str(tree / "usr/bin/fsck.erofs")]


def _version(program: str) -> tuple[int, ...]:
    done = subprocess.run([program, "--version"], check=False, capture_output=True, text=True)
    found = re.search(r"(\d+)\.(\d+)", done.stdout + done.stderr)
    return tuple(map(int, found.groups())) if found else (0,)
