"""A client of a process of its own that goes as far as a phase of a run, says so, and then neither reads nor writes.

`python -m tests.testbed.leaseclient ADDRESS IMAGE PHASE`: the phase is upload, run or diff; see `reached`.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afs.core.rpc import EOF, channel
from afs.core.run import PIPE, popen
from afs.proto.v1 import afslet_pb2 as pb
from afs.proto.v1.afslet_pb2_grpc import AfsletStub

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from afs.core.run import Child

_REPOSITORY = Path(__file__).parents[2]
PHASES = ("upload", "run", "diff")
TALKING = "talk"
"""The command writes without end, so that nothing but output is on the way."""
BRIDGED = "bridge"
"""As run, on the bridge network."""
_COMMANDS = {
    "upload": "true",
    "run": "echo here; sleep 1000",
    "diff": "dd if=/dev/urandom of=/big bs=1M count=48 2>/dev/null",  # more than all buffers on the way hold
    TALKING: "yes",
    BRIDGED: "echo here; sleep 1000",
}


def start(image: str, command: str, **fields: Any) -> pb.ExecuteRequest:
    """The first request of a run of a shell command."""
    wanted = {"cpu_cores": 1, "memory_mb": 256, **fields}
    return pb.ExecuteRequest(start=pb.StartRequest(image=image, command=["sh", "-c", command], **wanted))


@asynccontextmanager
async def reached(address: str, image: str, phase: str, prefix: Sequence[str] = ()) -> AsyncIterator[Child]:
    """Such a client, whose run is in that phase; killed at the end. `prefix` as `start_process` has it."""
    argv = [*prefix, sys.executable, "-m", "tests.testbed.leaseclient", address, image, phase]
    with popen(argv, stdout=PIPE, cwd=str(_REPOSITORY)) as process:
        try:
            assert process.stdout is not None
            assert await asyncio.to_thread(process.stdout.readline) == b"ready\n"
            yield process
        finally:
            process.kill()


async def _go(address: str, image: str, phase: str) -> None:
    async with channel(address) as opened:
        call = AfsletStub(opened).Execute()
        network = pb.NETWORK_BRIDGE if phase == BRIDGED else pb.NETWORK_NONE
        await call.write(start(image, _COMMANDS[phase], network=network))
        if phase == "upload":
            await call.write(
                pb.ExecuteRequest(file_begin=pb.FileEntryBegin(path="f", type=pb.FILE_TYPE_FILE, mode=0o644))
            )
            await call.write(pb.ExecuteRequest(file_chunk=pb.FileChunk(data=bytes(1 << 20))))
        else:
            await call.done_writing()
        wanted = {"upload": "accepted", "diff": "tar_chunk"}.get(phase, "log")
        while (response := await call.read()) is not EOF:
            assert isinstance(response, pb.ExecuteResponse)
            if response.WhichOneof("payload") == wanted:
                break
        print("ready", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_go(*sys.argv[1:]))
