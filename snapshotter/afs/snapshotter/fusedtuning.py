"""What the kernel keeps per FUSE mount, and what is best for layers."""

import logging
import os
from pathlib import Path

from afs.core import syscalls
from afs.snapshotter.fusedwire import MAX_BACKGROUND

log = logging.getLogger(__name__)
# What the kernel reads ahead of readers of the FUSE mount; its default is 128. Importing numpy and pandas from partial layers
# of 1.3 GB, with EROFS on the files and with trees, touches 160 and 144 chunks with 128, 167 and 150 with 512, 173 and 151
# with 1024; reading a layer of 122 MB from end to end takes 935, 235 and 120 requests, and 0.35, 0.07 and 0.08 s of CPU.
_READ_AHEAD_KIB = 512


def tune(mountpoint: Path) -> None:
    """Set what the kernel keeps per FUSE mount. Blocking: it asks the worker."""
    try:
        device = mountpoint.stat().st_dev
        setting = f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb"
        Path(setting).write_text(str(_READ_AHEAD_KIB))
    except OSError as error:  # /sys may be read-only, as in containers; or the worker has died, which is told elsewhere
        log.warning("%s keeps the kernel's read-ahead: %s", mountpoint, error)
    try:
        _allow_background(mountpoint.stat().st_dev)
    except OSError as error:  # not root of the machine
        log.warning("%s: some waiting readers of one layer stop those of all others: %s", mountpoint, error)


def _allow_background(device: int) -> None:
    # From a mount of our own, at no path: fusectl is not mounted everywhere, and this leaves no trace.
    with syscalls.MountContext("fusectl") as context:
        connections = context.make(0)
    try:
        for name in ("max_background", "congestion_threshold"):
            fd = os.open(f"{os.minor(device)}/{name}", os.O_WRONLY | os.O_CLOEXEC, dir_fd=connections)
            try:
                os.write(fd, b"%d" % MAX_BACKGROUND)
            finally:
                os.close(fd)
    finally:
        os.close(connections)
