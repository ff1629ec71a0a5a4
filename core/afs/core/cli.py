"""What the click commands share: how an AfsError ends one, and the command of a daemon."""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import Any, Never, TypeVar

import click

from afs.core.config import from_command_line, options
from afs.core.errors import AfsError, InvalidArgument, status_of
from afs.core.service import run_service

ConfigT = TypeVar("ConfigT")
# 2 is what many commands return for reasons of their own (pytest, grep), and `afs_cli execute` exits as its command does.
click.UsageError.exit_code = status_of(InvalidArgument()).exit_code


def fail(program: str, error: AfsError) -> Never:
    """Print *error* as one line and exit with its code."""
    click.echo(f"{program}: {error.line}", err=True)
    sys.exit(status_of(error).exit_code)


def daemon_command(
    program: str,
    service: str,
    config_class: type[ConfigT],
    serve: Callable[[ConfigT, asyncio.Event], Awaitable[None]],
    help: str,
) -> click.Command:
    """The command line of a daemon: a flag for every field of *config_class*, then ``serve(config, stop)``.

    *config_class* has a field ``log_level``.
    """

    def main(**flags: object) -> None:
        try:
            config: Any = from_command_line(config_class, service, flags)
        except AfsError as error:
            fail(program, error)
        sys.exit(run_service(program, lambda stop: serve(config, stop), level=config.log_level))

    command = click.command(name=program, help=help)(options(config_class, service)(main))
    return click.version_option(package_name="afs-cluster", prog_name=program)(command)
