"""The connections of one client.

gRPC itself sets no limit on the calls of one connection, but load balancers do, commonly 100 streams, and hold further
calls back in silence. So a connection takes a limited number of runs, and when all are full there is one more.

State: touched from the event loop only, nothing is held across an await.
"""

from typing import TYPE_CHECKING

from afs.core.errors import FailedPrecondition
from afs.core.rpc import channel
from afs.proto.v1.afslet_pb2_grpc import AfsletStub
from afs.proto.v1.proxy_pb2_grpc import AfsProxyStub
from afs.proto.v1.runs_pb2_grpc import RunsStub

if TYPE_CHECKING:
    import grpc.aio

    from afs.proto.v1.afslet_pb2_grpc import AfsletAsyncStub

RUNS_PER_CONNECTION = 90  # leaves some of 100 streams to calls that are no runs


class Connection:
    """One connection and its stubs; *runs* are the calls under way on it."""

    def __init__(self, address: str, *, shared: bool) -> None:
        self.channel: grpc.aio.Channel = channel(address, shared=shared)
        self.afslet: AfsletAsyncStub = AfsletStub(self.channel)
        self.proxy = AfsProxyStub(self.channel)
        self.lists = RunsStub(self.channel)
        self.runs = 0


class Connections:
    """All connections to *address*, each made when it is needed first. After :meth:`close` FailedPrecondition."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._open: list[Connection] = []
        self._closed = False

    def first(self) -> Connection:
        """A connection for what is no run."""
        self._check()
        if not self._open:
            self._open.append(Connection(self._address, shared=True))
        return self._open[0]

    def take(self) -> Connection:
        """A connection for one more run; :meth:`give_back` has to follow."""
        self._check()
        for connection in self._open:
            if connection.runs < RUNS_PER_CONNECTION:
                connection.runs += 1
                return connection
        connection = Connection(self._address, shared=not self._open)
        connection.runs = 1
        self._open.append(connection)
        return connection

    def give_back(self, connection: Connection) -> None:
        """The run is over."""
        connection.runs -= 1

    def __len__(self) -> int:
        return len(self._open)

    def _check(self) -> None:
        if self._closed:
            raise FailedPrecondition("the client is closed")

    async def close(self) -> None:
        """Close all of them; runs on them are cancelled."""
        self._closed = True
        for connection in self._open:
            await connection.channel.close()
