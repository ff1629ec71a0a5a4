"""Noticing that somebody reads a layer from front to back, from the chunks that readers had to wait for.

What was read ahead is read without a word to us. So the window says how far a stream may have come: a reader that waits
for a chunk in it, or for the one behind it, goes on with the stream, and the window doubles. A reader that is quicker than
the peers waits all the time, and we hear of it all the time.

State: plain values, given by one event loop. ``_streams`` has the streams seen last, the newest at the end.
"""

from dataclasses import dataclass

RUN = 8  # chunks in sequence before anything is read ahead: starting a program touches files in short runs
FIRST, MOST = 4, 64  # chunks of 256 KiB
_STREAMS = 8  # containers that read a layer at the same time


@dataclass(slots=True)
class _Stream:
    demanded: int  # the chunk demanded last
    end: int  # behind the last one that was demanded or read ahead
    run: int  # how many were demanded in sequence
    window: int = 0


class ReadAhead:
    """For one layer of *count* chunks."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._streams: list[_Stream] = []

    def demanded(self, index: int) -> range:
        """A reader waits for chunk *index*; the chunks to read ahead for it, none most of the time."""
        for stream in self._streams:
            if stream.demanded < index <= stream.end:
                break
        else:
            self._streams = [*self._streams[1 - _STREAMS :], _Stream(index, index + 1, 1)]
            return range(0)
        self._streams.remove(stream)
        self._streams.append(stream)
        stream.demanded, stream.run = index, stream.run + 1
        stream.end = max(stream.end, index + 1)
        if stream.run < RUN:
            return range(0)
        stream.window = min(max(FIRST, 2 * stream.window), MOST)
        start, stream.end = stream.end, min(max(stream.end, index + 1 + stream.window), self._count)
        return range(start, stream.end)
