"""Saving: what is written is what was given, and at every step a reader sees the old version or the new one, whole."""

import contextlib
import errno
import json
import os
import warnings

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.testing._internal.two_tensor import TwoTensor

import hotweights as hw
from hotweights.testing import write_checkpoint


def tensors_of(place):
    with hw.open(place) as source:
        return dict(source.tensors())


def same(left, right):
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


ODD = {
    "bytes": torch.arange(3, dtype=torch.uint8),  # An odd length, which would misalign what follows.
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
    "turned": torch.arange(12.0).reshape(3, 4).t(),
    "part": torch.arange(10.0)[2:9:3],
    "bf16": torch.arange(5).bfloat16(),
    "fp8": torch.arange(4.0).to(torch.float8_e4m3fn),
    "complex": torch.tensor([1 + 2j]),
    "bool": torch.tensor([True, False]),
    "größe": torch.zeros(2, dtype=torch.int64),
}


def fake():
    with FakeTensorMode():
        return torch.ones(2, 2)


def part():
    """Half of a tensor: the other half lies on another rank."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    return distribute_tensor(torch.ones(2, 2), init_device_mesh("cpu", (2,)), [Shard(0)])


NOT_PLAIN = {
    "meta": lambda: torch.ones(2, 2, device="meta"),
    "sparse_coo": lambda: torch.ones(2, 2).to_sparse(),
    "sparse_csr": lambda: torch.ones(2, 2).to_sparse_csr(),
    "_mkldnn": lambda: torch.ones(2, 2).to_mkldnn(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "FakeTensor": fake,
    "TwoTensor": lambda: TwoTensor(torch.ones(2, 2), torch.ones(2, 2)),
    "Shard": part,
}


class TestWhatIsWritten:
    def test_a_file_that_the_reference_reads(self, tmp_path):
        report = hw.save(ODD, tmp_path / "a.safetensors")
        assert report.files == (str(tmp_path / "a.safetensors"),)
        read = load_file(tmp_path / "a.safetensors")
        assert read.keys() == ODD.keys()
        for name, tensor in ODD.items():
            left, right = (t.contiguous().reshape(-1).view(torch.uint8) for t in (read[name], tensor))
            assert torch.equal(left, right), name
            assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        with hw.open(tmp_path / "a.safetensors") as source:
            assert source.digest() == report.digest
            for name in ODD:
                bits = source.manifest[name].dtype.itemsize
                assert source.position(name)[1] % bits == 0
        assert os.listdir(tmp_path) == ["a.safetensors"]

    def test_shards_and_index(self, tmp_path):
        state = {f"layer.{number}": torch.full((4,), float(number)) for number in range(5)}
        hw.save(state, tmp_path / "new" / "model", shard_size=40)
        place = tmp_path / "new" / "model"
        index = json.loads((place / "model.safetensors.index.json").read_text())
        assert index["metadata"] == {"total_size": 80}
        assert index["weight_map"]["layer.4"] == "model-00003-of-00003.safetensors"
        assert same(tensors_of(place), state)
        assert os.listdir(tmp_path / "new") == ["model"]

    @pytest.mark.parametrize(
        ("given", "nbytes"), [(7, 7), ("7", 7), ("5GB", 5 * 10**9), ("2MiB", 2**21), ("1.5 kB", 1500), ("1TiB", 2**40)]
    )
    def test_sizes(self, given, nbytes, tmp_path):
        from hotweights.sources.save import _limit

        assert _limit(given, tmp_path) == nbytes

    def test_a_view_that_is_conjugated_is_written_with_its_values(self, tmp_path):
        model, values = nn.Module(), torch.tensor([1 + 2j, 3 - 4j])
        model.register_buffer("plain", values)
        model.register_buffer("turned", values.conj())
        assert hw.save(model, tmp_path / "o").tied == {}
        assert torch.equal(tensors_of(tmp_path / "o")["turned"], values.conj())

    def test_a_name_that_is_no_text_is_refused(self, tmp_path):
        with pytest.raises(hw.SaveError, match="UTF-8"):
            hw.save({"a\ud800": torch.ones(1)}, tmp_path / "o")
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize(
        "wrong",
        [{"where": 5}, {"where": None}, {"where": "a\0b"}, {"metadata": {"step": 1}}, {"metadata": {"step": None}},
         {"metadata": {1: "a"}}, {"metadata": {"a": "\ud800"}}, {"metadata": "text"}],
    )  # fmt: skip
    def test_what_would_make_no_file_that_opens_is_refused(self, wrong, tmp_path):
        with pytest.raises(hw.UsageError, match=next(iter(wrong))):
            hw.save({"a": torch.ones(1)}, **{"where": tmp_path / "o", **wrong})
        assert os.listdir(tmp_path) == []

    def test_a_configuration_that_names_other_weights_is_no_place_for_new_ones(self, tmp_path):
        place, new = tmp_path / "place", tmp_path / "new"
        hw.save({"a": torch.zeros(1)}, place)
        os.rename(place / "model.safetensors", place / "other.safetensors")
        (place / "config.json").write_text('{"transformers_weights": "other.safetensors"}')
        for where, beside in ((place, ()), (new, [place / "config.json"])):
            with pytest.raises(hw.UsageError, match=r"'other\.safetensors'.*save to another directory, to a file"):
                hw.save({"a": torch.ones(1)}, where, beside=beside)
        assert sorted(os.listdir(place)) == ["config.json", "other.safetensors"]
        assert not new.exists()
        hw.save({"a": torch.ones(1)}, place / "other.safetensors")
        assert same(tensors_of(place), {"a": torch.ones(1)})

    def test_tied_weights_of_a_module_are_written_once(self, tmp_path):
        model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "head": nn.Linear(3, 4, bias=False)})
        model["head"].weight = model["embed"].weight
        report = hw.save(model, tmp_path / "tied")
        assert report.tied == {"head.weight": "embed.weight"}
        other = nn.ModuleDict({"embed": nn.Embedding(4, 3), "head": nn.Linear(3, 4, bias=False)})
        other["head"].weight = other["embed"].weight
        hw.load(other, tmp_path / "tied")
        assert torch.equal(other["head"].weight, model["embed"].weight)
        assert hw.save(model.state_dict(), tmp_path / "both").tied == {}
        assert set(tensors_of(tmp_path / "both")) == {"embed.weight", "head.weight"}

    def test_other_sources(self, tmp_path):
        state = {"a": torch.randn(3), "b": torch.randn(2, 2)}
        hw.save(iter(state.items()), tmp_path / "pairs")
        hw.save(list(state.items()), tmp_path / "list")
        hw.save(str(tmp_path / "pairs"), tmp_path / "path")
        with hw.open(state) as known, hw.from_iterator(reversed(state.items()), known.manifest) as source:
            hw.save(source, tmp_path / "promised")  # comes in another order
        for name in ("pairs", "list", "path", "promised"):
            assert same(tensors_of(tmp_path / name), state)

    def test_a_cast(self, tmp_path):
        state = {"w": torch.tensor([1.0, torch.inf]), "n": torch.tensor([3]), "q": torch.ones(2).to(torch.float8_e5m2)}
        hw.save(state, tmp_path / "half", dtype=torch.bfloat16)
        read = tensors_of(tmp_path / "half")
        assert [read[name].dtype for name in "wnq"] == [torch.bfloat16, torch.int64, torch.float8_e5m2]
        with pytest.raises(hw.SaveError, match=r"values that F16 cannot hold; leave the cast out, or .* BF16"):
            hw.save({"w": torch.tensor([1e6])}, tmp_path / "no", dtype=torch.float16)
        assert not (tmp_path / "no").exists()
        hw.save({"w": torch.tensor([1e6])}, tmp_path / "no", dtype=torch.bfloat16)


class TestRefusals:
    @pytest.mark.parametrize(
        ("what", "arguments", "error", "words"),
        [
            ({"__metadata__": torch.ones(1)}, {}, hw.SaveError, "is no name for a tensor"),
            ({"c": torch.ones(1, dtype=torch.complex128)}, {}, hw.SaveError, "no dtype complex128"),
            ({"m": torch.ones(1, device="meta")}, {}, hw.UsageError, "on meta"),
            ({"a": torch.ones(1)}, {"shard_size": "5 apples"}, hw.UsageError, "found '5 apples'"),
            ({"a": torch.ones(1)}, {"shard_size": 0}, hw.UsageError, "at least one byte"),
            ({"a": torch.ones(1)}, {"dtype": torch.int8}, hw.UsageError, "a dtype of floats"),
            (3, {}, hw.UsageError, "this is a int"),
        ],
    )
    def test_before_anything_is_written(self, what, arguments, error, words, tmp_path):
        with pytest.raises(error, match=words):
            hw.save(what, tmp_path / "x", **arguments)
        assert not os.listdir(tmp_path)

    @pytest.mark.parametrize("way", ["mapping", "pairs", "promised"])
    @pytest.mark.parametrize("kind", NOT_PLAIN)
    def test_tensors_without_plain_bytes(self, kind, way, tmp_path, monkeypatch):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that some of them are prototypes
            state = {"plain": torch.ones(2, 2), "odd": NOT_PLAIN[kind]()}
        what = state if way == "mapping" else list(state.items())
        if way == "promised":
            with hw.open({name: torch.ones(2, 2) for name in state}) as known:
                what = hw.from_iterator(what, known.manifest)
        else:  # All tensors are known before anything is written; of a promise they come while it is.
            monkeypatch.setattr("hotweights.sources.save.Staging", None)
        try:
            with pytest.raises(hw.UsageError, match=rf"odd.*{kind}"):
                hw.save(what, tmp_path / "x")
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        assert not os.listdir(tmp_path)

    def test_places(self, tmp_path):
        (tmp_path / "file").touch()
        state = {"a": torch.ones(1)}
        with pytest.raises(hw.UsageError, match=r"Save to a directory, or to a name that ends in .safetensors"):
            hw.save(state, tmp_path / "file")
        with pytest.raises(hw.SaveError, match=r"nothing was saved: .*file is a file, no directory"):
            hw.save(state, tmp_path / "file" / "below")
        with pytest.raises(hw.UsageError, match="addresses that can be written to"):
            hw.save(state, "https://host/model")
        with pytest.raises(hw.UsageError, match="one file has no shards"):
            hw.save(state, tmp_path / "a.safetensors", shard_size=5)

    def test_what_lies_beside(self, tmp_path):
        for name in ("config.json", "model.safetensors"):
            (tmp_path / name).write_text("{}")
        state = {"a": torch.ones(1)}
        with pytest.raises(hw.UsageError, match="the weights take this name"):
            hw.save(state, tmp_path / "x", beside=[tmp_path / "model.safetensors"])
        with pytest.raises(hw.UsageError, match="one file has nothing beside it"):
            hw.save(state, tmp_path / "x.safetensors", beside=[tmp_path / "config.json"])
        with pytest.raises(hw.SaveError, match=r"none.json: cannot be copied, and nothing was saved: No such file"):
            hw.save(state, tmp_path / "x", beside=[tmp_path / "none.json"])
        assert len(os.listdir(tmp_path)) == 2

    def test_a_source_that_fails(self, tmp_path):
        def pairs():
            yield "a", torch.ones(2)
            raise ZeroDivisionError

        with hw.open({"a": torch.ones(2), "b": torch.ones(2)}) as known:
            manifest = known.manifest
        with hw.from_iterator(pairs(), manifest) as source, pytest.raises(ZeroDivisionError):
            hw.save(source, tmp_path / "x")
        assert not os.listdir(tmp_path)


CALLS = "mkdir open pwrite fsync rename unlink rmdir close".split()
OLD = {name: torch.full((4,), 1.0) for name in ("a", "b", "c")}
NEW = {name: torch.full((4,), 2.0) for name in ("a", "b", "c")}
SHAPES = {"file": None, "whole": None, "sharded": 20, "fewer": 40}


class Killed(BaseException):
    """The process ends here."""


class Disk:
    """Fails at the nth system call. ``dead``: so do all later ones, as after a kill; else only that one does."""

    def __init__(self, monkeypatch, at, dead):
        self.count = 0
        for name in CALLS:
            monkeypatch.setattr(os, name, self.wrap(getattr(os, name), at, dead))

    def wrap(self, real, at, dead):
        def call(*args, **options):
            self.count += 1
            if dead and self.count >= at:
                raise Killed
            if self.count == at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **options)

        return call


def seen(place):
    """What a reader finds, by transformers' rule: a whole file goes before an index."""
    whole = place / "model.safetensors"
    try:
        return tensors_of(whole if whole.exists() else place)
    except hw.CheckpointError:
        return None


