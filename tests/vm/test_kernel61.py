"""Debian 12's kernel, 6.1: no EROFS on files, no overlayfs that takes descriptors, and cgroup v2 alone.

All tests but the last share one virtual machine. What they leave behind in it goes with it.
"""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.testbed import capabilities, vmimages
from tests.testbed.vm import VM, VMError
from tests.vm.nodes import NODES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.testbed.images import BusyboxImage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
LAYOUT = Path("/images/busybox")
HANGS_S = 900.0  # how long the parts may take that take a minute on an idle machine


@pytest.fixture(scope="module")
def images(cache_dir: Path) -> vmimages.Images:
    """The kernel and its disks."""
    capabilities.require("qemu")
    return vmimages.images(cache_dir, vmimages.kernel(cache_dir, "bookworm", "linux-image-cloud-amd64"))


@pytest.fixture(scope="module")
def vm(images: vmimages.Images, busybox_image: BusyboxImage) -> Iterator[VM]:
    """The machine, with an image of busybox in it."""
    with VM(images, {LAYOUT: busybox_image.layout}) as running:
        yield running


def test_the_machine(vm: VM) -> None:
    assert vm.run(["uname", "-r"]).checked().startswith("6.1.")
    hierarchies = vm.shell("grep -c cgroup /proc/self/mountinfo; findmnt -n -o FSTYPE /sys/fs/cgroup").checked()
    assert hierarchies.split() == ["1", "cgroup2"]
    assert vm.run(["sh", "-c", "echo said; exit 7"]) == vm.shell("echo said; exit 7")
    assert vm.run(["sleep", "1000"], timeout=1).code == 124


def test_erofs_takes_no_file(vm: VM) -> None:
    script = """
from tests.testbed import mounts
try:
    mounts.mount("/root/image", "/mnt", "erofs", read_only=True)
except OSError as error:
    print(error.errno)
"""
    vm.shell("mkdir -p /mnt && mkfs.erofs /root/image /etc").checked()
    assert vm.python("-c", script).checked() == f"{errno.ENOTBLK}\n"
    vm.shell("mount -o loop /root/image /mnt && umount /mnt").checked()


PROBE = """
import json
from pathlib import Path
from afs.snapshotter.overlay import best_way
from afs.snapshotter.probe import probe
Path("/run/probe").mkdir()
trials = probe(Path("/var/lib/afs"), Path("/run/probe"))
found = {f"{trial.backend} {'lazy' if trial.lazy else 'complete'}": trial.reason for trial in trials}
print(json.dumps({"backends": found, "overlay": best_way()}))
"""


def test_what_the_probes_find(vm: VM) -> None:
    found = json.loads(vm.python("-W", "error", "-c", PROBE).checked().splitlines()[-1])
    reasons: dict[str, str] = found["backends"]
    # The stable 6.1 (here 6.1.176) has taken over the change of 6.4 that lets EROFS have blocks of 512 bytes.
    assert {name for name, reason in reasons.items() if not reason} == {
        *("erofs-loop complete", "erofs-loop lazy"),
        *("tree complete", "tree lazy"),
    }
    assert all("from Linux 6.12 on" in reason for reason in reasons.values() if reason)
    assert found["overlay"] == "page"


LIMITS = [
    "test_as_much_can_be_written_as_was_asked_for",
    "test_the_next_root_sees_nothing_of_the_last",
    "test_a_damaged_one_is_dropped",
    "test_a_full_disk_is_told_to_the_writer",
]
# The rest of those files is too slow in there, or its reference is not right: tmpfs keeps no user xattrs before 6.6.
BACKENDS = [
    "test_every_kind_of_entry_is_as_it_was_packed[tree-lazy]",
    *(
        f"test_marks_hide_what_is_below_in_an_overlay[{kind}-opaque-root]"
        for kind in ("tree-complete", "erofs-loop-lazy")
    ),
    *(f"test_files_can_be_mapped_and_run[{kind}]" for kind in ("tree-lazy", "erofs-loop-lazy")),
    *(f"test_direct_reads[{kind}]" for kind in ("tree-complete", "tree-lazy", "erofs-loop-complete")),
    "test_what_cannot_be_read_is_an_error_and_never_zeros[erofs-loop-lazy]",
    "test_open_files_outlive_eviction[tree-lazy]",
]
INSIDE = [
    "tests/fs/test_afslet_cgroups.py",
    "tests/fs/test_afslet_diff.py::test_every_kind_of_change",
    "tests/fs/test_overlay.py::test_128_layers_below_a_long_directory[page]",
    *(f"tests/fs/test_scratch_slots.py::{name}" for name in LIMITS),
    *(f"tests/fs/test_backends.py::{name}" for name in BACKENDS),
    "tests/system/test_commands.py::test_afs_runc",
    "tests/system/test_commands.py::test_afs_runc_interrupted",
    "tests/system/test_commands.py::test_afs_runc_with_crun",
]


def test_mounts_and_limits(vm: VM) -> None:
    """Tests of both that run here anyway, once more in there, where nothing they need may be missing."""
    arguments = ["-q", "-p", "no:cacheprovider", "-o", "timeout=300", "--durations=0"]
    done = vm.python("-m", "pytest", *arguments, *INSIDE, timeout=HANGS_S, env={"CI": "true"})
    assert done.code == 0, done.output[-8000:]
    print(done.output)
    assert "skipped" not in done.output, done.output[-3000:]


@pytest.fixture(scope="module")
def runs(vm: VM) -> dict[str, Any]:
    """What the same commands did on each node."""
    done = vm.python("-m", "tests.vm.inside", f"oci:{LAYOUT}:latest", timeout=HANGS_S)
    found: dict[str, Any] = json.loads(done.checked().splitlines()[-1])
    return found


@pytest.mark.parametrize("number", range(len(NODES)), ids=[f"{node.runtime}-{node.backend}" for node in NODES])
def test_runs(runs: dict[str, Any], number: int) -> None:
    node = runs[f"node{number + 1}"]
    assert node["layers"] == [NODES[number].layers]
    found = node["runs"]
    assert {name: run["status"] for name, run in found.items()} == {
        "changes": [3, "exited"],
        "memory": [137, "out of memory"],
        "timeout": [124, "timed out"],
        "missing": [127, "command not found"],
        "broken": [126, "command not executable"],
        "signal": [139, "exited"],
    }
    assert found["changes"]["stdout"] == "from the client\n"
    assert found["changes"]["diff"] == ["data", "data/.wh.hello.txt", "work", "work/out.txt"]
    assert 32 << 20 < found["memory"]["peak_memory"] <= 64 << 20
    assert found["changes"]["cpu_time"] > 0


def test_a_panic_is_told(images: vmimages.Images) -> None:
    with pytest.raises(VMError, match=r"died(.|\n)*Kernel panic"), VM(images) as doomed:
        doomed.shell("echo c >/proc/sysrq-trigger")
