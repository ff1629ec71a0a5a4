"""``afs_cli execute``: one run, its output on this program's stdout and stderr, its exit code as this program's.

State: a :class:`_Session` belongs to the event loop. The first Ctrl-C (or SIGTERM, SIGHUP) starts a task that cancels the
run and waits for the node to give back what it took; the second one ends the main task, wherever it waits.
"""

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
from dataclasses import replace
from typing import Any, Never, Unpack

import click

from afs.client.aio import AfsClient
from afs.client.cli_flags import Flags, request_of
from afs.client.cli_output import Closed, Output, discard_stdout
from afs.client.cli_progress import Display
from afs.client.cli_terminal import Terminal, follow_size, pass_stdin_on, terminal_size
from afs.client.errors import RunCancelled, RunError
from afs.client.events import Finished, Log
from afs.client.retrying import DEFAULT_BACKOFF_S, is_worth_repeating, pauses
from afs.client.run import Run
from afs.client.wire import to_json
from afs.core.cli import fail
from afs.core.errors import AfsError, Cancelled, InvalidArgument, ResourceExhausted, status_of
from afs.core.units import format_size

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def execute(**flags: Unpack[Flags]) -> Never:
    """The whole command; exits as the run's command does."""
    try:
        session = _Session(flags)
        with session.terminal or contextlib.nullcontext():
            code = asyncio.run(session.main())
        session.show_notes()
    except AfsError as error:
        code = _show_fault(error, as_json=flags["as_json"])
    except (Closed, BrokenPipeError):
        discard_stdout()
        fail("afs_cli", Cancelled(f"nobody reads the output any more: the run of {flags['image']} was cancelled"))
    except (OSError, ValueError, OverflowError) as error:  # a file of ours, or a number or text that no message holds
        fail("afs_cli", InvalidArgument(str(error)))
    sys.exit(code)


def _show_fault(error: AfsError, *, as_json: bool) -> int:
    status = status_of(error)
    if not as_json:
        click.echo(f"afs_cli: {error.line}", err=True)
        return status.exit_code
    fault: dict[str, Any] = {"outcome": "rejected", "code": status.grpc, "error": error.line, "retryable": False}
    if isinstance(error, RunError):
        fault |= {"outcome": error.outcome.value, "retryable": error.retryable}
        fault |= {"node_id": error.node_id, "run_id": error.run_id}
    elif isinstance(error, Cancelled):
        fault["outcome"] = "cancelled"
    click.echo(json.dumps(fault))
    return status.exit_code


class _Session:
    """See the module."""

    def __init__(self, flags: Flags) -> None:
        self._flags = flags
        request = request_of(flags)
        self._request = replace(request, terminal_size=terminal_size()) if request.tty else request
        self._output = Output()
        self._notes: list[str] = []
        self._run: Run | None = None
        self._diff_error = ""
        self._interrupts = 0
        self._cancelling: asyncio.Task[None] | None = None
        self.terminal = Terminal() if request.tty and request.stdin else None

    def show_notes(self) -> None:
        """What is to be said besides the output. At the end: the terminal is as it was before."""
        for note in self._notes:
            click.echo(f"afs_cli: {note}", err=True)

    async def main(self) -> int:
        """The exit code."""
        self._main = asyncio.current_task()
        loop = asyncio.get_running_loop()
        for signum in _SIGNALS:
            loop.add_signal_handler(signum, self._interrupt)
        try:
            async with AfsClient(self._flags["proxy"]) as client:
                return await self._tried(client)
        except (asyncio.CancelledError, RunCancelled):
            if not self._interrupts:
                raise
            error = Cancelled(f"the run of {self._request.image} was cancelled")
            if self._output.waiting:
                self._leave(error)
            raise error from None

    def _interrupt(self) -> None:
        self._interrupts += 1
        if self._interrupts == 1 and self._run is not None:
            self._cancelling = asyncio.get_running_loop().create_task(self._cancel(self._run))
        elif self._main is not None:
            self._main.cancel()

    async def _cancel(self, run: Run) -> None:
        await run.cancel("interrupted")
        self._output.over = True  # what has come already, but was not written yet
        if self._output.waiting and self._main is not None:
            self._main.cancel()  # it will not come to read how the run ended

    def _leave(self, error: AfsError) -> Never:
        """Exit without waiting for the thread that is stuck in a write."""
        if self.terminal is not None:
            self.terminal.restore()
        click.echo(f"afs_cli: {error.line}", err=True)
        os._exit(status_of(error).exit_code)

    async def _tried(self, client: AfsClient) -> int:
        """Run it, again after faults that may go away; but what was printed cannot be taken back."""
        left = self._flags["retries"]
        for pause in pauses(DEFAULT_BACKOFF_S, random.random):
            run = client.open(self._request)
            try:
                return await self._once(run)
            except AfsError as error:
                final = self._interrupts or self._output.began
                if not left or final or not is_worth_repeating(error, run):
                    raise
                if not self._flags["as_json"]:
                    click.echo(f"afs_cli: {error.line}; trying again", err=True)
            await asyncio.sleep(pause)
            left -= 1
        raise AssertionError("pauses never end")

    async def _once(self, run: Run) -> int:
        request = self._request
        async with run:
            self._run = run
            if request.stdin:
                pass_stdin_on(run)
            if self.terminal is not None:
                follow_size(run)
            display = Display(run) if not request.tty else None
            try:
                if self._flags["as_json"]:
                    result = await run.result(request.diff_to)
                    self._diff_error = result.diff_error
                    click.echo(to_json(result))
                else:
                    await self._print(run, display)
            finally:
                self._run = None
                if display is not None:
                    display.close()
            return self._exit_code(run)

    async def _print(self, run: Run, display: Display | None) -> None:
        async for event in run:
            match event:
                case Log():
                    if display is not None:
                        display.hide()
                    await self._output.write(event.source, event.data)
                case Finished():
                    break
                case _:
                    pass
        if self._request.diff_to is not None:
            self._diff_error = (await run.result(self._request.diff_to)).diff_error
        else:
            async for _ in run:
                pass
        self._note(run)

    def _note(self, run: Run) -> None:
        finished, out = run.finished, self._request.diff_to
        if finished is None:
            return
        for source, dropped in (("stdout", finished.stdout_dropped), ("stderr", finished.stderr_dropped)):
            if dropped:
                self._notes.append(f"{format_size(dropped)} of {source} are missing: it exceeds --max-output")
        if finished.replayed:
            self._notes.append("the run had ended before: this is its result, without output and changed files")
        if finished.error:
            self._notes.append(finished.error)
        if out is not None and not self._diff_error:
            self._notes.append(f"changed files: {out} ({format_size(run.diff_received)})")

    def _exit_code(self, run: Run) -> int:
        """The command's. An incomplete diff is an error, but never hides that the command failed."""
        code = run.finished.exit_code if run.finished is not None else 0
        if self._diff_error:
            self._notes.append(f"{self._request.diff_to} was not written: {self._diff_error}")
            return code or status_of(ResourceExhausted()).exit_code
        return code
