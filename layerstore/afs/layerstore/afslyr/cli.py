"""``afs_layer``: make, check, look at and take apart one ``.afslyr`` file."""

import contextlib
import errno
import json
import os
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from afs.core.errors import AfsError, Cancelled, InvalidArgument, NotFound, PermissionDenied, status_of
from afs.core.units import format_size
from afs.layerstore.afslyr.errors import printable
from afs.layerstore.afslyr.interrupts import Interrupts
from afs.layerstore.afslyr.layout import FOOTER_SIZE, PIECE, VERSION, ChunkTable, Layout
from afs.layerstore.afslyr.outputs import is_stream, new_file, opened_stream, told_when_full, write_all
from afs.layerstore.afslyr.progress import progress
from afs.layerstore.afslyr.reader import checked_chunks, pread_exact, read_layer

if TYPE_CHECKING:
    from afs.layerstore.afslyr.convert import Converted
    from afs.layerstore.afslyr.inspection import Contents

_REFUSED = 1  # exit code for what the system refused

_in_file = click.Path(dir_okay=False, path_type=Path)
_out_file = click.Path(dir_okay=False, allow_dash=True)
_force = click.option(
    "--force", is_flag=True, help="Replace OUT if it exists; the old one stays until the new is whole."
)
_quiet = click.option("-q", "--quiet", is_flag=True, help="Say nothing but errors.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="afs-cluster", prog_name="afs_layer")
@click.pass_context
def afs_layer(context: click.Context) -> None:
    """Work with one .afslyr file: a layer that `mount -t erofs` understands."""
    context.obj = Interrupts()


@afs_layer.command("convert")
@click.argument("source", metavar="IN", type=_out_file)
@click.argument("out", metavar="OUT", type=_out_file)
@_force
@_quiet
@click.pass_obj
def convert_command(interrupts: Interrupts, source: str, out: str, *, force: bool, quiet: bool) -> None:
    """Convert the layer IN (a tar, plain or as gzip or zstd) to OUT; - is stdin or stdout."""
    with contextlib.ExitStack() as stack:
        fd = _stdin() if source == "-" else stack.enter_context(_opened(Path(source)))
        if is_stream(out):  # the header comes last, which a stream cannot take
            sink = stack.enter_context(opened_stream(out))
            with interrupts.deferred(), TemporaryDirectory(prefix="afs_layer.") as directory, told_when_full(directory):
                made = _convert(interrupts, source, fd, Path(directory, "layer"), quiet=quiet)
                finished = stack.enter_context(_opened(Path(directory, "layer")))
            interrupts.check()
            for offset in range(0, made.file_size, PIECE):
                write_all(sink, pread_exact(finished, min(PIECE, made.file_size - offset), offset))
            return
        with interrupts.deferred(), new_file(out, force=force) as temporary:
            made = _convert(interrupts, source, fd, temporary, quiet=quiet)
    if not quiet:
        sizes = f"{made.entries} entries, {format_size(made.file_size)}"
        click.echo(f"{made.diff_id} {sizes}, root digest {made.root_digest}")


def _stdin() -> int:
    if sys.stdin is None:
        raise InvalidArgument("stdin is closed")
    return sys.stdin.fileno()


def _convert(interrupts: Interrupts, source: str, fd: int, out: Path, *, quiet: bool) -> "Converted":
    """Convert *fd*, which people call *source*, to the new file *out*, showing how far it is."""
    from afs.layerstore.afslyr.convert import convert

    found = os.fstat(fd)
    total = found.st_size if stat.S_ISREG(found.st_mode) else None
    with progress(f"converting {'stdin' if source == '-' else _shown(source)}", total, quiet=quiet) as advance:

        def read(count: int) -> bytes:
            interrupts.wait_readable(fd)
            with _named(source):
                data = os.read(fd, count)
            advance(len(data))
            return data

        try:
            return convert(read, out, cancelled=interrupts.pending, interrupt=interrupts.stop_waiting)
        except Cancelled:
            interrupts.check()
            raise


@afs_layer.command()
@click.argument("file", type=_in_file)
@_quiet
def verify(file: Path, *, quiet: bool) -> None:
    """Check every chunk of FILE, the tar inside, and the index against the tar."""
    from afs.layerstore.afslyr.check import check_layer

    with (
        _opened(file) as fd,
        _named(str(file)),
        progress(f"verifying {_shown(file)}", os.fstat(fd).st_size, quiet=quiet) as advance,
    ):
        layout, table = check_layer(fd, progress=advance)
    if not quiet:
        about = f"{table.count} chunks, root digest {table.root_digest}"
        click.echo(f"{_shown(file)}: {layout.diff_id} is whole, and its index is the tar's: {about}")


@afs_layer.command()
@click.argument("file", type=_in_file)
@click.option("--json", "as_json", is_flag=True, help="Print JSON; docs/tools.md tells what the keys mean.")
def inspect(file: Path, *, as_json: bool) -> None:
    """Show what FILE holds: its parts and their sizes, counts by type, the largest files."""
    from afs.layerstore.afslyr.index import read_index
    from afs.layerstore.afslyr.inspection import contents

    with _opened(file) as fd:
        layout, table = read_layer(fd)
        found = contents(read_index(fd, layout))
    if as_json:
        click.echo(json.dumps(_as_json(layout, table, found), indent=2))
    else:
        _show(layout, table, found)


def _sizes(layout: Layout) -> dict[str, int]:
    """Bytes of each part, and of the whole."""
    return {
        "tar": layout.tar_length,
        "extras": layout.extras_length,
        "metadata": layout.erofs_end - layout.meta_offset,
        "table": layout.table_length + FOOTER_SIZE,
        "file": layout.file_size,
        "overhead": layout.file_size - layout.tar_length,
    }


def _overhead(layout: Layout) -> float | None:
    """What the file has more than the tar, in percent of the tar."""
    return 100 * (layout.file_size / layout.tar_length - 1) if layout.tar_length else None


def _as_json(layout: Layout, table: ChunkTable, found: "Contents") -> dict[str, Any]:
    return {
        "version": VERSION,
        **asdict(layout),
        "chunk_count": table.count,
        "root_digest": table.root_digest,
        "sizes": _sizes(layout),
        "overhead_percent": _overhead(layout),
        "counts": asdict(found.counts),
        # Names that are not UTF-8 have surrogates, as os.fsdecode makes them: os.fsencode gives the bytes back.
        "largest": [{"path": os.fsdecode(path), "size": size} for path, size in found.largest],
    }


def _show(layout: Layout, table: ChunkTable, found: "Contents") -> None:
    rows = {
        "diff_id": layout.diff_id,
        "root digest": table.root_digest,
        "format": f"version {VERSION}, {table.count} chunks of {format_size(layout.chunk_size)}",
    }
    rows |= {name: f"{format_size(size)} ({size} bytes)" for name, size in _sizes(layout).items()}
    if (percent := _overhead(layout)) is not None:
        rows["overhead"] += f", {percent:.2f} % of the tar"
    rows |= {name.replace("_", " "): str(value) for name, value in asdict(found.counts).items()}
    for name, value in rows.items():
        click.echo(f"{name:18} {value}")
    if found.largest:
        click.echo("largest files")
        for path, size in found.largest:
            click.echo(f"{format_size(size):>18} {printable(path)}")


@afs_layer.command()
@click.argument("file", type=_in_file)
@click.argument("out", metavar="OUT", type=_out_file)
@_force
@_quiet
@click.pass_obj
def export(interrupts: Interrupts, file: Path, out: str, *, force: bool, quiet: bool) -> None:
    """Write the tar in FILE, bit for bit, to OUT (- is stdout). It is checked on the way."""
    with _opened(file) as fd:
        if is_stream(out):
            with opened_stream(out) as sink:
                _export(fd, sink, file, lambda: None, quiet=quiet)
            return
        with interrupts.deferred(), new_file(out, force=force) as temporary, temporary.open("xb") as sink_file:
            _export(fd, sink_file.fileno(), file, interrupts.check, quiet=quiet)
            os.fsync(sink_file.fileno())


def _export(fd: int, sink: int, file: Path, check: Callable[[], None], *, quiet: bool) -> None:
    """Write the tar of the layer file *fd* to *sink*."""
    layout, table = read_layer(fd)
    at, end = 0, layout.tar_offset + layout.tar_length
    with progress(f"exporting {_shown(file)}", layout.erofs_end, quiet=quiet) as advance:
        for chunk in checked_chunks(fd, layout, table):
            check()
            write_all(sink, memoryview(chunk)[max(0, layout.tar_offset - at) : max(0, end - at)])
            at += len(chunk)
            advance(len(chunk))


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[int]:
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Let errors from a descriptor say whose it is."""
    try:
        yield
    except OSError as error:
        raise (error if error.filename is not None else OSError(error.errno, error.strerror, name)) from None


def _shown(path: str | Path) -> str:
    """*path* for people."""
    return printable(os.fsencode(path))


def main() -> None:
    """The command. Exit codes are those of docs/exit-codes.md; 1 for what the system refused."""
    try:
        afs_layer()
    except AfsError as error:
        click.echo(f"afs_layer: {error.line}", err=True)
        sys.exit(status_of(error).exit_code)
    except OSError as error:
        name = f"{error.filename}: " if error.filename is not None else ""
        click.echo(f"afs_layer: {name}{error.strerror}", err=True)
        sys.exit(_EXIT_CODES.get(error.errno or 0, _REFUSED))


_EXIT_CODES = {
    errno.ENOENT: status_of(NotFound()).exit_code,
    errno.EACCES: status_of(PermissionDenied()).exit_code,
}


if __name__ == "__main__":
    main()
