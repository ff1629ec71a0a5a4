"""What a run sends back, as plain typed values."""

import enum
from dataclasses import dataclass, field


class Outcome(enum.Enum):
    """Why a run ended. Only EXITED says something about the command's own success."""

    EXITED = "exited"
    SIGNALLED = "signalled"
    TIMED_OUT = "timed out"
    OUT_OF_MEMORY = "out of memory"
    COMMAND_NOT_FOUND = "command not found"
    COMMAND_NOT_EXECUTABLE = "command not executable"
    UNKNOWN = "unknown"  # a server older than outcomes


@dataclass(frozen=True, slots=True)
class Accepted:
    """A node took the run."""

    node_id: str


@dataclass(frozen=True, slots=True)
class Log:
    """Bytes that the command wrote to *source*: ``stdout`` or ``stderr``. In order within each."""

    source: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Finished:
    """The command ended. Times are in seconds, sizes in bytes; *error* is one line, empty after an exit."""

    exit_code: int
    outcome: Outcome
    error: str
    signal: int = 0
    peak_memory: int = 0
    cpu_time: float = 0.0
    timings: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DiffStart:
    """The changed files follow, as one gzip-compressed tar in the form of an OCI layer."""

    name: str


@dataclass(frozen=True, slots=True)
class DiffChunk:
    """The next bytes of it."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Done:
    """Everything was sent, and the node has given back all that the run took."""


Event = Accepted | Log | Finished | DiffStart | DiffChunk | Done


@dataclass(frozen=True, slots=True)
class RunResult:
    """A whole run. *diff* is None if it was written to a file."""

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

    @property
    def ok(self) -> bool:
        """Whether the command exited with 0."""
        return self.outcome is Outcome.EXITED and self.exit_code == 0
