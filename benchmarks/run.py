"""`python -m benchmarks.run [NAME...]`: measure, print, and write benchmarks/results."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING

import click

from benchmarks import (
    coldroot,
    containerd,
    convert,
    first,
    fused,
    lazy,
    measure,
    memory,
    output,
    pull,
    queue,
    runs,
    trace,
    transfer,
    warm,
    warmroot,
)

if TYPE_CHECKING:
    from collections.abc import Callable

BENCHMARKS: dict[str, tuple[Callable[[str, int | None], measure.Report], str]] = {
    "warm-busybox": (warm.run, "busybox"),
    "warm-img4": (warm.run, "img4"),
    "runs-img4": (runs.latency, "img4"),
    "rate-busybox": (runs.throughput, "busybox"),
    "rate-img4": (runs.throughput, "img4"),
    "output-busybox": (output.run, "busybox"),
    "first-busybox": (first.run, "busybox"),
    "first-debian": (first.run, "debian"),
    "first-img4": (first.run, "img4"),
    "transfer": (transfer.run, "busybox"),
    "pull-debian": (pull.run, "debian"),
    "pull-img4": (pull.run, "img4"),
    "convert-img4": (convert.run, "img4"),
    "lazy-img4": (lazy.run, "img4"),
    "memory-img4": (memory.run, "img4"),
    "trace-img4": (trace.run, "img4"),
    "warmroot-img4": (warmroot.run, "img4"),
    "coldroot-img4": (coldroot.run, "img4"),
    "fused-img4": (fused.run, "img4"),
    "queue": (queue.run, "busybox"),
    "containerd-requests": (containerd.requests, ""),
    "containerd-pull-img4": (containerd.pull, "img4"),
    "containerd-run-img4": (containerd.runs, "img4"),
    "containerd-memory": (containerd.memory, ""),
}


def chosen(names: tuple[str, ...]) -> list[str]:
    """The benchmarks that *names* mean, in their order: `warm` is all whose name begins with `warm-`."""
    for name in names:
        if not any(each == name or each.startswith(f"{name}-") for each in BENCHMARKS):
            raise click.BadParameter(f"{name!r} is none of {', '.join(BENCHMARKS)}")
    return [each for each in BENCHMARKS if not names or each in names or each.partition("-")[0] in names]


@click.command(help=f"Measure NAME..., or all of {', '.join(BENCHMARKS)}.")
@click.option("--samples", type=click.IntRange(min=1), help="Of each thing measured, instead of the benchmark's own.")
@click.argument("names", nargs=-1, metavar="[NAME]...")
def main(names: tuple[str, ...], samples: int | None) -> None:
    """Entry point."""
    # Services start from byte code, as those of an installed package do.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    for name in chosen(names):
        function, image = BENCHMARKS[name]
        click.echo(f"{name} ...", err=True)
        report = dataclasses.replace(function(image, samples), order=list(BENCHMARKS).index(name))
        measure.save(report)
        click.echo("\n".join(["", report.title, "", *measure.table(report), *report.notes, ""]))


if __name__ == "__main__":
    main()
