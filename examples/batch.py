#!/usr/bin/env python3
"""Run one command many times, a few at a time, and tell failures of the command from faults of the cluster.

Usage: batch.py IMAGE COUNT COMMAND [ARGUMENT...]
"""

import asyncio
import os
import sys
from collections import Counter

from afs.client import AfsClient, AfsError

AT_ONCE = 8


async def main(image: str, count: int, command: list[str]) -> int:
    slots, tally = asyncio.Semaphore(AT_ONCE), Counter[str]()

    async def one(client: AfsClient, number: int) -> None:
        async with slots:
            try:
                result = await client.run(image, command, memory_mb=64, env={"NUMBER": str(number)})
            except AfsError as error:  # the cluster could not run it: nothing is known about the command
                tally[f"not run: {error.line}"] += 1
            else:
                tally["ok" if result.ok else f"{result.outcome.value} {result.exit_code}"] += 1

    async with AfsClient(os.environ.get("AFS_PROXY", "127.0.0.1:62051")) as client:
        await asyncio.gather(*(one(client, number) for number in range(count)))
    for outcome, times in tally.most_common():
        print(f"{times:6} {outcome}")
    return 0 if set(tally) == {"ok"} else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])))
