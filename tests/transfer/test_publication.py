"""A sender that publishes in a store or a directory, and receivers that look there: versions N or N+1, whole."""

import asyncio
import os
import threading
from importlib import import_module

import pytest
import torch
from torch import nn
from web import Web

import hotweights as hw
from hotweights.testing.checks import assert_same_bits

service = import_module("hotweights.sources.objects.service")


@pytest.fixture(scope="module", autouse=True)
def warm():
    """The package starts threads of its own once, which stay."""
    try:
        import obstore
    except ModuleNotFoundError:
        return

    async def ask():
        await obstore.put_async(obstore.store.MemoryStore(), "a", b"")

    asyncio.run(ask())


def tensors(number, columns=30):
    return {"weight": torch.full((40, columns), float(number)), "bias": torch.full((40,), float(number))}


class Place:
    """Where versions are published: what both ends are given, and what lies there."""

    def __init__(self, kind, folder):
        self.kind = kind
        self.store = None if kind == "directory" else pytest.importorskip("obstore").store.MemoryStore()
        self.where = folder / "run" if kind == "directory" else "bucket/run"
        self.options = {} if self.store is None else {"store": self.store}

    def sender(self, **options):
        return hw.Sender(self.where, **self.options, **options)

    def receiver(self, **options):
        return hw.Receiver(self.where, **self.options, **{"interval": 0.001, "offer_timeout": 20, **options})

    def names(self):
        if self.store is None:
            return {path.name for path in self.where.iterdir() if path.is_dir()}
        import obstore

        return {each["path"].split("/")[2] for each in obstore.list(self.store).collect()} - {"latest.json"}

    def write(self, name, content):
        if self.store is None:
            (self.where / name).parent.mkdir(parents=True, exist_ok=True)
            (self.where / name).write_bytes(content)
        else:
            import obstore

            obstore.put(self.store, f"{self.where}/{name}", content)


@pytest.fixture(params=["directory", "store"])
def place(request, tmp_path):
    return Place(request.param, tmp_path)


@pytest.fixture
def store(tmp_path):
    return Place("store", tmp_path)


def taken(receiver):
    """The next version, and the number that all of its tensors must have."""
    found = dict(receiver.tensors())
    (number,) = set(found["weight"].flatten().tolist())
    assert_same_bits(found, tensors(number))
    return receiver.version, number


def test_versions_go_from_a_trainer_to_workers_that_come_late(place):
    with place.sender() as sender, place.receiver(name="early") as early:
        assert early.poll() is None
        report = sender.send(tensors(1), version="one")
        assert (report.version, report.committed, report.tensors) == ("one", (), 2)
        assert "published at" in str(report)
        assert taken(early) == ("one", 1)
        sender.send(tensors(2), version=2)
        sender.send(iter(tensors(3).items()), version=3)
        assert taken(early) == (3, 3)
        assert early.poll() is None
        with place.receiver() as late:
            assert isinstance(late, hw.Receiver)
            assert late.version is None
            assert taken(late) == (3, 3)
            with hw.open(late.path, **place.options) as source:
                assert_same_bits(dict(source.tensors()), tensors(3))


def test_the_last_versions_are_kept_and_older_ones_deleted(place):
    with place.sender(keep=2) as sender:
        for number in range(1, 5):
            sender.send(tensors(number), version=number)
        assert [name[:10] for name in sorted(place.names())] == ["00000003-3", "00000004-4"]


def test_a_live_model_takes_versions_and_a_failed_one_is_offered_again(place):
    live = hw.LiveModel(nn.Linear(30, 40))
    live.load(tensors(0))
    with place.sender() as sender, place.receiver() as receiver:
        sender.send(tensors(1), version=1)
        assert live.update(receiver).version == 1
        assert receiver.poll() is None
        sender.send(tensors(2), version=2)
        with pytest.raises(hw.UpdateAborted, match="not this time"):
            live.update(receiver, check=lambda model: (_ for _ in ()).throw(ValueError("not this time")))
        assert live.version == 1
        assert live.update(receiver).version == 2
        assert live.model.bias[0] == 2
        model = nn.Linear(30, 40)
        sender.send(tensors(3), version=3)
        hw.load(model, receiver)
        assert model.bias[0] == 3
        assert receiver.poll() is None


