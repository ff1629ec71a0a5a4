"""Network namespaces for tests: hosts on one bridge, whose links can be cut, slowed, made lossy and so on.

The namespaces have no names: each one lives as long as a descriptor of this process or a process in it, so even a test
run that is killed leaves none. Every interface is made in a namespace of ours, none is ever in the machine's own one, and
no firewall but theirs is touched. Mounts and unix sockets are shared with the machine.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

T = TypeVar("T")
_CLONE_NEWNET = 0x40000000
_SUBNET = "198.51.100"  # TEST-NET-2 (RFC 5737)
_libc = ctypes.CDLL(None, use_errno=True)


class Namespace:
    """One network namespace, with its loopback interface up."""

    def __init__(self) -> None:
        # The child is in the new namespace as soon as it answers; it ends with its input.
        with subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(b"\n")
            child.stdin.flush()
            if not child.stdout.read(1):
                raise OSError("unshare --net failed")
            self._fd = os.open(f"/proc/{child.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self.ip("link set lo up")

    def close(self) -> None:
        """Let go of the namespace; with the last process in it, it is gone with all of its interfaces."""
        os.close(self._fd)

    @property
    def path(self) -> str:
        """A path that leads to the namespace, for this process and its children."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    @property
    def prefix(self) -> list[str]:
        """What a command line has to begin with to run here; it executes, it does not fork.

        Not `ip netns exec`, which also makes a mount namespace.
        """
        return ["nsenter", f"--net={self.path}"]

    def run(self, *argv: str, text: str = "") -> str:
        """Run a command here to its end, with `text` as its input; returns its output.

        Raises:
            AssertionError: it failed.

        """
        done = subprocess.run([*self.prefix, *argv], input=text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(argv)} with {text!r}: {done.stderr}"
        return done.stdout

    def ip(self, *commands: str) -> None:
        """Run commands of ip(8), in one process."""
        self.run("ip", "-batch", "-", text="\n".join(commands) + "\n")

    def call(self, function: Callable[[], T]) -> T:
        """Call `function` in a thread that is in this namespace: the sockets that it makes are here for good."""
        result: list[T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                self._enter()
                result.append(function())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run, name="in a network namespace")
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return result[0]

    def _enter(self) -> None:
        """Have the calling thread be in this namespace from now on."""
        if _libc.setns(self._fd, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), self.path)


