"""A cluster of three hosts, which are network namespaces: relays are actors, and a host is killed."""

import pytest
from cluster import pids_in

pytestmark = pytest.mark.timeout(900)


def test_versions_come_through_one_relay_for_each_host(cluster):
    found = cluster.run("relayed")
    for version, name in enumerate(("first", "second", "third"), 1):
        took, network, said, workers = found[name]
        assert (took, said) == (5, "")
        assert workers == [[version, float(version), ""]] * 5
        assert network == 2 * found["nbytes"]  # Four workers are on two other hosts.
    assert found["late"] == [[3, 3.0, ""]]  # Its host's relay keeps the last version.
    assert sum("on 10.77.0.1" in name for name in found["connected"]) == 2, found["connected"]
    assert len({*found["through"][:2]}) == len({*found["through"][2:4]}) == 1
    assert len({*found["through"]}) == 3
    assert all("unix:" in address for address in found["through"])
    process, network, relays = found["whereabouts"]
    assert "on 10.77.0.3" in process
    assert network.startswith("tcps://10.77.0.3:")
    assert len(relays) == found["started"] == 2
    assert "TransferAborted: " in found["lost"]
    assert found["relays"] == [1, 1, 0]
    assert found["relays after"] == [0, 0, 0]
    assert "ray:job is held by another sender, process" in found["taken"]
    assert not [each for each in cluster.left() if "socket" in each]


def test_a_host_is_killed_and_the_others_keep_one_version(cluster):
    found = cluster.run("killed")
    assert found["first"][0] == 4
    took, _, said, workers = found["second"]
    assert took == 0
    assert "TransferAborted" in said
    assert "10.77.0.2" in said
    assert found["killed"] > 0
    assert [worker[:2] for worker in workers[:2]] == [[1, 1.0]] * 2
    assert all(isinstance(worker, str) for worker in workers[2:])  # what Ray says of an actor that died
    assert found["seconds"] < 120
    assert found["third"][0] == 2
    assert [worker[:2] for worker in found["third"][3]] == [[3, 3.0]] * 2
    assert not pids_in(cluster.hosts.names[1])
