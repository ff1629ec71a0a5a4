"""Layers by chain id: found without asking a registry as long as possible, made mountable, pulled with their image if need be.

A chain id says nothing of where a layer comes from. Whether some node has it can be asked of discovery once its diff_id is known;
that tells an image which has the chain id among its own, one known here, at another node, or at a registry that a name leads
to. Only what chain ids prove is believed: a tag that has moved, a name that somebody made up or a node that is wrong leads to
an image without the chain id, and is passed over. What an image proves is its layers' diff_ids, not that its blobs give them.

State (one event loop): ``_begun`` has what goes on in the background, one task for each image that is being pulled and each layer whose
image is being looked for; whoever wants the same meanwhile joins. It outlives the calls that began it. A layer is opened by
:class:`~afs.layerstore.layers.Layers`, single flight by its origin, so a call and the task of its image wait for one pull.
"""

import asyncio
import enum
import logging
from collections.abc import Awaitable, Callable, Hashable
from typing import NamedTuple

from afs.core.errors import AfsError, NotFound, ResourceExhausted
from afs.discovery.client import Announcer
from afs.layerstore.chains import chain_number, chains_of
from afs.layerstore.errors import LayerNotHeld
from afs.layerstore.images import Images
from afs.layerstore.layers import Layers, OpenLayer
from afs.layerstore.manifests import Layer, NamedImage
from afs.layerstore.origins import Origin
from afs.layerstore.peers import Peers
from afs.layerstore.placement import ranked
from afs.layerstore.wantedlayers import Name, WantedLayer
from afs.proto.v1 import layerstore_pb2 as pb

log = logging.getLogger(__name__)
_PEERS = 3  # that are asked for an image, one after another


class Missing(enum.Enum):
    """What happens if no node has a layer; see SupplyLayerRequest."""

    FAIL = pb.SupplyLayerRequest.FAIL
    PULL = pb.SupplyLayerRequest.PULL
    BEGIN = pb.SupplyLayerRequest.BEGIN


class Supplied(NamedTuple):
    """An open layer, and the image that it was found in, if one was needed."""

    layer: OpenLayer
    image: NamedImage | None


