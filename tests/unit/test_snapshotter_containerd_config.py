"""containerd's configuration for AFS: what it says for each release, and how it gets into a file that is there."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import tarfile
import tomllib
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afs.core.errors import FailedPrecondition, InvalidArgument, Unimplemented
from afs.snapshotter.containerd_ctr import Plugin, parse_plugins
from afs.snapshotter.containerd_file import install, read_text
from afs.snapshotter.containerd_image import archive, machine, program
from afs.snapshotter.containerd_settings import Snapshotter, check_name, plan
from afs.snapshotter.containerd_toml import Edited, dotted, edit, literal, parse
from afs.snapshotter.containerd_version import Release, installed_release, parse_release

if TYPE_CHECKING:
    import random

AFS = Snapshotter("afs", Path("/run/afs/snapshotter.sock"), Path("/var/lib/afs/snapshotter"))
PROXY = {"type": "snapshot", "address": "/run/afs/snapshotter.sock"}
EXPORTS = {"root": "/var/lib/afs/snapshotter", "enable_remote_snapshot_annotations": "true"}
OVERLAYFS = {"platform": "linux", "snapshotter": "overlayfs", "differ": "walking"}
EROFS = {"platform": "linux(+erofs)", "snapshotter": "erofs", "differ": "erofs", "optional": True}
OURS = {"platform": "linux", "snapshotter": "afs", "differ": "walking"}
OLD, IMAGES, TRANSFER = "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.transfer.v1.local"


def merge(text: str, release: str, *, cri: bool = True, force: bool = False) -> Edited:
    """*text* with what AFS needs in containerd *release*; a second time must change nothing."""
    edited = edit(text, plan(parse_release(release), parse(text, "x"), AFS, cri=cri), force=force)
    again = edit(edited.text, plan(parse_release(release), parse(edited.text, "x"), AFS, cri=cri))
    assert again == Edited(edited.text)
    return edited


def content(text: str, release: str, **options: bool) -> dict[str, Any]:
    """The content of the merged text."""
    return tomllib.loads(merge(text, release, **options).text)


def assert_only_added(before: str, after: str, *changed: str) -> None:
    """Every line of *before* is in *after*, in order, but for those that contain one of *changed*."""
    lines = iter(after.splitlines())
    for line in before.splitlines():
        if not any(word in line for word in changed):
            assert line in lines, f"{line!r} is gone or moved"


# Which containerd


@pytest.mark.parametrize(
    ("text", "release"),
    [
        ("1.6", (1, 6)),
        ("v2.1.4", (2, 1)),
        ("2.10.0-beta.1", (2, 10)),
        ("containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u3\n", (1, 6)),
        ("containerd containerd.io 1.7.27 05044ec0a9a75232cad458027ca83437aae3f4da\n", (1, 7)),
        ("containerd github.com/containerd/containerd/v2 v2.3.0 a1b2c3", (2, 3)),
    ],
)
def test_releases(text: str, release: tuple[int, int]) -> None:
    assert parse_release(text) == release


def test_what_is_no_release() -> None:
    with pytest.raises(InvalidArgument, match="not a version of containerd: 'two'; write it like"):
        parse_release("two")
    with pytest.raises(Unimplemented, match=r"containerd 1\.5 is older than 1\.6"):
        parse_release("1.5.9")


def script(path: Path, text: str) -> str:
    """A program that is a shell script."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_the_installed_release(tmp_path: Path) -> None:
    assert installed_release(script(tmp_path / "c", "echo containerd x/y v2.2.1 abc")) == Release(2, 2)
    with pytest.raises(FailedPrecondition, match=r"cannot ask .*/none for its version: No such file"):
        installed_release(str(tmp_path / "none"))
    with pytest.raises(FailedPrecondition, match="--version failed with status 3: broken"):
        installed_release(script(tmp_path / "d", "echo broken >&2; exit 3"))


# What is said


