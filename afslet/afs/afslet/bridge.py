"""The bridge of runs' networks, and their interfaces: by pyroute2, which is imported for the first of them only.

State: a :class:`Bridge` belongs to :class:`afs.afslet.networks.Networks`. Its methods block; one :meth:`attach`
and several :meth:`detach` may run at the same time, each for another number, in threads. What a run has is known by its
number, so a detach after a failed attach removes what there is.

Measured on two cores with Linux 6.18: attach takes 5 ms, of it 4 ms CPU time; detach 35 to 50 ms, of it 5 ms:
the kernel waits for a grace period before an interface is gone.
"""

import contextlib
import errno
import ipaddress
import logging
import shutil
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afs.afslet import netroutes
from afs.afslet.egress import Rules, make_policy
from afs.afslet.netnames import Names, all_forwarders, changing, forwarding
from afs.afslet.netns import inside
from afs.afslet.requests import Egress
from afs.core.errors import FailedPrecondition, Internal

log = logging.getLogger(__name__)
MAX_PORTS = 1000  # a Linux bridge has at most 1023
_PROGRAMS = ("nft", "ip")


@dataclass(frozen=True, slots=True)
class BridgeSettings:
    """See :class:`afs.afslet.networks.NetworkSettings`."""

    subnet: ipaddress.IPv4Network
    allow: Sequence[str]
    deny: Sequence[str]
    name_servers: Sequence[str]
    connections: int


class Bridge:
    """See the module. Made by :meth:`make`; :func:`afs.afslet.netnames.clear_network` removes it."""

    def __init__(self, names: Names, settings: BridgeSettings) -> None:
        self._names = names
        self._settings = settings
        self._rules = Rules(names, settings.connections)
        self._block = settings.subnet
        self._gateway = settings.subnet[1]
        self._mtu = 1500
        self._ruled: set[int] = set()  # numbers in the rules
        self.servers: list[str] = []

    def address(self, number: int) -> ipaddress.IPv4Address:
        """The address of a run; numbers begin at 2."""
        return self._block[number]

    @property
    def numbers(self) -> range:
        """Those that addresses have."""
        return range(2, self._block.num_addresses - 1)

    def make(self) -> None:
        """Set up the bridge, forwarding and rules. FailedPrecondition, CommandFailed; then clear_network is due."""
        for program in _PROGRAMS:
            if shutil.which(program) is None:
                raise FailedPrecondition(f"network mode bridge needs the program {program}")
        with changing(), _netlink(f"bridge {self._names.bridge}") as netlink:
            self._block = netroutes.choose_block(self._settings.subnet, int(self._names.bridge[4:], 16))
            self._gateway = self._block[1]
            self._make(netlink)

    def _make(self, netlink: Any) -> None:
        others = all_forwarders()  # first of all: if nftables does not work here, nothing has been made yet
        routes, bridge = netroutes.read_routes(), self._names.bridge
        self._mtu = _mtu(netlink, routes)
        own = [message.get_attr("IFA_ADDRESS") for message in netlink.get_addr(family=socket.AF_INET)]
        self.servers = netroutes.name_servers(self._settings.name_servers, own)
        policy = make_policy(self._settings.allow, self._settings.deny, netroutes.attached(routes), self.servers)
        netlink.link("add", ifname=bridge, kind="bridge", address=_mac(self._gateway), mtu=self._mtu)
        index = socket.if_nametoindex(bridge)
        _switch_off_ipv6(bridge)
        Path("/proc/sys/net/ipv4/conf", bridge, "accept_source_route").write_text("0", encoding="ascii")
        # An answer is forwarded if the interface that it comes in by forwards. What another afslet switched on is on our
        # list, too, so that the last of them switches it off.
        uplinks = netroutes.uplinks(routes, policy.allowed())
        off = {uplink for uplink in uplinks if forwarding(uplink).read_text(encoding="ascii").strip() == "0"}
        self._rules.make(self._block, self._gateway, policy, off | (others & uplinks))
        for interface in (*off, bridge):
            forwarding(interface).write_text("1", encoding="ascii")
        netlink.addr("add", index=index, address=str(self._gateway), prefixlen=self._block.prefixlen)
        netlink.link("set", index=index, state="up")
        log.info("bridge %s has %s; interfaces that forward now: %s", bridge, self._block, " ".join(off) or "none")

    def attach(self, number: int, namespace: int, egress: Sequence[Egress]) -> None:
        """Give a network namespace eth0 with the address of *number*, and let it out. Whatever is raised: detach is due."""
        address, port = self.address(number), self._names.port(number)
        with inside(namespace):
            _switch_off_ipv6("default")
        with _netlink(f"port {port}") as netlink:
            peer = {"ifname": "eth0", "net_ns_fd": namespace, "address": _mac(address), "mtu": self._mtu}
            netlink.link("add", ifname=port, kind="veth", mtu=self._mtu, peer=peer)
            index = socket.if_nametoindex(port)
            _switch_off_ipv6(port)
            netlink.link("set", index=index, master=socket.if_nametoindex(self._names.bridge))
            # Isolated ports reach the bridge itself, but not each other, in whatever protocol.
            netlink.brport("set", index=index, isolated=1)
            self._rules.add(number, address, _mac(address), egress)
            self._ruled.add(number)
            netlink.link("set", index=index, state="up")
        with inside(namespace), _netlink(f"eth0 of {address}") as netlink:
            index = socket.if_nametoindex("eth0")
            netlink.addr("add", index=index, address=str(address), prefixlen=self._block.prefixlen)
            netlink.link("set", index=index, state="up")
            netlink.route("add", dst="default", gateway=str(self._gateway))

    def detach(self, number: int) -> None:
        """Undo :meth:`attach`, also one that failed, and forget the run's connections."""
        address, port = self.address(number), self._names.port(number)
        if port in (name for _, name in socket.if_nameindex()):
            with _netlink(f"port {port}") as netlink:
                netlink.link("del", index=socket.if_nametoindex(port))
        if number in self._ruled:
            self._rules.remove(number, address, _mac(address))
            self._ruled.remove(number)
            forget_connections(str(address))


