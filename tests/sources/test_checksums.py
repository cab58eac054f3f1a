"""digests=: files are compared with a list while they are read, and what differs is told before it counts."""

import hashlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from web import Web, served

import hotweights as hw
from hotweights.sources import checksums
from hotweights.sources.files import source as files_source
from hotweights.testing import write_checkpoint

TENSORS = {f"{number}.weight": torch.randn(64, 32) for number in range(6)}


def model():
    return nn.Sequential(*[nn.Linear(32, 64, bias=False) for _ in range(6)])


def sums(files, written=lambda file: file.name):
    return "".join(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {written(file)}\n" for file in files)


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "checkpoint", TENSORS, shards=3)


@pytest.fixture
def files(checkpoint):
    return sorted(checkpoint.glob("*.safetensors"))


@pytest.fixture(params=["sha256sum", "tagged", "ours"])
def digests(request, checkpoint, files, tmp_path):
    path = tmp_path / "digests"
    if request.param == "sha256sum":
        path.write_text(sums(files) + sums([checkpoint / "model.safetensors.index.json"]))
    elif request.param == "tagged":
        path.write_text(
            "".join(f"SHA256 ({file.name}) = {hashlib.sha256(file.read_bytes()).hexdigest()}\n" for file in files)
        )
    else:
        with hw.open(checkpoint) as source:
            path.write_text(json.dumps(source.digest().as_dict()))
    return path


