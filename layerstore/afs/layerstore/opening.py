"""Opening several layers for the snapshotter, which gets all of them or none."""

import contextlib
from collections.abc import Awaitable, Callable, Sequence

from afs.core.together import together
from afs.layerstore.layers import Layers, OpenLayer
from afs.layerstore.leases import Leases

Open = Callable[[], Awaitable[OpenLayer]]


async def open_all(layers: Layers, leases: Leases, opens: Sequence[Open], number: int) -> list[OpenLayer]:
    """What *opens* give, handed over to OpenImage or OpenLayers call *number*; raises what the first that fails raises.

    Each layer is held as soon as it is here, until the last is, which may take minutes; then until the snapshotter
    reports the mounts. Not before: a damaged one that cannot be repaired has to go and come anew.
    """
    opened: list[str] = [""] * len(opens)
    left = iter(enumerate(opens))
    with contextlib.ExitStack() as pins:

        async def open_one() -> None:
            place, open_layer = next(left)
            diff_id = opened[place] = (await open_layer()).diff_id
            pins.enter_context(leases.pinned([diff_id]))

        if opens:
            await together(open_one, len(opens))
        found = [layers.look_up(diff_id) for diff_id in opened]
        leases.hand_over(number, opened)
    return found
