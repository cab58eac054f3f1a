"""Files that somebody replaces one after another while they are read: nobody gets a mix without a word."""

import os

import pytest
import torch
from ends import Thread, receiver, sender
from torch import nn

import hotweights as hw
from hotweights.sources.files.file import File
from hotweights.testing import write_checkpoint, write_safetensors

INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def make_model():
    return nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])


def weights(version):
    return {f"{layer}.weight": torch.full((4, 4), float(version)) for layer in range(2)}


def values(model):
    return sorted({value for parameter in model.parameters() for value in parameter.flatten().tolist()})


@pytest.fixture
def place(tmp_path):
    """Version 1 in two files with one layer each, and an index that is as old as they are."""
    place = write_checkpoint(tmp_path / "checkpoint", weights(1), shards=2)
    for name in (ONE, TWO, INDEX):
        os.utime(place / name, (1e9, 1e9))
    return place


# --- what writers do; the size and the modification time are as they were --------------------------------------------


def put(path, content):
    """By rename, as rsync and careful savers do."""
    other = path.with_suffix(".other")
    other.write_bytes(content)
    os.utime(other, (1e9, 1e9))
    other.replace(path)


def put_in_place(path, content):
    """Into the same file. The kernel's clock ticks every few milliseconds: wait until it shows the change."""
    before = path.stat().st_ctime_ns
    path.write_bytes(content)
    while path.stat().st_ctime_ns == before:
        os.utime(path, (1e9, 1e9))
    os.utime(path, (1e9, 1e9))


def other_shard(place, write):
    write_safetensors(place.parent / "new", {"0.weight": weights(2)["0.weight"]})
    write(place / ONE, (place.parent / "new").read_bytes())


def by_rename(place):
    other_shard(place, put)


def in_place(place):
    other_shard(place, put_in_place)


def the_index(place):
    put(place / INDEX, (place / INDEX).read_bytes())


WRITERS = [by_rename, in_place, the_index]


@pytest.fixture
def behind(place, monkeypatch):
    """Lets a writer write when the first file was read and proven, and the second is about to be proven."""
    real = File.check

    def arrange(write):
        todo = [write]

        def check(file):
            if todo and file.path.endswith(TWO):
                todo.pop()(place)
            real(file)

        monkeypatch.setattr(File, "check", check)

    return arrange


# --- who reads -------------------------------------------------------------------------------------------------------


def by_load(place, address):
    hw.load(make_model(), place, threads=1)


def by_first_load(place, address):
    hw.LiveModel(make_model()).load(place, threads=1)


def by_route(place, address):
    hw.route(place, [hw.Component("", make_model())])


def by_leases(place, address):
    with hw.open(place) as source, hw.Pool(1, 16384) as pool:
        assert len(list(source.leases(pool=pool))) == 2


def by_tensors(place, address):
    with hw.open(place) as source:
        assert len(list(source.tensors())) == 2


def by_sending(place, address):
    """Nobody has the version: the live model at the other end stays empty."""
    live = hw.LiveModel(make_model())

    def receive():
        with receiver(address) as source, pytest.raises(hw.TransferAborted):
            live.load(source)

    thread = Thread(receive)
    with sender(address) as sending:
        try:
            sending.send(place, version=2)
        finally:
            thread.result()
            assert live.version is None


READINGS = [by_load, by_first_load, by_route, by_leases, by_tensors, by_sending]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
@pytest.mark.parametrize("read", READINGS, ids=lambda read: read.__name__)
def test_a_file_that_was_read_already(read, write, place, behind, tmp_path):
    behind(write)
    changed = INDEX if write is the_index else ONE
    with pytest.raises(hw.CheckpointChanged, match=rf"{changed}: the file was (replaced|changed) after it was opened"):
        read(place, f"unix:{tmp_path / 'run' / 'socket'}")