def spoil(file):
    """Change one bit of its last tensor."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


WAYS = {
    "leases": lambda source: [lease.tensor for lease in source.leases()],
    "tensors": lambda source: dict(source.tensors()),
    "digest": lambda source: source.digest(),
    "load": lambda source: hw.load(model(), source),
    "save": lambda source: hw.save(source, "saved"),
    "route": lambda source: hw.route(source, [hw.Component("", lambda pairs: [name for name, _ in pairs])]),
}


@contextmanager
def on_disk(folder):
    yield folder


@contextmanager
def on_the_web(folder):
    pytest.importorskip("obstore")
    with Web(served(folder)) as web:
        yield f"{web.url}/m"


@pytest.mark.parametrize("place", [on_disk, on_the_web], ids=lambda place: place.__name__)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_read_is_checked(way, place, checkpoint, files, digests, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    read = WAYS[way]
    with place(checkpoint) as where, hw.open(where, digests=digests) as source:
        read(source)
        read(source)  # The files are known by now.
    spoil(files[1])
    with place(checkpoint) as where, hw.open(where, digests=digests) as source:
        with pytest.raises(hw.CheckpointError, match=r"is not what .*digests says") as caught:
            read(source)
        assert len(caught.value.problems) == 1
        assert " expected, found " in caught.value.problems[0]
    assert way != "save" or Path("saved").exists()


def test_the_file_and_both_digests_are_named(checkpoint, files, tmp_path):
    (tmp_path / "sums").write_text(sums(files))
    before = hashlib.sha256(files[2].read_bytes()).hexdigest()
    spoil(files[2])
    after = hashlib.sha256(files[2].read_bytes()).hexdigest()
    with pytest.raises(hw.CheckpointError) as caught:
        hw.load(model(), checkpoint, digests=tmp_path / "sums")
    assert caught.value.problems == (f"{files[2].name}: sha256 {before} expected, found {after}",)
    assert "it may hold tensors of both versions" in "".join(caught.value.__notes__)


def test_where_all_tensors_differ_that_is_said_once(checkpoint, tmp_path):
    with hw.open(checkpoint) as source:
        (tmp_path / "list").write_text(json.dumps(source.digest().as_dict()))
    hw.save(checkpoint, tmp_path / "half", dtype=torch.float16)
    with pytest.raises(hw.CheckpointError) as caught:
        hw.load(model(), tmp_path / "half", digests=tmp_path / "list", cast="loader")
    (problem,) = caught.value.problems
    assert "6 of 6 tensors differ: another checkpoint, or another dtype" in problem


@pytest.mark.parametrize("atomic", ["staged", "journal"])
def test_a_live_model_keeps_its_version(atomic, checkpoint, files, digests):
    live = hw.LiveModel(model(), atomic=atomic)
    live.load(checkpoint, version=1, digests=digests)
    before = live.digest()
    spoil(files[0])
    with pytest.raises(hw.UpdateAborted, match="is not what") as caught:
        live.update(checkpoint, version=2, digests=digests)
    assert isinstance(caught.value.__cause__, hw.CheckpointError)
    assert (live.version, live.digest()) == (1, before)
    live.update(checkpoint, version=2)
    assert live.version == 2


def test_a_model_on_meta_is_on_meta_again(checkpoint, files, digests):
    with torch.device("meta"):
        empty = model()
    spoil(files[0])
    with pytest.raises(hw.CheckpointError):
        hw.load(empty, checkpoint, device="cpu", digests=digests)
    assert all(parameter.is_meta for parameter in empty.parameters())


def test_what_the_list_lacks_is_refused_before_anything_is_read(checkpoint, files, tmp_path):
    (tmp_path / "sums").write_text(sums(files[:1]))
    with pytest.raises(hw.CheckpointError) as caught:
        hw.open(checkpoint, digests=tmp_path / "sums")
    assert caught.value.problems == tuple(f"{file.name}: not in the list" for file in files[1:])
    (tmp_path / "ours").write_text(json.dumps({"tensors": {"0.weight": "1", "more": "2"}}))
    with pytest.raises(hw.CheckpointError) as caught:
        hw.open(checkpoint, digests=tmp_path / "ours")
    assert "tensor 'more': expected, and not there" in caught.value.problems
    assert "tensor '1.weight': not in the list" in caught.value.problems


def test_names_that_several_files_have(tmp_path):
    """The text encoder and the vae of a pipeline: what a list in the pipeline's folder says is told apart by path."""
    for name, value in (("vae", 1.0), ("unet", 2.0)):
        hw.save({"weight": torch.full((2,), value)}, tmp_path / "pipe" / name / "model.safetensors")
    both = sorted((tmp_path / "pipe").rglob("*.safetensors"))
    lines = sums(both, lambda file: file.relative_to(tmp_path / "pipe"))
    (tmp_path / "pipe" / "SHA256SUMS").write_text(lines)
    for name in ("vae", "unet"):
        with hw.open(tmp_path / "pipe", subfolder=name, digests=tmp_path / "pipe" / "SHA256SUMS") as source:
            dict(source.tensors())
        with (
            on_the_web(tmp_path / "pipe") as where,
            hw.open(where, subfolder=name, digests=tmp_path / "pipe" / "SHA256SUMS") as source,
        ):
            dict(source.tensors())
    (tmp_path / "elsewhere").write_text(lines)
    with pytest.raises(hw.CheckpointError, match="put the list into the folder that its paths begin in"):
        hw.open(tmp_path / "pipe", subfolder="vae", digests=tmp_path / "elsewhere")


def test_another_reader(checkpoint, files, tmp_path):
    (tmp_path / "sums").write_text(sums(files))
    with hw.open(checkpoint, reader="safetensors", digests=tmp_path / "sums") as source:
        hw.load(model(), source)
    spoil(files[1])
    for read in (WAYS["load"], WAYS["tensors"], WAYS["leases"]):
        with (
            hw.open(checkpoint, reader="safetensors", digests=tmp_path / "sums") as source,
            pytest.raises(hw.CheckpointError, match=files[1].name),
        ):
            read(source)
    (tmp_path / "ours").write_text(json.dumps({"tensors": {}}))
    with pytest.raises(hw.UsageError, match="leave reader= out, or give lines of sha256sum"):
        hw.open(checkpoint, reader="safetensors", digests=tmp_path / "ours")


