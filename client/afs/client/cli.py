"""``afs_cli``: the command line client. What the commands do is imported when one is called: start-up time counts."""

from typing import Unpack

import click

from afs.client.cli_arguments import image_name
from afs.client.cli_flags import PROXY, Flags, with_flags
from afs.core.cli import fail
from afs.core.errors import AfsError, InvalidArgument
from afs.core.units import parse_duration

JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")


@click.group()
@click.version_option(package_name="afs-cluster", prog_name="afs_cli")
def main() -> None:
    """Run commands in images on an AFS cluster."""


@main.command(context_settings={"allow_interspersed_args": False})
@with_flags
def execute(**flags: Unpack[Flags]) -> None:
    """Run ARGV (the image's own command if empty) in an image; exit as it does.

    After a timeout the exit code is 124, out of memory 137, command not found 127, not executable 126. If AFS itself
    fails it is 64 to 77, with one line on stderr; see docs/exit-codes.md. Ctrl-C cancels the run and waits until the node
    has given back what it took; a second one does not wait.
    """
    from afs.client.cli_execute import execute

    execute(**flags)


@main.command()
@PROXY
@JSON
@click.option("--watch", is_flag=True, help="Show it again and again, until Ctrl-C.")
@click.option("--interval", default="1s", show_default=True, help="How often, with --watch.")
def status(proxy: str, as_json: bool, watch: bool, interval: str) -> None:
    """Show the cluster's nodes and what they hold."""
    from afs.client import cli_cluster

    if not watch:
        cli_cluster.ask(cli_cluster.show_status(proxy, as_json=as_json))
        return
    try:
        if as_json:
            raise InvalidArgument("--watch does not go with --json")
        cli_cluster.ask(cli_cluster.watch(proxy, parse_duration(interval)))
    except AfsError as error:
        fail("afs_cli", error)
    except KeyboardInterrupt:
        return  # that is how it ends


@main.command()
@PROXY
@JSON
@click.option("--layers", is_flag=True, help="Layers instead of images.")
def images(proxy: str, as_json: bool, layers: bool) -> None:
    """Show the images that the cluster has, and on which nodes."""
    from afs.client import cli_cluster

    cli_cluster.ask(cli_cluster.show_contents(proxy, layers=layers, as_json=as_json))


@main.command()
@PROXY
@JSON
def runs(proxy: str, as_json: bool) -> None:
    """Show the runs that are queued or under way."""
    from afs.client import cli_cluster

    cli_cluster.ask(cli_cluster.show_runs(proxy, as_json=as_json))


@main.command()
@PROXY
@click.option("--reason", default="", help="What the node's log says about it.")
@click.argument("run_id", nargs=-1, required=True)
def cancel(proxy: str, reason: str, run_id: tuple[str, ...]) -> None:
    """End runs, whoever started them; `afs_cli runs` has their ids."""
    from afs.client import cli_cluster

    cli_cluster.ask(cli_cluster.cancel_runs(proxy, run_id, reason))


@main.command()
@PROXY
@click.option("--replicas", type=int, required=True, help="How many nodes shall hold every layer completely.")
@click.argument("image")
def reconcile(proxy: str, replicas: int, image: str) -> None:
    """Copy the layers of IMAGE to more nodes."""
    from afs.client import cli_cluster

    current, ensured = cli_cluster.ask(cli_cluster.reconcile_image(proxy, image_name(image), replicas))
    if not ensured:
        fail("afs_cli", InvalidArgument(f"{image} is on {current} nodes, not {replicas}: there are not more"))


if __name__ == "__main__":
    main()
