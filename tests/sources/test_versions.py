"""Following a directory: a version is given when its writer is done with it, once, and never before."""

import logging
import os
import shutil
import threading

import pytest
import torch
from dcp_saved import save_dcp

import hotweights as hw
from hotweights.sources.versions import Versions
from hotweights.testing import write_checkpoint

TENSORS = {"a": torch.ones(2), "b": torch.zeros(2)}


class Follower:
    """Looks whenever it is told to, by a clock that a test moves."""

    def __init__(self, directory, *, timeout=None, latest=False, marker=None, pattern="*"):
        self.now = 0.0
        self.versions = Versions(directory, 1.0, timeout, latest, marker, pattern, clock=lambda: self.now)

    def look(self, after=1.0):
        self.now += after
        return [version.name for version in self.versions.look()]

    def settle(self):
        """What is ready when nothing changes for an interval."""
        return self.look(0) + self.look(1)


@pytest.fixture
def follower(tmp_path):
    return Follower(tmp_path)


class TestSettled:
    def test_after_one_interval_and_once(self, follower, tmp_path):
        write_checkpoint(tmp_path / "step-1", TENSORS)
        assert follower.look() == []
        assert follower.look(0.9) == []
        assert follower.look(0.1) == ["step-1"]
        assert follower.look() == follower.look() == []

    @pytest.mark.parametrize("change", ["size", "content", "times put back", "replaced"])
    def test_whatever_changes_begins_the_interval_anew(self, change, follower, tmp_path):
        file = write_checkpoint(tmp_path / "step-1", TENSORS) / "model.safetensors"
        whole = file.read_bytes()
        file.write_bytes(whole[:-4] if change == "size" else whole[:-4] + b"abcd")
        os.utime(file, (1, 1))
        follower.look()
        before = os.stat(file)
        if change == "replaced":
            (tmp_path / "other").write_bytes(whole)
            os.rename(tmp_path / "other", file)
        else:
            file.write_bytes(whole)
        if change == "times put back":
            os.utime(file, (1, 1))
            while os.stat(file).st_ctime_ns == before.st_ctime_ns:  # The kernel's clock ticks every few milliseconds.
                os.utime(file, (1, 1))
        assert follower.look() == []
        assert follower.look() == ["step-1"]

    def test_all_files_of_the_index(self, follower, tmp_path, caplog):
        place = write_checkpoint(tmp_path / "step-1", TENSORS, shards=2)
        shard = place / "model-00002-of-00002.safetensors"
        shard.rename(tmp_path / "away")
        assert follower.settle() == []
        assert "there is no such file" in caplog.text
        (tmp_path / "away").rename(shard)
        assert follower.settle() == ["step-1"]

    def test_all_numbers_without_an_index(self, follower, tmp_path):
        place = write_checkpoint(tmp_path / "step-1", TENSORS, shards=2)
        (place / "model.safetensors.index.json").unlink()
        (place / "model-00002-of-00002.safetensors").rename(tmp_path / "away")
        assert follower.settle() == []
        (tmp_path / "away").rename(place / "model-00002-of-00002.safetensors")
        assert follower.settle() == ["step-1"]

    def test_a_shard_newer_than_the_index(self, follower, tmp_path, caplog):
        place = write_checkpoint(tmp_path / "step-1", TENSORS, shards=2)
        os.utime(place / "model.safetensors.index.json", (1, 1))
        assert follower.settle() == []
        assert f"touch {place / 'model.safetensors.index.json'}" in caplog.text
        os.utime(place / "model.safetensors.index.json")
        assert follower.settle() == ["step-1"]

    def test_an_index_beside_a_whole_file(self, follower, tmp_path):
        place = write_checkpoint(tmp_path / "step-1", TENSORS, shards=2)
        os.utime(place / "model.safetensors.index.json", (1, 1))
        write_checkpoint(place, TENSORS)  # This one is opened.
        assert follower.settle() == ["step-1"]

    def test_the_files_of_a_hub_come_in_any_order(self, follower, tmp_path):
        place = write_checkpoint(tmp_path / "step-1", TENSORS, shards=2)
        os.utime(place / "model.safetensors.index.json", (1, 1))
        (place / ".cache" / "huggingface").mkdir(parents=True)
        assert follower.settle() == ["step-1"]

    def test_a_marker(self, tmp_path):
        follower = Follower(tmp_path, marker="DONE")
        place = write_checkpoint(tmp_path / "step-1", TENSORS)
        assert follower.settle() == []
        (place / "DONE").touch()
        assert follower.settle() == ["step-1"]
        write_checkpoint(place, {"a": torch.zeros(2)})
        os.utime(place / "DONE", (1, 1))  # It is of the version before.
        assert follower.settle() == []
        os.utime(place / "DONE")
        assert follower.settle() == ["step-1"]

    def test_what_changes_while_headers_are_read(self, follower, tmp_path, monkeypatch):
        from hotweights.sources import versions

        place = write_checkpoint(tmp_path / "step-1", TENSORS)
        read = versions.list_checkpoint

        def meanwhile(path):
            listing = read(path)
            os.utime(place / "model.safetensors", (1, 1))
            return listing

        with monkeypatch.context() as patch:
            patch.setattr(versions, "list_checkpoint", meanwhile)
            assert follower.settle() == []
        assert follower.settle() == ["step-1"]


