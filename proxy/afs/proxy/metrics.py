"""``/metrics``: counters and a histogram that are kept as things happen, and gauges that are read when asked for."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from typing_extensions import override

from afs.proxy.dispatch import Dispatcher

_OUTCOMES = ("completed", "replayed", "cancelled", "rejected", "failed")
_BUCKETS = (0.001, 0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 300, 1800)


class Metrics(Collector):
    """Of one proxy, in a registry of its own."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._registry = CollectorRegistry()
        self._wait = Histogram(
            "afs_proxy_queue_wait_seconds",
            "From the request to the node that accepted it.",
            buckets=_BUCKETS,
            registry=self._registry,
        )
        runs = Counter("afs_proxy_runs", "Calls of Execute by how they ended.", ["outcome"], registry=self._registry)
        self._runs = {outcome: runs.labels(outcome) for outcome in _OUTCOMES}
        self._registry.register(self)

    def observe_wait(self, seconds: float) -> None:
        """A run was accepted after *seconds*."""
        self._wait.observe(seconds)

    def count(self, outcome: str) -> None:
        """A call ended."""
        self._runs[outcome].inc()

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    @override
    def collect(self) -> Iterator[GaugeMetricFamily]:
        dispatcher, nodes = self._dispatcher, self._dispatcher.nodes.nodes
        yield GaugeMetricFamily("afs_proxy_queued", "Runs that wait.", dispatcher.queued)
        yield GaugeMetricFamily("afs_proxy_running", "Runs that were dispatched.", dispatcher.running)
        yield GaugeMetricFamily(
            "afs_proxy_oldest_wait_seconds", "How long the first has waited.", dispatcher.oldest_wait()
        )
        family = GaugeMetricFamily("afs_proxy_nodes", "Nodes by state.", labels=["state"])
        for state in ("ready", "draining", "avoided", "unreachable"):
            count = sum(dispatcher.nodes.state(node) == state for node in nodes)
            family.add_metric([state], count)
        yield family
