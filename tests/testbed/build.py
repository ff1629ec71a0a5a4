"""What builders of images share: a cache outside the repository, apt's settings, and chroots in mounts of their own."""

from __future__ import annotations

import ast
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import ModuleType

EPOCH = 1704067200
"""2024-01-01, the modification time of everything that a build creates."""

NAMESPACE = ("unshare", "--mount", "--pid", "--fork", "--kill-child")
"""Mounts and processes of what follows end with it."""

_PROXY_VARIABLES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# The namespace takes its mounts with it, so a killed build leaves none behind. /tmp and /run are not part of a layer,
# and resolv.conf and apt's settings are the host's: mirrors, proxies and certificates differ from machine to machine.
_CHROOT = r"""
set -eu
mount -t overlay overlay -o "lowerdir=$LOWER,upperdir=$UPPER,workdir=$WORK" "$ROOT"
mount -t proc proc "$ROOT/proc"
mount --rbind /dev "$ROOT/dev"
mount -t tmpfs -o mode=1777 tmpfs "$ROOT/tmp"
mount -t tmpfs tmpfs "$ROOT/run"
mount --bind /etc/resolv.conf "$ROOT/etc/resolv.conf"
mount --bind /etc/apt "$ROOT/etc/apt"
if [ -d /etc/ssl/certs ] && [ -d "$ROOT/etc/ssl/certs" ]; then
    mount --bind -o ro /etc/ssl/certs "$ROOT/etc/ssl/certs"
fi
exec chroot "$ROOT" /bin/sh -euc "$COMMAND"
"""


def default_cache_dir() -> Path:
    """Where built images stay between runs: `$AFS_TEST_CACHE`, else `~/.cache/afs-tests`."""
    return Path(os.environ.get("AFS_TEST_CACHE") or Path.home() / ".cache" / "afs-tests")


def source_key(*modules: ModuleType) -> str:
    """Twelve hex digits that change when the code of `modules` does; comments, docstrings and layout do not count."""
    digest = hashlib.sha256()
    for module in modules:
        tree = ast.parse(Path(module.__file__ or "").read_text())
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and len(body) > 1 and _is_docstring(body[0]):
                del body[0]
        digest.update(ast.unparse(tree).encode())
    return digest.hexdigest()[:12]


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def cached(cache_dir: Path, name: str, key: str, build: Callable[[Path], None]) -> Path:
    """The directory `cache_dir/name-key`, made by `build(empty_directory)` unless it is there.

    One process builds while the others wait for its lock, and a directory is renamed into place once complete.
    What a killed build left is removed by the next one.
    """
    final = cache_dir / f"{name}-{key}"
    if final.is_dir():
        return final
    cache_dir.mkdir(parents=True, exist_ok=True)
    with _locked(cache_dir / f"{name}.lock"):
        for stale in cache_dir.glob(f"{name}.tmp-*"):
            if stale.is_dir():
                shutil.rmtree(stale)
            else:
                stale.unlink()
        if not final.is_dir():
            work = Path(tempfile.mkdtemp(prefix=f"{name}.tmp-", dir=cache_dir))
            work.chmod(0o755)
            try:
                build(work)
                work.rename(final)
            except BaseException:
                shutil.rmtree(work, ignore_errors=True)
                raise
    return final


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def run(argv: Sequence[str | Path], **environment: str) -> str:
    """Run a program and return what it wrote; `environment` is added to this process's.

    Raises:
        RuntimeError: it failed; the message has the end of its output.

    """
    done = subprocess.run(  # noqa: PLW1510 - the check below has a better message
        [str(arg) for arg in argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        env=os.environ | environment,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, argv))[:200]}: exit {done.returncode}\n{done.stdout[-4000:]}")
    return done.stdout


def run_in_overlay(command: str, lowers: Sequence[Path], upper: Path, **environment: str) -> str:
    """Run a shell command in a chroot over `lowers` (topmost first); what it changes lands in `upper`.

    Network and apt work as on the host. Raises RuntimeError as `run` does.
    """
    upper.mkdir(exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="overlay-", dir=upper.parent))
    (scratch / "work").mkdir()
    (scratch / "root").mkdir()
    proxies = {name: os.environ[name] for name in _PROXY_VARIABLES if name in os.environ}
    clean = {"PATH": _PATH, "HOME": "/root", "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"} | proxies | environment
    mounts = {
        "LOWER": ":".join(map(str, lowers)),
        "UPPER": str(upper),
        "WORK": str(scratch / "work"),
        "ROOT": str(scratch / "root"),
        "COMMAND": command,
    }
    variables = [f"{name}={value}" for name, value in (clean | mounts).items()]
    try:
        return run([*NAMESPACE, "env", "-i", *variables, "sh", "-c", _CHROOT])
    finally:
        shutil.rmtree(scratch)


def debian_mirror() -> str:
    """The mirror that this machine's apt uses for Debian itself, so that builds work behind a mirror too.

    Raises:
        LookupError: apt has no source for Debian.

    """
    files = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    for path in files:
        if path.suffix not in (".list", ".sources") or not path.is_file():
            continue
        for line in path.read_text().splitlines():
            found = re.match(r"(?:deb\s+(?:\[[^]]*\]\s+)?|URIs:\s*)(\S+/debian/?)(?:\s|$)", line)
            if found:
                return found.group(1)
    raise LookupError("no source for Debian under /etc/apt")
