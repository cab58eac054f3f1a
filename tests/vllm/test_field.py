"""What trying the plug-in on other people's checkpoints found: heads that come and go, ``.bin`` files, paths."""

import json
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


def heads_with_a_bias(stops, options):
    """For each update, the tensors that differ from vLLM's own load, or why it was refused; and if the bias moved."""
    import torch
    from test_loading import join, load

    from hotweights.engines.vllm.attached import as_loaded, attached
    from hotweights.model.digests import digest_of

    join()
    theirs = [digest_of(load(path, options)[0]).tensors for path in stops]
    model, config = load(stops[0], {**options, "load_format": "hotweights"})
    address, found = model.lm_head.bias.data_ptr(), []
    for path, wanted in zip(stops, theirs, strict=True):
        with as_loaded(model, config), torch.no_grad():
            why = caught(lambda path=path: attached(model).update(path))
        ours = digest_of(model).tensors
        found.append((why, [name for name in wanted if ours.get(name) != wanted[name]]))
    return found, model.lm_head.bias.data_ptr() == address


def test_a_tied_head_with_a_bias(zoo):
    """vLLM's Transformers backend makes the bias anew at each load; the head is compared with the embedding as ever."""
    plain = {weights: zoo.checkpoint("phi-tied", weights) for weights in "AB"}
    other = plain["A"].with_name("A-other")
    other.mkdir()
    shutil.copy(plain["A"] / "config.json", other)
    tensors = {name: one for file in plain["A"].glob("*.safetensors") for name, one in load_file(file).items()}
    assert "lm_head.bias" in tensors
    head = torch.zeros_like(tensors["model.embed_tokens.weight"])
    save_file({**tensors, "lm_head.weight": head}, other / "model.safetensors", {"format": "pt"})
    stops = [str(path) for path in (plain["A"], plain["B"], other)]
    found, stays = zoo.run(heads_with_a_bias, None, stops, {"model_impl": "transformers"})
    assert found[:2] == [("nothing was raised", [])] * 2
    assert (
        "model.embed_tokens.weight and lm_head.weight are one tensor in the model, and differ in the source"
        in found[2][0]
    )
    assert stays


def with_dense_layers(path, seed):
    """A copy of a checkpoint with a Dense layer of sentence-transformers in a folder of its own."""
    made = Path(f"{path}-dense")
    if not made.exists():
        shutil.copytree(path, made)
        (made / "2_Dense").mkdir()
        kinds = {"": "Transformer", "2_Dense": "Dense"}
        modules = [{"path": key, "type": f"sentence_transformers.models.{kind}"} for key, kind in kinds.items()]
        (made / "modules.json").write_text(json.dumps(modules))
        (made / "2_Dense" / "config.json").write_text('{"in_features": 256, "out_features": 64, "bias": true}')
        torch.manual_seed(seed)
        tensors = {"linear.weight": torch.randn(64, 256), "linear.bias": torch.randn(64)}
        save_file(tensors, made / "2_Dense" / "model.safetensors")
    return str(made)


def embedding_models(stops):
    """For each update, how many tensors differ from vLLM's own load, and how many there are; and what was warned of."""
    from types import SimpleNamespace

    from test_loading import join, load

    from hotweights.engines.vllm.projection import projections
    from hotweights.engines.vllm.ranks import Ranks
    from hotweights.engines.vllm.worker import _updated
    from hotweights.model.digests import digest_of

    def held(model):
        beside = {
            f"{number} {name}": tensor.tolist()
            for number, part in enumerate(projections(model))
            for name, tensor in part.state_dict().items()
        }
        return {**digest_of(model).tensors, **beside}

    join()
    options = {"runner": "pooling"}
    theirs = [held(load(path, options)[0]) for path in stops]
    model, config = load(stops[0], {**options, "load_format": "hotweights"})
    worker = SimpleNamespace(get_model=lambda: model, vllm_config=config, model_config=config.model_config)
    found = []
    for path, wanted in zip(stops, theirs, strict=True):
        report = _updated(worker, Ranks(), path, None, timeout=20.0, keys=None, insecure=False)
        ours = held(model)
        odd = [key for key in {**ours, **wanted} if ours.get(key) != wanted.get(key)]
        found.append((odd, len(wanted), any("Dense" in warning for warning in report.warnings)))
    return found


def test_embedding_models(zoo):
    """Their Dense layers lie beside the model. They have no head, and one that comes is not written over anything."""
    paths = variants(zoo)
    a, b = (with_dense_layers(paths[weights], seed) for seed, weights in enumerate("AB"))
    dense = zoo.run(embedding_models, None, [a, b, a])
    plain = zoo.run(embedding_models, None, [paths["A"], paths["B-other"], paths["A"]])
    assert [odd for odd, *_ in (*dense, *plain)] == [[]] * 6
    assert [count - dense[0][1] for _, count, _ in plain] == [-4] * 3, "each of two poolers has a weight and a bias"
    assert [warned for *_, warned in dense] == [False] * 3
    _, (kept, _, warned) = zoo.run(embedding_models, None, [a, paths["B"]])
    assert (kept, warned) == (["0 0.weight", "0 0.bias", "1 0.weight", "1 0.bias"], True)


def held_of_each(paths):
    """The digests of models that are loaded from these, and of the first when it is updated to each."""
    import torch
    from test_loading import join, load

    from hotweights.engines.vllm.attached import as_loaded, attached
    from hotweights.engines.vllm.loader import checkpoint

    join()
    first, config = load(paths[0], {"load_format": "hotweights"})
    live = attached(first)
    found = [live.digest().whole]
    for path in paths[1:]:
        other, _ = load(path, {"load_format": "hotweights"})
        with as_loaded(first, config), torch.no_grad():
            live.update(checkpoint(path))
        found += [attached(other).digest().whole, live.digest().whole]
    return found


def test_files_that_no_index_names(zoo):
    """vLLM takes all of them together, and ``.pt`` where there is nothing else."""
    paths = variants(zoo)
    tensors = torch.load(Path(paths["A-bin"]) / "pytorch_model.bin")
    names = sorted(tensors)
    parts = {"b": names[::2], "a": names[1::2]}
    shapes = {"-two": ("safetensors", save_file), "-bins": ("bin", torch.save), "-pt": ("pt", torch.save)}
    made = []
    for kind, (suffix, save) in shapes.items():
        path = Path(paths["A"] + kind)
        path.mkdir(exist_ok=True)
        shutil.copy(Path(paths["A"]) / "config.json", path)
        for part, keys in {"all": names}.items() if suffix == "pt" else parts.items():
            save({key: tensors[key] for key in keys}, path / f"{part}.{suffix}")
        made.append(str(path))
    assert len({*zoo.run(held_of_each, None, [paths["A"], *made])}) == 1


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
