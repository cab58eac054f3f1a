"""Opening: whatever may be named as a source becomes one; what is opened here is closed here."""

import re

import pytest
import torch
from torch import nn

import hotweights as hw
from hotweights.sources.opening import opened, version_of
from hotweights.testing import write_checkpoint

TENSORS = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
SOURCES = {
    "a path": lambda directory: write_checkpoint(directory, TENSORS),
    "a path as words": lambda directory: str(write_checkpoint(directory, TENSORS)),
    "a mapping": lambda _: TENSORS,
    "a module": lambda _: nn.Linear(3, 2),
    "an iterator without a manifest": lambda _: hw.from_iterator(TENSORS.items()),
}


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_what_is_opened_here_is_closed_here(make, tmp_path):
    with opened(make(tmp_path / "c")) as source:
        assert set(source.manifest) == set(TENSORS)
    with pytest.raises(hw.Closed), source.leases():
        pass


def test_a_source_stays_its_owners():
    with hw.open(TENSORS) as source:
        with opened(source) as same:
            assert same is source
        assert len(list(source.tensors())) == 2


@pytest.mark.parametrize("wrong", [None, 3, [("weight", torch.ones(1))]])
def test_what_is_none_is_refused(wrong):
    with pytest.raises(hw.UsageError, match="a source is a path"), opened(wrong):
        pass
    with pytest.raises(hw.UsageError, match="from_iterator"):
        hw.open(wrong)


def test_readers_read_files_only():
    with pytest.raises(hw.UsageError, match="reads files"):
        hw.open(TENSORS, reader="torch")
    with pytest.raises(hw.UnknownName, match="known are"):
        hw.open("somewhere", reader="gguf")


@pytest.mark.parametrize("reader", ["hotweights", "torch"])
def test_a_hub_name_that_is_no_folder(reader, tmp_path, monkeypatch):
    """A newcomer types it; nothing is ever downloaded here."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        hw.CheckpointError,
        match=r"`hf download org/name`, then give the folder that it prints; or .* hf://org/name$",
    ):
        hw.open("org/name", reader=reader)
    (tmp_path / "org").mkdir()
    for path in ("org/name", "./other/name", tmp_path / "name", "name", "a/b/c", "other/model.safetensors"):
        with pytest.raises(hw.CheckpointError, match=r"no such file or directory$"):
            hw.open(path, reader=reader)


def test_what_was_said_comes_before_what_the_source_says():
    class Versioned:
        version = "theirs"

    assert version_of(Versioned(), None) == "theirs"
    assert version_of(Versioned(), 0) == 0
    assert version_of(object(), None) is None


@pytest.mark.parametrize(
    "gives",
    [
        hw.open,
        lambda path: hw.open([path]),
        lambda path: hw.open({}, digests=path),
        lambda path: hw.load(torch.nn.Linear(2, 2), path),
        lambda path: hw.LiveModel(torch.nn.Linear(2, 2)).load(path),
        lambda path: loaded().update(path),
        hw.follow,
        lambda path: hw.save(torch.nn.Linear(2, 2), path),
        hw.build,
    ],
)
def test_an_empty_path_is_not_the_current_directory(gives, tmp_path, monkeypatch):
    """``os.environ.get("MODEL", "")`` gives it, and ``Path`` takes it for where the program was started."""
    hw.save(torch.nn.Linear(2, 2), tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(hw.UsageError, match=r"the path is empty; is a variable not set\?"):
        gives("")


def loaded():
    live = hw.LiveModel(torch.nn.Linear(2, 2))
    live.load(torch.nn.Linear(2, 2))
    return live


def test_whatever_can_be_read_again_has_a_digest(tmp_path):
    """The same of one content: of files, of memory, under new names, by other packages."""
    model = torch.nn.Linear(2, 2)
    saved = hw.save(model, tmp_path).digest
    state = {f"old.{name}": tensor for name, tensor in model.state_dict().items()}
    hw.save(state, tmp_path / "old")
    drop = {"old.": ""}
    sources = [
        hw.open(model),
        hw.open(tmp_path),
        hw.open(tmp_path, reader="safetensors"),
        hw.open(state, rename=drop),
        hw.open(tmp_path / "old", rename=drop),
        hw.open(tmp_path / "old", rename=drop, reader="safetensors"),
    ]
    for source in sources:
        with source:
            assert source.digest() == saved


def test_a_name_that_was_cut_short_is_told_with_the_first_that_begins_so(tmp_path):
    for name in ("ok-000", "ok-001", "ok-200"):
        (tmp_path / name).mkdir()
    with pytest.raises(hw.CheckpointError, match=r"did you mean .*/ok-000"):
        hw.open(tmp_path / "ok-00")


def test_a_path_that_leads_nowhere_is_told_with_its_neighbour(tmp_path):
    hw.save(torch.nn.Linear(2, 2), tmp_path / "step-100")
    with pytest.raises(hw.CheckpointError, match="no such file or directory; did you mean ") as caught:
        hw.open(tmp_path / "step-10")
    hw.open(re.search(r"mean (.*)\?$", str(caught.value))[1]).close()
    for strange in (tmp_path / "other", tmp_path / "no" / "step-100"):
        with pytest.raises(hw.CheckpointError, match=r"no such file or directory$"):
            hw.open(strange)
