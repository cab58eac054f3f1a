"""Every kind of model: loaded as vLLM loads it, updated as a fresh engine would answer, unharmed by what fails."""

import cases
import pytest
from drive import OURS, Talker


def tour(talker: Talker, paths: dict[str, str], tour: str):
    """Load A, then update to each in turn; what it said and what it held."""
    from hotweights.engines import vllm as engine

    found = [("A", talker.tokens(), engine.status(talker.llm)[0])]
    for weights in tour:
        outcome = engine.update(talker.llm, paths[weights], version=f"version {weights}")
        assert outcome.version == f"version {weights}"
        found.append((weights, talker.tokens(), engine.status(talker.llm)[0]))
    return found


@pytest.mark.parametrize("name", cases.CASES)
def test_what_it_says_is_what_a_fresh_engine_says(zoo, name):
    expected = {weights: zoo.fresh(name, weights) for weights in "AB"}
    assert expected["A"] != expected["B"], "these weights cannot be told apart"
    paths = {weights: str(zoo.checkpoint(name, weights)) for weights in "AB"}
    options = {**cases.CASES[name].engine, **OURS}
    found = zoo.run(tour, zoo.checkpoint(name, "A"), paths, "BAAB", options=options)
    assert [weights for weights, said, _ in found if said != expected[weights]] == []
    digests = {weights: status["digest"] for weights, _, status in found}
    assert [status["digest"] for _, _, status in found] == [digests[weights] for weights, _, _ in found]
    assert digests["A"] != digests["B"]
    assert [status["version"] for _, _, status in found] == [1, *(f"version {one}" for one in "BAAB")]
