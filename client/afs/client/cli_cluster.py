"""``afs_cli`` about the cluster: its nodes, what they hold, what they run."""

import asyncio
import json
import time
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from afs.client.aio import AfsClient
from afs.client.cluster import RunInfo
from afs.core.cli import fail
from afs.core.errors import AfsError, Unavailable
from afs.core.units import format_size
from afs.proto.v1 import proxy_pb2 as pb

if TYPE_CHECKING:
    from rich.table import Table

T = TypeVar("T")


def ask(work: Coroutine[Any, Any, T]) -> T:
    """The result of *work*; an AfsError ends the program."""
    try:
        return asyncio.run(work)
    except AfsError as error:
        fail("afs_cli", error)


async def show_status(proxy: str, *, as_json: bool) -> None:
    """The nodes, once, a line each."""
    async with AfsClient(proxy) as client:
        for response in await client.status():
            click.echo(_json(response) if as_json else "\n".join(status_lines(response)))


def _json(response: pb.StatusResponse) -> str:
    from google.protobuf.json_format import MessageToJson

    return MessageToJson(response, indent=None, preserving_proto_field_name=True)


def status_lines(response: pb.StatusResponse) -> list[str]:
    """*response* for people."""
    match response.WhichOneof("payload"):
        case "summary":
            return _summary_lines(response.summary)
        case "layerstore":
            store = response.layerstore
            size = format_size(sum(layer.afs_size for layer in store.layers))
            return [f"layerstore {store.node_id} {store.endpoint}: {len(store.layers)} layers, {size}"]
        case "afslet":
            node = response.afslet
            name = f"afslet {node.node_id} {node.endpoint}" if node.node_id else f"afslet {node.endpoint}"
            if not node.reachable:
                return [f"{name}: {node.error}"]
            more = f", {node.queued_runs} wait" if node.queued_runs else ""
            drains = ", draining" if node.draining else ""
            return [
                f"{name}: {node.running_containers} running{more}, {_cpus(node)} CPUs, {_memory(node)} in use{drains}"
            ]
        case "error":
            return [f"{response.error.source}: {response.error.message}"]
        case _:
            return []


def _summary_lines(summary: pb.StatusSummary) -> list[str]:
    stores = f"{summary.layerstore_instances} layerstores, {summary.total_layers} layers"
    lines = [f"{stores}; {summary.afslet_reachable} of {summary.afslet_instances} afslets answer"]
    if summary.running or summary.queued or summary.peers_queued:
        others = f", {summary.peers_queued} at other proxies" if summary.peers_queued else ""
        lines.append(f"{summary.running} runs under way, {summary.queued} wait for room{others}")
    lines += [f"tenant {t.tenant or '-'}: {t.running} under way, {t.queued} wait" for t in summary.tenants]
    return lines


def _cpus(node: pb.AfsletInstance) -> str:
    if node.limit_cpu_millis:
        return f"{node.used_cpu_millis / 1000:g} of {node.limit_cpu_millis / 1000:g}"
    return f"{node.used_cpu_cores} of {node.limit_cpu_cores}"  # a server older than fractions


def _memory(node: pb.AfsletInstance) -> str:
    return f"{node.used_memory_mb} of {node.limit_memory_mb} MiB"


async def watch(proxy: str, interval: float) -> None:
    """The nodes, again and again: a table that is drawn anew on a terminal, else lines with an empty one between."""
    from rich.console import Console
    from rich.live import Live

    console = Console()
    async with AfsClient(proxy) as client:
        rounds = client.watch_status(interval)
        if not console.is_terminal:
            async for responses in rounds:
                click.echo("\n".join(line for response in responses for line in status_lines(response)) + "\n")
            return
        with Live(console=console, auto_refresh=False) as live:
            while True:
                try:
                    async for responses in rounds:
                        live.update(table(responses), refresh=True)
                except Unavailable as error:  # it may come back
                    live.update(error.line, refresh=True)
                await asyncio.sleep(interval)
                rounds = client.watch_status(interval)


