"""Which containerd is installed here, and what its release knows of what AFS configures."""

import re
from typing import NamedTuple

from typing_extensions import override

from afs.core.errors import FailedPrecondition, InvalidArgument, Unimplemented
from afs.core.run import ask

_NUMBER = re.compile(r"v?(\d+)\.(\d+)(?!\d)")
_TIMEOUT = 20.0


class Release(NamedTuple):
    """A release of containerd: 1.6, 2.1, ..."""

    major: int
    minor: int

    @override
    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"

    @property
    def config_version(self) -> int:
        """The newest version of the configuration file that it reads."""
        if self.major == 1:
            return 2
        return 3 if self < (2, 3) else 4

    @property
    def has_exports(self) -> bool:
        """Whether a proxy plugin can say more of itself than its type and address."""
        return self >= (1, 7)

    @property
    def has_transfer(self) -> bool:
        """Whether clients can have the daemon itself pull images, which unpacks for configured snapshotters only."""
        return self >= (1, 7)

    @property
    def cri_pulls_by_transfer(self) -> bool:
        """Whether CRI has the transfer service pull, which tells a snapshotter of the image if it exports that wish."""
        return self >= (2, 1)

    @property
    def unpacks_erofs(self) -> bool:
        """Whether the default list of the transfer service has EROFS images besides ordinary ones."""
        return self >= (2, 3)


def parse_release(text: str) -> Release:
    """The release in ``1.7``, ``v2.1.4`` or what ``containerd --version`` prints; InvalidArgument if there is none.

    Unimplemented for those before 1.6.
    """
    # `containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u3`: the first word that is a number.
    found = next((match for word in text.split() if (match := _NUMBER.match(word))), None)
    if found is None:
        raise InvalidArgument(f"not a version of containerd: {text.strip()!r}; write it like 1.7 or 2.1")
    release = Release(int(found[1]), int(found[2]))
    if release < (1, 6):
        raise Unimplemented(f"containerd {release} is older than 1.6, the first release that AFS works with")
    return release


def installed_release(program: str = "containerd") -> Release:
    """What *program* says that it is. FailedPrecondition if it is not there or does not run."""
    try:
        answer = ask([program, "--version"], stdin=b"", timeout=_TIMEOUT)
    except OSError as error:
        raise FailedPrecondition(
            f"cannot ask {program} for its version: {error.strerror}; give it with --containerd-version"
        ) from error
    if answer.returncode:
        said = answer.stderr.decode(errors="replace").strip()
        raise FailedPrecondition(f"{program} --version failed with status {answer.returncode}: {said or 'no message'}")
    return parse_release(answer.stdout.decode(errors="replace"))
