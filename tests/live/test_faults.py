"""Failures at every read, tensor, layer, write and hook: version N byte for byte, or torn by name, or all of M."""

import itertools

import pytest
import torch
import zoo
from torch.utils._python_dispatch import TorchDispatchMode

import hotweights as hw
from hotweights.live.plans import Options
from hotweights.testing import FailingSource, assert_same_bits, bits, write_checkpoint

WAYS = ("journal", "staged", False)
ERRORS = (RuntimeError, KeyboardInterrupt)
SPEC = zoo.Spec(
    (
        ("Plain", "transpose"),
        ("Tied", "in_place", "nothing"),
        ("Aliased", "in_place"),
        ("Scaled", "quantise"),
        ("Kept", "once"),
        ("Attention", "empty"),
    )
)
UNPROCESSED = SPEC._replace(processed="none")


class Fault:
    """Raises once: when it is asked for the time number ``at``, counted from 0."""

    def __init__(self, at, error):
        self.at, self.error = at, error
        self.happened = False

    def __call__(self):
        self.at -= 1
        if self.at == -1:
            self.happened = True
            raise self.error("injected")


def loaded(spec, **options):
    model = zoo.Model(spec)
    live = zoo.live_model(model, **options)
    live.load(zoo.checkpoint(spec, 0), version="N", **zoo.allowed(model))
    return model, live


def snapshot(model):
    return {name: bits(one) for name, one in zoo.state(model).items()}, zoo.words(model), zoo.addresses(model)


def same(one, other):
    assert_same_bits(one[0], other[0])
    assert one[1:] == other[1:]


def update_with(fault, live, spec, how, **options):
    """An update to version M that is asked for by ``how``; whether the fault came of it."""
    try:
        how(fault, live, spec, **options)
    except (hw.UpdateAborted, KeyboardInterrupt) as caught:
        error = caught
    else:
        return False
    assert fault.happened
    assert "injected" in str(error)
    assert (type(error) is KeyboardInterrupt) == (fault.error is KeyboardInterrupt)
    return True


def check_all_or_nothing(spec, how, error, atomic, **options):
    """One fault after the other, at k = 0, 1, 2 ..., until there is no k-th time."""
    model, live = loaded(spec, atomic=atomic, **options)
    before, digest = snapshot(model), live.digest()
    for k in itertools.count():
        fault = Fault(k, error)
        raised = update_with(fault, live, spec, how)
        if not fault.happened:
            break
        if live.version == "M":  # The commit had begun: it is finished whatever happens.
            assert atomic == "staged"
            assert not raised or error is KeyboardInterrupt
            assert_same_bits(zoo.state(model), zoo.state(zoo.cold(spec, 1)))
            assert zoo.words(model) == zoo.words(zoo.cold(spec, 1))
        elif live.state is hw.State.TORN:
            check_torn(live)
        else:
            assert raised
            assert live.digest() == digest
            same(snapshot(model), before)
        assert (live.state is hw.State.TORN) <= (atomic is False)
        live.update(zoo.checkpoint(spec, 0), version="N")
        assert live.state is hw.State.SERVING
        same(snapshot(model), before)
    assert k > 1
    assert live.version == "M"
    assert_same_bits(zoo.state(model), zoo.state(zoo.cold(spec, 1)))
    return k


def check_torn(live):
    with pytest.raises(hw.HotweightsError, match="torn"), live.serving():
        pass
    with pytest.raises(hw.UsageError, match="complete"):
        live.update({}, only="*")
    assert live.state is hw.State.TORN


every = pytest.mark.parametrize(("spec", "error", "atomic"), list(itertools.product((SPEC, UNPROCESSED), ERRORS, WAYS)))


@every
def test_at_every_read(tmp_path, spec, error, atomic):
    path = write_checkpoint(tmp_path / "m", zoo.checkpoint(spec, 1), shards=2)

    def how(fault, live, spec):
        with FailingSource(hw.open(path), at=fault.at, error=error("injected")) as source:
            try:
                live.update(source, version="M")
            finally:
                fault.happened = source._at < 0

    check_all_or_nothing(spec, how, error, atomic)


