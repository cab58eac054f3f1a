"""Collection is paused inside, and afterwards what it was before, also when an error comes out."""

import gc

import pytest

from hotweights.gc_pause import without_collection


@pytest.mark.parametrize("enabled", [True, False])
def test_it_is_as_before(enabled):
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        inside = []
        with pytest.raises(KeyError), without_collection():
            inside.append(gc.isenabled()) or {}["an error"]
        assert inside == [False]
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