class TestOnce:
    def test_broken_ones_are_logged_once(self, follower, tmp_path, caplog):
        place = write_checkpoint(tmp_path / "step-1", TENSORS)
        whole = (place / "model.safetensors").read_bytes()
        (place / "model.safetensors").write_bytes(whole[:-4])
        assert follower.settle() + follower.settle() == []
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert "step-1 is passed over until it changes" in record.getMessage()
        ((name, why),) = follower.versions.passed_over.items()
        assert name == "step-1"
        assert why in record.getMessage()
        (place / "model.safetensors").write_bytes(whole[:-8])
        assert follower.settle() == [] != follower.versions.passed_over
        (place / "model.safetensors").write_bytes(whole)
        assert follower.settle() == ["step-1"]
        assert follower.versions.passed_over == {}

    def test_what_waits_is_said(self, tmp_path):
        follower = Follower(tmp_path, marker="DONE")
        write_checkpoint(tmp_path / "late", TENSORS)
        write_checkpoint(tmp_path / "pipeline" / "unet", TENSORS)
        (tmp_path / "old").mkdir()
        (tmp_path / "old" / "pytorch_model.bin").touch()
        (tmp_path / "logs").mkdir()
        assert follower.settle() == []
        assert follower.versions.passed_over == {
            "late": "waits for DONE, the marker that its writer writes last",
            "old": "has no safetensors, which is what is followed, but pytorch_model.bin",
            "pipeline": f"has its weights a level deeper, in unet; follow that folder: {tmp_path / 'pipeline'}",
        }
        (tmp_path / "late" / "DONE").touch()
        assert follower.settle() == ["late"]
        assert "late" not in follower.versions.passed_over
        shutil.rmtree(tmp_path / "old")
        assert follower.settle() == []
        assert follower.versions.passed_over.keys() == {"pipeline"}
        (followed,) = Follower(tmp_path / "pipeline").settle()
        assert followed == "unet"

    def test_one_that_is_written_anew_says_when(self, follower, tmp_path):
        file = write_checkpoint(tmp_path / "step-1", TENSORS) / "model.safetensors"
        written = []
        for when in (100, 200.5):
            os.utime(file, (when, when))
            follower.look()
            follower.now += 1
            written += follower.versions.look()
        assert [(version.name, version.written) for version in written] == [("step-1", 100), ("step-1", 200.5)]

    def test_a_broken_one_that_is_removed_is_not_passed_over_any_more(self, follower, tmp_path):
        place = write_checkpoint(tmp_path / "step-1", TENSORS)
        (place / "model.safetensors").write_bytes(b"no weights")
        assert follower.settle() == [] != follower.versions.passed_over
        shutil.rmtree(place)
        assert follower.settle() == []
        assert follower.versions.passed_over == {}

    def test_what_makes_no_other_version(self, follower, tmp_path):
        place = write_checkpoint(tmp_path / "step-1", TENSORS, shards=2)
        assert follower.settle() == ["step-1"]
        os.link(place / "model-00001-of-00002.safetensors", tmp_path / "backup")
        os.chmod(place / "model-00001-of-00002.safetensors", 0o400)
        os.utime(place / "model.safetensors.index.json")
        (place / "results.json").write_text("{}")
        assert follower.settle() == []
        place.rename(tmp_path / ".away")
        assert follower.settle() == []
        (tmp_path / ".away").rename(place)
        assert follower.settle() == []

    def test_a_directory_that_is_written_anew(self, follower, tmp_path):
        write_checkpoint(tmp_path, TENSORS)
        os.utime(tmp_path / "model.safetensors", ns=(0, 1_000_000_000_000_000_005))
        assert follower.settle() == [f"{tmp_path.name}@20010909T014640.000000005Z"]
        assert follower.settle() == []
        hw.save({"a": torch.zeros(2)}, tmp_path)
        assert len(follower.settle()) == 1
        hw.save(TENSORS, tmp_path, shard_size=8)
        hw.save(TENSORS, tmp_path, shard_size=8)
        assert len(follower.settle()) == 1

    def test_old_shards_that_are_removed_afterwards(self, follower, tmp_path):
        place = write_checkpoint(tmp_path / "m", TENSORS, shards=2)
        (tmp_path / "old").write_bytes((place / "model-00001-of-00002.safetensors").read_bytes())
        (tmp_path / "old").rename(place / "model-v0-00001-of-00002.safetensors")
        assert follower.settle() == ["m"]
        (place / "model-v0-00001-of-00002.safetensors").unlink()
        assert follower.settle() == []

    def test_links_beside(self, follower, tmp_path):
        write_checkpoint(tmp_path / "step-1", TENSORS)
        (tmp_path / "latest").symlink_to("step-1")
        (tmp_path / "loop").symlink_to("loop")
        (tmp_path / "nowhere").symlink_to("gone")
        write_checkpoint(tmp_path / ".step-2.saving", TENSORS)
        assert follower.settle() == ["step-1"]

    def test_a_link_that_alone_matches_is_told(self, tmp_path):
        write_checkpoint(tmp_path / "step-1", TENSORS)
        (tmp_path / "latest").symlink_to("step-1")
        follower = Follower(tmp_path, pattern="latest")
        assert follower.settle() == []
        assert "is a link to step-1, beside it, which does not match" in follower.versions.passed_over["latest"]
        follower = Follower(tmp_path, pattern="*")  # What it advises.
        assert follower.settle() == ["step-1"]
        assert not follower.versions.passed_over

    def test_a_directory_that_is_removed_is_told_until_it_is_there_again(self, tmp_path):
        place = tmp_path / "run"
        place.mkdir()
        follower = Follower(place)
        assert follower.settle() == []
        assert not follower.versions.passed_over
        place.rmdir()
        assert follower.settle() == []
        assert "cannot be listed; waiting for it" in follower.versions.passed_over["run"]
        write_checkpoint(place / "step-1", TENSORS)
        assert follower.settle() == ["step-1"]
        assert not follower.versions.passed_over

    @pytest.mark.parametrize("marker", [["DONE"], 3, b"DONE"])
    def test_a_marker_is_a_name(self, marker, tmp_path):
        with pytest.raises(hw.UsageError, match=r"marker= is the name of a file within each version"):
            hw.follow(tmp_path, marker=marker)


