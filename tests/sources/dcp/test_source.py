"""DcpSource: bit for bit what torch loads, from any parts, into any memory; and what is refused, with every problem."""

import functools
import hashlib

import pytest
import torch
from dcp_saved import InParts, load_dcp, save_dcp, save_rank_parts
from torch import nn

import hotweights as hw
from hotweights.memory.pool import Pool
from hotweights.sources.checksums import write_digests
from hotweights.sources.contracts import Read
from hotweights.testing import SOURCE_CONTRACT, assert_same_bits

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.complex64]
OTHERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.bool]


def bits(*shape, dtype=torch.float32):
    """Random bits, which are some values of any dtype."""
    raw = torch.randint(0, 2, (*shape, dtype.itemsize), dtype=torch.uint8)
    return (
        raw.view(dtype).reshape(shape)
        if dtype == torch.bool
        else torch.randint_like(raw, 256).view(dtype).reshape(shape)
    )


def every_kind():
    tensors = {str(dtype).removeprefix("torch."): bits(6, 4, dtype=dtype) for dtype in (*FLOATS, *OTHERS)}
    tensors |= {"scalar": bits(), "empty": bits(0, 4), "transposed": bits(4, 6).t(), "row": bits(5, 3)[2]}
    return tensors | {"channels_last": bits(2, 3, 4, 5).to(memory_format=torch.channels_last), "large": bits(300, 700)}


def in_parts():
    """By rows, by columns, by both, uneven; with rows of more and of fewer bytes than are read one by one."""
    tensors = {"rows": bits(10, 300), "columns": bits(10, 900), "both": bits(11, 1300, dtype=torch.bfloat16)}
    tensors |= {"narrow": bits(40, 24, dtype=torch.int16), "deep": bits(4, 6, 8, dtype=torch.uint8), "line": bits(1000)}
    tensors |= {"turned": bits(30, 40), "thin": bits(700, 3)}
    cuts = {"rows": ([3, 4], []), "columns": ([], [300, 333]), "both": ([5], [640]), "narrow": ([7], [1, 5, 6])}
    cuts |= {"deep": ([1], [2, 3], [5]), "line": ([10, 500],), "turned": ([10], [15]), "thin": ([], [1])}
    state = {name: InParts(tensor, cuts[name], name == "turned") for name, tensor in tensors.items()}
    return tensors, state


@pytest.fixture(params=["whole", "in parts", "four files", "file each", "nested", "rank parts"])
def case(request, tmp_path):
    folder = tmp_path / "step-1"
    if request.param in ("in parts", "four files", "file each"):
        tensors, state = in_parts()
        options = {"single_file_per_rank": False} if request.param == "file each" else {}
        save_dcp(folder, state, files=4 if request.param == "four files" else 1, **options)
        return functools.partial(hw.open, folder), tensors
    if request.param == "rank parts":
        tensors, state = in_parts()
        kinds = every_kind()
        save_rank_parts(folder, state | kinds, 12, fqn_to_index_mapping={n: 1 + len(n) % 3 for n in tensors | kinds})
        return functools.partial(hw.open, folder), tensors | kinds
    tensors = every_kind()
    state = {"model": tensors, "optim": {"state": {"x": bits(3)}, "lr": 0.1}, "step": 7}
    save_dcp(folder, state if request.param == "nested" else tensors)
    return functools.partial(hw.open, folder), tensors


@pytest.mark.parametrize("check", SOURCE_CONTRACT, ids=lambda check: check.__name__)
def test_contract(check, case):
    make, tensors = case
    check(make, {name: tensor.contiguous() for name, tensor in tensors.items()})


def test_it_holds_what_torch_loads(tmp_path):
    tensors, state = in_parts()
    save_dcp(tmp_path / "ck", state, files=3)
    with hw.open(tmp_path / "ck") as source:
        ours = dict(source.tensors())
        assert len(source.files) == 3 + 1
    assert_same_bits(ours, load_dcp(tmp_path / "ck", tensors))


@pytest.mark.parametrize("slots", [1, 2])
def test_reads_go_into_slots_of_any_number(tmp_path, slots):
    tensors, state = in_parts()
    save_dcp(tmp_path / "ck", state)
    seen = {}
    with hw.open(tmp_path / "ck") as source, Pool(slots, 256 * 1024) as pool:
        sinks = [
            Read(name, 0, tensor.nbytes, lambda raw, name=name: seen.update({name: raw.clone()}))
            for name, tensor in tensors.items()
        ]
        source.read(sinks, pool=pool)
        with source.leases(pool=pool) as stream:
            for lease in stream:
                assert torch.equal(lease.raw, seen[lease.name])
    for name, tensor in tensors.items():
        assert torch.equal(seen[name], tensor.contiguous().view(-1).view(torch.uint8))


