"""What is wrong with a DCP directory is said before a byte is written: every problem, with the file and the tensor."""

import contextlib
import pickle
import re
import shutil
import zipfile

import pytest
import torch
import torch.distributed.checkpoint as dcp
from dcp_saved import InParts, save_dcp
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata

import hotweights as hw


@pytest.fixture
def folder(tmp_path):
    tensors = {"w": torch.arange(24.0).view(6, 4), "b": torch.arange(6.0), "s": torch.tensor(1.0)}
    return save_dcp(tmp_path / "ck", tensors | {"w": InParts(tensors["w"], ([2, 4], []))})


def edited(folder, edit):
    """The directory with another ``.metadata``."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata = edit(metadata) or metadata
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def refused(folder, *patterns):
    with pytest.raises(hw.CheckpointError) as caught:
        hw.open(folder).close()
    for pattern in patterns:
        assert re.search(pattern, str(caught.value)), str(caught.value)
    return caught.value


def refused_as_it_is_read(folder, pattern):
    model = torch.nn.Linear(4, 6)
    model.weight.data.fill_(7.0)
    with hw.open(folder, rename={"w": "weight", "b": "bias"}) as source, pytest.raises(hw.CheckpointError) as caught:
        hw.load(model, source, allow_unexpected="*")
    assert re.search(pattern, str(caught.value)), str(caught.value)
    assert (model.weight == 7.0).all()  # Nothing was written.


def parts(metadata, name="w"):
    return metadata.state_dict_metadata[name].chunks


def test_a_missing_part(folder):
    edited(folder, lambda metadata: parts(metadata).pop(1) and None)
    refused(folder, r"tensor 'w': its parts hold 16 of its 24 elements")


def test_overlapping_parts(folder):
    def edit(metadata):
        parts(metadata)[1] = ChunkStorageMetadata(torch.Size([1, 0]), torch.Size([2, 4]))
        index = next(index for index in metadata.storage_data if index.fqn == "w" and index.offset == (2, 0))
        metadata.storage_data[type(index)("w", [1, 0])] = metadata.storage_data[index]

    edited(folder, edit)
    refused(folder, r"tensor 'w': its part \[2, 4\] at \[0, 0\] and its part \[2, 4\] at \[1, 0\] overlap")


def test_every_problem_is_listed(folder):
    def edit(metadata):
        metadata.state_dict_metadata["w"].size = torch.Size([3, 4])
        parts(metadata, "b").clear()

    edited(folder, edit)
    assert len(refused(folder, r"tensor 'w' has shape \[3, 4\]; its part \[2, 4\] at", "tensor 'b'").problems) == 3


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"relative_path": "../other.distcp"}, "lies outside the directory, in '../other.distcp'"),
        ({"relative_path": "/etc/passwd"}, "lies outside the directory"),
        ({"relative_path": 3}, "was not written, or nothing says where"),
        ({"relative_path": "gone.distcp"}, r"gone.distcp: .metadata names it for 1 tensors, but there is no such file"),
        ({"offset": -1}, "lies at byte -1"),
        ({"length": 10**9}, r"a part of tensor 'b' ends at byte \d+; the file holds \d+; is it truncated\?"),
        ({"transform_descriptors": ["zstd"]}, "was written through zstd; only plain bytes are read"),
    ],
)
def test_where_a_part_lies(folder, change, pattern):
    def edit(metadata):
        info = next(info for index, info in metadata.storage_data.items() if index.fqn == "b")
        vars(info).update(change)

    edited(folder, edit)
    refused(folder, pattern)


def test_a_part_that_was_never_written(folder):
    def edit(metadata):
        metadata.storage_data = {index: info for index, info in metadata.storage_data.items() if index.fqn != "b"}

    edited(folder, edit)
    refused(folder, r"tensor 'b': its part at \[0\] was not written, or nothing says where")


def test_a_file_that_ends_early(folder):
    file = folder / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-2000])
    refused(folder, r"__0_0.distcp: a part of tensor '\w' ends at byte \d+; the file holds \d+; this part and 1 later")


@pytest.mark.parametrize("damage", [b"", b"hello", b"\x80\x04N.", pickle.dumps({"a": 1}), pickle.dumps(Metadata({}))])
def test_metadata_that_is_none(folder, damage):
    (folder / ".metadata").write_bytes(damage)
    refused(folder, r"\.metadata: (is not what torch.distributed.checkpoint writes|does not say what was saved)")


def test_metadata_that_is_cut_anywhere(folder):
    raw = (folder / ".metadata").read_bytes()
    for stop in range(0, len(raw) - 1, 7):
        (folder / ".metadata").write_bytes(raw[:stop])
        refused(folder, "metadata")


def test_damaged_metadata_is_refused_or_read_but_nothing_else(folder):
    raw = bytearray((folder / ".metadata").read_bytes())
    for at in range(0, len(raw), 3):
        damaged = bytearray(raw)
        damaged[at] ^= 0x55
        (folder / ".metadata").write_bytes(damaged)
        with contextlib.suppress(hw.CheckpointError):
            hw.open(folder).close()


class Foreign:
    ran = False

    def __reduce__(self):
        return setattr, (Foreign, "ran", True)


class Subclass(Metadata):
    """As Megatron's ``MCoreMetadata``."""


