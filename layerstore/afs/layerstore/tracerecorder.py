"""What readers demand after an image was opened, in order: the raw material of start traces.

A chunk that a reader demands belongs to a layer, and a layer to any number of images: nobody knows for which of them it was
read. So it is recorded for every image under recording that has the layer. A trace may thereby get chunks of another
image that started at the same time on a common base; they cost a later node some bytes, while a chunk that is missing
costs every later container a wait.

State (one event loop, no await): ``_running`` has the recordings by manifest digest, ``_by_layer`` the same by diff_id,
for there is a demand for every chunk and hundreds of images may run.
"""

from collections.abc import Collection

from afs.layerstore.traces import MAX_CHUNKS, Chunk

MAX_RECORDINGS = 256
_Order = dict[Chunk, None]


class Recorder:
    """At most *most* recordings at a time."""

    def __init__(self, most: int = MAX_RECORDINGS) -> None:
        self._most = most
        self._running: dict[str, tuple[_Order, Collection[str]]] = {}
        self._by_layer: dict[str, dict[str, _Order]] = {}
        self.demanded_chunks = 0

    def __len__(self) -> int:
        """How many recordings there are."""
        return len(self._running)

    def begin(self, image: str, diff_ids: Collection[str]) -> bool:
        """Record for *image*, a manifest digest, with layers *diff_ids*; False if there are too many recordings."""
        if len(self._running) >= self._most:
            return False
        order: _Order = {}
        self._running[image] = order, diff_ids
        for diff_id in diff_ids:
            self._by_layer.setdefault(diff_id, {})[image] = order
        return True

    def demanded(self, diff_id: str, index: int) -> None:
        """A reader waits for a chunk that is not here."""
        orders = self._by_layer.get(diff_id)
        if orders is None:
            return
        self.demanded_chunks += 1
        chunk = Chunk(diff_id, index)
        for order in orders.values():
            if len(order) < MAX_CHUNKS:
                order.setdefault(chunk)

    def end(self, image: str) -> tuple[Chunk, ...]:
        """Stop recording for *image*; what was demanded, each chunk once."""
        order, diff_ids = self._running.pop(image)
        for diff_id in diff_ids:
            del self._by_layer[diff_id][image]
            if not self._by_layer[diff_id]:
                del self._by_layer[diff_id]
        return tuple(order)