class TestOrder:
    def steps(self, tmp_path, *numbers):
        for number in numbers:
            place = write_checkpoint(tmp_path / f"step-{number}", TENSORS)
            os.utime(place / "model.safetensors", (number, number))

    def test_as_they_were_written(self, follower, tmp_path):
        self.steps(tmp_path, 10, 9, 100)
        assert follower.settle() == ["step-9", "step-10", "step-100"]

    def test_names_decide_where_times_do_not(self, follower, tmp_path):
        self.steps(tmp_path, 10, 9)
        for number in (9, 10):
            os.utime(tmp_path / f"step-{number}" / "model.safetensors", (1, 1))
        assert follower.settle() == ["step-9", "step-10"]

    def test_latest(self, tmp_path):
        follower = Follower(tmp_path, latest=True)
        self.steps(tmp_path, 10, 9, 100)
        assert follower.settle() == ["step-100"]
        self.steps(tmp_path, 50)
        assert follower.settle() == []
        self.steps(tmp_path, 101)
        assert follower.settle() == ["step-101"]

    def test_a_pattern(self, tmp_path):
        self.steps(tmp_path, 1)
        write_checkpoint(tmp_path / "tmp-checkpoint-2", TENSORS)
        assert Follower(tmp_path, pattern="step-*").settle() == ["step-1"]

    def test_a_pattern_that_nothing_matches_is_told(self, tmp_path, caplog):
        (tmp_path / "logs").mkdir()
        follower = Follower(tmp_path, pattern="step-*")
        assert follower.settle() == []
        assert not follower.versions.passed_over
        for number in range(2):
            write_checkpoint(tmp_path / f"v{number}", TENSORS)
        assert follower.settle() == []
        why = "2 directories do not match pattern='step-*', and none does: v0, v1"
        assert follower.versions.passed_over == {tmp_path.name: why}
        assert [record.getMessage() for record in caplog.records] == [f"{tmp_path}: {why}"]
        self.steps(tmp_path, 1)
        assert follower.settle() == ["step-1"]
        assert not follower.versions.passed_over


