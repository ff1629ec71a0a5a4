"""``afs_layer`` as a user runs it."""

import io
import json
import os
import pty
import resource
import signal
import stat
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from afs.layerstore.afslyr.convert import convert
from afs.layerstore.afslyr.layout import CHUNK_SIZE
from tests.testbed import tars

COMMAND = [sys.executable, "-m", "afs.layerstore.afslyr.cli"]
TAR = tars.every_kind_tar()


def afs_layer(*argv: str | Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run the command."""
    return subprocess.run([*COMMAND, *argv], check=False, capture_output=True, input=stdin)


@pytest.fixture
def layer(tmp_path: Path) -> Path:
    """A layer file with every kind of entry."""
    out = tmp_path / "good.afslyr"
    convert(io.BytesIO(TAR).read, out)
    return out


def test_convert_inspect_verify_and_export(tmp_path: Path) -> None:
    (tmp_path / "in.tar.gz").write_bytes(tars.gzipped(TAR))
    out = tmp_path / "out.afslyr"
    made = afs_layer("convert", tmp_path / "in.tar.gz", out)
    assert made.returncode == 0
    shown = json.loads(afs_layer("inspect", out, "--json").stdout)
    assert made.stdout.decode().startswith(f"{shown['diff_id']} ")
    assert made.stdout.decode().endswith(f"root digest {shown['root_digest']}\n")
    verified = afs_layer("verify", out)
    assert verified.returncode == 0
    assert shown["root_digest"].encode() in verified.stdout
    assert shown["root_digest"].encode() in afs_layer("inspect", out).stdout
    assert afs_layer("export", out, "-").stdout == TAR
    assert afs_layer("export", out, tmp_path / "back.tar").returncode == 0
    assert (tmp_path / "back.tar").read_bytes() == TAR


# Where the result goes


@pytest.mark.parametrize("command", ["convert", "export"])
def test_an_existing_file_is_replaced_only_by_force(tmp_path: Path, layer: Path, command: str) -> None:
    (tmp_path / "in.tar").write_bytes(TAR)
    source, wanted = ("in.tar", layer.read_bytes()) if command == "convert" else (layer.name, TAR)
    out = tmp_path / "out"
    out.write_bytes(b"mine")
    refused = afs_layer(command, tmp_path / source, out)
    assert (refused.returncode, out.read_bytes()) == (73, b"mine")
    assert refused.stderr.decode() == f"afs_layer: {out} exists; --force replaces it\n"
    assert afs_layer(command, "--force", tmp_path / source, out).returncode == 0
    assert out.read_bytes() == wanted
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good.afslyr", "in.tar", "out"]


def test_a_symlink_is_followed(tmp_path: Path, layer: Path) -> None:
    (tmp_path / "link").symlink_to("real")
    assert afs_layer("export", layer, tmp_path / "link").returncode == 0
    assert afs_layer("export", layer, tmp_path / "link").returncode == 73
    assert afs_layer("export", "--force", layer, tmp_path / "link").returncode == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == TAR


def test_a_layer_may_go_through_stdin_and_stdout(tmp_path: Path, layer: Path) -> None:
    made = afs_layer("convert", "-", "-", stdin=TAR)
    assert (made.returncode, made.stdout) == (0, layer.read_bytes())
    assert list(tmp_path.iterdir()) == [layer]


def test_dev_stdout_is_stdout_wherever_it_leads(tmp_path: Path, layer: Path) -> None:
    with (tmp_path / "regular").open("wb") as out:
        subprocess.run([*COMMAND, "export", "-q", layer, "/dev/stdout"], stdout=out, check=True)
    assert (tmp_path / "regular").read_bytes() == TAR
    assert Path("/dev/stdout").is_symlink()
    assert afs_layer("export", layer, "/dev/stdout").stdout == TAR


def test_a_pipe_is_written_as_it_stands(tmp_path: Path, layer: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    assert afs_layer("export", layer, tmp_path / "pipe").returncode == 0
    reader.join()
    assert got == [TAR]
    assert (tmp_path / "pipe").is_fifo()


def test_a_terminal_gets_no_layer(layer: Path) -> None:
    primary, secondary = pty.openpty()
    try:
        done = subprocess.run(
            [*COMMAND, "export", "-q", layer, "-"], stdout=secondary, stderr=subprocess.PIPE, check=False
        )
        assert (done.returncode, done.stderr) == (64, b"afs_layer: - is a terminal; redirect it\n")
    finally:
        os.close(primary)
        os.close(secondary)


# Failures


def test_errors_are_one_line_with_an_exit_code(tmp_path: Path) -> None:
    bad = afs_layer("convert", "--quiet", "-", tmp_path / "out", stdin=b"no tar" * 200)
    assert (bad.returncode, bad.stderr.count(b"\n")) == (65, 1)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "junk").write_bytes(b"junk")
    for command in ("verify", "inspect"):
        assert afs_layer(command, tmp_path / "junk").returncode == 65
    assert afs_layer("export", tmp_path / "junk", tmp_path / "out").returncode == 65
    out = str(tmp_path / "out")
    for name, *more in (["verify"], ["inspect"], ["export", out], ["convert", out]):
        missing = afs_layer(name, tmp_path / "missing", *more)
        assert missing.returncode == 66
        assert missing.stderr.decode() == f"afs_layer: {tmp_path}/missing: No such file or directory\n"
    nowhere = afs_layer("convert", "-", tmp_path / "no/out", stdin=tars.END)
    assert nowhere.returncode == 66
    assert nowhere.stderr.decode() == f"afs_layer: no directory {tmp_path}/no for {tmp_path}/no/out\n"
    assert [path.name for path in tmp_path.iterdir()] == ["junk"]


def test_verify_names_a_damaged_chunk(layer: Path) -> None:
    data = bytearray(layer.read_bytes())
    at = data.rindex(b"v7dir")
    data[at] ^= 1
    layer.write_bytes(data)
    refused = afs_layer("verify", "-q", layer)
    assert refused.returncode == 65
    assert b"chunk %d: bytes do not match" % (at // CHUNK_SIZE) in refused.stderr


def test_an_export_of_a_damaged_layer_leaves_nothing(tmp_path: Path, layer: Path) -> None:
    data = bytearray(layer.read_bytes())
    data[100_000] ^= 1
    layer.write_bytes(data)
    old = tmp_path / "old"
    old.write_bytes(b"mine")
    for argv in (["export", str(layer), f"{tmp_path}/out"], ["export", "--force", str(layer), str(old)]):
        assert afs_layer(*argv).returncode == 65
    assert old.read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good.afslyr", "old"]


def small_files() -> None:
    """Files of the child end at 200,000 bytes: what a full disk looks like without a disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


@pytest.mark.parametrize(
    "argv", [["convert", "in.tar", "out"], ["export", "good.afslyr", "out"], ["convert", "in.tar", "-"]]
)
def test_no_room_is_told_and_leaves_nothing(tmp_path: Path, layer: Path, argv: list[str]) -> None:
    (tmp_path / "in.tar").write_bytes(TAR)
    done = subprocess.run(
        [*COMMAND, *argv, "--quiet"],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        preexec_fn=small_files,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 75
    assert done.stderr.startswith(b"afs_layer: no room for ")
    assert (done.stdout, done.stderr.count(b"\n")) == (b"", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good.afslyr", "in.tar"]


def test_a_full_device_is_told(layer: Path) -> None:
    done = afs_layer("export", "-q", layer, "/dev/full")
    assert (done.returncode, done.stderr) == (75, b"afs_layer: no room for /dev/full: No space left on device\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "out"
    out.write_bytes(b"mine")
    # Whoever runs the tests in the background of a shell, or with nohup, has them ignore some signals.
    command = ["env", "--default-signal", *COMMAND, "convert", "--force", "--quiet", "-", str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stderr is not None
        # More than pipe and pipeline hold: once it is written, the conversion is under way. Then it waits for more.
        child.stdin.write(tars.header("big", size=1 << 30) + bytes(32 << 20))
        child.stdin.flush()
        assert len(list(tmp_path.iterdir())) == 2
        child.send_signal(number)
        assert child.stderr.read().decode() == f"afs_layer: interrupted by {number.name}\n"
        child.stdin.close()
    assert child.returncode == 76
    assert (list(tmp_path.iterdir()), out.read_bytes()) == ([out], b"mine")


def test_an_interrupt_reaches_an_export_whose_reader_has_stopped(tmp_path: Path) -> None:
    layer = tmp_path / "layer"
    convert(io.BytesIO(tars.tar_of({"big": bytes(4 << 20)})).read, layer)
    with subprocess.Popen(
        ["env", "--default-signal", *COMMAND, "export", "--quiet", layer, "-"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        os.read(child.stdout.fileno(), 1)  # it writes now, and is stuck soon
        child.send_signal(signal.SIGTERM)
        assert child.stderr.read() == b"afs_layer: interrupted by SIGTERM\n"
    assert child.returncode == 76


SELF_INTERRUPTED = """
import os, signal, sys
from afs.layerstore.afslyr.interrupts import Interrupts
from afs.layerstore.afslyr.outputs import new_file
from afs.core.errors import Cancelled
interrupts = Interrupts()
try:
    with interrupts.deferred(), new_file(sys.argv[1], force=True) as temporary:
        temporary.write_bytes(b"new")
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.pending()
        print("deferred", flush=True)
        interrupts.check()
except Cancelled as error:
    print(error)
"""


def test_a_new_file_is_removed_before_an_interrupt_ends_the_program(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.write_bytes(b"mine")
    done = subprocess.run([sys.executable, "-c", SELF_INTERRUPTED, old], check=True, capture_output=True)
    assert done.stdout == b"deferred\ninterrupted by SIGTERM\n"
    assert (list(tmp_path.iterdir()), old.read_bytes()) == ([old], b"mine")


def test_what_nohup_ignores_stays_ignored(tmp_path: Path) -> None:
    script = (
        "import signal; from afs.layerstore.afslyr.interrupts import Interrupts; Interrupts(); signal.raise_signal(1)"
    )
    command = ["sh", "-c", f"trap '' HUP; exec {sys.executable} -c '{script}'"]
    assert subprocess.run(command, check=False, cwd=tmp_path).returncode == 0


# What it says meanwhile


def test_progress_is_lines_where_there_is_no_terminal(tmp_path: Path, layer: Path) -> None:
    found = afs_layer("verify", layer)
    assert found.stdout.count(b"\n") == 1
    first, last = found.stderr.decode().splitlines()
    assert first == f"afs_layer: verifying {layer}"
    assert last.startswith(f"{first}: 3.2 MiB in ")
    for argv in (["verify", str(layer)], ["convert", "-", f"{tmp_path}/a"], ["export", str(layer), f"{tmp_path}/b"]):
        quiet = afs_layer(*argv, "-q", stdin=TAR)
        assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, b"", b"")


def test_progress_is_a_bar_on_a_terminal(layer: Path) -> None:
    primary, secondary = pty.openpty()
    seen: list[bytes] = []
    with subprocess.Popen(
        [*COMMAND, "verify", layer], stdout=subprocess.PIPE, stderr=secondary, env={**os.environ, "TERM": "xterm"}
    ) as child:
        os.close(secondary)
        drain = threading.Thread(target=lambda: seen.append(drained(primary)))
        drain.start()
        assert child.stdout is not None
        result = child.stdout.read()
    drain.join()
    os.close(primary)
    assert child.returncode == 0
    assert result.count(b"\n") == 1
    assert b"verifying" in seen[0]
    assert b"\x1b[" in seen[0]


def drained(fd: int) -> bytes:
    """All that comes from a terminal until its other end is closed, which reads as EIO."""
    data = b""
    while True:
        try:
            data += os.read(fd, 65536)
        except OSError:
            return data


@pytest.mark.parametrize("argv", ["['--help']", "['convert', '--help']", "['verify', LAYER]"])
def test_rich_is_not_imported_without_a_terminal(layer: Path, argv: str) -> None:
    script = (
        "import sys, contextlib\n"
        "from afs.layerstore.afslyr.cli import main\n"
        f"LAYER = {str(layer)!r}\n"
        f"sys.argv = ['afs_layer', *{argv}]\n"
        "with contextlib.suppress(SystemExit):\n"
        "    main()\n"
        "assert not [name for name in sys.modules if name.partition('.')[0] == 'rich'], 'rich was imported'\n"
        "assert 'afs.layerstore.afslyr.convert' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


# inspect

KEYS = [
    "version",
    "diff_id",
    "file_size",
    "chunk_size",
    "tar_offset",
    "tar_length",
    "extras_offset",
    "extras_length",
    "meta_offset",
    "erofs_end",
    "table_offset",
    "chunk_count",
    "root_digest",
    "sizes",
    "overhead_percent",
    "counts",
    "largest",
]


def kind_of(expected: tars.Expected) -> str:
    """The counter that a path falls under."""
    if expected.same_as is not None:
        return "hard_links"
    if expected.mode == stat.S_IFCHR:
        return "whiteouts"
    names = {tars.REG: "files", tars.DIR: "directories", tars.LNK: "symlinks", stat.S_IFIFO: "fifos"}
    return names.get(stat.S_IFMT(expected.mode), "devices")


def test_inspect_counts_what_is_there(layer: Path) -> None:
    _, expected = tars.every_kind()
    shown = json.loads(afs_layer("inspect", "--json", layer).stdout)
    assert list(shown) == KEYS
    counts = shown["counts"]
    # every_kind names one of an inode's paths; which one the walk meets first is another matter
    hard_links = sum(what.nlink - 1 for what in expected.values() if what.same_as is None)
    kinds = Counter(kind_of(what) for what in expected.values())
    kinds["hard_links"] = hard_links
    assert {key: counts[key] for key in kinds} == kinds
    assert counts["entries"] == len(expected)
    assert counts["inodes"] == len(expected) - hard_links
    assert counts["opaque_directories"] == sum(what.xattrs == tars.OPAQUE for what in expected.values())
    assert counts["inodes_with_xattrs"] == sum(bool(what.xattrs) for what in expected.values() if not what.same_as)
    sizes = sorted((len(what.content) for what in expected.values()), reverse=True)
    largest = [(item["size"], item["path"]) for item in shown["largest"]]
    assert [size for size, _ in largest] == sizes[:10]
    assert all(len(expected[os.fsencode(path)].content) == size for size, path in largest)
    assert shown["sizes"]["tar"] == shown["tar_length"] == len(TAR)
    assert shown["sizes"]["overhead"] == layer.stat().st_size - len(TAR)
    assert shown["overhead_percent"] == pytest.approx(100 * shown["sizes"]["overhead"] / len(TAR))
    text = afs_layer("inspect", layer).stdout.decode()
    for number in (counts["entries"], counts["symlinks"], shown["sizes"]["metadata"]):
        assert str(number) in text


def test_inspect_shows_odd_names_and_empty_layers(tmp_path: Path) -> None:
    odd, nothing = tmp_path / "odd", tmp_path / "nothing"
    convert(io.BytesIO(tars.tar_of({"esc\x1b[2J": b"x"})[:-1024] + tars.file(b"\xff", b"yy") + tars.END).read, odd)
    convert(io.BytesIO(b"").read, nothing)
    paths = [item["path"] for item in json.loads(afs_layer("inspect", "--json", odd).stdout)["largest"]]
    assert [os.fsencode(path) for path in paths] == [b"\xff", b"esc\x1b[2J"]
    assert b"\x1b" not in afs_layer("inspect", odd).stdout
    empty = json.loads(afs_layer("inspect", "--json", nothing).stdout)
    assert (empty["overhead_percent"], empty["largest"], empty["counts"]["entries"]) == (None, [], 1)
    assert afs_layer("inspect", nothing).returncode == 0


def test_what_is_no_layer_is_told_while_the_pipe_stays_open(tmp_path: Path) -> None:
    command = [*COMMAND, "convert", "-", str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdin is not None
        child.stdin.write(b"x" * 1500)
        child.stdin.flush()
        assert child.wait(30) == 65
        assert child.stderr is not None
        assert b"not a tar header" in child.stderr.read()
    assert list(tmp_path.iterdir()) == []


def test_a_closed_stderr_is_quiet(tmp_path: Path, layer: Path) -> None:
    command = ["sh", "-c", 'exec "$@" 2>&-', "sh", *COMMAND, "verify", str(layer)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