@every
def test_at_every_tensor_of_a_push(spec, error, atomic):
    def how(fault, live, spec):
        def pairs():
            for pair in zoo.checkpoint(spec, 1).items():
                fault()
                yield pair

        with live.begin() as update:
            update.feed(pairs())
            update.commit("M")

    assert check_all_or_nothing(spec, how, error, atomic) == len(zoo.checkpoint(spec, 1))


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("atomic", WAYS)
def test_at_every_layer(atomic, error, late):
    """Before a layer is processed, and when it is but nothing was made of it yet."""
    faults = []

    def process(layer):
        if faults and not late:
            faults[0]()
        zoo.process(layer)
        if faults and late:
            faults[0]()

    def how(fault, live, spec):
        faults[:] = [fault]
        try:
            live.update(zoo.checkpoint(spec, 1), version="M")
        finally:
            faults.clear()

    live_model, zoo.live_model = (
        zoo.live_model,
        lambda model, **options: hw.LiveModel(model, process=process, deferred="*.late", **options),
    )
    try:
        check_all_or_nothing(SPEC, how, error, atomic)
    finally:
        zoo.live_model = live_model


class AtCopies(TorchDispatchMode):
    """Lets a fault happen before or after every copy that torch does: every write of an update is one."""

    def __init__(self, fault, *, after):
        super().__init__()
        self.fault, self.after, self.on = fault, after, True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_copy = self.on and func is torch.ops.aten.copy_.default
        if is_copy and not self.after:
            self.fault()
        made = func(*args, **(kwargs or {}))
        if is_copy and self.after:
            self.fault()
        return made


@every
@pytest.mark.parametrize("after", [False, True])
def test_at_every_write(spec, error, atomic, after):
    def how(fault, live, spec):
        tensors = zoo.checkpoint(spec, 1)
        with live.begin() as update, AtCopies(fault, after=after):
            update.feed(tensors)
            update.commit("M")

    check_all_or_nothing(spec, how, error, atomic)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("atomic", WAYS)
def test_at_every_hook(atomic, error):
    """The version is there, all hooks run, and the error says which failed."""
    model, live = loaded(SPEC, atomic=atomic)
    called, failing = [], []
    for number in range(3):

        def hook(version, number=number):
            called.append((number, version, live.state))
            if number in failing:
                raise error("injected")

        live.on_commit(hook)
    for k in range(3):
        failing[:], seed = [k], k + 1
        called.clear()
        with pytest.raises(hw.CommitHookError if error is RuntimeError else KeyboardInterrupt, match="injected"):
            live.update(zoo.checkpoint(SPEC, seed), version=f"M{k}")
        assert called == [(number, f"M{k}", hw.State.SERVING) for number in range(3)]
        assert (live.version, live.state) == (f"M{k}", hw.State.SERVING)
        assert_same_bits(zoo.state(model), zoo.state(zoo.cold(SPEC, seed)))
    failing.clear()
    called.clear()
    with pytest.raises(hw.UpdateAborted):
        live.update({})
    assert not called
    live.update(zoo.checkpoint(SPEC, 9))
    assert len(called) == 3


@pytest.mark.parametrize("processed", ["all", "quant_method", "none"])
@pytest.mark.parametrize("error", ERRORS)
def test_a_first_load_that_fails_can_be_repeated(monkeypatch, processed, error):
    spec = SPEC._replace(blocks=(*SPEC.blocks, ("Sum", "transpose"), ("Shared", "in_place")), processed=processed)
    model = zoo.Model(spec)
    live = zoo.live_model(model)
    keys = zoo.words(model)
    tensors, whole_trace = zoo.checkpoint(spec, 5), Options.traced

    for k in itertools.count():
        writes = AtCopies(Fault(k, error), after=True)

        def traced(*args, writes=writes, **options):
            writes.on = False  # Code that fails in a trace falls back: that is another matter.
            plan = whole_trace(*args, **options)
            writes.on = True
            return plan

        monkeypatch.setattr(Options, "traced", traced)
        try:
            with writes:
                live.load(tensors, **zoo.allowed(model))
            break
        except error:
            assert live.state is hw.State.EMPTY
            assert zoo.words(model) == keys
    assert k > 10
    assert_same_bits(zoo.state(model), zoo.state(zoo.cold(spec, 5)))
    live.update(zoo.checkpoint(spec, 6))
    assert_same_bits(zoo.state(model), zoo.state(zoo.cold(spec, 6)))


def test_a_naive_reload_leaves_two_versions():
    """What the tests above would find in a loader that just writes."""
    model, live = loaded(UNPROCESSED)
    before = live.digest()
    with pytest.raises(RuntimeError, match="injected"), AtCopies(Fault(3, RuntimeError), after=False):
        model.load_weights(zoo.checkpoint(UNPROCESSED, 1).items())
    assert live.digest() != before
