"""Puts a new text in the place of containerd's configuration file: tried out first, the old one kept beside it."""

import itertools
import os
import shutil
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from afs.core.errors import FailedPrecondition
from afs.core.files import fsync_dir
from afs.core.run import ask
from afs.snapshotter.containerd_settings import Plan, lookup
from afs.snapshotter.containerd_toml import dotted, literal

_TIMEOUT = 60.0


def read_text(path: Path) -> str:
    """What *path* says, nothing if it does not exist; FailedPrecondition if it is not text or cannot be read."""
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise FailedPrecondition(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FailedPrecondition(f"{path} is not TOML: byte {error.start} is not UTF-8") from None


def install(path: Path, text: str, plan: Plan, program: str | None) -> tuple[Path | None, list[str]]:
    """Make *text* the content of *path*; gives where the old content is now, if there was any, and notes.

    With *program*, a containerd, the file is replaced only after that has read the new one. Owner, mode and extended
    attributes are those of the old file; of a symbolic link the target is replaced. FailedPrecondition if containerd
    refuses the file or the directory cannot be written.
    """
    path = path.resolve()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _beside(path) as new:
            new.write_bytes(text.encode())
            notes = _overridden(new, plan, program) if program else []
            kept = _keep(path)
            if kept is not None:
                _like(new, kept)
                os.utime(new)
            with new.open("rb") as written:
                os.fsync(written.fileno())
            new.replace(path)
        fsync_dir(path.parent)
    except OSError as error:
        raise FailedPrecondition(f"cannot write {path}: {error.strerror}") from error
    return kept, notes


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A file in the directory of *path* under a name of its own: imports are looked up from there."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".new", dir=path.parent)
    os.fchmod(descriptor, 0o644)
    os.close(descriptor)
    new = Path(name)
    try:
        yield new
    finally:
        new.unlink(missing_ok=True)


def _keep(path: Path) -> Path | None:
    """A copy of *path* beside it, ``NAME.afs-1`` or the next number that is free; None if there is nothing to copy."""
    if not path.exists():
        return None
    for number in itertools.count(1):
        kept = path.with_name(f"{path.name}.afs-{number}")
        try:
            with kept.open("xb") as copy, path.open("rb") as original:
                shutil.copyfileobj(original, copy)
                copy.flush()
                os.fsync(copy.fileno())
        except FileExistsError:
            continue
        _like(kept, path)
        return kept
    return None


def _like(path: Path, original: Path) -> None:
    """Give *path* the owner, mode, times and attributes (SELinux's label among them) of *original*."""
    status = original.stat()
    os.chown(path, status.st_uid, status.st_gid)
    shutil.copystat(original, path)


def _overridden(new: Path, plan: Plan, program: str) -> list[str]:
    """Notes on settings of *plan* that *program* does not see as the file *new* has them, because of an import."""
    try:
        answer = ask([program, "--config", str(new), "config", "dump"], stdin=b"", timeout=_TIMEOUT)
    except OSError as error:
        raise FailedPrecondition(f"cannot have {program} read the new file: {error.strerror}") from error
    if answer.returncode:
        said = answer.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise FailedPrecondition(f"{program} does not take the new file, so the old one stays: {said or 'no message'}")
    seen: dict[str, Any] = tomllib.loads(answer.stdout.decode(errors="replace"))
    notes = []
    for setting in plan.settings:
        found = lookup(seen, setting.keys)
        if found is not None and setting.keys != ("version",) and found != setting.value:
            notes.append(f"{dotted(setting.keys)} is {literal(found)} for containerd: an imported file says so")
    return notes
