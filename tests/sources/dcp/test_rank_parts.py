"""Safetensors in which each rank wrote its parts of tensors, by torch's HuggingFaceStorageWriter: read, and refused."""

import json
import os
import re
import shutil
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from dcp_saved import InParts, save_rank_parts
from safetensors import safe_open
from safetensors.torch import save_file

import hotweights as hw
from hotweights.memory.pool import Pool
from hotweights.sources.contracts import Read
from hotweights.testing import assert_same_bits

TENSORS = {"w": torch.arange(24.0).view(6, 4), "b": torch.arange(6.0), "s": torch.tensor(1.0)}


def cut():
    return TENSORS | {"w": InParts(TENSORS["w"], ([2, 4], []))}


@pytest.fixture
def folder(tmp_path):
    return save_rank_parts(tmp_path / "ck", cut(), 3)


def part(folder, number):
    return folder / f"shard-{number:05}-model-00001-of-00001.safetensors"


def rewritten(path, edit):
    """The part with other tensors, or another header."""
    with safe_open(path, "pt") as file:
        tensors, texts = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    edit(tensors, texts)
    save_file(tensors, path, texts)


def refused(path, *patterns, **options):
    with pytest.raises(hw.CheckpointError) as caught:
        hw.open(path, **options).close()
    for pattern in patterns:
        assert re.search(pattern, str(caught.value)), str(caught.value)
    return caught.value


def theirs(folder):
    """What torch's own reader loads."""
    state = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
    return state


def test_it_holds_what_torch_loads(folder):
    with hw.open(folder) as source:
        assert_same_bits(dict(source.tensors()), theirs(folder))
        assert len(source.files) == 3
        assert not source.warnings


def test_a_live_model_is_updated_from_it(folder, tmp_path):
    def linear(state):
        return {"weight": state["w"], "bias": state["b"]}

    live = hw.LiveModel(torch.nn.Linear(4, 6))
    live.load(save_rank_parts(tmp_path / "a", linear(cut()), 3))
    assert_same_bits(live.model.state_dict(), linear(TENSORS))
    save_rank_parts(tmp_path / "b", {"weight": InParts(-TENSORS["w"], ([3], [1])), "bias": -TENSORS["b"]}, 4)
    report = live.update(tmp_path / "b")
    assert_same_bits(live.model.state_dict(), linear({name: -tensor for name, tensor in TENSORS.items()}))
    assert report.bytes_read == 30 * 4
    os.remove(part(tmp_path / "a", 2))
    with pytest.raises(hw.UpdateAborted, match=r"its parts hold 16 of its 24 elements"):
        live.update(tmp_path / "a")
    assert (live.model.weight == -TENSORS["w"]).all()


def test_only_the_rows_that_are_asked_for_are_read(folder):
    rows = torch.zeros(3, 4)
    with hw.open(folder) as source, Pool() as pool:
        assert source.read([Read("w", 16, 48, rows)], pool=pool)["buffered"] == 48
    assert torch.equal(rows, TENSORS["w"][1:4])


def test_a_list_of_them_from_several_disks(folder, tmp_path):
    (tmp_path / "other").mkdir()
    moved = shutil.move(part(folder, 3), tmp_path / "other")
    with hw.open([part(folder, 1), part(folder, 2), moved]) as source:
        assert_same_bits(dict(source.tensors()), TENSORS)
    refused([part(folder, 1), moved], r"'w': its parts hold 16 of its 24", r"no shard-00002-\*; was it copied")


def test_beside_the_whole_files_that_were_made_of_them(tmp_path):
    place = save_rank_parts(tmp_path / "ck", cut(), 3, enable_consolidation=True)
    with hw.open(place, subfolder="sharded") as source:
        assert_same_bits(dict(source.tensors()), TENSORS)
    with hw.open(place) as source:
        found = dict(source.tensors())
    found["s"] = TENSORS["s"]  # torch 2.13 puts scalars together as zeros.
    assert_same_bits(found, TENSORS)


def test_a_missing_rank(folder):
    os.remove(part(folder, 2))
    refused(folder, r"tensor 'w': its parts hold 16 of its 24 elements", r"there is no shard-00002-\*")


