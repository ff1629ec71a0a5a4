"""The hosts in network namespaces that tests of the network stand on, and that nothing is left of them."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING

import pytest

from tests.testbed import capabilities, leaks, netns

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.testbed.netns import Host

pytestmark = pytest.mark.root
TIMEOUT = 10.0


@pytest.fixture
def pair() -> Iterator[tuple[Host, Host]]:
    """Two hosts."""
    capabilities.require("netns")
    with netns.hosts([1, 2]) as hosts:
        yield hosts[1], hosts[2]


def listen(host: Host) -> socket.socket:
    """A listening socket."""
    return host.call(lambda: socket.create_server((host.address, 0)))


def connect(host: Host, server: socket.socket, timeout: float = TIMEOUT) -> socket.socket:
    """A connection from a host to a listening socket of another."""
    return host.call(lambda: socket.create_connection(server.getsockname(), timeout))


def connected(pair: tuple[Host, Host]) -> tuple[socket.socket, socket.socket, socket.socket]:
    """(listening socket of the first host, its end of a connection, the second host's end)."""
    server = listen(pair[0])
    client = connect(pair[1], server)
    accepted, _ = server.accept()
    accepted.settimeout(TIMEOUT)
    return server, accepted, client


def test_hosts_reach_each_other_and_the_machine_has_no_part_in_it() -> None:
    capabilities.require("netns")
    before = socket.if_nameindex()
    with netns.hosts([1, 2]) as hosts:
        assert socket.if_nameindex() == before
        _exchange((hosts[1], hosts[2]))


def _exchange(pair: tuple[Host, Host]) -> None:
    server, accepted, client = connected(pair)
    with server, accepted, client:
        client.sendall(b"hello")
        assert accepted.recv(5) == b"hello"
        assert accepted.getpeername()[0] == pair[1].address
        assert pair[1].sent() > 5


def test_a_cut_link_loses_what_is_sent_and_says_nothing(pair: tuple[Host, Host]) -> None:
    server, accepted, client = connected(pair)
    with server, accepted, client:
        before = pair[1].tcp("RetransSegs")
        pair[0].cut()
        client.sendall(b"hello")
        while pair[1].tcp("RetransSegs") == before:  # the event: its first try was in vain
            pass
        accepted.setblocking(False)
        with pytest.raises(BlockingIOError):
            accepted.recv(5)
        pair[0].heal()
        accepted.settimeout(TIMEOUT)
        assert accepted.recv(5) == b"hello"


def test_a_slow_link_takes_its_time(pair: tuple[Host, Host]) -> None:
    server, accepted, client = connected(pair)
    with server, accepted, client:
        pair[0].slow("8mbit")
        sending = threading.Thread(target=accepted.sendall, args=(bytes(1 << 20),))
        sending.start()
        left = 1 << 20
        while left:
            left -= len(client.recv(left))
            if left > 1 << 19:  # most of it still waits where the rate is kept
                assert "backlog 0b" not in pair[0].run("tc", "-s", "qdisc", "show", "dev", "eth0")
        sending.join()
        pair[0].heal()
        assert "tbf" not in pair[0].run("tc", "qdisc", "show", "dev", "eth0")


def test_a_lossy_link_loses_some(pair: tuple[Host, Host]) -> None:
    server, accepted, client = connected(pair)
    with server, accepted, client:
        pair[0].lossy(20)
        before = pair[1].tcp("RetransSegs")
        while pair[1].tcp("RetransSegs") == before:
            client.sendall(b"x")  # a packet each
            assert accepted.recv(1) == b"x"


def test_a_reset_link_breaks_connections_and_refuses_new_ones(pair: tuple[Host, Host]) -> None:
    server, accepted, client = connected(pair)
    with server, accepted, client:
        pair[0].reset()
        client.sendall(b"hello")
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        with pytest.raises(ConnectionRefusedError):
            connect(pair[1], server)
        pair[0].heal()
        with connect(pair[1], server):
            pass


def test_one_direction_is_refused(pair: tuple[Host, Host]) -> None:
    server, accepted, client = connected(pair)
    with server, accepted, client, listen(pair[1]) as other:
        pair[0].refuse()
        client.sendall(b"hello")
        assert accepted.recv(5) == b"hello", "what is connected goes on"
        with pytest.raises(ConnectionRefusedError):
            connect(pair[1], server)
        with connect(pair[0], other):
            pass


def test_two_hosts_are_parted() -> None:
    capabilities.require("netns")
    with netns.hosts([1, 2, 3]) as hosts, listen(hosts[1]) as server:
        hosts[2].part_from(hosts[1])
        with pytest.raises(TimeoutError):
            connect(hosts[2], server, 0.2)
        with connect(hosts[3], server):
            pass


def test_namespaces_are_found_until_they_are_gone() -> None:
    capabilities.require("netns")
    before = leaks.snapshot()
    with netns.hosts([1]):
        found = leaks.new_since(before)["network namespaces"]
        assert len(found) == 2, "the bridge's and the host's"
        assert all(name.startswith("net:[") for name in found)
    leaks.assert_no_new(before)