class TestWaiting:
    def test_a_live_model_takes_each(self, tmp_path):
        live = hw.LiveModel(torch.nn.Linear(2, 2))
        live.load(torch.nn.Linear(2, 2))
        for number in (1, 2):
            hw.save({"weight": torch.full((2, 2), float(number)), "bias": torch.zeros(2)}, tmp_path / f"step-{number}")
        seen = []
        with hw.follow(tmp_path, interval=0.001) as versions:
            for version in versions:
                live.update(version)
                seen.append(live.version)
                if len(seen) == 2:
                    break
        assert seen == ["step-1", "step-2"]
        assert live.model.weight[0, 0] == 2
        assert live.update(version, version="mine").version == "mine"
        first = hw.LiveModel(torch.nn.Linear(2, 2))
        assert first.load(version).version == version.name
        with hw.open(version) as source:
            assert source.manifest.keys() == {"weight", "bias"}
        hw.load(torch.nn.Linear(2, 2), version)

    def test_close_ends_a_wait(self, tmp_path):
        versions = hw.follow(tmp_path, interval=3600)
        waits = threading.Event()
        versions._closed.wait, real = lambda seconds: (waits.set(), real(seconds)), versions._closed.wait
        ended = []
        thread = threading.Thread(target=lambda: ended.extend(versions), daemon=True)
        thread.start()
        assert waits.wait(60)
        versions.close()
        thread.join(60)
        assert not thread.is_alive()
        assert ended == list(versions) == []
        versions.close()

    def test_a_timeout_is_for_each_version(self, tmp_path):
        follower = Follower(tmp_path, timeout=2.5)
        write_checkpoint(tmp_path / "step-1", TENSORS)
        waited = []

        def wait(seconds):
            waited.append(seconds)
            follower.now += seconds

        follower.versions._closed.wait = wait
        assert next(follower.versions).name == "step-1"
        assert waited == [1]
        assert list(follower.versions) == []
        assert waited == [1, 1, 1, 0.5]

    def test_a_directory_that_goes_away_and_comes_back(self, tmp_path, caplog):
        place = tmp_path / "runs"
        write_checkpoint(place / "step-1", TENSORS)
        follower = Follower(place)
        assert follower.settle() == ["step-1"]
        shutil.rmtree(place)
        assert follower.settle() + follower.settle() == []
        assert len(caplog.records) == 1
        write_checkpoint(place / "step-2", TENSORS)
        assert follower.settle() == ["step-2"]


class TestRefusals:
    def test_places(self, tmp_path):
        with pytest.raises(
            hw.UsageError, match=r"no such directory; where it is still to come, make it first: mkdir"
        ) as caught:
            hw.follow(tmp_path / "runs")
        os.makedirs(str(caught.value).partition("mkdir -p ")[2])
        hw.follow(tmp_path / "runs").close()
        with pytest.raises(hw.UsageError, match=r"no such directory; did you mean .*runs\?$"):
            hw.follow(tmp_path / "runz")
        (tmp_path / "file").touch()
        with pytest.raises(hw.UsageError, match="name the directory that it lies in"):
            hw.follow(tmp_path / "file")

    @pytest.mark.parametrize(
        "arguments",
        [{"interval": 0}, {"interval": "1"}, {"timeout": -1}, {"timeout": True}, {"marker": "a/b"}, {"pattern": 3}],
    )
    def test_arguments(self, arguments, tmp_path):
        with pytest.raises(hw.UsageError, match=f"{next(iter(arguments))}= is "):
            hw.follow(tmp_path, **arguments)


