"""Guards: a tensor that was kept too long is loud."""

import copy
import pickle
import threading

import pytest
import torch

from hotweights import BorrowedTensor, Pool, StaleLease, TensorSpec, UnknownName
from hotweights.dtypes import FORMAT_DTYPES
from hotweights.memory.guards import TrapTensor, poison_byte
from hotweights.testing import ManualEvent

SPEC = TensorSpec("layer.weight", torch.float32, (3, 4))


@pytest.fixture
def slot():
    with Pool(1, 4096, guard="trap") as pool:
        slot = pool.acquire("test")
        slot.memory[:48].view(torch.float32).copy_(torch.arange(12.0))
        yield slot


VIEWS = {
    "the tensor itself": lambda t: t,
    "a view": lambda t: t.view(2, 6),
    "a view of a view": lambda t: t.view(12).view(4, 3)[1:].unsqueeze(0),
    "a slice": lambda t: t[1:, ::2],
    ".T": lambda t: t.T,
    ".data": lambda t: t.data,
    "detach": lambda t: t.detach(),
    "unbind": lambda t: t.unbind()[1],
    "chunk": lambda t: t.chunk(2)[1],
    "iteration": lambda t: list(t)[2],
    "a dtype view": lambda t: t.view(torch.int32),
    "narrow": lambda t: t.narrow(0, 1, 1),
    "expand": lambda t: t[0].expand(5, 4),
    "as_strided": lambda t: t.as_strided((2,), (1,)),
    "a parameter": lambda t: torch.nn.Parameter(t, requires_grad=False),
    "no-op conversions": lambda t: t.to("cpu").contiguous().float().reshape(3, 4),
    "as_subclass": lambda t: t.as_subclass(torch.Tensor),
}
USES = {
    "arithmetic": lambda t: t + 1,
    "copied from": lambda t: torch.empty(t.shape, dtype=t.dtype).copy_(t),
    "clone": lambda t: t.clone(),
    "item": lambda t: t.reshape(-1)[0].item(),
    "tolist": lambda t: t.tolist(),
    "equal": lambda t: torch.equal(t, t),
    "another view": lambda t: t.unsqueeze(0),
    "numpy": lambda t: t.numpy(),
    "pickle": lambda t: pickle.dumps(t),
    "deepcopy": lambda t: copy.deepcopy(t),
}
MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("make", VIEWS.values(), ids=VIEWS)
def test_a_view_is_right_while_leased_and_raises_after(slot, make, mode):
    lease = slot.lease(SPEC, 0)
    with mode():
        view = make(lease.tensor)
        right = make(torch.arange(12.0).view(3, 4))
        assert type(view) is TrapTensor
        assert view.clone().tolist() == right.tolist()
        assert (view + 1).tolist() == (right + 1).tolist()
        lease.release()
        for use in USES.values():
            with pytest.raises(StaleLease, match=r"'layer\.weight'"):
                use(view)


def test_it_raises_in_another_thread(slot):
    lease = slot.lease(SPEC, 0)
    view, seen = lease.tensor.T, []

    def use():
        try:
            view.sum()
        except StaleLease as error:
            seen.append(error)

    for expected in (0, 1):
        thread = threading.Thread(target=use)
        thread.start()
        thread.join(30)
        assert len(seen) == expected
        lease.release()


def test_results_that_own_their_memory_are_let_go(slot):
    lease = slot.lease(SPEC, 0)
    tensor = lease.tensor
    results = [
        tensor + 1,
        tensor.clone(),
        tensor.to(torch.float64),
        tensor.sum(),
        torch.cat([tensor, tensor]),
        lease.own(),
    ]
    results += [copy.deepcopy(tensor), pickle.loads(pickle.dumps(tensor)), torch.stack(list(tensor))]
    parameter = torch.nn.Parameter(torch.zeros(3, 4), requires_grad=False)
    parameter.data.copy_(tensor)
    lease.release()
    for result in [*results, parameter.data]:
        assert type(result) is torch.Tensor
        assert result.sum().isfinite()
    assert parameter.tolist() == torch.arange(12.0).view(3, 4).tolist()


