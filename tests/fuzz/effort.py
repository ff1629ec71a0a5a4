"""How long the tests of this folder try. By default they are quick and always the same; AFS_FUZZ_EFFORT=20 tries 20 times
as many inputs, and others each time."""

import os
import random

from hypothesis import HealthCheck, settings

EFFORT = int(os.environ.get("AFS_FUZZ_EFFORT", "1"))
SEED = int(os.environ.get("AFS_TEST_SEED", "0")) if EFFORT == 1 else random.SystemRandom().randrange(1 << 31)


def examples(count: int) -> settings:
    """Settings for a hypothesis test with *count* examples at the least effort; what fails tells how to repeat it."""
    return settings(
        max_examples=count * EFFORT,
        deadline=None,
        derandomize=EFFORT == 1,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
