"""State and Digest: what a live model is in, and what a model holds. Nothing here changes either."""

from __future__ import annotations

import enum


class State(enum.Enum):
    """What a live model is in. Only one update runs at a time."""

    EMPTY = "empty"  # nothing was loaded yet
    SERVING = "serving"  # all of one version
    UPDATING = "updating"  # an update runs; version N is what an abort leaves
    PREPARED = "prepared"  # it can be committed; version N still
    TORN = "torn"  # tensors of two versions: an update with atomic=False failed
