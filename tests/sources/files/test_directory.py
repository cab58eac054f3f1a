"""Directories as the hub and tools leave them: what ``from_pretrained`` opens, opens, with the same values."""

import json
import os
import pathlib
import re
import resource
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import hotweights  # noqa: F401  # What errors advise begins with it.
import hotweights as hw
from hotweights.errors import CheckpointError, PlanError, UpdateAborted, UsageError
from hotweights.testing import assert_same_bits, write_safetensors

transformers = pytest.importorskip("transformers")

INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
CONFIG = {"vocab_size": 8, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 4}


@pytest.fixture(scope="module")
def bert():
    """A tiny model of transformers, and its state."""
    config = transformers.BertConfig(**CONFIG, max_position_embeddings=4)
    return config, transformers.BertModel(config).state_dict()


class Directory:
    """A directory in which all tensors of one file have one value, so that a tensor tells where it came from."""

    def __init__(self, path, config, state):
        self.path = path
        self.state = state
        self.names = list(state)
        config.save_pretrained(path)

    def filled(self, value, names=None):
        return {name: torch.full_like(self.state[name], value) for name in (names or self.names)}

    def file(self, name, value, names=None):
        save_file(self.filled(value, names), self.path / name, metadata={"format": "pt"})

    def shards(self, value, *, total=2, variant="", index=INDEX, legacy=False):
        """Shards whose values are ``value``, and an index that names them."""
        weight_map = {}
        for number in range(total):
            numbers = f"-{number + 1:05}-of-{total:05}"
            name = f"model{numbers}{variant}.safetensors" if legacy else f"model{variant}{numbers}.safetensors"
            mine = self.names[number::total]
            self.file(name, value, mine)
            weight_map |= dict.fromkeys(mine, name)
        if index:
            self.index(weight_map, index)

    def index(self, weight_map, name=INDEX):
        (self.path / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


@pytest.fixture
def directory(bert, tmp_path):
    return Directory(tmp_path / "model", *bert)


def value_of(tensors):
    (value,) = {float(value) for tensor in tensors.values() for value in tensor.detach().float().unique()}
    return value


def opened(path, **options):
    """What lies there, and what is warned of."""
    with hw.open(path, **options) as source:
        return dict(source.tensors()), source.warnings


def theirs(path, **options):
    return transformers.BertModel.from_pretrained(path, **options).state_dict()


def refused(path, **options):
    with pytest.raises(CheckpointError) as error:
        hw.open(path, **options)
    return error.value


# --- with transformers -----------------------------------------------------------------------------------------------


def whole_and_index(there):
    there.file("model.safetensors", 1)
    there.index(dict.fromkeys(there.names, "model.safetensors"))


def whole_and_shards(there):
    there.file("model.safetensors", 1)
    there.shards(2)


def shards_and_consolidated(there):
    there.shards(1)
    there.file("consolidated.safetensors", 2)
    there.file("consolidated-00001-of-00002.safetensors", 3)
    there.index(
        dict.fromkeys(there.names, "consolidated-00001-of-00002.safetensors"), "consolidated.safetensors.index.json"
    )


def all_that_tools_put_beside(there):
    there.file("model.safetensors", 1)
    names = "consolidated adapter_model pytorch_lora_weights optimizer optimizer_1 scheduler random_states_0 model.fp16"
    for number, name in enumerate(names.split()):
        there.file(f"{name}.safetensors", 2 + number)
    for name in ("._model.safetensors", ".DS_Store", "training_args.bin", "optimizer.pt", "pytorch_model.bin"):
        (there.path / name).write_bytes(b"no weights")
    (there.path / "original").mkdir()
    there.file("original/model.safetensors", 9)


def leftover_shards(there):
    there.shards(2, total=3)
    there.shards(1, total=2)


def a_stale_index_of_shards_that_are_gone(there):
    there.shards(2)
    (there.path / TWO).unlink()
    there.file("model.safetensors", 1)


def half_downloaded(there):
    there.file("model.safetensors", 1)
    (there.path / "model-00001-of-00002.safetensors.incomplete").write_bytes(b"x")
    (there.path / "model.safetensors.tmp").write_bytes(b"x")


def said_by_config(there):
    config = json.loads((there.path / "config.json").read_text())
    (there.path / "config.json").write_text(json.dumps(config | {"transformers_weights": "mine.safetensors"}))
    there.file("mine.safetensors", 1)
    there.file("model.safetensors", 2)


AS_TRANSFORMERS = {
    whole_and_index: None,
    whole_and_shards: rf"passed over {ONE}, {TWO}, {INDEX}",
    shards_and_consolidated: None,
    all_that_tools_put_beside: None,
    leftover_shards: r"passed over model-00001-of-00003.*, model-00003-of-00003",
    a_stale_index_of_shards_that_are_gone: f"passed over {ONE}, {INDEX}",
    half_downloaded: r"passed over model-00001-of-00002.safetensors.incomplete, model.safetensors.tmp",
    said_by_config: None,
}


@pytest.mark.parametrize("make", AS_TRANSFORMERS, ids=lambda make: make.__name__)
def test_what_from_pretrained_opens(directory, make):
    make(directory)
    tensors, warnings = opened(directory.path)
    assert tensors.keys() == directory.state.keys()
    assert value_of(tensors) == value_of(theirs(directory.path)) == 1
    pattern = AS_TRANSFORMERS[make]
    assert len(warnings) == (pattern is not None)
    if pattern:
        assert re.search(pattern, warnings[0]), warnings
    model = transformers.BertModel(transformers.BertConfig(**CONFIG, max_position_embeddings=4))
    report = hw.load(model, directory.path)
    assert value_of(model.state_dict()) == 1
    assert report.warnings == warnings


@pytest.mark.parametrize("kind", ["whole", "shards", "shards of old"])
def test_a_variant(directory, kind):
    if kind == "whole":
        directory.file("model.fp16.safetensors", 1)
    else:
        old = kind == "shards of old"
        index = "model.safetensors.fp16.index.json" if old else "model.safetensors.index.fp16.json"
        directory.shards(1, variant=".fp16", index=index, legacy=old)
    tensors, warnings = opened(directory.path)  # Only one is there.
    assert (value_of(tensors), warnings) == (1, ())
    directory.file("model.safetensors", 2)
    assert value_of(opened(directory.path)[0]) == value_of(theirs(directory.path)) == 2
    tensors, warnings = opened(directory.path, variant="fp16")
    assert (value_of(tensors), warnings) == (1, ())
    if kind != "shards of old":
        assert value_of(theirs(directory.path, variant="fp16")) == 1
    error = refused(directory.path, variant="bf16")
    assert 'give variant="fp16" or no variant=' in str(error)


def test_several_variants_and_none_without(directory):
    directory.file("model.fp16.safetensors", 1)
    directory.file("model.bf16.safetensors", 2)
    assert 'variant="bf16" or variant="fp16"' in str(refused(directory.path))
    assert value_of(opened(directory.path, variant="bf16")[0]) == 2


def test_what_is_saved_by_transformers(tmp_path):
    config = transformers.BertConfig(**CONFIG | {"vocab_size": 400}, max_position_embeddings=4)
    model = transformers.BertModel(config)
    state = model.state_dict()
    model.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="1KB")
    model.save_pretrained(tmp_path / "fp16", max_shard_size="1KB", variant="fp16")
    assert (tmp_path / "fp16" / "model.safetensors.index.fp16.json").exists()
    for folder, options in {"plain": {}, "sharded": {}, "fp16": {"variant": "fp16"}}.items():
        assert_same_bits(opened(tmp_path / folder, **options)[0], dict(state))


