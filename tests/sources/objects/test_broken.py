"""Every fault of files once over a store: it is refused by the same words, with the names of objects."""

import re

import pytest
import torch
from broken_files import BROKEN_FILES, BROKEN_FOLDERS, INDEX, LYING_INDEXES, ODD_FOLDERS, TENSORS, sound
from web import Bucket, served

import hotweights as hw
from hotweights.errors import CheckpointError
from hotweights.testing import assert_same_bits
from hotweights.testing.checkpoints import write_safetensors


@pytest.fixture(scope="module")
def bucket():
    with Bucket({}) as bucket:
        yield bucket


def refused(what, **options):
    with pytest.raises(CheckpointError) as error:
        hw.open(what, **options)
    assert type(error.value) is CheckpointError
    return error.value


def assert_refused_as_files_are(bucket, folder, name="", **options):
    bucket.files = served(folder)
    of_files = refused(folder / name, **options)
    of_objects = refused(f"s3://b/m/{name}".rstrip("/"), store={**bucket.options, "deadline": 60}, **options)
    assert str(of_objects).partition("\n")[0] == in_store(str(of_files), folder).partition("\n")[0]
    assert sorted(of_objects.problems) == sorted(in_store(problem, folder) for problem in of_files.problems)
    return str(of_objects)


def in_store(text, folder):
    """What the refusal of a directory is in a store. A store has no directories, and its lists are typed out."""
    text = re.sub(r"sorted\(pathlib\.Path\('[^']+'\)\.glob\('([^']+)'\)\)", lambda match: typed(folder, match[1]), text)
    text = text.replace(f"{folder}: is a directory, not a file", f"{folder}: {NAMED}, but there is no such file")
    return text.replace(str(folder), "s3://b/m")


NAMED = "named by the index for 1 tensors"


def typed(folder, pattern):
    return str(sorted(map(str, folder.glob(pattern))))


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_a_broken_object_is_refused_as_the_file_is(bucket, tmp_path, case):
    raw, words = BROKEN_FILES[case]
    (tmp_path / "broken.safetensors").write_bytes(raw)
    error = assert_refused_as_files_are(bucket, tmp_path, "broken.safetensors")
    assert all(word in error for word in ("s3://b/m/broken.safetensors", *words))


@pytest.mark.parametrize("case", LYING_INDEXES)
def test_an_index_that_lies_is_refused_as_the_file_is(bucket, tmp_path, case):
    content, words = LYING_INDEXES[case]
    (sound(tmp_path) / INDEX).write_bytes(content if isinstance(content, bytes) else content.encode())
    error = assert_refused_as_files_are(bucket, tmp_path)
    words = [NAMED if word == "is a directory" else word for word in words]
    assert all(word in error for word in (f"s3://b/m/{INDEX}", *words))
    assert error == assert_refused_as_files_are(bucket, tmp_path, INDEX)


@pytest.mark.parametrize("breaks", BROKEN_FOLDERS, ids=lambda breaks: breaks.__name__)
def test_a_folder_is_refused_as_the_directory_is(bucket, tmp_path, breaks):
    breaks(sound(tmp_path))
    assert "s3://b/m" in assert_refused_as_files_are(bucket, tmp_path)


@pytest.mark.parametrize("change", ODD_FOLDERS, ids=lambda change: change.__name__)
def test_a_folder_is_opened_as_the_directory_is(bucket, tmp_path, change):
    change(sound(tmp_path))
    bucket.files = served(tmp_path)
    with hw.open("s3://b/m", store=bucket.options) as of_store, hw.open(tmp_path) as of_files:
        assert list(of_store.files) == [in_store(file, tmp_path) for file in of_files.files]
        assert list(of_store.warnings) == [in_store(warning, tmp_path) for warning in of_files.warnings]
        assert_same_bits(dict(of_store.tensors()), dict(of_files.tensors()))


@pytest.mark.parametrize("names", [["a", "b"], ["a", "absent"], ["a", "broken"], ["a", "a"], ["sub/a", "a"]], ids=str)
def test_a_list_is_refused_or_opened_as_that_of_files_is(bucket, tmp_path, names):
    (tmp_path / "sub").mkdir()
    for name in ("a", "b", "sub/a"):
        write_safetensors(tmp_path / f"{name}.safetensors", {"w": torch.ones(2), name: torch.empty(0)})
    (tmp_path / "broken.safetensors").write_bytes(b"<html>")
    bucket.files = served(tmp_path)

    def said(where, **options):
        try:
            with hw.open([f"{where}/{name}.safetensors" for name in names], **options) as source:
                return list(source.files)
        except CheckpointError as error:
            return [str(error).partition("\n")[0], *error.problems]

    of_store = said("s3://b/m", store={**bucket.options, "deadline": 60})
    if "absent" in names:
        assert "s3://b/m/absent.safetensors: there is no such object" in of_store[-1]
    else:
        assert of_store == [in_store(text, tmp_path) for text in said(tmp_path)]
    assert len(names) != len(set(names)) or len(of_store) > 1


@pytest.mark.parametrize("page", [1, 2, 1000])
def test_a_folder_that_is_listed_by_pages(bucket, tmp_path, monkeypatch, page):
    monkeypatch.setattr(bucket, "page", page)
    bucket.files = served(sound(tmp_path))
    with hw.open("s3://b/m", store=bucket.options) as source:
        assert_same_bits(dict(source.tensors()), TENSORS)
