"""Our reader of the header against the reference package, and against everything that is no header."""

import json
import math
import time
import tracemalloc

import pytest
import safetensors
import safetensors.torch
import torch
from broken_files import BROKEN_FILES, EMPTY_ENTRY, ENTRY, entry, file_of
from examples import examples
from hypothesis import example, given
from hypothesis import strategies as st

import hotweights as hw
from hotweights.dtypes import FORMAT_DTYPES, OpaqueDtype, format_name
from hotweights.errors import CheckpointError, UnsupportedDtype
from hotweights.manifest import TensorSpec
from hotweights.sources import Read
from hotweights.sources.files.header import MAX_HEADER_NBYTES, read_header
from hotweights.testing import assert_same_bits, bits, write_safetensors

EXAMPLES = examples(120, derandomize=True, database=None)
FUZZ = examples(500, derandomize=True, database=None)
TORCH_DTYPES = [getattr(torch, name) for _, name in FORMAT_DTYPES.values() if name]
PACKED = torch.float4_e2m1fn_x2


# --- making files ----------------------------------------------------------------------------------------------------


def ours(raw):
    """What our reader finds, in the format's own terms, or None where it refuses. Any other exception is a bug."""
    reads = []

    def pread(nbytes, offset):
        assert offset + nbytes <= len(raw), "read past the end"
        reads.append(nbytes)
        return raw[offset : offset + nbytes]

    try:
        header = read_header("f", len(raw), pread)
    except CheckpointError:
        return None
    return {
        spec.name: (format_name(spec.dtype), format_shape(spec), raw[entry.offset : entry.offset + spec.nbytes])
        for entry in header.entries
        for spec in (entry.spec,)
    }


def format_shape(spec):
    shape = list(spec.shape)
    return [*shape[:-1], 2 * shape[-1]] if spec.dtype == PACKED else shape


def theirs(raw):
    """The same from the reference."""
    try:
        parsed = safetensors.deserialize(raw)
    except safetensors.SafetensorError:
        return None
    return {name: (entry["dtype"], entry["shape"], bytes(entry["data"])) for name, entry in parsed}


def assert_at_least_as_strict(raw):
    """Accepted by us means accepted by the reference, with the same meaning. Returns whether it was."""
    parsed = ours(raw)
    if parsed is not None:
        assert parsed == theirs(raw)
    return parsed is not None


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda name: name != "__metadata__")


@st.composite
def tensors(draw):
    dtype = draw(st.sampled_from(TORCH_DTYPES))
    # A packed tensor of no dimensions has no length that counts pairs.
    shape = draw(st.lists(st.integers(0, 4), max_size=3, min_size=1 if dtype == PACKED else 0))
    nbytes = math.prod(shape) * dtype.itemsize
    raw = torch.tensor(list(draw(st.binary(min_size=nbytes, max_size=nbytes))), dtype=torch.uint8)
    return (raw % 2).bool().view(shape) if dtype == torch.bool else raw.view(dtype).view(shape)


tables = st.dictionaries(names, tensors(), max_size=6)
metadata = st.one_of(st.none(), st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), names, max_size=3))


# --- both ways -------------------------------------------------------------------------------------------------------


@EXAMPLES
@given(table=tables, meta=metadata)
@example(table={str(dtype): torch.zeros(2, 8, dtype=torch.uint8).view(dtype) for dtype in TORCH_DTYPES}, meta={})
def test_reads_what_the_reference_writes(table, meta, tmp_path_factory):
    path = str(tmp_path_factory.getbasetemp() / "theirs.safetensors")
    safetensors.torch.save_file(
        table, path, metadata=meta or None
    )  # Of {} it makes a header that is no JSON, if there are no tensors.
    with hw.open(path) as source:
        assert dict(source.manifest) == {
            name: TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in table.items()
        }
        assert source.metadata[path] == (meta or {})
        assert_same_bits(dict(source.tensors()), table)
        with source.leases() as stream:
            assert {lease.name: lease.raw.tolist() for lease in stream} == {
                name: bits(tensor).tolist() for name, tensor in table.items()
            }


