"""Files that are no checkpoints, and indexes that lie: what is refused, and by which words."""

import json

import torch

from hotweights.sources.files.header import MAX_HEADER_NBYTES
from hotweights.testing import write_checkpoint, write_safetensors


def file_of(header, data=b""):
    """A file from a header that is a table, text or bytes."""
    if isinstance(header, dict):
        header = json.dumps(header)
    raw = header if isinstance(header, bytes) else header.encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(dtype, shape, start, stop):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


ENTRY = json.dumps(entry("U8", [4], 0, 4))
EMPTY_ENTRY = json.dumps(entry("U8", [0], 0, 0))
W = {"w": entry("U8", [4], 0, 4)}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 1234\n"
DEEP = "[" * 100_000 + "]" * 100_000


def pair(dtype, shape, start, stop, data=b"abcd"):
    return file_of({"sound": entry("U8", [0], 0, 0), "w": entry(dtype, shape, start, stop)}, data)


BROKEN_FILES = {
    "empty file": (b"", ["is empty"]),
    "seven bytes": (b"\1\0\0\0\0\0\0", ["7 bytes are too few"]),
    "header of 2^60 bytes": ((2**60).to_bytes(8, "little") + b"{}", [str(2**60), str(MAX_HEADER_NBYTES)]),
    "header of 2^64 - 1 bytes": (b"\xff" * 8 + b"{}", [str(2**64 - 1)]),
    "header longer than the bound": ((MAX_HEADER_NBYTES + 1).to_bytes(8, "little"), [str(MAX_HEADER_NBYTES + 1)]),
    "header longer than the file": (file_of(W)[:-1], ["the file ends after", "truncated"]),
    "header of no bytes": (file_of(b""), ["begins with zero bytes"]),
    "web page": (
        b"\n<!DOCTYPE html>\n<html><title>Not found</title>",
        ["a web page (47 bytes)", "fetch the file again"],
    ),
    "short web page": (b"<html>", ["a web page"]),
    "text": (b"Access denied\r\n", ["this is text (15 bytes)", "Access denied"]),
    "large-file pointer": (LFS, ["pointer to large-file storage", "git lfs pull"]),
    "pickle": (b"\x80\x02}q\0(X\1\0\0\0aK\1u.", ["a pickle"]),
    "short pickle": (b"\x80\x02N.", ["a pickle"]),
    "newer pickle": (b"\x80\x04\x95\x0b\0\0\0\0\0\0\0}\x94\x8c\1a\x94K\1s.", ["a pickle"]),
    "zip": (b"PK\x03\x04\0\0\x08\x08\0\0\0\0\0\0" + b"x" * 100, ["zip archive"]),
    "gguf": (b"GGUF\3\0\0\0" + b"\0" * 100, ["GGUF"]),
    "no UTF-8": (file_of(b'{"\xff": 1}'), ["not a JSON object"]),
    "no UTF-8 in a field": (
        file_of(b'{"w": {"dt\xffype": "U8", "shape": [0], "data_offsets": [0, 0]}}'),
        ["'w'", "dtype"],
    ),
    "no UTF-8 in an unknown field": (
        file_of(b'{"w": {"c\xffrc": 1, "dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}'),
        ["not a JSON object", "utf-8"],
    ),
    "NaN in an unknown field": (
        file_of(b'{"w": {"crc": NaN, "dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}'),
        ["not a JSON object"],
    ),
    "UTF-16": (file_of(json.dumps(W).encode("utf-16")), ["not a JSON object"]),
    "byte order mark": (file_of(b"\xef\xbb\xbf" + json.dumps(W).encode(), b"abcd"), ["not a JSON object"]),
    "lone surrogate": (file_of(f'{{"\\ud800": {ENTRY}}}', b"abcd"), ["not a JSON object"]),
    "no JSON": (file_of("hello"), ["not a JSON object"]),
    "cut JSON": (file_of('{"w": {'), ["not a JSON object"]),
    "two objects": (file_of("{}{}"), ["not a JSON object"]),
    "array": (file_of("[]"), ["not a JSON object", "array"]),
    "null": (file_of("null"), ["not a JSON object"]),
    "string": (file_of('"w"'), ["not a JSON object"]),
    "NaN": (file_of('{"w": NaN}'), ["not a JSON object"]),
    "NaN in a shape": (
        file_of('{"w": {"dtype": "U8", "shape": [NaN], "data_offsets": [0, 0]}}'),
        ["not a JSON object"],
    ),
    "Infinity": (file_of('{"w": -Infinity}'), ["not a JSON object"]),
    "too deep": (file_of(DEEP), ["not a JSON object"]),
    "too deep inside": (file_of(f'{{"w": {DEEP}}}'), ["not a JSON object", "recursion"]),
    "too deep in a field": (file_of(f'{{"w": {{"shape": {DEEP}}}}}'), ["not a JSON object", "recursion"]),
    "entry is no object": (file_of({"sound": entry("U8", [0], 0, 0), "w": 7}), ["'w'", "object"]),
    "entry is an array": (file_of({"w": ["U8", [0], [0, 0]]}), ["'w'", "object"]),
    "field missing": (file_of({"w": {"dtype": "U8", "shape": [0]}}), ["'w'", "data_offsets"]),
    "metadata is no object": (file_of({"__metadata__": 3}), ["__metadata__"]),
    "metadata holds a number": (file_of({"__metadata__": {"epoch": 3}}), ["__metadata__", "str", "int"]),
    "name twice": (file_of(f'{{"w": {EMPTY_ENTRY}, "w": {ENTRY}}}', b"abcd"), ["'w'", "twice"]),
    "name twice, same range": (file_of(f'{{"w": {ENTRY}, "w": {ENTRY}}}', b"abcd"), ["'w'", "twice"]),
    "name twice, no bytes": (file_of(f'{{"w": {EMPTY_ENTRY}, "w": {EMPTY_ENTRY}}}'), ["'w'", "twice"]),
    "name twice, by escape": (file_of(f'{{"w": {ENTRY}, "\\u0077": {ENTRY}}}', b"abcd"), ["'w'", "twice"]),
    "name twice, all escaped": (file_of(f'{{"\\u0077": {ENTRY}, "\\u0077": {ENTRY}}}', b"abcd"), ["'w'", "twice"]),
    "name twice, the first empty": (file_of(f'{{"w": {{}}, "w": {ENTRY}}}', b"abcd"), ["'w'", "twice"]),
    "name twice, the first a number": (file_of(f'{{"w": 1, "w": {ENTRY}}}', b"abcd"), ["'w'", "twice"]),
    "name twice, the first escaped within": (
        file_of(f'{{"w": {{"data_off\\u0073ets": 0}}, "w": {ENTRY}}}', b"abcd"),
        ["'w'", "twice"],
    ),
    "name twice, hidden by a name that looks like metadata": (
        file_of(f'{{"\\"__metadata__": {EMPTY_ENTRY}, "w": 1, "w": {ENTRY}}}', b"abcd"),
        ["'w'", "twice"],
    ),
    "unknown field twice": (
        file_of('{"w": {"dtype": "U8", "crc": 1, "crc": 2, "shape": [4], "data_offsets": [0, 4]}}', b"abcd"),
        ["'w'", "'crc'", "twice"],
    ),
    "field twice": (
        file_of('{"w": {"dtype": "I8", "dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}', b"abcd"),
        ["'w'", "'dtype'", "twice"],
    ),
    "shape twice": (
        file_of('{"w": {"shape": [9], "dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}', b"abcd"),
        ["'w'", "'shape'", "twice"],
    ),
    "metadata twice": (file_of('{"__metadata__": {}, "__metadata__": {}}'), ["'__metadata__'", "twice"]),
    "unknown dtype": (pair("F31", [1], 0, 4), ["'w'", "unknown dtype 'F31'", "BF16"]),
    "dtype in lower case": (pair("u8", [4], 0, 4), ["'w'", "unknown dtype 'u8'"]),
    "dtype is a number": (pair(8, [4], 0, 4), ["'w'", "str"]),
    "negative length": (pair("U8", [-4], 0, 4), ["'w'", "negative"]),
    "two negative lengths": (pair("U8", [-2, -2], 0, 4), ["'w'", "negative"]),
    "minus nought": (file_of('{"w": {"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'), ["'w'", "-0"]),
    "huge length": (pair("U8", [2**63], 0, 4), ["'w'", "more elements than any memory"]),
    "length beyond 64 bits": (pair("U8", [10**30], 0, 4), ["'w'", "more elements"]),
    "product wraps around": (pair("U8", [2**32, 2**32], 0, 0, b""), ["'w'", "more elements"]),
    "product wraps around to its range": (pair("U8", [2**62, 4, 1], 0, 0, b""), ["'w'", "more elements"]),
    "huge and empty": (pair("U8", [2**62, 0, 2**62], 0, 0, b""), ["'w'", "more elements"]),
    "bits overflow": (pair("F64", [2**61], 0, 4), ["'w'", str(2**64), "hold 4"]),
    "length is a float": (pair("U8", [4.0], 0, 4), ["'w'", "int"]),
    "length is a fraction": (pair("U8", [0.5, 8], 0, 4), ["'w'", "int"]),
    "length is a string": (pair("U8", ["4"], 0, 4), ["'w'", "int"]),
    "length is true": (pair("U8", [4, True], 0, 4), ["'w'", "int", "bool"]),
    "length is null": (pair("U8", [None], 0, 4), ["'w'", "int"]),
    "shape is a number": (pair("U8", 4, 0, 4), ["'w'", "array"]),
    "offset is a float": (pair("U8", [4], 0.0, 4), ["'w'", "int"]),
    "three offsets": (file_of({"w": W["w"] | {"data_offsets": [0, 4, 4]}}, b"abcd"), ["'w'", "length 2"]),
    "range too long": (pair("U8", [3], 0, 4), ["'w'", "is 3 bytes", "0..4 hold 4"]),
    "range too short": (pair("F32", [2], 0, 4), ["'w'", "is 8 bytes", "0..4 hold 4"]),
    "range backwards": (pair("U8", [4], 4, 0), ["'w'", "4..0 hold -4"]),
    "range backwards and empty": (pair("U8", [0], 4, 0), ["'w'", "4..0 hold -4"]),
    "range before the data": (pair("U8", [4], -4, 0), ["'w'", "byte -4"]),
    "half a byte": (pair("F4", [3], 0, 2, b"ab"), ["'w'", "whole byte"]),
    "six bits": (pair("F6_E2M3", [3], 0, 3, b"abc"), ["'w'", "whole byte"]),
    "range past the end": (pair("U8", [5], 0, 5), ["'w'", "ends at byte 5", "holds 4", "truncated"]),
    "three past the end": (
        file_of(
            json.dumps(
                {
                    n: {"dtype": "U8", "shape": [2], "data_offsets": [s, s + 2]}
                    for s, n in ((0, "a"), (2, "b"), (4, "c"))
                }
            ).encode()
        )
        + b"x",
        ["'a'", "the file holds 1", "this tensor and 2 later ones are cut off"],
    ),
    "empty range past the end": (pair("U8", [0], 9, 9, b""), ["'w'", "byte 9"]),
    "offsets of 2^63": (pair("U8", [4], 2**63, 2**63 + 4), ["'w'", str(2**63)]),
    "offsets beyond 64 bits": (pair("U8", [4], 2**70, 2**70 + 4), ["'w'"]),
    "overlap": (
        file_of({"v": entry("U8", [3], 0, 3), "w": entry("U8", [2], 2, 4)}, b"abcd"),
        ["'w'", "byte 2", "inside tensor 'v'"],
    ),
    "same range": (
        file_of({"v": entry("U8", [4], 0, 4), "w": entry("I8", [4], 0, 4)}, b"abcd"),
        ["'w'", "byte 0", "inside tensor 'v'"],
    ),
    "empty inside another": (
        file_of({"v": entry("U8", [4], 0, 4), "w": entry("U8", [0], 2, 2)}, b"abcd"),
        ["'w'", "byte 2", "inside tensor 'v'"],
    ),
    "gap at the start": (pair("U8", [3], 1, 4), ["'w'", "byte 1", "no tensor holds the bytes between"]),
    "gap": (
        file_of({"v": entry("U8", [1], 0, 1), "w": entry("U8", [2], 2, 4)}, b"abcd"),
        ["'w'", "byte 2", "tensor 'v' ends at 1"],
    ),
    "trailing bytes": (pair("U8", [3], 0, 3), ["1 trailing bytes"]),
    "trailing bytes of no tensor": (file_of("{}", b"x"), ["1 trailing bytes"]),
}

