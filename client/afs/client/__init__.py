"""The Python SDK of AFS: run commands in images on a cluster.

>>> from afs.client import AfsClient
>>> async with AfsClient("127.0.0.1:62051") as client:
...     result = await client.run("alpine:3.20", ["echo", "hello"])
...     print(result.exit_code, result.stdout)

``SyncAfsClient`` is the same without async. Faults of the cluster raise :class:`AfsError`; how the command itself ended
is in the result.
"""

from afs.client.aio import AfsClient
from afs.client.events import Accepted, DiffChunk, DiffStart, Done, Event, Finished, Log, Outcome, RunResult
from afs.client.sync import SyncAfsClient
from afs.core.errors import AfsError

__all__ = [
    "Accepted",
    "AfsClient",
    "AfsError",
    "DiffChunk",
    "DiffStart",
    "Done",
    "Event",
    "Finished",
    "Log",
    "Outcome",
    "RunResult",
    "SyncAfsClient",
]
