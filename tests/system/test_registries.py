"""Images from Debian's docker-registry, resolved and converted: passwords, TLS, client certificates, mirrors."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from afs.core.images import Platform, parse_image
from afs.layerstore.errors import RegistryDenied, RegistryUnreachable
from afs.layerstore.manifests import Image, resolve
from afs.layerstore.pull import Puller
from afs.layerstore.registryoptions import RegistryOptions
from afs.layerstore.store import LayerStore
from tests.testbed import capabilities
from tests.testbed.certificates import Certificates, make_certificates
from tests.testbed.layernodes import endless_room
from tests.testbed.registry import PASSWORD, USER, Registry

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.testbed.images import BusyboxImage

AMD64 = Platform("linux", "amd64")


@asynccontextmanager
async def puller(tmp_path: Path, **options: Any) -> AsyncIterator[Puller]:
    """A store and the processes that pull into it."""
    (tmp_path / "store").mkdir(exist_ok=True)
    store = LayerStore(tmp_path / "store")
    given = RegistryOptions(**{"hosts_dir": tmp_path / "certs.d", "backoff": 0.0, **options})
    made = Puller(store, endless_room(store), given, 2)
    await made.start()
    try:
        yield made
    finally:
        await made.close()
        store.close()


def resolved(made: Puller, name: str) -> Image:
    """What *name* consists of."""
    ref = parse_image(name)
    source = made.source(ref)
    return resolve(str(ref), ref.tag, AMD64, source.get_manifest, source.get_blob, 0)


async def pulled(made: Puller, name: str, image: BusyboxImage) -> None:
    """Resolve *name* and convert its layers; they are those of *image*."""
    found = resolved(made, name)
    assert [layer.diff_id for layer in found.layers] == [layer.diff_id for layer in image.layers]
    for layer in found.layers:
        assert (await made.pull(parse_image(name), layer)).diff_id == layer.diff_id


def write_hosts(tmp_path: Path, name: str, text: str) -> None:
    """A registry's hosts.toml."""
    directory = tmp_path / "certs.d" / name
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "hosts.toml").write_text(text)


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    """Of an authority of the test's own."""
    capabilities.require("docker-registry")
    (tmp_path / "certificates").mkdir()
    return make_certificates(tmp_path / "certificates")


async def test_with_a_password(busybox_image: BusyboxImage, tmp_path: Path) -> None:
    capabilities.require("docker-registry")
    config = tmp_path / "config.json"
    with Registry(auth=True) as registry:
        name = registry.push(busybox_image.layout, "latest", "busybox")
        async with puller(tmp_path, docker_config=config) as made:
            with pytest.raises(
                RegistryDenied, match=f"registry denies access to {name}: UNAUTHORIZED authentication requ"
            ):
                await pulled(made, name, busybox_image)
            config.write_text(json.dumps({"auths": {registry.address: {"username": USER, "password": PASSWORD}}}))
            registry.forget()
            await pulled(made, name, busybox_image)
            # The processes that pull layers are told what was granted: only the very first request is refused.
            assert [request.status for request in registry.requests()].count(401) == 1


async def test_with_a_private_authority(
    busybox_image: BusyboxImage, tmp_path: Path, certificates: Certificates
) -> None:
    with Registry(certificate=certificates.server) as registry:
        name = registry.push(busybox_image.layout, "latest", "busybox")
        base = f'server = "https://{registry.address}"'
        write_hosts(tmp_path, registry.address, base)
        async with puller(tmp_path) as made:
            with pytest.raises(RegistryUnreachable, match="certificate is not trusted"):
                await pulled(made, name, busybox_image)
            write_hosts(tmp_path, registry.address, f'{base}\nca = "{certificates.authority}"')
            await pulled(made, name, busybox_image)


async def test_insecure_with_and_without_tls(
    busybox_image: BusyboxImage, tmp_path: Path, certificates: Certificates
) -> None:
    with Registry(certificate=certificates.server) as secure, Registry() as plain:
        async with puller(tmp_path, insecure=(secure.address, plain.address)) as made:
            await pulled(made, secure.push(busybox_image.layout, "latest", "busybox"), busybox_image)
            await pulled(made, plain.push(busybox_image.layout, "latest", "busybox"), busybox_image)


async def test_with_a_client_s_certificate(
    busybox_image: BusyboxImage, tmp_path: Path, certificates: Certificates
) -> None:
    with Registry() as registry:  # where there is something to pull: pushing to the other one needs a certificate
        registry.push(busybox_image.layout, "latest", "busybox")
        with Registry(
            certificate=certificates.server,
            client_authority=certificates.authority,
            mirror_of=f"http://{registry.address}",
        ) as strict:
            base = f'server = "https://{strict.address}"\nca = "../../certificates/ca.crt"\n'
            write_hosts(tmp_path, strict.address, base)
            name = f"{strict.address}/busybox:latest"
            async with puller(tmp_path) as made:
                with pytest.raises(
                    RegistryUnreachable, match=f"registry {strict.address} is unreachable: image {name}: "
                ):
                    await pulled(made, name, busybox_image)
                certificate, key = (f"../../certificates/{path.name}" for path in certificates.client)
                write_hosts(tmp_path, strict.address, f'{base}client = [["{certificate}", "{key}"]]')
                await pulled(made, name, busybox_image)


async def test_a_mirror_spares_the_registry(busybox_image: BusyboxImage, tmp_path: Path) -> None:
    capabilities.require("docker-registry")
    with Registry() as registry:
        name = registry.push(busybox_image.layout, "latest", "busybox")
        async with puller(tmp_path) as made:
            with Registry(mirror_of=f"http://{registry.address}") as mirror:
                write_hosts(tmp_path, registry.address, f'[host."http://{mirror.address}"]')
                registry.forget()
                await pulled(made, name, busybox_image)
                assert {request.user_agent for request in registry.requests()} == {"Go-http-client/1.1"}  # the mirror's
                assert all(f"ns={registry.address.replace(':', '%3A')}" in one.path for one in mirror.requests())
            registry.forget()
            resolved(made, name)  # the mirror is gone
            assert {request.user_agent for request in registry.requests()} == {"afs"}
