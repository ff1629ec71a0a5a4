"""The processes that pull layers, with real processes."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from afs.core.errors import Internal
from afs.layerstore.afslyr.reader import read_layer
from afs.layerstore.manifests import Layer
from afs.layerstore.pullworker import encode_options
from afs.layerstore.registryoptions import RegistryOptions
from afs.layerstore.workers import Workers
from tests.testbed import oci, tars

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@asynccontextmanager
async def workers(most: int) -> AsyncIterator[Workers]:
    """Started ones; none is left at the end."""
    running = Workers(most)
    await running.start()
    try:
        yield running
    finally:
        await running.close()
        assert not running._all


def job(tmp_path: Path) -> tuple[dict[str, Any], oci.Layer]:
    """A pull from a layout, and the layer that it pulls."""
    layer = oci.LayoutBuilder(tmp_path / "layout").add_layer(tars.tar_of({"file": b"content"}), "gzip")
    wanted = Layer(layer.diff_id, layer.digest, layer.size, layer.media_type)
    image = f"oci:{tmp_path}/layout:tag"
    values = {"image": image, "layer": dataclasses.asdict(wanted), "out": str(tmp_path / "out")}
    return {**values, "registry": encode_options(RegistryOptions()), "grants": []}, layer


async def test_a_job_makes_a_layer(tmp_path: Path) -> None:
    async with workers(1) as running:
        wanted, layer = job(tmp_path)
        answer = await running.run(wanted)
    assert answer["done"]["diff_id"] == layer.diff_id
    fd = os.open(tmp_path / "out", os.O_RDONLY)
    try:
        assert read_layer(fd)[0].diff_id == layer.diff_id
    finally:
        os.close(fd)


async def test_errors_come_as_answers(tmp_path: Path) -> None:
    async with workers(1) as running:
        wanted, _ = job(tmp_path)
        wanted["layer"]["diff_id"] = "sha256:" + "0" * 64
        answer = await running.run(wanted)
    assert (answer["status"], answer["errno"]) == ("DATA_LOSS", None)
    assert not (tmp_path / "out").exists()


async def test_a_process_that_died_idle_is_replaced(tmp_path: Path) -> None:
    async with workers(2) as running:
        for child in list(running._all):
            child.kill()
            child.wait()
        assert "done" in await running.run(job(tmp_path)[0])


async def test_a_process_that_dies_in_its_job_is_an_error_of_that_job(tmp_path: Path) -> None:
    async with workers(1) as running:
        (child,) = running._all
        child.send_signal(signal.SIGSTOP)  # so that the job is not done before it is killed
        task = asyncio.create_task(running.run(job(tmp_path)[0]))
        while child not in running._used:  # noqa: ASYNC110 - a few turns of this loop
            await asyncio.sleep(0)
        child.kill()
        with pytest.raises(Internal, match="died with status -9"):
            await task
        assert "done" in await running.run(job(tmp_path)[0])


async def test_cancelling_a_job_kills_its_process(tmp_path: Path) -> None:
    async with workers(1) as running:
        (child,) = running._all
        child.send_signal(signal.SIGSTOP)
        task = asyncio.create_task(running.run(job(tmp_path)[0]))
        while child not in running._used:  # noqa: ASYNC110 - a few turns of this loop
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert child.returncode == -signal.SIGKILL
        assert "done" in await running.run(job(tmp_path)[0])


async def _steps(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_the_limit_is_for_the_job_not_for_the_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, ahead = asyncio.get_running_loop(), 0.0
    real = loop.time
    monkeypatch.setattr(loop, "time", lambda: real() + ahead, raising=False)
    async with workers(1) as running:
        (child,) = running._all
        child.send_signal(signal.SIGSTOP)
        wanted = job(tmp_path)[0]
        first = asyncio.create_task(running.run(wanted, 10_000.0))
        second = asyncio.create_task(running.run({**wanted, "out": str(tmp_path / "out2")}, 1000.0))
        await _steps(20)
        ahead = 5000.0
        await _steps(20)  # for a timer to end it
        assert not second.done(), "the only process has another job"
        child.send_signal(signal.SIGCONT)
        assert "done" in await first
        assert "done" in await second
        (child,) = running._all
        child.send_signal(signal.SIGSTOP)
        running._used.clear()
        third = asyncio.create_task(running.run(wanted, 1000.0))
        await _steps(20)
        assert running._used
        ahead = 10_000.0
        with pytest.raises(TimeoutError):
            await third
        assert child.returncode is not None


async def test_a_check_vouches_for_a_file(tmp_path: Path) -> None:
    async with workers(1) as running:
        wanted, _ = job(tmp_path)
        assert "done" in await running.run(wanted)
        assert await running.run({"check": wanted["out"]}) == {"done": {}}
        out = tmp_path / "out"
        whole = out.read_bytes()
        out.write_bytes(whole[:5000] + b"damage" + whole[5006:])
        answer = await running.run({"check": wanted["out"]})
        assert (answer["status"], "chunk 0" in answer["error"]) == ("DATA_LOSS", True)
