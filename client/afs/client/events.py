"""What a run sends back, as plain typed values."""

import enum
from dataclasses import dataclass, field
from typing import Literal


class Outcome(enum.Enum):
    """Why a run ended. Only EXITED says something about the command's own success.

    The last three are faults: they come with a :class:`~afs.client.RunError`, never as a result.
    """

    EXITED = "exited"
    SIGNALLED = "signalled"
    TIMED_OUT = "timed out"
    OUT_OF_MEMORY = "out of memory"
    COMMAND_NOT_FOUND = "command not found"
    COMMAND_NOT_EXECUTABLE = "command not executable"
    CANCELLED = "cancelled"  # by the client, or by somebody else
    REJECTED = "rejected"  # never started: the request is wrong, or there is no room
    INFRASTRUCTURE_ERROR = "infrastructure error"  # a fault of AFS, a registry or a node
    UNKNOWN = "unknown"  # a server older than outcomes


@dataclass(frozen=True, slots=True)
class Queued:
    """The run waits for room: *position* 1 is next of *queued*. 0: not known."""

    position: int
    queued: int


Phase = Literal["image", "upload", "running", "diff"]


@dataclass(frozen=True, slots=True)
class Progress:
    """What the node is doing. *done* and *total* are bytes; a *total* of 0 is not known."""

    phase: Phase
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Accepted:
    """A node took the run. *run_id* is what :meth:`AfsClient.cancel` and :meth:`AfsClient.runs` call it."""

    node_id: str
    run_id: str = ""


@dataclass(frozen=True, slots=True)
class Log:
    """Bytes that the command wrote to *source*: ``stdout`` or ``stderr``. In order within each.

    *truncated*: the stream has reached ``max_output_bytes``; nothing of it follows.
    """

    source: str
    data: bytes
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class Finished:
    """How a run ended. Times are in seconds, sizes in bytes; *error* is one line, empty after an exit.

    *retryable* is about faults alone: the same request may succeed later, or on another node. *bytes_fetched* came from
    other nodes for the image. *stdout_bytes* and *stderr_bytes* include what was dropped. *replayed*: the run had ended
    before, under the same idempotency key; its output and diff do not come again.
    """

    exit_code: int
    outcome: Outcome
    error: str
    signal: int = 0
    peak_memory: int = 0
    cpu_time: float = 0.0
    timings: dict[str, float] = field(default_factory=dict)
    retryable: bool = False
    bytes_fetched: int = 0
    node_id: str = ""
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    stdout_dropped: int = 0
    stderr_dropped: int = 0
    replayed: bool = False


@dataclass(frozen=True, slots=True)
class DiffStart:
    """The changed files follow, as one compressed tar in the form of an OCI layer."""

    name: str


@dataclass(frozen=True, slots=True)
class DiffChunk:
    """The next bytes of it."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Done:
    """Everything was sent, and the node has given back all that the run took.

    *diff_error* says why the diff is not whole; it is empty if it is. *diff_bytes* are of the compressed diff.
    """

    timings: dict[str, float] = field(default_factory=dict)
    diff_bytes: int = 0
    diff_entries: int = 0
    diff_error: str = ""


Event = Queued | Progress | Accepted | Log | Finished | DiffStart | DiffChunk | Done


@dataclass(frozen=True, slots=True)
class RunResult:
    """A whole run; see :class:`Finished` for units.

    *diff* is None if it was written to a file, was not asked for, or is not whole: then *diff_error* says why, and there is
    no file either. *attempts*: how many times the run was tried.
    """

    node_id: str
    exit_code: int
    outcome: Outcome
    error: str
    stdout: bytes
    stderr: bytes
    diff: bytes | None
    peak_memory: int
    cpu_time: float
    timings: dict[str, float]
    signal: int = 0
    run_id: str = ""
    bytes_fetched: int = 0
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    stdout_dropped: int = 0
    stderr_dropped: int = 0
    replayed: bool = False
    diff_bytes: int = 0
    diff_entries: int = 0
    diff_error: str = ""
    attempts: int = 1

    @property
    def ok(self) -> bool:
        """Whether the command exited with 0."""
        return self.outcome is Outcome.EXITED and self.exit_code == 0
