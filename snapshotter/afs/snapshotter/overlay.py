"""Options of an overlayfs mount (Documentation/filesystems/overlayfs.rst) and making one."""

from collections.abc import Sequence
from pathlib import Path

from afs.core import syscalls
from afs.core.errors import ResourceExhausted


def _escape(path: Path | str) -> str:
    # In lowerdir ":" separates and "\" escapes; "," ends an option.
    return str(path).replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")


def options(lower: Sequence[Path], upper: Path | None, work: Path | None) -> str:
    """The option string; *lower* is topmost first.

    - ``index=off``: hard links of lower files may break on copy-up, as with containerd; with the index, an upper
      directory could not be used with other lower mounts, and every layer mount is a new one.
    - ``redirect_dir=off``, ``metacopy=off``: both write xattrs into the upper directory that an OCI layer cannot express.
    - ``volatile``: an upper directory dies with its run, so fsync inside need not reach the disk (kernel 5.10).
    """
    parts = ["lowerdir=" + ":".join(_escape(path) for path in lower)]
    if upper is not None and work is not None:
        parts += [f"upperdir={_escape(upper)}", f"workdir={_escape(work)}", "volatile"]
    return ",".join([*parts, "index=off", "redirect_dir=off", "metacopy=off"])


def mount_overlay(target: Path, lower: Sequence[Path], upper: Path | None = None, work: Path | None = None) -> None:
    """Mount *lower* (topmost first) and *upper* at *target*. Blocking."""
    data = options(lower, upper, work)
    try:
        # nodev: devices in a layer or made by a run are nobody's; a container's own are on the tmpfs at its /dev.
        flags = syscalls.MS_NODEV | (0 if upper else syscalls.MS_RDONLY)
        syscalls.mount("afs", str(target), "overlay", flags, data)
    except OSError as error:
        if error.errno == 7:
            raise ResourceExhausted(
                f"{len(lower)} layers are too many for one mount at {target}: {error.strerror}"
            ) from None
        raise
