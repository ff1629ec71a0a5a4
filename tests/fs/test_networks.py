"""Networks of runs, on a node that is a network namespace with the world behind its gateway."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from afs.afslet import netns
from afs.afslet.egress import make_policy
from afs.afslet.netnames import clear_network, names_of
from afs.afslet.networks import HOSTS, RESOLV_CONF, Networks, NetworkSettings, RunNetwork
from afs.core.errors import (
    AfsError,
    FailedPrecondition,
    InvalidArgument,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)
from afs.proto.v1 import afslet_pb2 as pb
from tests.testbed import capabilities, uplink
from tests.testbed.netns import Namespace
from tests.testbed.uplink import (
    GATEWAY,
    METADATA,
    NODE,
    NODE_PORT,
    OTHER,
    PRIVATE,
    PUBLIC,
    Server,
    Uplink,
    network_settings,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence
    from pathlib import Path

pytestmark = pytest.mark.root
NAME = "afs-test-node"
REFUSED = "ECONNREFUSED"
BRIDGE = pb.NETWORK_BRIDGE
SETTINGS = network_settings(name_servers=(PUBLIC,))


@pytest.fixture(scope="module")
def up() -> Iterator[Uplink]:
    capabilities.require("root", "netns")
    with uplink.uplink() as made:
        yield made


@pytest.fixture(autouse=True)
def untouched(up: Uplink) -> Iterator[None]:
    """Every test leaves the node as it was; the machine's own namespace has nothing of it at any time."""
    before = up.state()
    yield
    assert up.state() == before
    assert not [name for _, name in socket.if_nameindex() if name.startswith(("afs", "veth"))]


@pytest.fixture(params=["0", "1"])
def bridge_filter(up: Uplink, request: pytest.FixtureRequest) -> Iterator[None]:
    """Whether the kernel shows what crosses a bridge to the filters of IP as well (br_netfilter)."""
    switch = "/proc/sys/net/bridge/bridge-nf-call-iptables"
    if not os.path.exists(switch):
        pytest.skip("the kernel has no br_netfilter")
    before = up.node.run("cat", switch)
    up.node.run("sh", "-c", f"echo {request.param} > {switch}")
    yield
    up.node.run("sh", "-c", f"echo {before} > {switch}")


def play(
    up: Uplink, directory: Path, scenario: Callable[[Networks], Awaitable[None]], settings: NetworkSettings = SETTINGS
) -> None:
    """Run a scenario with the networks of an afslet on the node."""

    async def run() -> None:
        networks = Networks(settings, NAME, directory)
        await networks.start()
        try:
            await scenario(networks)
        finally:
            await networks.close()

    up.node.call(lambda: asyncio.run(run()))


def path_of(network: RunNetwork) -> str:
    assert network.path is not None
    return network.path


async def tcp(network: RunNetwork, address: str, port: int) -> str:
    return await asyncio.to_thread(uplink.connect, path_of(network), address, port)


async def udp(network: RunNetwork, address: str, port: int, data: bytes = b"?") -> str:
    return await asyncio.to_thread(uplink.ask, path_of(network), address, port, data)


def interfaces(network: RunNetwork) -> list[str]:
    return uplink.call_in(path_of(network), lambda: [name for _, name in socket.if_nameindex()])


def mac_of(address: str) -> bytes:
    """What the bridge gives to who has the address."""
    return b"\x02\xaf" + socket.inet_aton(address)


def gateway_of(address: str) -> str:
    """Of a block of 20 bits."""
    number = int.from_bytes(socket.inet_aton(address)) & 0xFFFFF000 | 1
    return socket.inet_ntoa(number.to_bytes(4))


