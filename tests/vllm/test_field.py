"""What trying the plug-in on other people's checkpoints found: heads that come and go, ``.bin`` files, paths."""

import shutil
from pathlib import Path

import pytest
import torch
from drive import OURS, Talker, say
from safetensors.torch import load_file, save_file
from trainers import caught


def variants(zoo):
    """Checkpoints of a model whose config ties its head: with a copy of the embedding, with another head, as .bin."""
    made = {}
    for weights in "AB":
        plain = made[weights] = zoo.checkpoint("qwen3-tied", weights)
        tensors = {name: one for file in sorted(plain.glob("*.safetensors")) for name, one in load_file(file).items()}
        embedding = tensors["model.embed_tokens.weight"]
        other = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(7)).to(embedding.dtype)
        for kind, head in (("copy", embedding.clone()), ("other", other)):
            path = made[f"{weights}-{kind}"] = plain.with_name(f"{weights}-{kind}")
            if not path.exists():
                path.mkdir()
                shutil.copy(plain / "config.json", path)
                save_file({**tensors, "lm_head.weight": head}, path / "model.safetensors", {"format": "pt"})
        path = made[f"{weights}-bin"] = plain.with_name(f"{weights}-bin")
        if not path.exists():
            path.mkdir()
            shutil.copy(plain / "config.json", path)
            torch.save(tensors, path / "pytorch_model.bin")
    return {name: str(path) for name, path in made.items()}


def updates(talker: Talker, paths):
    from hotweights.engines import vllm as engine

    found = [talker.tokens()]
    for path in paths:
        found.append((caught(lambda path=path: engine.update(talker.llm, path)), talker.tokens()))
    return found


def test_a_head_that_the_first_checkpoint_has(zoo):
    """vLLM builds it as a tensor of its own then, and a version without one has it tied."""
    paths = variants(zoo)
    said = {weights: zoo.fresh("qwen3-tied", weights) for weights in "AB"}
    other = zoo.run(say, paths["B-other"])
    assert other not in said.values()
    stops = [paths["B"], paths["B-other"], paths["A"]]
    first, *found = zoo.run(updates, paths["A-copy"], stops, options=OURS)
    assert first == said["A"]
    assert found == [("nothing was raised", one) for one in (said["B"], other, said["A"])]


def test_a_head_that_the_first_checkpoint_lacks_and_bin_files(zoo):
    """vLLM ties it then: a version with the same head is right, one with another is refused."""
    paths = variants(zoo)
    said = {weights: zoo.fresh("qwen3-tied", weights) for weights in "AB"}
    stops = [Path(paths["B-copy"]), paths["A-other"], paths["A-bin"], "", paths["B-other"]]
    first, *found = zoo.run(updates, paths["A-bin"], stops, options=OURS)
    assert first == said["A"]
    assert [tokens for _, tokens in found] == [said["B"], said["B"], said["A"], said["A"], said["A"]]
    assert [why for why, _ in found[::2]][:2] == ["nothing was raised"] * 2
    for why in (found[1][0], found[4][0]):
        assert "lm_head.weight" in why
        assert "are one tensor in the model, and differ in the source" in why
    assert "rank 0: UsageError: a source is a path" in found[3][0]


class Vision(torch.nn.Module):
    """As vLLM builds one: what normalises images is computed, and no checkpoint has it."""

    def __init__(self):
        super().__init__()
        self.visual, self.layers = torch.nn.Module(), torch.nn.ModuleList([torch.nn.Module() for _ in range(2)])
        self.visual.input_norm = torch.nn.Module()
        self.visual.input_norm.register_buffer("weight", torch.ones(3))
        self.visual.register_buffer("position_ids", torch.arange(3))
        self.visual.proj = torch.nn.Linear(3, 3)
        for layer in self.layers:
            layer.register_buffer("scalar", torch.ones(1))


def allowed(names):
    from hotweights.engines.vllm.layers import may_be_missing

    return {*may_be_missing(Vision(), names)}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["visual.proj.weight"], {"layers.0.scalar", "layers.1.scalar"}),
        (["model.layers.0.scalar"], set()),
        (["layers.0.scalar", "visual.input_norm.weight", "visual.position_ids"], set()),
    ],
)
def test_buffers_that_may_be_missing(zoo, names, expected):
    """One kind of buffer comes as a whole or not at all; those of whole numbers are never needed."""
    computed = set() if "visual.input_norm.weight" in names else {"visual.input_norm.weight"}
    assert zoo.run(allowed, None, names) == {*expected, *computed, "visual.position_ids"}
