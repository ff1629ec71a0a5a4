"""``afs_mount --probe``: which backend this machine mounts layers with, and why not the others. Needs no service."""

import json
import logging
import os
import tempfile
from pathlib import Path

import click

from afs.core.errors import FailedPrecondition
from afs.snapshotter.backends import Backends
from afs.snapshotter.probe import check_overlay, probe
from afs.snapshotter.scratchfs import probe_scratch


def show_probe(layerstore_root: Path, *, as_json: bool) -> None:
    """Try every backend with a file on the file system of *layerstore_root*, and print what came of it; whether roots can be limited, too.

    FailedPrecondition if nothing can be mounted at all.
    """
    if os.geteuid() != 0:
        raise FailedPrecondition("--probe needs root: it mounts a tiny layer")
    logging.getLogger("afs").setLevel(logging.ERROR)  # we print it ourselves
    check_overlay()
    found = Backends(probe(layerstore_root, Path(tempfile.gettempdir())))
    with tempfile.TemporaryDirectory(prefix="afs-probe-") as directory:
        unlimited = probe_scratch(Path(directory))
    used = {lazy: next(iter(found.choices(lazy=lazy)), None) for lazy in (False, True)}
    release = os.uname().release
    if as_json:
        trials = [
            {"backend": trial.backend, "lazy": trial.lazy, "works": trial.works, "reason": trial.reason}
            | {"used": trial is used[trial.lazy]}
            for trial in found.trials
        ]
        limits = {"works": not unlimited, "reason": unlimited}
        click.echo(json.dumps({"kernel": release, "trials": trials, "limited_roots": limits}))
    else:
        click.echo(f"kernel {release}")
        for trial in found.trials:
            verdict = "used" if trial is used[trial.lazy] else trial.reason or "works, but is not the first choice"
            click.echo(f"{'lazy' if trial.lazy else 'complete'} layers, {trial.backend}: {verdict}")
        click.echo(f"roots of limited size: {unlimited or 'work'}")
    found.check()