@pytest.mark.parametrize("dead", [False, True], ids=["full", "killed"])
@pytest.mark.parametrize("new", SHAPES)
@pytest.mark.parametrize("old", ["nothing", "file", "whole", "sharded", "fewer"])
def test_at_every_step_the_target_is_old_or_new(old, new, dead, tmp_path, monkeypatch):
    if (old == "file") != (new == "file") and old != "nothing":
        pytest.skip("a file does not replace a directory")
    outcomes = []
    for at in range(1, 200):
        place = tmp_path / str(at) / ("m.safetensors" if new == "file" else "m")
        os.makedirs(place.parent)
        if old != "nothing":
            hw.save(OLD, place, shard_size=SHAPES[old])
        with monkeypatch.context() as patch:
            disk = Disk(patch, at, dead)
            try:
                report = hw.save(NEW, place, shard_size=SHAPES[new])
            except (hw.SaveError, Killed) as error:
                ended = error
            else:
                ended = None
        tensors = seen(place)
        outcomes.append("new" if tensors and same(tensors, NEW) else "old")
        assert outcomes[-1] == "new" or (tensors is None if old == "nothing" else same(tensors, OLD))
        if isinstance(ended, hw.SaveError):
            assert "No space left" in str(ended)
            assert outcomes[-1] == "old"
            left = place.parent if new == "file" or old == "nothing" else place
            assert not {name for name in os.listdir(left) if "-v2-" in name}
        elif ended is None:
            assert outcomes[-1] == "new"
            assert len(report.warnings) <= 1
        if ended is None and disk.count < at:
            break
    if dead:  # Of single failures some are nothing: a directory that exists cannot be made, and need not.
        assert outcomes == sorted(outcomes, reverse=True), "once new, it stays"  # "old" sorts behind "new"
    assert outcomes[-1] == "new"


