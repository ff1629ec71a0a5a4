"""From the responses of a call to events."""

import json
from collections.abc import Mapping

from afs.client.events import (
    Accepted,
    DiffChunk,
    DiffStart,
    Done,
    Event,
    Finished,
    Log,
    Outcome,
    Phase,
    Progress,
    Queued,
    RunResult,
)
from afs.proto.v1 import afslet_pb2 as pb

_OUTCOMES: Mapping[int, Outcome] = {
    number: Outcome[name.removeprefix("OUTCOME_")] for name, number in pb.Outcome.items() if number
}
_PHASES: Mapping[int, Phase] = {
    pb.Progress.PHASE_IMAGE: "image",
    pb.Progress.PHASE_UPLOAD: "upload",
    pb.Progress.PHASE_RUNNING: "running",
    pb.Progress.PHASE_DIFF: "diff",
}


def event_of(response: pb.ExecuteResponse) -> Event | None:
    """The event that *response* is; None for one of a newer server."""
    match response.WhichOneof("payload"):
        case "log":
            log = response.log
            # A server of before the bytes field sends text only.
            return Log(log.source, log.data or log.message.encode(), log.truncated)
        case "accepted":
            return Accepted(response.accepted.node_id, response.accepted.run_id)
        case "result":
            return finished_of(response.result)
        case "tar_header":
            return DiffStart(response.tar_header.name)
        case "tar_chunk":
            return DiffChunk(response.tar_chunk.data)
        case "done":
            done = response.done
            return Done(_seconds(done.timings), done.diff_bytes, done.diff_entries, done.diff_error)
        case _:
            return _progress(response.progress) if response.HasField("progress") else None


def _progress(progress: pb.Progress) -> Event | None:
    if progress.phase == pb.Progress.PHASE_QUEUED:
        return Queued(progress.position, progress.queued)
    phase = _PHASES.get(progress.phase)
    return Progress(phase, progress.bytes_done, progress.bytes_total) if phase is not None else None


def finished_of(result: pb.Result) -> Finished:
    """*result* as an event."""
    return Finished(
        result.exit_code,
        _OUTCOMES.get(result.outcome, Outcome.UNKNOWN),
        result.error,
        result.signal,
        result.peak_memory_bytes,
        result.cpu_time_us / 1e6,
        _seconds(result.timings),
        result.retryable,
        result.bytes_fetched,
        result.node_id,
        result.stdout_bytes,
        result.stderr_bytes,
        result.stdout_dropped_bytes,
        result.stderr_dropped_bytes,
        result.replayed,
    )


def _seconds(timings: pb.Timings) -> dict[str, float]:
    return {field.name.removesuffix("_us"): value / 1e6 for field, value in timings.ListFields()}


def to_json(result: RunResult) -> str:
    """*result* without its diff as one line of JSON; output as text, undecodable bytes replaced."""
    document = {
        "outcome": result.outcome.value,
        "exit_code": result.exit_code,
        "signal": result.signal,
        "error": result.error,
        "node_id": result.node_id,
        "run_id": result.run_id,
        "stdout": result.stdout.decode(errors="replace"),
        "stderr": result.stderr.decode(errors="replace"),
        "stdout_bytes": result.stdout_bytes,
        "stderr_bytes": result.stderr_bytes,
        "stdout_dropped_bytes": result.stdout_dropped,
        "stderr_dropped_bytes": result.stderr_dropped,
        "peak_memory_bytes": result.peak_memory,
        "cpu_time_s": result.cpu_time,
        "bytes_fetched": result.bytes_fetched,
        "timings_s": result.timings,
        "diff_bytes": result.diff_bytes,
        "diff_entries": result.diff_entries,
        "diff_error": result.diff_error,
        "replayed": result.replayed,
        "attempts": result.attempts,
    }
    return json.dumps(document)
