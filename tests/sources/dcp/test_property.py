"""Any parts of any dtype, cut anywhere, are read bit for bit as ``dcp.load`` reads them, whole and by any range."""

import tempfile

import torch
from dcp_saved import InParts, load_dcp, save_dcp
from hypothesis import given, settings
from hypothesis import strategies as st

import hotweights as hw
from hotweights.boxes import row_major
from hotweights.memory.pool import Pool
from hotweights.sources.contracts import Read

DTYPES = [torch.uint8, torch.bfloat16, torch.float32, torch.int64, torch.complex64, torch.float8_e5m2, torch.bool]
EDGES = [1, 2, 3, 5, 8, 40, 130, 600]  # Rows on both sides of what is read by itself.


@st.composite
def tensors_in_parts(draw):
    shape = draw(st.lists(st.sampled_from(EDGES), max_size=3).filter(lambda shape: torch.Size(shape).numel() < 50_000))
    dtype = draw(st.sampled_from(DTYPES))
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    cuts = [draw(st.lists(st.integers(1, length - 1), max_size=3)) if length > 1 else [] for length in shape]
    return InParts(raw.view(dtype).reshape(shape), cuts, draw(st.booleans()))


def rows(name, raw, shape, itemsize, data, memories):
    """Reads of rows at equal distances, into memory that lies in one piece."""
    own = [stride for stride in row_major((*shape, itemsize)) if stride <= len(raw)]
    stride = data.draw(st.sampled_from(own) | st.integers(1, len(raw)))
    nbytes = data.draw(st.integers(1, stride))
    first = data.draw(st.integers(0, min(stride, len(raw) - nbytes)))
    count = min(20, (len(raw) - first - nbytes) // stride + 1)
    memory = torch.zeros(count, nbytes, dtype=torch.uint8)
    memories.append((memory, torch.stack([raw[first + at * stride :][:nbytes] for at in range(count)])))
    return [Read(name, first + at * stride, nbytes, memory[at]) for at in range(count)]


def raw_of(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@settings(max_examples=40, deadline=None)
@given(st.lists(tensors_in_parts(), min_size=1, max_size=4), st.integers(1, 3), st.data())
def test_bit_for_bit_what_torch_loads(tensors, files, data):
    torch.manual_seed(0)
    state = {f"t{number}": tensor for number, tensor in enumerate(tensors)}
    with tempfile.TemporaryDirectory() as folder:
        save_dcp(folder, state, files=files)
        expected = load_dcp(folder, {name: torch.empty(t.shape, dtype=t.dtype) for name, t in state.items()})
        wanted = {name: raw_of(tensor) for name, tensor in expected.items()}
        with hw.open(folder) as source, Pool(2, 64 * 1024) as pool:
            for name, tensor in source.tensors():
                assert torch.equal(raw_of(tensor), wanted[name])
            reads, memories, seen = [], [], []
            for name, raw in wanted.items():
                start = data.draw(st.integers(0, len(raw) - 1))
                nbytes = data.draw(st.integers(1, min(len(raw) - start, 40_000)))
                memories.append((torch.zeros(nbytes, dtype=torch.uint8), raw[start : start + nbytes]))
                reads.append(Read(name, start, nbytes, memories[-1][0]))
                reads.append(
                    Read(name, start, nbytes, lambda got, want=memories[-1][1]: seen.append(torch.equal(got, want)))
                )
                reads += rows(name, raw, state[name].shape, state[name].itemsize, data, memories)
            source.read(reads, pool=pool)
            assert all(torch.equal(got, want) for got, want in memories)
            assert seen == [True] * len(wanted)
