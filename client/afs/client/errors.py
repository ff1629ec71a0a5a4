"""Runs that AFS could not finish, as exceptions.

Each is two things: how the run ended (:class:`RunCancelled`, :class:`RunRejected`, :class:`InfrastructureError`) and the
kind of error (:class:`~afs.core.errors.NotFound`, :class:`~afs.core.errors.Unavailable`, ...), so either may be caught.
"""

from typing import Any

from typing_extensions import override

from afs.client.events import Finished, Outcome
from afs.core.errors import STATUS, AfsError, Cancelled, FailedPrecondition


class RunError(AfsError):
    """A run that ended with a fault; nothing is known about its command. Raised as one of the classes below only."""

    def __init__(self, message: str, run: Finished, run_id: str = "") -> None:
        super().__init__(message)
        self.run = run
        self.run_id = run_id

    @property
    def outcome(self) -> Outcome:
        """CANCELLED, REJECTED or INFRASTRUCTURE_ERROR."""
        return self.run.outcome

    @property
    def retryable(self) -> bool:
        """Whether the same request may succeed later, or on another node."""
        return self.run.retryable

    @property
    def node_id(self) -> str:
        """The node that had the run; empty if none took it."""
        return self.run.node_id

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        kind = next(cls for cls in type(self).__mro__ if cls in STATUS)
        return run_error, (kind(str(self)), self.run, self.run_id)


class RunCancelled(RunError, Cancelled):
    """The client, or somebody who asked the cluster to, cancelled the run."""


class RunRejected(RunError):
    """The run was never started: the request is wrong, or there is no room for it."""


class InfrastructureError(RunError):
    """A fault of AFS, a registry or a node, after a node had taken the run."""


class RunEnded(FailedPrecondition):
    """The run has ended, or its standard input: nothing can be written to it any more."""


MIXINS = (RunError, RunRejected, InfrastructureError)
_OUTCOMES: dict[Outcome, type[RunError]] = {
    Outcome.REJECTED: RunRejected,
    Outcome.INFRASTRUCTURE_ERROR: InfrastructureError,
}
# RunRejectedNotFound and so on: made here once, so that equal faults have one class.
_CLASSES: dict[tuple[type[RunError], type[AfsError]], type[RunError]] = {
    (base, kind): type(f"{base.__name__}{kind.__name__}", (base, kind), {"__doc__": base.__doc__})
    for base in _OUTCOMES.values()
    for kind in STATUS
    if kind is not AfsError
}


def run_error(error: AfsError, run: Finished, run_id: str = "") -> RunError:
    """*error*, the status of a call, as the exception for the run that ended so."""
    if run.outcome is Outcome.CANCELLED:
        return RunCancelled(str(error), run, run_id)
    base = _OUTCOMES.get(run.outcome, InfrastructureError)
    kind = next(cls for cls in type(error).__mro__ if cls in STATUS)
    return _CLASSES[base, kind](str(error), run, run_id)
