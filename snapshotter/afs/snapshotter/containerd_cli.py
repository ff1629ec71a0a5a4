"""``afs_snapshotter config`` and ``afs_snapshotter check``: the commands for those who run containerd."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from afs.core.cli import fail
from afs.core.config import from_command_line
from afs.core.errors import AfsError, FailedPrecondition, InvalidArgument
from afs.core.units import parse_duration

if TYPE_CHECKING:
    from afs.snapshotter.containerd_check import Step
    from afs.snapshotter.containerd_settings import Snapshotter
    from afs.snapshotter.containerd_version import Release

PROGRAM = "afs_snapshotter"
CONFIG_FILE = "/etc/containerd/config.toml"


def with_commands(daemon: click.Command, service: str, config_class: type) -> click.Group:
    """*daemon* with these commands; without one it is called as before.

    Its settings, wherever they come from, say what the commands take for granted: `--config FILE config`.
    """

    def run(context: click.Context, /, **flags: Any) -> None:
        if context.invoked_subcommand is None:
            context.invoke(daemon, **flags)
        context.obj = (service, config_class, flags)

    return click.Group(
        daemon.name,
        params=daemon.params,
        callback=click.pass_context(run),
        invoke_without_command=True,
        subcommand_metavar="[COMMAND]",
        help=f"{daemon.help}\n\nWith a COMMAND: help for those who run containerd with AFS.",
        commands=[config, check],
    )


def _socket_and_root(daemon: tuple[str, type, dict[str, object]]) -> tuple[Path, Path]:
    """Where the daemon with these settings serves, and keeps what it writes."""
    service, config_class, flags = daemon
    settings: Any = from_command_line(config_class, service, dict(flags))
    return settings.run_dir / "snapshotter.sock", settings.root


def _path(text: str, what: str) -> Path:
    path = Path(text.removeprefix("unix://").removeprefix("unix:"))
    if not path.is_absolute():
        raise InvalidArgument(f"{what} is not an absolute path: {text!r}")
    return path


_NAME = click.option("--name", default="afs", show_default=True, help="containerd's name for the snapshotter.")
_ADDRESS = click.option("--address", metavar="SOCKET", help="Its socket. [default: snapshotter.sock of the run_dir]")


@click.command()
@_NAME
@_ADDRESS
@click.option("--root", metavar="DIR", help="Where it keeps what containers write. [default: its root]")
@click.option("--cri/--no-cri", default=True, show_default=True, help="Have Kubernetes (CRI) use it.")
@click.option("--containerd-version", metavar="VERSION", help="1.6, 1.7, 2.0, ... [default: the installed one's]")
@click.option(
    "--write",
    is_flag=False,
    flag_value=CONFIG_FILE,
    metavar="[FILE]",
    help=f"Put it into FILE, beside what is there. [default: {CONFIG_FILE}]",
)
@click.option("--force", is_flag=True, help="With --write: change what somebody set otherwise.")
@click.pass_obj
def config(
    daemon: tuple[str, type, dict[str, object]],
    name: str,
    address: str | None,
    root: str | None,
    cri: bool,
    containerd_version: str | None,
    write: str | None,
    force: bool,
) -> None:
    """Print what containerd's configuration has to say about AFS, or write it there."""
    from afs.snapshotter.containerd_settings import Snapshotter, check_name
    from afs.snapshotter.containerd_version import installed_release, parse_release

    try:
        if force and write is None:
            raise InvalidArgument("--force goes with --write")
        own_socket, own_root = _socket_and_root(daemon)
        snapshotter = Snapshotter(
            check_name(name),
            _path(str(address or own_socket), "the socket"),
            _path(str(root or own_root), "the root"),
        )
        release = parse_release(containerd_version) if containerd_version else installed_release()
        if write is None:
            _print(release, snapshotter, cri=cri)
        else:
            # Another release would judge the file by its own rules.
            program = None if containerd_version else "containerd"
            _write(Path(write), release, snapshotter, program, cri=cri, force=force)
    except AfsError as error:
        fail(PROGRAM, error)


def _print(release: "Release", snapshotter: "Snapshotter", *, cri: bool) -> None:
    from afs.snapshotter.containerd_settings import plan
    from afs.snapshotter.containerd_toml import edit

    click.echo(edit("", plan(release, {}, snapshotter, cri=cri)).text, nl=False)


def _write(
    path: Path, release: "Release", snapshotter: "Snapshotter", program: str | None, *, cri: bool, force: bool
) -> None:
    from afs.snapshotter.containerd_file import install, read_text
    from afs.snapshotter.containerd_settings import plan
    from afs.snapshotter.containerd_toml import edit, parse

    text = read_text(path)
    content = parse(text, str(path))
    try:
        wanted = plan(release, content, snapshotter, cri=cri)
        edited = edit(text, wanted, force=force)
    except FailedPrecondition as error:
        raise FailedPrecondition(f"{path}: {error.line}") from None
    notes = wanted.notes
    if edited.changes:
        kept, more = install(path, edited.text, wanted, program)
        notes = notes + more
        for change in edited.changes:
            click.echo(change)
        click.echo(f"{path} is changed" + (f", what it was is in {kept}" if kept else "") + "; restart containerd")
    else:
        click.echo(f"{path} has it all; nothing is changed")
    for note in notes:
        click.echo(f"note: {note}")


@click.command()
@_NAME
@_ADDRESS
@click.option(
    "--containerd-address",
    default="/run/containerd/containerd.sock",
    envvar="CONTAINERD_ADDRESS",
    metavar="SOCKET",
    show_default=True,
    help="containerd's socket.",
)
@click.option("--namespace", default="afs-check", show_default=True, help="containerd's namespace to try in.")
@click.option("--timeout", default="1m", show_default=True, help="How long each step may take.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.pass_obj
def check(
    daemon: tuple[str, type, dict[str, object]],
    name: str,
    address: str | None,
    containerd_address: str,
    namespace: str,
    timeout: str,
    as_json: bool,
) -> None:
    """Try it all: does containerd know AFS, and does a container start from it?

    Imports an image of one tiny program and runs it, in a namespace of its own, and removes all that again. With --name
    overlayfs the same is tried with containerd's own snapshotter, which tells whose fault it is.
    """
    from afs.layerstore.afslyr.interrupts import Interrupts
    from afs.snapshotter.containerd_check import Check, Target
    from afs.snapshotter.containerd_settings import BUILT_IN

    try:
        own_socket, _ = _socket_and_root(daemon)
        socket = None if name in BUILT_IN and address is None else _path(str(address or own_socket), "the socket")
        target = Target(
            name, socket, _path(containerd_address, "containerd's socket"), namespace, parse_duration(timeout)
        )
        Interrupts()
        checking = Check(target, None if as_json else _show)
        try:
            checking.run()
        finally:
            if as_json:
                import json

                click.echo(json.dumps({"steps": [step._asdict() for step in checking.steps]}, indent=2))
    except AfsError as error:
        fail(PROGRAM, error)
    sys.exit(0)


def _show(step: "Step") -> None:
    detail = f": {step.detail}" if step.ok and step.detail else ""  # a failure ends the command, with its cause
    click.echo(f"{'ok' if step.ok else 'FAILED':<8}{step.name}{detail}")
