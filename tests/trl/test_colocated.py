"""Trainers of TRL with vLLM in their own processes: tokens are those of fresh engines, and processes agree."""

import json
import os
import socket
import subprocess
import sys

import pytest
from drive import Talker
from trained import fresh, life, small_engines


def lived(zoo, folder, kind, adapter=False):
    model = str(zoo.checkpoint("llama", "A"))
    return zoo.run(life, None, kind, model, str(folder), adapter, {"vllm_mode": "colocate"})


def test_three_steps(zoo, tmp_path):
    found = lived(zoo, tmp_path, "GRPO")
    assert [version for version, _, _ in found] == [1, 2, 3]
    for version, said, path in found:
        assert said == fresh(zoo, path), f"version {version}"
    assert len({tuple(said) for _, said, _ in found}) > 1, "all versions say the same, so this shows nothing"


@pytest.mark.long
@pytest.mark.parametrize(("kind", "adapter"), [("GRPO", True), ("OnlineDPO", False), ("OnlineDPO", True)])
def test_kin_and_adapters(zoo, tmp_path, kind, adapter):
    found = lived(zoo, tmp_path, kind, adapter)
    assert [version for version, _, _ in found] == [1, 2, 3]
    assert found[2][1] == fresh(zoo, found[2][2])
    assert found[0][1] != found[2][1]


def generation_of(start, weights):
    """What TRL's trainers generate with, of a model whose engine starts from another checkpoint."""
    import transformers
    from accelerate import Accelerator
    from trl.generation.vllm_generation import VLLMGeneration

    import hotweights.engines.trl

    small_engines()
    hotweights.engines.trl.enable()
    hotweights.engines.trl.enable()  # Nothing is replaced twice.
    model = transformers.AutoModelForCausalLM.from_pretrained(weights)
    model.name_or_path = start
    return VLLMGeneration(model, Accelerator(cpu=True), None, mode="colocate")


def talker_of(generation):
    talker = Talker.__new__(Talker)
    talker.llm = generation.llm
    return talker


def synced(start, weights):
    """What the engine says before and after a sync, and after a second one of the same."""
    generation = generation_of(start, weights)
    talker = talker_of(generation)
    found = [talker.tokens()]
    for _ in range(2):
        generation.sync_weights()
        found.append(talker.tokens())
    return found


@pytest.mark.parametrize(
    "name",
    [
        "qwen3-tied",
        # Experts lie in one tensor in memory; and the bias of the router is a buffer, which TRL leaves out.
        "deepseek-v3",
        pytest.param("qwen3-moe", marks=pytest.mark.long),
        pytest.param("mixtral", marks=pytest.mark.long),
        pytest.param("gpt-oss", marks=pytest.mark.long),
        pytest.param("gpt2", marks=pytest.mark.long),
        pytest.param("phi3", marks=pytest.mark.long),
    ],
)
def test_names_in_memory_are_those_that_vllm_knows(zoo, name):
    paths = {weights: str(zoo.checkpoint(name, weights)) for weights in "AB"}
    found = zoo.run(synced, None, paths["A"], paths["B"])
    assert found == [zoo.fresh(name, "A"), *[zoo.fresh(name, "B")] * 2]
    assert found[0] != found[1]


def outcome(act):
    """What it raised, in words."""
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def faults(start, weights):
    """What fails in a sync, what is raised, and what the engine says then."""
    import torch

    generation = generation_of(start, weights)
    talker, model = talker_of(generation), generation.model
    theirs = type(generation)._iter_named_params
    walked = []

    def walk(stop=None, double=None):
        for number, (name, tensor) in enumerate(theirs(generation)):
            if number == stop:
                raise RuntimeError("the gather failed")
            yield name, torch.cat([tensor, tensor]) if number == double else tensor
        walked.append("to the end")

    generation.sync_weights()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = {"first": (None, talker.tokens())}
    for tensor in model.parameters():
        tensor.data.mul_(1.5)
    for name, walks in {"raises": {"stop": 4}, "shape": {"double": 3}, "whole": {}}.items():
        generation._iter_named_params = lambda walks=walks: walk(**walks)
        found[name] = outcome(generation.sync_weights), talker.tokens()
    del generation._iter_named_params
    model.load_state_dict(before)
    generation.sync_weights()
    found["last"] = None, talker.tokens()
    runner = generation.llm.llm_engine.model_executor.driver_worker.model_runner
    return found, walked, runner.model is runner.get_model()


def test_what_fails_is_raised_and_changes_nothing(zoo):
    said = {weights: zoo.fresh("llama", weights) for weights in "AB"}
    paths = {weights: str(zoo.checkpoint("llama", weights)) for weights in "AB"}
    found, walked, restored = zoo.run(faults, None, paths["A"], paths["B"])
    assert found["first"] == (None, said["B"])
    assert found["raises"] == ("RuntimeError: the gather failed", said["B"])
    assert found["shape"][0].startswith("UpdateAborted: ")
    assert found["shape"][1] == said["B"]
    assert found["whole"][0] is None
    assert found["whole"][1] != said["B"]
    assert found["last"] == (None, said["B"])
    assert walked == ["to the end"] * 2, "TRL unmerges adapters at the end of the walk"
    assert restored


def started_before(start, weights):
    import transformers
    from accelerate import Accelerator
    from trl.generation.vllm_generation import VLLMGeneration

    import hotweights.engines.trl

    small_engines()
    model = transformers.AutoModelForCausalLM.from_pretrained(weights)
    model.name_or_path = start
    generation = VLLMGeneration(model, Accelerator(cpu=True), None, mode="colocate")
    hotweights.engines.trl.enable()
    return outcome(generation.sync_weights)


@pytest.mark.long
def test_an_engine_that_was_started_before_is_refused(zoo):
    paths = {weights: str(zoo.checkpoint("llama", weights)) for weights in "AB"}
    words = zoo.run(started_before, None, paths["A"], paths["B"])
    assert "call hotweights.engines.trl.enable() before the trainer is made" in words


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
def test_processes_take_a_version_together(zoo, tmp_path, ranks):
    """Each has an engine of its own, or a rank of one; one of them fails in the middle of a walk."""
    paths = {weights: str(zoo.checkpoint("llama", weights)) for weights in "AB"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--nnodes=1"]
    command += ["--master-addr=127.0.0.1", f"--master-port={port}"]
    script = [os.path.join(os.path.dirname(__file__), "together.py"), paths["A"], paths["B"], str(ranks), str(tmp_path)]
    done = subprocess.run([*command, *script], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-5000:]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    if ranks == 2:
        said = {weights: zoo.fresh("llama", weights, tensor_parallel_size=2) for weights in "AB"}
    else:
        said = {weights: zoo.fresh("llama", weights) for weights in "AB"}
    assert [one["start"] for one in found] == [said["A"]] * 2
    for one in found:
        for when in ("synced", "refused", "back"):
            assert one[when] == said["B"], when
        assert one["again"] not in (said["A"], said["B"])
        assert "rank 1: RuntimeError: the gather failed" in one["raised"] or one is found[1]
    assert found[1]["raised"] == "RuntimeError: the gather failed"
