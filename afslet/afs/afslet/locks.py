"""The locks on an afslet's directories: afslet's as long as it lives, its keeper's while that clears up after a death.

A lock file that a keeper holds says so, for an afslet that starts meanwhile has to wait for it, but not for another afslet.
"""

import asyncio
import contextlib
import time
from collections.abc import Iterable
from pathlib import Path

from afs.core.errors import FailedPrecondition
from afs.core.files import locked

_KEEPER = b"keeper\n"
_PATIENCE_S = 60.0  # with a keeper that clears up
_MARKING_S = 1.0  # until a keeper that has just taken a lock has said so


async def take(stack: contextlib.ExitStack, paths: Iterable[Path]) -> None:
    """Take the locks for an afslet and leave their release to *stack*; FailedPrecondition if another one has them."""
    began = time.monotonic()
    for path in paths:
        while True:
            try:
                stack.enter_context(locked(path, "afslet"))
            except FailedPrecondition:
                waited = time.monotonic() - began
                if waited > (_PATIENCE_S if path.read_bytes() == _KEEPER else _MARKING_S):
                    raise
                await asyncio.sleep(0.01)  # a lock has no event
            else:
                path.write_bytes(b"")
                break


def take_for_keeper(stack: contextlib.ExitStack, paths: Iterable[Path]) -> bool:
    """Take the locks for a keeper; False if an afslet has one."""
    for path in paths:
        try:
            stack.enter_context(locked(path, "afslet"))
        except FailedPrecondition:
            return False
        path.write_bytes(_KEEPER)
    return True