# --- an index decides ------------------------------------------------------------------------------------------------


def test_a_tensor_that_the_index_does_not_name_is_taken_as_from_pretrained_takes_it(directory):
    directory.shards(1)
    more = directory.names[3]
    index = json.loads((directory.path / INDEX).read_text())["weight_map"]
    del index[more]
    directory.index(index)
    tensors, (warning,) = opened(directory.path)
    assert f"does not name {more}" in warning
    assert_same_bits(tensors, dict(theirs(directory.path)))


def test_a_tensor_in_two_shards_is_the_one_that_the_index_names(directory):
    """``from_pretrained`` takes it from the last file, whatever the index says."""
    directory.shards(1)
    twice = directory.names[4]  # In ONE, between two that are in it alone.
    save_file(directory.filled(1, directory.names[1::2]) | directory.filled(2, [twice]), directory.path / TWO)
    for home, value in ((ONE, 1), (TWO, 2)):
        index = json.loads((directory.path / INDEX).read_text())["weight_map"] | {twice: home}
        directory.index(index)
        with hw.open(directory.path) as source:
            (warning,) = source.warnings
            assert f"{twice} lie in several" in warning
            assert Path(source.file_of(twice)).name == home
            for read in (dict(source.tensors()), {lease.name: lease.own() for lease in source.leases()}):
                assert value_of({twice: read.pop(twice)}) == value
                assert value_of(read) == 1
        with pytest.raises(CheckpointError, match='reader="hotweights" can'):
            hw.open(directory.path, reader="safetensors")


