"""A command in a real image, through every service."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from typing import TYPE_CHECKING

import pytest

from afs.client import Accepted, DiffChunk, DiffStart, Done, Finished, Log, Outcome, Progress, Queued

if TYPE_CHECKING:
    from pathlib import Path

    from tests.testbed.cluster import RealCluster
    from tests.testbed.images import BusyboxImage

pytestmark = pytest.mark.root


def members(diff: bytes) -> dict[str, tarfile.TarInfo]:
    """The entries of a diff by name."""
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(diff))) as tar:
        return {member.name: member for member in tar}


async def test_events_come_in_the_order_that_clients_know(
    shared_cluster: RealCluster, busybox_image: BusyboxImage
) -> None:
    async with shared_cluster.client() as client:
        command = ["sh", "-c", "echo out; echo err >&2; echo x > /made; exit 3"]
        events = [event async for event in client.execute(busybox_image.reference, command)]
    kinds = [type(event) for event in events if not isinstance(event, DiffChunk | Progress | Queued)]
    logs = [event for event in events if isinstance(event, Log)]
    assert kinds == [Accepted, *[Log] * len(logs), Finished, DiffStart, Done]
    assert {(log.source, log.data) for log in logs} == {("stdout", b"out\n"), ("stderr", b"err\n")}
    finished = next(event for event in events if isinstance(event, Finished))
    assert (finished.exit_code, finished.outcome, finished.error) == (3, Outcome.EXITED, "")
    assert next(event for event in events if isinstance(event, DiffStart)).name == "writable-upper.tar.gz"
    assert list(members(b"".join(event.data for event in events if isinstance(event, DiffChunk)))) == ["made"]


async def test_logs_come_while_the_command_runs(shared_cluster: RealCluster, busybox_image: BusyboxImage) -> None:
    async with shared_cluster.client() as client:
        events = client.execute(busybox_image.reference, ["sh", "-c", "echo first; sleep 1000"])
        async for event in events:
            if isinstance(event, Log):
                assert event.data == b"first\n"
                break
        await events.aclose()


def test_cli_uploads_runs_and_brings_the_changes_back(
    shared_cluster: RealCluster, busybox_image: BusyboxImage, tmp_path: Path
) -> None:
    upload, out = tmp_path / "upload", tmp_path / "diff.tar.gz"
    (upload / "work" / "sub").mkdir(parents=True)
    (upload / "work" / "in.txt").write_text("from the client\n")
    (upload / "work" / "tool").write_text("#!/bin/sh\necho tool runs\n")
    (upload / "work" / "tool").chmod(0o755)
    (upload / "work" / "link").symlink_to("in.txt")
    script = "cat /work/link; /work/tool; echo out > /work/sub/out.txt; rm /work/in.txt; rm /data/hello.txt"
    done = shared_cluster.cli(
        *("execute", "--image", busybox_image.reference, "--cpu", "1", "--memory-mb", "256", "--timeout", "30s"),
        *("--dir", str(upload), "--out", str(out), "--", "sh", "-c", script),
    )
    assert (done.returncode, done.stdout) == (0, "from the client\ntool runs\n"), done.stderr
    found = members(out.read_bytes())
    assert sorted(found) == ["data", "data/.wh.hello.txt", "work", "work/.wh.in.txt", "work/sub", "work/sub/out.txt"]


def test_upload_follows_the_image_s_symlinks_and_keeps_its_attributes(
    shared_cluster: RealCluster, debian_image: object, tmp_path: Path
) -> None:
    """In Debian /bin is a symlink to usr/bin and /tmp is 1777: an upload must not replace either."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "mine").write_text("#!/bin/sh\necho mine\n")
    (tmp_path / "bin" / "mine").chmod(0o755)
    reference: str = debian_image.reference  # type: ignore[attr-defined]
    with shared_cluster.sync_client() as client:
        result = client.run(reference, ["sh", "-c", "mine; readlink /bin; ls /usr/bin/mine"], upload=tmp_path)
        assert result.stdout == b"mine\nusr/bin\n/usr/bin/mine\n", result.stderr
        (tmp_path / "bin" / "mine").rename(tmp_path / "plain")
        (tmp_path / "bin").rmdir()
        result = client.run(reference, ["stat", "-c", "%a", "/tmp"], upload=tmp_path, upload_to="/tmp/below")
        assert result.stdout == b"1777\n"


