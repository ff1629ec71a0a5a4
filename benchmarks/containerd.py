"""containerd on AFS against containerd on overlayfs: pulling, the first and later containers, requests, memory."""

from __future__ import annotations

import itertools
import re
import statistics
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from tests.testbed import oci, tars
from tests.testbed.cluster import cluster
from tests.testbed.containerd import Containerd
from tests.testbed.containerdconfig import proxy_plugin
from tests.testbed.registry import Registry
from tests.testbed.snapshots import REF, Snapshots

from afs.core.digests import chain_ids
from afs.proto.v1 import layerstore_pb2 as pb
from afs.proto.v1.layerstore_pb2_grpc import LayerstoreNodeStub
from benchmarks import measure, subjects

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.testbed.cluster import RealCluster

PULLS, RUNS, REQUESTS = 3, 31, 300
IMAGES, LAYERS = 100, 10
AFS, OVERLAYFS = "AFS", "overlayfs"
_STARGZ = "containerd.io/snapshot/remote/stargz.reference"
_PATIENCE_S = 120.0
_names = itertools.count()


def pull(name: str, samples: int | None) -> measure.Report:
    """Pull the image *name*, which another node holds, and run its work in it, with nothing of it on this node."""
    image = subjects.image(name)
    work = list(image.commands.values())[-1]
    taken: dict[str, list[float]] = {f"{what}, {on}": [] for what in ("pull", "pull + W") for on in (AFS, OVERLAYFS)}
    with Registry() as registry:
        reference = image.push(registry)
        for _ in range(samples or PULLS):
            with ExitStack() as stack:
                _, containerd = held_elsewhere(reference, stack)
                _pull_and_run(taken, AFS, containerd, reference, work)
            with Containerd() as containerd:
                _pull_and_run(taken, OVERLAYFS, containerd, reference, work)
    medians = {key: statistics.median(values) for key, values in taken.items()}
    targets = [
        measure.Target(f"pull, {AFS}", medians[f"pull, {AFS}"], 1.0, "s"),
        measure.ratio(taken, f"pull, {AFS}", f"pull, {OVERLAYFS}", 0.05),
        measure.ratio(taken, f"pull + W, {AFS}", f"pull + W, {OVERLAYFS}", 0.15),
    ]
    notes = ["Each sample has a new node, or a new containerd. The page cache was emptied before each."]
    title = f"containerd: pulling {name} and running W"
    return measure.Report(f"containerd-pull-{name}", title, measure.seconds(taken), targets, notes=notes)


def _pull_and_run(
    taken: dict[str, list[float]], on: str, containerd: Containerd, reference: str, work: Sequence[str]
) -> None:
    measure.drop_caches()
    started = time.perf_counter()
    if on == AFS:
        rpull(containerd, reference)
    else:
        subjects.ctr_pull(containerd, reference)
    taken[f"pull, {on}"].append(time.perf_counter() - started)
    ctr_run(containerd, on, reference, work)
    taken[f"pull + W, {on}"].append(time.perf_counter() - started)


def runs(name: str, samples: int | None) -> measure.Report:
    """`ctr run` of /bin/true on the image *name*, all of which was used before."""
    image = subjects.image(name)
    with Registry() as registry:
        reference = image.push(registry)
        with ExitStack() as stack:
            running, containerd = held_elsewhere(reference, stack)
            rpull(containerd, reference)
            subjects.ctr_pull(containerd, reference)
            # Layers in use become whole files of the node, behind what it does; that is not to disturb.
            containerd.ctr("run", "--detach", "--snapshotter", "afs", reference, "keep", "/bin/sleep", "1000")
            _wait_until_complete(running)
            containerd.end_containers()
            taken = measure.interleave(
                {
                    on: measure.plain(lambda on=on: ctr_run(containerd, on, reference))  # type: ignore[misc]
                    for on in (AFS, OVERLAYFS)
                },
                samples or RUNS,
                warm_up=3,
            )
    targets = [measure.ratio(taken, AFS, OVERLAYFS, 1.05)]
    title = f"containerd: `ctr run` of /bin/true on {name}, warm"
    return measure.Report(f"containerd-run-{name}", title, measure.seconds(taken), targets)


def requests(_name: str, samples: int | None) -> measure.Report:
    """What Prepare and Commit of a local layer take, and Mounts, one after the other from one client."""
    taken: dict[str, list[float]] = {"Prepare + Commit": [], "Mounts": []}
    with cluster(1, proxy=False) as running, Snapshots(running.nodes[0].run_dir / "snapshotter.sock") as client:
        parent = ""
        for number in range(samples or REQUESTS):
            started = time.perf_counter()
            client.prepare(f"key {number}", parent)
            prepared = time.perf_counter()
            client.mounts(f"key {number}")
            asked = time.perf_counter()
            client.commit(f"layer {number}", f"key {number}")
            done = time.perf_counter()
            taken["Prepare + Commit"].append(prepared - started + done - asked)
            taken["Mounts"].append(asked - prepared)
            parent = f"layer {number}" if (number + 1) % LAYERS else ""  # images of ten layers
    limits = {"Prepare + Commit": 0.005, "Mounts": 0.002}
    targets = [measure.Target(what, statistics.median(taken[what]), limit, "s") for what, limit in limits.items()]
    title = "containerd: requests for local layers"
    return measure.Report("containerd-requests", title, measure.seconds(taken), targets)


