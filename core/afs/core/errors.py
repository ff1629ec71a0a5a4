"""The error tree of AFS and the one table that maps it to errno, gRPC status and exit code.

Raise the most specific class; its attributes carry the data, ``str(error)`` is one line that names the object and the
cause. Exit codes 64 to 78 follow BSD's sysexits.h, so they stay apart from what commands usually return; see
docs/exit-codes.md. This module imports nothing heavy: gRPC codes are names here, :mod:`afs.core.rpc` resolves them.
"""

import errno
from typing import NamedTuple


def one_line(text: str) -> str:
    """*text* without line breaks, and what UTF-8 cannot say escaped.

    Messages quote file names and JSON, which may hold lone surrogates; with one in its details gRPC never ends the call.
    """
    return " ".join(text.split()).encode("utf-8", "backslashreplace").decode()


class AfsError(Exception):
    """Base of every error that AFS raises on purpose."""

    @property
    def line(self) -> str:
        """The message as one line."""
        return one_line(str(self)) or type(self).__name__


class InvalidArgument(AfsError):
    """The request itself is wrong; repeating it cannot help."""


class NotFound(AfsError):
    """The named object does not exist."""


class AlreadyExists(AfsError):
    """The named object exists already."""


class FailedPrecondition(AfsError):
    """The system is not in the state that the request needs."""


class PermissionDenied(AfsError):
    """The caller, or AFS towards a registry, lacks the right."""


class ResourceExhausted(AfsError):
    """No room now: CPU, memory, disk or a configured limit. Later it may work."""


class Unavailable(AfsError):
    """A service or registry cannot be reached or asked us to come back."""


class DeadlineExceeded(AfsError):
    """The time given was not enough."""


class DataLoss(AfsError):
    """Bytes are not what their digest or format says."""


class Cancelled(AfsError):
    """The caller went away or asked to stop."""


class Unimplemented(AfsError):
    """The request asks for something that this version does not do."""


class Internal(AfsError):
    """A fault of AFS or of a program it runs; the message says which."""


class Status(NamedTuple):
    """What an error looks like outside Python."""

    errno: int
    grpc: str  # a name of grpc.StatusCode
    exit_code: int


STATUS: dict[type[AfsError], Status] = {
    InvalidArgument: Status(errno.EINVAL, "INVALID_ARGUMENT", 64),  # EX_USAGE
    DataLoss: Status(errno.EIO, "DATA_LOSS", 65),  # EX_DATAERR
    NotFound: Status(errno.ENOENT, "NOT_FOUND", 66),  # EX_NOINPUT
    FailedPrecondition: Status(errno.EPERM, "FAILED_PRECONDITION", 67),
    Unimplemented: Status(errno.ENOSYS, "UNIMPLEMENTED", 68),
    Unavailable: Status(errno.EIO, "UNAVAILABLE", 69),  # EX_UNAVAILABLE
    Internal: Status(errno.EIO, "INTERNAL", 70),  # EX_SOFTWARE
    AlreadyExists: Status(errno.EEXIST, "ALREADY_EXISTS", 73),  # EX_CANTCREAT
    DeadlineExceeded: Status(errno.ETIMEDOUT, "DEADLINE_EXCEEDED", 74),
    ResourceExhausted: Status(errno.EAGAIN, "RESOURCE_EXHAUSTED", 75),  # EX_TEMPFAIL
    Cancelled: Status(errno.ECANCELED, "CANCELLED", 76),
    PermissionDenied: Status(errno.EACCES, "PERMISSION_DENIED", 77),  # EX_NOPERM
    AfsError: Status(errno.EIO, "UNKNOWN", 70),
}


def status_of(error: BaseException) -> Status:
    """The row of the nearest ancestor of *error* in the table; a foreign exception counts as Internal."""
    for cls in type(error).__mro__:
        if cls in STATUS:
            return STATUS[cls]
    return STATUS[Internal]


def error_for_grpc(code_name: str) -> type[AfsError]:
    """The class that a gRPC status *code_name* stands for; UNKNOWN and unlisted codes give Internal."""
    for cls, status in STATUS.items():
        if status.grpc == code_name and cls is not AfsError:
            return cls
    if code_name == "UNAUTHENTICATED":
        return PermissionDenied
    return Internal
