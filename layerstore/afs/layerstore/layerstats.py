"""What became of a layer's reads, counted since the layerstore started."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class LayerStats:
    """Sizes in bytes."""

    from_peers: Counter[str] = field(default_factory=Counter)  # bytes by endpoint
    from_source: int = 0  # bytes of the blob, as it came
    demanded: int = 0  # chunks that a reader wanted and that were not here
    prefetched: int = 0  # chunks that came before anybody wanted them
    hedges: int = 0  # second requests, because the first one was slow
    failovers: int = 0  # chunks asked of another node after an error
    bad_chunks: int = 0  # chunks that came with the wrong bytes
