#!/usr/bin/env python3
"""Talk with a command while it runs: lines of ours go to its standard input, its answers come back.

Usage: conversation.py IMAGE [COMMAND ARGUMENT...]; without COMMAND, awk in the image adds numbers up.
"""

import asyncio
import os
import sys

from afs.client import AfsClient, Log, Run

ADD = ["awk", "{ total += $1; print total; fflush() }"]


async def answer(run: Run) -> str:
    """The next line of output."""
    line = b""
    while not line.endswith(b"\n"):
        event = await anext(run)
        if isinstance(event, Log):
            line += event.data
    return line.decode().strip()


async def main(image: str, command: list[str]) -> int:
    async with (
        AfsClient(os.environ.get("AFS_PROXY", "127.0.0.1:62051")) as client,
        client.open(image, command, stdin=True, timeout=60) as run,
    ):
        for number in (1, 20, 300):
            await run.write(f"{number}\n".encode())
            print(f"sent {number}, the command says {await answer(run)}")
        await run.close_stdin()
        return (await run.result()).exit_code


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1], sys.argv[2:] or ADD)))
