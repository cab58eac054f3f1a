"""Pools and leases."""

import pytest

from hotweights import Pool
from hotweights.testing import POOL_CONTRACT


@pytest.mark.parametrize("check", POOL_CONTRACT, ids=lambda check: check.__name__)
def test_contract(check):
    check(lambda slots, nbytes, guard: Pool(slots, nbytes, guard=guard))