@pytest.mark.parametrize(
    ("release", "expected"),
    [
        (
            "1.6",
            {
                "version": 2,
                "proxy_plugins": {"afs": PROXY},
                "plugins": {OLD: {"containerd": {"snapshotter": "afs", "disable_snapshot_annotations": False}}},
            },
        ),
        (
            "1.7",
            {
                "version": 2,
                "proxy_plugins": {"afs": {**PROXY, "exports": EXPORTS}},
                "plugins": {
                    OLD: {"containerd": {"snapshotter": "afs", "disable_snapshot_annotations": False}},
                    TRANSFER: {"unpack_config": [OVERLAYFS, OURS]},
                },
            },
        ),
        (
            "2.0",
            {
                "version": 3,
                "proxy_plugins": {"afs": {**PROXY, "exports": EXPORTS}},
                "plugins": {
                    IMAGES: {"snapshotter": "afs", "disable_snapshot_annotations": False},
                    TRANSFER: {"unpack_config": [OVERLAYFS, OURS]},
                },
            },
        ),
        *(
            (
                release,
                {
                    "version": version,
                    "proxy_plugins": {"afs": {**PROXY, "exports": EXPORTS}},
                    "plugins": {IMAGES: {"snapshotter": "afs"}, TRANSFER: {"unpack_config": unpack}},
                },
            )
            for release, version, unpack in [
                ("2.1", 3, [OVERLAYFS, OURS]),
                ("2.2", 3, [OVERLAYFS, OURS]),
                ("2.3", 4, [OVERLAYFS, EROFS, OURS]),
                ("2.4", 4, [OVERLAYFS, EROFS, OURS]),
            ]
        ),
    ],
)
def test_a_new_file(release: str, expected: dict[str, Any]) -> None:
    edited = merge("", release)
    assert tomllib.loads(edited.text) == expected
    assert edited == merge("", release), "it is the same every time"
    for paragraph in edited.text.strip().split("\n\n"):
        assert "# " in paragraph, "everything has a reason beside it"


def test_without_cri() -> None:
    assert content("", "1.6", cri=False) == {"version": 2, "proxy_plugins": {"afs": PROXY}}
    assert IMAGES not in content("", "2.1", cri=False)["plugins"]


@pytest.mark.parametrize("name", ["afs", "AFS-2", "my.afs_1"])
def test_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("afs-stargz", "contains 'stargz': nerdctl would pull"),
        ("nydus", "contains 'nydus'"),
        ("soci-x", "contains 'soci'"),
        ("overlaybd", "contains 'overlaybd'"),
        ("a.cvmfs-snapshotter", "contains 'cvmfs-snapshotter'"),
        ("overlayfs", "is that of a snapshotter of containerd itself"),
        ("", "not a name"),
        ("a b", "not a name"),
        ("-afs", "not a name"),
        ("a" * 77, "not a name"),
    ],
)
def test_names_that_would_not_do(name: str, says: str) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(says)):
        check_name(name)


# Files that are there

DEBIAN = """version = 2

[plugins]
  [plugins."io.containerd.grpc.v1.cri"]
    [plugins."io.containerd.grpc.v1.cri".cni]
      bin_dir = "/usr/lib/cni"
      conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.internal.v1.opt"]
    path = "/var/lib/containerd/opt"
"""
FULL = """# ours since 2023
version = 2 # TOML
imports = ["/etc/containerd/conf.d/*.toml"]

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "registry.k8s.io/pause:3.9"   # as the kubelet's

  [plugins."io.containerd.grpc.v1.cri".containerd]
    default_runtime_name = "runc"
    disable_snapshot_annotations = true
    snapshotter = "overlayfs" # for now

    # the runtimes
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      snapshotter = ""

# somebody else's
[proxy_plugins]
  [proxy_plugins.stargz]
    type = "snapshot"
    address = "/run/containerd-stargz-grpc/containerd-stargz-grpc.sock"

# the end
[grpc]
  address = '/run/containerd/containerd.sock'
"""


