"""A user namespace without processes, for mounts that show shifted owners (Documentation/filesystems/idmappings.rst)."""

import os
import sys
from pathlib import Path

from afs.core import syscalls
from afs.core.errors import FailedPrecondition
from afs.core.run import PIPE, popen


def open_user_namespace(first: int, count: int) -> int:
    """A descriptor (close-on-exec) of a new user namespace in which user and group n < *count* are *first* + n outside.

    Blocking, some 50 ms: a namespace begins with a process, and this one has threads, which forbids unshare(2). The
    descriptor keeps it when that process has ended. FailedPrecondition if the kernel allows none.
    """
    with popen([sys.executable, "-m", __name__], stdin=PIPE, stdout=PIPE, stderr=PIPE) as child:
        assert child.stdout is not None
        if not child.stdout.read(1):
            _, said = child.communicate()
            why = said.decode(errors="replace").strip().rpartition("\n")[2]
            raise FailedPrecondition(f"this kernel makes no user namespace for us: {why}")
        process = Path("/proc", str(child.pid))
        try:
            for name in ("uid_map", "gid_map"):
                (process / name).write_text(f"0 {first} {count}\n", encoding="ascii")
            namespace = os.open(process / "ns/user", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise FailedPrecondition(f"cannot map {count} ids from {first} on: {error.strerror}") from error
        finally:
            child.communicate()  # ends its input, and so the child
    return namespace


def _main() -> None:
    """The process that the namespace begins with: a byte when it is there, then nothing until the input ends."""
    syscalls.unshare(syscalls.CLONE_NEWUSER)
    os.write(1, b"+")
    os.read(0, 1)


if __name__ == "__main__":
    _main()
