"""Every option of a run reaches its field of the start request, and has the default that the interface says."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from afs.afslet.requests import check_start
from afs.client import RunOptions, RunRequest
from afs.client.options import make_request, start_message
from afs.proto.v1 import afslet_pb2 as pb

FIELDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "tag": ("v1", {"tag": "v1"}),
    "cpu": (0.5, {"cpu_millis": 500}),
    "memory_mb": (64, {"memory_mb": 64}),
    "timeout": (1.5, {"timeout_ms": 1500}),
    "term_grace": (0.25, {"term_grace_ms": 250}),
    "env": ({"A": "1", "B": ""}, {"env": ["A=1", "B="]}),
    "cwd": ("/tmp", {"cwd": "/tmp"}),
    "user": ("app:extra", {"user": "app:extra"}),
    "groups": (["adm", "7"], {"groups": ["adm", "7"]}),
    "hostname": ("box", {"hostname": "box"}),
    "pids_limit": (32, {"pids_limit": 32}),
    "disk_mb": (100, {"disk_mb": 100}),
    "network": ("bridge", {"network": pb.NETWORK_BRIDGE}),
    "egress_allow": (["10.0.0.1:443"], {"egress_allow": ["10.0.0.1:443"]}),
    "user_namespace": (True, {"user_namespace": pb.USER_NAMESPACE_ON}),
    "stdin": (True, {"stdin": True}),
    "tty": (True, {"tty": True}),
    "terminal_size": ((24, 80), {"terminal_size": pb.TerminalSize(rows=24, columns=80)}),
    "max_output_bytes": (1000, {"max_output_bytes": 1000}),
    "upload_mode": ("copy", {"upload_mode": pb.UPLOAD_COPY}),
    "diff_format": ("zstd", {"diff_format": pb.DIFF_ZSTD}),
    "diff_include": (["*.o"], {"diff_include": ["*.o"]}),
    "diff_exclude": (["tmp/"], {"diff_exclude": ["tmp/"]}),
    "diff_max_bytes": (1 << 20, {"diff_max_bytes": 1 << 20}),
    "platform": (
        ("linux", "arm64", "v8"),
        {"platform_os": "linux", "platform_arch": "arm64", "platform_variant": "v8"},
    ),
    "node_id": ("n1", {"node_id": "n1"}),
    "force_local_fetch": (True, {"force_local_fetch": True}),
    "max_retries": (3, {"proxy_dispatch_max_retries": 3}),
    "backoff": (0.02, {"proxy_dispatch_backoff_ms": 20}),
    "queue_timeout": (0.0001, {"queue_timeout_ms": 1}),
    "priority": (-5, {"priority": -5}),
    "tenant": ("t", {"tenant": "t"}),
    "idempotency_key": ("k", {"idempotency_key": "k"}),
    "labels": ({"a": "b"}, {"labels": {"a": "b"}}),
}
ON_THIS_SIDE = {"upload", "upload_to"}


def default() -> pb.StartRequest:
    """What a request says that asks for nothing."""
    return pb.StartRequest(image="image", cpu_cores=1, memory_mb=512, bytes_only=True, no_upload=True)


@pytest.mark.parametrize("name", FIELDS)
def test_an_option_sets_its_fields_and_no_others(name: str) -> None:
    value, fields = FIELDS[name]
    wanted = default()
    for field in fields:
        wanted.ClearField(field)  # type: ignore[arg-type]
    wanted.MergeFrom(pb.StartRequest(**fields))
    assert start_message(RunRequest("image", **{name: value}), progress=False) == wanted


def test_no_option_is_missing() -> None:
    assert set(FIELDS) | ON_THIS_SIDE == set(RunOptions.__annotations__)
    assert {field.name for field in dataclasses.fields(RunRequest)} - {"image", "command", "diff_to"} == set(
        RunOptions.__annotations__
    )
    said = {field for _, fields in FIELDS.values() for field in fields} | {"image", "command", "cpu_cores"}
    internal = {"bytes_only", "progress", "no_upload", "discovery_addr", "fuse_max_read_ahead_bytes"}
    assert said | internal == {field.name for field in pb.StartRequest.DESCRIPTOR.fields}


def test_defaults() -> None:
    assert start_message(RunRequest("image"), progress=False) == default()
    check_start(default())


@pytest.mark.parametrize(
    ("cpu", "cores", "millis"), [(2, 2, 0), (2.0, 2, 0), (1.5, 2, 1500), (0.0001, 1, 1), (0, 0, 0)]
)
def test_fractions_of_cores(cpu: float, cores: int, millis: int) -> None:
    """A server that knows whole cores only gives enough."""
    start = start_message(RunRequest("image", cpu=cpu), progress=False)
    assert (start.cpu_cores, start.cpu_millis) == (cores, millis)


def test_a_request_with_other_options_is_another_request() -> None:
    template = RunRequest("image", ["a"], cpu=2, env={"A": "1"})
    assert make_request(template, ()) == template
    assert make_request(template, ["b"], env={"B": "2"}) == RunRequest("image", ["b"], cpu=2, env={"B": "2"})
    assert template.env == {"A": "1"}