@pytest.mark.parametrize("release", ["1.6", "1.7", "2.0", "2.1", "2.3"])
@pytest.mark.parametrize("text", [DEBIAN, FULL])
def test_what_is_there_stays(text: str, release: str) -> None:
    edited = merge(text, release)
    assert_only_added(text, edited.text, "disable_snapshot_annotations", "snapshotter = ")
    now = tomllib.loads(edited.text)
    assert now["proxy_plugins"]["afs"] == (PROXY if release == "1.6" else {**PROXY, "exports": EXPORTS})
    assert now.get("imports") == tomllib.loads(text).get("imports")


def test_values_change_where_they_stand() -> None:
    edited = merge(FULL, "1.6")
    assert '    snapshotter = "afs" # for now\n\n    # the runtimes\n' in edited.text
    assert "    disable_snapshot_annotations = false\n" in edited.text
    assert edited.changes[-1] == (f'plugins."{OLD}".containerd.disable_snapshot_annotations = false (was true)')
    assert edited.text.endswith(merge("version = 2\n", "1.6", cri=False).text.removeprefix("version = 2\n"))


def test_keys_come_into_the_table_that_is_there() -> None:
    text = '[proxy_plugins.afs]\n  type = "snapshot"\n\n# about the next\n[grpc]\n'
    edited = merge(f"version = 2\n{text}", "1.6", cri=False)
    wanted = text.replace("\n\n", '\n  # The socket of afs_snapshotter.\n  address = "/run/afs/snapshotter.sock"\n\n')
    assert edited.text == f"version = 2\n{wanted}"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("unpack_config = []", "unpack_config = [{OURS}]"),
        ('unpack_config = [{platform = "linux"}]', 'unpack_config = [{platform = "linux"}, {OURS}]'),
        ('unpack_config = [{platform = "linux"},] # x', 'unpack_config = [{platform = "linux"}, {OURS}] # x'),
        (
            'unpack_config = [\n  {platform = "linux"}, # ]\n]',
            'unpack_config = [\n  {platform = "linux"}, # ]\n  {OURS}\n]',
        ),
        (
            'unpack_config = [\n  {platform = "linux"} # ]\n]',
            'unpack_config = [\n  {platform = "linux"} # ]\n  , {OURS}\n]',
        ),
    ],
)
def test_an_entry_comes_to_a_list_that_is_written_inline(before: str, after: str) -> None:
    head = f'version = 3\n[plugins."{TRANSFER}"]\n'
    ours = '{ platform = "linux", snapshotter = "afs", differ = "walking" }'
    edited = merge(f"{head}{before}\nmore = 1\n", "2.1", cri=False)
    assert edited.text.startswith(f"{head}{after.replace('{OURS}', ours)}\nmore = 1\n")


def test_an_entry_comes_behind_the_others() -> None:
    text = f"""version = 3
[plugins]
  [plugins.'{TRANSFER}']
    config_path = ''

    [[plugins.'{TRANSFER}'.unpack_config]]
      platform = 'linux/amd64'
      snapshotter = 'btrfs'

[timeouts]
  x = '1s'
"""
    edited = merge(text, "2.1", cri=False)
    assert_only_added(text, edited.text)
    config = tomllib.loads(edited.text)["plugins"][TRANSFER]
    assert config["unpack_config"] == [{"platform": "linux/amd64", "snapshotter": "btrfs"}, OURS], "the list is theirs"
    assert edited.text.index('"afs"') < edited.text.index("[timeouts]")


def test_an_entry_of_ours_is_left_alone() -> None:
    theirs = {"platform": "linux/arm64", "snapshotter": "afs", "differ": ""}
    text = f'version = 3\n[[plugins."{TRANSFER}".unpack_config]]\n'
    text += "".join(f"{key} = {literal(value)}\n" for key, value in theirs.items())
    assert content(text, "2.1")["plugins"][TRANSFER]["unpack_config"] == [theirs]


