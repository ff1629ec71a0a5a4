"""What an operator chose, and what a request may change of it."""

from __future__ import annotations

import pytest

from afs.afslet.bundle import IdMap
from afs.afslet.isolation import (
    DEFAULT_ID_COUNT,
    DEFAULT_ID_FIRST,
    OFF,
    ON,
    REQUIRED,
    load_isolation,
    parse_user_namespace,
)
from afs.core.errors import FailedPrecondition, InvalidArgument
from afs.proto.v1 import afslet_pb2 as pb

DEFAULT, REFUSE, ASK = pb.USER_NAMESPACE_DEFAULT, pb.USER_NAMESPACE_OFF, pb.USER_NAMESPACE_ON


@pytest.mark.parametrize(
    ("setting", "wanted", "on"),
    [
        (OFF, DEFAULT, False),
        (OFF, ASK, True),
        (OFF, REFUSE, False),
        (ON, DEFAULT, True),
        (ON, ASK, True),
        (ON, REFUSE, False),
        (REQUIRED, DEFAULT, True),
        (REQUIRED, ASK, True),
    ],
)
def test_user_namespaces(setting: str, wanted: int, on: bool) -> None:
    isolation = load_isolation("unconfined", setting, 200000, 1000)
    assert isolation.ids_for(wanted) == (IdMap(200000, 1000) if on else None)
    assert isolation.seccomp is None


def test_a_node_may_require_them() -> None:
    isolation = load_isolation("unconfined", REQUIRED, DEFAULT_ID_FIRST, DEFAULT_ID_COUNT)
    with pytest.raises(FailedPrecondition, match="user_namespace OFF is refused"):
        isolation.ids_for(REFUSE)


@pytest.mark.parametrize(("first", "count"), [(0, 65536), (100000, 0), (2**32 - 2, 2), (-1, 1)])
def test_ids_that_are_none(first: int, count: int) -> None:
    with pytest.raises(InvalidArgument, match="user namespaces cannot have"):
        load_isolation("unconfined", OFF, first, count)


def test_settings() -> None:
    assert [parse_user_namespace(text) for text in (OFF, ON, REQUIRED)] == [OFF, ON, REQUIRED]
    with pytest.raises(InvalidArgument, match="'maybe' is neither off, on nor required"):
        parse_user_namespace("maybe")