def test_what_the_shards_hold_beyond_the_index_can_be_allowed(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", {"weight": torch.ones(2, 2), "extra": torch.ones(1)})
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"weight": "a.safetensors"}}))
    model = torch.nn.Linear(2, 2, bias=False)
    with pytest.raises(PlanError, match=r"extra: unexpected; .* \(in a\.safetensors\)"):
        hw.load(model, tmp_path)
    assert "does not name extra" in str(hw.load(model, tmp_path, allow_unexpected="extra"))


def test_a_tensor_that_is_taken_from_another_file_leaves_a_gap(tmp_path):
    """Neighbours are read at once; what lies between them is not theirs."""
    tensors = {name: torch.randn(3) for name in "abc"}
    write_safetensors(tmp_path / "one.safetensors", tensors | {"b": torch.zeros(3)})
    write_safetensors(tmp_path / "two.safetensors", {"b": tensors["b"]})
    index = {"weight_map": {name: "two.safetensors" if name == "b" else "one.safetensors" for name in tensors}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    with hw.open(tmp_path) as source:
        assert_same_bits(dict(source.tensors()), tensors)
        assert_same_bits({lease.name: lease.own() for lease in source.leases()}, tensors)


# --- other names -----------------------------------------------------------------------------------------------------

STATE = {"weight": torch.ones(2, 2)}


def written(place, *names):
    for number, name in enumerate(names):
        (place / name).parent.mkdir(exist_ok=True, parents=True)
        write_safetensors(place / name, {"weight": torch.full((2, 2), float(number))})
    return place


ALONE = ["consolidated.safetensors", "adapter_model.safetensors", "optimizer.safetensors", "v1.5-pruned.safetensors"]


@pytest.mark.parametrize("name", [*ALONE, "model.fp16.safetensors", "unet.safetensors", "weights.00.safetensors"])
def test_what_lies_alone_is_opened(tmp_path, name):
    assert opened(written(tmp_path, name))[1] == ()


def test_adapters_and_states_are_no_candidates_beside_other_weights(tmp_path):
    written(
        tmp_path,
        "unet.safetensors",
        "adapter_model.safetensors",
        "optim.safetensors",
        "consolidated.safetensors",
    )
    assert value_of(opened(tmp_path)[0]) == 0


def test_files_that_a_number_tells_apart_are_one_checkpoint(tmp_path):
    for number in range(3):
        write_safetensors(tmp_path / f"weights.{number:02}.safetensors", {f"layers.{number}": torch.ones(1)})
    assert len(opened(tmp_path)[0]) == 3


def test_several_checkpoints_are_named_with_what_to_type(tmp_path):
    """Each advice is followed."""
    written(tmp_path, "a.safetensors", "b.safetensors")
    for name in ("1-of-2", "2-of-2", "1-of-3", "2-of-3", "3-of-3"):
        write_safetensors(tmp_path / f"c-{name}.safetensors", {name: torch.ones(1)})
    error = refused(tmp_path)
    assert [len(opened_by(problem)) for problem in error.problems] == [1, 1, 2, 3]
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    for name in ("1-of-2", "2-of-2", "1-of-3", "2-of-3", "3-of-3"):
        write_safetensors(tmp_path / f"model-{name}.safetensors", {name: torch.ones(1)})
    assert [len(opened_by(problem)) for problem in refused(tmp_path).problems] == [2, 3]


def opened_by(problem):
    code = problem[problem.index("hotweights.open(") :]
    with eval(code, {"hotweights": hw, "pathlib": pathlib}) as source:
        return dict(source.tensors())


def test_an_index_by_another_name_speaks_for_its_files(tmp_path):
    written(tmp_path, "model-00001-of-00001.safetensors")
    index = {"weight_map": {"weight": "model-00001-of-00001.safetensors"}}
    (tmp_path / "unet.safetensors.index.json").write_text(json.dumps(index))
    with hw.open(tmp_path) as source:
        assert source.warnings == ()
        assert source._checkpoint.index.path.endswith("unet.safetensors.index.json")


def test_a_download_that_has_not_ended(tmp_path):
    written(tmp_path, ONE)
    (tmp_path / f"{TWO}.incomplete").write_bytes(b"x")
    assert f"its download has not ended: {TWO}.incomplete" in str(refused(tmp_path))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"weight": ONE, "bias": TWO}}))
    assert f"its download has not ended: {TWO}.incomplete" in str(refused(tmp_path))
    for name in (ONE, INDEX):
        (tmp_path / name).unlink()
    assert "the download of" in str(refused(tmp_path))
    written(tmp_path, "model.safetensors")
    (tmp_path / "model.safetensors.aria2").write_bytes(b"x")
    assert "aria2 has not downloaded it" in str(refused(tmp_path))