ONE, TWO = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2))

LYING_INDEXES = {
    "not JSON": ("{", ["not a JSON object"]),
    "empty": ("", ["the file is empty"]),
    "not UTF-8": (b"\xff\xff{}", ["not a JSON object"]),
    "too deep": ('{"weight_map": ' + "[" * 100_000, ["not a JSON object"]),
    "NaN": ('{"metadata": {"total_size": NaN}, "weight_map": {"a": "b"}}', ["not a JSON object", "NaN"]),
    "an array": ("[]", ['no "weight_map"']),
    "a number": ("7", ['no "weight_map"']),
    "no weight_map": ("{}", ['no "weight_map"']),
    "weight_map is an array": ('{"weight_map": ["a"]}', ['no "weight_map"']),
    "weight_map is empty": ('{"weight_map": {}}', ['no "weight_map"']),
    "file is a number": ('{"weight_map": {"scale": 7}}', ["'scale'", "7", "no name"]),
    "file is nothing": ('{"weight_map": {"scale": ""}}', ["'scale'", "no name"]),
    "name twice": (f'{{"weight_map": {{"scale": "{ONE}", "scale": "{TWO}"}}}}', ["'scale'", "twice"]),
    "name twice, by escape": (f'{{"weight_map": {{"scale": "{ONE}", "s\\u0063ale": "{TWO}"}}}}', ["'scale'", "twice"]),
    "name twice, same file": (f'{{"weight_map": {{"scale": "{TWO}", "scale": "{TWO}"}}}}', ["'scale'", "twice"]),
    "weight_map twice": (f'{{"weight_map": {{}}, "weight_map": {{"scale": "{TWO}"}}}}', ["'weight_map'", "twice"]),
    "file is the directory": ('{"weight_map": {"scale": "."}}', ["is a directory"]),
    "file has a zero byte": ('{"weight_map": {"scale": "a\\u0000b"}}', ["outside"]),
    "file has a long name": (f'{{"weight_map": {{"scale": "{"x" * 300}"}}}}', ["xxx", "no such file"]),
}