def test_line_ends_and_a_missing_one() -> None:
    edited = merge("version = 2\r\n[grpc]\r\nuid = 0", "1.7")
    assert edited.text.startswith("version = 2\r\n[grpc]\r\nuid = 0\r\n\r\n[proxy_plugins.afs]\r\n")
    assert "\n" not in edited.text.replace("\r\n", "")


def test_a_file_of_comments_is_new() -> None:
    edited = merge("# Written by a tool.\n\n# [grpc]\n", "2.1")
    assert edited.text.startswith("# Written by a tool.\n\n# Version 3,")
    assert "\n# [grpc]\n\n[proxy_plugins.afs]\n" in edited.text


def test_dotted_keys_are_extended_as_such() -> None:
    text = f'version = 2\n[plugins."{OLD}"]\n  containerd.snapshotter = """overlayfs""" # ""\n'
    edited = merge(text, "1.6")
    assert '  containerd.snapshotter = "afs" # ""\n' in edited.text
    assert "  containerd.disable_snapshot_annotations = false\n" in edited.text


def test_values_of_several_lines_are_passed_over() -> None:
    text = f'version = 2\nx = """\n[proxy_plugins.afs]\n"""\ny = [\n  "[a]",\n  # ]\n]\n[plugins."{OLD}"]\nz = 1\n'
    edited = merge(text, "1.6")
    assert_only_added(text, edited.text)


@pytest.mark.parametrize("text", ["proxy_plugins = { other = { type = 'snapshot' } }\nversion = 2\n"])
def test_what_cannot_be_extended_is_refused(text: str) -> None:
    with pytest.raises(FailedPrecondition, match="written in a way that AFS cannot extend"):
        merge(text, "1.6")


def test_a_table_that_is_none() -> None:
    with pytest.raises(FailedPrecondition, match=r"^proxy_plugins is not a table$"):
        merge("version = 2\nproxy_plugins = 1\n", "1.6")
    with pytest.raises(FailedPrecondition, match="unpack_config is 1, not a list of tables"):
        merge(f'version = 3\nplugins."{TRANSFER}".unpack_config = 1\n', "2.0", cri=False)


# Other versions of the file


@pytest.mark.parametrize(
    ("text", "release", "says"),
    [
        ('disabled_plugins = ["cri"]\n', "1.6", "version 1 of .*: give it `version = 2`"),
        ("version = 1\n", "2.1", "version 1 of .*: `containerd config migrate` prints it as a newer one"),
        ("version = 3\n", "1.7", "version 3 of .*, which containerd 1.7 does not read"),
        ("version = 4\n", "2.2", "version 4 of .*, which containerd 2.2 does not read"),
        ("version = 9\n", "2.4", "version 9 of .*, which AFS does not know"),
        ("version = [2]\n", "2.4", r"version \[2\] of .*, which AFS does not know"),
    ],
)
def test_versions_that_do_not_fit(text: str, release: str, says: str) -> None:
    with pytest.raises(FailedPrecondition, match=says):
        merge(text, release)


@pytest.mark.parametrize("release", ["2.0", "2.1", "2.3"])
def test_version_2_for_containerd_2(release: str) -> None:
    """It reads that, and takes CRI's keys over only if there are `runtimes`: so they stand in the new section, too."""
    now = content(DEBIAN, release)
    assert now["version"] == 2
    assert now["plugins"][IMAGES]["snapshotter"] == "afs"
    assert "containerd" not in now["plugins"][OLD]
    now = content(FULL, release)
    assert (now["plugins"][IMAGES]["snapshotter"], now["plugins"][OLD]["containerd"]["snapshotter"]) == ("afs", "afs")
    with pytest.raises(FailedPrecondition, match=r'grpc\.v1\.cri"\.containerd\.snapshotter is "stargz"'):
        merge(FULL.replace('"overlayfs"', '"stargz"'), release)


