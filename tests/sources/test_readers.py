"""Readers of other packages, the real ones. Their contract is in test_contract."""

import json
import pickle
import struct
import sys

import pytest
import torch
from runai_model_streamer import SafetensorsStreamer
from torch import nn

import hotweights as hw
from hotweights.sources import READERS
from hotweights.sources.readers import source as readers
from hotweights.testing import assert_same_bits, write_checkpoint
from readers import REUSING, save

SEED = {f"layers.{number}.weight": torch.full((64, 64), float(number)) for number in range(16)}
CHECKPOINTS = {
    "bf16": {f"w{n}": torch.randn(8, 16 * n, dtype=torch.bfloat16) for n in range(1, 5)},
    "fp32": {f"w{n}": torch.randn(n, 5) for n in range(1, 5)},
    "int8": {"w": torch.arange(-60, 60, dtype=torch.int8).view(4, 30), "scale": torch.tensor(0.5)},
    "fp8": {"w": torch.randn(16, 16).to(torch.float8_e4m3fn), "u": torch.randn(3).to(torch.float8_e5m2)},
    "0-dim": {"a": torch.tensor(3.0), "b": torch.tensor(7), "c": torch.tensor(True)},
    "empty": {"a": torch.empty(0, 7), "b": torch.ones(2), "c": torch.empty(0)},
    "no tensor": {},
    "odd sizes": {"a": torch.arange(3, dtype=torch.uint8), "b": torch.randn(7), "c": torch.randn(5).bfloat16()},
    "wide": {f"w{n}": torch.randn(1000 + n) for n in range(40)},
}


@pytest.fixture(params=["default", "reusing"])
def limit(request, monkeypatch):
    """Packages read it each time that they stream."""
    for variable, value in {k: v for env in REUSING.values() for k, v in env.items()}.items():
        if request.param == "reusing":
            monkeypatch.setenv(variable, value)


class TestSeed:
    """The first report: a memory limit that forces reuse, and sixteen equal tensors."""

    @pytest.fixture(autouse=True)
    def reusing(self, monkeypatch):
        monkeypatch.setenv("RUNAI_STREAMER_MEMORY_LIMIT", "0")

    @pytest.fixture
    def path(self, tmp_path):
        return write_checkpoint(tmp_path, SEED) / "model.safetensors"

    def raw(self, path, **options):
        with SafetensorsStreamer() as streamer:
            streamer.stream_files([str(path)], **options)
            yield from streamer.get_tensors()

    def test_the_raw_iterator_is_wrong(self, path):
        kept = dict(self.raw(path, owned=False))
        assert len({tensor.data_ptr() for tensor in kept.values()}) == 1
        last = next(reversed(kept))
        assert all(torch.equal(tensor, SEED[last]) for tensor in kept.values())
        assert sum(not torch.equal(kept[name], SEED[name]) for name in SEED) == 15

    def test_the_same_iterator_through_ours_is_right(self, path):
        with hw.from_iterator(self.raw(path, owned=False)) as source:
            kept = dict(source.tensors())
        assert len({tensor.data_ptr() for tensor in kept.values()}) == 16
        assert_same_bits(kept, SEED)

    def test_the_reader_is_right(self, path):
        with hw.open(path, reader="runai") as source:
            kept = dict(source.tensors())
            assert len({tensor.data_ptr() for tensor in kept.values()}) == 16
            assert_same_bits(kept, SEED)
            assert len({lease.tensor.data_ptr() for lease in source.leases()}) == 1, "leases are not copied"

    def test_versions_that_cannot_give_memory_away(self, path, monkeypatch):
        class Until016(SafetensorsStreamer):
            def stream_files(self, paths):
                super().stream_files(paths, owned=False)

        module = sys.modules["hotweights.sources.readers.runai"]
        monkeypatch.setattr(module, "SafetensorsStreamer", Until016)
        monkeypatch.setattr(module, "_CAN_OWN", False)
        monkeypatch.setattr(module, "READER", module.READER._replace(owns=False))
        with hw.open(path, reader="runai") as source:
            assert_same_bits(dict(source.tensors()), SEED)


