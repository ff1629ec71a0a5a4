"""From an image's name to its manifest, config and diff_ids, asking the registry as seldom as can be.

State: ``_known`` maps image keys to what was resolved, the least recently used first, mirrored on disk by the store; ``_chains`` (:mod:`afs.layerstore.chains`)
has the same images and changes with it, without an await between. Single flight by key and whether the source has to be asked
again: one that has to waits for one that need not, and is joined by those that come later. So the awaits of one resolution
never interleave with another one of the same image.
"""

import asyncio
import contextlib
import functools
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from afs.core.digests import sha256_digest
from afs.core.errors import (
    AfsError,
    DataLoss,
    DeadlineExceeded,
    Internal,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from afs.core.images import ImageRef, Platform
from afs.core.singleflight import SingleFlight
from afs.discovery.client import Announcer
from afs.layerstore.chains import ChainIndex
from afs.layerstore.errors import ImageNotFound
from afs.layerstore.manifests import Image, NamedImage, image_key, resolve
from afs.layerstore.peers import Peers
from afs.layerstore.placement import ranked
from afs.layerstore.pull import Puller
from afs.layerstore.registrystop import Stop
from afs.layerstore.source import Source
from afs.layerstore.store import LayerStore

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Sequence

log = logging.getLogger(__name__)
_SOURCE_TIMEOUT_S = 60.0
_THREADS = 16
_MOST_KNOWN = 2000  # images of 5 to 20 KB each, mostly their configs, in memory and on disk
_MOST_OF_ONE = 4  # threads that ask one registry: one that is silent must not take them all


class Images:
    """The node's view of images. *ttl* in seconds: how long a tag is believed before its source is asked again.

    The *most* images that were used last are remembered.
    """

    def __init__(
        self,
        store: LayerStore,
        puller: Puller,
        peers: Peers,
        announcer: Announcer,
        ttl: float,
        most: int = _MOST_KNOWN,
    ) -> None:
        self._store = store
        self._puller = puller
        self._peers = peers
        self._announcer = announcer
        self._ttl = ttl
        self._most = most
        self._known: dict[str, Image] = {}
        self._chains = ChainIndex(announcer)
        # Called with a manifest digest when no image here has it any more.
        self.on_gone: Callable[[str], None] = lambda _manifest_digest: None
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="resolve")
        self._turns: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()  # by registry
        # Local sources: what the file looked like when it was read; a changed file is read again at once.
        self._fingerprints: dict[str, tuple[int, ...]] = {}
        self._resolving: SingleFlight[tuple[str, bool], Image] = SingleFlight()
        for named in sorted(store.load_images(), key=lambda named: named.image.resolved_unix):
            self._known[named.image.key] = named.image
            self._chains.add(named)
            announcer.know_image(named.image.key)
        self._forget_some()

    async def close(self) -> None:
        """End what is under way."""
        await self._resolving.close(cancel=True)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def resolve(self, ref: ImageRef, platform: Platform, *, here: bool = False, again: bool = False) -> Image:
        """What *ref* consists of. *here*: this node asks the source itself, as the owner or because it was told to.

        *again*: what is known of a tag, here or at other nodes, is not believed, however young it is.
        """
        key = image_key(str(ref), platform)
        image = self._known.get(key)
        again = again and bool(ref.tag)
        if image is not None and self._fresh(ref, image) and not again:
            self._known[key] = self._known.pop(key)  # now the one used last
            return image
        work = functools.partial(self._resolve, ref, platform, here=here)
        if again or (key, True) in self._resolving:
            return await self._resolving.run((key, True), lambda: self._resolve_again(key, work))
        return await self._resolving.run((key, False), lambda: work(again=False))

    def known(self, ref: ImageRef, platform: Platform) -> Image:
        """What this node knows, however old; NotFound if nothing."""
        image = self._known.get(image_key(str(ref), platform))
        if image is None:
            raise NotFound(f"image {ref} is not known here")
        return image

    def find(self, chain_id: str, locations: "Collection[str]" = ()) -> NamedImage | None:
        """An image known here with a layer of that chain id, best one from these repositories."""
        return self._used(self._chains.find(chain_id, locations))

    def find_stack(self, diff_ids: "Sequence[str]") -> NamedImage | None:
        """An image known here with exactly these layers."""
        return self._used(self._chains.find_stack(diff_ids))

    def _used(self, named: NamedImage | None) -> NamedImage | None:
        if named is not None:
            self._known[named.image.key] = self._known.pop(named.image.key)
        return named

    async def learn(self, named: NamedImage) -> None:
        """Remember an image that another node told of, unless one is known by that name."""
        if named.image.key not in self._known:
            await self._remember(*named)

    def manifests(self) -> dict[str, list[str]]:
        """The diff_ids of every image that is known, by manifest digest."""
        return {image.manifest_digest: [layer.diff_id for layer in image.layers] for image in self._known.values()}

    def _fresh(self, ref: ImageRef, image: Image) -> bool:
        if ref.is_local:
            fingerprint = _fingerprint(ref)
            return bool(fingerprint) and fingerprint == self._fingerprints.get(image.key)
        return bool(ref.digest) or time.time() < image.resolved_unix + self._ttl

    async def _resolve_again(self, key: str, work: "Callable[..., Awaitable[Image]]") -> Image:
        if (key, False) in self._resolving:
            # It may remember what was believed before, and must not do so after this one.
            with contextlib.suppress(AfsError, OSError):
                await self._resolving.run((key, False), lambda: work(again=False))
        return await work(again=True)

    async def _resolve(self, ref: ImageRef, platform: Platform, *, here: bool, again: bool) -> Image:
        key = image_key(str(ref), platform)
        old = self._known.get(key)
        if ref.is_local:
            fingerprint = _fingerprint(ref)
            if not fingerprint and not os.path.exists(ref.location):
                found = old or await self._ask_holders(ref, platform)
                if found is None:
                    raise ImageNotFound(str(ref), f"no {ref.location} on node {self._announcer.me.node_id}")
                return await self._remember(ref, platform, found)
            image = await self._remember(ref, platform, await self._ask_source(ref, platform))
            self._fingerprints[key] = fingerprint
            return image
        if old is None and not here and not again:  # holders tell what they believe
            old = await self._ask_holders(ref, platform)
            if old is not None and self._fresh(ref, old):
                return await self._remember(ref, platform, old)
        try:
            image = await (self._ask_source(ref, platform) if here else self._ask_owner(ref, platform, again=again))
        except (Unavailable, DeadlineExceeded) as error:
            if old is None:
                raise
            log.warning("using image %s as of %d s ago: %s", ref, time.time() - old.resolved_unix, error.line)
            return old
        return await self._remember(ref, platform, image)

    async def _ask_holders(self, ref: ImageRef, platform: Platform) -> Image | None:
        key, best = image_key(str(ref), platform), None
        for peer in (await self._announcer.locate(images=[key])).images.get(key, []):
            try:
                image = await self._peers.resolve_image(peer, ref, platform, only_known=True)
            except AfsError as error:
                log.info("layerstore %s cannot tell about %s: %s", peer.endpoint, ref, error.line)
                continue
            if best is None or image.resolved_unix > best.resolved_unix:
                best = image
            if self._fresh(ref, best):
                break
        return best

    async def _ask_owner(self, ref: ImageRef, platform: Platform, *, again: bool) -> Image:
        owner = ranked(image_key(str(ref), platform), self._announcer.peers)[0]
        if owner.node_id == self._announcer.me.node_id:
            return await self._ask_source(ref, platform)
        try:
            return await self._peers.resolve_image(owner, ref, platform, only_known=False, again=again)
        except (Unavailable, DeadlineExceeded, ResourceExhausted, Internal, DataLoss) as error:
            # Its trouble need not be ours. DataLoss: what it says cannot be checked against the digest.
            log.warning("owner %s of image %s: %s; asking the registry from here", owner.node_id, ref, error.line)
            return await self._ask_source(ref, platform)

    async def _ask_source(self, ref: ImageRef, platform: Platform) -> Image:
        stop = Stop(_SOURCE_TIMEOUT_S)
        work = functools.partial(self._read_source, ref, platform, stop)
        most = _THREADS if ref.is_local else _MOST_OF_ONE
        turn = self._turns.setdefault("" if ref.is_local else ref.registry, asyncio.Semaphore(most))
        try:
            async with asyncio.timeout(_SOURCE_TIMEOUT_S), turn:
                # Threads of their own: a registry that trickles must not hold up those that read and check chunks.
                return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except TimeoutError:
            raise Unavailable(f"the source of image {ref} did not answer within {_SOURCE_TIMEOUT_S:.0f} s") from None
        finally:
            stop.set()  # the thread ends now, too

    def _read_source(self, ref: ImageRef, platform: Platform, stop: Stop) -> Image:
        """What the source says now. Blocking; in a thread."""
        source, now = self._puller.source(ref, stop), int(time.time())
        known = self._known.get(image_key(str(ref), platform))
        if known is not None and ref.tag and _is_current(source, ref.tag, known):
            return replace(known, resolved_unix=now)
        return resolve(str(ref), ref.digest or ref.tag, platform, source.get_manifest, source.get_blob, now)

    def _forget_some(self) -> None:
        """Forget the images that were used least recently, as far as there are too many."""
        while len(self._known) > self._most:
            key = next(iter(self._known))
            image = self._known.pop(key)
            self._chains.remove(image)
            self._fingerprints.pop(key, None)
            self._announcer.forget_image(key)
            try:
                self._store.forget_image(key)
            except OSError as error:  # it is back after a restart, and forgotten again
                log.warning("cannot forget image %s on disk: %s", key, error)
            self._replaced(image)

    def _replaced(self, old: Image) -> None:
        if all(image.manifest_digest != old.manifest_digest for image in self._known.values()):
            self.on_gone(old.manifest_digest)

    async def _remember(self, ref: ImageRef, platform: Platform, image: Image) -> Image:
        old = self._known.pop(image.key, None)
        if old is not None:
            self._chains.remove(old)
        self._known[image.key] = image
        self._chains.add(NamedImage(ref, platform, image))
        self._announcer.know_image(image.key)
        self._forget_some()
        if old is not None:
            self._replaced(old)
        if old is None or (old.manifest, old.resolved_unix) != (image.manifest, image.resolved_unix):
            try:
                await asyncio.to_thread(self._store.save_image, str(ref), platform, image)
            except OSError as error:  # the image is known all the same, until a restart
                log.warning("cannot remember image %s on disk: %s", ref, error)
        if old is None or old.manifest_digest != image.manifest_digest:
            await self._announcer.flush()
        return image


def _is_current(source: Source, tag: str, image: Image) -> bool:
    """Whether *tag* still leads to what *image* was resolved from: one cheap request instead of three."""
    return source.current_digest(tag) == (sha256_digest(image.index) if image.index else image.manifest_digest)


def _fingerprint(ref: ImageRef) -> tuple[int, ...]:
    """Identity and change time of a local source; empty if it is not there."""
    path = os.path.join(ref.location, "index.json") if ref.scheme == "oci" else ref.location
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return ()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
