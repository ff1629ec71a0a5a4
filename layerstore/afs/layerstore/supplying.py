"""Layers by chain id: found without asking a registry as long as possible, made mountable, pulled with their image if need be.

A chain id says nothing of where a layer comes from. Whether some node has it can be asked of discovery once its diff_id is known;
that tells an image which has the chain id among its own, one known here, at another node, or at a registry that a name leads
to. Only what chain ids prove is believed: a tag that has moved, a name that somebody made up or a node that is wrong leads to
an image without the chain id, and is passed over. What an image proves is its layers' diff_ids, not that its blobs give them.

Which image is a layer pulled from? The author of any image can claim a layer, and name any registry in an annotation. A blob that is
wrong or does not come costs a try, never the layer: its digest is checked, and the next candidate is tried. What has to be kept apart
is who delays others, so experience comes first (:class:`_Experience`): a repository that gave the layer before, then what nothing is
known of, then those that failed it, the oldest failure first. A registry that says nothing fails, too, when its caller gives up. So
each delays the pulls of a layer once, not every time. Among those that nothing is known of, a known image comes before
the names only if it is of a repository that the caller named.

State (one event loop): ``_experience`` has hints; a wrong one costs one try. ``_begun`` has what goes on in the background, one
task for each image that is being pulled and each layer whose image is being looked for; whoever wants the same meanwhile joins. It
outlives the calls that began it. A layer is opened by
:class:`~afs.layerstore.layers.Layers`, single flight by its origin, so a call and the task of its image wait for one pull.
"""

import asyncio
import enum
import itertools
import logging
from collections.abc import Awaitable, Callable, Hashable, Iterable
from typing import NamedTuple, TypeVar

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
_MOST_REMEMBERED = 4096  # layers that came from somewhere, and as many failures, some 300 bytes each
_Source = TypeVar("_Source", NamedImage, Name, NamedImage | Name)


class Missing(enum.Enum):
    """What happens if no node has a layer; see SupplyLayerRequest."""

    FAIL = pb.SupplyLayerRequest.FAIL
    PULL = pb.SupplyLayerRequest.PULL
    BEGIN = pb.SupplyLayerRequest.BEGIN


class Supplied(NamedTuple):
    """An open layer, and the image that it was found in, if one was needed."""

    layer: OpenLayer
    image: NamedImage | None


class _Experience:
    """Which repositories gave a layer, and which did not; kept when the layer is evicted, for that is when it is wanted."""

    def __init__(self) -> None:
        self._proved: dict[str, str] = {}  # the repository that gave the layer last, by chain id
        self._failed: dict[tuple[str, str], int] = {}  # when, by chain id and repository
        self._clock = itertools.count(2)

    def proved(self, chain_id: str) -> str | None:
        """The repository that gave the layer."""
        return self._proved.get(chain_id)

    def worked(self, chain_id: str, location: str) -> None:
        """The layer came from there."""
        self._failed.pop((chain_id, location), None)
        self._proved.pop(chain_id, None)
        self._proved[chain_id] = location
        if len(self._proved) > _MOST_REMEMBERED:
            del self._proved[next(iter(self._proved))]

    def failed(self, chain_id: str, location: str) -> None:
        """The layer, or an image that has it, did not come from there."""
        if self._proved.get(chain_id) == location:
            del self._proved[chain_id]
        self._failed.pop((chain_id, location), None)
        self._failed[chain_id, location] = next(self._clock)
        if len(self._failed) > _MOST_REMEMBERED:
            del self._failed[next(iter(self._failed))]

    def best_first(self, chain_id: str, sources: Iterable[_Source]) -> list[_Source]:
        """See the module; equal ones stay in their order."""

        def rank(source: _Source) -> int:
            location = source[0].location
            return 0 if self._proved.get(chain_id) == location else self._failed.get((chain_id, location), 1)

        return sorted(sources, key=rank)


