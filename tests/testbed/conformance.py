"""containerd's own tests of a snapshotter, built from Debian's packages and run against a socket."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.testbed import build, debs

_VERSION = "1"  # of `_build`
_SUITE = "bookworm"
_HARNESS = Path(__file__).parent.parent / "containerd_suite" / "suite_test.go"
_GO = "golang-1.19-go"
# What the harness needs of all that containerd's package depends on: the rest is 400 MB of clouds' libraries. Of golang/protobuf
# that package takes either of two versions, and this is the one that containerd is built with.
_LIBRARIES = (
    *("github-containerd-containerd", "github-containerd-continuity", "github-containerd-ttrpc"),
    *("github-gogo-protobuf", "github-golang-protobuf-1-3", "google-protobuf", "google-grpc", "google-genproto"),
    *("golang-x-net", "golang-x-sys", "golang-x-text", "github-moby-sys", "github-opencontainers-go-digest"),
    *("github-sirupsen-logrus", "github-pkg-errors", "github-google-go-cmp", "(?:github-gotestyourself-)?gotest.tools"),
)
_RESULT = re.compile(r"^ {4}--- (PASS|FAIL|SKIP): TestProxy/(\S+) ", re.MULTILINE)


@dataclass(frozen=True)
class Results:
    """Which cases of the suite came to what, and all that it wrote."""

    passed: frozenset[str]
    failed: frozenset[str]
    skipped: frozenset[str]
    status: int
    """The program's exit status."""
    output: str

    @property
    def cases(self) -> frozenset[str]:
        """All that ran, or said that they do not."""
        return self.passed | self.failed | self.skipped

    def tail(self) -> str:
        """The end of the output, and what is said of cases that failed, for an assertion's message."""
        lines = [line for line in self.output.splitlines() if not re.search(r"=== \w+ |: unmount /", line)]
        return "\n".join(lines[-60:])


def program(cache_dir: Path) -> Path:
    """The suite as one static program; half a minute and 100 MB of downloads when it is built for the first time.

    Nothing is installed: Go and the libraries are unpacked for the build alone.
    """
    made_of = (_VERSION, _SUITE, _GO, _LIBRARIES, _HARNESS.read_bytes())
    key = hashlib.sha256(repr(made_of).encode()).hexdigest()[:12]
    return build.cached(cache_dir, "containerd-suite", key, _build) / "suite"


def run(suite: Path, socket: Path, snapshotter: str, scratch: Path, case: str = "", timeout: float = 100.0) -> Results:
    """Run all cases, or a single one, against the snapshotter behind a socket; needs root.

    `snapshotter` is the name in the requests, by which containerd itself chooses one of its own. The suite mounts
    snapshots below `scratch`.
    """
    selection = rf"^TestProxy$/^{re.escape(case)}$" if case else "^TestProxy$"
    done = subprocess.run(
        [str(suite), "-test.root", "-test.v", f"-test.run={selection}"],
        env=os.environ
        | {"AFS_SUITE_SOCKET": str(socket), "AFS_SUITE_SNAPSHOTTER": snapshotter, "TMPDIR": str(scratch)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=timeout,
        check=False,
    )
    found: dict[str, set[str]] = {"PASS": set(), "FAIL": set(), "SKIP": set()}
    for result, name in _RESULT.findall(done.stdout):
        found[result].add(name)
    passed, failed, skipped = map(frozenset, found.values())
    return Results(passed, failed, skipped, done.returncode, done.stdout)


def cases(suite: Path, scratch: Path) -> list[str]:
    """What the suite consists of; without a snapshotter every case that is not skipped fails at once."""
    return sorted(run(suite, scratch / "nobody", "none", scratch).cases)


def _build(directory: Path) -> None:
    work = directory / "work"
    try:
        sources = work / "path" / "src" / "suite"
        sources.mkdir(parents=True)
        shutil.copy(_HARNESS, sources)
        libraries = "|".join(f"golang-{name}-dev" for name in _LIBRARIES)
        unpack = functools.partial(debs.unpack, _SUITE)
        unpack("golang-github-containerd-containerd-dev", work / "libraries", only=libraries)
        unpack(_GO, work / "go", only=r"golang-[0-9.]+-(?:go|src)")
        (root,) = (work / "go" / "usr" / "lib").glob("go-*")
        build.run(
            [root / "bin" / "go", "test", "-c", "-ldflags=-s -w", "-o", directory / "suite", "suite"],
            GOROOT=str(root),
            GOPATH=f"{work}/path:{work}/libraries/usr/share/gocode",
            GOCACHE=str(work / "cache"),
            GOENV="off",
            GOFLAGS="",
            GO111MODULE="off",  # Debian's sources are a GOPATH, and nothing may come from elsewhere
            CGO_ENABLED="0",
        )
    finally:
        shutil.rmtree(work, ignore_errors=True)
