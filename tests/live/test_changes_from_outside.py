"""What else people do with a model that is live: train it, fork, convert it, wrap it, load into it past us."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import hotweights as hw
from hotweights.testing import Processed, processed_checkpoint, write_checkpoint


def mlp():
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))


def tensors(model, seed):
    made = torch.Generator().manual_seed(seed)
    return {name: torch.rand(one.shape, generator=made) for name, one in model.state_dict().items()}


def loaded(model, **options):
    live = hw.LiveModel(model, **options)
    live.load(tensors(model, 0))
    return live


def holds(model, expected):
    return all(torch.equal(one, expected[name]) for name, one in model.state_dict().items())


def test_an_optimizer_goes_on_with_the_same_parameters():
    model = mlp()
    live, optimizer = loaded(model), torch.optim.AdamW(model.parameters())
    for seed in (1, 2):
        live.update(tensors(model, seed))
        assert holds(model, tensors(model, seed))
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        assert not torch.equal(model[0].bias, tensors(model, seed)["0.bias"])


def test_a_gradient_through_an_update_is_refused_by_torch():
    model = mlp()
    live, out = loaded(model), None
    out = model(torch.ones(2, 4, requires_grad=True)).sum()
    live.update(tensors(model, 1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_load_state_dict_between_two_updates():
    model = mlp()
    live = loaded(model)
    model.load_state_dict(tensors(model, 5))
    live.update(tensors(model, 1))
    assert holds(model, tensors(model, 1))
    model.load_state_dict(tensors(model, 5), assign=True)
    with pytest.raises(hw.UpdateAborted, match=r"a new live model: 0\.bias, .* and 3 more: something else"):
        live.update(tensors(model, 1))
    assert holds(model, tensors(model, 5))


@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.double, lambda one: one.to(torch.bfloat16)])
def test_a_converted_model_is_refused_and_unharmed(convert):
    model = mlp()
    live, new = loaded(model), tensors(model, 1)
    convert(model)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    with pytest.raises(hw.UpdateAborted, match="Drop this live model, build the model anew"):
        live.update(new)
    assert holds(model, before)
    again = hw.LiveModel(model)
    again.load(new, cast="loader")
    assert model[0].weight.dtype == before["0.weight"].dtype


@pytest.mark.parametrize("atomic", ["journal", "staged"])
def test_a_fork_in_the_middle_of_an_update(atomic):
    """The child holds the model as it was at that moment; it can abort and go on by itself."""
    model = mlp()
    live, new = loaded(model, atomic=atomic), tensors(model, 1)
    first, second = dict(list(new.items())[:3]), dict(list(new.items())[3:])
    with live.begin() as update:
        update.feed(first)
        child = os.fork()
        if not child:
            code = 1
            try:
                update.abort()
                if holds(model, tensors(model, 0)):
                    live.update(tensors(model, 2))
                    code = 0 if holds(model, tensors(model, 2)) else 2
            finally:
                os._exit(code)
        update.feed(second)
        update.commit()
    assert os.waitpid(child, 0)[1] == 0
    assert holds(model, new)


@pytest.mark.parametrize("process", [None, lambda layer: None])
@pytest.mark.parametrize(
    "wrap", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal]
)
def test_parametrized_weights(wrap, process):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(wrap(nn.Linear(4, 4))).eval()

    model, cold = make(), make()
    live = loaded(model, process=process)
    for seed in (1, 2):
        live.update(tensors(model, seed))
        cold.load_state_dict(tensors(model, seed))
        assert torch.equal(model(torch.ones(1, 4)), cold(torch.ones(1, 4)))


def test_what_is_the_callers_stays():
    model = mlp()
    live, calls = loaded(model, process=lambda layer: None), []
    model.eval().requires_grad_(False)
    handle = model[0].register_forward_hook(lambda *args: calls.append(args))
    live.update(tensors(model, 1))
    model(torch.ones(1, 4))
    assert len(calls) == 1
    assert not any(one.requires_grad for one in model.parameters())
    assert not any(module.training for module in model.modules())
    handle.remove()
    model.train()
    live.update(tensors(model, 2))
    assert all(module.training for module in model.modules())


_DISTRIBUTED = """
import os

import torch
from torch import distributed, nn

import hotweights as hw

distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)))
live = hw.LiveModel(model)
live.load({name: torch.zeros(one.shape) for name, one in model.state_dict().items()})
for number in (1, 2):
    model(torch.ones(2, 4)).sum().backward()
    live.update({name: torch.full(one.shape, float(number)) for name, one in model.state_dict().items()})
    assert {float(one) for tensor in model.state_dict().values() for one in tensor.flatten()} == {number}
print("right", flush=True)
os._exit(0)
"""


def test_distributed_data_parallel():
    """In a process of its own, which ends at once: threads of gloo have hung in C, or aborted the tests' process."""
    source = Path(hw.__file__).parents[1]
    child = subprocess.run(
        [sys.executable, "-c", _DISTRIBUTED],
        env=os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (child.stdout, child.returncode) == ("right\n", 0), child.stderr


def test_updates_leave_nothing_behind(tmp_path):
    model = Processed()
    live = hw.LiveModel(model, deferred=model.deferred)
    sources = [processed_checkpoint(seed=seed) for seed in range(2)]
    paths = [write_checkpoint(tmp_path / str(seed), one) for seed, one in enumerate(sources)]
    live.load(sources[0], allow_missing=model.allow_missing)

    def rounds(count):
        for number in range(count):
            for atomic in ("staged", "journal", False):
                live.update(sources[number % 2], atomic=atomic)
            live.update(paths[number % 2])
            with live.begin() as update:
                update.feed(dict(list(sources[0].items())[:3]))
        gc.collect()
        found = sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())
        return found, len(os.listdir("/proc/self/fd"))

    before = rounds(2)
    assert rounds(10) == before
