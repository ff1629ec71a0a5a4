"""The nodes of the cluster in the virtual machine."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """An OCI runtime and a backend, as settings name them."""

    runtime: str
    backend: str
    layers: str
    """File system of its layer mounts, as mountinfo names it."""


NODES = (Node("runc", "erofs-loop", "erofs"), Node("crun", "tree", "fuse.afs"))