async def test_the_image_s_own_settings_apply(shared_cluster: RealCluster, busybox_image: BusyboxImage) -> None:
    name = f"oci:{busybox_image.layout}"
    async with shared_cluster.client() as client:
        default = await client.run(name, tag="latest")
        assert default.stdout == b"default\n"
        user = await client.run(name, ["sh", "-c", "id -u; id -g; id -G; pwd; echo $FOO $HOME"], tag="entry")
        assert user.ok, user
        overridden = await client.run(name, ["sh", "-c", "echo $FOO"], tag="entry", env={"FOO": "request"})
    uid, gid, extra = busybox_image.user
    lines = user.stdout.decode().split("\n")
    assert lines[:2] == [str(uid), str(gid)]
    assert lines[3:5] == ["/home/app", "image /home/app"]
    assert b"request\n" in overridden.stdout
    assert extra or lines[2] == str(gid)


@pytest.mark.parametrize("tag", ["latest", "gzip", "multi", "docker", "docker-multi"])
async def test_encodings_and_manifests(shared_cluster: RealCluster, busybox_image: BusyboxImage, tag: str) -> None:
    async with shared_cluster.client() as client:
        for path, content in busybox_image.present.items():
            result = await client.run(f"oci:{busybox_image.layout}", ["cat", path], tag=tag)
            assert result.stdout == content, (path, result)
        gone = " || ".join(f"test -e {path}" for path in busybox_image.absent)
        result = await client.run(f"oci:{busybox_image.layout}", ["sh", "-c", f"! ( {gone} )"], tag=tag)
        assert result.ok


async def test_image_digest_names_the_image(shared_cluster: RealCluster, busybox_image: BusyboxImage) -> None:
    index = json.loads((busybox_image.layout / "index.json").read_text())
    digest = index["manifests"][0]["digest"]
    async with shared_cluster.client() as client:
        assert (await client.run(f"oci:{busybox_image.layout}@{digest}", ["true"])).ok


async def test_status_of_the_cluster(shared_cluster: RealCluster, busybox_image: BusyboxImage) -> None:
    async with shared_cluster.client() as client:
        await client.run(busybox_image.reference, ["true"])
        responses = await client.status()
    summary = responses[0].summary
    assert (summary.layerstore_instances, summary.afslet_instances, summary.afslet_reachable) == (2, 2, 2)
    assert summary.total_layers >= len(busybox_image.layers)
    assert [r.WhichOneof("payload") for r in responses[1:]] == ["layerstore", "layerstore", "afslet", "afslet"]
    shown = shared_cluster.cli("status")
    assert "2 of 2 afslets answer" in shown.stdout


async def test_reconcile_copies_layers_to_more_nodes(shared_cluster: RealCluster, busybox_image: BusyboxImage) -> None:
    async with shared_cluster.client() as client:
        answer = await client.reconcile(busybox_image.reference, 2)
    assert answer.ensured
    assert answer.current_replica == 2
    assert all({target.node_id for target in layer.instances} == {"node1", "node2"} for layer in answer.layers)
    shown = shared_cluster.cli("reconcile", "--replicas", "3", busybox_image.reference)
    assert shown.returncode == 64
    assert "there are not more" in shown.stderr


async def test_many_runs_at_once(shared_cluster: RealCluster, busybox_image: BusyboxImage) -> None:
    import asyncio

    async with shared_cluster.client() as client:
        runs = [client.run(busybox_image.reference, ["echo", str(number)], backoff=0.02) for number in range(24)]
        results = await asyncio.gather(*runs)
    assert [result.stdout for result in results] == [b"%d\n" % number for number in range(24)]
    assert {result.node_id for result in results} == {"node1", "node2"}
