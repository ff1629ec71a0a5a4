"""What the node's own network looks like to a bridge network: its routes, the networks it is attached to, name servers."""

import ipaddress
import logging
import socket
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from afs.afslet.netnames import ANY_BRIDGE
from afs.core.errors import FailedPrecondition

log = logging.getLogger(__name__)
_RTF_UP, _RTF_GATEWAY, _RTF_REJECT = 0x1, 0x2, 0x200  # linux/route.h
_BLOCK_BITS = 20  # of the subnet that one bridge takes: 4093 addresses, while a Linux bridge has at most 1023 ports
# The second one has what systemd-resolved asks, where the first one names its stub on loopback.
_RESOLV_CONFS = (Path("/etc/resolv.conf"), Path("/run/systemd/resolve/resolv.conf"))


@dataclass(frozen=True, slots=True)
class Route:
    """A line of the main routing table."""

    network: ipaddress.IPv4Network
    interface: str
    gateway: bool

    @property
    def is_default(self) -> bool:
        """Whether it leads everywhere."""
        return self.network.prefixlen == 0


def read_routes() -> list[Route]:
    """IPv4 routes of the calling thread's network namespace, but for those to bridges of afslets (see :func:`taken`)."""
    return [route for route in _all_routes() if not route.interface.startswith(ANY_BRIDGE)]


def _all_routes() -> list[Route]:
    found = []
    for line in Path("/proc/thread-self/net/route").read_text(encoding="ascii").splitlines()[1:]:
        fields = line.split()
        flags = int(fields[3], 16)
        if flags & _RTF_UP and not flags & _RTF_REJECT:
            network = ipaddress.IPv4Network((_address(fields[1]), _address(fields[7])))
            found.append(Route(network, fields[0], bool(flags & _RTF_GATEWAY)))
    return found


def _address(field: str) -> str:
    return socket.inet_ntoa(struct.pack("=I", int(field, 16)))  # proc(5) shows the number of the machine's byte order


def attached(routes: Iterable[Route]) -> list[ipaddress.IPv4Network]:
    """The networks whose hosts the node reaches without a gateway: its neighbours, and its other containers."""
    return sorted({route.network for route in routes if not route.gateway and not route.is_default})


def uplinks(routes: Iterable[Route], allowed: Iterable[ipaddress.IPv4Network]) -> set[str]:
    """The interfaces that answers to runs may come in by: of default routes, and of those to networks that are *allowed*."""
    wanted = list(allowed)
    found = {
        route.interface
        for route in routes
        if route.is_default or any(route.network.overlaps(network) for network in wanted)
    }
    return found - {"lo"}


def choose_block(subnet: ipaddress.IPv4Network, number: int) -> ipaddress.IPv4Network:
    """A part of *subnet* for one bridge that no route leads to; *number* chooses where to begin to look.

    FailedPrecondition names the route that is in the way.
    """
    routes = [route for route in _all_routes() if not route.is_default]
    blocks = list(subnet.subnets(new_prefix=max(_BLOCK_BITS, subnet.prefixlen)))
    first = number % len(blocks)
    for block in blocks[first:] + blocks[:first]:
        if not any(route.network.overlaps(block) for route in routes):
            return block
    (route, *_) = (route for route in routes if route.network.overlaps(subnet))
    raise FailedPrecondition(
        f"bridge_subnet {subnet} overlaps the route to {route.network} by {route.interface}: choose another one"
    )


def name_servers(configured: Sequence[str], own: Iterable[str]) -> list[str]:
    """IPv4 addresses of name servers: *configured*, or the node's that are neither loopback nor one of its *own*."""
    if configured:
        return list(configured)
    refused = set(own)
    for path in _RESOLV_CONFS:
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            continue
        found = [address for line in lines if (address := _name_server(line)) and address not in refused]
        if found:
            return found
    log.warning("runs have no name server: the node has none that they reach, and the setting name_servers is empty")
    return []


def _name_server(line: str) -> str:
    words = line.split()
    if len(words) < 2 or words[0] != "nameserver":
        return ""
    try:
        address = ipaddress.IPv4Address(words[1])
    except ValueError:  # of IPv6, which runs do not have
        return ""
    return "" if address.is_loopback else str(address)
