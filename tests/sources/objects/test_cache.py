"""``cache_dir=``: processes of one host share what they read. The bytes are counted at the server."""

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn
from web import HubServer, stall, status

import hotweights as hw
from hotweights.sources.contracts import Read
from hotweights.sources.objects import cache as caches

MIB = 1024 * 1024
TENSOR = torch.arange(5 * MIB, dtype=torch.int32)  # 20 MiB: three blocks. The same in each process
ALL = TENSOR.nbytes


@pytest.fixture
def checkpoint(tmp_path):
    hw.save({"a": TENSOR}, tmp_path / "model" / "model.safetensors")
    return tmp_path / "model"


def read(url, folder, start=0, stop=ALL, **store):
    into = torch.empty(stop - start, dtype=torch.uint8)
    with hw.open(f"{url}/m/model.safetensors", cache_dir=folder, store=store or None) as source, hw.Pool() as pool:
        source.read([Read("a", start, into.nbytes, into)], pool=pool)
    return into


def as_expected(found, start=0, stop=ALL):
    return torch.equal(found, TENSOR.view(torch.uint8)[start:stop])


def in_a_process(url, folder, barrier, ends):
    barrier.wait(60)
    ends.send(as_expected(read(url, folder)))


def spawned(target, *arguments):
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments)
    process.start()
    return process


def test_two_processes_at_once_read_each_byte_once(serve, checkpoint, tmp_path):
    proxy, context = serve(checkpoint), multiprocessing.get_context("spawn")
    barrier, (ours, theirs) = context.Barrier(2), context.Pipe()
    both = [spawned(in_a_process, proxy.url, tmp_path / "cache", barrier, theirs) for _ in range(2)]
    assert [ours.recv() for _ in both] == [True, True]
    for process in both:
        process.join(60)
    assert proxy.nbytes <= ALL + 4 * 64 * 1024  # and the first bytes of the object, for whoever opens it
    before = proxy.nbytes
    assert as_expected(read(proxy.url, tmp_path / "cache"))
    assert proxy.nbytes - before <= 64 * 1024


def test_ranks_in_threads_that_want_parts_read_each_block_once(serve, checkpoint, tmp_path):
    proxy = serve(checkpoint)
    spans = [(n * 1_000_000, n * 1_000_000 + 3_000_000) for n in range(16)]
    with ThreadPoolExecutor(16) as ranks:
        found = list(ranks.map(lambda span: read(proxy.url, tmp_path / "cache", *span), spans))
    assert all(as_expected(part, *span) for part, span in zip(found, spans, strict=True))
    assert proxy.nbytes <= ALL + 17 * 64 * 1024


class Half(nn.Module):
    """A rank's half of ``weight``."""

    def __init__(self, rank):
        super().__init__()
        self.weight, self.rank = nn.Parameter(torch.zeros(512, 2560)), rank

    def load_weights(self, weights):
        for _, tensor in weights:
            self.weight.data.copy_(tensor.chunk(2)[self.rank])


def test_receivers_updates_and_routes_of_one_host_share_one_download(serve, tmp_path):
    """One worker polls; the others are given ``receiver.path``, as in docs/objects.md."""
    whole = torch.randn(1024, 2560)  # 10 MiB: two blocks
    with hw.Sender(tmp_path / "run") as sender:
        sender.send({"weight": whole}, version=7)
    proxy, cache = serve(tmp_path / "run"), {"cache_dir": tmp_path / "cache"}
    lives = [hw.LiveModel(Half(rank)) for rank in range(2)]
    with hw.Receiver(f"{proxy.url}/m", store=cache) as receiver:
        assert receiver.poll() == 7
        lives[0].load(receiver)
        with hw.open(receiver.path, store=cache) as source:
            lives[1].load(source, version=7)
    parts = [Half(rank) for rank in range(2)]
    with hw.open(receiver.path, store=cache) as source:
        for part in parts:
            hw.route(source, [hw.Component("", part)])
    for pair in ([live.model for live in lives], parts):
        assert torch.equal(torch.cat([half.weight for half in pair]), whole)
    assert proxy.nbytes < whole.nbytes + 8 * 64 * 1024  # and what is read to open each, and the pointer


def dies(url, folder):
    read(url, folder)


def test_whoever_reads_for_the_others_may_be_killed(serve, checkpoint, tmp_path):
    """Its block is half read; its lock ends with it."""
    proxy, begun = serve(checkpoint), threading.Event()
    half = stall(0.5)

    def fault(*answer):
        if len(answer[-1]) > 64 * 1024:
            begun.set()
            return half(*answer)
        return answer[1:]

    proxy.always = fault
    process = spawned(dies, proxy.url, tmp_path / "cache")
    assert begun.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    proxy.always = None
    assert as_expected(read(proxy.url, tmp_path / "cache", deadline=30))


def test_one_that_stands_still_is_waited_for_only_so_long(serve, checkpoint, tmp_path):
    proxy = serve(checkpoint)
    read(proxy.url, tmp_path / "cache")
    (place,) = {path.parent for path in blocks(tmp_path / "cache")}
    for path in blocks(tmp_path / "cache"):
        path.unlink()
    held = caches._lock(place, 1)
    assert held >= 0
    assert as_expected(read(proxy.url, tmp_path / "cache", deadline=3))
    os.close(held)