def test_the_last_ranks_are_missing_which_no_file_can_tell(folder):
    os.remove(part(folder, 3))
    model = torch.nn.Linear(4, 6)
    before = model.weight.detach().clone()
    with pytest.raises(hw.PlanError, match=r"\[6, 4\]"):
        hw.load(model, folder, rename={"w": "weight", "b": "bias"}, allow_unexpected="*")
    assert torch.equal(model.weight, before)


def test_a_rank_that_had_nothing_to_write(tmp_path):
    place = save_rank_parts(tmp_path / "ck", {"w": cut()["w"]}, 3)
    os.rename(part(place, 3), part(place, 5))
    with hw.open(place) as source:
        assert_same_bits(dict(source.tensors()), {"w": TENSORS["w"]})
        assert "there is no shard-00003-*, shard-00004-*" in source.warnings[0]


def test_two_ranks_that_wrote_the_same(folder):
    shutil.copy(part(folder, 2), part(folder, 4))
    refused(folder, r"tensor 'w': its part \[2, 4\] at \[2, 0\] and its part \[2, 4\] at \[2, 0\] overlap")


def test_parts_of_two_dtypes(folder):
    rewritten(part(folder, 2), lambda tensors, _: tensors.update(w=tensors["w"].half()))
    refused(folder, r"tensor 'w': is torch.float32 of 2 dimensions in .*00001.*, and torch.float16 of 2 in ")


@pytest.mark.parametrize(
    ("said", "pattern"),
    [
        (None, "has no DCP_SHARDING_INFO in its header"),
        ("no JSON", "DCP_SHARDING_INFO does not say where its parts begin"),
        ({"w": [2, 0]}, "DCP_SHARDING_INFO does not say where its parts begin"),
        ({}, "tensor 'w': DCP_SHARDING_INFO does not say where this part begins"),
        ({"w": {"saved_offsets": [2]}}, r"tensor 'w': its part \[2, 4\] cannot begin at \[2\]"),
        ({"w": {"saved_offsets": [-2, 0]}}, r"tensor 'w': its part \[2, 4\] cannot begin at \[-2, 0\]"),
        ({"w": {"saved_offsets": [2**62, 0]}}, r"its parts hold 24 of its"),
    ],
)
def test_what_a_header_says(folder, said, pattern):
    def edit(tensors, texts):
        texts.pop("DCP_SHARDING_INFO")
        for name in tensors.keys() - {"w"}:
            del tensors[name]
        if said is not None:
            texts["DCP_SHARDING_INFO"] = said if isinstance(said, str) else json.dumps(said)

    rewritten(part(folder, 2), edit)
    refused(folder, "shard-00002|'w'", pattern)


def test_a_part_that_is_cut_off(folder):
    os.truncate(part(folder, 3), part(folder, 3).stat().st_size - 4)
    refused(folder, r"shard-00003.*: tensor '\w': ends at byte \d+ of the data; the file holds \d+; is it truncated")


def test_a_part_that_changes_while_it_is_read(folder):
    with hw.open(folder) as source:
        shutil.copy(part(folder, 1), folder / "new")
        os.replace(folder / "new", part(folder, 1))
        with pytest.raises(hw.CheckpointChanged):
            dict(source.tensors())


def test_another_reader(folder):
    error = refused(folder, "each rank of a trainer wrote its parts", reader="safetensors")
    with eval(str(error).rpartition("; ")[2].removesuffix(" does so"), {"hotweights": hw}) as source:
        assert_same_bits(dict(source.tensors()), TENSORS)


def test_a_run_is_followed_by_a_marker(folder):
    with hw.follow(folder.parent, interval=0.001, timeout=0.05) as versions:
        assert list(versions) == []
        assert 'marker="DONE"' in versions.passed_over["ck"]
    (folder / "DONE").touch()
    with hw.follow(folder.parent, interval=0.001, marker="DONE") as versions, hw.open(next(versions)) as source:
        assert_same_bits(dict(source.tensors()), TENSORS)
