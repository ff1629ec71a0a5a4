"""Looking into a root that hostile code has written: nothing leads outside."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from afs.afslet.rootfs import (
    UnknownUser,
    User,
    find_command,
    find_user,
    make_directories,
    open_root,
    read_file,
    stat_inside,
)

ME, MINE = os.getuid(), os.getgid()
PROGRAM = Path("/proc/self/exe").resolve().read_bytes()[:1024].replace(b"/lib64/ld-linux-x86-64.so.2", bytes(27))
ROOT_USER = User(0, 0, (), "/")


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """The root's directory."""
    (tmp_path / "root" / "etc").mkdir(parents=True)
    return tmp_path / "root"


@pytest.fixture
def root(top: Path) -> Iterator[int]:
    """Its descriptor."""
    with open_root(top) as fd:
        yield fd


PASSWD = """root:x:0:0:root:/root:/bin/sh
# comment:x:5:5::/:
short:x:1
app:x:1000:1001::/home/app:/bin/sh
nohome:x:1002:1002:::
bad:x:x:y::/:
app:x:1:1::/second:
"""
GROUP = "root:x:0:\napp:x:1001:app\nextra:x:50:other,app\nmore:x:40:app\nbroken:x:z:app\n"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("", User(0, 0, (), "/root")),
        ("root", User(0, 0, (), "/root")),
        ("app", User(1000, 1001, (40, 50), "/home/app")),
        ("1000", User(1000, 1001, (40, 50), "/home/app")),
        ("nohome", User(1002, 1002, (), "/")),
        ("4242", User(4242, 0, (), "/")),
        ("app:extra", User(1000, 50, (), "/home/app")),
        ("app:7", User(1000, 7, (), "/home/app")),
        ("4242:4343", User(4242, 4343, (), "/")),
        (":extra", User(0, 50, (), "/root")),
    ],
)
def test_users(top: Path, root: int, spec: str, expected: User) -> None:
    (top / "etc" / "passwd").write_text(PASSWD)
    (top / "etc" / "group").write_text(GROUP)
    assert find_user(root, spec) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nobody", "user 'nobody' is not in its /etc/passwd"),
        ("short", "user 'short'"),
        ("# comment", "user '# comment'"),
        ("bad", "user 'bad'"),
        ("-1", "user '-1'"),
        ("4294967295", "user '4294967295'"),
        ("app:none", "group 'none' is not in its /etc/group"),
        ("app:", "group ''"),
        ("app:broken", "group 'broken'"),
    ],
)
def test_unknown_users(top: Path, root: int, spec: str, message: str) -> None:
    (top / "etc" / "passwd").write_text(PASSWD)
    (top / "etc" / "group").write_text(GROUP)
    with pytest.raises(UnknownUser, match=message):
        find_user(root, spec)


def test_numbers_need_no_files(root: int) -> None:
    assert find_user(root, "5:6") == User(5, 6, (), "/")
    with pytest.raises(UnknownUser):
        find_user(root, "root")


def test_links_do_not_lead_to_the_host(top: Path, root: int) -> None:
    secret = top.parent / "passwd"
    secret.write_text("host:x:1:1::/:\n")
    for target in (
        str(secret),
        "../../passwd",
        "../../../../../../../../../.." + str(secret),
        "/proc/self/root" + str(secret),
    ):
        (top / "etc" / "passwd").unlink(missing_ok=True)
        (top / "etc" / "passwd").symlink_to(target)
        assert read_file(root, "etc/passwd") is None
        assert stat_inside(root, "etc/passwd") is None
        with pytest.raises(UnknownUser):
            find_user(root, "host")
    assert read_file(root, "../passwd") is None
    (top / "etc" / "passwd").unlink()
    (top / "etc" / "passwd").symlink_to("/etc/real")
    (top / "etc" / "real").write_text("inside")
    assert read_file(root, "etc/passwd") == "inside"


def test_a_directory_link_does_not_lead_to_the_host(top: Path, root: int) -> None:
    outside = top.parent / "outside"
    outside.mkdir()
    (top / "out").symlink_to(outside)
    assert not make_directories(root, "/out/x", 0, 0)
    assert list(outside.iterdir()) == []
    assert stat_inside(root, "out") is None


@pytest.mark.parametrize("kind", ["fifo", "directory", "loop", "missing"])
def test_what_is_no_file_is_not_read(top: Path, root: int, kind: str) -> None:
    path = top / "etc" / "passwd"
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "loop":
            path.symlink_to("passwd")
        case _:
            pass
    assert read_file(root, "etc/passwd") is None