@pytest.mark.parametrize("reader", READERS)
class TestEvery:
    @pytest.mark.parametrize("shards", [1, 3])
    @pytest.mark.parametrize("kind", CHECKPOINTS)
    def test_all_give_the_same(self, reader, kind, shards, tmp_path, limit):
        tensors = CHECKPOINTS[kind]
        place = save(tmp_path / reader, tensors, reader=reader, shards=min(shards, len(tensors) or 1))
        with hw.open(place, reader=reader) as source:
            assert dict(source.manifest) == dict(hw.open(tensors).manifest)
            assert_same_bits(dict(source.tensors()), tensors)
            assert_same_bits({lease.name: lease.tensor.clone() for lease in source.leases()}, tensors)
            for _, tensor in source.tensors():
                assert tensor.data_ptr() % tensor.element_size() == 0

    def test_nothing_is_copied_that_is_not_reused(self, reader, tmp_path, monkeypatch):
        real, given = readers._import(reader), {}
        if not real.owns:
            pytest.skip("it lends only")

        def read(files, *, borrow):
            assert not borrow
            for name, tensor in real.read(files, borrow=borrow):
                given[name] = tensor.data_ptr()
                yield name, tensor

        monkeypatch.setattr(readers, "_import", lambda name: real._replace(read=read))
        with hw.open(save(tmp_path, SEED, reader=reader), reader=reader) as source:
            kept = dict(source.tensors())
        assert {name: tensor.data_ptr() for name, tensor in kept.items()} == given
        assert_same_bits(kept, SEED)

    @pytest.mark.parametrize("borrow", [True, False])
    def test_its_flags_are_true(self, reader, borrow, tmp_path, limit):
        """Tensors that are not lent, or are owned, hold their values when the package has gone on to the end."""
        real = readers._import(reader)
        if real.lends if borrow else not real.owns:
            pytest.skip("it promises nothing")
        place = save(tmp_path, SEED, reader=reader)
        assert_same_bits(dict(real.read([str(file) for file in place.glob("*model*")], borrow=borrow)), SEED)

    def test_a_model_loads(self, reader, tmp_path, limit):
        model, loaded = (nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5)) for _ in range(2))
        with hw.open(save(tmp_path, model.state_dict(), reader=reader), reader=reader) as source:
            report = hw.load(loaded, source)
        assert_same_bits(loaded.state_dict(), model.state_dict())
        assert report.bytes_read == sum(tensor.nbytes for tensor in model.state_dict().values())

    def test_left_early_it_can_be_read_again(self, reader, tmp_path, limit):
        with hw.open(save(tmp_path, SEED, reader=reader), reader=reader) as source:
            for count in (1, 7):
                with source.leases() as stream:
                    for _ in range(count):
                        next(stream)
            assert_same_bits(dict(source.tensors()), SEED)

    def test_a_broken_file_is_refused_before_the_package_sees_it(self, reader, tmp_path):
        place = save(tmp_path, SEED, reader=reader)
        file = next(place.glob("*model*"))
        file.write_bytes(file.read_bytes()[:-5])
        with pytest.raises(hw.CheckpointError, match=file.name):
            hw.open(place, reader=reader)

    @pytest.mark.parametrize("when", ["before", "while"])
    def test_a_file_that_changes_is_noticed(self, reader, when, tmp_path):
        place = save(tmp_path, SEED, reader=reader)
        file = next(place.glob("*model*"))
        changed = file.read_bytes()
        (place / "other").write_bytes(changed)
        with hw.open(place, reader=reader) as source:
            pairs = source.tensors()
            if when == "while":
                next(pairs)
            (place / "other").replace(file)
            with pytest.raises(hw.CheckpointChanged, match="replaced"):
                list(pairs)  # It lets go of the tensors while the error is on its way, which must not harm it.

    def test_an_error_of_the_package_has_its_words(self, reader, tmp_path, monkeypatch):
        def read(files, *, borrow):
            yield next(iter(SEED.items()))
            raise ValueError("the ring is broken")

        real = readers._import(reader)
        monkeypatch.setattr(readers, "_import", lambda name: real._replace(read=read))
        with (
            hw.open(save(tmp_path, SEED, reader=reader), reader=reader) as source,
            pytest.raises(hw.SourceError, match=f"reader '{reader}' failed: the ring is broken") as caught,
        ):
            dict(source.tensors())
        assert isinstance(caught.value.__cause__, ValueError)

    def test_a_missing_package_is_named(self, reader, tmp_path, monkeypatch):
        if reader == "torch":
            pytest.skip("torch is always there")
        package = readers._PACKAGES[reader]
        monkeypatch.delitem(sys.modules, f"hotweights.sources.readers.{reader}", raising=False)
        monkeypatch.setitem(sys.modules, package.module, None)
        with pytest.raises(hw.MissingPackage, match=rf"{package.name}.*pip install 'hotweights\[{reader}\]'"):
            hw.open(write_checkpoint(tmp_path, SEED), reader=reader)

    def test_a_forgotten_close_warns(self, reader, tmp_path):
        source = hw.open(save(tmp_path, SEED, reader=reader), reader=reader)
        with pytest.warns(ResourceWarning, match="was not closed"):
            del source

    def test_it_tells_its_state(self, reader, tmp_path):
        place = save(tmp_path, SEED, reader=reader)
        with hw.open(place, reader=reader) as source:
            assert repr(source) == f"<ReaderSource {str(place)!r} by {reader}: 16 tensors in 1 files>"
            assert source.file_of("layers.3.weight") == source.files[0]