def test_a_rank_reads_the_bytes_of_its_rows_and_no_more(tmp_path):
    tensor = bits(16, 256)
    save_dcp(tmp_path / "ck", {"w": InParts(tensor, ([4, 8, 12], []))}, single_file_per_rank=False)
    half = torch.zeros(8, 256)
    told = []
    with hw.open(tmp_path / "ck") as source, Pool() as pool:
        before = read_by_this_process()
        source.read([Read("w", 0, half.nbytes, half)], pool=pool, advance=told.append)
        read = read_by_this_process() - before
    assert torch.equal(half.view(torch.int32), tensor[:8].view(torch.int32))
    assert sum(told) == half.nbytes
    assert half.nbytes <= read < half.nbytes + 2 * 2 * 1024 + 512  # both ends of two parts, and what /proc says


def read_by_this_process():
    """Bytes that it read by system calls, whatever brought them."""
    with open("/proc/self/io") as file:
        return int(next(line for line in file if line.startswith("rchar")).split()[1])


class Net(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.up = nn.Linear(200, 30)
        self.down = nn.Linear(30, 200, bias=False)
        self.register_buffer("steps", torch.randn(3))


def same(model, other):
    return all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


def with_optimiser(model):
    optimiser = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    return optimiser.state_dict()


def nested(model):
    return {"model": model.state_dict(), "optim": with_optimiser(model), "step": 3}


def test_a_plain_model_takes_it(tmp_path):
    saved, model = Net(1), Net(2)
    save_dcp(tmp_path / "ck", nested(saved), files=2)
    report = hw.load(model, tmp_path / "ck", verify="loader")
    assert same(model, saved)
    assert report.bytes_written == sum(t.nbytes for t in saved.state_dict().values())
    assert not report.warnings
    half = Net(3).to(torch.bfloat16)
    hw.load(half, tmp_path / "ck", cast="floats")
    assert same(half, Net(1).to(torch.bfloat16)) is False  # the optimiser has stepped
    assert same(half, saved.to(torch.bfloat16))


@pytest.mark.parametrize("strategy", ["staged", "journal"])
def test_a_live_model_is_updated_from_it(tmp_path, strategy):
    live = hw.LiveModel(Net(0), atomic=strategy)
    live.load(save_dcp(tmp_path / "step-0", nested(Net(0))))
    for step in (1, 2):
        save_dcp(tmp_path / f"step-{step}", nested(Net(step)))
        report = live.update(str(tmp_path / f"step-{step}"))
        with hw.open(tmp_path / f"step-{step}") as source:
            assert_same_bits(dict(source.tensors()), live.model.state_dict())
    assert report.bytes_read == sum(tensor.nbytes for tensor in live.model.state_dict().values())
    held = {name: tensor.clone() for name, tensor in live.model.state_dict().items()}
    (tmp_path / "step-1" / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(hw.UpdateAborted, match="later ones are cut off"):
        live.update(str(tmp_path / "step-1"))
    assert_same_bits(held, live.model.state_dict())
    assert live.state.name == "READY" or str(live.state)


def test_other_names_and_a_digest_are_those_of_files(tmp_path):
    model = Net(1)
    save_dcp(tmp_path / "ck", {f"net.{name}": tensor for name, tensor in model.state_dict().items()})
    hw.save(model, tmp_path / "files")
    with hw.open(tmp_path / "ck", rename={"net.": ""}) as source, hw.open(tmp_path / "files") as files:
        assert_same_bits(dict(source.tensors()), dict(files.tensors()))
    with pytest.raises(hw.PlanError, match=r'rename={"net.": ""}'):
        hw.load(Net(2), tmp_path / "ck")
    fresh = Net(2)
    hw.load(fresh, tmp_path / "ck", rename={"net.": ""})
    assert same(fresh, model)
    save_dcp(tmp_path / "same", model.state_dict())
    with hw.open(tmp_path / "same") as source, hw.open(tmp_path / "files") as files:
        assert source.digest() == files.digest()


@pytest.mark.parametrize("by", ["tensors", "files"])
def test_it_is_compared_with_digests_while_it_is_read(by, tmp_path):
    tensors, state = in_parts()
    folder, sums = tmp_path / "step-1", tmp_path / "sums"
    save_dcp(folder, state)
    if by == "tensors":
        with hw.open(folder) as source:
            write_digests(source.digest(), sums)
    else:
        files = sorted(path for path in folder.iterdir())
        sums.write_text("".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files))
    with hw.open(folder, digests=sums) as source:
        found = dict(source.tensors())
    assert_same_bits(found, tensors)
    data = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
    raw = bytearray(data.read_bytes())
    raw[raw.index(tensors["line"][20:40].numpy().tobytes())] ^= 1
    data.write_bytes(raw)
    with hw.open(folder, digests=sums) as source, pytest.raises(hw.CheckpointError, match=r"is not what .*sums says"):
        dict(source.tensors())