def test_bytes_that_are_no_text(top: Path, root: int) -> None:
    (top / "etc" / "passwd").write_bytes(b"\xff:x:1:1::/:\n")
    assert read_file(root, "etc/passwd") == "\ufffd:x:1:1::/:\n"


def test_directories_are_made_inside(top: Path, root: int) -> None:
    assert make_directories(root, "/a//./b/c", ME, MINE)
    assert (top / "a" / "b" / "c").is_dir()
    assert make_directories(root, "/a/b", ME, MINE)
    assert make_directories(root, "/", ME, MINE)
    (top / "link").symlink_to("/a")
    assert make_directories(root, "/link/d", ME, MINE)
    assert (top / "a" / "d").is_dir()
    (top / "file").touch()
    assert not make_directories(root, "/file/x", ME, MINE)
    assert not make_directories(root, "/file", ME, MINE)
    (top / "dangling").symlink_to("/nowhere")
    assert not make_directories(root, "/dangling", ME, MINE)
    assert not make_directories(root, "/dangling/x", ME, MINE)
    assert not (top / "nowhere").exists()
    assert make_directories(root, "/../../up", ME, MINE)  # .. stays inside
    assert not (top.parent / "up").exists()


def test_commands_are_found_as_execvp_does(top: Path, root: int) -> None:
    (top / "bin").mkdir()
    (top / "usr").mkdir()
    for path, mode in (("bin/tool", 0o755), ("bin/data", 0o644), ("usr/data", 0o755)):
        (top / path).write_bytes(PROGRAM)
        (top / path).chmod(mode)
    (top / "bin" / "dir").mkdir()
    (top / "bin" / "host").symlink_to("/bin/../../../../bin/sh")
    cases = {
        ("tool", "/", "/bin"): (True, True),
        ("tool", "/", "/usr:/bin"): (True, True),
        ("tool", "/", "/usr"): (False, False),
        ("tool", "/bin", ""): (True, True),
        ("tool", "/", "bin"): (True, True),
        ("data", "/", "/bin"): (True, False),
        ("data", "/", "/bin:/usr"): (True, True),
        ("dir", "/", "/bin"): (False, False),
        ("./tool", "/bin", "/usr"): (True, True),
        ("bin/tool", "/", ""): (True, True),
        ("/bin/tool", "/usr", ""): (True, True),
        ("/bin/none", "/", "/bin"): (False, False),
        ("host", "/", "/bin"): (False, False),
        ("x" * 300, "/", "/bin"): (False, False),
    }
    for (name, cwd, search), expected in cases.items():
        found = find_command(root, name, cwd, search, ROOT_USER)
        assert (found.found, found.executable) == expected, (name, cwd, search)


@pytest.mark.parametrize(
    ("mode", "user", "executable"),
    [
        (0o001, User(0, 0, (), "/"), True),
        (0o000, User(0, 0, (), "/"), False),
        (0o700, User(ME + 5, MINE + 5, (), "/"), False),
        (0o701, User(ME + 5, MINE + 5, (), "/"), True),
        (0o010, User(ME + 5, MINE, (), "/"), True),
        (0o010, User(ME + 5, MINE + 5, (MINE,), "/"), True),
        (0o701, User(ME + 5, MINE, (), "/"), False),
    ],
)
def test_who_may_execute(top: Path, root: int, mode: int, user: User, executable: bool) -> None:
    (top / "tool").write_bytes(PROGRAM)
    (top / "tool").chmod(mode)
    found = find_command(root, "/tool", "/", "", user)
    assert (found.found, found.executable, found.why) == (
        (True, True, "") if executable else (True, False, "it has no execute permission")
    )


@pytest.mark.root
def test_a_device_of_the_image_is_never_opened(top: Path, root: int) -> None:
    """/dev/watchdog would reboot the machine. Minor 8 of the memory devices exists nowhere, so opening it would fail."""
    (top / "bin").mkdir()
    os.mknod(top / "bin" / "tool", stat.S_IFCHR | 0o755, os.makedev(1, 200))
    os.mknod(top / "etc" / "passwd", stat.S_IFCHR | 0o644, os.makedev(1, 200))
    found = find_command(root, "tool", "/", "/bin", User(0, 0, (), "/"))
    assert (found.found, found.executable, found.why) == (True, False, "it is not a regular file")
    (top / "bin" / "script").write_text("#!/bin/tool\n")
    (top / "bin" / "script").chmod(0o755)
    found = find_command(root, "script", "/", "/bin", User(0, 0, (), "/"))
    assert (found.executable, found.why) == (False, "its interpreter /bin/tool is not executable")
    assert read_file(root, "etc/passwd") is None
