"""``afs_layer``: make, check, look at and take apart one ``.afslyr`` file."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import click

from afs.core.errors import AfsError, AlreadyExists, NotFound, status_of
from afs.core.files import unlinked_on_error
from afs.core.units import format_size
from afs.layerstore.afslyr import reader

_COPY = 1 << 20


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="afs-cluster", prog_name="afs_layer")
def afs_layer() -> None:
    """Work with one .afslyr file: a layer that `mount -t erofs` understands."""


@afs_layer.command("convert")
@click.argument("source", metavar="IN", type=click.Path(dir_okay=False, allow_dash=True))
@click.argument("out", metavar="OUT", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
def convert_command(source: str, out: Path, *, force: bool) -> None:
    """Convert the layer IN (tar, tar.gz, tar.zst; - is stdin) to OUT."""
    from afs.layerstore.afslyr.convert import convert

    if out.exists() and not force:
        raise AlreadyExists(f"{out} exists; --force replaces it")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    with click.open_file(source, "rb") as blob:
        made = convert(blob.read, temporary)
    with unlinked_on_error(temporary):
        temporary.replace(out)
    click.echo(f"{made.diff_id} {made.entries} entries, {format_size(made.file_size)}, root digest {made.root_digest}")


@afs_layer.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
def verify(file: Path) -> None:
    """Check every chunk of FILE and the tar inside."""
    with _opened(file) as fd:
        layout, table = reader.verify_layer(fd)
    click.echo(f"{file}: {layout.diff_id} is whole: {table.count} chunks, root digest {table.root_digest}")


@afs_layer.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(file: Path, *, as_json: bool) -> None:
    """Show the layout of FILE: offsets and lengths in bytes."""
    with _opened(file) as fd:
        layout, table = reader.read_layer(fd)
    fields = {**asdict(layout), "chunk_count": table.count, "root_digest": table.root_digest}
    if as_json:
        click.echo(json.dumps(fields, indent=2))
        return
    for name, value in fields.items():
        click.echo(f"{name:14} {value}")


@afs_layer.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(dir_okay=False, allow_dash=True))
def export(file: Path, out: str) -> None:
    """Write the tar in FILE, bit for bit, to OUT (- is stdout)."""
    with _opened(file) as fd:
        layout, _ = reader.read_layer(fd)
        with contextlib.ExitStack() as stack:
            if out != "-":
                stack.enter_context(unlinked_on_error(Path(out)))
            sink = stack.enter_context(click.open_file(out, "wb"))
            for done in range(0, layout.tar_length, _COPY):
                count = min(_COPY, layout.tar_length - done)
                sink.write(reader.pread_exact(fd, count, layout.tar_offset + done))


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[int]:
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def main() -> None:
    """The command. Exit codes are those of docs/exit-codes.md; 1 for what the system refused."""
    try:
        afs_layer()
    except AfsError as error:
        click.echo(f"afs_layer: {error.line}", err=True)
        sys.exit(status_of(error).exit_code)
    except OSError as error:
        click.echo(f"afs_layer: {error}", err=True)
        sys.exit(status_of(NotFound()).exit_code if isinstance(error, FileNotFoundError) else 1)


if __name__ == "__main__":
    main()