ESCAPES = {
    "numpy": lambda t, p: t.numpy(),
    "asarray": lambda t, p: __import__("numpy").asarray(t),
    "data_ptr": lambda t, p: t.data_ptr(),
    "dlpack": lambda t, p: t.__dlpack__(),
    "from_dlpack": lambda t, p: torch.from_dlpack(t),
    "storage": lambda t, p: t.untyped_storage(),
    "param.data =": lambda t, p: setattr(p, "data", t),
    "set_": lambda t, p: torch.empty(0).set_(t),
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("escape", ESCAPES.values(), ids=ESCAPES)
def test_nothing_carries_the_address_away(slot, escape, mode):
    lease = slot.lease(SPEC, 0)
    with mode():
        parameter = torch.nn.Parameter(torch.zeros(3, 4), requires_grad=False)
        # Rebinding .data is refused by torch itself in some modes, in its own words.
        with pytest.raises((BorrowedTensor, RuntimeError)):
            escape(lease.tensor, parameter)
        assert parameter.tolist() == torch.zeros(3, 4).tolist()


@pytest.mark.parametrize("write", [
    lambda t: t.mul_(2),
    lambda t: t.T.zero_(),
    lambda t: t.__setitem__(0, 1.0),
    lambda t: torch.add(torch.ones(3, 4), 1, out=t),
    lambda t: torch._foreach_add_([t], 1.0),
])  # fmt: skip
def test_a_lease_is_the_right_to_read(slot, write):
    lease = slot.lease(SPEC, 0)
    with pytest.raises(BorrowedTensor, match=r"layer\.weight"):
        write(lease.tensor)
    assert slot.memory[:48].view(torch.float32).tolist() == torch.arange(12.0).tolist()


def test_a_stale_trap_still_tells_its_shape_and_its_state(slot):
    lease = slot.lease(SPEC, 0)
    tensor = lease.tensor
    assert "leased" in repr(tensor)
    assert tensor.device == torch.device("cpu")
    assert not tensor.is_meta
    lease.release()
    assert tensor.shape == (3, 4)
    assert "stale" in repr(tensor)
    with pytest.raises(StaleLease):
        _ = lease.tensor
    with pytest.raises(StaleLease):
        lease.own()


def test_the_rest_of_a_bucket_that_was_kept():
    """A callback keeps its dict, the next bucket overwrites it. Without a guard: wrong, and silent."""
    for guard in ("off", "trap"):
        with Pool(1, 4096, guard=guard) as pool:
            kept, owned = {}, {}
            for name in "ab":
                slot = pool.acquire(name)
                slot.memory[:4].view(torch.float32).fill_(float(ord(name)))
                lease = slot.lease(TensorSpec(name, torch.float32, (1,)), 0)
                kept[name], owned[name] = lease.tensor, lease.own()
                slot.release()
                lease.release()
            assert [owned[name].item() for name in "ab"] == [97.0, 98.0]
            if guard == "off":
                assert kept["a"].item() == 98.0  # the naive way is bitten
            else:
                with pytest.raises(StaleLease, match="'a'"):
                    kept["a"].item()


def test_a_copy_in_another_thread_is_waited_for():
    """The stream advances while a thread still copies. Released after its event, the slot waits."""
    with Pool(1, 4096) as pool:
        for careful in (False, True):
            start, copied, event = threading.Event(), [], ManualEvent()
            slot = pool.acquire("first")
            slot.memory[:8].fill_(1)

            def copy_late(memory=slot.memory, start=start, copied=copied, event=event):
                start.wait(30)  # the injected delay
                copied.append(memory[:8].clone())
                event.happen()

            thread = threading.Thread(target=copy_late)
            thread.start()
            lease = slot.lease(TensorSpec("w", torch.uint8, (8,)), 0)
            slot.release()
            lease.release(after=event if careful else None)
            if careful:
                start.set()  # the next acquire must wait for the copy all the same
            slot = pool.acquire("second", timeout=30)
            slot.memory[:8].fill_(2)
            start.set()
            thread.join(30)
            slot.release()
            assert copied[0].tolist() == [1 if careful else 2] * 8


def test_poison_is_a_nan_wherever_there_is_one():
    for _, torch_name in FORMAT_DTYPES.values():
        dtype = getattr(torch, torch_name, None) if torch_name else None
        if dtype is None or not dtype.is_floating_point or dtype.itemsize * 8 < 8 or "float4" in torch_name:
            continue
        poisoned = torch.full((dtype.itemsize,), poison_byte(dtype), dtype=torch.uint8).view(dtype)
        assert poisoned.to(torch.float64).isnan().all(), dtype


def test_unknown_guards_are_refused():
    with pytest.raises(UnknownName, match=r"'loud'.*off, poison, trap"):
        Pool(guard="loud")
