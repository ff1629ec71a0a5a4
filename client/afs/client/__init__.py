"""The Python SDK of AFS: run commands in images on a cluster.

>>> from afs.client import AfsClient
>>> async with AfsClient("127.0.0.1:62051") as client:
...     result = await client.run("alpine:3.20", ["echo", "hello"])
...     print(result.exit_code, result.stdout)

``SyncAfsClient`` is the same without async. How the command itself ended is in the result; a run that the cluster could
not finish raises :class:`RunError`, which is an :class:`AfsError`.
"""

from afs.client.aio import AfsClient
from afs.client.cluster import Contents, ImageInfo, LayerInfo, RunInfo
from afs.client.errors import InfrastructureError, RunCancelled, RunEnded, RunError, RunRejected
from afs.client.events import (
    Accepted,
    DiffChunk,
    DiffStart,
    Done,
    Event,
    Finished,
    Log,
    Outcome,
    Progress,
    Queued,
    RunResult,
)
from afs.client.many import Completed
from afs.client.options import RunOptions, RunRequest
from afs.client.run import Run
from afs.client.sync import SyncAfsClient, SyncRun
from afs.client.uploads import Upload
from afs.core.errors import AfsError

__all__ = [
    "Accepted",
    "AfsClient",
    "AfsError",
    "Completed",
    "Contents",
    "DiffChunk",
    "DiffStart",
    "Done",
    "Event",
    "Finished",
    "ImageInfo",
    "InfrastructureError",
    "LayerInfo",
    "Log",
    "Outcome",
    "Progress",
    "Queued",
    "Run",
    "RunCancelled",
    "RunEnded",
    "RunError",
    "RunInfo",
    "RunOptions",
    "RunRejected",
    "RunRequest",
    "RunResult",
    "SyncAfsClient",
    "SyncRun",
    "Upload",
]
