"""Patterns of paths: what they mean is what git says they mean."""

from __future__ import annotations

import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from afs.afslet.globs import Globs
from afs.core.errors import InvalidArgument

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence
    from pathlib import Path


@pytest.mark.parametrize(
    ("pattern", "path", "is_directory", "expected"),
    [
        ("a", "a", False, True),
        ("a", "x/a", False, True),
        ("/a", "x/a", False, False),
        ("/a", "a", True, True),
        ("a/", "a", False, False),
        ("a/", "x/a", True, True),
        ("x/a", "x/a", False, True),
        ("x/a", "y/x/a", False, False),
        ("*.log", "deep/er/x.log", False, True),
        ("*.log", ".log", False, True),
        ("/*.log", "deep/x.log", False, False),
        ("a*b*c", "aXbXc", False, True),
        ("a*b*c", "abXcb", False, False),
        ("*", "anything", False, True),
        ("?", "ü", False, True),
        ("?", "ab", False, False),
        ("[a-c]x", "bx", False, True),
        ("[!a-c]x", "bx", False, False),
        ("[]x]", "]", False, True),
        ("[[:digit:]_]", "7", False, True),
        (r"\*", "*", False, True),
        (r"\*", "x", False, False),
        (r"\!x", "!x", False, True),
        ("**/a", "a", False, True),
        ("**/a", "x/y/a", False, True),
        ("x/**", "x", True, False),
        ("x/**", "x/y/z", False, True),
        ("x/**/z", "x/z", False, True),
        ("x/**/z", "x/1/2/z", False, True),
        ("x/**/z", "x/1/2/zz", False, False),
        ("**", "a", False, True),
        ("**/", "a", False, False),
        ("x/*/z", "x/1/2/z", False, False),
        ("no\udcfftext", "no\udcfftext", False, True),
    ],
)
def test_patterns(pattern: str, path: str, is_directory: bool, expected: bool) -> None:
    assert Globs([pattern]).match(path, is_directory) is expected


def test_the_last_pattern_that_matches_decides() -> None:
    globs = Globs(["*.log", "!keep.log", "/keep.log"])
    assert globs.match("a.log", False)
    assert not globs.match("x/keep.log", False)
    assert globs.match("keep.log", False)
    assert not Globs(())


@pytest.mark.parametrize(
    "pattern", ["", "/", "!", "a//b", "./a", "../a", "a/../b", "[a", "a\\", "[[:nothing:]]", "a\0", "x" * 5000]
)
def test_patterns_that_make_no_sense(pattern: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^diff_include "):
        Globs([pattern], "diff_include")


def test_there_are_not_too_many() -> None:
    with pytest.raises(InvalidArgument, match=r"^1001 patterns of exclude are more than 1000$"):
        Globs(["a"] * 1001, "exclude")


@pytest.mark.parametrize(
    ("pattern", "path"),
    [("*a" * 40 + "b", "a" * 255), ("[ab]*" * 60 + "c", "ab" * 127), ("**/a/" * 40 + "b", "/".join("a" * 1000))],
)
def test_hostile_patterns_take_no_time(pattern: str, path: str) -> None:
    started = time.process_time()
    assert not Globs([pattern]).match(path, False)
    assert time.process_time() - started < 1


def ignored(globs: Globs, path: str, directories: set[str]) -> bool:
    """As git has it: what a directory means is meant for all below it."""
    parts = path.split("/")
    return any(
        globs.match(prefix, prefix in directories)
        for prefix in ("/".join(parts[: count + 1]) for count in range(len(parts)))
    )


def test_git_agrees(tmp_path: Path, rng: random.Random) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    names = ["a", "b", "ab", "a.b", ".a", "ba", "abc"]
    files = ["/".join(rng.choices(names, k=rng.randint(1, 5))) for _ in range(120)]
    directories = {name.rpartition("/")[0] for name in files if "/" in name}
    directories |= {each.rpartition("/")[0] for each in list(directories) for _ in range(5) if "/" in each}
    for directory in directories:
        (tmp_path / directory).mkdir(parents=True, exist_ok=True)
    paths = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if ".git" not in path.parts)
    for name in files:
        if not (tmp_path / name).exists():
            (tmp_path / name).touch()
            paths.append(name)
    folders = {path for path in paths if (tmp_path / path).is_dir()}
    for _ in range(150):
        patterns = [_pattern(rng) for _ in range(rng.randint(1, 3))]
        (tmp_path / ".gitignore").write_text("\n".join(patterns) + "\n")
        expected = _asked_git(tmp_path, paths)
        assert {path for path in paths if ignored(Globs(patterns), path, folders)} == expected, patterns


def _pattern(rng: random.Random) -> str:
    pieces = ["a", "b", "*", "?", "[ab]", "[!a]", "ab", ".", "*b", "a*"]
    parts = [
        "**" if rng.random() < 0.25 else "".join(rng.choices(pieces, k=rng.randint(1, 3)))
        for _ in range(rng.randint(1, 4))
    ]
    # Of several stars within a name git says that they are one, but matches "a**" as "a" and "**".
    parts = ["a" if part in (".", "..") or ("**" in part and part != "**") else part for part in parts]
    text = "/".join(parts)
    start = rng.choice(("", "", "", "/", "!"))
    return start + text + rng.choice(("", "", "/"))


def _asked_git(top: Path, paths: Sequence[str]) -> set[str]:
    done = subprocess.run(
        ["git", "-C", str(top), "check-ignore", "--no-index", "-z", "--stdin"],
        input="\0".join(paths).encode(),
        capture_output=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    return {name.decode() for name in done.stdout.split(b"\0") if name}
