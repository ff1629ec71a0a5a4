"""A node with an uplink: one network namespace for the node, and one that is all of the world behind its gateway.

Nothing is in the machine's own namespace. What is called by `Namespace.call` runs in a thread of the namespace, and so do
the threads and processes that it starts.
"""

from __future__ import annotations

import contextlib
import errno
import os
import selectors
import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

from afs.afslet.__main__ import Config
from afs.afslet.netns import inside
from afs.afslet.networks import NetworkSettings
from tests.testbed.netns import Namespace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

T = TypeVar("T")
NODE, GATEWAY = "198.51.100.2", "198.51.100.1"
PUBLIC, OTHER = "203.0.113.10", "203.0.113.20"
PRIVATE, METADATA = "10.20.0.5", "169.254.169.254"
TCP_PORTS, UDP_PORTS = (53, 80, 443), (53, 80)
NODE_PORT = 61051
PATIENCE = 20.0


def network_settings(**changes: Any) -> NetworkSettings:
    """What afslet has if it is not told otherwise, with *changes*."""
    config = Config()
    return NetworkSettings(**{field.name: getattr(config, field.name) for field in fields(NetworkSettings)} | changes)


class Server:
    """Answers every TCP connection, and every datagram, with the address that it comes from, as text."""

    def __init__(self, namespace: Namespace, tcp: Iterable[int], udp: Iterable[int]) -> None:
        self._selector = selectors.DefaultSelector()
        self._wake, self._stop = socket.socketpair()
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._sockets = namespace.call(lambda: [*map(_listen, tcp), *map(_receive, udp)])
        for each in self._sockets:
            self._selector.register(each, selectors.EVENT_READ)
        self.datagrams: list[tuple[str, bytes]] = []
        """Where each came from, and what was in it."""
        self._thread = threading.Thread(target=self._serve, name="server")
        self._thread.start()

    def close(self) -> None:
        """Stop answering."""
        self._stop.send(b"x")
        self._thread.join()
        for each in (*self._sockets, self._wake, self._stop):
            each.close()
        self._selector.close()

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select():
                ready = key.fileobj
                if ready is self._wake:
                    return
                assert isinstance(ready, socket.socket)
                if ready.type == socket.SOCK_DGRAM:
                    data, peer = ready.recvfrom(2000)
                    self.datagrams.append((peer[0], data))
                    ready.sendto(peer[0].encode(), peer)
                    continue
                connection, peer = ready.accept()
                with connection, contextlib.suppress(OSError):
                    connection.sendall(peer[0].encode())


def _listen(port: int) -> socket.socket:
    return socket.create_server(("", port))


def _receive(port: int) -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.bind(("", port))
    return made


@dataclass(frozen=True)
class Uplink:
    """The node, the world, and a server in each."""

    node: Namespace
    world: Namespace
    internet: Server
    services: Server

    def state(self) -> tuple[str, str, str]:
        """What a bridge network would change on the node: interfaces, rules, forwarding."""
        links = self.node.run("ip", "-o", "link")
        forwarding = self.node.run("sh", "-c", "cd /proc/sys/net/ipv4/conf && grep -H . */forwarding")
        return "\n".join(sorted(line.split(": ")[1] for line in links.splitlines())), self.rules(), forwarding

    def rules(self) -> str:
        """The node's nftables."""
        return self.node.run("nft", "list", "ruleset")


@contextmanager
def uplink() -> Iterator[Uplink]:
    """A node whose default route leads to the world."""
    with ExitStack() as stack:
        node, world = Namespace(), Namespace()
        for namespace in (node, world):
            stack.callback(namespace.close)
        world.ip(f"link add node0 type veth peer name eth0 netns {node.path}")
        world.ip(f"addr add {GATEWAY}/24 dev node0", "link set node0 up")
        world.ip(*(f"addr add {address}/32 dev lo" for address in (PUBLIC, OTHER, PRIVATE, METADATA)))
        world.ip(f"route replace 198.51.100.0/24 dev node0 src {PUBLIC}")  # where answers to datagrams come from
        node.ip(f"addr add {NODE}/24 dev eth0", "link set eth0 up", f"route add default via {GATEWAY}")
        internet, services = Server(world, TCP_PORTS, UDP_PORTS), Server(node, [NODE_PORT], [])
        for server in (internet, services):
            stack.callback(server.close)
        yield Uplink(node, world, internet, services)


def call_in(path: str, function: Callable[[], T]) -> T:
    """Call a function in a thread that is in the network namespace of `path` for so long."""

    def run() -> T:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with inside(fd):
                return function()
        finally:
            os.close(fd)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()


def connect(path: str, address: str, port: int) -> str:
    """What the server at an address says to a process in a network namespace, or the name of the error."""

    def run() -> str:
        try:
            with socket.create_connection((address, port), timeout=PATIENCE) as connection:
                return connection.recv(100).decode()
        except OSError as error:
            return errno.errorcode[error.errno] if error.errno else type(error).__name__

    return call_in(path, run)


def ask(path: str, address: str, port: int, data: bytes = b"?", source_port: int = 0) -> str:
    """The same by a datagram; a server of the world answers from its first address only, so ask that."""

    def run() -> str:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            asking.bind(("", source_port))
            asking.settimeout(PATIENCE)
            try:
                asking.connect((address, port))
                asking.send(data)
                return asking.recv(100).decode()
            except OSError as error:
                return errno.errorcode[error.errno] if error.errno else type(error).__name__

    return call_in(path, run)


def datagram(source: str, target: str, port: int, data: bytes) -> bytes:
    """An IPv4 packet with a UDP datagram, which has no checksum."""
    udp = struct.pack("!HHHH", 4000, port, 8 + len(data), 0) + data
    addresses = socket.inet_aton(source) + socket.inet_aton(target)
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 1, 0, 64, socket.IPPROTO_UDP, 0)
    words = struct.unpack("!10H", header + addresses)
    total = sum(words)
    total = (total & 0xFFFF) + (total >> 16)
    return header[:10] + struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF) + addresses + udp


def send_frame(path: str, frame_to: bytes, frame_from: bytes, packet: bytes, protocol: int = 0x0800) -> None:
    """Send an Ethernet frame by eth0 of a network namespace, as CAP_NET_RAW allows."""

    def run() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
            raw.bind(("eth0", 0))
            raw.send(frame_to + frame_from + struct.pack("!H", protocol) + packet)

    call_in(path, run)