@pytest.mark.parametrize(
    ("line", "annotations"),
    [
        ("x = 1", None),
        ("use_local_image_pull = true", False),
        ("discard_unpacked_layers = true", False),
        ("max_concurrent_downloads = 5", False),
        ("max_concurrent_downloads = 3", None),
        ("image_pull_with_sync_fs = true", False),
        ("disable_snapshot_annotations = true", True),
        ('registry.config_path = "/etc/containerd/certs.d"', None),
        ('registry.mirrors."docker.io".endpoint = ["https://m"]', False),
    ],
)
def test_cri_that_pulls_by_itself_is_told_to_say_what(line: str, annotations: bool | None) -> None:
    text = f'version = 3\n[plugins."{IMAGES}"]\n{line}\n'
    assert content(text, "2.1")["plugins"][IMAGES].get("disable_snapshot_annotations") is annotations


# What others chose


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            f'[plugins."{OLD}".containerd]\nsnapshotter = "stargz"',
            f'plugins."{OLD}".containerd.snapshotter is "stargz", not "afs"; --force changes it, --no-cri leaves',
        ),
        (
            '[proxy_plugins.afs]\ntype = "snapshot"\naddress = "/run/other.sock"',
            'proxy_plugins.afs.address is "/run/other.sock", not "/run/afs/snapshotter.sock"; --force changes it, another',
        ),
        ('[proxy_plugins.afs]\ntype = "content"', 'proxy_plugins.afs.type is "content", not "snapshot"'),
        ('[proxy_plugins.afs.exports]\nroot = "/x"', 'proxy_plugins.afs.exports.root is "/x", not'),
        (
            "[proxy_plugins.afs.exports]\nenable_remote_snapshot_annotations = true",
            'enable_remote_snapshot_annotations is true, not "true"',
        ),
    ],
)
def test_conflicts(text: str, says: str) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        merge(f"version = 2\n{text}\n", "1.7")
    assert says in caught.value.line
    forced = content(f"version = 2\n{text}\n", "1.7", force=True)
    assert forced["proxy_plugins"]["afs"] == {**PROXY, "exports": EXPORTS}
    assert forced["plugins"][OLD]["containerd"]["snapshotter"] == "afs"


def test_all_conflicts_are_named() -> None:
    text = f'version = 2\nproxy_plugins.afs.address = "/x"\nplugins."{OLD}".containerd.snapshotter = "zfs"\n'
    with pytest.raises(FailedPrecondition, match=r"proxy_plugins.afs.address is .*; plugins.* is "):
        merge(text, "1.6")


@pytest.mark.parametrize("name", [OLD, IMAGES])
def test_cri_that_is_disabled_stays_so(name: str) -> None:
    text = f'version = 3\ndisabled_plugins = ["{name}"]\n'
    wanted = plan(parse_release("2.1"), tomllib.loads(text), AFS, cri=True)
    assert wanted.notes == [f"{name} is in disabled_plugins and stays there: CRI was not configured"]
    assert IMAGES not in content(text, "2.1")["plugins"]


def test_a_transfer_service_that_is_disabled_stays_so() -> None:
    text = f'version = 3\ndisabled_plugins = ["{TRANSFER}"]\n'
    assert TRANSFER not in content(text, "2.1")["plugins"]


# The texts in general

PARTS = [
    '[plugins."io.containerd.grpc.v1.cri"]\nsandbox_image = "p:1"\n',
    '[plugins."io.containerd.grpc.v1.cri".containerd]\ndefault_runtime_name = "runc"\n',
    '  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]\n  runtime_type = "x" # y\n',
    "[plugins.'io.containerd.cri.v1.images']\n\n",
    "[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = '/x'\n",
    "[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\nplatform = 'linux'\nsnapshotter='overlayfs'\n",
    "[proxy_plugins.stargz]\ntype = 'snapshot'\n",
    "[proxy_plugins.afs]\n# nothing\n",
    "[proxy_plugins.afs.exports]\nmore = 'x'\n",
    "[grpc]\naddress = '''\n/run\n[x]\n'''\n",
    "[timeouts]\n'io.containerd.x' = '1s'\nlist = [\n 1, # ]\n 2\n]\n",
    "[ttrpc]\n",
]


