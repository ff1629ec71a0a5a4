"""Samples, medians, ratios, facts about the machine, and the files below results/."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import time
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afs.core.version import version

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

RESULTS = Path(__file__).parent / "results"
_HEADER = """# Results of the benchmarks

Written by `python -m benchmarks.run`; do not edit. [docs/benchmarks.md](../../docs/benchmarks.md) says what the rows mean.
"""

Prepared = AbstractContextManager["Callable[[], object]"]
"""One sample: entering it sets up, what it gives is timed, leaving it tears down."""


@dataclass(frozen=True)
class Series:
    """Samples of one thing, in the order in which they were taken."""

    name: str
    unit: str
    samples: list[float]

    @property
    def median(self) -> float:
        """The middle sample."""
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The lower and the upper one; a single sample is both."""
        if len(self.samples) < 2:
            return self.samples[0], self.samples[0]
        lower, _, upper = statistics.quantiles(self.samples, n=4, method="inclusive")
        return lower, upper


@dataclass(frozen=True)
class Target:
    """Something measured that is to be at most *limit*, or with *least* at least that."""

    what: str
    value: float
    limit: float
    unit: str = "x"
    least: bool = False

    @property
    def met(self) -> bool:
        """Whether it is."""
        return self.value >= self.limit if self.least else self.value <= self.limit


@dataclass(frozen=True)
class Report:
    """What one benchmark found. *order* is its place among the results."""

    name: str
    title: str
    series: list[Series]
    targets: list[Target]
    order: int = 0
    notes: list[str] = field(default_factory=list)


def plain(action: Callable[[], object]) -> Callable[[], Prepared]:
    """A sample that needs neither set-up nor tear-down."""

    @contextmanager
    def prepared() -> Iterator[Callable[[], object]]:
        yield action

    return prepared


def interleave(
    subjects: Mapping[str, Callable[[], Prepared]], samples: int, *, warm_up: int = 0
) -> dict[str, list[float]]:
    """Time each of *subjects* in turn, *samples* times, after *warm_up* rounds that do not count; seconds by name.

    Every round begins with another subject, so that none of them always comes after the same one.
    """
    names = list(subjects)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warm_up, samples):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            with subjects[name]() as action:
                started = time.perf_counter()
                action()
                seconds = time.perf_counter() - started
            if number >= 0:
                taken[name].append(seconds)
    return taken


def seconds(taken: Mapping[str, list[float]]) -> list[Series]:
    """What `interleave` gives, as series."""
    return [Series(name, "s", samples) for name, samples in taken.items()]


def ratio(taken: Mapping[str, list[float]], what: str, over: str, limit: float, label: str = "") -> Target:
    """The median of *what* divided by that of *over*."""
    value = statistics.median(taken[what]) / statistics.median(taken[over])
    return Target(f"{label}{what} / {over}", value, limit)


def drop_caches() -> bool:
    """Empty the page cache; False where that is not allowed."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        return False
    return True


def facts() -> dict[str, str]:
    """What the figures depend on, and says nothing about whose machine it is."""
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "afs": f"{version()} ({_commit()})",
        "kernel": platform.release(),
        "cpu": f"{os.cpu_count()} x {model.group(1) if model else platform.machine()}",
        "memory": f"{total / 2**30:.1f} GiB",
        "python": platform.python_version(),
        "runc": _first_line("runc", "--version"),
        "containerd": _first_line("containerd", "--version"),
    }


def _commit() -> str:
    """The commit of the sources, with a plus if they were changed since."""
    argv = ["git", "--no-optional-locks", "-C", str(RESULTS.parent), "describe", "--always", "--dirty=+"]
    try:
        return subprocess.run(argv, capture_output=True, text=True, check=False).stdout.strip() or "no commit"
    except FileNotFoundError:
        return "no commit"


def _first_line(*argv: str) -> str:
    try:
        text = subprocess.run(argv, capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        return "absent"
    line = text.partition("\n")[0]
    return next((word for word in line.split() if re.match(r"v?\d+\.\d", word)), line)


def save(report: Report, directory: Path = RESULTS) -> None:
    """Write a report's JSON file, and the Markdown anew."""
    directory.mkdir(parents=True, exist_ok=True)
    document = {
        **asdict(report),
        "targets": [{**asdict(target), "met": target.met} for target in report.targets],
        "machine": {**facts(), "load": f"{os.getloadavg()[1]:.1f}"},
        "taken": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    (directory / f"{report.name}.json").write_text(json.dumps(document, indent=1) + "\n")
    write_tables(directory)


def write_tables(directory: Path = RESULTS) -> None:
    """Write README.md from all of the JSON files."""
    found = [json.loads(path.read_text()) for path in directory.glob("*.json")]
    found.sort(key=lambda each: (each["order"], each["name"]))
    (directory / "README.md").write_text("\n".join([_HEADER, *(_section(each) for each in found)]))


def _section(document: dict[str, Any]) -> str:
    report = load(document)
    machine = dict(document["machine"])
    load_average = machine.pop("load")
    lines = [f"## {report.title}", "", *table(report), ""]
    lines += [f"- {note}" for note in report.notes]
    facts_line = ", ".join(f"{name} {value}" for name, value in machine.items())
    lines += [f"- {document['taken']}; {facts_line}; load in the five minutes before the end: {load_average}.", ""]
    return "\n".join(lines)


def load(document: dict[str, Any]) -> Report:
    """A report from its JSON."""
    targets = [
        Target(each["what"], each["value"], each["limit"], each["unit"], each.get("least", False))
        for each in document["targets"]
    ]
    series = [Series(**each) for each in document["series"]]
    return Report(document["name"], document["title"], series, targets, document["order"], document["notes"])


def table(report: Report) -> list[str]:
    """A report as two tables in Markdown."""
    rows = [["", "median", "quartiles", "samples"]]
    for each in report.series:
        lower, upper = each.quartiles
        both = f"{shown(lower, each.unit)} - {shown(upper, each.unit)}"
        rows.append([each.name, shown(each.median, each.unit), both, str(len(each.samples))])
    lines = _aligned(rows)
    if report.targets:
        rows = [["", "measured", "target", ""]]
        for target in report.targets:
            limit = f"{'>=' if target.least else '<='} {shown(target.limit, target.unit)}"
            rows.append([target.what, shown(target.value, target.unit), limit, "met" if target.met else "**missed**"])
        lines += ["", *_aligned(rows)]
    return lines


def shown(value: float, unit: str) -> str:
    """A number with its unit, seconds below ten as milliseconds."""
    if unit == "s":
        return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"
    return f"{value:.2f} x" if unit == "x" else f"{value:.1f} {unit}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def line(cells: Sequence[str]) -> str:
        first, *others = [(cell, width) for cell, width in zip(cells, widths, strict=True)]
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |"

    ruler = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return [line(rows[0]), ruler, *map(line, rows[1:])]
