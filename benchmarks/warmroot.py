"""Work in a root whose files are all in the page cache: AFS's EROFS mounts against overlayfs over ext4."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from afs.snapshotter.backends import Backend
from benchmarks import imageroots, measure, subjects

if TYPE_CHECKING:
    from pathlib import Path

SAMPLES, WARM_UP = 15, 2
LIMIT = 1.03
PROGRAM = """
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
int main(void) { char *text = strdup("hello"); puts(text); free(text); return getpid() == 0; }
"""


def commands(root: Path, name: str) -> dict[str, list[str]]:
    """What is run in a root of the image *name*."""
    (root / "root/program.c").write_text(PROGRAM)
    return {
        "W": list(subjects.image(name).commands["W"]),
        "find /": ["find", "/", "-xdev", "-printf", "%p %s %m\\n"],
        "gcc": ["gcc", "-O2", "-o", "/root/program", "/root/program.c"],
    }


def run(name: str, samples: int | None) -> measure.Report:
    """Measure with the image *name*; only img4 has what it takes."""
    with ExitStack() as stack:
        files = stack.enter_context(imageroots.converted())
        roots = {
            "EROFS": stack.enter_context(imageroots.afs_root(files, Backend.FILE)),
            "ext4": stack.enter_context(imageroots.unpacked_root()),
            "ext4, again": stack.enter_context(imageroots.unpacked_root()),
        }
        series, targets = [], []
        for what in commands(roots["ext4"], name):
            actions = {
                label: measure.plain(imageroots.command(root, commands(root, name)[what]))
                for label, root in roots.items()
            }
            taken = measure.interleave(actions, samples or SAMPLES, warm_up=WARM_UP)
            series += [
                measure.Series(f"{what}: {each.name}", each.unit, each.samples) for each in measure.seconds(taken)
            ]
            targets.append(measure.ratio(taken, "EROFS", "ext4", LIMIT, f"{what}: "))
    note = "Each command is run by chroot(8), in overlayfs with an upper directory, over the layers of the image."
    control = (
        "What *ext4, again* differs by from *ext4*, which it is like in all, is what the machine adds to each figure."
    )
    return measure.Report(f"warmroot-{name}", f"Warm work in a root of {name}", series, targets, notes=[note, control])