class TestDcp:
    """Directories of ``torch.distributed.checkpoint``, whose ``.metadata`` is written last."""

    def test_a_version_is_given_when_its_metadata_is_there(self, follower, tmp_path):
        place = save_dcp(tmp_path / "step-1", {"model": TENSORS}, files=2)
        hidden = tmp_path / "aside"
        os.rename(place / ".metadata", hidden)
        assert follower.settle() == []
        assert "no .metadata, which is written last" in follower.versions.passed_over["step-1"]
        shutil.copy(hidden, place / ".metadata")
        assert follower.settle() == ["step-1"]
        assert follower.settle() == []

    def test_one_that_is_written_anew_waits_for_its_new_metadata(self, follower, tmp_path):
        place = save_dcp(tmp_path / "step-1", TENSORS)
        assert follower.settle() == ["step-1"]
        metadata = os.stat(place / ".metadata")
        (file,) = place.glob("*.distcp")
        file.touch()
        os.utime(place / ".metadata", (1, 1))
        assert follower.settle() == []
        assert "newer than .metadata" in follower.versions.passed_over["step-1"]
        os.utime(place / ".metadata", ns=(metadata.st_mtime_ns + 10**12,) * 2)
        assert follower.settle() == ["step-1"]

    def test_one_that_is_cut_off_is_passed_over(self, follower, tmp_path):
        (file,) = save_dcp(tmp_path / "step-1", TENSORS).glob("*.distcp")
        os.truncate(file, 100)
        assert follower.settle() == []
        assert "the checkpoint is broken" in follower.versions.passed_over["step-1"]

    def test_what_is_given_loads(self, tmp_path):
        save_dcp(tmp_path / "step-7", {"model": {"weight": torch.full((3, 2), 7.0)}})
        live = hw.LiveModel(torch.nn.Linear(2, 3, bias=False))
        with hw.follow(tmp_path, interval=0.001) as versions:
            live.load(next(versions))
        assert live.version == "step-7"
        assert torch.equal(live.model.weight, torch.full((3, 2), 7.0))


def test_what_may_be_written_still_is_not_called_broken(tmp_path):
    place = write_checkpoint(tmp_path / "step-1", {"a": torch.zeros(2), "b": torch.ones(4)}, shards=2)
    sorted(place.glob("*.safetensors"))[1].unlink()
    odd = write_checkpoint(tmp_path / "step-2", {"a": torch.zeros(2)})
    next(odd.glob("*.safetensors")).write_bytes((2).to_bytes(8, "little") + b"[]")
    with hw.follow(tmp_path, interval=0.001, timeout=0.05) as versions:
        assert list(versions) == []
        told = versions.passed_over
    assert told["step-1"].startswith("it is not whole, or is being written still: ")
    assert "broken" not in told["step-1"]
    assert "not a JSON object" in told["step-2"]
    assert "written still" not in told["step-2"]


def test_files_of_the_directory_itself_match_no_pattern(tmp_path):
    """As a trainer leaves them: checkpoints, and the final weights beside them."""
    write_checkpoint(tmp_path / "checkpoint-1", TENSORS)
    write_checkpoint(tmp_path, TENSORS)
    assert Follower(tmp_path, pattern="checkpoint-*").settle() == ["checkpoint-1"]
    assert len(Follower(tmp_path).settle()) == 2


def test_another_shard_is_not_what_was_meant(tmp_path):
    paths = sorted(
        write_checkpoint(tmp_path, {"a": torch.zeros(2), "b": torch.ones(2)}, shards=2).glob("*.safetensors")
    )
    paths[0].unlink()
    with pytest.raises(hw.CheckpointError) as caught:
        hw.open(paths[0])
    assert "did you mean" not in str(caught.value)
    with pytest.raises(hw.CheckpointError, match=r"did you mean .*00002-of-00002"):
        hw.open(tmp_path / "modell-00002-of-00002.safetensors")
