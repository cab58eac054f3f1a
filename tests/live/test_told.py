"""What an update or a load says of code and tensors of the caller: whose code raised, what came without scales."""

import json

import pytest
import torch
from torch import nn

import hotweights as hw
from hotweights.failure import FailureReport


class Loads(nn.Module):
    """Loading code as engines have it: it casts, cuts out what it needs, and passes over what it does not know."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4, bias=False)

    def load_weights(self, weights):
        known = dict(self.named_parameters())
        for name, tensor in weights:
            if name in known:
                known[name].data.copy_(tensor[:4])


def weights(value=1.0):
    return {"proj.weight": torch.full((4, 4), value)}


def fails(layer):
    if layer.weight[0, 0] > 1:
        raise RuntimeError("a scale is zero")


def named(name):
    return {"m.proj.weight": "proj.weight"}[name]


def refuses(model):
    raise ValueError("a norm of 1e30")


def loaded(**options):
    live = hw.LiveModel(Loads(), **options)
    live.load(weights(), version=1)
    return live


@pytest.mark.parametrize(
    ("options", "asked", "said"),
    [
        ({"process": fails}, {}, "the processing of layer proj (Linear) raised RuntimeError: a scale is zero"),
        ({}, {"check": refuses}, "check=refuses raised ValueError: a norm of 1e30"),
        ({}, {"rename": named}, "rename=named for 'proj.weight' raised KeyError: 'proj.weight'"),
    ],
)
def test_an_error_says_whose_code_raised_it(options, asked, said):
    live = loaded(**options)
    with pytest.raises(hw.UpdateAborted) as caught:
        live.update(weights(2.0), version=2, **asked)
    assert said in str(caught.value)
    assert said in live.status()["last_error"]
    assert type(caught.value.__cause__).__name__ in said
    assert (live.version, live.model.proj.weight[0, 0]) == (1, 1.0)


def test_the_first_load_raises_what_was_raised_and_notes_the_layer():
    live = hw.LiveModel(Loads(), process=fails)
    with pytest.raises(RuntimeError, match="a scale is zero") as caught:
        live.load(weights(2.0))
    assert caught.value.__notes__ == ["hotweights: raised by the processing of layer proj (Linear)"]
    assert live.status()["last_error"].startswith("the first load failed: the processing of layer proj (Linear) raised")
    assert live.status()["last_failure"]["deed"] == "load"


def test_a_failed_update_tells_where_its_time_went(tmp_path):
    live = loaded()
    with pytest.raises(hw.UpdateAborted) as caught:
        live.update(weights(2.0), version=2, check=refuses)
    report = caught.value.report
    assert isinstance(report, FailureReport)
    assert (report.deed, report.version) == ("update", 2)
    assert {"plan", "read", "prepare", "check"} <= {event.what for event in report.events}
    assert "failed" in str(report)
    assert "%) " in str(report)
    report.save_timeline(tmp_path / "timeline.json")
    events = json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
    assert "update 2 (failed)" in {event["name"] for event in events}
    assert json.loads(json.dumps(live.status()))["last_failure"] == json.loads(json.dumps(report.as_dict()))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_of_one_byte_whose_scales_are_passed_over_are_refused(dtype):
    quantised = {"proj.weight": torch.ones(4, 4).to(dtype), "proj.weight_scale": torch.ones(4)}
    with pytest.raises(hw.PlanError, match=r"what scales it, proj\.weight_scale, has no place"):
        hw.load(Loads(), quantised)
    with pytest.raises(hw.UpdateAborted, match=r"what scales it, proj\.weight_scale, has no place"):
        loaded().update(quantised)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_of_one_byte_without_scales_are_a_warning(dtype):
    bare = {"proj.weight": torch.ones(4, 4).to(dtype)}
    for report in (hw.load(Loads(), bare), loaded().update(bare)):
        assert [warning for warning in report.warnings if "with nothing that scales them" in warning]
    assert not hw.load(Loads(), weights()).warnings


def test_a_tensor_of_another_size_than_in_the_first_load_is_a_warning():
    live = loaded()
    report = live.update({"proj.weight": torch.full((8, 4), 2.0)})
    (warning,) = report.warnings
    assert warning.startswith("proj.weight: [8, 4] came, and in the first load [4, 4];")
    assert live.explain("proj.weight")
    assert not live.update(weights(3.0)).warnings


def test_a_second_live_model_of_one_module_is_a_warning(caplog):
    first = loaded()
    second = hw.LiveModel(first.model)
    (warning,) = second.load(weights(2.0)).warnings
    assert warning.startswith("another LiveModel has loaded this Loads, as version 1,")
    assert warning in caplog.text
    assert second.update(weights(3.0)).warnings == ()
    model = first.model
    del first, second
    assert hw.LiveModel(model).load(weights()).warnings == ()


def test_a_hook_is_a_function():
    with pytest.raises(hw.UsageError, match="on_commit takes a function"):
        loaded().on_commit(None)


def test_a_source_that_gives_nothing_is_told_as_that():
    pairs = iter(weights().items())
    list(pairs)
    with pytest.raises(hw.PlanError, match="The source holds no tensors at all; an iterator that was read before"):
        hw.load(nn.Linear(4, 4), hw.from_iterator(pairs))


def test_a_checkpoint_with_its_weights_under_a_name_is_told_which():
    checkpoint = {"model": nn.Linear(4, 4).state_dict()}
    with pytest.raises(hw.UsageError, match="'model' is a OrderedDict, and has tensors: give the entry 'model' itself"):
        hw.load(nn.Linear(4, 4), checkpoint)
    hw.load(nn.Linear(4, 4), checkpoint["model"])


def test_arrays_are_told_how_to_become_tensors():
    arrays = {name: tensor.numpy() for name, tensor in nn.Linear(4, 4).state_dict().items()}
    with pytest.raises(hw.UsageError, match=r"is a ndarray \(torch\.from_numpy"):
        hw.load(nn.Linear(4, 4), arrays)
    hw.load(nn.Linear(4, 4), {name: torch.from_numpy(array) for name, array in arrays.items()})


def test_a_function_that_forgets_to_return_is_told_what_it_returns():
    with pytest.raises(hw.PlanError, match="would become None; a function returns the new name"):
        hw.load(Loads(), weights(), rename=lambda name: None)


class Rotary(nn.Module):
    """It computes a buffer that no checkpoint carries."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.register_buffer("inv_freq", torch.arange(4.0), persistent=False)