class Supplying:
    """See the module."""

    def __init__(self, images: Images, layers: Layers, peers: Peers, announcer: Announcer) -> None:
        self._images = images
        self._layers = layers
        self._peers = peers
        self._announcer = announcer
        self._begun: dict[Hashable, asyncio.Task[None]] = {}

    async def close(self) -> None:
        """End what is under way."""
        tasks = list(self._begun.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def supply(self, wanted: WantedLayer, missing: Missing) -> Supplied:
        """The layer, mountable here; NotFound if it cannot be had as *missing* says.

        Nothing holds it on return: the caller pins or leases it before the next await.
        """
        image = self._images.find(wanted.chain_id, wanted.locations)
        if image is None and not wanted.diff_id:
            image = await self._search(wanted)
        origin = _origin(image, wanted) if image is not None else None
        diff_id = origin.layer.diff_id if origin is not None else wanted.diff_id
        try:
            found = Supplied(await self._layers.open_held(diff_id, origin), image)
        except LayerNotHeld:
            if missing is Missing.FAIL:
                raise
            if missing is Missing.BEGIN:
                self._begin(wanted, lambda: self._pull(wanted, image))
                raise
            found = await self._pull(wanted, image)
        self._layers.look_up(found.layer.diff_id)  # used now: a container is about to want it
        return found

    # Finding

    async def _search(self, wanted: WantedLayer) -> NamedImage:
        """An image that has the layer, of another node or of a name; NotFound if there is none."""
        image = await self._ask_peers(wanted.chain_id)
        if image is not None:
            await self._images.learn(image)  # it has the next layers, too
            return image
        for name in wanted.names:
            if (image := await self._resolve(name, wanted.chain_id)) is not None:
                return image
        raise NotFound(f"no image is known that has a layer of chain id {wanted.chain_id}")

    async def _resolve(self, name: Name, chain_id: str) -> NamedImage | None:
        """The image that a name leads to, if it has the layer.

        A client that has just read the manifest may know better than a node that believes a tag for minutes.
        """
        try:
            image = await self._images.resolve(*name)
            if chain_id not in chains_of(image) and name[0].tag:
                image = await self._images.resolve(*name, again=True)
        except AfsError as error:
            log.warning("looking for chain id %s: %s", chain_id, error.line)
            return None
        if chain_id in chains_of(image):
            return NamedImage(*name, image)
        log.info("image %s has no layer of chain id %s", name[0], chain_id)
        return None

    async def _ask_peers(self, chain_id: str) -> NamedImage | None:
        number, me = chain_number(chain_id), self._announcer.me.node_id
        holders = (await self._announcer.locate(chains=[number])).chains.get(number, [])
        # A hundred nodes that want the same layer at the same time do not all ask the same one.
        for peer in ranked(f"{chain_id} for {me}", holders)[:_PEERS]:
            try:
                return await self._peers.find_image(peer, chain_id)
            except NotFound:  # another one with the same first bytes, or forgotten since
                log.info("layerstore %s knows no image with chain id %s", peer.endpoint, chain_id)
            except AfsError as error:
                log.warning("layerstore %s cannot tell about chain id %s: %s", peer.endpoint, chain_id, error.line)
        return None

    # Pulling

    async def _pull(self, wanted: WantedLayer, image: NamedImage | None) -> Supplied:
        """The layer, pulled by its owner from *image* or another one that has the chain id.

        Any image can claim it with whatever blob: what the caller named comes first, and one that fails is not the end.
        """
        image = image or await self._search(wanted)
        strange = bool(wanted.names) and image.ref.location not in wanted.locations
        candidates: list[NamedImage | Name] = [*wanted.names, image] if strange else [image, *wanted.names]
        tried, failure = set(), None
        for candidate in candidates:
            source = candidate if isinstance(candidate, NamedImage) else await self._resolve(candidate, wanted.chain_id)
            if source is None or _pulled_as(source) in tried:
                continue
            tried.add(_pulled_as(source))
            origin = _origin(source, wanted)
            self._begin_image(source)
            try:
                return Supplied(await self._layers.open(origin, local=False), source)
            except ResourceExhausted:  # it would be so of any other
                raise
            except AfsError as error:
                log.warning("layer %s cannot be pulled from %s: %s", origin.layer.diff_id, source.ref, error.line)
                failure = failure or error
        raise failure or NotFound(f"no image is known that has a layer of chain id {wanted.chain_id}")

    def _begin_image(self, image: NamedImage) -> None:
        """Have owners pull all layers of an image of which one is wanted: the others are wanted next."""
        self._begin(_pulled_as(image), lambda: self._pull_all(image))

    async def _pull_all(self, image: NamedImage) -> None:
        # All at once, as for OpenImage: each owner pulls as many at a time as it is told to.
        await asyncio.gather(*(self._pull_one(image, layer) for layer in image.image.layers))

    async def _pull_one(self, image: NamedImage, layer: Layer) -> None:
        try:
            await self._layers.open(Origin(image.ref, image.platform, layer), local=False)
        except (AfsError, OSError) as error:
            log.warning("image %s: layer %s is not pulled: %s", image.ref, layer.diff_id, error)

    def _begin(self, key: Hashable, work: Callable[[], Awaitable[object]]) -> None:
        """Start *work* in the background, unless it is under way."""
        if key in self._begun:
            return

        async def run() -> None:
            try:
                await work()
            except (AfsError, OSError) as error:
                log.warning("supplying layers: %s", error)
            except Exception:  # a mistake of ours
                log.exception("supplying layers")

        task = self._begun[key] = asyncio.create_task(run(), name=f"supply {key}")
        task.add_done_callback(lambda _: self._begun.pop(key))


def _pulled_as(image: NamedImage) -> tuple[str, str]:
    """Images with the same are pulled alike, whatever their names."""
    return image.image.manifest_digest, image.ref.location


def _origin(named: NamedImage, wanted: WantedLayer) -> Origin:
    """The wanted layer in an image that has its chain id; NotFound if the image has it in another place."""
    chains = chains_of(named.image)
    index = chains.index(wanted.chain_id)
    below = chains[index - 1] if index else ""
    if below != wanted.parent_chain_id:
        raise NotFound(
            f"in image {named.ref} the layer of chain id {wanted.chain_id} lies on {below or 'nothing'}, "
            f"not on {wanted.parent_chain_id or 'nothing'}"
        )
    return Origin(named.ref, named.platform, named.image.layers[index])