@EXAMPLES
@given(table=tables, meta=metadata)
def test_the_reference_reads_what_we_write(table, meta, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "ours.safetensors"
    write_safetensors(path, table, metadata=meta)
    assert_same_bits(safetensors.torch.load_file(path), table)
    with safetensors.safe_open(path, "pt") as file:
        assert (file.metadata() or {}) == (meta or {})
    assert assert_at_least_as_strict(path.read_bytes())


@pytest.mark.parametrize("name", FORMAT_DTYPES)
@pytest.mark.parametrize("shape", [[], [0], [8], [3, 8], [8, 1], [2, 0, 3]], ids=str)
def test_every_dtype_of_the_format(name, shape, tmp_path):
    width, attribute = FORMAT_DTYPES[name]
    count = math.prod(shape) * width
    data = bytes(range(1, 200))[: count // 8]
    raw = file_of({"w": entry(name, shape, 0, len(data))}, data)
    if count % 8:
        assert ours(raw) is None
        assert theirs(raw) is None
        return
    assert assert_at_least_as_strict(raw)
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    with hw.open(path) as source:
        spec = source.manifest["w"]
        assert (format_name(spec.dtype), format_shape(spec), spec.nbytes) == (name, shape, len(data))
        opaque = name in ("F6_E2M3", "F6_E3M2") or (name == "F4" and shape[-1] % 2 == 1)
        assert spec.dtype == (OpaqueDtype(name, width) if opaque else getattr(torch, attribute))
        assert_carried(source, spec, data)


def assert_carried(source, spec, data):
    """As bytes always; as a tensor where torch has a type."""
    with source.leases() as stream:
        lease = next(stream)
        assert bytes(lease.raw.tolist()) == data
        if isinstance(spec.dtype, OpaqueDtype):
            with pytest.raises(UnsupportedDtype, match=r"'w'.*take \.raw"):
                _ = lease.tensor
            with pytest.raises(UnsupportedDtype):
                lease.own()
        else:
            assert (lease.tensor.dtype, lease.tensor.shape) == (spec.dtype, spec.shape)
    memory = torch.empty(len(data), dtype=torch.uint8)
    with hw.Pool(1, 64 * 1024) as pool:
        source.read([Read("w", 0, len(data), memory)], pool=pool)
    assert bytes(memory.tolist()) == data
    if isinstance(spec.dtype, OpaqueDtype):
        with pytest.raises(UnsupportedDtype, match=f"'w'.*{spec.dtype}"):
            source.tensors()  # At once, not at its first tensor.


def test_an_opaque_tensor_does_not_hide_its_neighbours(tmp_path):
    path = tmp_path / "model.safetensors"
    table = {"a": entry("U8", [3], 0, 3), "f6": entry("F6_E2M3", [4], 3, 6), "z": entry("F32", [], 6, 10)}
    path.write_bytes(file_of(table, bytes(range(10))))
    with hw.open(path) as source, source.leases() as stream:
        assert {lease.name: bytes(lease.raw.tolist()) for lease in stream} == {
            "a": b"\0\1\2",
            "f6": b"\3\4\5",
            "z": b"\6\7\10\11",
        }


def test_a_dtype_that_torch_does_not_know_yet_is_opaque(monkeypatch):
    raw = file_of({"w": entry("F8_E8M0", [2], 0, 2)}, b"ab")
    assert read_header("f", len(raw), lambda n, at: raw[at : at + n]).entries[0].spec.dtype == torch.float8_e8m0fnu
    monkeypatch.delattr(torch, "float8_e8m0fnu")
    (opaque,) = read_header("f", len(raw), lambda n, at: raw[at : at + n]).entries
    assert opaque.spec == TensorSpec("w", OpaqueDtype("F8_E8M0", 8), (2,))


def test_a_header_of_any_length_is_a_header():
    # A header of 640 bytes begins with the two bytes of a pickle.
    plain = json.dumps({"w": entry("U8", [1], 0, 1)}).encode()
    for nbytes in range(len(plain), 1200):
        assert assert_at_least_as_strict(file_of(plain.ljust(nbytes), b"x")), f"a header of {nbytes} bytes was refused"


@pytest.mark.parametrize(
    "header",
    [
        "{}",
        '{"__metadata__": {}}',
        '{"__metadata__": {"link": "https://a.b:80/c", "say": "\\"data_offsets\\": \\"__metadata__\\":"}}',
        json.dumps({"a:b": entry("U8", [0], 0, 0), "c\\d": entry("U8", [0], 0, 0), "": entry("U8", [0], 0, 0)}),
        json.dumps({"-0": entry("U8", [0], 0, 0), "layers.0": entry("U8", [0], 0, 0)}),
        json.dumps({"ü\u2028😀": entry("U8", [0], 0, 0)}, ensure_ascii=False),
        json.dumps({"ü\u2028😀": entry("U8", [0], 0, 0)}),
        json.dumps({"a": entry("F32", [0, 7], 0, 0), "b": entry("F32", [7, 0], 0, 0)}, indent=3) + "   \n",
        json.dumps({"x": {"data_offsets": [0, 0], "shape": [0], "dtype": "I64"}}),
        json.dumps({"x": entry("U8", [0], 0, 0) | {"crc": 1, "more": {"a": [1, "b:c"]}}}),
        '{"__metadata__": {"a": "1", "a": "2"}}',
    ],
)
def test_odd_headers_that_are_sound(header):
    assert assert_at_least_as_strict(file_of(header))


# What the reference accepts and we do not: there is no telling what is meant.
STRICTER = {"entry is an array", "huge and empty"}
STRICTER |= {"name twice", "name twice, same range", "name twice, no bytes", "name twice, by escape"}
STRICTER |= {"name twice, all escaped", "unknown field twice"}


def test_of_broken_files_the_reference_accepts_no_others():
    assert {case for case, (raw, _) in BROKEN_FILES.items() if theirs(raw) is not None} == STRICTER


# --- what is no header -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_a_broken_file_is_refused_by_name(case, tmp_path):
    raw, words = BROKEN_FILES[case]
    path = tmp_path / "broken.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError) as error:
        hw.open(path)
    assert type(error.value) is CheckpointError
    for word in (str(path), *words):
        assert word in str(error.value), f"{word!r} is not in: {error.value}"


def test_every_problem_of_a_file_comes_at_once(tmp_path):
    path = tmp_path / "broken.safetensors"
    table = {"a": entry("F31", [1], 0, 4), "b": entry("U8", [-1], 4, 4), "c": 7, "d": entry("U8", [3], 4, 8)}
    path.write_bytes(file_of(table, bytes(8)))
    with pytest.raises(CheckpointError) as error:
        hw.open(path)
    assert [problem.split(":")[1].split()[1] for problem in error.value.problems] == ["'a'", "'b'", "'c'", "'d'"]
    assert all(problem.startswith(f"{path}: ") for problem in error.value.problems)


@pytest.mark.parametrize("nbytes", [2**60, MAX_HEADER_NBYTES + 1, 50_000_000])
def test_a_huge_header_is_not_tried(nbytes, tmp_path):
    path = tmp_path / "huge.safetensors"
    path.write_bytes(nbytes.to_bytes(8, "little") + b"{}")
    tracemalloc.start()
    began = time.perf_counter()
    try:
        with pytest.raises(CheckpointError, match=str(nbytes)):
            hw.open(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - began < 5


def test_a_header_of_a_huge_sparse_file_is_bounded_too(tmp_path):
    path = tmp_path / "huge.safetensors"
    path.write_bytes((2**40 - 8).to_bytes(8, "little"))
    with path.open("r+b") as file:
        file.truncate(2**40)
    with pytest.raises(CheckpointError, match=str(MAX_HEADER_NBYTES)):
        hw.open(path)


# --- fuzz: never another exception, never laxer than the reference ---------------------------------------------------

BASES = [
    file_of({"w": entry("F32", [2, 3], 0, 24), "b": entry("BF16", [3], 24, 30)}, bytes(range(30))),
    file_of({"__metadata__": {"format": "pt"}, "w": entry("U8", [4], 0, 4), "e": entry("F64", [0], 4, 4)}, b"abcd"),
    file_of(
        {"q": entry("F4", [4], 0, 2), "f6": entry("F6_E3M2", [4], 2, 5), "s": entry("F32", [], 5, 9)}, b"123456789"
    ),
]
TOKENS = [
    *(b'"w"', b'"w":', b'"__metadata__":', b'"dtype":"U8",', b'"shape":[0],', b'"data_offsets":[0,0],', b'"x":{},'),
    *(b"\\u0077", b"\\ud800", b"\\", b'"', b"{", b"}", b"[", b"]", b",", b":", b"0", b"-0", b"-", b"1", b".0", b"e0"),
    *(b"9" * 20, b"NaN", b"null", b"true", b"\xff", b"\xc3", b"\0", b" ", b"\n", b"\t", b"\xef\xbb\xbf", b"[[[["),
    *(
        b'"w":1,',
        b'"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},',
        b"[0,4]",
        b"F8_E4M3",
        b"18446744073709551616",
    ),
]


@st.composite
def mutated(draw):
    """A sound file with a few bytes replaced, cut, repeated or put in; the length of the header is mended or not."""
    base = draw(st.sampled_from(BASES))
    nbytes = int.from_bytes(base[:8], "little")
    header, data = base[8 : 8 + nbytes], base[8 + nbytes :]
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(header)))
        stop = draw(st.integers(start, min(len(header), start + 12)))
        other = draw(st.integers(0, len(header)))
        middle = draw(
            st.one_of(st.sampled_from(TOKENS), st.binary(max_size=2), st.just(b""), st.just(header[other : other + 30]))
        )
        header = header[:start] + middle + header[stop:]
    length = draw(st.one_of(st.just(len(header)), st.just(nbytes), st.integers(0, len(base) + 4)))
    return length.to_bytes(8, "little") + header + data


@FUZZ
@given(mutated())
def test_mutated_bytes(raw):
    assert_at_least_as_strict(raw)


NUMBERS = [
    "0",
    "1",
    "4",
    "2",
    "-0",
    "-1",
    "0.0",
    "4.0",
    "1e0",
    "true",
    "null",
    '"4"',
    "99999999999999999999",
    "[]",
    "8",
]


@st.composite
def structured(draw):
    """JSON by hand, so that names and fields may come twice, be spelled by escapes, and hold what they should not."""
    number = st.sampled_from(["0", "0", "4", "4", *NUMBERS])
    few = st.lists(number, max_size=3).map(lambda items: f"[{','.join(items)}]")
    field = st.one_of(
        st.sampled_from(
            ['"dtype":"U8"', '"dtype":"U8"', '"dtype":"F31"', '"dtype":null', '"dt\\u0079pe":"U8"', '"x":1']
        ),
        few.map(lambda items: f'"shape":{items}'),
        few.map(lambda items: f'"data_offsets":{items}'),
    )
    sound = st.sampled_from(
        [ENTRY, EMPTY_ENTRY, '{"shape":[2,2],"data_offsets":[0,4],"dtype":"I8"}', '{"dtype":"F32"}', "{}", "1"]
    )
    value = st.one_of(sound, st.lists(field, min_size=2, max_size=5).map(lambda fields: f"{{{','.join(fields)}}}"))
    name = st.sampled_from(['"w"', '"v"', '"\\u0077"', '"a:b"', '"\\"__metadata__"', '"__metadata__"', '""'])
    meta = st.sampled_from(["{}", '{"a":"b"}', '{"a":"1","a":"2"}', '{"a":1}', "null", '{"a:b":"__metadata__"}'])
    entries = draw(st.lists(st.one_of(st.tuples(name, value), st.tuples(st.just('"__metadata__"'), meta)), max_size=4))
    return file_of(
        "{" + ",".join(f"{key}:{entry}" for key, entry in entries) + "}", draw(st.sampled_from([b"", b"abcd"]))
    )


@FUZZ
@given(structured())
def test_mutated_structure(raw):
    assert_at_least_as_strict(raw)


def test_the_fuzz_reaches_sound_files():
    """Most mutations are refused by all; those that only we could have let pass are what the fuzz is for."""
    sound = 0
    for base in BASES:
        assert assert_at_least_as_strict(base)
        nbytes = int.from_bytes(base[:8], "little")
        for position in range(8, 8 + nbytes):
            for byte in b' 0"':
                sound += assert_at_least_as_strict(base[:position] + bytes([byte]) + base[position + 1 :])
    assert sound > 50