def test_for_a_buffer_on_meta_only_what_works_is_advised(tmp_path):
    state = {name: tensor.clone() for name, tensor in Rotary().state_dict().items()}
    with torch.device("meta"):
        model = Rotary()
    with pytest.raises(hw.PlanError, match=r"hotweights\.build\(directory, factory") as caught:
        hw.load(model, state, device="cpu")
    assert "init_missing=True" not in str(caught.value)
    hw.load(model, state, device="cpu", init_missing=lambda name, tensor: tensor.copy_(torch.arange(4.0)))
    hw.save(state, tmp_path / "saved")
    built = hw.build(tmp_path / "saved", factory=Rotary, device="cpu")
    assert torch.equal(built.inv_freq, model.inv_freq)
    assert torch.equal(built.proj.weight, model.proj.weight)


class AsyncCall:
    async def __call__(self, version):
        raise AssertionError("nobody awaits it")


async def async_hook(version):
    raise AssertionError("nobody awaits it")


def test_a_hook_that_would_never_run_is_refused_when_it_is_given():
    live, called = loaded(), []
    for hook in (async_hook, AsyncCall()):
        with pytest.raises(hw.UsageError, match=r"on_commit: .* is async, and nobody would await it"):
            live.on_commit(hook)
    for wrong in (lambda: None, lambda version, more: None):
        with pytest.raises(hw.UsageError, match=r"is called with one argument, the version; it takes \("):
            live.on_commit(wrong)
    live.on_commit(called.append)
    live.on_commit(lambda version=None, *more: called.append(version))
    live.update(weights(3.0), version=3)
    assert called == [3, 3]
    live.on_commit(lambda version: async_hook(version))
    with pytest.raises(hw.CommitHookError, match="returned a coroutine, which nobody would await"):
        live.update(weights(4.0), version=4)
    assert called == [3, 3, 4, 4]


def test_a_process_that_would_never_run_is_refused():
    with pytest.raises(hw.UsageError, match=r"process=.* is async"):
        hw.LiveModel(nn.Linear(4, 4), process=async_hook)
    with pytest.raises(hw.UsageError, match=r"process=.* called with one argument, the module; it takes"):
        hw.LiveModel(nn.Linear(4, 4), process=lambda: None)


def test_a_commit_that_was_forgotten_is_logged(caplog):
    live = loaded()
    with live.begin() as update:
        update.feed(weights(2.0))
    (record,) = caplog.records
    assert record.getMessage() == "an update was not committed before its with ended; version 1 is live"
    caplog.clear()
    with live.begin() as update:
        update.abort()
    assert not caplog.records
