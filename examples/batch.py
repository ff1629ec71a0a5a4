#!/usr/bin/env python3
"""Run commands in many images, a limited number at once, and tell failures of commands from faults of the cluster.

Usage: batch.py [--runs N] [--at-once N] [--retries N] IMAGE[,IMAGE...] COMMAND [ARGUMENT...]

Run number n goes to the images in turn and sees its number as $NUMBER. Prints a line for each run that did not end
well, and a tally; the exit code is 0 if every command exited with 0.
"""

import argparse
import asyncio
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator

from afs.client import AfsClient, RunRequest


def requests(images: list[str], command: list[str], count: int) -> Iterator[RunRequest]:
    """Made one at a time, when there is a place for the run: this may as well be a million."""
    for number in range(count):
        yield RunRequest(
            images[number % len(images)],
            command,
            cpu=0.5,
            memory_mb=64,
            timeout=60,
            env={"NUMBER": str(number)},
            diff_format="none",  # the changed files are not wanted
            labels={"batch": "example"},
        )


async def main(arguments: argparse.Namespace) -> int:
    tally, attempts, started = Counter[tuple[str, str]](), 0, time.monotonic()
    async with AfsClient(os.environ.get("AFS_PROXY", "127.0.0.1:62051")) as client:
        wanted = requests(arguments.images.split(","), arguments.command, arguments.runs)
        async for ended in client.map(wanted, concurrency=arguments.at_once, retries=arguments.retries):
            if ended.result is not None:
                code = ended.result.exit_code
                outcome = "ok" if ended.ok else f"{ended.outcome.value}, exit code {code}"
                attempts += ended.result.attempts
            else:  # the cluster could not run it: nothing is known about the command
                outcome = ended.outcome.value
                print(f"run {ended.index}: {ended.error}", file=sys.stderr)
            tally[ended.request.image, outcome] += 1
    for (image, outcome), times in sorted(tally.items()):
        print(f"{times:6} {outcome:24} {image}")
    seconds = time.monotonic() - started
    print(
        f"{tally.total()} runs, {attempts - tally.total()} tried again, {seconds:.1f} s, {tally.total() / seconds:.0f}/s"
    )
    return 0 if all(outcome == "ok" for _, outcome in tally) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--retries", type=int, default=2)
    parser.add_argument("images")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    sys.exit(asyncio.run(main(parser.parse_args())))