# --- folders ---------------------------------------------------------------------------------------------------------


def test_a_pipeline_and_its_parts(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    sizes = {"in_channels": 4, "out_channels": 4, "block_out_channels": (4,), "norm_num_groups": 2}
    vae = diffusers.AutoencoderKL(**sizes, latent_channels=2, sample_size=4)
    for folder in ("vae", "refiner"):
        vae.save_pretrained(tmp_path / folder)
        vae.half().save_pretrained(tmp_path / folder, variant="fp16")
        vae.float()
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "model_index.json").write_text('{"_class_name": "P", "vae": ["diffusers", "AutoencoderKL"]}')
    error = str(refused(tmp_path))
    assert 'a pipeline of several models; choose one: subfolder="refiner" or subfolder="vae"' in error
    for options in ({}, {"variant": "fp16"}):
        theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path, subfolder="vae", **options).state_dict()
        ours, warnings = opened(tmp_path, subfolder="vae", **options)
        assert_same_bits({name: tensor.float() for name, tensor in ours.items()}, dict(theirs))
        assert warnings == ()
        model = diffusers.AutoencoderKL(**sizes, latent_channels=2, sample_size=4)
        hw.load(model, tmp_path, subfolder="vae", **options)
        assert_same_bits(dict(model.state_dict()), dict(theirs))
    written(tmp_path, "sd.safetensors")
    assert f"or open {tmp_path / 'sd.safetensors'} itself" in str(refused(tmp_path))


def test_diffusers_takes_its_index_first(tmp_path):
    written(tmp_path, "diffusion_pytorch_model.safetensors", "shard.safetensors")
    index = {"weight_map": {"weight": "shard.safetensors"}}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    tensors, (warning,) = opened(tmp_path)
    assert value_of(tensors) == 1
    assert "passed over diffusion_pytorch_model.safetensors" in warning


def test_a_folder_of_folders(tmp_path):
    written(tmp_path, "checkpoint-1/model.safetensors", "checkpoint-2/model.safetensors")
    assert 'choose one: subfolder="checkpoint-1" or subfolder="checkpoint-2"' in str(refused(tmp_path))
    assert 'subfolder="checkpoint-1"' in str(refused(tmp_path, subfolder="checkpoint-3"))
    assert value_of(opened(tmp_path, subfolder="checkpoint-2")[0]) == 1
    live = hw.LiveModel(torch.nn.Linear(2, 2, bias=False))
    live.load(tmp_path, subfolder="checkpoint-1")
    live.update(tmp_path, subfolder="checkpoint-2")
    assert value_of(live.model.state_dict()) == 1


@pytest.mark.parametrize("options", [{"variant": "fp16"}, {"subfolder": "vae"}])
def test_only_directories_have_variants_and_folders(tmp_path, options):
    file = written(tmp_path, "model.safetensors") / "model.safetensors"
    model = torch.nn.Linear(2, 2, bias=False)
    with hw.open(file) as source:
        for what in (file, [file], STATE, source):
            for take in (hw.load, lambda model, what, **o: hw.LiveModel(model).load(what, **o)):
                with pytest.raises(UsageError, match="leave them out"):
                    take(model, what, **options)
    for wrong in ({"variant": 16}, {"subfolder": Path("vae")}):
        with pytest.raises(UsageError):
            hw.open(tmp_path, **wrong)


# --- a list of files -------------------------------------------------------------------------------------------------


def test_a_list_of_files_is_a_source(tmp_path):
    for name in ("weight", "bias"):
        write_safetensors(tmp_path / f"{name}.safetensors", {name: torch.ones((2, 2) if name == "weight" else 2)})
    files = [tmp_path / "weight.safetensors", str(tmp_path / "bias.safetensors")]
    for what in (files, tuple(files), [*files, files[0]]):
        model = torch.nn.Linear(2, 2)
        hw.load(model, what)
        assert value_of(model.state_dict()) == 1
    live = hw.LiveModel(torch.nn.Linear(2, 2))
    live.load(files)
    live.update(files)
    routed = torch.nn.Linear(2, 2)
    hw.route(files, [hw.Component("", routed)])
    assert value_of(routed.state_dict()) == 1
    with hw.open(files, reader="safetensors") as source:
        assert len(source.files) == 2
        assert "1 more" in repr(source)
    with pytest.raises(CheckpointError, match="nowhere"):
        hw.open([*files, tmp_path / "nowhere.safetensors"])
    with pytest.raises(UsageError, match="a list of paths"):
        hw.open([])