def table(responses: Sequence[pb.StatusResponse]) -> "Table":
    """One round of the status as a table of nodes."""
    from rich.table import Table

    stores = {r.layerstore.node_id: r.layerstore for r in responses if r.HasField("layerstore")}
    title = [line for r in responses if r.HasField("summary") or r.HasField("error") for line in status_lines(r)]
    shown = Table(title="\n".join(title), title_justify="left", caption=time.strftime("%H:%M:%S"))
    for column in ("node", "endpoint", "runs", "wait", "CPUs", "memory", "layers", "state"):
        shown.add_column(column, justify="right" if column in ("runs", "wait", "CPUs", "memory", "layers") else "left")
    for response in responses:
        if not response.HasField("afslet"):
            continue
        node = response.afslet
        store = stores.pop(node.node_id, None)
        state = "draining" if node.draining else "ok" if node.reachable else node.error
        figures = (str(node.running_containers), str(node.queued_runs), _cpus(node), _memory(node))
        shown.add_row(node.node_id or "?", node.endpoint, *figures, _held(store), state)
    for store in stores.values():  # layerstores without an afslet that says its name
        shown.add_row(store.node_id, store.endpoint, "", "", "", "", _held(store), "layerstore")
    return shown


def _held(store: pb.LayerstoreInstance | None) -> str:
    return f"{len(store.layers)}, {format_size(sum(layer.afs_size for layer in store.layers))}" if store else ""


async def show_contents(proxy: str, *, layers: bool, as_json: bool) -> None:
    """The images (or layers) of the cluster, and the nodes that have them."""
    async with AfsClient(proxy) as client:
        contents = await client.contents()
    if layers:
        for layer in contents.layers:
            document = {"digest": layer.digest, "bytes": layer.size, "nodes": layer.node_ids}
            line = f"{layer.digest}  {format_size(layer.size):>10}  {', '.join(layer.node_ids)}"
            click.echo(json.dumps(document) if as_json else line)
        return
    width = max((len(image.name) for image in contents.images), default=0)
    for image in contents.images:
        document = {"image": image.name, "nodes": image.node_ids}
        click.echo(json.dumps(document) if as_json else f"{image.name:{width}}  {', '.join(image.node_ids)}")


async def show_runs(proxy: str, *, as_json: bool) -> None:
    """What is queued or under way."""
    async with AfsClient(proxy) as client:
        runs = await client.runs()
    if as_json:
        for run in runs:
            click.echo(json.dumps(_run_document(run)))
        return
    rows = [("RUN", "NODE", "PHASE", "SECONDS", "CPUS", "MIB", "TENANT", "IMAGE", "COMMAND")]
    now = time.time()
    for run in sorted(runs, key=lambda run: run.started):
        figures = (f"{max(0, now - run.started):.0f}", f"{run.cpu:g}", str(run.memory_mb))
        rows.append(
            (run.run_id, run.node_id or "-", run.phase, *figures, run.tenant or "-", run.image, " ".join(run.command))
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def _run_document(run: RunInfo) -> dict[str, object]:
    return {
        "run_id": run.run_id,
        "node_id": run.node_id,
        "phase": run.phase,
        "image": run.image,
        "command": run.command,
        "started_unix": run.started,
        "cpu": run.cpu,
        "memory_mb": run.memory_mb,
        "tenant": run.tenant,
        "owner": run.owner,
        "labels": run.labels,
    }


async def cancel_runs(proxy: str, run_ids: Sequence[str], reason: str) -> None:
    """End runs, in order."""
    async with AfsClient(proxy) as client:
        for run_id in run_ids:
            await client.cancel(run_id, reason)


async def reconcile_image(proxy: str, image: str, replicas: int) -> tuple[int, bool]:
    """Copy *image* to more nodes and print who has its layers; how many nodes have all, and whether that is enough."""
    async with AfsClient(proxy) as client:
        answer = await client.reconcile(image, replicas)
    for layer in answer.layers:
        click.echo(f"{layer.digest}: {', '.join(target.node_id for target in layer.instances)}")
    return answer.current_replica, answer.ensured
