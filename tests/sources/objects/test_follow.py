"""``hw.follow`` of an address: checkpoints that appear in a store, and what a sender has published there."""

import json
from importlib import import_module

import pytest
import torch
from typer.testing import CliRunner

import hotweights as hw
from hotweights.cli import app
from hotweights.testing.checks import assert_same_bits

TENSORS = {"a": torch.arange(100), "b": torch.arange(200.0)}


@pytest.fixture
def store(monkeypatch):
    """A store of obstore in memory, which every address leads to, too."""
    memory = pytest.importorskip("obstore").store.MemoryStore()
    address = import_module("hotweights.sources.objects.address")
    monkeypatch.setattr(address, "package_store", lambda *options: memory)
    return memory


def looked(versions, times=2):
    """What so many looks give, an interval apart by the clock that ``versions`` reads."""
    found = []
    for _ in range(times):
        found += versions.look()
        versions.now += 1
    return found


def followed(address="s3://bucket/runs", **options):
    versions = hw.follow(address, interval=1, **options)
    versions.now = 0
    versions._clock = lambda: versions.now
    return versions


def test_checkpoints_are_given_once_when_they_are_whole(store):
    import obstore

    hw.save(TENSORS, "s3://bucket/runs/step-9", shard_size=800)
    hw.save(TENSORS, "s3://bucket/runs/step-10")
    obstore.put(store, "runs/notes.txt", b"no weights")
    obstore.put(store, "runs/step-11/model-00001-of-00002.safetensors", b"begun")
    with followed() as versions:
        assert versions.look() == []
        versions.now += 1
        found = versions.look()
        places = sorted((version.name, version.path) for version in found)
        assert places == [("step-10", "s3://bucket/runs/step-10"), ("step-9", "s3://bucket/runs/step-9")]
        with hw.open(found[0].path) as source:
            assert_same_bits(dict(source.tensors()), TENSORS)
        assert looked(versions, 3) == []
        hw.save(TENSORS, "s3://bucket/runs/step-11", shard_size=800)
        assert [version.name for version in looked(versions)] == ["step-11"]
        obstore.put(store, "runs/step-11/config.json", b"{}")
        assert looked(versions) == []
        hw.save({"a": TENSORS["a"] + 1}, "s3://bucket/runs/step-11", shard_size=800)
        assert [version.name for version in looked(versions)] == ["step-11"]


def test_a_checkpoint_whose_index_came_first_is_given_when_its_shards_are_there(store, caplog):
    import obstore

    hw.save({**TENSORS, "c": torch.arange(200)}, "s3://bucket/elsewhere", shard_size=800)
    names = sorted(each["path"] for each in obstore.list(store).collect())
    contents = {name.replace("elsewhere", "runs/step-1"): bytes(obstore.get(store, name).bytes()) for name in names}
    first, *others, index = contents
    for name in (index, first):
        obstore.put(store, name, contents[name])
    with followed() as versions:
        assert looked(versions) == []
        assert "passed over until it changes" in caplog.text
        for name in others:
            obstore.put(store, name, contents[name])
        assert [version.name for version in looked(versions)] == ["step-1"]


def test_the_folder_itself_that_is_written_anew(store):
    hw.save(TENSORS, "s3://bucket/runs")
    with followed() as versions:
        (first,) = looked(versions)
        assert first.path == "s3://bucket/runs"
        assert first.name.startswith("runs@2")
        hw.save({"a": TENSORS["a"]}, "s3://bucket/runs")
        (second,) = looked(versions)
        assert second.path == first.path


def test_patterns_markers_and_the_newest_only(store):
    import obstore

    for name in ("step-1", "step-2", "tmp-3"):
        hw.save(TENSORS, f"s3://bucket/runs/{name}")
    with followed(pattern="step-*", latest=True) as versions:
        assert [version.name for version in looked(versions)] == ["step-2"]
    with followed(marker="DONE") as versions:
        assert looked(versions) == []
        obstore.put(store, "runs/step-1/DONE", b"")
        assert [version.name for version in looked(versions)] == ["step-1"]


