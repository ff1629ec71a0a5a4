"""containerd's filter expressions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from afs.core.errors import InvalidArgument
from afs.snapshotter.snapshots.filters import matches, parse_filters

if TYPE_CHECKING:
    from collections.abc import Sequence

FIELDS = {
    "name": "k/1",
    "parent": "",
    "kind": "active",
    "labels.containerd.io/snapshot.ref": "sha256:00",
    "labels.foo": "a b",
    "labels.empty": "",
    "labels.quote": 'say "é"',
}


def field(path: Sequence[str]) -> str | None:
    return FIELDS.get(".".join(path))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", True),
        ("name", True),
        ("parent", True),
        ("labels.nothing", False),
        ("labels.empty", True),
        ("name==k/1", True),
        ("name == k/1", True),
        ("kind==active,name==k/1", True),
        ("kind==active,name==k/2", False),
        ("kind==view", False),
        ('labels."containerd.io/snapshot.ref"==sha256:00', True),
        ('labels."containerd.io/snapshot.ref"==sha256:00,parent==""', True),
        ("labels.nothing==", None),
        ('labels.nothing==""', False),
        ("labels.nothing!=x", True),
        ("labels.foo!=x", True),
        ('labels.foo!="a b"', False),
        ("name~=^k", True),
        ("name~=1$", True),
        ("name~=^1", False),
        ("name~=/k\\/[0-9]/", True),
        ("name~=|k/[0-9]|", True),
        ("labels.nothing~=^$", True),
        ("name@=/1", None),
        ('name@="/1"', True),
        ("name@=x", False),
        ('labels.quote=="say \\"\\u00e9\\""', True),
        ('labels.quote=="say \\x22\\xc3\\xa9\\042"', True),
        ('labels.foo=="a\\tb"', False),
        ("weird-field", False),
    ],
)
def test_as_containerd_reads_them(text: str, expected: bool | None) -> None:
    if expected is None:
        with pytest.raises(InvalidArgument, match="filter"):
            parse_filters([text])
        return
    assert matches(parse_filters([text]), field) is expected


@pytest.mark.parametrize(
    "text",
    [
        ",",
        "name==",
        "name=k",
        "name===k",
        "==k",
        'name=="k',
        'name=="\\q"',
        'name=="\\u00"',
        "name~=[",
        "a b",
        "name..x",
    ],
)
def test_wrong_ones_are_named(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_filters(["name", text])
    assert repr(text) in caught.value.line
    assert "at character" in caught.value.line


def test_one_of_several_has_to_match() -> None:
    assert matches(parse_filters(["kind==view", "name==k/1"]), field)
    assert not matches(parse_filters(["kind==view", "name==k/2"]), field)
    assert matches([], field)
