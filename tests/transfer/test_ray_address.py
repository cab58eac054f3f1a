"""``ray:NAME`` where there is no Ray; ``tests/ray`` has the rest."""

import pytest

import hotweights as hw
from hotweights.transfer.endpoint import is_local
from hotweights.transfer.ray import endpoint as ray_endpoint
from hotweights.transfer.relay import Relay
from hotweights.transfer.resolve import Resolver


@pytest.mark.parametrize("make", [hw.Sender, hw.Receiver, Resolver, lambda address: Relay(address, "unix:run/hw")])
def test_a_missing_ray_is_told_with_what_to_type(make, monkeypatch):
    monkeypatch.setattr(ray_endpoint, "find_spec", lambda name: None)
    with pytest.raises(hw.MissingPackage, match=r"pip install 'hotweights\[ray\]'"):
        make("ray:job")
    with pytest.raises(hw.UsageError, match="an address in Ray is ray:NAME"):
        make("ray:a job")
    assert not is_local("ray:job")
