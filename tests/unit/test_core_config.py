"""Configuration: three sources in order, and messages that name the setting."""

from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from afs.core.config import from_command_line, load, options, setting
from afs.core.errors import InvalidArgument
from afs.core.units import parse_duration, parse_size


@dataclass(frozen=True, slots=True)
class Config:
    """One setting of every kind."""

    root: Path = setting(Path("/default"), "A directory.")
    listen: str = setting("127.0.0.1:1", "An address.")
    count: int = setting(2, "A number.")
    ratio: float = setting(0.5, "A fraction.")
    ttl: float = setting(7.0, "A duration.", parse_duration)
    size: int = setting(0, "A size.", parse_size)
    insecure: bool = setting(False, "A switch.")
    peers: tuple[str, ...] = setting(("a", "b"), "A peer; repeatable.")


def write(tmp_path: Path, text: str) -> Path:
    """*text* as a configuration file."""
    file = tmp_path / "afs.toml"
    file.write_text(text)
    return file


def from_file(tmp_path: Path, text: str) -> Config:
    """What the file alone gives."""
    return load(Config, "svc", file=write(tmp_path, text), environ={}, flags={})


def from_environment(**variables: str) -> Config:
    """What ``AFS_SVC_*`` alone gives."""
    return load(Config, "svc", file=None, environ={f"AFS_SVC_{k}": v for k, v in variables.items()}, flags={})


def test_defaults() -> None:
    assert load(Config, "svc", file=None, environ={}, flags={}) == Config()


def test_a_file_gives_every_kind_of_value(tmp_path: Path) -> None:
    config = from_file(
        tmp_path,
        """
        [svc]
        root = "/data"
        listen = "x:1"
        count = 3
        ratio = 1
        ttl = "1m"
        size = "1k"
        insecure = true
        peers = ["c"]
        [other]
        unknown = 1
        """,
    )
    assert config == Config(Path("/data"), "x:1", 3, 1.0, 60.0, 1024, True, ("c",))
    assert isinstance(config.ratio, float)


def test_numbers_need_no_parser(tmp_path: Path) -> None:
    config = from_file(tmp_path, "[svc]\nttl = 5\nsize = 6\n")
    assert (config.ttl, config.size) == (5.0, 6)


def test_flags_beat_the_environment_and_that_beats_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, '[svc]\ncount = 10\nlisten = "file"\nttl = "10s"\npeers = ["file"]\n')
    environ = {"AFS_SVC_LISTEN": "environment", "AFS_SVC_TTL": "20s", "AFS_OTHER_COUNT": "99", "AFS_SVC_PEERS": "e,f"}
    flags: dict[str, object] = {"ttl": "30s", "root": None, "peers": ()}
    config = load(Config, "svc", file=file, environ=environ, flags=flags)
    assert config == Config(count=10, listen="environment", ttl=30.0, peers=("e", "f"))


def test_a_flag_of_false_beats_true(tmp_path: Path) -> None:
    file = write(tmp_path, "[svc]\ninsecure = true\n")
    assert not load(Config, "svc", file=file, environ={"AFS_SVC_INSECURE": "1"}, flags={"insecure": False}).insecure
    assert not load(Config, "svc", file=file, environ={"AFS_SVC_INSECURE": "no"}, flags={}).insecure


@pytest.mark.parametrize("text", ["1", "true", "YES", "On"])
def test_true(text: str) -> None:
    assert from_environment(INSECURE=text).insecure


@pytest.mark.parametrize(("text", "peers"), [("", ()), ("x", ("x",)), ("x,y,", ("x", "y"))])
def test_lists_in_the_environment(text: str, peers: tuple[str, ...]) -> None:
    assert from_environment(PEERS=text).peers == peers


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("COUNT", "x", "count: 'x' is not a int"),
        ("COUNT", "", "count: '' is not a int"),
        ("RATIO", "x", "ratio: 'x' is not a float"),
        ("INSECURE", "maybe", "insecure: 'maybe' is neither true nor false"),
        ("TTL", "soon", "ttl: not a duration: 'soon'"),
        ("SIZE", "big", "size: not a size: 'big'"),
    ],
)
def test_bad_values_name_the_setting(name: str, text: str, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        from_environment(**{name: text})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense = 1", r"\[svc\] has no setting 'nonsense'"),
        ("count = 1.5", "count: 1.5 is not a int"),
        ("count = true", "count: True is not a int"),
        ("ratio = true", "ratio: True is not a float"),
        ("ttl = false", "ttl: False is not a float"),
        ("insecure = 1", "insecure: 1 is not a bool"),
        ("listen = 1", "listen: 1 is not a str"),
        ("root = 1", "root: 1 is not a Path"),
        ("peers = 1", "peers: 1 is not a tuple"),
        ("listen = {}", "listen: {} is not a str"),
        ('ttl = "soon"', "ttl: not a duration: 'soon'"),
    ],
)
def test_bad_files_name_the_setting(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        from_file(tmp_path, f"[svc]\n{line}\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [("[svc", "is not TOML"), ("svc = 3", "'svc' is not a table"), ("svc = [1]", "'svc' is not a table")],
)
def test_files_that_make_no_sense(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        from_file(tmp_path, text)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="No such file or directory"):
        load(Config, "svc", file=tmp_path / "missing", environ={}, flags={})
    with pytest.raises(InvalidArgument, match="Is a directory"):
        load(Config, "svc", file=tmp_path, environ={}, flags={})
    (tmp_path / "latin").write_bytes(b"x = '\xff'")
    with pytest.raises(InvalidArgument, match="is not TOML"):
        load(Config, "svc", file=tmp_path / "latin", environ={}, flags={})


@settings(derandomize=True, deadline=None, database=None)
@given(st.integers(), st.floats(allow_nan=False), st.booleans())
def test_what_python_prints_is_read_back(count: int, ratio: float, insecure: bool) -> None:
    config = from_environment(COUNT=str(count), RATIO=repr(ratio), INSECURE=str(insecure))
    assert (config.count, config.ratio, config.insecure) == (count, ratio, insecure)


def run(args: list[str], **environ: str) -> tuple[int, str, Config | None]:
    """(exit code, output, configuration) of a command with the options."""
    seen: list[Config] = []

    @click.command()
    @options(Config, "svc")
    def command(**flags: object) -> None:
        seen.append(from_command_line(Config, "svc", flags))

    done = CliRunner().invoke(command, args, env=environ)
    return done.exit_code, done.output, seen[0] if seen else None


def test_flags_come_from_the_fields(tmp_path: Path) -> None:
    file = write(tmp_path, "[svc]\ncount = 5\n")
    args = ["--config", str(file), "--root", "/r", "--ttl", "2m", "--peer", "x", "--peer", "y", "--insecure"]
    assert run(args)[2] == Config(root=Path("/r"), count=5, ttl=120.0, peers=("x", "y"), insecure=True)
    assert run([])[2] == Config()
    assert run(["--no-insecure"], AFS_SVC_INSECURE="1")[2] == Config()
    assert run([], AFS_SVC_CONFIG=str(file))[2] == Config(count=5)
    assert run([], AFS_CONFIG=str(file))[2] == Config(count=5)


def test_help_shows_defaults() -> None:
    code, output, _ = run(["--help"])
    assert code == 0
    shown = " ".join(output.split())
    for part in ("--config", "[default: /default]", "--peer", "[default: a,b]", "--insecure / --no-insecure", "7.0"):
        assert part in shown


def test_click_refuses_flags_of_the_wrong_kind() -> None:
    assert run(["--count", "x"])[0] == 64
    assert run(["--nonsense"])[0] == 64
