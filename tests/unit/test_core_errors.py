"""The table of errors: every class has a status, and the status survives the way through gRPC."""

import errno
import importlib
import pkgutil

import grpc
import grpc.aio
import pytest

import afs.afslet
import afs.client
import afs.core
import afs.discovery
import afs.layerstore
import afs.proxy
import afs.snapshotter
from afs.client.errors import MIXINS
from afs.core.errors import (
    STATUS,
    AfsError,
    DataLoss,
    Internal,
    NotFound,
    PermissionDenied,
    Unavailable,
    error_for_grpc,
    status_of,
)
from afs.core.rpc import calling, to_afs_error

PACKAGES = (afs.core, afs.discovery, afs.layerstore, afs.snapshotter, afs.afslet, afs.proxy, afs.client)


def all_errors() -> set[type[AfsError]]:
    """Every AfsError of the code base."""
    for package in PACKAGES:
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    found, pending = set[type[AfsError]](), [AfsError]
    while pending:
        subclasses = pending.pop().__subclasses__()
        found.update(cls for cls in subclasses if cls.__module__.startswith("afs."))
        pending += subclasses
    return found


def test_every_error_has_a_status_of_its_own_kind() -> None:
    found = all_errors()
    assert len(found) > 20
    for cls in found - set(MIXINS):  # these are raised mixed with a kind only
        # The base class says nothing: each error has to be one of the kinds.
        assert any(ancestor in STATUS and ancestor is not AfsError for ancestor in cls.__mro__), cls
        status = status_of(cls.__new__(cls))
        assert status.errno in errno.errorcode
        assert status.grpc in grpc.StatusCode.__members__


def test_exit_codes_are_distinct_and_apart_from_those_of_commands() -> None:
    kinds = {cls: status for cls, status in STATUS.items() if cls is not AfsError}
    codes = [status.exit_code for status in kinds.values()]
    assert len(set(codes)) == len(codes)
    assert all(64 <= code <= 78 for code in codes)
    assert len({status.grpc for status in kinds.values()}) == len(kinds)


@pytest.mark.parametrize("cls", [cls for cls in STATUS if cls is not AfsError])
def test_a_class_survives_its_status(cls: type[AfsError]) -> None:
    assert error_for_grpc(status_of(cls("x")).grpc) is cls


def test_what_is_not_in_the_table() -> None:
    assert error_for_grpc("UNKNOWN") is Internal
    assert error_for_grpc("OUT_OF_RANGE") is Internal
    assert error_for_grpc("UNAUTHENTICATED") is PermissionDenied
    assert status_of(ValueError("x")) == STATUS[Internal]
    assert status_of(OSError(errno.ENOSPC, "x")) == STATUS[Internal]


def test_a_message_is_one_line() -> None:
    assert NotFound("a\n  b\tc").line == "a b c"
    assert NotFound().line == "NotFound"
    assert NotFound(" ").line == "NotFound"


def rpc_error(code: grpc.StatusCode, details: str) -> grpc.aio.AioRpcError:
    """What a failed call raises."""
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details=details)


@pytest.mark.parametrize(
    ("code", "details", "cls", "message"),
    [
        (grpc.StatusCode.DATA_LOSS, "bad chunk", DataLoss, "bad chunk"),
        (grpc.StatusCode.NOT_FOUND, "", NotFound, "node x answered NOT_FOUND"),
        (grpc.StatusCode.UNAVAILABLE, "registry is away", Unavailable, "registry is away"),
        (grpc.StatusCode.UNAVAILABLE, "", Unavailable, "node x does not answer: no connection"),
        (
            grpc.StatusCode.UNAVAILABLE,
            "failed to connect to all addresses",
            Unavailable,
            "node x does not answer: failed to connect to all addresses",
        ),
        (grpc.StatusCode.UNAVAILABLE, "Socket closed", Unavailable, "node x does not answer: Socket closed"),
        (grpc.StatusCode.UNKNOWN, "odd", Internal, "odd"),
    ],
)
def test_errors_of_calls(code: grpc.StatusCode, details: str, cls: type[AfsError], message: str) -> None:
    error = to_afs_error(rpc_error(code, details), "node x")
    assert type(error) is cls
    assert str(error) == message
    with pytest.raises(cls, match=message), calling("node x"):
        raise rpc_error(code, details)


def test_calling_leaves_other_errors_alone() -> None:
    with pytest.raises(KeyError), calling("node x"):
        raise KeyError("x")