class Host(Namespace):
    """A namespace with one interface, eth0, whose other end is a port of the bridge."""

    def __init__(self, bridge: Namespace, number: int) -> None:
        super().__init__()
        self.address = f"{_SUBNET}.{number}"
        self._bridge = bridge
        self._port = f"port{number}"
        self._incoming: list[str] = []
        self._outgoing: list[str] = []
        bridge.ip(
            f"link add {self._port} type veth peer name eth0 netns {self.path}",
            f"link set {self._port} master br0 up",
        )
        self.ip(f"addr add {self.address}/24 dev eth0", "link set eth0 up")

    def cut(self) -> None:
        """Pull the cable: nothing comes through, and nobody is told."""
        self._bridge.ip(f"link set {self._port} down")

    def heal(self) -> None:
        """Undo all that the other methods did."""
        self._bridge.ip(f"link set {self._port} up")
        self._bridge.run("nft", "-f", "-", text=self._no_loss)
        if "tbf" in self.run("tc", "qdisc", "show", "dev", "eth0"):
            self.run("tc", "qdisc", "del", "dev", "eth0", "root")
        self._incoming.clear()
        self._outgoing.clear()
        self._filter()

    def slow(self, rate: str) -> None:
        """Send at most `rate`, as tc(8) writes it (`8mbit`)."""
        self.run("tc", "qdisc", "replace", "dev", "eth0", "root", "tbf", *f"rate {rate} burst 64kb latency 1s".split())

    def lossy(self, percent: int) -> None:
        """Lose so many of a hundred packets in each direction, evenly."""
        every = f"numgen inc mod {100 // percent} == 0 drop"
        self._filter(every, "")
        # Not as they leave this host: TCP is told when its own machine drops a packet, and counts it as not sent.
        chain = f'type filter hook ingress device "{self._port}" priority 0; {every};'
        self._bridge.run(
            "nft", "-f", "-", text=f"{self._no_loss}\ntable netdev {self._port} {{ chain c {{ {chain} }}; }}\n"
        )

    @property
    def _no_loss(self) -> str:
        """For nft(8): the end of what :meth:`lossy` did at the other end of the link."""
        return f"table netdev {self._port}; delete table netdev {self._port};"

    def reset(self) -> None:
        """Answer every TCP segment of each direction with a reset: connections break, and new ones are refused."""
        # The resets that the first rule makes pass the second one.
        self._filter(
            "meta l4proto tcp reject with tcp reset", "tcp flags & rst == 0 meta l4proto tcp reject with tcp reset"
        )

    def refuse(self) -> None:
        """Refuse connections from others; those that are there, and new ones to others, go on."""
        self._filter("tcp flags & (syn | ack) == syn reject with tcp reset", "")

    def part_from(self, other: Host) -> None:
        """Lose what goes to and comes from one other host."""
        self._filter(f"ip saddr {other.address} drop", f"ip daddr {other.address} drop")

    def _filter(self, incoming: str = "", outgoing: str = "") -> None:
        self._incoming += [f"iifname eth0 {incoming}"] if incoming else []
        self._outgoing += [f"oifname eth0 {outgoing}"] if outgoing else []
        chains = [
            f"chain {name} {{ type filter hook {name} priority 0; {'; '.join(rules)}; }}"
            for name, rules in (("input", self._incoming), ("output", self._outgoing))
            if rules
        ]
        self.run("nft", "-f", "-", text=f"flush ruleset\ntable ip afs {{\n{chr(10).join(chains)}\n}}\n")

    def sent(self) -> int:
        """Bytes that left through eth0 so far."""
        return self._device_counters()[8]

    def received(self) -> int:
        """Bytes that came through eth0 so far."""
        return self._device_counters()[0]

    def _device_counters(self) -> list[int]:
        for line in self.run("cat", "/proc/net/dev").splitlines():
            name, _, counters = line.partition(":")
            if name.strip() == "eth0":
                return [int(field) for field in counters.split()]
        raise AssertionError("no eth0")

    def connected_to(self, address: str) -> bool:
        """Whether somebody here has a TCP connection to `address`, as `198.51.100.1:80`."""
        host, _, port = address.rpartition(":")
        # proc(5): an address is shown as a number of the machine's byte order, 01 is ESTABLISHED. A socket of IPv6 shows the
        # one of IPv4 that it is connected to behind a prefix.
        remote = f"{int.from_bytes(socket.inet_aton(host), sys.byteorder):08X}:{int(port):04X}"
        lines = self.run("cat", "/proc/net/tcp", "/proc/net/tcp6").splitlines()
        return any(line.split()[2].endswith(remote) and line.split()[3] == "01" for line in lines)

    def tcp(self, counter: str) -> int:
        """A counter of TCP (RFC 4022), such as `RetransSegs`."""
        names, values = (line.split() for line in self.run("cat", "/proc/net/snmp").splitlines() if "Tcp:" in line)
        return int(values[names.index(counter)])


@contextmanager
def hosts(numbers: Iterable[int]) -> Iterator[dict[int, Host]]:
    """Hosts on a bridge, by the last byte of their addresses; gone at the end, once no process is in them."""
    made: list[Namespace] = []
    try:
        bridge = Namespace()
        made.append(bridge)
        bridge.ip("link add br0 type bridge", "link set br0 up")
        found = {}
        for number in numbers:
            found[number] = Host(bridge, number)
            made.append(found[number])
        yield found
    finally:
        for namespace in made:
            namespace.close()