@given(
    st.lists(
        st.tuples(st.sampled_from(PARTS), st.sampled_from(["", "\n", "# note\n", "\n# about what follows\n"])),
        unique_by=lambda part: part[0],
    ),
    st.sampled_from(["1.6", "1.7", "2.0", "2.1", "2.3"]),
    st.booleans(),
)
def test_any_order_of_sections(parts: list[tuple[str, str]], release: str, cri: bool) -> None:
    """Nothing is lost or moved, and what edit() itself compares holds: it would refuse the file."""
    text = "version = 2\n" + "".join(between + part for part, between in parts)
    edited = merge(text, release, cri=cri)
    assert_only_added(text, edited.text)


@given(st.text().filter(lambda text: "\0" not in text))
def test_strings_and_keys(text: str) -> None:
    text = text.encode("utf-8", "ignore").decode()
    assert tomllib.loads(f"x = {literal(text)}") == {"x": text}
    assert tomllib.loads(f"{dotted((text, 'b'))} = 1") == {text: {"b": 1}}


# The file


def installed(path: Path, text: str, containerd: str | None = None) -> tuple[Path | None, list[str]]:
    """Put *text*, with what AFS needs in 1.6, into *path*."""
    wanted = plan(parse_release("1.6"), parse(text, "x"), AFS, cri=True)
    return install(path, edit(text, wanted).text, wanted, containerd)


def test_a_file_is_replaced_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    for number in (1, 2):
        path.write_text(DEBIAN)
        path.chmod(0o640)
        os.utime(path, (1, 1))
        assert installed(path, DEBIAN) == (tmp_path / f"config.toml.afs-{number}", [])
    kept = tmp_path / "config.toml.afs-2"
    assert (kept.read_text(), path.read_text()) == (DEBIAN, merge(DEBIAN, "1.6").text)
    assert {path.stat().st_mode & 0o777, kept.stat().st_mode & 0o777} == {0o640}
    assert (kept.stat().st_mtime, path.stat().st_mtime > 1) == (1, True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "config.toml",
        "config.toml.afs-1",
        "config.toml.afs-2",
    ]


def test_a_file_is_made(tmp_path: Path) -> None:
    path = tmp_path / "etc" / "containerd" / "config.toml"
    assert read_text(path) == ""
    assert installed(path, "") == (None, [])
    assert tomllib.loads(path.read_text())["version"] == 2
    assert path.stat().st_mode & 0o777 == 0o644


def test_the_target_of_a_link_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "c.toml", tmp_path / "config.toml"
    target.write_text(DEBIAN)
    link.symlink_to(target)
    assert installed(link, DEBIAN)[0] == tmp_path / "real" / "c.toml.afs-1"
    assert link.is_symlink()
    assert "proxy_plugins" in target.read_text()


