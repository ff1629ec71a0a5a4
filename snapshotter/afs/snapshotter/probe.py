"""Finding out which backends work here, by mounting a tiny layer with each of them. Nothing of it stays. Blocking.

Complete layers are tried with a file on the file system that holds the layers, for EROFS on a file depends on that; lazy
ones with a file on a FUSE file system. That takes some milliseconds, so it is done at every start and remembered nowhere.
"""

import contextlib
import errno
import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from afs.core.digests import sha256_digest
from afs.core.errors import AfsError, FailedPrecondition
from afs.core.mounts import unmount
from afs.layerstore.afslyr.erofs import SUPERBLOCK_OFFSET, Index, pack_superblock
from afs.layerstore.afslyr.layout import BLOCK_SIZE, TAR_OFFSET, make_layout, pack_header
from afs.layerstore.afslyr.tarheader import Entry
from afs.layerstore.afslyr.tree import build
from afs.snapshotter import overlay
from afs.snapshotter.backends import Backend, Backends, Trial, Unusable, mount_layer
from afs.snapshotter.fuseprobe import FILE, FuseFile

log = logging.getLogger(__name__)
_NAME, _CONTENT = b"probe", b"afs".ljust(BLOCK_SIZE, b".")


def probe_image() -> bytes:
    """The part that a kernel mounts of a layer file with one file in it: 12 KiB."""
    index = Index(build([Entry(_NAME, stat.S_IFREG, size=len(_CONTENT))]).inodes)
    layout = make_layout(sha256_digest(_CONTENT), len(_CONTENT), 0, index.length)
    head = pack_header(layout)[:SUPERBLOCK_OFFSET].ljust(SUPERBLOCK_OFFSET, b"\0") + pack_superblock(
        layout, index.count
    )
    data = head.ljust(TAR_OFFSET, b"\0") + _CONTENT
    return (data.ljust(layout.meta_offset, b"\0") + index.pack(layout.meta_offset)).ljust(layout.erofs_end, b"\0")


def find_backends(layers: Path, scratch: Path, forced: Backend | None) -> Backends:
    """What to mount layers with, as :func:`probe` finds; FailedPrecondition if nothing works, or not what is *forced*."""
    backends = Backends(probe(layers, scratch), forced)
    backends.check()
    for lazy in (False, True):
        choices = [str(choice.backend) for choice in backends.choices(lazy=lazy)]
        kind = "lazy" if lazy else "complete"
        if choices:
            log.info("%s layers are mounted as %s", kind, ", else ".join(choices))
        else:
            log.error("%s layers cannot be mounted: %s", kind, backends.refusal(lazy=lazy))
    return backends


def probe(layers: Path, scratch: Path) -> tuple[Trial, ...]:
    """A trial of each backend for complete and for lazy layers, best first.

    *layers* is where complete ones are, or will be: if it does not exist yet its nearest parent counts. *scratch* is an
    existing directory for mount points.
    """
    image = probe_image()
    with tempfile.TemporaryDirectory(dir=scratch, prefix="probe-") as work:
        target, served = Path(work, "mnt"), Path(work, "fuse")
        target.mkdir()
        served.mkdir()
        lazy = _try_lazy(image, served, target)
        complete = [_try_complete(trial, image, layers, target) for trial in lazy[:2]]
    # There is one tree: afs_fused serves it, whether the layer is complete or not.
    tree = lazy[-1]
    trials = (*complete, Trial(tree.backend, False, tree.reason), *lazy)
    for trial in trials:
        if not trial.works:
            log.warning("%s layers as %s: %s", "lazy" if trial.lazy else "complete", trial.backend, trial.reason)
    return trials


def check_overlay() -> None:
    """FailedPrecondition if this kernel has no overlayfs."""
    try:
        overlay.best_way()
    except OSError as error:
        why = "the module is missing or blocked" if error.errno == errno.ENODEV else error.strerror
        raise FailedPrecondition(f"no overlayfs in this kernel: {why}") from error


def _try_complete(lazy: Trial, image: bytes, layers: Path, target: Path) -> Trial:
    """A trial of the same backend as *lazy*, whose result stands for it if there is no space to try.

    That tells what the kernel can. What depends on the file system is found out when a layer is mounted, as always when
    one is elsewhere; a backend that did not work now would not be used before the next start.
    """
    try:
        with _temporary(image, layers) as file:
            return _try(Trial(lazy.backend, False), file, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            log.warning("no space at %s to try %s", error.filename, lazy.backend)
            return Trial(lazy.backend, False, lazy.reason)
        return Trial(lazy.backend, False, f"cannot write to {error.filename}: {error.strerror}")


def _try_lazy(image: bytes, served: Path, target: Path) -> list[Trial]:
    try:
        with FuseFile(served, image) as file:
            found = [_try(Trial(backend, True), file.path, target) for backend in (Backend.FILE, Backend.LOOP)]
            return [*found, _try(Trial(Backend.TREE, True), served, target)]
    except OSError as error:
        reason = f"no FUSE: {error.filename}: {error.strerror}"
        if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            reason = "no FUSE: the module fuse is missing or blocked, or /dev/fuse is"
        return [Trial(backend, True, reason) for backend in Backend]


def _try(trial: Trial, source: Path, target: Path) -> Trial:
    """*trial*, with the reason if it does not work."""
    try:
        mount_layer(trial.backend, source, target)
        try:
            if trial.backend is Backend.TREE:
                os.stat(target / FILE)
            elif (target / os.fsdecode(_NAME)).read_bytes() != _CONTENT:
                return Trial(trial.backend, trial.lazy, "the kernel reads something else than the file holds")
        finally:
            unmount(str(target))
    except Unusable as error:
        return Trial(trial.backend, trial.lazy, error.reason)
    except AfsError as error:
        cause = error.__cause__
        if trial.backend is not Backend.TREE and isinstance(cause, OSError) and cause.errno == errno.EINVAL:
            # Stable kernels have taken that over, 6.1 among them, so nobody goes by version numbers.
            reason = "this kernel's EROFS does not know blocks of 512 bytes (Linux 6.4 does, and later stable ones do)"
            return Trial(trial.backend, trial.lazy, reason)
        return Trial(trial.backend, trial.lazy, error.line)
    except OSError as error:
        return Trial(trial.backend, trial.lazy, f"mounted, but cannot be read: {error.strerror}")
    return trial


@contextlib.contextmanager
def _temporary(content: bytes, near: Path) -> Iterator[Path]:
    """A file without a name on the file system of *near* or its nearest parent that exists. OSError names the place."""
    while not near.is_dir():
        near = near.parent
    try:
        fd = os.open(near, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):  # not every file system has such files
            raise
        fd, name = tempfile.mkstemp(dir=near, prefix=".afs-probe-")
        os.unlink(name)
    try:
        try:
            written = os.write(fd, content)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(near)) from error
        if written != len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(near))
        yield Path(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