# --- folders ---------------------------------------------------------------------------------------------------------

INDEX = "model.safetensors.index.json"
THREE = "model-00003-of-00003.safetensors"
TENSORS = {f"layers.{number}.weight": torch.full((3, 5), float(number)) for number in range(7)}


def sound(folder):
    """A checkpoint of three files and an index."""
    return write_checkpoint(folder, TENSORS, shards=3)


def _mapped(folder, **more):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"].update(more)
    (folder / INDEX).write_text(json.dumps(index))


def _without_index(folder, *names):
    for name in (INDEX, *names):
        (folder / name).unlink()


def _only(folder, *names):
    for path in folder.iterdir():
        path.unlink()
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        write_safetensors(folder / name, {"weight": torch.ones(2)})


def _shorter(folder, name):
    (folder / name).write_bytes((folder / name).read_bytes()[:-1])


def a_shard_is_missing(folder):
    (folder / TWO).unlink()


def two_shards_are_missing(folder):
    (folder / ONE).unlink()
    (folder / THREE).unlink()


def a_shard_is_missing_and_so_is_the_index(folder):
    _without_index(folder, TWO)


def two_shards_are_missing_and_so_is_the_index(folder):
    _without_index(folder, ONE, THREE)


def a_shard_is_empty(folder):
    (folder / ONE).write_bytes(b"")


