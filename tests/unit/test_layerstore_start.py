"""What a layerstore does at its start, and in which order."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc.aio

from afs.layerstore.__main__ import Config, serve
from afs.layerstore.leases import Leases
from afs.proto.v1 import layerstore_pb2 as pb
from afs.proto.v1.layerstore_pb2_grpc import LayerstoreNodeStub

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


async def test_the_time_to_report_begins_before_anybody_can_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a slow start would eat up the time that the snapshotter has, and what is mounted would count as free."""
    run, begun, ready, stop = tmp_path / "run", [], asyncio.Event(), asyncio.Event()
    real = Leases.serve

    def begin(self: Leases) -> None:
        begun.append(sorted(path.name for path in run.iterdir()))
        real(self)

    monkeypatch.setattr(Leases, "serve", begin)
    monkeypatch.setattr("afs.layerstore.__main__.notify", lambda state: ready.set())
    config = Config(
        root=tmp_path / "root", run_dir=run, listen="127.0.0.1:0", discovery="127.0.0.1:1", docker_config=tmp_path
    )
    serving = asyncio.create_task(serve(config, stop))
    await asyncio.wait([serving, asyncio.create_task(ready.wait())], return_when=asyncio.FIRST_COMPLETED)
    assert not serving.done(), serving
    assert begun == [["layerstore.lock"]]
    assert {"fill.sock", "layerstore.sock"} <= {path.name for path in run.iterdir()}
    async with grpc.aio.insecure_channel(f"unix:{run}/layerstore.sock") as channel:
        assert not (await LayerstoreNodeStub(channel).CacheStatus(pb.CacheStatusRequest())).layers
    stop.set()
    await serving
