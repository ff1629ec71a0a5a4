"""Damage for good inputs, by a seeded generator: the same seed, the same damage."""

import random
from collections.abc import Sequence

from tests.fuzz.targets import repaired

BLOCK = 512
_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 62, (1 << 64) - 1)


def mutated(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """*data* after one to four changes; pieces of *others* may come in."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(found) + 1)
        match rng.randrange(8):
            case 0 if found:
                found[at % len(found)] ^= 1 << rng.randrange(8)
            case 1:
                del found[at:]
            case 2:  # a piece of another one
                other = rng.choice(others)
                start = rng.randrange(len(other) + 1)
                found[at:at] = other[start : start + rng.randrange(1, 3000)]
            case 3:  # blocks again
                at -= at % BLOCK
                found[at:at] = found[at : at + BLOCK * rng.randint(1, 6)] * rng.randint(1, 5)
            case 4:  # blocks less
                at -= at % BLOCK
                del found[at : at + BLOCK * rng.randint(1, 3)]
            case 5:  # a number
                width = rng.choice((1, 2, 4, 8))
                number = rng.choice(_NUMBERS) & (1 << 8 * width) - 1
                found[at : at + width] = number.to_bytes(width, "little")
            case 6:  # blocks of another one in the place of ours
                other = rng.choice(others)
                at -= at % BLOCK
                start = rng.randrange(len(other) + 1) & -BLOCK
                found[at : at + BLOCK] = other[start : start + BLOCK]
            case _:  # chance in a header's field
                field = at - at % BLOCK + rng.choice((0, 100, 108, 124, 136, 156, 157, 329, 345, 386, 482))
                found[field : field + 4] = rng.randbytes(4)
    return bytes(found)


def mutated_tar(rng: random.Random, tars: Sequence[bytes]) -> bytes:
    """A damaged tar; in most of them the checksums are right, so that the damage is looked at."""
    data = mutated(rng, rng.choice(tars), tars)
    return repaired(data) if rng.random() < 0.8 else data