def memory(_name: str, samples: int | None) -> measure.Report:
    """Resident memory of afs_snapshotter with IMAGES images mounted, of LAYERS layers each that no other one has."""
    found: list[float] = []
    with tempfile.TemporaryDirectory(prefix="afs-bench-") as directory, Registry() as registry:
        layouts = [_small_image(Path(directory, str(number)), number) for number in range(IMAGES)]
        names = [registry.push(Path(directory, str(number)), "t", f"image{number}") for number in range(IMAGES)]
        for _ in range(samples or 1):
            with cluster(1, proxy=False) as running:
                node = running.nodes[0]
                with Snapshots(node.run_dir / "snapshotter.sock") as client:
                    for image, reference in zip(layouts, names, strict=True):
                        _mount(client, reference, image)
                    found.append(_resident_mib(node.snapshotter.popen.pid))
    what = f"afs_snapshotter with {IMAGES} images of {LAYERS} layers mounted"
    series = [measure.Series(what, "MiB", found)]
    targets = [measure.Target(what, max(found), 150.0, "MiB")]
    return measure.Report("containerd-memory", "containerd: memory", series, targets)


def _small_image(directory: Path, number: int) -> list[str]:
    """Write an image; the diff_ids of its layers, bottom first."""
    builder = oci.LayoutBuilder(directory)
    made = [tars.tar_of({f"file{layer}": f"{number} {layer}".encode()}) for layer in range(LAYERS)]
    layers = [builder.add_layer(tar) for tar in made]
    builder.add_image("t", layers)
    return [layer.diff_id for layer in layers]


def _mount(client: Snapshots, reference: str, diff_ids: Sequence[str]) -> None:
    """What containerd does for a lazily pulled image and a container on it."""
    parent = ""
    for chain_id in chain_ids(diff_ids):
        try:
            client.prepare(f"extract {next(_names)}", parent, {REF: chain_id, _STARGZ: reference})
        except grpc.RpcError as error:
            if "target snapshot" not in str(error):
                raise
        else:
            raise RuntimeError(f"{reference} was not supplied by the cluster")
        parent = chain_id
    client.prepare(f"container {next(_names)}", parent)


def _resident_mib(pid: int) -> float:
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found.group(1)) / 1024


def held_elsewhere(reference: str, stack: ExitStack) -> tuple[RealCluster, Containerd]:
    """A containerd whose node, the second of its cluster, has nothing of an image that the first one holds."""
    running = stack.enter_context(cluster(2, proxy=False))
    with _layerstore(running, 0) as stub:
        request = pb.OpenImageRequest(name=pb.ImageName(image=reference), force_local_fetch=True)
        answer = stub.OpenImage(request, timeout=600)
    assert all(layer.path for layer in answer.layers)
    socket = running.nodes[1].run_dir / "snapshotter.sock"
    return running, stack.enter_context(Containerd(proxy_plugin(socket)))


@contextmanager
def _layerstore(running: RealCluster, node: int) -> Iterator[LayerstoreNodeStub]:
    with grpc.insecure_channel(f"unix:{running.nodes[node].run_dir}/layerstore.sock") as channel:
        yield LayerstoreNodeStub(channel)


def _wait_until_complete(running: RealCluster) -> None:
    """Until the layers in use are whole files of the second node."""
    deadline = time.monotonic() + _PATIENCE_S
    with _layerstore(running, 1) as stub:
        while not all(layer.complete for layer in stub.CacheStatus(pb.CacheStatusRequest()).layers):
            if time.monotonic() > deadline:
                raise RuntimeError(f"the layers are not complete after {_PATIENCE_S:.0f} s")
            time.sleep(0.5)


def rpull(containerd: Containerd, reference: str) -> None:
    """`ctr-remote images rpull`: a pull with the labels of lazy snapshotters."""
    argv = ("images", "rpull", "--plain-http", "--snapshotter", "afs", reference)
    containerd.ctr(*argv, program="ctr-remote", timeout=600)


def ctr_run(containerd: Containerd, on: str, reference: str, command: Sequence[str] = subjects.TRUE) -> None:
    """`ctr run --rm` in a container with a name of its own."""
    containerd.ctr("run", "--rm", "--snapshotter", on.lower(), reference, f"bench{next(_names)}", *command, timeout=600)
