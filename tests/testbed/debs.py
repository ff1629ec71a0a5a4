"""Packages of any Debian release, unpacked into a directory and not installed."""

from __future__ import annotations

import re
import shutil
from typing import TYPE_CHECKING

from tests.testbed import build

if TYPE_CHECKING:
    from pathlib import Path

_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
_FIELDS = ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")


def unpack(suite: str, package: str, tree: Path, *, only: str = "") -> None:
    """Download a package of release `suite` and all that it depends on, and unpack them into the directory `tree`.

    Of what it depends on, `only` leaves the packages whose names match that regular expression.

    apt gets state and sources of its own, so the release need not be this machine's, and the machine's lists stay as
    they are. 10 s for the lists, and the packages.

    Raises:
        RuntimeError: the mirror does not have it; the message is apt's.
        LookupError: apt has no source for Debian here.

    """
    work = tree.with_name(f"{tree.name}-apt")
    try:
        for name in ("lists/partial", "cache/archives/partial", "debs"):
            (work / name).mkdir(parents=True)
        (work / "sources.list").write_text(f"deb [signed-by={_KEYRING}] {build.debian_mirror()} {suite} main\n")
        options = [
            *("-o", f"Dir::Etc::sourcelist={work}/sources.list", "-o", "Dir::Etc::sourceparts=-"),
            *("-o", f"Dir::State::lists={work}/lists", "-o", f"Dir::Cache={work}/cache"),
            *("-o", "APT::Sandbox::User=root", "-o", "Acquire::Languages=none"),
            *("-o", "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false"),
        ]
        build.run(["apt-get", *options, "-qq", "update"])
        found = build.run(
            ["apt-cache", *options, "depends", "--recurse", *(f"--no-{field}" for field in _FIELDS), package]
        )
        wanted = only or r"[a-z0-9][a-z0-9+.-]+"
        packages = sorted({line for line in found.splitlines() if re.fullmatch(wanted, line)})
        build.run(["sh", "-ec", 'cd "$0" && exec apt-get "$@"', work / "debs", *options, "-qq", "download", *packages])
        for archive in sorted((work / "debs").glob("*.deb")):
            build.run(["dpkg-deb", "--extract", archive, tree])
    finally:
        shutil.rmtree(work, ignore_errors=True)
