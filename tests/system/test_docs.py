"""Every command and program in README.md and docs/ runs as printed.

Only `alpine:3.20` is replaced, by an image of that name in a registry of this machine: tests have no other network.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.testbed.cluster import BIN

if TYPE_CHECKING:
    from tests.testbed.cluster import RealCluster
    from tests.testbed.images import BusyboxImage
    from tests.testbed.registry import Registry

pytestmark = pytest.mark.root
ROOT = Path(__file__).parents[2]
# containerd.md has a machine of its own: test_containerd_docs.py.
PAGES = [
    ROOT / "README.md",
    *sorted(page for page in (ROOT / "docs").glob("*.md") if page.name != "containerd.md"),
    ROOT / "CONTRIBUTING.md",
]
# What this suite is itself part of, or what needs a terminal of its own.
SKIPPED = re.compile(r"make |\. \.venv/bin/activate|afs up ")


def blocks(language: str) -> list[object]:
    """The code blocks of all pages, as test parameters."""
    return [
        pytest.param(block, id=f"{page.name}-{number}")
        for page in PAGES
        for number, block in enumerate(
            re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
        )
    ]


@pytest.fixture
def image(session_registry: Registry, busybox_image: BusyboxImage) -> str:
    """Stands for alpine:3.20."""
    return session_registry.push(busybox_image.layout, "latest", "alpine", as_tag="3.20")


@pytest.fixture
def environment(shared_cluster: RealCluster) -> dict[str, str]:
    """Programs of the virtual environment on PATH, the proxy's address, and where a node's sockets are."""
    run_dir = str(shared_cluster.nodes[0].run_dir)
    path = f"{BIN}:{os.environ['PATH']}"
    addresses = {"AFS_PROXY": shared_cluster.proxy, "AFS_PROXY_HTTP": shared_cluster.proxy_http}
    return {**os.environ, "PATH": path, **addresses, "AFS_RUN_DIR": run_dir}


@pytest.mark.parametrize("block", [block for block in blocks("sh") if "grpcd &" not in str(block)])  # see the last test
def test_commands(block: str, image: str, environment: dict[str, str], tmp_path: Path) -> None:
    lines = [line for line in block.splitlines() if not SKIPPED.match(line)]
    script = "\n".join(lines).replace("alpine:3.20", image)
    done = subprocess.run(
        ["sh", "-eux", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("block", blocks("python"))
def test_programs(
    block: str, image: str, environment: dict[str, str], tmp_path: Path, shared_cluster: RealCluster
) -> None:
    if "asyncio.run" not in block:  # README shows the body of a coroutine
        body = "\n".join(f"    {line}" for line in block.splitlines())
        block = f"import asyncio\nasync def main():\n{body}\nasyncio.run(main())\n"
    program = block.replace("alpine:3.20", image).replace("127.0.0.1:62051", shared_cluster.proxy)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "not run" not in done.stdout


@pytest.mark.parametrize(
    ("example", "arguments"),
    [
        ("one_run.py", ["{image}", "echo", "hello"]),
        ("batch.py", ["{image}", "12", "sh", "-c", "echo $NUMBER"]),
        ("sync_run.py", ["{image}", "{upload}", "sh", "-c", "cat /work/input.txt > /copy"]),
    ],
)
def test_examples(example: str, arguments: list[str], image: str, environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "upload").mkdir()
    (tmp_path / "upload" / "input.txt").write_text("data\n")
    filled = [argument.format(image=image, upload=tmp_path / "upload") for argument in arguments]
    argv = [sys.executable, str(ROOT / "examples" / example), *filled]
    done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout


def test_running_nodes_by_hand(busybox_image: BusyboxImage, tmp_path: Path) -> None:
    """The services start as docs/configuration.md says, with their default ports and directories, in namespaces of their own."""
    page = (ROOT / "docs" / "configuration.md").read_text()
    block = next(found for found in re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL) if "&\n" in found)
    setup = "ip link set lo up\n"
    for directory in ("/var/lib/afs", "/run/afs"):
        own = tmp_path / directory[1:]
        own.mkdir(parents=True)
        setup += f"mkdir -p {directory}\nmount --bind {own} {directory}\n"
    # The services come up in any order; the proxy says UNAVAILABLE (69) until it has seen the afslet.
    attempt = f"""
        for try in $(seq 100); do
            code=0; afs_cli execute --image {busybox_image.reference} -- echo it works || code=$?
            [ $code = 69 ] || break
        done
        kill -TERM $(jobs -p); wait; exit $code"""
    argv = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    script = [*argv, "bash", "-eu", "-c", setup + block + attempt]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, "it works\n"), done.stderr[-3000:]
