"""Pulling a whole image from a registry: AFS against `ctr images pull`, which unpacks to overlayfs."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import grpc
from tests.testbed.cluster import cluster
from tests.testbed.containerd import Containerd
from tests.testbed.registry import Registry

from afs.proto.v1 import layerstore_pb2 as pb
from afs.proto.v1.layerstore_pb2_grpc import LayerstoreNodeStub
from benchmarks import measure, subjects

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SAMPLES = {"debian": 5, "img4": 3}
LIMIT = 0.2
CTR = "ctr images pull"


def run(name: str, samples: int | None) -> measure.Report:
    """Measure with the image *name*, to all of its layers being complete on disk."""
    image = subjects.image(name)
    dropped = measure.drop_caches()
    with Registry() as registry:
        reference = image.push(registry)
        taken = measure.interleave(
            {"AFS": lambda: _afs(reference), CTR: lambda: _ctr(reference)}, samples or SAMPLES[name]
        )
    cache = "The page cache was emptied before each sample." if dropped else "The page cache could not be emptied."
    targets = [measure.ratio(taken, "AFS", CTR, LIMIT)]
    return measure.Report(f"pull-{name}", f"Pulling all of {name}", measure.seconds(taken), targets, notes=[cache])


@contextmanager
def _afs(reference: str) -> Iterator[Callable[[], object]]:
    """A node that has nothing yet."""
    with cluster(1) as running:
        socket = running.nodes[0].run_dir / "layerstore.sock"
        with grpc.insecure_channel(f"unix:{socket}") as channel:
            stub = LayerstoreNodeStub(channel)
            request = pb.OpenImageRequest(name=pb.ImageName(image=reference), force_local_fetch=True)
            measure.drop_caches()
            yield lambda: _all_complete(stub.OpenImage(request, timeout=600))


def _all_complete(answer: pb.OpenImageResponse) -> None:
    if not answer.layers or not all(layer.path for layer in answer.layers):
        raise RuntimeError("the layerstore did not pull every layer")


@contextmanager
def _ctr(reference: str) -> Iterator[Callable[[], object]]:
    """A containerd that has nothing yet."""
    with Containerd() as containerd:
        measure.drop_caches()
        yield lambda: subjects.ctr_pull(containerd, reference)