def test_none_has_loopback_and_nothing_else(up: Uplink, tmp_path: Path) -> None:
    before = up.state()

    async def scenario(networks: Networks) -> None:
        async with networks.network(pb.NETWORK_DEFAULT, (), "") as network:
            namespace = os.readlink(path_of(network))
            assert interfaces(network) == ["lo"]
            server = uplink.call_in(path_of(network), lambda: socket.create_server(("127.0.0.1", 80)))
            with server:
                uplink.call_in(path_of(network), lambda: socket.create_connection(("127.0.0.1", 80)).close())
            assert await tcp(network, PUBLIC, 80) == "ENETUNREACH"
            assert await tcp(network, NODE, NODE_PORT) == "ENETUNREACH"
            assert await tcp(network, "127.0.0.1", NODE_PORT) == "ECONNREFUSED"
            assert "localhost" in network.files[HOSTS].read_text()
        # Another one may have its number by now.
        assert not os.path.exists(path_of(network)) or os.readlink(path_of(network)) != namespace
        async with networks.network(pb.NETWORK_NONE, (), "box") as network:
            assert "127.0.0.1\tbox" in network.files[HOSTS].read_text()
        assert not network.files[HOSTS].exists()
        assert up.state() == before  # nothing is set up for these

    play(up, tmp_path, scenario)


def test_a_namespace_is_for_one_run(up: Uplink, tmp_path: Path) -> None:
    async def scenario(networks: Networks) -> None:
        async with contextlib.AsyncExitStack() as stack:
            entered = [await stack.enter_async_context(networks.network(1, (), "")) for _ in range(20)]
            paths = [path_of(network) for network in entered]
            kept = [os.open(path, os.O_RDONLY) for path in paths]  # or the kernel would use an inode number again
        async with networks.network(1, (), "") as network:
            kept.append(os.open(path_of(network), os.O_RDONLY))
        assert len({os.fstat(fd).st_ino for fd in kept}) == 21
        for fd in kept:
            os.close(fd)

    play(up, tmp_path, scenario, network_settings(network_pool=2))


def test_bridge_reaches_the_world_behind_nat(up: Uplink, tmp_path: Path) -> None:
    async def scenario(networks: Networks) -> None:
        async with networks.network(BRIDGE, (), "box") as network:
            assert sorted(interfaces(network)) == ["eth0", "lo"]
            assert await tcp(network, PUBLIC, 80) == NODE
            assert await tcp(network, OTHER, 443) == NODE
            assert await udp(network, PUBLIC, 80) == NODE
            addresses = up.node.run("nsenter", f"--net={network.path}", "ip", "-o", "-6", "addr", "show", "dev", "eth0")
            assert addresses == ""
            assert f"{network.address}\tbox\n" in network.files[HOSTS].read_text()
            assert network.files[RESOLV_CONF].read_text() == f"nameserver {PUBLIC}\n"

    play(up, tmp_path, scenario)


@pytest.mark.usefixtures("bridge_filter")
def test_what_no_run_reaches(up: Uplink, tmp_path: Path) -> None:
    async def scenario(networks: Networks) -> None:
        async with networks.network(BRIDGE, (), "") as network:
            for address in (METADATA, PRIVATE, GATEWAY, "192.168.1.1", "100.64.0.1", "168.63.129.16"):
                assert await tcp(network, address, 80) == REFUSED, address
            for address in (NODE, gateway_of(network.address)):
                assert await tcp(network, address, NODE_PORT) == REFUSED, address
                assert await udp(network, address, NODE_PORT) == "EHOSTUNREACH", address
            assert await tcp(network, "127.0.0.1", NODE_PORT) == "ECONNREFUSED"  # its own loopback
            assert await tcp(network, PUBLIC, 80) == NODE

    play(up, tmp_path, scenario)


def test_name_servers_answer_names_only(up: Uplink, tmp_path: Path) -> None:
    async def scenario(networks: Networks) -> None:
        async with networks.network(BRIDGE, (), "") as network:
            assert await tcp(network, METADATA, 53) == NODE  # as in Google's cloud
            assert await tcp(network, METADATA, 80) == REFUSED
        async with networks.network(BRIDGE, [PUBLIC], "") as network:
            assert await tcp(network, METADATA, 53) == REFUSED

    play(up, tmp_path, scenario, network_settings(name_servers=(METADATA,)))


def test_the_operator_allows_and_denies(up: Uplink, tmp_path: Path) -> None:
    settings = network_settings(
        name_servers=(PUBLIC,),
        egress_allow=("0.0.0.0/0", "10.0.0.0/8:443", "10.20.0.0/16:53"),
        egress_deny=(f"{OTHER}:80",),
    )

    async def scenario(networks: Networks) -> None:
        async with networks.network(BRIDGE, (), "") as network:
            assert await tcp(network, PRIVATE, 443) == NODE
            assert await tcp(network, PRIVATE, 53) == NODE
            assert await tcp(network, PRIVATE, 80) == REFUSED
            assert await tcp(network, METADATA, 80) == REFUSED
            assert await tcp(network, OTHER, 80) == REFUSED
            assert await tcp(network, OTHER, 443) == NODE
            assert await tcp(network, NODE, NODE_PORT) == REFUSED

    play(up, tmp_path, scenario, settings)