def test_a_file_that_is_replaced_meanwhile_is_told_as_that(checkpoint, files, digests):
    with hw.open(checkpoint, digests=digests) as source:
        data = files[0].read_bytes()
        files[0].unlink()
        files[0].write_bytes(data)
        with pytest.raises(hw.CheckpointChanged):
            hw.load(model(), source)


@pytest.mark.parametrize("what", [TENSORS, nn.Linear(2, 2), iter(())])
def test_what_has_no_files(what, digests):
    what = hw.from_iterator(what) if not isinstance(what, (dict, nn.Module)) else what
    with pytest.raises(hw.UsageError, match="digests= says what files hold"):
        hw.load(model(), what, digests=digests)


def test_an_open_source_is_to_be_opened_so(checkpoint, digests):
    with hw.open(checkpoint) as source, pytest.raises(hw.UsageError, match=r"hotweights\.open\(path, digests=\.\.\.\)"):
        hw.load(model(), source, digests=digests)
    with pytest.raises(hw.UsageError, match="digests= is the path of a list of digests; found True"):
        hw.open(checkpoint, digests=True)


def test_a_list_that_is_not_there_leaves_nothing_open(checkpoint, tmp_path):
    with pytest.raises(hw.CheckpointError, match="No such file"):
        hw.open(checkpoint, digests=tmp_path / "nowhere")


def test_close_ends_the_reading(checkpoint, digests, monkeypatch):
    """Also where it would never end by itself."""
    begun = threading.Event()

    def never(self, *_):
        begun.set()
        assert self._stopped.wait(60)
        raise hw.Closed("it was closed")

    monkeypatch.setattr(checksums.Proof, "_file", never)
    monkeypatch.setattr(checksums.Proof, "_tensors", never)
    with ThreadPoolExecutor(1) as threads, hw.open(checkpoint, digests=digests) as source:
        loading = threads.submit(hw.load, model(), source)
        assert begun.wait(60)
        source.close()
        with pytest.raises(hw.Closed):
            loading.result(60)


def test_close_ends_the_wait_for_what_had_not_begun(checkpoint, monkeypatch):
    """One thread reads, and the other files wait for it."""
    begun = threading.Event()

    def never(self, *_):
        begun.set()
        assert self._stopped.wait(60)
        raise hw.Closed("it was closed")

    monkeypatch.setattr(checksums.Proof, "_file", never)
    monkeypatch.setattr(checksums.os, "cpu_count", lambda: 1)
    files = sorted(checkpoint.glob("*.safetensors"))
    assert len(files) > 1
    sums = checkpoint.parent / "sums"
    sums.write_text("".join(f"{'0' * 64}  {path.name}\n" for path in files))
    with ThreadPoolExecutor(1) as threads, hw.open(checkpoint, digests=sums) as source:
        loading = threads.submit(hw.load, model(), source)
        assert begun.wait(60)
        source.close()
        with pytest.raises(hw.Closed):
            loading.result(60)


def test_what_is_compared_is_read_through_the_page_cache(checkpoint, digests, monkeypatch):
    """Around it the disk would read each byte twice. Who asks for that gets it."""
    asked, read = [], files_source.read_segments
    monkeypatch.setattr(files_source, "read_segments", lambda *a, io, **k: asked.append(io) or read(*a, io=io, **k))
    for io in ("auto", "direct"):
        hw.load(model(), checkpoint, digests=digests, io=io)
        hw.load(model(), checkpoint, io=io)
    assert asked == ["buffered", "auto", "direct", "direct"]


def test_nothing_is_read_where_only_the_manifest_is_asked_for(checkpoint, digests, monkeypatch):
    monkeypatch.setattr(checksums.Proof, "begin", lambda self: pytest.fail("it began to read"))
    with hw.open(checkpoint, digests=digests) as source:
        hw.trace(model(), source)