def test_nobody_waits_for_ever_and_a_timeout_gives_no_version_twice(place):
    live = hw.LiveModel(nn.Linear(30, 40))
    live.load(tensors(0))
    with place.sender() as sender, place.receiver(offer_timeout=0.05) as receiver:
        with pytest.raises(hw.TransferTimeout, match="no version after None was published within"):
            live.update(receiver)
        sender.send(tensors(1), version=1)
        live.update(receiver)
        for _ in range(2):
            with pytest.raises(hw.TransferTimeout, match="no version after 1 was published"):
                live.update(receiver)
        assert receiver.poll() is None


def test_a_worker_that_reads_while_its_version_is_deleted_keeps_what_it_has(place):
    live = hw.LiveModel(nn.Linear(3000, 40))
    live.load(tensors(0, 3000))
    with place.sender(keep=1) as sender, place.receiver() as receiver:
        sender.send(tensors(1, 3000), version=1)
        assert receiver.manifest  # It is open now.
        sender.send(tensors(2, 3000), version=2)
        sender.send(tensors(3, 3000), version=3)
        with pytest.raises(hw.UpdateAborted, match=r"went away|was removed"):
            live.update(receiver)
        assert live.model.bias[0] == 0
        live.update(receiver)
        assert (live.version, live.model.bias[0]) == (3, 3)


def test_of_two_trainers_the_later_one_takes_the_place_and_the_other_is_told(place):
    with place.sender() as first, place.receiver() as receiver:
        first.send(tensors(1), version=1)
        with place.sender() as second:
            for _ in range(2):
                with pytest.raises(hw.AddressTaken, match="another sender has taken this place over"):
                    first.send(tensors(2), version=2)
            assert taken(receiver) == (1, 1)
            second.send(tensors(3), version=3)
            assert taken(receiver) == (3, 3)
        assert len(place.names()) == 2


def test_a_trainer_that_is_overtaken_between_its_files_and_the_pointer_publishes_nothing(place):
    with place.sender() as first, place.receiver() as receiver:
        first.send(tensors(1), version=1)
        others = []

        def overtaken():
            others.append(place.sender())
            yield from tensors(2).items()

        manifest = hw.Manifest(hw.TensorSpec(name, each.dtype, tuple(each.shape)) for name, each in tensors(2).items())
        with pytest.raises(hw.AddressTaken):
            first.send(overtaken(), version=2, manifest=manifest)
        assert taken(receiver) == (1, 1)
        assert len(place.names()) == 1
        others[0].close()


def test_of_two_that_write_the_pointer_at_once_one_is_told(place):
    run = import_module("hotweights.sources.objects.run")
    both = [run.open_run(place.where, place.store, 60.0, writes=True) for _ in range(2)]
    for _ in range(2):  # Where there is none, and where there is one.
        seen = [each.read()[1] for each in both]
        tag = both[0].write(run.pointer("first", ()), seen[0])
        with pytest.raises(hw.AddressTaken, match="another sender publishes here"):
            both[1].write(run.pointer("second", ()), seen[1])
        assert both[1].read()[0].sender == "first"
        assert both[1].read()[1] == tag
    for each in both:
        each.close()


def test_a_commit_that_fails_after_all_was_read_leaves_the_version_on_offer(place):
    with place.sender() as sender, place.receiver() as receiver:
        sender.send(tensors(1), version=1)
        assert receiver.manifest
        receiver.check()
        receiver.refuse(ValueError("no room"))
        assert receiver.poll() == 1
        assert taken(receiver) == (1, 1)
        receiver.refuse(ValueError("too late"))
        assert receiver.poll() is None


def test_a_source_that_fails_publishes_nothing(place):
    def fails():
        yield "weight", tensors(2)["weight"]
        raise RuntimeError("the trainer fell over")

    with place.sender() as sender, place.receiver() as receiver:
        sender.send(tensors(1), version=1)
        specs = (hw.TensorSpec(name, each.dtype, tuple(each.shape)) for name, each in tensors(2).items())
        with pytest.raises(RuntimeError, match="fell over"):
            sender.send(fails(), version=2, manifest=hw.Manifest(specs))
        assert taken(receiver) == (1, 1)
        assert len(place.names()) == 1
        sender.send(tensors(3), version=3)
        assert taken(receiver) == (3, 3)


class Killed(BaseException):
    """The process is gone: nothing that it does after this reaches anybody."""


REQUESTS = ("get", "head", "names", "put", "delete")