def test_a_run_narrows_what_it_reaches(up: Uplink, tmp_path: Path) -> None:
    async def scenario(networks: Networks) -> None:
        wanted = [f"{PUBLIC}:80", METADATA, f"{OTHER}/31"]
        async with networks.network(BRIDGE, (), "") as wide, networks.network(BRIDGE, wanted, "") as narrow:
            assert await tcp(narrow, PUBLIC, 80) == NODE
            assert await udp(narrow, PUBLIC, 80) == NODE
            assert await tcp(narrow, PUBLIC, 443) == REFUSED
            assert await tcp(narrow, OTHER, 443) == NODE
            assert await tcp(narrow, METADATA, 80) == REFUSED  # the operator's word counts too
            assert await tcp(wide, PUBLIC, 443) == NODE

    play(up, tmp_path, scenario)


@pytest.mark.usefixtures("bridge_filter")
def test_runs_do_not_reach_each_other(up: Uplink, tmp_path: Path) -> None:
    """Neither through the bridge nor through the node, also where the operator allows everything."""

    async def scenario(networks: Networks) -> None:
        async with networks.network(BRIDGE, (), "") as one, networks.network(BRIDGE, (), "") as two:
            victim = uplink.call_in(path_of(two), lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            with victim:
                victim.bind(("", 80))
                victim.setblocking(False)
                own = mac_of(one.address)
                packet = uplink.datagram(one.address, two.address, 80, b"x")
                for to in (mac_of(two.address), mac_of(gateway_of(one.address)), b"\xff" * 6):
                    uplink.send_frame(path_of(one), to, own, packet)
                assert await udp(one, PUBLIC, 80) == NODE  # all before it has been judged
                with pytest.raises(BlockingIOError):
                    victim.recv(100)
                uplink.call_in(path_of(two), lambda: victim.sendto(b"x", ("127.0.0.1", 80)))
                assert victim.recv(100) == b"x"

    allow = ("100.64.0.0/10", "0.0.0.0/0")
    play(up, tmp_path, scenario, network_settings(name_servers=(PUBLIC,), egress_allow=allow))


def test_no_run_speaks_for_another_one(up: Uplink, tmp_path: Path) -> None:
    """Neither with another's address, nor from another's interface, nor in a protocol that nobody judges."""

    async def scenario(networks: Networks) -> None:
        async with networks.network(BRIDGE, [f"{PUBLIC}:443"], "") as one, networks.network(BRIDGE, (), "") as two:
            gateway = gateway_of(one.address)
            to, own, other = mac_of(gateway), mac_of(one.address), mac_of(two.address)
            seen = len(up.internet.datagrams)

            def send(frame_from: bytes, source: str, data: bytes) -> None:
                packet = uplink.datagram(source, PUBLIC, 80, data)
                uplink.send_frame(path_of(one), to, frame_from, packet)

            send(own, two.address, b"address")
            send(other, two.address, b"address and interface")
            send(other, one.address, b"interface")
            send(own, NODE, b"node")
            claim = b"\x00\x01\x08\x00\x06\x04\x00\x02" + own + socket.inet_aton(two.address)
            uplink.send_frame(path_of(one), to, own, claim + to + socket.inet_aton(gateway), 0x0806)
            uplink.send_frame(path_of(one), to, own, b"\x60" + bytes(39), 0x86DD)
            assert await udp(two, PUBLIC, 80, b"true") == NODE
            assert await tcp(one, PUBLIC, 443) == NODE
            assert await udp(two, PUBLIC, 80, b"true") == NODE
            assert [data for _, data in up.internet.datagrams[seen:]] == [b"true", b"true"]
            neighbours = up.node.run("ip", "neigh", "show", two.address)
            assert ":".join(f"{byte:02x}" for byte in other) in neighbours

    play(up, tmp_path, scenario)


def test_connections_are_limited(up: Uplink, tmp_path: Path) -> None:
    async def scenario(networks: Networks) -> None:
        async with networks.network(BRIDGE, (), "") as network, networks.network(BRIDGE, (), "") as other:

            def open_three() -> list[bool]:
                opened = []
                with contextlib.ExitStack() as stack:
                    for port in (10001, 10002, 10003):
                        each = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
                        each.bind(("", port))
                        each.settimeout(uplink.PATIENCE)
                        each.connect((PUBLIC, 80))
                        try:
                            each.send(b"?")
                            opened.append(each.recv(100) == NODE.encode())
                        except OSError:
                            opened.append(False)
                return opened

            opened = await asyncio.to_thread(uplink.call_in, path_of(network), open_three)
            assert opened == [True, True, False]
            assert await udp(other, PUBLIC, 80) == NODE

    play(up, tmp_path, scenario, network_settings(name_servers=(PUBLIC,), egress_connections=2))


def connections(up: Uplink, address: str) -> list[str]:
    """What the node's conntrack knows from an address."""
    from pyroute2 import NFCTSocket
    from pyroute2.netlink.nfnetlink.nfctsocket import NFCTAttrTuple

    def look() -> list[str]:
        with NFCTSocket() as conntrack:
            return [str(entry) for entry in conntrack.dump(tuple_orig=NFCTAttrTuple(saddr=address))]

    return up.node.call(look)


def test_nothing_is_left_of_a_run(up: Uplink, tmp_path: Path) -> None:
    async def scenario(networks: Networks) -> None:
        async with networks.network(BRIDGE, (), ""):
            pass
        before = up.state()
        async with networks.network(BRIDGE, [f"{PUBLIC}:80", OTHER], "") as network:
            assert await tcp(network, PUBLIC, 80) == NODE
            assert await udp(network, PUBLIC, 80) == NODE
            assert len(connections(up, network.address)) == 2
            assert up.state() != before
        assert up.state() == before
        assert not connections(up, network.address)
        assert not os.path.exists(path_of(network))
        assert not any(path.exists() for path in network.files.values())
        with pytest.raises(ZeroDivisionError):
            async with networks.network(BRIDGE, (), "") as network:
                raise ZeroDivisionError
        assert up.state() == before

    play(up, tmp_path, scenario)


def test_a_cancelled_run_leaves_nothing(up: Uplink, tmp_path: Path) -> None:
    async def scenario(networks: Networks) -> None:
        async with networks.network(BRIDGE, (), ""):
            before = up.state()

            async def enter() -> None:
                async with networks.network(BRIDGE, (), ""):
                    raise AssertionError("it was cancelled")

            for steps in range(1, 6):
                task = asyncio.create_task(enter())
                for _ in range(steps):
                    await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert up.state() == before

    play(up, tmp_path, scenario)


def test_a_full_bridge_says_so(up: Uplink, tmp_path: Path) -> None:
    async def scenario(networks: Networks) -> None:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(5):
                await stack.enter_async_context(networks.network(BRIDGE, (), ""))
            with pytest.raises(ResourceExhausted, match="all 5 ports"):
                await stack.enter_async_context(networks.network(BRIDGE, (), ""))
        async with networks.network(BRIDGE, (), "") as network:
            assert await tcp(network, PUBLIC, 80) == NODE

    play(up, tmp_path, scenario, network_settings(name_servers=(PUBLIC,), bridge_subnet="100.127.0.0/29"))


_KILLED = f"""
import asyncio, pathlib, sys
from afs.afslet.networks import Networks
from tests.testbed.uplink import network_settings
async def main():
    networks = Networks(network_settings(name_servers=("{PUBLIC}",)), "{NAME}", pathlib.Path(sys.argv[1]))
    await networks.start()
    async with networks.network(2, (), ""):
        print("up", flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""


@pytest.mark.parametrize("by_successor", [False, True])
def test_a_killed_afslet_can_be_cleared_away(up: Uplink, tmp_path: Path, by_successor: bool) -> None:
    before = up.state()
    argv = [*up.node.prefix, sys.executable, "-c", _KILLED, str(tmp_path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"up\n"
        child.send_signal(signal.SIGKILL)
    assert names_of(NAME).bridge in up.state()[0]
    if by_successor:

        async def scenario(networks: Networks) -> None:
            assert up.state() == before

        play(up, tmp_path, scenario)
    else:
        assert up.node.call(lambda: clear_network(NAME))
        assert not up.node.call(lambda: clear_network(NAME))


def test_two_afslets_share_a_node(up: Uplink, tmp_path: Path) -> None:
    async def run() -> None:
        first = Networks(SETTINGS, NAME, tmp_path)
        second = Networks(SETTINGS, f"{NAME}2", tmp_path)
        for each in (first, second):
            await each.start()
        # The first one switches forwarding on, and is the first to go.
        async with first.network(BRIDGE, (), ""):
            pass
        async with second.network(BRIDGE, (), "") as two:
            async with first.network(BRIDGE, (), "") as one:
                assert gateway_of(one.address) != gateway_of(two.address)
                assert await tcp(one, PUBLIC, 80) == NODE
                assert await tcp(one, gateway_of(two.address), 80) == REFUSED
            await first.close()
            assert await tcp(two, PUBLIC, 80) == NODE
        await second.close()

    up.node.call(lambda: asyncio.run(run()))


def test_the_node_forwards_for_runs_only(up: Uplink, tmp_path: Path) -> None:
    """Its uplink forwards while there is a bridge; others get nowhere by that."""
    lan = Namespace()
    lan.ip(f"link add eth0 type veth peer name lan0 netns {up.node.path}", "addr add 192.0.2.2/24 dev eth0")
    lan.ip("link set eth0 up", "route add default via 192.0.2.1")
    up.node.ip("addr add 192.0.2.1/24 dev lan0", "link set lan0 up")
    up.world.ip(f"route add 192.0.2.0/24 via {NODE}")
    server = Server(lan, [], [80])

    async def scenario(networks: Networks) -> None:
        async with networks.network(BRIDGE, (), "") as network:
            assert await tcp(network, PUBLIC, 80) == NODE

            def send() -> None:
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sending:
                    sending.sendto(b"from outside", ("192.0.2.2", 80))

            up.world.call(send)
            assert uplink.connect(up.world.path, NODE, NODE_PORT)  # what was sent before it has come through
            assert await asyncio.to_thread(uplink.ask, up.node.path, "192.0.2.2", 80, b"from the node") == "192.0.2.1"
            assert [data for _, data in server.datagrams] == [b"from the node"]

    try:
        play(up, tmp_path, scenario)
    finally:
        server.close()
        lan.close()
        up.world.ip("route del 192.0.2.0/24")
        up.node.ip("link del lan0")


def test_without_nftables_there_is_no_bridge(up: Uplink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither without the program nor with a kernel that lacks them; the other modes work."""
    before = up.state()

    async def scenario(networks: Networks) -> None:
        path = os.environ["PATH"]
        broken = tmp_path / "bin"
        broken.mkdir()
        (broken / "nft").write_text("#!/bin/sh\necho no nftables >&2\nexit 1\n")
        (broken / "nft").chmod(0o755)
        for programs, text in ((str(tmp_path), "needs the program nft"), (f"{broken}:{path}", "no nftables")):
            monkeypatch.setenv("PATH", programs)
            with pytest.raises(AfsError, match=text):
                async with networks.network(BRIDGE, (), ""):
                    raise AssertionError("it was entered")
            async with networks.network(pb.NETWORK_NONE, (), "") as network:
                assert interfaces(network) == ["lo"]
            monkeypatch.setenv("PATH", path)
            assert up.state() == before
        async with networks.network(BRIDGE, (), "") as network:
            assert await tcp(network, PUBLIC, 80) == NODE

    play(up, tmp_path, scenario)


async def test_who_waits_for_a_namespace_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if others who waited were cancelled, or none could be made in between."""
    pool, gate = netns.Pool(0), threading.Event()
    failures = [OSError(errno.ENOSPC, "No space left on device")]
    make = netns.make_namespace

    def slowly() -> int:
        gate.wait()
        if failures:
            raise failures.pop()
        return make()

    monkeypatch.setattr(netns, "make_namespace", slowly)
    tasks = [asyncio.create_task(pool.take()) for _ in range(4)]
    await asyncio.sleep(0)
    tasks[1].cancel()
    gate.set()
    failed, cancelled, *got = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(failed, Unavailable)
    assert "No space left" in failed.line
    assert isinstance(cancelled, asyncio.CancelledError)
    assert len({os.fstat(fd).st_ino for fd in got if isinstance(fd, int)}) == 2
    got.append(await pool.take())
    pool.close()
    for fd in got:
        assert isinstance(fd, int)
        os.close(fd)


def test_only_a_bridge_costs_an_import_of_pyroute2() -> None:
    program = "import sys, afs.afslet.networks; sys.exit('pyroute2' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_most_specific_entry_counts() -> None:
    near = [ipaddress.IPv4Network("192.0.2.0/24")]
    policy = make_policy(
        ["10.0.0.0/8", "10.1.0.0/16:443", "192.0.2.0/24"], ["10.1.0.0/16", "8.8.8.8"], near, ["10.9.9.9"]
    )
    rules = [rule for rule in policy.rules() if rule.split()[2].startswith(("10.", "192.0.2.", "8."))]
    assert [(*rule.split()[2:3], rule.split()[-1]) for rule in rules] == [
        ("10.9.9.9/32", "accept"),
        ("8.8.8.8/32", "refuse"),
        ("192.0.2.0/24", "accept"),
        ("192.0.2.0/24", "refuse"),
        ("10.1.0.0/16", "accept"),
        ("10.1.0.0/16", "refuse"),
        ("10.0.0.0/8", "accept"),
        ("10.0.0.0/8", "refuse"),
    ]
    assert [rule for rule in rules if "dport 443" in rule or "dport 53" in rule] == [rules[0], rules[4]]


@pytest.mark.parametrize(
    ("settings", "mode", "egress", "error", "text"),
    [
        (network_settings(), pb.NETWORK_HOST, [], PermissionDenied, "network mode host.*networks_allowed=none,bridge"),
        (network_settings(networks_allowed=("none",)), BRIDGE, [], PermissionDenied, "network mode bridge"),
        (network_settings(), pb.NETWORK_DEFAULT, ["1.2.3.4"], InvalidArgument, "egress_allow.*network mode none"),
        (network_settings(), BRIDGE, ["fd00::/8"], InvalidArgument, "IPv4 only"),
        (network_settings(), BRIDGE, ["somewhere"], InvalidArgument, "ADDRESS"),
    ],
)
def test_refusals(
    up: Uplink,
    tmp_path: Path,
    settings: NetworkSettings,
    mode: int,
    egress: Sequence[str],
    error: type[AfsError],
    text: str,
) -> None:
    async def scenario(networks: Networks) -> None:
        with pytest.raises(error, match=text):
            networks.check(mode, egress)
        with pytest.raises(error, match=text):
            async with networks.network(mode, egress, ""):
                raise AssertionError("it was entered")

    play(up, tmp_path, scenario, settings)


def test_host_is_the_nodes_own(up: Uplink, tmp_path: Path) -> None:
    async def scenario(networks: Networks) -> None:
        async with networks.network(pb.NETWORK_DEFAULT, (), "") as network:
            assert network.path is None

    play(up, tmp_path, scenario, network_settings(network_default="host", networks_allowed=("host",)))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (network_settings(network_default="bridge", networks_allowed=("none",)), "network_default bridge"),
        (network_settings(networks_allowed=("none", "wifi")), "networks_allowed: 'wifi'"),
        (network_settings(bridge_subnet="100.127.0.1/16"), "bridge_subnet"),
        (network_settings(bridge_subnet="100.127.0.0/30"), "8 to 29"),
        (network_settings(egress_deny=("x",)), "'x'"),
        (network_settings(name_servers=("::1",)), "name_servers"),
    ],
)
def test_settings_that_make_no_sense(tmp_path: Path, settings: NetworkSettings, text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        Networks(settings, NAME, tmp_path)


def test_a_subnet_in_use_is_refused_at_the_start(up: Uplink, tmp_path: Path) -> None:
    async def scenario(networks: Networks) -> None:
        raise AssertionError("it started")

    settings = network_settings(bridge_subnet="198.51.100.0/25")
    with pytest.raises(FailedPrecondition, match=r"bridge_subnet 198.51.100.0/25 overlaps .* 198.51.100.0/24 by eth0"):
        play(up, tmp_path, scenario, settings)