def test_what_cannot_be_put_beside_is_a_warning(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    place = write_checkpoint(tmp_path / "m", OLD)
    rename = os.rename

    def refusing(old, new):
        if os.path.basename(new) == "config.json":
            raise PermissionError(errno.EACCES, "Permission denied")
        rename(old, new)

    monkeypatch.setattr(os, "rename", refusing)
    (warning,) = hw.save(NEW, place, beside=[tmp_path / "config.json"]).warnings
    assert warning == f"{place / 'config.json'}: the new version is complete, but then this failed: Permission denied"
    assert same(tensors_of(place), NEW)
    assert os.listdir(place) == ["model.safetensors"]
    assert hw.save(NEW, tmp_path / "new", beside=[tmp_path / "config.json"]).warnings == ()
    assert sorted(os.listdir(tmp_path / "new")) == ["config.json", "model.safetensors"]


def test_nothing_is_left_beside(tmp_path, monkeypatch):
    place = write_checkpoint(tmp_path / "m", OLD, shards=2)
    (place / "config.json").write_text("{}")
    hw.save(NEW, place, shard_size=20)
    assert len(os.listdir(place)) == 5
    assert (place / "config.json").exists()
    for at in range(1, 30):
        with monkeypatch.context() as patch:
            Disk(patch, at, dead=False)
            with contextlib.suppress(hw.SaveError):
                hw.save(NEW, place)
        assert not [name for name in os.listdir(place) if name.endswith(".saving")]