@pytest.mark.parametrize("lost", ["before", "after"])
def test_a_trainer_that_is_killed_at_any_request_leaves_the_old_version_or_the_new_one(store, monkeypatch, lost):
    """``before``: the request never reached the store. ``after``: it did, and nobody heard the answer."""
    well = {name: getattr(service.Obstore, name) for name in REQUESTS}
    left = [10**6]

    def dying(name):
        async def ask(self, *asked):
            left[0] -= 1
            if left[0] < (0 if lost == "before" else -1):
                raise Killed
            answer = await well[name](self, *asked)
            if left[0] == -1:
                raise Killed
            return answer

        return ask

    seen = set()
    number, dies_at = 1, 0
    while True:
        with store.sender(keep=1) as sender:
            sender.send(tensors(number), version=number)
        with monkeypatch.context() as patch:
            for name in REQUESTS:
                patch.setattr(service.Obstore, name, dying(name))
            left[0] = dies_at
            try:
                with store.sender(keep=1) as sender:
                    sender.send(tensors(number + 1), version=number + 1)
            except Killed:
                dead = True
            else:
                dead = left[0] < 0
            left[0] = 10**6
        with store.receiver() as receiver:
            version, value = taken(receiver)
        assert version == value
        assert version in (number, number + 1)
        seen.add(version - number)
        if not dead:
            break
        number, dies_at = number + 2, dies_at + 1
    assert seen == {0, 1}
    assert dies_at > 8
    with store.sender(keep=1) as sender:  # Whoever comes next removes what the dead have left.
        sender.send(tensors(number + 2), version=number + 2)
    assert len(store.names()) == 1


STEPS = ("rename", "replace", "unlink", "mkdir", "fsync")


def test_a_trainer_that_is_killed_at_any_step_in_a_directory_leaves_one_version_or_the_other(tmp_path, monkeypatch):
    place, left = Place("directory", tmp_path), [0]
    well = {name: getattr(os, name) for name in STEPS}

    def dying(name):
        def step(*arguments, **options):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return well[name](*arguments, **options)

        return step

    seen, number, dies_at = set(), 1, 0
    while True:
        with place.sender(keep=1) as sender:
            sender.send(tensors(number), version=number)
        with monkeypatch.context() as patch:
            for name in STEPS:
                patch.setattr(os, name, dying(name))
            left[0] = dies_at
            try:
                with place.sender(keep=1) as sender:
                    sender.send(tensors(number + 1), version=number + 1)
            except Killed:
                dead = True
            else:
                dead = left[0] < 0
        with place.receiver() as receiver:
            version, value = taken(receiver)
        assert version == value
        assert version in (number, number + 1)
        seen.add(version - number)
        if not dead:
            break
        number, dies_at = number + 2, dies_at + 1
    assert seen == {0, 1}
    with place.sender(keep=1) as sender:
        sender.send(tensors(number + 2), version=number + 2)
    assert len(place.names()) == 1


def test_an_answer_that_is_lost_is_no_failure(store, monkeypatch):
    """The package tries again then, and is refused because of its first try."""
    put = service.Obstore.put

    async def twice(self, key, content, mode):
        await put(self, key, content, mode)
        return await put(self, key, content, mode)

    with store.sender() as sender, store.receiver() as receiver:
        monkeypatch.setattr(service.Obstore, "put", twice)
        sender.send(tensors(1), version=1)
        assert taken(receiver) == (1, 1)
        sender.send(tensors(2), version=2)
        assert taken(receiver) == (2, 2)


def test_a_store_that_ignores_conditions_is_found_out(store, monkeypatch):
    put = service.Obstore.put

    async def anyhow(self, key, content, mode):
        return await put(self, key, content, "overwrite")

    monkeypatch.setattr(service.Obstore, "put", anyhow)
    with pytest.raises(hw.StoreError, match="ignores conditions"):
        store.sender()


def test_a_poll_asks_once_an_interval(store, monkeypatch):
    asked = []
    get = service.Obstore.get

    async def noting(self, key, *rest):
        asked.append(key)
        return await get(self, key, *rest)

    with store.sender() as sender, store.receiver(interval=1000) as receiver:
        sender.send(tensors(1), version=1)
        monkeypatch.setattr(service.Obstore, "get", noting)
        assert [receiver.poll() for _ in range(5)] == [1] * 5
        taken(receiver)
        assert [receiver.poll() for _ in range(5)] == [None] * 5
        assert asked.count("bucket/run/latest.json") == 1


def test_a_rank_asks_a_web_server_for_its_rows_only(tmp_path):
    pytest.importorskip("obstore")
    files, place = {}, Place("directory", tmp_path)

    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1000, 1000))

        def load_weights(self, weights):
            for _, tensor in weights:
                self.weight.data.copy_(tensor[:1000])

    whole = torch.randn(8000, 1000)
    with place.sender() as sender, Web(files) as web:
        sender.send({"weight": whole}, version=1)
        for path in place.where.rglob("*"):
            if path.is_file():
                files[f"run/{path.relative_to(place.where)}"] = path.read_bytes()
        with hw.Receiver(f"{web.url}/run", interval=0.01) as receiver:
            model = Rows()
            report = hw.load(model, receiver)
            assert torch.equal(model.weight, whole[:1000])
            assert report.bytes_read < whole.nbytes / 7


