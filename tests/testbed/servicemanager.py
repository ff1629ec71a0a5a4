"""Stands for systemctl and journalctl where systemd does not run: starts what unit files say, and waits until it is ready.

Called as ``systemctl`` it knows daemon-reload, start, restart, stop, and enable or disable with ``--now``, for units in
/etc/systemd/system. Pids and output are in /run/services. Only what the unit files of AFS need is read from them.
"""

import itertools
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

UNITS, STATE = Path("/etc/systemd/system"), Path("/run/services")


def settings(name: str) -> dict[str, list[str]]:
    """The settings of a unit, with all values of each."""
    found: dict[str, list[str]] = {}
    for line in (UNITS / f"{name}.service").read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


def start(name: str) -> None:
    """Start a service, unless it runs, after the units that it wants; return when it says that it is ready."""
    if (STATE / name).exists():
        return
    unit = settings(name)
    for wanted in unit.get("Wants", []):
        start(wanted.removesuffix(".service"))
    for directory in unit.get("RuntimeDirectory", []):
        Path("/run", directory).mkdir(parents=True, exist_ok=True)
    for directory in unit.get("StateDirectory", []):
        Path("/var/lib", directory).mkdir(parents=True, exist_ok=True)
    STATE.mkdir(exist_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified, (STATE / f"{name}.log").open("a") as log:
        address = STATE / f"{name}.notify"
        address.unlink(missing_ok=True)
        notified.bind(str(address))
        notified.settimeout(30)
        environment = dict(entry.split("=", 1) for entry in unit.get("Environment", []))
        process = subprocess.Popen(
            unit["ExecStart"][0].split(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **environment, "NOTIFY_SOCKET": str(address)},
            start_new_session=True,
        )
        (STATE / name).write_text(str(process.pid))
        while b"READY=1" not in notified.recv(4096):
            pass


def stop(name: str) -> None:
    """End the main process of a service and nothing else, as with KillMode=process."""
    if not (STATE / name).exists():
        return
    pid = int((STATE / name).read_text())
    with os.fdopen(os.pidfd_open(pid)) as process:
        os.kill(pid, signal.SIGTERM)
        if not select.select([process], [], [], 30)[0]:
            raise SystemExit(f"{name} does not stop")
    (STATE / name).unlink()


def journal(arguments: list[str]) -> None:
    """Print the last lines that units wrote."""
    names = [name for flag, name in itertools.pairwise(arguments) if flag == "-u"]
    count = next((int(n) for flag, n in itertools.pairwise(arguments) if flag == "--lines"), 10)
    for name in names:
        sys.stdout.write("\n".join((STATE / f"{name}.log").read_text().splitlines()[-count:]) + "\n")


def main() -> None:
    """Do what the command line says."""
    if Path(sys.argv[0]).name == "journalctl":
        journal(sys.argv[1:])
        return
    verb, *names = [argument for argument in sys.argv[1:] if argument != "--now"]
    assert verb == "daemon-reload" or names, sys.argv
    for name in names:
        if verb in ("stop", "restart", "disable"):
            stop(name)
        if verb in ("start", "restart", "enable"):
            start(name)


if __name__ == "__main__":
    main()
