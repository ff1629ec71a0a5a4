"""How a container's end looks to the client: a Result for what says something about the command, an error for our faults."""

import re
from dataclasses import dataclass

from afs.afslet.rootfs import Command
from afs.afslet.runc import Ended
from afs.core.errors import Internal, Unavailable
from afs.proto.v1 import afslet_pb2 as pb

TIMED_OUT, NOT_EXECUTABLE, NOT_FOUND, KILLED = 124, 126, 127, 137  # as timeout(1) and sh


@dataclass(frozen=True, slots=True)
class Subject:
    """What ran: the command's name, where (such as ``image alpine``), and its limits (seconds, bytes)."""

    name: str
    where: str
    timeout: float
    memory: int


def result_of(subject: Subject, ended: Ended) -> pb.Result:
    """The Result; Internal if the runtime could not start the container for a reason that is not the image's."""
    counters, name = ended.counters, subject.name
    if counters.machine_oom and not counters.oom and (ended.code != 0 or ended.start_error):
        raise Unavailable(f"the machine ran out of memory, and the kernel killed a process of {name!r}")
    if ended.start_error and not ended.timed_out and not counters.oom:
        return _start_failure(subject, ended)
    result = pb.Result(exit_code=ended.code, peak_memory_bytes=counters.peak_memory, cpu_time_us=counters.cpu_us)
    if ended.timed_out:
        result.exit_code, result.outcome = TIMED_OUT, pb.OUTCOME_TIMED_OUT
        result.error = f"command {name!r} timed out after {subject.timeout:g} s"
    elif counters.oom and (ended.code != 0 or ended.start_error):
        result.exit_code, result.outcome = KILLED, pb.OUTCOME_OUT_OF_MEMORY
        result.error = f"command {name!r} ran out of memory: the limit is {subject.memory >> 20} MiB"
    elif ended.signal:
        # The kernel's word. A shell whose child got a signal exits with 128 + n: that is an exit of the command's.
        result.outcome, result.signal = pb.OUTCOME_SIGNALLED, ended.signal
        result.error = f"command {name!r} was ended by signal {ended.signal}"
    else:
        result.outcome = pb.OUTCOME_EXITED
        result.success = ended.code == 0
    return result


def _start_failure(subject: Subject, ended: Ended) -> pb.Result:
    """The runtime could not start the command: the image's fault, or ours."""
    # runc says `exec: "x": ...` or `exec /x: ...`, crun `exec container process` and `executable file`; a path of ours that
    # holds the word, or runc's own `exec fifo`, is not the command.
    message = ended.start_error.lower()
    of_command = re.search(r"(^|: )exec(:| /| container process)|executable", message) is not None
    if "no such file or directory" in message and of_command:  # a script whose interpreter is missing
        return cannot_run(subject, Command(found=False, executable=False))
    if "argument list too long" in message:
        return cannot_run(
            subject, Command(found=True, executable=False, why="its arguments and environment are too long")
        )
    if "exec format error" in message or ("permission denied" in message and of_command):
        return cannot_run(subject, Command(found=True, executable=False))
    raise Internal(f"the runtime could not start the container of {subject.where}: {ended.start_error}")


def cannot_run(subject: Subject, command: Command) -> pb.Result:
    """The Result of a command that is not there or cannot be executed."""
    why = f": {command.why}" if command.why else ""
    if command.found:
        error = f"command {subject.name!r} in {subject.where} cannot be executed{why}"
        return pb.Result(exit_code=NOT_EXECUTABLE, error=error, outcome=pb.OUTCOME_COMMAND_NOT_EXECUTABLE)
    error = f"command {subject.name!r} not found in {subject.where}{why}"
    return pb.Result(exit_code=NOT_FOUND, error=error, outcome=pb.OUTCOME_COMMAND_NOT_FOUND)
