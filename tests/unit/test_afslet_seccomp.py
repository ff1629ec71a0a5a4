"""Seccomp profiles become the runtime's filter."""

from __future__ import annotations

import errno
import json
import logging
import os
import platform
from typing import TYPE_CHECKING, Any

import pytest

from afs.afslet import seccomp
from afs.afslet.bundle import CAPABILITIES
from afs.afslet.seccomp import DISTRIBUTION_PROFILE, Host, load_filter, tighten, translate
from afs.core.errors import InvalidArgument

if TYPE_CHECKING:
    from pathlib import Path

AMD64 = Host("x86_64", (6, 1), frozenset({"CAP_CHOWN"}))
ADMIN = Host("x86_64", (6, 1), frozenset({"CAP_CHOWN", "CAP_SYS_ADMIN"}))
ARCHITECTURES = [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86", "SCMP_ARCH_X32"]}]


def rule(*names: str, action: str = "ALLOW", **more: Any) -> dict[str, Any]:
    """A rule of a profile."""
    return {"names": list(names), "action": f"SCMP_ACT_{action}", **more}


def profile(*rules: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A profile in the containers' format."""
    return {"defaultAction": "SCMP_ACT_ERRNO", "archMap": ARCHITECTURES, "syscalls": list(rules), **more}


def outcomes(found: dict[str, Any], name: str) -> list[tuple[str, int | None, list[dict[str, Any]]]]:
    """What a filter says about a system call: (action, error number, conditions) of each rule."""
    return [
        (each["action"].removeprefix("SCMP_ACT_"), each.get("errnoRet"), each.get("args", []))
        for each in found["syscalls"]
        if name in each["names"]
    ]


@pytest.mark.parametrize(
    ("conditions", "applies"),
    [
        ({}, True),
        ({"includes": {}, "excludes": {}}, True),
        ({"includes": {"arches": ["amd64", "x32"]}}, True),
        ({"includes": {"arches": ["arm64"]}}, False),
        ({"excludes": {"arches": ["amd64"]}}, False),
        ({"includes": {"caps": ["CAP_CHOWN"]}}, True),
        ({"includes": {"caps": ["CAP_CHOWN", "CAP_SYS_ADMIN"]}}, False),
        ({"excludes": {"caps": ["CAP_SYS_ADMIN"]}}, True),
        ({"excludes": {"caps": ["CAP_SYS_ADMIN", "CAP_CHOWN"]}}, False),
        ({"includes": {"minKernel": "4.8"}}, True),
        ({"includes": {"minKernel": "6.2"}}, False),
        ({"excludes": {"minKernel": "6.1"}}, False),
        ({"excludes": {"minKernel": "6.10"}}, True),
    ],
)
def test_conditions(conditions: dict[str, Any], applies: bool) -> None:
    found = translate(profile(rule("read"), rule("ptrace", **conditions)), AMD64)
    assert bool(outcomes(found, "ptrace")) is applies


def test_rules_are_joined_and_the_first_one_counts() -> None:
    found = translate(
        profile(
            rule("read", "write"),
            rule("bpf", action="ERRNO", errnoRet=1),
            rule("open", "bpf", "read"),
            rule("acct", action="ERRNO", errno="EINVAL", errnoRet=1),
            rule("swapon", action="ERRNO", errnoRet=38),
            {"name": "old", "action": "SCMP_ACT_ALLOW"},
            defaultErrno="ENOSYS",
        ),
        AMD64,
    )
    assert found["syscalls"] == [
        rule("read", "write", "open", "old"),
        rule("bpf", action="ERRNO", errnoRet=1),
        rule("acct", action="ERRNO", errnoRet=errno.EINVAL),
    ]
    assert found["defaultErrnoRet"] == errno.ENOSYS
    assert found["architectures"] == ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"]


def test_a_profile_in_the_runtime_s_own_format_is_taken() -> None:
    argument = {"index": 0, "value": 8, "valueTwo": 0, "op": "SCMP_CMP_EQ"}
    own = {
        "defaultAction": "SCMP_ACT_KILL_PROCESS",
        "architectures": ["SCMP_ARCH_X86_64"],
        "flags": ["SECCOMP_FILTER_FLAG_LOG"],
        "syscalls": [rule("read", "write"), rule("personality", args=[argument])],
    }
    assert translate(own, AMD64) == own


BROKEN: dict[str, tuple[Any, str]] = {
    "no object": ([], "the profile is not an object"),
    "empty": ({}, "it has no syscalls"),
    "no default": (profile(rule("read"), defaultAction=None), "defaultAction has the action None"),
    "unknown action": (profile(rule("read", action="SHRUG")), "the rule for read has the action 'SCMP_ACT_SHRUG'"),
    "needs an agent": (profile(rule("read", action="NOTIFY")), "which is not supported"),
    "no names": (profile({"action": "SCMP_ACT_ALLOW"}), "a rule of syscalls has no names"),
    "names": (profile(rule("read") | {"names": "read"}), "names is not a list"),
    "a name": (profile(rule("read") | {"names": [7]}), "names is not a list of names"),
    "a rule": (profile("read"), "a rule of syscalls is not an object"),  # type: ignore[arg-type]
    "op": (profile(rule("read", args=[{"index": 0, "op": "SCMP_CMP_ODD"}])), "the unknown op 'SCMP_CMP_ODD'"),
    "index": (profile(rule("read", args=[{"index": 6, "op": "SCMP_CMP_EQ"}])), "whose index is 6"),
    "value": (profile(rule("read", args=[{"index": 0, "value": -1, "op": "SCMP_CMP_EQ"}])), "whose value is -1"),
    "errno": (profile(rule("read", action="ERRNO", errno="ENOTHING")), "errno 'ENOTHING' is not known"),
    "number": (profile(rule("read", action="ERRNO", errnoRet="1")), "errnoRet is '1'"),
    "condition": (profile(rule("read", includes={"moon": ["full"]})), "a condition that is not known here: moon"),
    "kernel": (profile(rule("read", includes={"minKernel": "new"})), "a minKernel that is no version: 'new'"),
    "two lists": (profile(rule("read"), architectures=["SCMP_ARCH_X86"]), "both architectures and archMap"),
    "foreign": (profile(rule("read"), archMap=[{"architecture": "SCMP_ARCH_ARM"}]), "archMap lacks SCMP_ARCH_X86_64"),
    "foreign too": (
        {"defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_ARM"], "syscalls": [rule("read")]},
        "architectures lacks SCMP_ARCH_X86_64",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_profile(name: str) -> None:
    broken, why = BROKEN[name]
    with pytest.raises(ValueError, match=why):
        translate(broken, AMD64)


def test_files_that_are_no_profiles(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    for content, why in ((b"{", "Expecting property name"), (b"\xff\xfe\x00", ""), (b"{}", "it has no syscalls")):
        file.write_bytes(content)
        with pytest.raises(InvalidArgument) as caught:
            load_filter(str(file), CAPABILITIES)
        assert caught.value.line.startswith(f"seccomp profile {file}: {why}")
    for path, why in ((tmp_path / "none", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(InvalidArgument) as caught:
            load_filter(str(path), CAPABILITIES)
        assert caught.value.line == f"seccomp profile {path}: {why}"


def test_a_machine_that_is_not_known() -> None:
    with pytest.raises(ValueError, match="seccomp on vax is not supported"):
        translate(profile(rule("read")), Host("vax", (6, 1), frozenset()))


def test_nobody_goes_without_a_filter_unnoticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(seccomp, "DISTRIBUTION_PROFILE", tmp_path / "none.json")
    assert load_filter("", CAPABILITIES) is None
    assert [(record.levelno, str(tmp_path / "none.json") in record.message) for record in caplog.records] == [
        (logging.ERROR, True)
    ]
    caplog.clear()
    assert load_filter("unconfined", CAPABILITIES) is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_a_configured_profile_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps(profile(rule("read", "mount", "clone", "keyctl"))))
    machine = platform.machine()
    if machine != "x86_64":
        pytest.skip(f"the profile is for x86_64, not {machine}")
    found = load_filter(str(tmp_path / "mine.json"), CAPABILITIES)
    assert found is not None
    assert found["syscalls"] == [rule("read", "mount", "clone", "keyctl")]


def test_the_distribution_s_profile_is_made_stricter() -> None:
    given = translate(
        profile(rule("read", "mount", "unshare", "clone", "clone3", "socket", "keyctl"), defaultErrnoRet=38), AMD64
    )
    found = tighten(given, AMD64)
    assert outcomes(found, "read") == [("ALLOW", None, [])]
    for name in ("mount", "unshare", "keyctl", "io_uring_setup", "reboot"):
        assert outcomes(found, name) == [("ERRNO", errno.EPERM, [])]
    assert outcomes(found, "clone3") == []  # ENOSYS, as the default has it
    ((action, _, (flags,)),) = outcomes(found, "clone")
    assert (action, flags["value"], flags["op"]) == ("ALLOW", 0x7E020000, "SCMP_CMP_MASKED_EQ")
    assert [(action, code, args[0]["value"]) for action, code, args in outcomes(found, "socket")] == [
        ("ALLOW", None, 40),
        ("ERRNO", errno.EAFNOSUPPORT, 40),
    ]
    admin = tighten(given, ADMIN)
    for name in ("mount", "unshare", "clone", "clone3"):
        assert outcomes(admin, name) == [("ALLOW", None, [])]
    assert outcomes(admin, "keyctl") == [("ERRNO", errno.EPERM, [])]


def test_what_a_profile_withholds_stays_withheld() -> None:
    found = tighten(translate(profile(rule("read")), AMD64), AMD64)
    assert [name for each in found["syscalls"] if each["action"] == "SCMP_ACT_ALLOW" for name in each["names"]] == [
        "read"
    ]


@pytest.mark.skipif(not DISTRIBUTION_PROFILE.exists(), reason=f"no {DISTRIBUTION_PROFILE}")
def test_debian_s_profile(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    found = load_filter("", CAPABILITIES)
    assert found is not None
    assert f"seccomp filter of {DISTRIBUTION_PROFILE}" in caplog.text
    allowed = {
        name
        for each in found["syscalls"]
        for name in each["names"]
        if each["action"] == "SCMP_ACT_ALLOW" and not each.get("args")
    }
    assert {"read", "execve", "openat", "futex", "ptrace", "chroot", "mknod", "statx"} <= allowed
    withheld = "mount umount2 unshare setns pivot_root clone3 bpf keyctl perf_event_open open_by_handle_at kexec_load"
    withheld += " init_module reboot userfaultfd iopl settimeofday syslog io_uring_setup"
    assert allowed.isdisjoint(withheld.split())
    assert "SCMP_ARCH_X32" not in found["architectures"]
    assert os.uname().machine != "x86_64" or "SCMP_ARCH_X86" in found["architectures"]
