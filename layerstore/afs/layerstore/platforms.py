"""Which platforms run on which: containerd's rules, so that both choose the same manifest of an index.

See platformVector and Normalize in github.com/containerd/platforms.
"""

from afs.core.images import Platform

_ARCHITECTURES = {"x86_64": "amd64", "x86-64": "amd64", "i386": "386", "aarch64": "arm64"}
_OLD_ARM = {"armhf": "v7", "armel": "v6"}


def normalized(platform: Platform) -> Platform:
    """*platform* with one name for each thing: arm64 is v8 and amd64 is v1, so neither says so; arm is v7."""
    architecture, variant = platform.architecture.lower(), platform.variant.lower()
    if architecture in _OLD_ARM:
        architecture, variant = "arm", _OLD_ARM[architecture]
    architecture = _ARCHITECTURES.get(architecture, architecture)
    if architecture == "arm64" and variant in ("8", "v8", "v8.0"):
        variant = ""
    elif architecture == "arm64" and variant in ("9", "9.0", "v9.0"):
        variant = "v9"
    elif architecture == "amd64" and variant == "v1":
        variant = ""
    elif architecture == "arm":
        variant = "v7" if not variant else variant if variant.startswith("v") else f"v{variant}"
    return Platform(platform.os.lower(), architecture, variant)


def preferred(wanted: Platform) -> list[Platform]:
    """The platforms that run where *wanted* does, normalized, the best first."""
    wanted = normalized(wanted)
    names = [f"{wanted.architecture}/{wanted.variant}"]
    if wanted.architecture == "amd64":
        names += [f"amd64/v{number}" for number in range(_number(wanted.variant) - 1, 0, -1)] + ["386/"]
    elif wanted.architecture == "arm":
        names += _older_arm(wanted.variant)
    elif wanted.architecture == "arm64":
        names += _older_arm64(wanted.variant)
    found = (normalized(Platform(wanted.os, *name.split("/"))) for name in names)
    return list(dict.fromkeys(found))


def _number(variant: str) -> int:
    digits = variant.removeprefix("v")
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 3 else 0


def _older_arm(variant: str) -> list[str]:
    return [f"arm/v{number}" for number in range(_number(variant) - 1, 4, -1)]


def _older_arm64(variant: str) -> list[str]:
    """v9.x runs v9.0 to v9.x and v8.0 to v8.(x+5), v8.x runs v8.0 to v8.x; then what 32-bit arm does."""
    major, _, minor = (variant or "v8").partition(".")
    names, last = [], _number(minor)
    if major == "v9":
        names += [f"arm64/v9.{number}" for number in range(last - 1, -1, -1)]
        names.append(f"arm64/v8.{last + 5}")
        last += 5
    if major in ("v8", "v9"):
        names += [f"arm64/v8.{number}" for number in range(last - 1, -1, -1)]
        return [*names, "arm/v8", *_older_arm("v8")]
    return [*names, f"arm/{variant}", *_older_arm(variant)]