def test_send_beside_the_trainer_and_a_close_that_ends_it(store, monkeypatch):
    with store.sender() as sender, store.receiver() as receiver:
        handle = sender.send(tensors(1), version=1, wait=False)
        assert handle.result(timeout=60).published
        assert taken(receiver) == (1, 1)
        begun = threading.Event()

        async def stalls(self, key, *rest):
            begun.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(service.Obstore, "put", stalls)
        handle = sender.send(tensors(2), version=2, wait=False)
        assert begun.wait(60)
        sender.close()
        with pytest.raises(hw.Closed):
            handle.result(timeout=60)
        assert receiver.poll() is None


def test_a_wait_of_a_receiver_ends_when_another_thread_closes_it(place):
    receiver = place.receiver(interval=1000, offer_timeout=1000)
    found = []

    def wait():
        try:
            found.append(receiver.manifest)
        except hw.Closed as error:
            found.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    receiver.close()
    thread.join(60)
    assert isinstance(found[0], hw.Closed)
    with pytest.raises(hw.Closed):
        receiver.poll()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"receivers": 2}, "receivers=: nobody connects"),
        ({"keys": "keys", "insecure": True}, "keys=, insecure=: nobody connects"),
        ({"on_lost": "drop"}, "on_lost="),
        ({"decision": "file:///x"}, "decision="),
        ({"digests": False, "slots": 2, "slot_nbytes": 1}, "slots=, slot_nbytes=, digests="),
        ({"keep": 0}, "keep= is a whole number of at least 1"),
    ],
)
def test_options_that_are_about_those_who_connect_are_refused(place, options, says):
    with pytest.raises(hw.UsageError, match=says):
        place.sender(**options)


def test_what_makes_no_sense_is_refused(place, tmp_path):
    with place.sender() as sender:
        with pytest.raises(hw.UsageError, match="workers look there, and are not seen"):
            _ = sender.connected
        with pytest.raises(hw.UsageError, match="receivers=: nobody connects"):
            sender.send(tensors(1), version=1, receivers=1)
        with pytest.raises(hw.UsageError, match="64 bits"):
            sender.send(tensors(1), version=2**64)
        with pytest.raises(hw.UsageError, match="no such text"):
            sender.send(tensors(1), version="\ud800")
    with pytest.raises(hw.UsageError, match="keys="):
        place.receiver(keys="keys")
    with pytest.raises(hw.UsageError, match="interval= is"):
        hw.Receiver(f"unix:{tmp_path}/s", interval=1)
    with pytest.raises(hw.UsageError, match="keep= is for places"):
        hw.Sender(f"unix:{tmp_path}/s", keep=1)
    with pytest.raises(hw.UsageError, match="the web is only read"):
        hw.Sender("https://example.org/run")
    with pytest.raises(hw.UsageError, match="its whole path"):
        hw.Sender("file://run")


def test_nothing_was_published_yet(place):
    with place.receiver(reconnect=False) as receiver, pytest.raises(hw.PeerLost, match="nothing was published here"):
        _ = receiver.manifest


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "no list of versions"),
        (b'{"step": 4}', "no list of versions"),
        (b'{"format": "hotweights versions 7", "sender": "", "writing": ""}', "one of both is older"),
        (
            b'{"format": "hotweights versions 1", "sender": "", "writing": "", "versions": '
            b'[{"number": 1, "version": 1, "folder": "../../secret"}]}',
            "no folder of a version",
        ),
    ],
)
def test_a_pointer_that_is_damaged_or_leads_elsewhere_is_refused_by_both_ends(place, content, says):
    place.write("latest.json", content)
    with place.receiver() as receiver, pytest.raises(hw.CheckpointError, match=says):
        receiver.poll()
    with pytest.raises(hw.CheckpointError, match=says):
        place.sender()


def test_a_directory_by_its_address(tmp_path):
    with hw.Sender(f"file://{tmp_path}/my%20run") as sender, hw.Receiver(f"file://{tmp_path}/my%20run") as receiver:
        sender.send(tensors(1), version=1)
        assert taken(receiver) == (1, 1)
        assert (tmp_path / "my run" / "latest.json").exists()
