#!/usr/bin/env python3
"""Run one command in an image, with its output as it comes. Usage: one_run.py IMAGE COMMAND [ARGUMENT...]"""

import asyncio
import os
import sys

from afs.client import AfsClient, Finished, Log


async def main(image: str, command: list[str]) -> int:
    code = 1
    async with AfsClient(os.environ.get("AFS_PROXY", "127.0.0.1:62051")) as client:
        async for event in client.execute(image, command, cpu=1, memory_mb=256, timeout=60):
            match event:
                case Log(source="stdout"):
                    sys.stdout.buffer.write(event.data)
                case Log():
                    sys.stderr.buffer.write(event.data)
                case Finished():
                    print(f"{event.outcome.value}, exit code {event.exit_code}, {event.cpu_time:.3f} s of CPU")
                    code = event.exit_code
                case _:
                    pass
    return code


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1], sys.argv[2:])))