def forget_connections(address: str) -> None:
    """Remove what conntrack knows of connections from *address*: answers that still come do not go to its next owner.

    The kernel chooses them (since Linux 5.8), so it does not matter how many others there are.
    """
    from pyroute2 import NetlinkError, NFCTSocket
    from pyroute2.netlink.nfnetlink.nfctsocket import NFCTAttrTuple

    with NFCTSocket() as conntrack:
        found = [
            NFCTAttrTuple.from_netlink(socket.AF_INET, entry.get_attr("CTA_TUPLE_ORIG"))
            for entry in conntrack.dump(tuple_orig=NFCTAttrTuple(saddr=address))
        ]
        for connection in found:
            try:
                conntrack.entry("del", tuple_orig=connection)
            except NetlinkError as error:
                if error.code != errno.ENOENT:  # it ended by itself
                    raise


@contextlib.contextmanager
def _netlink(what: str) -> Iterator[Any]:
    """A netlink socket of the calling thread's network namespace; Internal names *what* and the kernel's reason."""
    from pyroute2 import IPRoute, NetlinkError

    try:
        with IPRoute() as netlink:
            yield netlink
    except NetlinkError as error:
        raise Internal(f"{what}: {error.args[-1]}") from error
    except OSError as error:
        raise Internal(f"{what}: {error.filename or 'netlink'}: {error.strerror}") from error


def _mac(address: ipaddress.IPv4Address) -> str:
    """A locally administered address that goes with *address*."""
    return ":".join(f"{byte:02x}" for byte in (0x02, 0xAF, *address.packed))


def _mtu(netlink: Any, routes: Sequence[netroutes.Route]) -> int:
    """Of the interface of the default route: packets that have to be fragmented on their way are often lost."""
    for route in routes:
        if route.is_default:
            (link,) = netlink.link("get", index=socket.if_nametoindex(route.interface))
            return int(link.get_attr("IFLA_MTU"))
    return 1500


def _switch_off_ipv6(interface: str) -> None:
    with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
        Path("/proc/sys/net/ipv6/conf", interface, "disable_ipv6").write_text("1", encoding="ascii")
