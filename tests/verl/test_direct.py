"""verl's engines take versions straight from the trainer, with its real manager, replicas and servers, on a CPU."""

import pytest
from stack import run


@pytest.mark.parametrize(("replicas", "ranks"), [(2, 1), (1, 2)])
def test_versions_go_straight_into_an_engine(tmp_path, replicas, ranks):
    start, short, two, failed, adapted, five = run("direct.py", folder=tmp_path, replicas=replicas, ranks=ranks)
    for step, name, taken in ((2, "two", two), (5, "five", five)):
        ((_, _, fresh, _),) = run("colocated.py", folder=tmp_path, ranks=ranks, tied=False, start=name, rounds=[])
        assert taken["words"] is None
        assert taken["metrics"]["hotweights/bytes"] > 1 << 20
        assert taken["says"] == [[fresh, step]] * replicas
    assert short["says"] == start["says"]
    assert "model.norm.weight" in short["words"]
    assert "the trainer's disk is full" in failed["words"]
    assert "lora.merge=True" in adapted["words"]
    assert failed["says"] == adapted["says"] == two["says"], "no engine has a part of what was refused"