def test_containerd_has_the_last_word(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(DEBIAN)
    refuses = script(tmp_path / "refuses", "echo info >&2; echo 'containerd: no such thing' >&2; exit 1")
    with pytest.raises(
        FailedPrecondition, match="does not take the new file, so the old one stays: containerd: no such"
    ):
        installed(path, DEBIAN, refuses)
    with pytest.raises(FailedPrecondition, match=r"cannot have .*/none read the new file"):
        installed(path, DEBIAN, str(tmp_path / "none"))
    assert path.read_text() == DEBIAN
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["config.toml", "refuses"]


def test_an_import_that_says_otherwise_is_told(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(DEBIAN)
    dump = f"echo 'version = 2'; echo '[plugins.\"{OLD}\".containerd]'; echo 'snapshotter = \"zfs\"'"
    says = [f'plugins."{OLD}".containerd.snapshotter is "zfs" for containerd: an imported file says so']
    assert installed(path, DEBIAN, script(tmp_path / "c", dump))[1] == says


@pytest.mark.parametrize(("data", "says"), [(b"\xff", "byte 0 is not UTF-8"), (b"[a", "is not TOML: ")])
def test_what_is_no_toml(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(data)
    with pytest.raises(FailedPrecondition, match=says) as caught:
        parse(read_text(path), str(path))
    assert str(path) in caught.value.line
    with pytest.raises(FailedPrecondition, match=r"cannot read .*: Is a directory"):
        read_text(tmp_path)


# The image and the answers of `check`


def test_the_program_runs(tmp_path: Path, rng: random.Random) -> None:
    if platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip("no program for this machine")
    line = rng.randbytes(300)
    path = tmp_path / "program"
    path.write_bytes(program(machine(platform.machine()), line))
    path.chmod(0o755)
    done = subprocess.run([path], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, line, b"")


def test_both_programs_are_the_ones_that_were_tried() -> None:
    """Run by hand under qemu-user for the other machine; a change of a byte has to be tried again."""
    sums = {name: sha256(program(machine(name), b"hello\n")).hexdigest()[:16] for name in ("x86_64", "aarch64")}
    assert sums == {"x86_64": "5c811153bbeed6bf", "aarch64": "60c56432b2b1d904"}
    with pytest.raises(Unimplemented, match="no tiny program for s390x machines"):
        machine("s390x")


def test_the_image_is_whole() -> None:
    data = archive(machine("aarch64"), "afs.invalid/check:1", b"hello\n")
    assert data == archive(machine("aarch64"), "afs.invalid/check:1", b"hello\n")
    with tarfile.open(fileobj=BytesIO(data)) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    blobs = {name.rpartition("/")[2]: blob for name, blob in files.items() if name.startswith("blobs/sha256/")}
    assert all(sha256(blob).hexdigest() == name for name, blob in blobs.items())
    [described] = json.loads(files["index.json"])["manifests"]
    assert described["annotations"] == {"io.containerd.image.name": "afs.invalid/check:1"}
    manifest = json.loads(blobs[described["digest"].partition(":")[2]])
    config = json.loads(blobs[manifest["config"]["digest"].partition(":")[2]])
    [layer] = manifest["layers"]
    assert config["rootfs"]["diff_ids"] == [layer["digest"]]
    assert (config["architecture"], config["os"]) == ("arm64", "linux")
    with tarfile.open(fileobj=BytesIO(blobs[layer["digest"].partition(":")[2]])) as tar:
        assert [(member.name, oct(member.mode)) for member in tar] == [("check", "0o755")]


def test_plugins() -> None:
    text = """Type:          io.containerd.content.v1
ID:            content
Exports:
               root      /c/io.containerd.content.v1.content

Type:             io.containerd.snapshotter.v1
ID:               btrfs
Platforms:        linux/amd64
Exports:
                  root      /c
Error:
                  Code:        Unknown
                  Message:     path /c (ext4) must be a btrfs filesystem: skip plugin

Type:             io.containerd.snapshotter.v1
ID:               afs
Platforms:        linux/amd64
Exports:
                  address                                 /run/afs/snapshotter.sock
                  enable_remote_snapshot_annotations      true
Capabilities:     remap-ids
"""
    kind = "io.containerd.snapshotter.v1"
    exports = {"address": "/run/afs/snapshotter.sock", "enable_remote_snapshot_annotations": "true"}
    assert parse_plugins(text) == [
        Plugin("io.containerd.content.v1", "content", {"root": "/c/io.containerd.content.v1.content"}),
        Plugin(kind, "btrfs", {"root": "/c"}, "path /c (ext4) must be a btrfs filesystem: skip plugin"),
        Plugin(kind, "afs", exports),
    ]
