"""Every kind of model: loaded as vLLM loads it, updated as a fresh engine would answer, unharmed by what fails."""

import re

import cases
import pytest
from broken import CHANGES, broken
from drive import OURS, Talker

REFUSED = {
    "missing": "norm.*: missing|norm.* would be written",
    "half": r"qkv_proj\.weight: .* would be written",
    "shape": "the model's own loading code refuses this manifest",
    "cut": "CheckpointError: .*model.safetensors",
    "processing": "the kernel is broken",
}
"""What an engine says of broken checkpoints."""


def tour(talker: Talker, paths: dict[str, str], stops: str, bad: dict[str, str]):
    """Load A, then update to each in turn, and to what is broken; what it said and what it held."""
    from hotweights.engines import vllm as engine

    found = [("A", talker.tokens(), engine.status(talker.llm)[0])]
    for weights in stops:
        outcome = engine.update(talker.llm, paths[weights], version=f"version {weights}")
        assert outcome.version == f"version {weights}"
        assert outcome.reset == ("prefix", "multimodal", "encoder")
        found.append((weights, talker.tokens(), engine.status(talker.llm)[0]))
    refused = {name: (_refusal(talker, path), talker.tokens()) for name, path in bad.items()}
    refused["processing"] = (_failing_half_way(talker, paths["B"]), talker.tokens())
    return found, refused, engine.status(talker.llm)[0]


def _refusal(talker: Talker, source: str):
    import hotweights as hw
    from hotweights.engines import vllm as engine

    try:
        engine.update(talker.llm, source)
    except hw.UpdateAborted as error:
        assert not talker.llm.llm_engine.is_sleeping(), "it goes on"
        return str(error)
    return "nothing was refused"


def _failing_half_way(talker: Talker, source: str):
    """Half of the layers are processed, then one fails."""
    from hotweights.engines.vllm.attached import attached

    live = attached(talker.model)
    process = live._once._process
    layers = sum(live._is_processed(name, module) for name, module in live.model.named_modules())
    calls = []

    def failing(layer):
        calls.append(layer)
        if len(calls) > layers // 2:
            raise RuntimeError("the kernel is broken")
        process(layer)

    live._once._process = failing
    try:
        return _refusal(talker, source)
    finally:
        live._once._process = process


@pytest.mark.parametrize("name", cases.CASES)
def test_it_says_what_a_fresh_engine_says(zoo, name, tmp_path):
    expected = {weights: zoo.fresh(name, weights) for weights in "AB"}
    assert expected["A"] != expected["B"], "these weights cannot be told apart"
    paths = {weights: str(zoo.checkpoint(name, weights)) for weights in "AB"}
    kinds = CHANGES if name == "llama" else ["missing"]
    bad = {kind: str(broken(kind, zoo.checkpoint(name, "B"), tmp_path)) for kind in kinds}
    options = {**cases.CASES[name].engine, **OURS}
    found, refused, status = zoo.run(tour, zoo.checkpoint(name, "A"), paths, "BAABA", bad, options=options)

    assert [weights for weights, said, _ in found if said != expected[weights]] == []
    digests = {weights: one["digest"] for weights, _, one in found}
    assert [one["digest"] for _, _, one in found] == [digests[weights] for weights, _, _ in found]
    assert digests["A"] != digests["B"]
    assert [one["version"] for _, _, one in found] == [1, *(f"version {one}" for one in "BAABA")]

    assert {kind for kind, (_, said) in refused.items() if said != expected["A"]} == set()
    for kind, (why, _) in refused.items():
        assert why.startswith("version 'version A' is live on all ranks; rank 0: ")
        assert re.search(REFUSED[kind], why), why
    assert status == found[-1][2]
