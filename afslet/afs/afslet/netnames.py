"""What the bridge network of one afslet is called, and removing all of it: by a new afslet, or by another process.

Interfaces: the bridge `afs-HASH`, its ports `afsHASHNNNN` (the number of an address). nftables: the tables `afs-HASH` of
the families inet and bridge. The hash is of the afslet's name, so those of one machine do not meet, and a name has at
most the 15 bytes that the kernel allows. The bridge is the first of them that is made and the last that is removed:
where there is none, there is nothing.
"""

import fcntl
import hashlib
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from afs.core.run import CommandFailed, ask, run

log = logging.getLogger(__name__)
ANY_BRIDGE = "afs-"  # how the bridges of all afslets begin
FORWARDERS = "forwarders"  # the set of interfaces whose forwarding we switched on
_PATIENCE = 30.0  # seconds


@dataclass(frozen=True, slots=True)
class Names:
    """See the module."""

    bridge: str
    ports: str

    @property
    def table(self) -> str:
        """In both families."""
        return self.bridge

    def port(self, number: int) -> str:
        """The bridge's end of the pair of address *number*, which is below 65536."""
        return f"{self.ports}{number:04x}"


def names_of(name: str) -> Names:
    """The names for the afslet *name*, which is its `cgroup_parent`."""
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return Names(f"{ANY_BRIDGE}{digest}", f"afs{digest}")


@contextmanager
def changing() -> Iterator[None]:
    """One afslet at a time sets up or removes a bridge network in this network namespace."""
    # The lock is on the namespace's own inode, which is the same one for every process in it.
    fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def forwarding(interface: str) -> Path:
    """The file with an interface's switch for forwarding of IPv4, in the calling thread's network namespace."""
    return Path("/proc/sys/net/ipv4/conf", interface, "forwarding")


def clear_network(name: str) -> bool:
    """Remove the bridge network of the afslet *name*, which is dead or has no runs; False if there was none.

    Runs `ip` and `nft`: CommandFailed.
    """
    names = names_of(name)
    with changing():
        here = [interface for _, interface in socket.if_nameindex()]
        ours = [interface for interface in here if interface == names.bridge or interface.startswith(names.ports)]
        if not ours:
            return False
        # Ports first: from then on nothing comes from a run, whatever its processes do.
        for interface in sorted(ours, key=lambda interface: interface == names.bridge):
            if interface == names.bridge:
                _remove_tables(names)
            _delete(interface)
    return True


def _delete(interface: str) -> None:
    argv = ["ip", "link", "delete", interface]
    answer = ask(argv, stdin=b"", timeout=_PATIENCE)
    # The pair of a killed run's namespace goes with the namespace, at a time that the kernel chooses.
    if answer.returncode and interface in (name for _, name in socket.if_nameindex()):
        raise CommandFailed(argv, answer.returncode, answer.stderr.decode(errors="replace"))


def _remove_tables(names: Names) -> None:
    listed = json.loads(run(["nft", "-j", "list", "tables"]))["nftables"]
    tables = [(entry["table"]["family"], entry["table"]["name"]) for entry in listed if "table" in entry]
    if ("inet", names.table) in tables:
        ours = forwarders(names.table)
        others = (table for family, table in tables if family == "inet" and table.startswith(ANY_BRIDGE))
        kept = {interface for table in others if table != names.table for interface in forwarders(table)}
        for interface in ours - kept:
            try:
                forwarding(interface).write_text("0\n", encoding="ascii")
            except FileNotFoundError:
                log.info("interface %s is gone", interface)
    commands = [f"delete table {family} {name}\n" for family, name in tables if name == names.table]
    run(["nft", "-f", "-"], stdin="".join(commands).encode())


def forwarders(table: str) -> set[str]:
    """The interfaces whose forwarding the afslet with *table* switched on, or needs that another one did."""
    listed = json.loads(run(["nft", "-j", "list", "set", "inet", table, FORWARDERS]))["nftables"]
    return {interface for entry in listed for interface in entry.get("set", {}).get("elem", ())}


def all_forwarders() -> set[str]:
    """Those of every afslet in this network namespace."""
    listed = json.loads(run(["nft", "-j", "list", "tables", "inet"]))["nftables"]
    tables = [entry["table"]["name"] for entry in listed if "table" in entry]
    return {found for table in tables if table.startswith(ANY_BRIDGE) for found in forwarders(table)}