@pytest.mark.parametrize("atomic", ["staged", "journal"])
@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_a_live_model_stays_at_its_version(write, atomic, place, behind):
    live = hw.LiveModel(make_model(), atomic=atomic)
    live.load(weights(0), version="before")
    digest = live.digest()
    behind(write)
    with pytest.raises(hw.UpdateAborted, match="after it was opened") as caught:
        live.update(place, version="after", threads=1)
    assert isinstance(caught.value.__cause__, hw.CheckpointChanged)
    assert (live.version, live.digest()) == ("before", digest)
    live.update(place, version="after")  # The writer is done.
    assert values(live.model) == ([1, 2] if write is not the_index else [1])


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_another_package_reads(write, place):
    with hw.open(place, reader="safetensors") as source:
        pairs = source.tensors()
        next(pairs)
        write(place)
        with pytest.raises(hw.CheckpointChanged, match="after it was opened"):
            list(pairs)
        with pytest.raises(hw.CheckpointChanged):
            hw.load(make_model(), source)


def test_a_directory_that_is_renamed_into_place_is_no_mix(place, behind):
    """The recipe of docs/reliability.md: whoever reads meanwhile is refused, whoever opens next gets the new one."""

    def switch(place):
        write_checkpoint(place.parent / "new", weights(2), shards=2)
        place.rename(place.parent / "old")
        (place.parent / "new").rename(place)

    behind(switch)
    model = make_model()
    with pytest.raises(hw.CheckpointChanged, match="replaced"):
        hw.load(model, place, threads=1)
    hw.load(model, place)
    assert values(model) == [2]


def test_it_costs_one_look_at_each_path(place, monkeypatch):
    looked = []
    with hw.open(place) as source:
        monkeypatch.setattr(
            os, "stat", lambda path, real=os.stat, **options: looked.append(path) or real(path, **options)
        )
        source.check()
    assert [os.path.basename(path) for path in looked] == [INDEX, ONE, TWO]


# --- a mix that lay there before -------------------------------------------------------------------------------------


@pytest.fixture
def mixed(place):
    """A trainer saves version 2; it has written the first file, and not yet the second, nor the index."""
    by_rename(place)
    os.utime(place / ONE, (1e9 + 1, 1e9 + 1))
    return place


def reports(place, address):
    """What each way of reading a checkpoint says about it."""
    live, sent_to = hw.LiveModel(make_model()), hw.LiveModel(make_model())
    yield hw.load(make_model(), place)
    yield live.load(place)
    yield live.update(place)
    with hw.open(place, reader="safetensors") as source:
        yield hw.load(make_model(), source)

    def receive():
        with receiver(address) as source:
            sent_to.load(source)

    thread = Thread(receive)
    with sender(address) as sending:
        yield sending.send(place, version=1)
        thread.result()


def test_a_file_that_is_newer_than_its_index_is_a_warning(mixed, tmp_path):
    for report in reports(mixed, f"unix:{tmp_path / 'run' / 'socket'}"):
        (warning,) = report.warnings
        assert warning.startswith(f"{ONE}: newer than {mixed / INDEX}")
        assert warning in str(report)
        assert list(report.as_dict()["warnings"]) == [warning]


def test_the_advice_of_the_warning_can_be_followed(mixed):
    (warning,) = hw.load(make_model(), mixed).warnings
    assert os.system(warning[warning.index("touch ") :]) == 0
    assert hw.load(make_model(), mixed).warnings == ()


def test_what_is_not_newer_is_no_warning(place, tmp_path):
    assert all(not report.warnings for report in reports(place, f"unix:{tmp_path / 'run' / 'socket'}"))


def test_a_download_of_the_hub_is_no_warning(mixed, tmp_path):
    """Its files come in any order; and each is renamed into place when its digest was compared."""
    (cache := tmp_path / "snapshot").mkdir()
    for name in (ONE, TWO, INDEX):
        (cache / name).symlink_to(mixed / name)
    assert hw.load(make_model(), cache).warnings == ()
    (mixed / ".cache" / "huggingface").mkdir(parents=True)
    assert hw.load(make_model(), mixed).warnings == ()
