"""The version, from the installed distribution: it stands in pyproject.toml alone."""

from importlib.metadata import version as _version


def version() -> str:
    """The version of the installed AFS."""
    return _version("afs-cluster")
