"""How many examples hypothesis tries of what a test draws: some every day, several times that in `make test-all`."""

import os

from hypothesis import settings

TIMES = int(os.environ.get("HOTWEIGHTS_EXAMPLES", "1"))


def examples(number, **options):
    """Settings that try ``number`` examples, times what ``make test-all`` sets ``HOTWEIGHTS_EXAMPLES`` to."""
    return settings(deadline=None, max_examples=number * TIMES, **options)
