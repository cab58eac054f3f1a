"""``hw.save`` to a store: whole or not at all, the index last. The store is obstore's, in memory."""

import contextlib
from importlib import import_module

import pytest
import torch
from typer.testing import CliRunner

import hotweights as hw
from hotweights.cli import app
from hotweights.testing.checks import assert_same_bits

ADDRESS = "s3://bucket/run"
OLD = {"a": torch.arange(100), "b": torch.arange(200.0)}
NEW = {name: tensor + 1 for name, tensor in OLD.items()}


class Memory:
    """What lies in the store, and what was done there in turn."""

    def __init__(self, monkeypatch):
        obstore = pytest.importorskip("obstore")
        address, service = (import_module(f"hotweights.sources.objects.{name}") for name in ("address", "service"))
        self.obstore, self.store = obstore, obstore.store.MemoryStore()
        self.done, self.before = [], {}
        monkeypatch.setattr(address, "package_store", lambda *options: self.store)
        for what in ("put", "delete"):
            monkeypatch.setattr(service.Obstore, what, self.noting(what, getattr(service.Obstore, what)))

    def noting(self, what, do):
        async def note(service, key, *rest):
            self.before.get((what, key), lambda: None)()
            self.done.append((what, key.rpartition("/")[2]))
            return await do(service, key, *rest)

        return note

    def names(self):
        return {each["path"] for each in self.obstore.list(self.store).collect()}

    def put(self, key, content):
        self.obstore.put(self.store, key, content)


@pytest.fixture
def memory(monkeypatch):
    return Memory(monkeypatch)


def read():
    with hw.open(ADDRESS) as source:
        return dict(source.tensors())


