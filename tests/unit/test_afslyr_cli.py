"""``afs_layer`` as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

from tests.testbed import tars


def afs_layer(*argv: str | Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run the command."""
    command = [sys.executable, "-m", "afs.layerstore.afslyr.cli", *argv]
    return subprocess.run(command, check=False, capture_output=True, input=stdin)


def test_convert_inspect_verify_and_export(tmp_path: Path) -> None:
    tar = tars.every_kind_tar()
    (tmp_path / "in.tar.gz").write_bytes(tars.gzipped(tar))
    out = tmp_path / "out.afslyr"
    assert afs_layer("convert", tmp_path / "in.tar.gz", out).returncode == 0
    assert afs_layer("verify", out).returncode == 0
    shown = json.loads(afs_layer("inspect", out, "--json").stdout)
    assert (shown["tar_length"], shown["file_size"]) == (len(tar), out.stat().st_size)
    assert shown["root_digest"].encode() in afs_layer("inspect", out).stdout
    assert afs_layer("export", out, "-").stdout == tar
    assert afs_layer("export", out, tmp_path / "back.tar").returncode == 0
    assert (tmp_path / "back.tar").read_bytes() == tar


def test_convert_replaces_only_by_force(tmp_path: Path) -> None:
    out = tmp_path / "out.afslyr"
    out.write_bytes(b"mine")
    refused = afs_layer("convert", "-", out, stdin=tars.END)
    assert (refused.returncode, out.read_bytes()) == (73, b"mine")
    assert refused.stderr.startswith(b"afs_layer: ")
    assert afs_layer("convert", "--force", "-", out, stdin=tars.END).returncode == 0
    assert afs_layer("verify", out).returncode == 0
    assert list(tmp_path.iterdir()) == [out]


def test_errors_are_one_line_with_an_exit_code(tmp_path: Path) -> None:
    bad = afs_layer("convert", "-", tmp_path / "out", stdin=b"no tar" * 200)
    assert (bad.returncode, bad.stderr.count(b"\n")) == (65, 1)
    (tmp_path / "junk").write_bytes(b"junk")
    assert afs_layer("verify", tmp_path / "junk").returncode == 65
    missing = afs_layer("verify", tmp_path / "missing")
    assert (missing.returncode, missing.stderr.count(b"\n")) == (66, 1)
