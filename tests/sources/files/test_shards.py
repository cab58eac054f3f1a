"""Which files make up a checkpoint, and everything that can be wrong between them."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from broken_files import LYING_INDEXES
from safetensors.torch import load_file

import hotweights as hw
from hotweights.errors import CheckpointError
from hotweights.testing import assert_same_bits, write_checkpoint, write_safetensors

TENSORS = {f"layers.{number}.weight": torch.randn(3, 5) for number in range(7)} | {"scale": torch.tensor(2.0)}
INDEX = "model.safetensors.index.json"
ONE, TWO, THREE = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))


@pytest.fixture(autouse=True)
def no_descriptor_is_left():
    before = descriptors()
    yield
    assert descriptors() == before


def descriptors():
    """What this process has open, without the descriptor that lists it."""
    descriptors = []
    for fd in os.listdir("/proc/self/fd"):
        if os.path.exists(f"/proc/self/fd/{fd}") or os.path.islink(f"/proc/self/fd/{fd}"):
            descriptors.append((fd, os.readlink(f"/proc/self/fd/{fd}")))
    return sorted(descriptors)


@pytest.fixture
def shards(tmp_path):
    """A sound checkpoint of three files and an index."""
    return write_checkpoint(tmp_path / "checkpoint", TENSORS, shards=3)


def edit_index(directory, change):
    path = directory / INDEX
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def assert_holds(path, expected, files=None):
    with hw.open(path) as source:
        assert_same_bits(dict(source.tensors()), expected)
        if files is not None:
            assert [Path(file).name for file in source.files] == files


def refused(path):
    with pytest.raises(CheckpointError) as error:
        hw.open(path)
    return error.value


# --- what is a checkpoint --------------------------------------------------------------------------------------------


def test_a_file_a_directory_and_an_index(shards, tmp_path):
    write_safetensors(tmp_path / "any.name", TENSORS)
    assert_holds(tmp_path / "any.name", TENSORS, ["any.name"])
    assert_holds(str(tmp_path / "any.name"), TENSORS)
    assert_holds(shards, TENSORS, [ONE, TWO, THREE])
    assert_holds(shards / INDEX, TENSORS, [ONE, TWO, THREE])
    (shards / INDEX).rename(shards / "other.index.json")
    assert_holds(shards / "other.index.json", TENSORS, [ONE, TWO, THREE])


def test_files_without_an_index(shards):
    (shards / INDEX).unlink()
    assert_holds(shards, TENSORS, [ONE, TWO, THREE])
    write_safetensors(shards / "extra.safetensors", extra := {"extra": torch.zeros(2)})
    assert_holds(shards, TENSORS, [ONE, TWO, THREE])
    assert_holds(sorted(shards.glob("*.safetensors")), TENSORS | extra, ["extra.safetensors", ONE, TWO, THREE])


def test_files_without_an_index_are_all_there(shards):
    """A copy that was interrupted, ``rsync`` for example: the names say how many files there are."""
    (shards / INDEX).unlink()
    (shards / TWO).unlink()
    assert re.search(
        rf"1 of 3 files are absent, {TWO};.* To read a part of it, open {shards / ONE}", str(refused(shards))
    )
    (shards / THREE).unlink()
    assert f"2 of 3 files are absent, {TWO}, {THREE};" in str(refused(shards))
    part = shards / ONE  # As the error says.
    assert_holds(part, {name: TENSORS[name] for name in list(TENSORS)[::3]}, [ONE])


def test_numbers_of_files_that_count_from_zero(tmp_path):
    write_safetensors(tmp_path / "part-0-of-2.safetensors", {"a": torch.zeros(2)})
    assert "1 of 2 files are absent, part-1-of-2.safetensors;" in str(refused(tmp_path))
    write_safetensors(tmp_path / "part-1-of-2.safetensors", {"b": torch.zeros(2)})
    assert_holds(tmp_path, {"a": torch.zeros(2), "b": torch.zeros(2)})


def test_a_number_of_files_that_nobody_has(tmp_path):
    """It is a name, and anybody may have written it: it costs no time and no memory."""
    write_safetensors(tmp_path / f"a-1-of-{10**30}.safetensors", {"a": torch.zeros(2)})
    error = str(refused(tmp_path))
    assert f"{10**30 - 1} of {10**30} files are absent" in error
    assert f"and {10**30 - 6} more" in error
    (tmp_path / f"a-1-of-{10**30}.safetensors").rename(tmp_path / "a-7-of-1.safetensors")
    assert_holds(tmp_path, {"a": torch.zeros(2)})


def test_an_index_by_another_name(shards):
    (shards / INDEX).rename(shards / "unet.safetensors.index.json")
    assert_holds(shards, TENSORS)


def test_several_indexes(shards):
    shutil.copy(shards / INDEX, shards / "a.safetensors.index.json")
    assert_holds(shards, TENSORS)  # The one that everybody takes.
    shutil.copy(shards / INDEX, shards / "b.safetensors.index.json")
    (shards / INDEX).unlink()
    error = refused(shards)
    assert all(word in str(error) for word in ("a.safetensors.index.json", "b.safetensors.index.json", "several"))
    assert_holds(shards / "a.safetensors.index.json", TENSORS)


def test_an_index_may_lead_into_folders_and_name_a_file_twice(shards):
    (shards / "sub").mkdir()
    (shards / TWO).rename(shards / "sub" / TWO)

    def change(weight_map):
        for number, (name, shard) in enumerate(sorted(weight_map.items())):
            weight_map[name] = f"sub/{TWO}" if shard == TWO else f"./{shard}" if number % 2 else shard

    edit_index(shards, change)
    assert_holds(shards, TENSORS)


def test_a_relative_path_survives_a_change_of_directory(shards, monkeypatch, tmp_path):
    monkeypatch.chdir(shards)
    with hw.open(ONE) as source:
        monkeypatch.chdir(tmp_path)
        assert_same_bits(dict(source.tensors()), load_file(shards / ONE))


def test_home_is_found(shards, monkeypatch):
    monkeypatch.setenv("HOME", str(shards.parent))
    assert_holds("~/checkpoint", TENSORS)


# --- a hub cache -----------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(shards, tmp_path):
    """``models--org--name`` as huggingface_hub lays it out: blobs, snapshots of links, refs."""
    root = tmp_path / "models--org--name"
    snapshot = root / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    for number, file in enumerate(sorted(shards.iterdir())):
        file.rename(root / "blobs" / f"{number:064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064x}")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("abc123")
    return root


def test_a_snapshot_of_links(cache):
    snapshot = cache / "snapshots" / "abc123"
    assert_holds(snapshot, TENSORS, [ONE, TWO, THREE])
    assert_holds(snapshot / INDEX, TENSORS, [ONE, TWO, THREE])
    assert_holds(snapshot / ONE, load_file(snapshot / ONE), [ONE])


def test_the_root_of_a_cache_is_known_from_inside_too(cache, monkeypatch):
    monkeypatch.chdir(cache)
    assert_holds(".", TENSORS, [ONE, TWO, THREE])
    monkeypatch.chdir(cache / "snapshots")
    assert_holds("..", TENSORS, [ONE, TWO, THREE])


def test_the_root_of_a_cache(cache):
    (cache / "snapshots" / "000old").mkdir()
    assert_holds(cache, TENSORS, [ONE, TWO, THREE])
    (cache / "refs" / "main").unlink()
    error = refused(cache)
    assert "2 snapshots and no refs/main" in str(error)
    (cache / "snapshots" / "000old").rmdir()
    assert_holds(cache, TENSORS)


@pytest.mark.parametrize("revision", [b"gone", b"", b"\xff\xfe"])
def test_a_cache_whose_snapshot_is_not_there(cache, revision):
    shutil.rmtree(cache / "snapshots" / "abc123")
    (cache / "refs" / "main").write_bytes(revision)
    error = str(refused(cache))
    assert str(cache) in error
    assert ("refs/main names the snapshot 'gone'" in error) == (revision == b"gone")


def test_a_link_that_leads_nowhere(cache):
    snapshot = cache / "snapshots" / "abc123"
    (cache / "blobs" / f"{1:064x}").unlink()  # The index is 3: it sorts behind "model-".
    assert not (snapshot / TWO).exists()
    assert "a link that leads nowhere" in str(refused(snapshot / TWO))
    error = refused(snapshot)
    assert TWO in str(error)
    assert "a link that leads nowhere" in str(error)
    (snapshot / INDEX).unlink()
    assert TWO in str(refused(snapshot))


def test_an_index_that_is_a_broken_link(cache):
    (cache / "blobs" / f"{3:064x}").unlink()
    assert INDEX in str(refused(cache))


def test_a_link_to_itself(tmp_path):
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    assert "loop.safetensors" in str(refused(tmp_path / "loop.safetensors"))
    assert "loop.safetensors" in str(refused(tmp_path))


# --- what is none ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["absent", "absent.safetensors", "absent/model.safetensors", "x" * 300, "nul\0byte"])
def test_a_path_that_is_not_there(tmp_path, name):
    assert "there is no such file or directory" in str(refused(tmp_path / name))


def test_a_directory_without_weights(tmp_path):
    assert "it is empty" in str(refused(tmp_path))
    for name in ("config.json", "pytorch_model.bin", "vocab.txt"):
        (tmp_path / name).write_text("{}")
    error = str(refused(tmp_path))
    assert all(word in error for word in (str(tmp_path), "no *.safetensors", "config.json, pytorch_model.bin"))


def test_a_directory_that_is_named_like_a_file(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    assert "is a directory, not a file" in str(refused(tmp_path))
    (tmp_path / INDEX).mkdir()
    (tmp_path / "model.safetensors").rmdir()
    assert "is a directory, not a file" in str(refused(tmp_path))


@pytest.mark.parametrize("name", ["model.safetensors", INDEX])
def test_a_named_pipe_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    assert "not a file" in str(refused(tmp_path / name))
    assert "not a file" in str(refused(tmp_path))


def test_every_broken_file_of_a_directory_is_named(shards):
    (shards / INDEX).unlink()
    (shards / ONE).write_bytes(b"")
    (shards / THREE).write_bytes((shards / THREE).read_bytes()[:-1])
    error = refused(shards)
    assert [ONE in error.problems[0], "empty" in error.problems[0]] == [True, True]
    assert [THREE in error.problems[1], "truncated" in error.problems[1]] == [True, True]
    assert TWO not in str(error)


# --- an index that lies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", LYING_INDEXES)
def test_an_index_that_is_none(shards, case):
    content, words = LYING_INDEXES[case]
    (shards / INDEX).write_bytes(content if isinstance(content, bytes) else content.encode())
    error = str(refused(shards))
    for word in (str(shards / INDEX), *words):
        assert word in error, f"{word!r} is not in: {error}"
    assert str(refused(shards / INDEX)) == error


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
def test_a_configuration_is_no_index(shards, name):
    (shards / name).write_text('{"architectures": ["LlamaForCausalLM"]}')
    assert "is a configuration, no index of weights; give the directory" in str(refused(shards / name))
    with hw.open((shards / name).parent) as source:
        assert source.manifest


def test_a_huge_index_is_not_read(shards):
    with (shards / INDEX).open("r+b") as file:
        file.truncate(2**40)
    assert str(2**40) in str(refused(shards))


@pytest.mark.parametrize("place", ["../outside.safetensors", "sub/../../outside.safetensors", "absolute", "link/../x"])
def test_an_index_never_leads_outside(shards, place):
    outside = shards.parent / "outside.safetensors"
    write_safetensors(outside, {"scale": TENSORS["scale"]})
    place = str(outside) if place == "absolute" else place
    edit_index(shards, lambda weight_map: weight_map.update(scale=place))
    error = refused(shards)
    assert any(place in problem and "outside the directory" in problem for problem in error.problems)


def test_one_tensor_in_two_files(shards):
    """Every other reader takes the last, silently."""
    (shards / INDEX).unlink()
    write_safetensors(shards / "z.safetensors", {"scale": torch.tensor(666.0)})
    naive = {}
    for file in (files := sorted(shards.glob("*.safetensors"))):
        naive |= load_file(file)
    assert naive["scale"] == 666
    error = refused(files)
    assert len(error.problems) == 1
    assert all(word in str(error) for word in ("'scale'", TWO, "z.safetensors", "again"))


def test_one_empty_tensor_in_two_files(tmp_path):
    for number in (0, 1):
        write_safetensors(tmp_path / f"layers-{number}.safetensors", {"empty": torch.empty(0)})
    assert "'empty'" in str(refused(tmp_path))


def test_one_file_under_two_names(shards):
    os.link(shards / ONE, shards / "same.safetensors")
    edit_index(shards, lambda weight_map: weight_map.update({"layers.0.weight": "same.safetensors"}))
    assert_holds(shards, TENSORS)
    with hw.open(shards) as source:
        assert Path(source.file_of("layers.0.weight")).name == "same.safetensors"


def test_every_problem_of_an_index_comes_at_once(shards):
    """Six kinds, in one error, sorted; and what is sound is not blamed."""
    write_safetensors(shards / "unknown.safetensors", {"layers.9.bias": torch.zeros(1)})
    write_safetensors(shards / TWO, load_file(shards / TWO) | {"layers.9.bias": torch.ones(1)})
    (shards / ONE).unlink()
    (shards / THREE).write_bytes((shards / THREE).read_bytes()[:-1])

    def change(weight_map):
        weight_map["layers.1.weight"] = "unknown.safetensors"  # It lies in TWO.
        weight_map["ghost"] = TWO
        weight_map["thief"] = "../thief.safetensors"
        weight_map["number"] = 5

    edit_index(shards, change)
    error = refused(shards)
    assert error.title == str(shards / INDEX)
    assert list(error.problems) == sorted(error.problems)
    expected = [
        rf"{ONE}: named by the index for 3 tensors, but there is no such file",
        rf"{THREE}: .*truncated",
        r"'\.\./thief\.safetensors' lies outside the directory",
        r"tensor 'number': its file is 5",
        rf"tensor 'ghost': the index says {TWO}, which does not hold it",
        rf"tensor 'layers\.1\.weight': the index says unknown\.safetensors; it lies in {TWO}",
        rf"tensor 'layers\.9\.bias': in .*{TWO} and again in .*unknown\.safetensors",
    ]
    unexplained = list(error.problems)
    for pattern in expected:
        (explained,) = [problem for problem in unexplained if re.search(pattern, problem)]
        unexplained.remove(explained)
    assert not unexplained


def test_the_naive_reader_of_an_index_does_not_notice(shards):
    """``load_file`` of every named shard misses what the index promises, and says nothing."""
    edit_index(shards, lambda weight_map: weight_map.update(ghost=TWO))
    naive = {}
    for shard in set(json.loads((shards / INDEX).read_text())["weight_map"].values()):
        naive |= load_file(shards / shard)
    assert "ghost" not in naive
    assert "'ghost'" in str(refused(shards))


def test_a_thousand_problems_are_all_there(shards):
    edit_index(shards, lambda weight_map: weight_map.update({f"ghost.{n:04}": TWO for n in range(1000)}))
    error = refused(shards)
    assert len(error.problems) == 1000
    assert "and 997 more: " in str(error)


# --- nothing stays open ----------------------------------------------------------------------------------------------


def test_an_unexpected_error_closes_what_was_opened(shards, monkeypatch):
    """Ctrl-C, say, while the third file is opened; the fixture counts."""
    from hotweights.sources.files import layout

    read_header = layout.read_header

    def interrupted(file, *rest):
        if file.endswith(THREE):
            raise KeyboardInterrupt
        return read_header(file, *rest)

    monkeypatch.setattr(layout, "read_header", interrupted)
    for path in (shards, shards / THREE):
        with pytest.raises(KeyboardInterrupt):
            hw.open(path)
    (shards / INDEX).unlink()
    with pytest.raises(KeyboardInterrupt):
        hw.open(shards)


def test_the_count_of_descriptors_counts(shards):
    before = descriptors()
    with hw.open(shards) as source:
        assert len(descriptors()) == len(before) + 4  # with the index
        list(source.tensors())
    assert descriptors() == before


def test_a_forgotten_close_is_a_warning(shards):
    source = hw.open(shards)
    with pytest.warns(ResourceWarning, match="was not closed"):
        del source
