"""Ours passes the contract that any transport must pass."""

import pytest
from ends import receiver, sender, tensors

from hotweights.testing import TRANSPORT_CONTRACT


class SharedMemory:
    """A group at one address."""

    def __init__(self, address, **options):
        self._address, self._options = address, options

    def sender(self, receivers):
        return sender(self._address, receivers=receivers, **self._options)

    def receiver(self):
        return receiver(self._address)


@pytest.mark.parametrize("check", TRANSPORT_CONTRACT, ids=lambda check: check.__name__)
@pytest.mark.parametrize("options", [{}, {"digests": False}, {"slots": 4, "slot_nbytes": 1 << 20}], ids=str)
def test_shared_memory_is_a_transport(check, options, address):
    check(lambda: SharedMemory(address, **options), tensors())
