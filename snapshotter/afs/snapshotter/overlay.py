"""Making overlayfs mounts of any number of layers (Documentation/filesystems/overlayfs.rst); docs/mounts.md says why so.

Two ways to tell the kernel about directories, for mount(2) takes one page of options and absolute paths fill that soon:

- ``fds``: descriptors, one fsconfig(2) call for each (Linux 6.13). Names do not matter, and overlayfs's own limit of 500
  layers remains.
- ``page``: mount(2). If the absolute paths do not fit its page, the names in /proc/self/fd of descriptors do. That takes a
  working directory of its own, so a thread that ends afterwards.
"""

import contextlib
import errno
import functools
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from afs.core import syscalls
from afs.core.errors import ResourceExhausted

SOURCE = "afs"  # what mountinfo shows unless told otherwise
MAX_LAYERS = 500  # OVL_MAX_STACK: the kernel's limit
Way = Literal["fds", "page"]
Settings = list[tuple[str, str | None]]
_INITIAL_USER_NAMESPACE = "user:[4026531837]"  # PROC_USER_INIT_INO


def settings(*, writable: bool, volatile: bool = True) -> Settings:
    """The options besides directories; a flag has None.

    - ``index=off``: hard links of lower files may break on copy-up, as with containerd; with the index, an upper
      directory could not be used with other lower mounts, and every layer mount is a new one.
    - ``redirect_dir=off``, ``metacopy=off``: both write xattrs into the upper directory that an OCI layer cannot express.
    - ``volatile``: an upper directory that dies with its run, so fsync inside need not reach the disk (kernel 5.10).
    - ``userxattr``: in a user namespace overlayfs may not touch ``trusted.*``, so marks are ``user.overlay.*`` (5.11).
    """
    inside = in_user_namespace()
    # "off" may still follow redirects, which overlayfs refuses there.
    redirect = "nofollow" if inside else "off"
    found: Settings = [("index", "off"), ("redirect_dir", redirect), ("metacopy", "off")]
    if writable and volatile:
        found.append(("volatile", None))
    if inside:
        found.append(("userxattr", None))
    return found


def in_user_namespace() -> bool:
    """Whether this process is in another user namespace than the machine's first one."""
    return os.readlink("/proc/self/ns/user") != _INITIAL_USER_NAMESPACE


@functools.cache
def best_way() -> Way:
    """``fds`` if this kernel's overlayfs takes descriptors, else ``page``. OSError if there is no overlayfs at all."""
    try:
        context = syscalls.MountContext("overlay")
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EPERM):  # EPERM: a seccomp profile that is older than the call
            return "page"
        raise
    with context:
        fd = os.open("/", os.O_PATH | os.O_CLOEXEC)
        try:
            context.set_fd("lowerdir+", fd)
        except OSError as error:
            # EOPNOTSUPP: before 6.5 overlayfs's options are one string and no descriptor can be among them.
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            return "page"
        finally:
            os.close(fd)
    return "fds"


def mount_overlay(
    target: Path,
    lower: Sequence[Path],
    upper: Path | None = None,
    work: Path | None = None,
    *,
    source: str = SOURCE,
    volatile: bool = True,
    suid: bool = True,
    way: Way | None = None,
) -> None:
    """Mount *lower* (topmost first) and *upper* with *work*, if given, at *target*. Blocking.

    *source*, of less than 256 bytes, is what mountinfo shows. *volatile*: the upper directory need not outlive a crash of
    the machine. *suid*: setuid programs are setuid there. *way* is for tests; OSError names the target, ResourceExhausted is for more layers than one mount can have.
    """
    if len(lower) > MAX_LAYERS:
        raise ResourceExhausted(
            f"{len(lower)} layers are too many for one mount at {target}: overlayfs takes {MAX_LAYERS}"
        )
    extra = settings(writable=upper is not None, volatile=volatile)
    if (way or best_way()) == "fds":
        _mount_fds(source, target, lower, upper, work, extra, suid)
    else:
        _mount_page(source, target, lower, upper, work, extra, suid)


def _mount_fds(
    source: str,
    target: Path,
    lower: Sequence[Path],
    upper: Path | None,
    work: Path | None,
    extra: Settings,
    suid: bool,
) -> None:
    with syscalls.MountContext("overlay") as context:
        context.set("source", source)
        for path in lower:
            _set_directory(context, "lowerdir+", path)
        attributes = syscalls.MOUNT_ATTR_NODEV | (0 if suid else syscalls.MOUNT_ATTR_NOSUID)
        if upper is not None and work is not None:
            _set_directory(context, "upperdir", upper)
            _set_directory(context, "workdir", work)
        else:
            context.set("ro")
            attributes |= syscalls.MOUNT_ATTR_RDONLY
        for key, value in extra:
            context.set(key, value)
        context.mount(str(target), attributes)


def _set_directory(context: syscalls.MountContext, key: str, path: Path) -> None:
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        context.set_fd(key, fd)
    finally:
        os.close(fd)


def _mount_page(
    source: str,
    target: Path,
    lower: Sequence[Path],
    upper: Path | None,
    work: Path | None,
    extra: Settings,
    suid: bool,
) -> None:
    # nodev: devices in a layer or made by a run are nobody's; a container's own are on the tmpfs at its /dev.
    flags = syscalls.MS_NODEV | (0 if upper else syscalls.MS_RDONLY) | (0 if suid else syscalls.MS_NOSUID)
    data = _options(_escape, lower, upper, work, extra)
    if len(os.fsencode(data)) < os.sysconf("SC_PAGESIZE"):
        syscalls.mount(source, str(target), "overlay", flags, data)
        return
    with contextlib.ExitStack() as stack:

        def short(path: Path) -> str:
            fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            return str(fd)

        data = _options(short, lower, upper, work, extra)
        _in_descriptors(lambda: syscalls.mount(source, os.path.abspath(target), "overlay", flags, data))


def _in_descriptors(action: Callable[[], None]) -> None:
    """Run *action* where relative names are the numbers of this process's descriptors."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            syscalls.unshare(syscalls.CLONE_FS)  # for good, and of this thread alone
            os.chdir("/proc/self/fd")
            action()
        except BaseException as error:  # raised again in the thread that waits
            failed.append(error)

    thread = threading.Thread(target=run, name="mount overlay")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def _options(
    name: Callable[[Path], str], lower: Sequence[Path], upper: Path | None, work: Path | None, extra: Settings
) -> str:
    """The page of options, with directories as *name* has them."""
    parts = ["lowerdir=" + ":".join(name(path) for path in lower)]
    if upper is not None and work is not None:
        parts += [f"upperdir={name(upper)}", f"workdir={name(work)}"]
    parts += [key if value is None else f"{key}={value}" for key, value in extra]
    return ",".join(parts)


def _escape(path: Path) -> str:
    # In lowerdir ":" separates and "\" escapes; "," ends an option.
    return str(path).replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")