class TestChoosing:
    def test_our_own_has_a_name(self, tmp_path):
        with hw.open(write_checkpoint(tmp_path, SEED), reader="hotweights") as source:
            assert type(source).__name__ == "FileSource"

    def test_unknown(self, tmp_path):
        with pytest.raises(hw.UnknownName, match=f"known are: {', '.join(sorted(('hotweights', *READERS)))}"):
            hw.open(tmp_path, reader="gguf")

    def test_readers_read_files(self):
        with pytest.raises(hw.UsageError, match="'runai' reads files; this is a dict"):
            hw.open(SEED, reader="runai")

    def test_what_the_package_itself_lacks_is_not_hidden(self, tmp_path, monkeypatch):
        (tmp_path / "fastsafetensors.py").write_text("import a_package_that_is_not_there")
        for name in ("fastsafetensors", "hotweights.sources.readers.fastsafetensors"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there") as caught:
            hw.open(tmp_path, reader="fastsafetensors")
        assert not isinstance(caught.value, hw.MissingPackage)


class TestTorch:
    @pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.pth"])
    @pytest.mark.parametrize("zipped", [True, False])
    def test_files(self, name, zipped, tmp_path):
        torch.save(CHECKPOINTS["fp32"], tmp_path / name, _use_new_zipfile_serialization=zipped)
        with hw.open(tmp_path / name, reader="torch") as source:
            assert_same_bits(dict(source.tensors()), CHECKPOINTS["fp32"])

    def test_our_own_reader_says_who_opens_them(self, tmp_path):
        torch.save(SEED, tmp_path / "pytorch_model.bin")
        for place in (tmp_path, tmp_path / "pytorch_model.bin"):
            with pytest.raises(hw.CheckpointError, match=r'reader="torch" of .* opens'):
                hw.open(place)

    def sharded(self, directory):
        names = list(SEED)
        shards = {f"pytorch_model-0000{n + 1}-of-00002.bin": names[n::2] for n in range(2)}
        for file, held in shards.items():
            torch.save({name: SEED[name] for name in held}, directory / file)
        weight_map = {name: file for file, held in shards.items() for name in held}
        index = directory / "pytorch_model.bin.index.json"
        index.write_text(str({"weight_map": weight_map}).replace("'", '"'))
        (directory / "training_args.bin").write_bytes(b"not for us")
        return index

    def test_shards(self, tmp_path):
        index = self.sharded(tmp_path)
        for place in (tmp_path, index):
            with hw.open(place, reader="torch") as source:
                assert len(source.files) == 2
                assert_same_bits(dict(source.tensors()), SEED)

    def test_a_missing_shard(self, tmp_path):
        self.sharded(tmp_path)
        (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
        with pytest.raises(hw.CheckpointError, match="named by the index for 8 tensors, but there is no such file"):
            hw.open(tmp_path, reader="torch")

    def test_tensors_of_one_storage_get_memory_of_their_own(self, tmp_path):
        whole = torch.randn(6, 4)
        tensors = {"a": whole, "tied": whole, "row": whole[2], "t": whole.t(), "other": torch.ones(2)}
        torch.save(tensors, tmp_path / "model.pt")
        with hw.open(tmp_path / "model.pt", reader="torch") as source:
            kept = dict(source.tensors())
        assert_same_bits(kept, tensors)
        assert len({tensor.untyped_storage().data_ptr() for tensor in kept.values()}) == 5

    def test_no_pickle_is_run(self, tmp_path):
        ran = tmp_path / "ran"

        class Evil:
            def __reduce__(self):
                return open, (str(ran), "w")

        (tmp_path / "model.pt").write_bytes(pickle.dumps({"w": Evil()}))
        with pytest.raises(hw.CheckpointError, match=r"is a pickle that calls _?io\.open") as caught:
            hw.open(tmp_path / "model.pt", reader="torch")
        assert not ran.exists()
        assert caught.value.cause == "pickle_with_code"
        for old in (False, True):
            torch.save({"w": Evil()}, tmp_path / "model.pt", _use_new_zipfile_serialization=not old)
            with pytest.raises(hw.CheckpointError, match=r"is a pickle that calls _?io\.open") as caught:
                hw.open(tmp_path / "model.pt", reader="torch")
            assert caught.value.cause == "pickle_with_code"
            assert "weights_only" not in str(caught.value)
        assert not ran.exists()

    @pytest.mark.parametrize("protocol", [2, 4])
    def test_a_plain_pickle_is_called_that(self, protocol, tmp_path):
        (tmp_path / "model.pt").write_bytes(pickle.dumps({"w": [1.0]}, protocol))
        with pytest.raises(hw.CheckpointError, match=r"is a plain pickle, and no file of torch\.save"):
            hw.open(tmp_path / "model.pt", reader="torch")

    @pytest.mark.parametrize(
        ("content", "cause", "said"),
        [
            (b"", "empty", "the file is empty"),
            (b"<!DOCTYPE html><html>Not found</html>", "html_page", "this is a web page"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n", "lfs_pointer", "git lfs pull"),
            (b"Access denied to this model", "text", "this is text .* it begins 'Access denied"),
            (bytes(1000), "zeros", "it begins with zero bytes"),
            (b"\x1f\x8b" + bytes(50), "other_format", "this is not a torch file but a gzip archive"),
            ("safetensors", "other_format", "this is a safetensors file; rename it to .safetensors"),
            ("cut", "truncated", "has no end .* is it truncated"),
        ],
    )
    def test_what_is_no_file_of_torch_is_called_what_it_is(self, content, cause, said, tmp_path):
        path = tmp_path / "model.bin"
        if content == "safetensors":
            hw.save({"w": torch.ones(2)}, tmp_path / "w.safetensors")
            content = (tmp_path / "w.safetensors").read_bytes()
        elif content == "cut":
            torch.save({"w": torch.ones(2)}, path)
            content = path.read_bytes()[:-100]
        path.write_bytes(content)
        with pytest.raises(hw.CheckpointError, match=said) as caught:
            hw.open(path, reader="torch")
        assert caught.value.cause == cause

    @pytest.mark.filterwarnings("ignore:Detected pickle protocol")
    @pytest.mark.parametrize("zipped", [True, False])
    @pytest.mark.parametrize("protocol", [4, 5])
    def test_a_later_pickle_protocol_is_called_that_and_the_advice_works(self, protocol, zipped, tmp_path):
        path = tmp_path / "model.pt"
        options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
        torch.save({"w": torch.ones(2)}, path, **options)
        with pytest.raises(hw.CheckpointError, match=f"is written by pickle protocol {protocol}"):
            hw.open(path, reader="torch")
        torch.save(torch.load(path, weights_only=False), path)
        with hw.open(path, reader="torch") as source:
            assert list(source.manifest) == ["w"]

    def test_files_of_torch_before_1_6(self, tmp_path):
        torch.save({"w": torch.ones(3)}, tmp_path / "model.pt", _use_new_zipfile_serialization=False)
        with hw.open(tmp_path / "model.pt", reader="torch") as source:
            assert list(source.manifest) == ["w"]

    def test_digests_of_tensors_are_compared(self, tmp_path):
        path, said = tmp_path / "model.pt", tmp_path / "digests"
        torch.save({"w": torch.ones(3), "n": torch.tensor(2)}, path)
        with hw.open(path, reader="torch") as source:
            said.write_text(json.dumps(source.digest().as_dict()))
        with hw.open(path, reader="torch", digests=said) as source:
            assert list(dict(source.tensors())) == ["w", "n"]
        torch.save({"w": torch.zeros(3), "n": torch.tensor(2)}, path)
        with (
            hw.open(path, reader="torch", digests=said) as source,
            pytest.raises(hw.CheckpointError, match=r"tensor 'w': digest \w+ expected"),
        ):
            source.digest()

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ({"model": {"w": torch.ones(1)}, "step": 3}, ["'model' is a dict", "'step' is a int"]),
            ([torch.ones(1)], ["holds a list, not a dictionary of tensors"]),
            ({"w": torch.eye(2).to_sparse()}, ["'w' is torch.sparse_coo"]),
            ({5: torch.ones(1)}, ["the key 5 is no name"]),
        ],
    )
    def test_what_is_no_flat_dictionary(self, content, words, tmp_path):
        torch.save(content, tmp_path / "model.pt")
        with pytest.raises(hw.CheckpointError) as caught:
            hw.open(tmp_path / "model.pt", reader="torch")
        assert all(word in str(caught.value) for word in words)


def written(path, **tensors):
    """A file of these dtypes, shapes and bytes, which no package need know."""
    header, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize("dtype", ["F4", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0", "U16", "U32", "U64", "C64"])
@pytest.mark.parametrize("reader", ["runai", "fastsafetensors", "safetensors"])
def test_dtypes_that_a_package_does_not_know_come_all_the_same(reader, dtype, tmp_path):
    nbytes = {"F4": 8, "U16": 32, "U32": 64, "U64": 128, "C64": 128}.get(dtype, 16)
    one, two = tmp_path / "model-00001-of-00002.safetensors", tmp_path / "model-00002-of-00002.safetensors"
    plain = ("F32", [2], struct.pack("<2f", 1, 2))
    written(one, known=plain)
    written(two, x=(dtype, [2, 8], bytes(range(nbytes))), beside=plain)
    with hw.open(tmp_path, reader=reader) as source, hw.open(tmp_path) as ours:
        tensors = dict(source.tensors())
        assert_same_bits(tensors, dict(ours.tensors()))
        assert_same_bits({lease.name: lease.tensor.clone() for lease in source.leases()}, tensors)
        strange = dtype in sys.modules[f"hotweights.sources.readers.{reader}"].READER.unknown
        words = f"{two.name}: holds {dtype}, which the reader {reader!r} does not know; hotweights reads this file"
        assert [warning.startswith(words) for warning in source.warnings] == [True] * strange