def test_a_store_of_the_caller(store):
    hw.save(TENSORS, "runs/step-1", store=store)
    with followed("runs", store=store) as versions:
        (found,) = looked(versions)
        with hw.open(found.path, store=store) as source:
            assert_same_bits(dict(source.tensors()), TENSORS)


def test_a_store_that_fails_is_waited_for_once_it_has_answered(store, monkeypatch, caplog):
    service = import_module("hotweights.sources.objects.service")
    hw.save(TENSORS, "s3://bucket/runs/step-1")
    well = service.Obstore.below

    async def refused(*asked):
        raise PermissionError

    monkeypatch.setattr(service.Obstore, "below", refused)
    with followed() as versions:
        with pytest.raises(hw.StoreError, match="refused the credentials"):
            versions.look()
        monkeypatch.setattr(service.Obstore, "below", well)
        versions.look()
        monkeypatch.setattr(service.Obstore, "below", refused)
        assert looked(versions) == []
        assert caplog.text.count("cannot be listed; waiting for it") == 1
        monkeypatch.setattr(service.Obstore, "below", well)
        assert [version.name for version in looked(versions)] == ["step-1"]


def test_the_web_has_no_lists():
    with hw.follow("http://127.0.0.1:9/runs", store={"deadline": 0.2}) as versions, pytest.raises(hw.StoreError):
        versions.look()


@pytest.mark.parametrize("where", ["s3://bucket/runs", "directory"])
def test_what_a_sender_has_published_is_given_and_nothing_else(store, where, tmp_path):
    """Not a version that lies there whole and was never published, and not a folder twice."""
    place = tmp_path / "runs" if where == "directory" else where
    with (
        hw.Sender(place, keep=2) as sender,
        followed(str(place)) as versions,
        followed(str(place), latest=True) as newest,
    ):
        hw.save(TENSORS, f"{place}/00000009-never-0123abcd")
        assert looked(versions) == []
        for version in ("one", 2, "three"):
            report = sender.send(TENSORS, version=version)
        found = looked(versions)
        assert [each.name for each in found] == ["2", "three"]
        assert str(found[-1].path) == report.published
        assert [each.name for each in looked(newest)] == ["three"]
        with hw.open(found[-1].path) as source:
            assert_same_bits(dict(source.tensors()), TENSORS)
        sender.send(TENSORS, version="four")
        assert [each.name for each in looked(versions)] == ["four"]


def test_the_pointer_of_somebody_else_says_nothing(store):
    import obstore

    obstore.put(store, "runs/latest.json", b'{"step": 1}')
    hw.save(TENSORS, "s3://bucket/runs/step-1")
    with followed() as versions:
        assert [version.name for version in looked(versions)] == ["step-1"]


def test_the_command(store):
    hw.save(TENSORS, "s3://bucket/runs/step-1")
    command = ["follow", "s3://bucket/runs", "--versions", "1", "--interval", "0.01", "--timeout", "30", "--json"]
    done = CliRunner().invoke(app, command)
    assert json.loads(done.output) == {"name": "step-1", "path": "s3://bucket/runs/step-1"}
    assert done.exit_code == 0


def test_a_pattern_that_nothing_matches_is_told(store):
    hw.save(TENSORS, "s3://bucket/runs/v0")
    with followed(pattern="step-*") as versions:
        assert looked(versions) == []
        assert versions.passed_over == {"runs": "1 directory does not match pattern='step-*', and none does: v0"}
        hw.save(TENSORS, "s3://bucket/runs/step-1")
        assert [version.name for version in looked(versions)] == ["step-1"]
        assert not versions.passed_over


def test_a_pattern_that_no_published_version_matches_is_told(tmp_path):
    with hw.Sender(tmp_path.as_uri(), keep=2) as sender:
        sender.send(TENSORS, version="v0")
    with hw.follow(tmp_path, interval=1, pattern="step-*") as versions:
        assert versions.look() == []
        assert versions.passed_over[tmp_path.name].endswith("none does: v0")