def blocks(folder):
    return sorted(path for path in Path(folder).rglob("*") if path.is_file() and path.name.isdecimal())


@pytest.mark.parametrize("damage", ["cut", "a bit", "empty", "longer"])
def test_a_block_that_is_damaged_is_read_again(serve, checkpoint, tmp_path, damage):
    proxy = serve(checkpoint)
    read(proxy.url, tmp_path / "cache")
    path = blocks(tmp_path / "cache")[1]
    content = bytearray(path.read_bytes())
    if damage == "a bit":
        content[1000] ^= 1
    path.write_bytes({"cut": content[:-5], "a bit": content, "empty": b"", "longer": content + b"!"}[damage])
    before = proxy.nbytes
    assert as_expected(read(proxy.url, tmp_path / "cache"))
    assert 8 * MIB <= proxy.nbytes - before < 9 * MIB


def test_what_a_killed_process_did_not_finish_is_never_taken(serve, checkpoint, tmp_path, monkeypatch):
    proxy = serve(checkpoint)
    with monkeypatch.context() as patch:
        patch.setattr(caches.os, "replace", lambda draft, place: None)  # Dead before its name was given.
        read(proxy.url, tmp_path / "cache")
    assert not blocks(tmp_path / "cache")
    assert as_expected(read(proxy.url, tmp_path / "cache"))


def test_another_version_of_the_object_is_never_mixed_with_this_one(serve, checkpoint, tmp_path):
    proxy = serve(checkpoint)
    read(proxy.url, tmp_path / "cache")
    content = proxy.web.files["m/model.safetensors"]
    proxy.web.files["m/model.safetensors"] = content[:-4] + b"\0\0\0\0"
    found = read(proxy.url, tmp_path / "cache")
    assert as_expected(found[:-4], 0, ALL - 4)
    assert not found[-4:].any()


def test_it_holds_no_more_than_it_may(serve, checkpoint, tmp_path):
    proxy, limit = serve(checkpoint), 17 * MIB
    for _ in range(2):
        assert as_expected(read(proxy.url, tmp_path / "cache", cache_nbytes=limit))
        assert sum(path.stat().st_size for path in blocks(tmp_path / "cache")) <= limit
    mine = tmp_path / "cache" / "mine.txt"
    mine.write_text("stays")
    assert as_expected(read(proxy.url, tmp_path / "cache", cache_nbytes=1))
    assert not blocks(tmp_path / "cache")
    assert mine.exists()


def test_what_was_read_last_goes_last(tmp_path):
    cache = caches.Cache(tmp_path / "cache", 25)
    folder = tmp_path / "cache" / ("0" * 40)
    folder.mkdir()
    for number in range(3):
        (folder / str(number)).write_bytes(b"x" * 10)
        os.utime(folder / str(number), (1000 - number, 1000 - number))
    cache._make_room()
    assert [path.name for path in blocks(tmp_path / "cache")] == ["0", "1"]


def test_a_full_disk_keeps_nothing_and_reads_all_the_same(serve, checkpoint, tmp_path, monkeypatch, caplog):
    proxy = serve(checkpoint)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(caches.os, "replace", full)
    assert as_expected(read(proxy.url, tmp_path / "cache"))
    assert "keeps no more of objects: No space left" in caplog.text
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.name != "lock"]


def test_a_store_that_refuses_is_said_as_without_a_cache(serve, checkpoint, tmp_path):
    proxy = serve(checkpoint)
    with hw.open(f"{proxy.url}/m/model.safetensors", cache_dir=tmp_path / "cache", store={"deadline": 30}) as source:
        proxy.always = status(400)
        with pytest.raises(hw.StoreError, match="the store refused: 400"):
            dict(source.tensors())


def test_an_object_that_nothing_tells_from_another_is_not_kept(tmp_path):
    cache = caches.Cache(tmp_path / "cache", 100)
    service = pytest.importorskip("hotweights.sources.objects.service")
    assert not cache.holds(service.Pin(5, None, None))
    assert cache.holds(service.Pin(5, "tag", None))


def test_models_of_a_hub_are_kept_by_their_commit(checkpoint, tmp_path, monkeypatch):
    with HubServer({"model.safetensors": (checkpoint / "model.safetensors").read_bytes()}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        for _ in range(2):
            with hw.open("hf://org/name", cache_dir=tmp_path / "cache") as source:
                assert torch.equal(dict(source.tensors())["a"], TENSOR)
        assert len([span for _, _, span in hub.cdn.asked if span != "bytes=0-65535"]) == 3


def test_a_directory_that_others_write_to_is_refused(serve, checkpoint, tmp_path):
    proxy = serve(checkpoint)
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(hw.UsageError, match="others may write there"):
        read(proxy.url, tmp_path / "open")
    (tmp_path / "file").write_text("")
    for folder, says in ((tmp_path / "file", "cannot be made"), (7, "the path of a directory")):
        with pytest.raises(hw.UsageError, match=says):
            read(proxy.url, folder)
    with pytest.raises(hw.UsageError, match="name its directory with cache_dir="):
        hw.open(f"{proxy.url}/m", store={"cache_nbytes": 5})
    with pytest.raises(hw.UsageError, match="cache_dir= is for addresses"):
        hw.open(checkpoint, cache_dir=tmp_path)
    read(proxy.url, tmp_path / "mine")
    assert (tmp_path / "mine").stat().st_mode & 0o777 == 0o700