def test_no_code_of_a_foreign_class_runs(folder):
    edited(folder, lambda metadata: setattr(metadata, "planner_data", Foreign()))
    refused(folder, r"\.metadata: names builtins.setattr, which is not of torch's own metadata; nothing of it was run")
    assert not Foreign.ran


def test_the_advice_for_a_foreign_class_can_be_followed(folder, tmp_path):
    def edit(metadata):
        new = Subclass({})
        vars(new).update(vars(metadata))
        return new

    edited(folder, edit)
    words = refused(folder, r"test_broken.*Subclass")
    assert "torch.distributed.checkpoint.format_utils.dcp_to_torch_save" in str(words)
    (tmp_path / "out").mkdir()
    dcp_to_torch_save(folder, tmp_path / "out" / "pytorch_model.bin")
    with hw.open(tmp_path / "out", reader="torch") as source:
        assert torch.equal(dict(source.tensors())["w"], torch.arange(24.0).view(6, 4))


# The bytes of the parts themselves: looked at when they are read.


def where(folder, name="w", number=0):
    """The file and the span of a part's archive."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    infos = [info for index, info in metadata.storage_data.items() if index.fqn == name]
    return folder / infos[number].relative_path, infos[number].offset, infos[number].offset + infos[number].length


def rewritten(folder, tensor, **options):
    """Another tensor in the place of the first part of ``w``, padded to the same length."""
    file, _, _ = where(folder)
    raw = file.read_bytes()
    saved = folder.parent / "part.pt"
    torch.save(tensor, saved, **options)
    new = saved.read_bytes()
    saved.unlink()
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    info = next(info for index, info in metadata.storage_data.items() if index.fqn == "w")
    file.write_bytes(raw + new)
    info.offset, info.length = len(raw), len(new)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize(
    ("tensor", "pattern"),
    [
        (torch.zeros(2, 4, dtype=torch.float16), r"torch.float32 \[2, 4\] expected, torch.float16 \[2, 4\] found"),
        (torch.zeros(4, 2), r"torch.float32 \[2, 4\] expected, torch.float32 \[4, 2\] found"),
        ([torch.zeros(2, 4)], "is no tensor, but a list"),
        ({"a": 1}, "is no tensor, but a dict"),
        (torch.zeros(2, 4).to_sparse(), "is no plain tensor, but made by torch._utils._rebuild_sparse_tensor"),
        (torch.zeros(2, 4, dtype=torch.complex64).conj(), "is a tensor with {'conj': True}"),
        (torch.nn.Parameter(torch.zeros(2, 4)), "is no plain tensor, but made by torch._utils._rebuild_parameter"),
    ],
)
def test_a_part_that_holds_something_else(folder, tensor, pattern):
    rewritten(folder, tensor)
    refused_as_it_is_read(folder, r"__0_0.distcp: tensor 'w': its part at \[0, 0\] " + pattern)


def test_a_part_in_torch_s_old_format(folder):
    rewritten(folder, torch.zeros(2, 4), _use_new_zipfile_serialization=False)
    refused_as_it_is_read(folder, "is no torch.save of a tensor")


def test_a_part_that_is_compressed(folder, tmp_path):
    torch.save(torch.zeros(2, 4), tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    raw = (tmp_path / "packed.pt").read_bytes()
    file, _, _ = where(folder)
    content = file.read_bytes()
    file.write_bytes(content + raw)

    def edit(metadata):
        info = next(info for index, info in metadata.storage_data.items() if index.fqn == "w")
        info.offset, info.length = len(content), len(raw)

    edited(folder, edit)
    refused_as_it_is_read(folder, "is compressed")


def test_damaged_archives_are_refused_or_read_but_nothing_else(folder):
    file, start, stop = where(folder)
    raw = file.read_bytes()
    for at in range(start, stop, 5):
        file.write_bytes(raw[:at] + bytes([raw[at] ^ 0x5A]) + raw[at + 1 :])
        with contextlib.suppress(hw.CheckpointError), hw.open(folder) as source:
            dict(source.tensors())
    for cut in range(0, stop - start, 11):  # A part of which less was kept.
        file.write_bytes(raw)

        def edit(metadata, cut=cut):
            next(info for index, info in metadata.storage_data.items() if index.fqn == "w").length = cut

        before = (folder / ".metadata").read_bytes()
        edited(folder, edit)
        refused_as_it_is_read(folder, r"its part at \[0, 0\] ")
        (folder / ".metadata").write_bytes(before)


def test_all_parts_that_cannot_be_read_are_named_together(folder):
    file, _, _ = where(folder)
    file.write_bytes(bytes(file.stat().st_size))
    with hw.open(folder) as source, pytest.raises(hw.CheckpointError) as caught:
        dict(source.tensors())
    assert len(caught.value.problems) == 5


# Files that change, and directories that are none.


@pytest.mark.parametrize("how", ["tensors", "leases"])
@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_a_file_that_changes_while_it_is_read(folder, name, how):
    with hw.open(folder) as source, contextlib.closing(getattr(source, how)()) as stream:
        next(stream)
        shutil.copy(folder / name, folder / "copy")
        (folder / "copy").rename(folder / name)
        with pytest.raises(hw.CheckpointChanged, match=rf"{name}: the file was replaced"):
            list(stream)


def test_a_save_that_has_not_ended(folder):
    (folder / ".metadata").unlink()
    refused(folder, r"holds __0_0.distcp of torch.distributed.checkpoint, but no \.metadata, which is written last")


def test_ranks_that_saved_without_each_other(folder):
    (folder / ".metadata").rename(folder / "__0.metadata")
    refused(folder, r"use_collectives=False")


def test_safetensors_beside_it(folder):
    hw.save({"w": torch.ones(1)}, folder / "model.safetensors")
    error = refused(folder, "a DCP checkpoint, and safetensors beside it")
    for problem in error.problems:  # Each advice can be followed.
        call = problem.partition(": hotweights.open(")[2].rstrip(")")
        with hw.open(eval(call)) as source:
            assert "w" in source.manifest


def test_a_dcp_file_in_safetensors(tmp_path):
    save_dcp(tmp_path / "ck", {"w": torch.ones(6, 4)}, serialization_format=SerializationFormat.SAFETENSORS)
    with hw.open(tmp_path / "ck") as source, pytest.raises(hw.CheckpointError, match=r"is no torch.save of a tensor"):
        dict(source.tensors())


def test_a_variant_of_it(folder):
    with pytest.raises(hw.UsageError, match=r"variant= chooses among files; .* is a DCP checkpoint; leave it out"):
        hw.open(folder, variant="fp16")


def test_another_reader(folder):
    with pytest.raises(hw.CheckpointError, match=r"no \*.bin in this directory"):
        hw.open(folder, reader="torch")


def test_the_folders_that_hold_one_are_named(folder):
    error = refused(folder.parent, 'choose one: subfolder="ck"')
    assert error
    with hw.open(folder.parent, subfolder="ck") as source:
        assert len(source.manifest) == 3


def test_torch_reads_the_same_metadata(folder):
    theirs = dcp.FileSystemReader(folder).read_metadata()
    with hw.open(folder) as source:
        assert {name: spec.shape for name, spec in source.manifest.items()} == {
            name: tuple(entry.size) for name, entry in theirs.state_dict_metadata.items()
        }