def a_shard_is_cut(folder):
    _shorter(folder, THREE)


def shards_are_broken_and_the_index_is_missing(folder):
    _without_index(folder)
    (folder / ONE).write_bytes(b"")
    _shorter(folder, THREE)


def a_tensor_is_in_no_file(folder):
    _mapped(folder, ghost=TWO)


def a_thousand_tensors_are_in_no_file(folder):
    _mapped(folder, **{f"ghost.{number:04}": TWO for number in range(1000)})


def a_tensor_is_in_another_file(folder):
    _mapped(folder, **{"layers.1.weight": ONE})


def the_index_leads_outside(folder):
    _mapped(folder, thief="../outside.safetensors", other="/outside.safetensors", more="sub/../../outside.safetensors")


def everything_is_wrong(folder):
    write_safetensors(folder / "unknown.safetensors", {"layers.9.bias": torch.zeros(1)})
    _mapped(folder, ghost=TWO, thief="../thief.safetensors", number=5, **{"layers.1.weight": "unknown.safetensors"})
    (folder / ONE).unlink()
    _shorter(folder, THREE)


def there_are_two_indexes(folder):
    content = (folder / INDEX).read_bytes()
    for name in ("a", "b"):
        (folder / f"{name}.safetensors.index.json").write_bytes(content)
    _without_index(folder)


def there_are_two_checkpoints(folder):
    _only(folder, "a.safetensors", "b.safetensors")


def there_are_shards_of_two_numbers(folder):
    _only(folder, *(f"model-{name}.safetensors" for name in ("1-of-2", "2-of-2", "1-of-3", "2-of-3", "3-of-3")))


def the_numbers_are_huge(folder):
    _only(folder, f"a-1-of-{10**30}.safetensors")


def a_download_has_not_ended(folder):
    (folder / TWO).rename(folder / f"{TWO}.incomplete")


def nothing_but_a_download_has_begun(folder):
    _only(folder)
    (folder / f"{TWO}.incomplete").write_bytes(b"x")


def there_are_folders(folder):
    _only(folder, "checkpoint-1/model.safetensors", "checkpoint-2/model.safetensors")


def it_is_a_pipeline(folder):
    _only(folder, "vae/model.safetensors", "unet/model.safetensors")
    (folder / "model_index.json").write_text('{"_class_name": "P"}')


