"""When a run is tried again, and after how long."""

from collections.abc import Callable, Iterator

from afs.client.errors import RunError, RunRejected
from afs.client.options import RunRequest
from afs.client.run import Run
from afs.core.errors import AfsError, DeadlineExceeded, InvalidArgument, ResourceExhausted

DEFAULT_RETRIES = 2
DEFAULT_BACKOFF_S = 0.2
_MAX_BACKOFF_S = 10.0


def allowed_retries(request: RunRequest, wanted: int | None) -> int:
    """How often *request* may be repeated. InvalidArgument for retries that cannot be: an iterator is read once."""
    once = isinstance(request.upload, Iterator)
    if wanted is not None and wanted < 0:
        raise InvalidArgument(f"retries must not be negative, not {wanted}")
    if once and wanted:
        raise InvalidArgument("an upload that is an iterator cannot be repeated: give a list, or retries=0")
    return 0 if once else DEFAULT_RETRIES if wanted is None else wanted


def is_worth_repeating(error: AfsError, run: Run) -> bool:
    """Whether *error*, which ended *run*, may go away by itself. Never once the command has ended: its result is known.

    Who limits the wait for room with *queue_timeout* or *max_retries* means it: then no room is final. A proxy calls the end
    of the wait DeadlineExceeded.
    """
    if not isinstance(error, RunError) or not error.retryable or run.finished is not None:
        return False
    no_room = isinstance(error, RunRejected) and isinstance(error, ResourceExhausted | DeadlineExceeded)
    return not (no_room and (run.request.queue_timeout or run.request.max_retries))


def pauses(backoff: float, rng: Callable[[], float]) -> Iterator[float]:
    """Seconds before each further try: twice as long each time, up to 10 s, of which chance takes up to a half."""
    while True:
        yield min(backoff, _MAX_BACKOFF_S) * (0.5 + 0.5 * rng())
        backoff = min(backoff * 2, _MAX_BACKOFF_S)
