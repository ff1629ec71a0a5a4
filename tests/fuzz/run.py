"""Fuzz with atheris, guided by coverage: ``python -m tests.fuzz.run [TARGET...] --seconds 60``; `make fuzz` does that.

Each target runs in a process of its own. What it found on the way is kept as its corpus in .cache/fuzz/TARGET, inputs that
break something are written to .cache/fuzz/crashes and can be given to ``--replay``.
"""

import argparse
import hashlib
import importlib
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

CACHE = Path(__file__).parents[2] / ".cache" / "fuzz"
_MAX_LENGTH = {"tar": 1 << 16, "file": 1 << 16}


def main() -> int:
    """Run the targets one after the other; 1 if any of them failed."""
    parser = argparse.ArgumentParser(description="Fuzz with atheris.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="default: all of them")
    parser.add_argument("--seconds", type=int, default=60, help="per target (60)")
    parser.add_argument("--runs", type=int, default=-1, help="inputs per target, instead of a time")
    parser.add_argument("--seed", type=int, default=0, help="0, the default, chooses one; it is printed")
    parser.add_argument("--replay", type=Path, help="run one TARGET on this file and nothing else")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        fuzz(args.targets[0], args.seconds, args.runs, args.seed)
    from tests.fuzz.targets import TARGETS

    unknown = set(args.targets) - TARGETS.keys()
    if unknown:
        parser.error(f"no such target: {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    if args.replay:
        TARGETS[args.targets[0]](args.replay.read_bytes())
        return 0
    failed = []
    for target in args.targets or TARGETS:
        seed = args.seed or random.SystemRandom().randrange(1, 1 << 31)
        print(f"fuzz: {target}, --seed {seed}", flush=True)
        options = [f"--seconds={args.seconds}", f"--runs={args.runs}", f"--seed={seed}", "--inside"]
        if subprocess.run([sys.executable, "-m", "tests.fuzz.run", target, *options], check=False).returncode:
            failed.append(target)
    print(f"fuzz: failed: {', '.join(failed)}" if failed else "fuzz: all well")
    return bool(failed)


def fuzz(target: str, seconds: int, runs: int, seed: int) -> None:
    """Let libFuzzer run *target*; it ends the process."""
    # Not among the dependencies (35 MB, not for every Python) and without types: `make fuzz` installs it.
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["afs.layerstore"]):
        from tests.fuzz.targets import TARGETS
    from tests.fuzz.seeds import seeds

    corpus, crashes = CACHE / target, CACHE / "crashes"
    corpus.mkdir(parents=True, exist_ok=True)
    crashes.mkdir(exist_ok=True)
    for data in seeds(target):
        (corpus / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    limit = [f"-runs={runs}"] if runs >= 0 else [f"-max_total_time={seconds}"]
    options = [f"-seed={seed}", f"-max_len={_MAX_LENGTH.get(target, 1 << 14)}", "-timeout=20", "-rss_limit_mb=4096"]
    outputs = [f"-artifact_prefix={crashes}/{target}-", "-print_final_stats=1", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *limit, *options, *outputs, str(corpus)], TARGETS[target])
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
