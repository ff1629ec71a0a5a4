"""The command's output as messages: bytes, apart and in order within each stream, with a cap."""

import codecs
from dataclasses import dataclass

from afs.proto.v1 import afslet_pb2 as pb

SOURCES = ("stdout", "stderr")


@dataclass(slots=True)
class _Stream:
    written: int = 0
    dropped: int = 0
    marked: bool = False


class Outputs:
    """Counts and caps; *most* is in bytes per stream, 0 for no limit.

    *text*: messages have the text as well, for old clients. A read may end within a character, so there is one decoder
    per stream.
    """

    def __init__(self, most: int, *, text: bool) -> None:
        self._most = most
        self._streams = {source: _Stream() for source in SOURCES}
        self._decoders = (
            {source: codecs.getincrementaldecoder("utf-8")("replace") for source in SOURCES} if text else None
        )

    def message(self, source: str, data: bytes) -> pb.ExecuteResponse | None:
        """What the client gets of *data*; None if nothing. The command never waits for what is dropped."""
        stream = self._streams[source]
        stream.written += len(data)
        if self._most and stream.written > self._most:
            kept = max(len(data) - (stream.written - self._most), 0)
            stream.dropped += len(data) - kept
            data = data[:kept]
            if stream.marked:
                return None
            stream.marked = True
        text = self._decoders[source].decode(data) if self._decoders is not None else ""
        log = pb.LogMessage(source=source, message=text, data=data, truncated=stream.marked)
        return pb.ExecuteResponse(log=log)

    def report(self, result: pb.Result) -> None:
        """Put the sums into *result*."""
        out, err = self._streams["stdout"], self._streams["stderr"]
        result.stdout_bytes, result.stdout_dropped_bytes = out.written, out.dropped
        result.stderr_bytes, result.stderr_dropped_bytes = err.written, err.dropped
