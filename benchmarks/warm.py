"""A warm run of /bin/true: AFS against bare runc in the same root, and against containerd."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import resource
import subprocess
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tests.testbed.cluster import cluster
from tests.testbed.containerd import Containerd
from tests.testbed.registry import Registry

from afs.afslet.__main__ import MAX_FILES
from afs.afslet.bundle import CAPABILITIES, Process, Sandbox, merge_env, runtime_config
from afs.afslet.cgroups import clean_up
from afs.afslet.rootfs import User
from afs.afslet.seccomp import load_filter, native_only
from afs.proto.v1.mounts_pb2 import OpenImage
from afs.snapshotter.client import Mounts
from benchmarks import measure, subjects

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SAMPLES = 25
WARM_UP = 3
NODE = "node1"
AFS, PINNED, DIRECT, CLI = "AFS, SDK", "AFS, SDK, one node", "AFS, SDK, no proxy", "AFS, afs_cli"
BARE, CTR = "bare runc", "ctr run"


def run(name: str, samples: int | None) -> measure.Report:
    """Measure with the image *name*."""
    image = subjects.image(name)
    with ExitStack() as stack:
        registry = stack.enter_context(Registry())
        reference = image.push(registry)
        running = stack.enter_context(cluster(2))
        containerd = stack.enter_context(Containerd())
        subjects.ctr_pull(containerd, reference)
        proxy = stack.enter_context(subjects.connected(running.proxy))
        direct = stack.enter_context(subjects.connected(running.nodes[0].afslet.address, proxy=False))
        for node in running.nodes:
            proxy.run(reference, node=node.node_id)

        def cli() -> None:
            done = running.cli("execute", "--image", reference, "--", *subjects.TRUE)
            assert done.returncode == 0, done.stderr

        taken = measure.interleave(
            {
                AFS: measure.plain(lambda: proxy.run(reference)),
                PINNED: measure.plain(lambda: proxy.run(reference, node=NODE)),
                DIRECT: measure.plain(lambda: direct.run(reference)),
                CLI: measure.plain(cli),
                BARE: measure.plain(stack.enter_context(bare_runc(running.nodes[0].run_dir, reference))),
                CTR: measure.plain(lambda: subjects.ctr_run(containerd, reference)),
            },
            samples or SAMPLES,
            warm_up=WARM_UP,
        )
    targets = [
        measure.ratio(taken, subject, peer, limit)
        for subject in (AFS, PINNED)
        for peer, limit in ((BARE, 2.0), (CTR, 0.6))
    ]
    return measure.Report(f"warm-{name}", f"A warm run of /bin/true in {name}", measure.seconds(taken), targets)


@contextmanager
def bare_runc(run_dir: Path, reference: str, label: str = "") -> Iterator[Callable[[], None]]:
    """`runc run` in a root that the node's snapshotter mounts, with the configuration that afslet writes."""
    parent, names = f"afs-bench{label}-{os.getpid()}", itertools.count()
    with _mounted(run_dir, reference) as (root, image), tempfile.TemporaryDirectory(prefix="afs-bench-") as directory:
        user = User(0, 0, (), "/root")
        process = Process(subjects.TRUE, merge_env(image.get("Env") or (), (), {"HOME": user.home}), "/", user)
        files = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], MAX_FILES)
        found = load_filter("", CAPABILITIES)
        config = runtime_config(process, root, Sandbox(files, seccomp=native_only(found) if found else None))

        def act() -> None:
            name = f"bench{next(names)}"
            config["linux"]["cgroupsPath"] = f"/{parent}/{name}"
            Path(directory, "config.json").write_text(json.dumps(config))
            argv = ["runc", "--root", f"{directory}/state", "run", "--bundle", directory, name]
            done = subprocess.run(argv, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr

        try:
            yield act
        finally:
            clean_up(parent)


@contextmanager
def _mounted(run_dir: Path, reference: str) -> Iterator[tuple[str, dict[str, list[str]]]]:
    """A root of the image and the image's settings."""
    with asyncio.Runner() as runner:

        async def make() -> Mounts:
            return Mounts(f"unix:{run_dir}/mounts.sock")

        mounts = runner.run(make())
        holding = mounts.holding()
        hold = runner.run(holding.__aenter__())
        try:
            opened = runner.run(hold.open(OpenImage(image=reference)))
            root = runner.run(hold.mount())
            yield str(root.path), json.loads(opened.config)["config"]
        finally:
            runner.run(holding.__aexit__(None, None, None))
            runner.run(mounts.close())
