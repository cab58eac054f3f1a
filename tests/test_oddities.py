"""Whatever callers pass, what fails says so with an error of ours, and nothing is lost: any model, source and call."""

import inspect
import os
import traceback
import warnings

import oddities
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oddities import MODELS, OPTIONS, SOURCES, Mine, linear, state
from torch import nn

import hotweights as hw

EXAMPLES = int(os.environ.get("HOTWEIGHTS_EXAMPLES", "1"))
FEW = settings(max_examples=100 * EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
UNTOUCHED = (hw.PlanError, hw.UsageError, hw.CheckpointError)

models, sources = st.sampled_from(sorted(MODELS)), st.sampled_from(sorted(SOURCES))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Makes a new folder at each call."""
    return lambda: tmp_path_factory.mktemp("odd")


def outcome(do):
    """What ``do`` raises, or ``None``. An error that is neither ours nor the caller's code's own fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            do()
        except (hw.HotweightsError, Mine) as error:
            return error
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            if any(frame.name == "load_state_dict" or frame.filename == oddities.__file__ for frame in frames):
                return error
            raise
    return None


def content(model):
    """The bytes of every tensor of a model that has bytes."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return [
        _bytes(tensor) for module in modules for tensor in (*module._parameters.values(), *module._buffers.values())
    ]


def _bytes(tensor):
    if tensor is None or nn.parameter.is_lazy(tensor) or tensor.is_meta or tensor.is_quantized or tensor.is_nested:
        return None
    if tensor.layout is not torch.strided:
        return None
    plain = tensor.detach().clone().resolve_conj().resolve_neg().contiguous()
    return plain.view(-1).view(torch.uint8).tolist()


def check_load(model, source, options):
    before = content(model)
    error = outcome(lambda: hw.load(model, source, **options))
    if isinstance(error, UNTOUCHED) and not isinstance(error, hw.CheckpointChanged):
        assert content(model) == before


@given(models, sources, st.sampled_from(OPTIONS))
@FEW
def test_load(folder, model, source, options):
    check_load(MODELS[model](), SOURCES[source](folder()), options)


@pytest.mark.long
@pytest.mark.parametrize("model", MODELS)
def test_load_of_everything(folder, model):
    for make in SOURCES.values():
        check_load(MODELS[model](), make(folder()), {})
    for options in OPTIONS:
        check_load(MODELS[model](), state(), options)


@given(models, sources)
@FEW
def test_trace(folder, model, source):
    model = MODELS[model]()
    before = content(model)
    outcome(lambda: hw.trace(model, SOURCES[source](folder())))
    assert content(model) == before


@given(sources, st.sampled_from(["hotweights", "safetensors", "torch", "unknown", 3]))
@FEW
def test_open(folder, source, reader):
    def read():
        with hw.open(SOURCES[source](folder()), reader=reader) as opened:
            assert list(opened.manifest) == [name for name, _ in opened.tensors()]

    outcome(read)


def first_loaded(model):
    """A live model with what the model had; ``None`` where that cannot be."""
    if not isinstance(model, nn.Module):
        return None
    kept = {name: item.clone() for name, item in model.state_dict().items() if type(item) is torch.Tensor}
    made = []
    if outcome(lambda: made.append(hw.LiveModel(model))) is not None:
        return None
    (live,) = made
    return live if outcome(lambda: live.load(kept, version=1, device="cpu")) is None else None


def check_update(live, source, **options):
    before, version = content(live.model), live.version
    error = outcome(lambda: live.update(source, version=2, **options))
    if error is None:
        assert (live.version, live.state) == (2, hw.State.SERVING)
    elif live.state is hw.State.TORN:
        assert options["atomic"] is False
    else:
        assert (live.version, content(live.model)) == (version, before)


@given(models, sources, st.sampled_from(["staged", "journal", False, "x"]), st.sampled_from([None, "*", "weight", 3]))
@FEW
def test_update(folder, model, source, atomic, only):
    if (live := first_loaded(MODELS[model]())) is not None:
        check_update(live, SOURCES[source](folder()), atomic=atomic, only=only)


@pytest.mark.long
@pytest.mark.parametrize("model", MODELS)
def test_update_of_everything(folder, model):
    for make in SOURCES.values():
        for atomic in ("staged", "journal", False):
            if (live := first_loaded(MODELS[model]())) is not None:
                check_update(live, make(folder()), atomic=atomic)


PAIRS = [
    [("weight", torch.ones(3, 3)), ("bias", torch.ones(3))],
    [("weight", torch.ones(3, 3))],
    [("weight", torch.ones(3, 3)), ("weight", torch.ones(3, 3))],
    [("wieght", torch.ones(3, 3)), ("bias", torch.ones(3))],
    [("weight", torch.ones(3)), ("bias", torch.ones(3))],
    [("weight", torch.ones(3, 3).to_sparse()), ("bias", torch.ones(3))],
    [("weight", torch.ones(3, 3, device="meta"))],
    [("weight", None)],
    [("weight", [1.0])],
    [(3, torch.ones(3))],
    [None],
    [()],
    ["weight"],
    ("weight", torch.ones(3, 3)),
    torch.ones(3, 3),
    "weight",
    3,
    None,
    {"weight": torch.ones(3, 3), "bias": torch.ones(3)},
]


@pytest.mark.parametrize("atomic", ["staged", "journal"])
@pytest.mark.parametrize("number", range(len(PAIRS)))
def test_feed(number, atomic):
    live = first_loaded(linear())
    before = content(live.model)

    def feed():
        with live.begin(atomic=atomic) as update:
            update.feed(PAIRS[number])
            update.prepare()
            update.commit(version=2)

    if outcome(feed) is not None:
        assert (live.version, live.state, content(live.model)) == (1, hw.State.SERVING, before)
    live.update(state(), version=3)


@given(sources, models)
@FEW
def test_route(folder, source, model):
    given_model = MODELS[model]()
    if isinstance(given_model, nn.Module) and model not in ("load_weights of no argument", "load_weights is 3"):
        outcome(lambda: hw.route(SOURCES[source](folder()), [hw.Component("", given_model)]))


@given(sources)
@FEW
def test_send(folder, source):
    place = folder()

    def send():
        with hw.Sender(f"unix:{place}/s", timeout=0.01) as sender:
            sender.send(SOURCES[source](place), version=1)

    assert outcome(send) is not None  # There is no receiver.


ODD = [None, 3, -1, 2.5, "", "x", b"x", [], [None], {}, (), object(), True, torch.ones(2), lambda *_: None, str]
GOOD = {
    "model": linear,
    "source": state,
    "manifest": lambda: hw.open(state()).manifest,
    "what": state,
    "pairs": lambda: iter(state().items()),
    "components": lambda: [hw.Component("", linear())],
    "match": lambda: "",
    "load_weights": linear,
    "hook": lambda: print,
    "version": lambda: 2,
}


def serving(**options):
    with first_loaded(linear()).serving(**options):
        pass


def commit(**options):
    with first_loaded(linear()).begin() as update:
        update.feed(state())
        update.prepare()
        update.commit(**options)


def send(**options):
    with hw.Sender("unix:s", timeout=0.01) as sender:
        sender.send(**options)


PUBLIC = {
    "load": (hw.load, hw.load),
    "trace": (hw.trace, hw.trace),
    "open": (hw.open, hw.open),
    "from_iterator": (hw.from_iterator, hw.from_iterator),
    "route": (hw.route, hw.route),
    "LiveModel": (hw.LiveModel, hw.LiveModel),
    "Component": (hw.Component, hw.Component),
    "Pool": (hw.Pool, hw.Pool),
    "first load": (hw.LiveModel.load, lambda **options: hw.LiveModel(linear()).load(**options)),
    "update": (hw.LiveModel.update, lambda **options: first_loaded(linear()).update(**options)),
    "begin": (hw.LiveModel.begin, lambda **options: first_loaded(linear()).begin(**options).abort()),
    "serving": (hw.LiveModel.serving, serving),
    "on_commit": (hw.LiveModel.on_commit, lambda **options: first_loaded(linear()).on_commit(**options)),
    "commit": (hw.Update.commit, commit),
    "Sender": (hw.Sender, lambda **options: hw.Sender(**{"address": "unix:s", **options}).close()),
    "Receiver": (
        hw.Receiver,
        lambda **options: hw.Receiver(**{"address": "unix:s", "timeout": 0.01, **options}).close(),
    ),
    "send": (hw.Sender.send, lambda **options: send(**{"tensors": state(), **options})),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_argument_may_be_anything(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # A cache_dir or a socket may be made.
    signature, call = PUBLIC[name]
    parameters = [one for one in inspect.signature(signature).parameters.values() if one.name != "self"]
    needed = [one.name for one in parameters if one.default is one.empty and one.name in GOOD]
    for parameter in parameters:
        for value in ODD:
            arguments = {**{key: GOOD[key]() for key in needed}, parameter.name: value}
            outcome(lambda arguments=arguments: call(**arguments))
