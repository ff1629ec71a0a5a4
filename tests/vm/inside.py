"""Runs inside the virtual machine: a cluster whose nodes differ, and the same commands on each; the last line that it
prints is a JSON object.

Usage: python -m tests.vm.inside IMAGE
"""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import os
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afs.core.mounts import list_mounts
from tests.testbed.cluster import cluster
from tests.vm.nodes import NODES

if TYPE_CHECKING:
    from tests.testbed.cluster import RealCluster

_CHANGES = "cat /work/in.txt; echo out >/work/out.txt; rm /data/hello.txt; exit 3"
COMMANDS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "changes": (["sh", "-c", _CHANGES], {}),
    "memory": (["dd", "if=/dev/zero", "of=/dev/null", "bs=200M", "count=1"], {"memory_mb": 64}),
    "timeout": (["sleep", "1000"], {"timeout": 1.0}),
    "missing": (["nothing"], {}),
    "broken": (["/work/tool"], {}),
    # Not the first process, which signals of its own namespace do not reach; a shell makes its last command that.
    "signal": (["sh", "-c", "sh -c 'kill -SEGV $$'; exit $?"], {}),
}


def main() -> None:
    """Start, run, print."""
    with cluster(0, proxy=False, cpus=2, memory_mb=800) as running:
        for number, node in enumerate(NODES, 1):
            os.environ |= {"AFS_AFSLET_RUNTIME": node.runtime, "AFS_SNAPSHOTTER_BACKEND": node.backend}
            running.start_node(number)
            _say(f"node{number} is up")
        running.restart_proxy()
        found = asyncio.run(_all(running, sys.argv[1]))
        running.assert_idle(30.0)
    print(json.dumps(found))


def _say(text: str) -> None:
    """Tell how far it got, for whoever has to find out why it took too long."""
    print(f"{time.monotonic():.1f}: {text}", flush=True)


async def _all(running: RealCluster, image: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as upload:
        Path(upload, "work").mkdir()
        Path(upload, "work/in.txt").write_text("from the client\n")
        Path(upload, "work/tool").write_text("no program\n")
        Path(upload, "work/tool").chmod(0o755)
        found = {}
        async with running.client() as client:
            for node in running.nodes:
                runs = {}
                for name, (argv, more) in COMMANDS.items():
                    options = {"memory_mb": 256, "timeout": 60.0, "upload": upload, "node_id": node.node_id, **more}
                    result = await client.run(image, argv, **options)
                    _say(f"{node.node_id}: {name}: {result.outcome.value}")
                    runs[name] = {
                        "status": [result.exit_code, result.outcome.value],
                        "stdout": result.stdout.decode(),
                        "stderr": result.stderr.decode(),
                        "error": result.error,
                        "peak_memory": result.peak_memory,
                        "cpu_time": result.cpu_time,
                        "diff": _names(result.diff or b""),
                    }
                mounts = sorted({mount.fstype for mount in list_mounts(str(node.run_dir / "l"))})
                found[node.node_id] = {"runs": runs, "layers": mounts}
    return found


def _names(diff: bytes) -> list[str]:
    if not diff:
        return []
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(diff))) as tar:
        return sorted(tar.getnames())


if __name__ == "__main__":
    main()
