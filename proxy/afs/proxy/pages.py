"""What the proxy serves over HTTP: ``/status``, ``/metrics``, ``/healthz``."""

import contextlib
from collections.abc import AsyncIterator

from afs.core.rpc import check_address
from afs.proxy.httpd import Answer, json_answer, serving_http
from afs.proxy.metrics import Metrics
from afs.proxy.status import ProxyService

_METRICS = "text/plain; version=0.0.4; charset=utf-8"
Query = dict[str, list[str]]


@contextlib.asynccontextmanager
async def pages(address: str, service: ProxyService, metrics: Metrics, *, insecure: bool) -> AsyncIterator[str]:
    """Serve them on *address*, HOST:PORT, while the block runs; the bound address. Nowhere if it is empty."""
    if not address:
        yield ""
        return
    check_address(address, insecure)

    async def status(query: Query) -> Answer:
        return json_answer(await service.document(local=query.get("local") == ["1"]))

    async def metric(query: Query) -> Answer:
        return Answer(metrics.text(), _METRICS)

    async def healthz(query: Query) -> Answer:
        return Answer(b"ok\n")

    async with serving_http(address, {"/status": status, "/metrics": metric, "/healthz": healthz}) as bound:
        yield bound
