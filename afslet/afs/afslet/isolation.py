"""How a node confines its runs: what its operator chose, and what a request may change of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from afs.afslet.bundle import CAPABILITIES, IdMap
from afs.afslet.seccomp import load_filter, native_only
from afs.core.errors import FailedPrecondition, InvalidArgument
from afs.proto.v1 import afslet_pb2 as pb

OFF, ON, REQUIRED = "off", "on", "required"
_MAX_ID = 2**32 - 2  # the last number means "no id"
# Between the ranges that useradd and systemd give away (100000 to 600100000, 524288 to 1879048191), and below 2^31, from
# where on some programs take ids for negative (systemd, UIDS-GIDS). Nobody else's processes have these.
DEFAULT_ID_FIRST, DEFAULT_ID_COUNT = 1879048192, 65536


@dataclass(frozen=True, slots=True)
class Isolation:
    """Made by :func:`load_isolation`. *ids* are those of every user namespace here.

    *seccomp* is for Sandbox, if the root has 32-bit programs; *native* if it has none.
    """

    seccomp: Mapping[str, Any] | None
    native: Mapping[str, Any] | None
    ids: IdMap
    user_namespace: str

    def ids_for(self, wanted: int) -> IdMap | None:
        """The ids of a run that wants StartRequest.user_namespace *wanted*, None for a run without a user namespace.

        A request may ask for more isolation than is usual here; for less unless it is required: FailedPrecondition.
        """
        if wanted == pb.USER_NAMESPACE_OFF and self.user_namespace == REQUIRED:
            raise FailedPrecondition("user_namespace OFF is refused: this node requires one of every run")
        on = wanted == pb.USER_NAMESPACE_ON or (wanted != pb.USER_NAMESPACE_OFF and self.user_namespace != OFF)
        return self.ids if on else None


def parse_user_namespace(text: str) -> str:
    """The setting; InvalidArgument."""
    if text not in (OFF, ON, REQUIRED):
        raise InvalidArgument(f"{text!r} is neither {OFF}, {ON} nor {REQUIRED}")
    return text


def load_isolation(
    seccomp: str, user_namespace: str, id_first: int, id_count: int, *, programs_32bit: bool = False
) -> Isolation:
    """What the settings say; reads the seccomp profile and logs about it. InvalidArgument."""
    if id_first <= 0 or id_count <= 0 or id_first + id_count - 1 > _MAX_ID:
        raise InvalidArgument(f"user namespaces cannot have {id_count} ids from {id_first} on")
    found = load_filter(seccomp, CAPABILITIES)
    # A profile of one's own is taken as it is.
    native = found if found is None or seccomp or programs_32bit else native_only(found)
    return Isolation(found, native, IdMap(id_first, id_count), user_namespace)
