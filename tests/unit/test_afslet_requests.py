"""What a start request must look like, and admission."""

import re

import pytest

from afs.afslet.bundle import DEFAULT_PATH, command_line, merge_env
from afs.afslet.requests import check_start
from afs.core.errors import InvalidArgument
from afs.proto.v1 import afslet_pb2 as pb


def start(**changes: object) -> pb.StartRequest:
    """A good start request, changed."""
    return pb.StartRequest(**{"image": "a", "cpu_cores": 1, "memory_mb": 1} | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [{}, {"env": ["A=", "B==", "C=a b\n"]}, {"command": ["", "x"]}, {"timeout_ms": 1}, {"cpu_cores": 1 << 40}],
    ids=repr,
)
def test_good_requests(changes: dict[str, object]) -> None:
    check_start(start(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": ""}, "image is missing"),
        ({"cpu_cores": 0}, "cpu_cores must be positive, not 0"),
        ({"cpu_cores": -1}, "cpu_cores must be positive, not -1"),
        ({"memory_mb": 0}, "memory_mb must be positive, not 0"),
        ({"timeout_ms": -1}, "timeout_ms must not be negative"),
        ({"proxy_dispatch_max_retries": -1}, "proxy_dispatch_max_retries must not be negative"),
        ({"proxy_dispatch_backoff_ms": -1}, "proxy_dispatch_backoff_ms must not be negative"),
        ({"env": ["A"]}, "env entry 'A' is not NAME=value"),
        ({"env": ["=x"]}, "env entry '=x' is not NAME=value"),
        ({"env": [""]}, "env entry '' is not NAME=value"),
        ({"env": ["A=\0"]}, r"env entry 'A=\x00' is not NAME=value"),
        ({"command": ["a\0b"]}, "an argument of the command holds a NUL byte"),
    ],
)
def test_bad_requests(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{re.escape(message)}$"):
        check_start(start(**changes))


@pytest.mark.parametrize(
    ("config", "command", "expected"),
    [
        ({"Entrypoint": ["/e"], "Cmd": ["c"]}, [], ("/e", "c")),
        ({"Entrypoint": ["/e"], "Cmd": ["c"]}, ["x", "y"], ("x", "y")),
        ({"Entrypoint": None, "Cmd": ["c"]}, [], ("c",)),
        ({"Entrypoint": ["/e"]}, [], ("/e",)),
        ({}, [], ()),
    ],
)
def test_command_lines(config: dict[str, object], command: list[str], expected: tuple[str, ...]) -> None:
    assert command_line(config, command) == expected


def test_environments() -> None:
    assert merge_env([], [], {"HOME": "/root"}) == (f"PATH={DEFAULT_PATH}", "HOME=/root")
    merged = merge_env(["PATH=/i", "A=image", "B=1=2", "BARE"], ["A=request", "HOME=/h", "E="], {"HOME": "/root"})
    assert dict(entry.split("=", 1) for entry in merged) == {
        "PATH": "/i", "HOME": "/h", "A": "request", "B": "1=2", "BARE": "", "E": "",
    }  # fmt: skip