# --- addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["ftp", "file"])
def test_an_address_is_refused_as_it_was_written(scheme):
    address = f"{scheme}://bucket/model"
    for what in (address, Path(address), [address]):
        with pytest.raises(UsageError, match=address):
            hw.open(what)
    with pytest.raises(UsageError, match=address):
        hw.load(torch.nn.Linear(1, 1), address)


@pytest.mark.parametrize("scheme", ["s3", "gs", "az", "http", "https"])
def test_an_address_without_the_package_for_it(scheme, monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    for what in (f"{scheme}://bucket/model", Path(f"{scheme}://bucket/model")):
        with pytest.raises(hw.MissingPackage, match=r"'obstore': pip install 'hotweights\[cloud\]'"):
            hw.open(what)


def test_an_address_of_a_sender():
    with pytest.raises(UsageError, match=r"hotweights\.Receiver\('unix:/run/x'\)"):
        hw.open("unix:/run/x")


# --- problems name files ---------------------------------------------------------------------------------------------


def test_a_problem_names_the_file(tmp_path):
    shapes = {"weight": (3, 3), "other: name": (1,)}
    for number, (name, shape) in enumerate(shapes.items(), 1):
        write_safetensors(tmp_path / f"model-{number}-of-2.safetensors", {name: torch.ones(shape)})
    model = torch.nn.Linear(2, 2, bias=False)
    with pytest.raises(PlanError) as error:
        hw.load(model, tmp_path)
    first, second = error.value.problems
    assert first.endswith("(in model-2-of-2.safetensors)")
    assert second.endswith("(in model-1-of-2.safetensors)")
    assert first in str(error.value)
    live = hw.LiveModel(model)
    with pytest.raises(PlanError, match=r"in .*model-1-of-2"):
        live.load(tmp_path)
    live.load({"weight": torch.ones(2, 2)})
    with pytest.raises(UpdateAborted, match=r"in .*model-1-of-2"):
        live.update(tmp_path)
    with pytest.raises(PlanError) as error:
        hw.load(model, {"weight": torch.ones(3, 3)})
    assert "(in " not in str(error.value)


# --- few descriptors -------------------------------------------------------------------------------------------------


@pytest.fixture
def few_descriptors():
    """``ulimit -n``, so that about forty are left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 40, hard))
    yield used + 40
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("io", ["auto", "buffered", "direct"])
def test_more_files_than_descriptors(tmp_path, few_descriptors, io):
    count = 200
    for number in range(count):
        tensors = {f"{number}.weight": torch.full((4, 4), float(number))}
        write_safetensors(tmp_path / f"model-{number + 1:05}-of-{count:05}.safetensors", tensors)
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4, bias=False) for _ in range(count)))
    before = len(os.listdir("/proc/self/fd"))
    with hw.open(tmp_path) as source:
        hw.load(model, source, io=io, threads=4)
        assert all(value_of({"": layer.weight}) == number for number, layer in enumerate(model))
        assert len(os.listdir("/proc/self/fd")) <= before + few_descriptors // 2  # Direct reads need a second one.
        first = tmp_path / f"model-00001-of-{count:05}.safetensors"
        (tmp_path / "new").write_bytes(first.read_bytes())
        os.replace(tmp_path / "new", first)
        with pytest.raises(hw.CheckpointChanged, match="was replaced"):
            hw.load(model, source, io=io)


def test_a_file_that_went_away_while_its_descriptor_was_lent(tmp_path, few_descriptors):
    count = 100
    for number in range(count):
        write_safetensors(tmp_path / f"layers-{number}.safetensors", {f"{number}": torch.ones(2)})
    with hw.open(tmp_path) as source:
        (tmp_path / "layers-0.safetensors").unlink()
        with pytest.raises(hw.CheckpointChanged, match=r"layers-0.*went away"):
            dict(source.tensors())


def test_of_many_checkpoints_in_a_folder_one_is_named(tmp_path):
    for number in range(30):
        hw.save({"weight": torch.ones(2)}, tmp_path / f"night-{number:02}")
    told = str(refused(tmp_path))
    assert f"30 folders in it hold weights; open one of them by its own path, such as {tmp_path}/night-" in told
    assert f"or list all: hotweights inspect {tmp_path}/*" in told