class Supplying:
    """See the module."""

    def __init__(self, images: Images, layers: Layers, peers: Peers, announcer: Announcer) -> None:
        self._images = images
        self._layers = layers
        self._peers = peers
        self._announcer = announcer
        self._experience = _Experience()
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
        image = self._find(wanted)
        if image is None and not wanted.diff_id:
            image = await self._ask_peers(wanted.chain_id)
            if image is None and missing is not Missing.PULL:
                if missing is Missing.BEGIN and wanted.names:
                    self._begin(wanted, lambda: self._pull(wanted, None))
                raise _unknown(wanted)
            image = image or await self._ask_registries(wanted)
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

    def _find(self, wanted: WantedLayer) -> NamedImage | None:
        """An image known here that has the layer, best one of a repository that gave it."""
        if (proved := self._experience.proved(wanted.chain_id)) is not None:
            image = self._images.find(wanted.chain_id, [proved])
            if image is not None and image.ref.location == proved:
                return image
        return self._images.find(wanted.chain_id, wanted.locations)

    async def _ask_registries(self, wanted: WantedLayer) -> NamedImage:
        """An image that has the layer and that a name leads to; NotFound if there is none."""
        for name in self._experience.best_first(wanted.chain_id, wanted.names):
            if (image := await self._resolve(name, wanted.chain_id)) is not None:
                return image
        raise _unknown(wanted)

    async def _resolve(self, name: Name, chain_id: str) -> NamedImage | None:
        """The image that a name leads to, if it has the layer.

        A client that has just read the manifest may know better than a node that believes a tag for minutes.
        """
        try:
            image = await self._images.resolve(*name)
            if chain_id not in chains_of(image) and name[0].tag:
                image = await self._images.resolve(*name, again=True)
        except BaseException as error:  # that nobody waits any more, too
            self._experience.failed(chain_id, name[0].location)
            if not isinstance(error, AfsError):
                raise
            log.warning("looking for chain id %s: %s", chain_id, error.line)
            return None
        if chain_id in chains_of(image):
            return NamedImage(*name, image)
        log.info("image %s has no layer of chain id %s", name[0], chain_id)
        return None

    async def _ask_peers(self, chain_id: str) -> NamedImage | None:
        """An image that another node knows and that has the layer; it is known here from now on."""
        number, me = chain_number(chain_id), self._announcer.me.node_id
        holders = (await self._announcer.locate(chains=[number])).chains.get(number, [])
        # A hundred nodes that want the same layer at the same time do not all ask the same one.
        for peer in ranked(f"{chain_id} for {me}", holders)[:_PEERS]:
            try:
                image = await self._peers.find_image(peer, chain_id)
            except NotFound:  # another one with the same first bytes, or forgotten since
                log.info("layerstore %s knows no image with chain id %s", peer.endpoint, chain_id)
            except AfsError as error:
                log.warning("layerstore %s cannot tell about chain id %s: %s", peer.endpoint, chain_id, error.line)
            else:
                await self._images.learn(image)  # it has the next layers, too
                return image
        return None

    # Pulling

    async def _pull(self, wanted: WantedLayer, image: NamedImage | None) -> Supplied:
        """The layer, pulled by its owner from *image* or another one that has the chain id.

        Any image can claim it with whatever blob, so one that fails is not the end. See the module for their order.
        """
        image = image or await self._ask_peers(wanted.chain_id) or await self._ask_registries(wanted)
        strange = bool(wanted.names) and image.ref.location not in wanted.locations
        candidates: list[NamedImage | Name] = [*wanted.names, image] if strange else [image, *wanted.names]
        tried, failure = set(), None
        for candidate in self._experience.best_first(wanted.chain_id, candidates):
            source = candidate if isinstance(candidate, NamedImage) else await self._resolve(candidate, wanted.chain_id)
            if source is None or _pulled_as(source) in tried:
                continue
            tried.add(_pulled_as(source))
            origin = _origin(source, wanted)
            self._begin_image(source)
            try:
                return Supplied(await self._open(origin, wanted.chain_id), source)
            except ResourceExhausted:  # it would be so of any other
                raise
            except AfsError as error:
                log.warning("layer %s cannot be pulled from %s: %s", origin.layer.diff_id, source.ref, error.line)
                failure = failure or error
        raise failure or _unknown(wanted)

    async def _open(self, origin: Origin, chain_id: str) -> OpenLayer:
        """The layer, which nobody has, and experience with its source."""
        try:
            layer = await self._layers.open(origin, local=False)
        except ResourceExhausted:  # which is nothing of the source
            raise
        except BaseException:  # CancelledError, too: of a source that says nothing for longer than anybody waits
            self._experience.failed(chain_id, origin.ref.location)
            raise
        self._experience.worked(chain_id, origin.ref.location)
        return layer

    def _begin_image(self, image: NamedImage) -> None:
        """Have owners pull all layers of an image of which one is wanted: the others are wanted next."""
        self._begin(_pulled_as(image), lambda: self._pull_all(image))

    async def _pull_all(self, image: NamedImage) -> None:
        # All at once, as for OpenImage: each owner pulls as many at a time as it is told to.
        layers = zip(image.image.layers, chains_of(image.image), strict=True)
        await asyncio.gather(*(self._pull_one(image, layer, chain_id) for layer, chain_id in layers))

    async def _pull_one(self, image: NamedImage, layer: Layer, chain_id: str) -> None:
        origin = Origin(image.ref, image.platform, layer)
        try:
            try:
                await self._layers.open_held(layer.diff_id, origin)  # which says nothing of the source
            except LayerNotHeld:
                await self._open(origin, chain_id)
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


def _unknown(wanted: WantedLayer) -> NotFound:
    return NotFound(f"no image is known that has a layer of chain id {wanted.chain_id}")


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