def test_a_new_checkpoint_its_index_last(memory, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    report = hw.save(OLD, ADDRESS, shard_size=800, beside=[tmp_path / "config.json"])
    assert_same_bits(read(), OLD)
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    put = ["model.saving.json", *shards, "config.json", "model.safetensors.index.json"]
    assert memory.done == [*(("put", name) for name in put), ("delete", "model.saving.json")]
    assert report.files == tuple(f"{ADDRESS}/{name}" for name in [*shards, "model.safetensors.index.json"])
    assert report.path == ADDRESS
    with hw.open(ADDRESS) as source:
        assert source.digest() == report.digest


@pytest.mark.parametrize("address", [f"{ADDRESS}/mine.safetensors", ADDRESS])
def test_one_file(memory, address):
    hw.save(OLD, address)
    with hw.open(address) as source:
        assert_same_bits(dict(source.tensors()), OLD)
    hw.save(NEW, address)
    with hw.open(address) as source:
        assert_same_bits(dict(source.tensors()), NEW)
    assert len(memory.names()) == 1


def test_a_checkpoint_that_is_replaced_is_old_or_new_all_the_while(memory):
    hw.save(OLD, ADDRESS, shard_size=800)
    memory.put("run/mine.txt", b"stays")
    index = "run/model.safetensors.index.json"
    seen = []
    memory.before["put", index] = lambda: seen.append(read())
    memory.before["delete", "run/model-00001-of-00002.safetensors"] = lambda: seen.append(read())
    hw.save(NEW, ADDRESS, shard_size=800)
    assert_same_bits(seen[0], OLD)
    assert_same_bits(seen[1], NEW)
    assert_same_bits(read(), NEW)
    shards = {f"run/model-v2-0000{n}-of-00002.safetensors" for n in (1, 2)}
    assert memory.names() == {index, "run/mine.txt", *shards}


def test_one_file_gives_way_to_shards_last(memory):
    """Readers take it before an index."""
    hw.save(OLD, ADDRESS)
    seen = []
    memory.before["delete", "run/model.safetensors"] = lambda: seen.append(read())
    hw.save(NEW, ADDRESS, shard_size=800)
    assert_same_bits(seen[0], OLD)
    assert_same_bits(read(), NEW)


def test_whoever_saves_second_of_two_at_once_is_told(memory):
    hw.save(OLD, ADDRESS, shard_size=800)
    index = "run/model.safetensors.index.json"
    content = bytes(memory.obstore.get(memory.store, index).bytes()) + b" "
    memory.before["put", index] = lambda: memory.put(index, content)
    before = memory.names()
    with pytest.raises(hw.SaveError, match="nothing was saved: somebody else saved there meanwhile"):
        hw.save(NEW, ADDRESS, shard_size=800)
    assert memory.names() >= before
    assert_same_bits(read(), OLD)
    memory.before.clear()
    hw.save(NEW, ADDRESS, shard_size=800)
    assert_same_bits(read(), NEW)
    assert len(memory.names()) == 3


def test_two_that_begin_a_folder_at_once(memory):
    index = "run/model.safetensors.index.json"
    memory.before["put", index] = lambda: memory.put(index, b"{}")
    with pytest.raises(hw.SaveError, match="somebody else saved there meanwhile"):
        hw.save(NEW, ADDRESS, shard_size=800)
    assert bytes(memory.obstore.get(memory.store, index).bytes()) == b"{}"


def test_an_upload_that_fails_leaves_what_was_there(memory):
    hw.save(OLD, ADDRESS, shard_size=800)
    before = memory.names()

    def fails():
        raise ConnectionError("secret")

    memory.before["put", "run/model-v2-00002-of-00002.safetensors"] = fails
    with pytest.raises(
        hw.SaveError, match=r"model-v2-00002.*nothing was saved: the store said: the connection"
    ) as error:
        hw.save(NEW, ADDRESS, shard_size=800, deadline=0.2)
    assert "secret" not in str(error.value)
    assert memory.names() >= before
    assert_same_bits(read(), OLD)


class Killed(BaseException):
    """The process is gone."""


@pytest.mark.parametrize("dies_at", range(9))  # the journal, four shards, the index, then what is removed
@pytest.mark.parametrize("over", [False, True])
def test_a_save_that_was_killed_anywhere_is_taken_up_where_it_ended(memory, over, dies_at):
    """What was uploaded is not uploaded again, and nothing of it stays. Readers see the old version or the new one."""
    if over:
        hw.save(OLD, ADDRESS, shard_size=800)
    new = {f"{name}{number}": tensor for number in range(2) for name, tensor in NEW.items()}
    begun = len(memory.done)

    def dies():
        if len(memory.done) - begun == dies_at:
            raise Killed

    memory.before = {(what, f"run/{name}"): dies for what in ("put", "delete") for name in all_names()}
    with contextlib.suppress(Killed):
        hw.save(new, ADDRESS, shard_size=800)
    memory.before = {}
    if over:
        assert set(read()) in ({*OLD}, {*new})
    died = len(memory.done)
    hw.save(new, ADDRESS, shard_size=800)
    first, again = shards_put(memory.done[begun:died]), shards_put(memory.done[died:])
    if dies_at <= 6:
        assert len({*first, *again}) == len(first) + len(again) == 4
    assert_same_bits(read(), new)
    assert len(memory.names()) == 5


def shards_put(done):
    return [name for what, name in done if what == "put" and name.startswith("model-")]


def all_names():
    kinds = ("", "-v2", "-v3")
    shards = [f"model{kind}-0000{n}-of-0000{count}.safetensors" for kind in kinds for count in (2, 4) for n in range(5)]
    return [*shards, *(f"model{kind}.saving.json" for kind in kinds), "model.safetensors.index.json"]


def test_two_ranks_that_save_the_same_at_once_both_succeed(memory):
    """A mistake that is often made, and harmless: the second finds what the first has written."""
    index = "run/model.safetensors.index.json"

    def twin():
        memory.before.clear()
        hw.save(OLD, ADDRESS, shard_size=800)

    memory.before["put", index] = twin
    hw.save(OLD, ADDRESS, shard_size=800)
    assert_same_bits(read(), OLD)
    assert len(memory.names()) == 3


@pytest.mark.parametrize("gone", ["model.saving.json", "model-00001-of-00002.safetensors"])
def test_a_save_that_finds_its_shards_sees_that_another_one_removes_them(memory, gone):
    second = "run/model-00002-of-00002.safetensors"

    def dies():
        raise Killed

    memory.before["put", second] = dies
    with pytest.raises(Killed):
        hw.save(OLD, ADDRESS, shard_size=800)
    memory.before["put", second] = lambda: memory.obstore.delete(memory.store, f"run/{gone}")
    with pytest.raises(hw.SaveError, match="somebody else saved there meanwhile"):
        hw.save(OLD, ADDRESS, shard_size=800)
    assert "run/model.safetensors.index.json" not in memory.names()


def test_a_save_that_finds_its_shards_and_is_overtaken_by_another_publishes_nothing(memory):
    second = "run/model-00002-of-00002.safetensors"

    def dies():
        raise Killed

    memory.before["put", second] = dies
    with pytest.raises(Killed):
        hw.save(OLD, ADDRESS, shard_size=800)

    def overtaken():
        memory.before.clear()
        hw.save(NEW, ADDRESS, shard_size=800)

    memory.before["put", second] = overtaken
    with pytest.raises(hw.SaveError, match="somebody else saved there meanwhile"):
        hw.save(OLD, ADDRESS, shard_size=800)
    assert_same_bits(read(), NEW)


def test_what_fails_when_the_new_version_is_in_its_place_is_a_warning(memory):
    hw.save(OLD, ADDRESS, shard_size=800)

    def fails():
        raise ConnectionError

    memory.before["delete", "run/model-00001-of-00002.safetensors"] = fails
    report = hw.save(NEW, ADDRESS, shard_size=800, deadline=0.2)
    assert "model-00001-of-00002.safetensors: the new version is complete, but then this failed" in report.warnings[0]
    assert_same_bits(read(), NEW)


def test_nothing_stays_in_the_temporary_folder(memory, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    hw.save(OLD, ADDRESS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["1_Pooling/config.json", "assets/vocab.txt"])
def test_no_other_file_in_a_folder_is_replaced(memory, tmp_path, name):
    hw.save(OLD, ADDRESS, shard_size=800)
    beside = {name: tmp_path / "mine"}
    beside[name].write_text("one")
    for weights in (OLD, NEW):  # A new file, and then the same again.
        hw.save(weights, ADDRESS, shard_size=800, beside=beside)
        assert_same_bits(read(), weights)
    before = memory.names()
    beside[name].write_text("two")
    with pytest.raises(hw.SaveError, match=f"run/{name}: is there with other content, and nothing was saved") as error:
        hw.save(OLD, ADDRESS, shard_size=800, beside=beside)
    assert memory.names() == before
    assert_same_bits(read(), NEW)
    assert "save to another address" in str(error.value)
    hw.save(OLD, "s3://bucket/elsewhere", shard_size=800, beside=beside)
    with hw.open("s3://bucket/elsewhere") as source:
        assert_same_bits(dict(source.tensors()), OLD)


def test_a_config_that_leads_elsewhere_is_refused(memory):
    memory.put("run/config.json", b'{"transformers_weights": "mine.safetensors"}')
    with pytest.raises(hw.UsageError, match="nobody would read what is saved here"):
        hw.save(OLD, ADDRESS)
    assert memory.names() == {"run/config.json"}


@pytest.mark.parametrize("address", ["http://h/m", "https://h/m", "hf://org/name"])
def test_what_cannot_be_written_to(address):
    with pytest.raises(hw.UsageError, match="addresses that can be written to begin with s3://"):
        hw.save(OLD, address)


def test_store_is_for_addresses(tmp_path):
    with pytest.raises(hw.UsageError, match="store= is for addresses"):
        hw.save(OLD, tmp_path / "m", store={"region": "x"})


def test_the_commands_take_addresses(memory, tmp_path):
    hw.save(OLD, tmp_path / "old")
    run = CliRunner().invoke
    for command in (
        ["copy", str(tmp_path / "old"), ADDRESS],
        ["verify", ADDRESS],
        ["diff", ADDRESS, str(tmp_path / "old")],
        ["convert", ADDRESS, "s3://bucket/half", "--dtype", "BF16"],
        ["copy", "s3://bucket/half", str(tmp_path / "half")],
        ["inspect", ADDRESS],
        ["inspect", ADDRESS, "s3://bucket/half"],
    ):
        done = run(app, command)
        assert done.exit_code == 0, done.output
    assert "half: " in done.output
    with hw.open(tmp_path / "half") as source:
        assert source.manifest["b"].dtype == torch.bfloat16