def there_are_variants_only(folder):
    _only(folder, "model.fp16.safetensors", "model.bf16.safetensors")


def there_are_no_weights(folder):
    _only(folder)
    for name in ("config.json", "pytorch_model.bin", "vocab.txt"):
        (folder / name).write_text("{}")


def one_name_is_in_two_shards(folder):
    _only(folder)
    for number in (1, 2):
        write_safetensors(folder / f"layers-{number}.safetensors", {"empty": torch.empty(0), "w": torch.ones(2)})


BROKEN_FOLDERS = [
    *(a_shard_is_missing, two_shards_are_missing, a_shard_is_missing_and_so_is_the_index),
    *(two_shards_are_missing_and_so_is_the_index, a_shard_is_empty, a_shard_is_cut),
    *(shards_are_broken_and_the_index_is_missing, a_tensor_is_in_no_file, a_thousand_tensors_are_in_no_file),
    *(a_tensor_is_in_another_file, the_index_leads_outside, everything_is_wrong, there_are_two_indexes),
    *(there_are_two_checkpoints, there_are_shards_of_two_numbers, the_numbers_are_huge, a_download_has_not_ended),
    *(nothing_but_a_download_has_begun, there_are_folders, it_is_a_pipeline, there_are_variants_only),
    *(there_are_no_weights, one_name_is_in_two_shards),
]
"""Each breaks a ``sound`` folder, so that it is refused."""


# --- folders that are sound, and hold more, or by other names --------------------------------------------------------


def a_whole_file_lies_beside_the_shards(folder):
    write_safetensors(folder / "model.safetensors", TENSORS)


def shards_of_another_number_lie_there(folder):
    write_safetensors(folder / "model-00001-of-00002.safetensors", {"old": torch.zeros(1)})


def an_old_index_lies_beside_a_whole_file(folder):
    (folder / TWO).unlink()
    write_safetensors(folder / "model.safetensors", TENSORS)


def downloads_of_others_have_begun(folder):
    (folder / "model-00004-of-00004.safetensors.incomplete").write_bytes(b"x")
    (folder / "model.safetensors.tmp").write_bytes(b"x")


def tools_have_put_things_beside(folder):
    for name in ("adapter_model", "pytorch_lora_weights", "optimizer", "consolidated", "original/model"):
        (folder / name).parent.mkdir(exist_ok=True)
        write_safetensors(folder / f"{name}.safetensors", {"other": torch.zeros(1)})
    for name in ("._model.safetensors", ".DS_Store", "training_args.bin", "pytorch_model.bin"):
        (folder / name).write_bytes(b"no weights")


def the_index_is_missing(folder):
    (folder / INDEX).unlink()


def the_index_has_another_name(folder):
    (folder / INDEX).rename(folder / "unet.safetensors.index.json")


def the_index_leads_into_a_folder(folder):
    (folder / "sub").mkdir()
    (folder / TWO).rename(folder / "sub" / TWO)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {n: f"sub/{file}" if file == TWO else file for n, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))


def a_shard_holds_more_than_the_index_names(folder):
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["layers.1.weight"]
    (folder / INDEX).write_text(json.dumps(index))


def a_tensor_is_in_two_shards_and_the_index_decides(folder):
    write_safetensors(folder / "more.safetensors", {"layers.1.weight": torch.ones(2), "more": torch.ones(1)})
    _mapped(folder, more="more.safetensors")


def the_config_names_the_file(folder):
    (folder / "config.json").write_text('{"transformers_weights": "mine.safetensors"}')
    write_safetensors(folder / "mine.safetensors", {"mine": torch.ones(2)})


def diffusers_has_its_own_index(folder):
    _only(folder, "diffusion_pytorch_model.safetensors", "shard.safetensors")
    index = {"weight_map": {"weight": "shard.safetensors"}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def one_variant_lies_alone(folder):
    _only(folder, "model.fp16.safetensors")


def something_lies_alone(folder):
    _only(folder, "v1.5-pruned.safetensors")


ODD_FOLDERS = [
    *(a_whole_file_lies_beside_the_shards, shards_of_another_number_lie_there, an_old_index_lies_beside_a_whole_file),
    *(downloads_of_others_have_begun, tools_have_put_things_beside, the_index_is_missing, the_index_has_another_name),
    *(the_index_leads_into_a_folder, a_shard_holds_more_than_the_index_names),
    *(a_tensor_is_in_two_shards_and_the_index_decides, the_config_names_the_file, diffusers_has_its_own_index),
    *(one_variant_lies_alone, something_lies_alone),
]
"""Each changes a ``sound`` folder, which is opened all the same, perhaps with a warning."""
