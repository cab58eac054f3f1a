"""Tracing: no way of loading ends in wrong values, and the trace leaves the model as it was."""

import itertools
import re
import threading
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from examples import examples
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from idioms import IDIOMS, Model, weights
from torch import nn

import hotweights as hw
from hotweights import HotweightsError, Manifest, PlanError
from hotweights.model.reachable import reachable
from hotweights.plan.steps import Copy, Fate, Program
from hotweights.testing import Engine, assert_same_bits, bits, engine_checkpoint, write_checkpoint
from hotweights.tracing.fake_weight import ValueRead
from hotweights.tracing.recorder import Recorder

ALLOWED = {"allow_missing": "*", "allow_partial": "*", "allow_unexpected": "*"}


class Ordered:
    """The least that a stranger's source can be: it streams, in an order of its own."""

    def __init__(self, state):
        self._source = hw.open(dict(reversed(state.items())))
        self.manifest = hw.open(dict(state)).manifest
        self.leases, self.tensors, self.close = self._source.leases, self._source.tensors, self._source.close

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def sources(tensors, directory):
    """The same tensors from a file, from memory (in strides of their owner's), and in another order."""
    yield "file", write_checkpoint(directory, tensors)
    yield "memory", {name: strided(tensor) for name, tensor in tensors.items()}
    yield "stream", Ordered({name: strided(tensor) for name, tensor in tensors.items()})


def strided(tensor):
    return tensor.t().contiguous().t() if tensor.ndim == 2 else tensor.clone()


def own_loading(model, tensors):
    """What the model's own code makes of real tensors that nobody else holds."""
    with torch.no_grad():
        model.load_weights((name, tensor.clone()) for name, tensor in tensors.items())


def fingerprint(model):
    """Bytes, and everything about every tensor that loading code could change."""
    return {
        name: (bits(tensor.resolve_conj()).tolist(), tensor.dtype, tuple(tensor.shape), type(tensor).__name__)
        for name, tensor in model.all_tensors().items()
    }


def outcome(plan):
    if plan.fallback:
        return "F"
    return "C" if all(isinstance(step, Copy) for step in plan.steps) else "P"


def anatomy(model):
    """The model, attribute for attribute: identities, bytes, addresses, and what hangs on every object."""
    seen = {}

    def look(value, depth=0):
        if isinstance(value, (int, float, str, bool, type(None), type)) or (
            callable(value) and not hasattr(value, "__dict__")
        ):
            return repr(value)
        if id(value) in seen:
            return id(value)
        seen[id(value)] = value
        if isinstance(value, torch.Tensor):
            place = (id(value), type(value), value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
            grad = (value.requires_grad, id(value.grad), value.is_shared())
            return *place, *grad, bits(value).tolist(), look(vars(value), depth + 1)
        if isinstance(value, dict):
            return id(value), [(key, look(item, depth + 1)) for key, item in value.items()]
        if isinstance(value, (list, tuple)):
            return id(value), [look(item, depth + 1) for item in value]
        if hasattr(value, "__dict__") and depth < 12:
            return id(value), type(value), look(vars(value), depth + 1)
        return id(value)

    return look(model)


def ids(rows):
    return [row.name for row in rows]


def quiet(run):
    """What we refused it with, if we did."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The loader's own; torch warns of some idioms.
        try:
            run()
        except HotweightsError as error:
            return error
        return None


@pytest.mark.parametrize("idiom", IDIOMS, ids=ids(IDIOMS))
class TestIdioms:
    @pytest.mark.parametrize("kind", ["file", "memory", "stream"])
    def test_loads_as_its_own_code_does(self, idiom, kind, tmp_path):
        ours, theirs = Model(idiom.loader), Model(idiom.loader)
        for seed in (1, 2):
            tensors, before = weights(seed), anatomy(ours)
            source = dict(sources(tensors, tmp_path / str(seed)))[kind]
            error = quiet(lambda source=source: hw.load(ours, source, **ALLOWED))
            if error is not None:
                assert "refused" in idiom.outcome, error
                assert re.search(idiom.words, str(error)), error
                # Of two tensors in one place a stream shows the second when the first is written.
                assert kind == "stream" or anatomy(ours) == before
                return
            assert idiom.outcome != "refused"
            assert quiet(lambda tensors=tensors: own_loading(theirs, tensors)) is None
            assert fingerprint(ours) == fingerprint(theirs), f"time {seed}"

    def test_its_plan_is_as_expected_and_tracing_changes_nothing(self, idiom):
        model, tensors = Model(idiom.loader), weights(1)
        manifest = hw.open(tensors).manifest
        before, run, submit = anatomy(model), threading.Thread.start, ThreadPoolExecutor.submit
        random, grad = torch.get_rng_state(), torch.is_grad_enabled()
        plans = []
        error = quiet(lambda: plans.append(hw.trace(model, manifest, **ALLOWED)))
        found, said = ("refused", str(error)) if error else (outcome(plans[0]), str(plans[0]))
        assert anatomy(model) == before
        assert (threading.Thread.start, ThreadPoolExecutor.submit) == (run, submit)
        assert torch.equal(torch.get_rng_state(), random)
        assert torch.is_grad_enabled() == grad
        # Ties are compared when the bytes are there.
        assert found in idiom.outcome.split("|") or (found == "C" and "refused" in idiom.outcome), said
        if found in ("F", "refused"):
            assert re.search(idiom.words, said), said


# --- idioms composed at random ---------------------------------------------------------------------------------------

VIEWS = [
    lambda x, n: x.t() if x.ndim == 2 else x,
    lambda x, n: x[n % x.shape[0] :],
    lambda x, n: x[: 1 + n % x.shape[0]],
    lambda x, n: x[..., ::2],
    lambda x, n: x[n % x.shape[0]] if x.ndim > 1 else x,
    lambda x, n: x.narrow(-1, n % x.shape[-1], 1),
    lambda x, n: x.unsqueeze(0),
    lambda x, n: x.reshape(-1),
    lambda x, n: x.chunk(2)[n % len(x.chunk(2))],
    lambda x, n: x.unbind(0)[n % x.shape[0]] if x.ndim > 1 else x,
    lambda x, n: x.detach(),
    lambda x, n: x.data,
    lambda x, n: x.view(torch.int16).view(x.dtype) if x.is_contiguous() else x,
]
MAKES = [
    lambda x, n: x.clone(),
    lambda x, n: x.contiguous(),
    lambda x, n: x * (n + 1),
    lambda x, n: -x,
    lambda x, n: x.float(),
    lambda x, n: x.bfloat16(),
    lambda x, n: x.half().to(x.dtype),
    lambda x, n: torch.cat([x, x.flip(0)]),
    lambda x, n: torch.cat([x, x])[n % 3 :],
    lambda x, n: torch.stack([x, x], dim=n % (x.ndim + 1)),
    lambda x, n: torch.where(x > 0.5, x, torch.zeros(())),
    lambda x, n: torch.zeros_like(x),
    lambda x, n: torch.full(x.shape, float(n), dtype=x.dtype),  # the loader's own scratch
    lambda x, n: torch.empty(x.shape, dtype=x.dtype).zero_(),
    lambda x, n: x[torch.arange(x.shape[0]).flip(0)],
]
CHANGES = [
    lambda x, n: x.mul_(n + 2),
    lambda x, n: x.add_(1),
    lambda x, n: x.fill_(n),
    lambda x, n: x.zero_(),
    lambda x, n: x[0].fill_(n),
    lambda x, n: x.__setitem__((..., 0), float(n)),
    lambda x, n: x.copy_(x.clone() + 1),
    lambda x, n: x.fill_(x.reshape(-1)[0].clone()),
]
INSTRUCTION = st.one_of(
    st.tuples(st.just("view"), st.integers(0, 30), st.integers(0, len(VIEWS) - 1), st.integers(0, 3)),
    st.tuples(st.just("make"), st.integers(0, 30), st.integers(0, len(MAKES) - 1), st.integers(0, 3)),
    st.tuples(st.just("change"), st.integers(0, 30), st.integers(0, len(CHANGES) - 1), st.integers(0, 3)),
    st.tuples(st.just("copy"), st.integers(0, 30), st.integers(0, 30), st.integers(0, 3)),
    st.tuples(st.just("copy"), st.integers(0, 3), st.integers(0, 30), st.integers(0, 3)),
)


def composed(program):
    """A loader that follows ``program``; a pure function of what it is given."""

    def loader(model, pairs):
        kept = dict(pairs)
        values = [
            model.p.data,
            model.q.data,
            model.g.data,
            model.bf.data,
            model.middle.data,
            *(kept[name] for name in "wedh"),
        ]
        for kind, one, other, n in program:
            x = values[one % len(values)]
            if kind == "copy":
                y = values[other % len(values)]
                if x.numel() and x.numel() == y.numel():
                    x.copy_(y.reshape(x.shape).clone() if n else y.reshape(x.shape))
            elif kind == "change":
                if x.numel() and x.ndim:
                    CHANGES[other](x, n)
            elif x.numel() and x.ndim and x.numel() < 100:
                values.append((VIEWS if kind == "view" else MAKES)[other](x, n))

    return loader


REFUSED = "written twice|one tensor with|differ in the source|broadcast"


def check_composed(program, tally):
    tensors = weights(3)
    theirs, loader = Model(None), composed(program)
    theirs.loader = loader
    try:
        own_loading(theirs, tensors)
    except RuntimeError:
        return  # torch refuses what was composed
    for kind in ("memory", "stream"):
        ours = Model(loader)
        before = anatomy(ours)
        source = Ordered(tensors) if kind == "stream" else {name: strided(one) for name, one in tensors.items()}
        error = quiet(lambda ours=ours, source=source: hw.load(ours, source, **ALLOWED))
        if error is not None:
            assert re.search(REFUSED, str(error)), error
            assert kind == "stream" or anatomy(ours) == before
            tally["refused"] += 1
            continue
        tally["right"] += 1
        assert fingerprint(ours) == fingerprint(theirs), kind


@examples(150, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(INSTRUCTION, min_size=1, max_size=14))
def test_idioms_composed_at_random_load_as_their_own_code_does(program):
    check_composed(program, Counter())


# --- a trace that fails ----------------------------------------------------------------------------------------------


class Injected(BaseException):
    """Not an ``Exception``: neither the loading code nor the tracer may take it for one of theirs."""


@pytest.mark.parametrize("kind", [Injected, RuntimeError, KeyError])
def test_a_failure_at_any_operation_leaves_the_model_as_it_was(kind, monkeypatch):
    model, manifest = Engine(), Manifest(hw.open(engine_checkpoint()).manifest.values())
    before, patched = anatomy(model), (threading.Thread.start, ThreadPoolExecutor.submit, torch.utils.swap_tensors)
    dispatch, count, at = Recorder.dispatch, itertools.count(), [-1]

    def failing(self, func, args, kwargs):
        if next(count) == at[0]:
            raise kind("injected")
        return dispatch(self, func, args, kwargs)

    monkeypatch.setattr(Recorder, "dispatch", failing)
    hw.trace(model, manifest)
    total = next(count)
    assert total > 40
    assert anatomy(model) == before
    for at[0] in range(total):
        count = itertools.count()
        with pytest.raises((Injected, PlanError)):
            hw.trace(model, manifest)
        assert (threading.Thread.start, ThreadPoolExecutor.submit, torch.utils.swap_tensors) == patched
        assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
        assert anatomy(model) == before, at


def test_a_failure_at_any_tensor_leaves_the_model_as_it_was():
    """Attributes too, also where the loading code changes them before and after."""
    tensors = weights(1)
    for last in range(len(tensors)):

        def loader(model, pairs, last=last):
            for number, (name, tensor) in enumerate(pairs):
                model.seen.append(name)
                model.holder.count += 1
                model.p.loaded = name
                model.register_buffer(f"fresh_{number}", tensor)
                model.p.requires_grad_(True)
                setattr(model, name, 1)
                if name == "w":
                    model.p.data.copy_(tensor)
                if number == last:
                    raise Injected

        model = Model(loader)
        before = anatomy(model)
        with pytest.raises(Injected):
            hw.trace(model, hw.open(tensors).manifest)
        assert anatomy(model) == before


def test_what_outlives_its_trace_says_so():
    """A fake tensor that was kept is loud, and a thread that still loads is not planned."""
    outside, release = [], threading.Event()

    def keeps(model, pairs):
        outside.extend(tensor for _, tensor in pairs)

    with pytest.raises(PlanError, match="missing"):
        hw.trace(Model(keeps), hw.open(weights(1)).manifest)
    with pytest.raises(ValueRead, match="whose trace is over"):
        outside[0] + 1

    def goes_on(model, pairs):
        tensor = dict(pairs)["w"]
        model.thread = threading.Thread(target=lambda: release.wait(10) and model.p.data.copy_(tensor * 0 + 1))
        model.thread.start()

    model = Model(goes_on)
    before = model.p.clone()
    threading.excepthook, hook = (lambda args: None), threading.excepthook
    try:
        plan = hw.trace(model, hw.open(weights(1)).manifest, **ALLOWED)
        running = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
        release.set()
        for thread in running:
            thread.join(10)
    finally:
        threading.excepthook = hook
    assert "a thread that goes on" in str(plan)
    assert set(plan.fallback) == set(weights(1))
    assert torch.equal(model.p, before)


def test_pools_from_before_stay_as_they_were():
    """Work is traced in the threads of a pool that was there before; afterwards they know nothing of it."""
    with ThreadPoolExecutor(1) as pool:
        model = Model(lambda model, pairs: [pool.submit(model.p.data.copy_, t).result() for n, t in pairs if n == "w"])
        before = anatomy(model)
        plan = hw.trace(model, hw.open(weights(1)).manifest, **ALLOWED)
        assert outcome(plan) == "C"
        assert anatomy(model) == before
        assert pool.submit(torch.is_grad_enabled).result()


# --- falling back in part --------------------------------------------------------------------------------------------


class Layered(nn.Module):
    """Two layers; the second asks for a value. ``prologue`` and ``epilogue`` run whatever is loaded."""

    def __init__(self, prologue=None, epilogue=None, second=None):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        for linear in (self.a, self.b):
            nn.init.constant_(linear.weight, 3)
            nn.init.constant_(linear.bias, 4)
        self.hooks = prologue, epilogue
        self.second = second or (lambda model, param, one: param.data.copy_(one * float(one.max())))

    def load_weights(self, pairs):
        if self.hooks[0]:
            self.hooks[0](self)
        for name, one in pairs:
            param = self.get_parameter(name)
            if name.startswith("a."):
                param.data.copy_(one)
            else:
                self.second(self, param, one)
        if self.hooks[1]:
            self.hooks[1](self)

    def all_tensors(self):
        return dict(self.named_parameters())


def zeroed(model):
    for param in model.parameters():
        param.data.zero_()


def doubled(model):
    for param in model.parameters():
        param.data.mul_(2)


LAYERED = {
    "apart": (lambda: Layered(), {"b.weight", "b.bias"}),
    "zeros everything first": (lambda: Layered(prologue=zeroed), None),
    "doubles everything last": (lambda: Layered(epilogue=doubled), None),
    "reads what the other wrote": (
        lambda: Layered(second=lambda m, p, one: p.data.copy_(one * float(one.max()) + m.a.weight[0, 0])),
        {"b.weight", "b.bias"},
    ),
    "writes where the other wrote": (
        lambda: Layered(
            second=lambda m, p, one: (p.data.copy_(one * float(one.max())), m.a.bias.data.add_(m.b.bias.data))
        ),
        {"b.weight", "b.bias"},
    ),
    "needs the others to be there": (
        lambda: Layered(second=lambda m, p, one: p.data.copy_(one * float(one.max())) if m.a.bias[0] != 4 else 1 / 0),
        None,
    ),
}


@pytest.mark.parametrize("name", LAYERED)
def test_only_the_layers_concerned_fall_back(name, tmp_path):
    """And where they cannot be loaded apart from the others, all do."""
    make, fallback = LAYERED[name]
    made = torch.Generator().manual_seed(0)
    tensors = {key: torch.rand(one.shape, generator=made) for key, one in make().named_parameters()}
    plan = hw.trace(make(), hw.open(tensors).manifest)
    assert set(plan.fallback) == (fallback or set(tensors))
    assert all(note.where.startswith(__file__) for note in plan.graph_breaks)
    for kind, source in sources(tensors, tmp_path):
        ours, theirs = make(), make()
        own_loading(theirs, tensors)
        try:
            hw.load(ours, source)
        except hw.PlanDiffers:  # Found when it is done.
            assert name == "writes where the other wrote"
            continue
        assert fingerprint(ours) == fingerprint(theirs), kind


def test_a_fallback_that_writes_over_the_plan_is_loud():
    """Its own code would have loaded the first layer after that; here it was loaded before."""
    second = lambda m, p, one: (p.data.copy_(one * float(one.max())), m.a.bias.data.zero_())  # noqa: E731
    tensors = {key: torch.rand(one.shape) for key, one in reversed(list(Layered().named_parameters()))}
    with pytest.raises(hw.PlanDiffers, match=r"wrote over what was planned apart from it: a\.bias"):
        hw.load(Layered(second=second), tensors)


class Halting(nn.Module):
    """Layers in one buffer, side by side. All but the first ask for a value; at ``stop`` the code fails."""

    def __init__(self, stop, error):
        super().__init__()
        flat = torch.zeros(8, 4)
        for number, name in enumerate("abcd"):
            layer = nn.Module()
            layer.weight = nn.Parameter(flat[2 * number], requires_grad=False)
            layer.bias = nn.Parameter(flat[2 * number + 1], requires_grad=False)
            layer.register_buffer("computed", torch.zeros(1), persistent=False)
            setattr(self, name, layer)
        self.stop, self.error = stop, error

    def load_weights(self, pairs):
        for name, one in pairs:
            if not name.startswith("a"):
                one = one * float(one.max())
                if name in self.stop:
                    if name == "c.bias":
                        self.c.bias.data[:1].copy_(one[:1])
                    if self.error is None:
                        continue
                    raise self.error
            self.get_parameter(name).data.copy_(one)


HALTING = {name: torch.arange(1.0, 5.0) for name in Halting((), None).state_dict()}
HALTED = (
    "hotweights: by then these layers had been written: a, b; of others these tensors: c.weight, c.bias (25%); "
    "these layers hold what they held before: d"
)


class TestHalfway:
    """The model's own code fails when it has written something: the error says what is of which version."""

    @pytest.mark.parametrize("kind", ["file", "memory", "stream"])
    @pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()], ids=repr)
    def test_its_error_says_which_layers_were_written(self, kind, error, tmp_path):
        model = Halting({"c.bias"}, error)
        assert hw.trace(model, HALTING).fallback == tuple(name for name in HALTING if name[0] != "a")
        with pytest.raises(type(error)) as caught:
            hw.load(model, dict(sources(HALTING, tmp_path))[kind])
        assert caught.value is error
        assert caught.value.__notes__[0] == HALTED
        assert "may hold tensors of both versions" in caught.value.__notes__[1]
        changed = {name for name, tensor in model.state_dict().items() if tensor.any()}
        assert changed == {"a.weight", "a.bias", "b.weight", "b.bias", "c.weight", "c.bias"}
        assert model.c.bias[1:].tolist() == [0, 0, 0]
        error.__notes__.clear()

    def test_so_does_what_we_raise(self):
        """Tensors side by side in one buffer are told apart: one that was written does not speak for its neighbour."""
        with pytest.raises(hw.IncompleteLoad, match="wrote nothing to: 2 problems") as caught:
            hw.load(Halting({"c.bias", "d.weight", "d.bias"}, None), HALTING)
        assert caught.value.problems == ("d.bias", "d.weight")
        assert caught.value.__notes__[0] == HALTED

    def test_code_that_begins_with_nothing_written_begins_anew(self):
        model = Halting({"b.weight"}, ValueError("no"))
        with pytest.raises(ValueError, match="no") as caught:
            hw.load(model, HALTING)
        assert "had been written: a; of others these tensors: none" in caught.value.__notes__[0]


def test_a_plan_does_not_read_what_only_the_fallback_writes():
    """Without the tensors left out, a parameter looks as if loading never wrote it."""

    class Reads(Layered):
        def load_weights(self, pairs):
            for name, one in pairs:
                if name.startswith("a."):
                    self.get_parameter(name).data.copy_(one * float(one.max()))
                else:
                    self.get_parameter(name).data.copy_(one * self.a.bias.data)

    tensors = {key: torch.rand(one.shape) for key, one in Reads().named_parameters()}
    ours, theirs = Reads(), Reads()
    own_loading(theirs, tensors)
    hw.load(ours, tensors)
    assert fingerprint(ours) == fingerprint(theirs)


# --- what went wrong in the field ------------------------------------------------------------------------------------


def reused_buffer(tensors):
    """What many loaders hand out: every tensor is a view of one buffer, good until the next."""
    buffer = torch.empty(max(one.nbytes for one in tensors.values()), dtype=torch.uint8)
    for name, one in tensors.items():
        buffer[: one.nbytes] = bits(one)
        yield name, buffer[: one.nbytes].view(one.dtype).view(one.shape)


def engines(rank=0, world=1):
    """A right one, loaded by its own code from tensors that nobody reuses, and one to load."""
    right = Engine(rank, world)
    own_loading(right, engine_checkpoint())
    return right, Engine(rank, world)


def assert_loaded(model, right):
    assert_same_bits(reachable(model), reachable(right))
    assert not any(one.is_floating_point() and one.isnan().any() for one in reachable(model).values())


class TestField:
    @pytest.mark.parametrize("kind", ["file", "memory", "stream"])
    def test_sorted_into_lists_first_and_waiting_for_a_scale(self, kind, tmp_path):
        """Rows 2, 3 and 32b: kept until a scale comes, sorted by component, loaded by a pool."""
        right, naive = engines()
        naive.load_weights(reused_buffer(engine_checkpoint()))
        with pytest.raises(AssertionError, match="other bytes"):
            assert_same_bits(reachable(naive), reachable(right))
        ours = Engine()
        source = dict(sources(engine_checkpoint(), tmp_path))[kind]
        for _ in range(2):
            report = hw.load(ours, source)
            assert_loaded(ours, right)
        assert report.tensors[hw.Fate.SKIPPED] == ("experts.1.gate", "experts.1.up", "rotary.inv_freq")

    def test_the_pair_is_one_step(self):
        """A tensor and its scale, read together."""
        plan = hw.trace(Engine(), hw.open(engine_checkpoint()).manifest)
        pairs = [step for step in plan.steps if isinstance(step, Program) and len(step.sources) == 2]
        assert [set(step.sources) for step in pairs] == [{"scaled", "scaled.scale"}]

    def test_a_composed_loader_is_not_counted_twice_in_any_order(self):
        """Counting elements, two copies into A are A and D."""
        names = ["mixer.A", "mixer.D", "mixer.dt_bias"]
        written, needed = 0, sum(one.numel() for one in Engine().mixer.parameters())
        for name in names:  # naive: complete when as many elements were written as there are
            written += 8 * (2 if name == "mixer.A" else 1)
            if written >= needed:
                break
        assert name == "mixer.D"  # and dt_bias would be dropped
        right, _ = engines()
        for order in itertools.permutations(names):
            tensors = {**{name: one for name, one in engine_checkpoint().items() if name not in names}}
            tensors = {**{name: engine_checkpoint()[name] for name in order}, **tensors}
            ours = Engine()
            hw.load(ours, Ordered(tensors))
            assert_loaded(ours, right)

    def test_uninitialised_parameters(self):
        """Whoever asks one for its memory gets an exception."""

        class Lazy(nn.Module):
            def __init__(self):
                super().__init__()
                self.p = nn.Parameter(torch.zeros(2))
                self.later = nn.LazyLinear(3)

            def load_weights(self, pairs):
                for name, one in pairs:
                    self.get_parameter(name).data.copy_(one)

        model = Lazy()
        with pytest.raises(ValueError, match="uninitialized"):
            model.later.weight.untyped_storage()
        hw.load(model, {"p": torch.ones(2)}, allow_missing="later.*")
        assert model.p.tolist() == [1, 1]
        assert nn.parameter.is_lazy(model.later.weight)
        with pytest.raises(PlanError, match=r"later\.weight: missing"):
            hw.trace(model, hw.open({"p": torch.ones(2)}).manifest)

    def test_writes_that_bypass_the_loader(self):
        """On meta a copy into ``.data`` is lost in silence."""

        def loader(model, pairs):
            for _, one in pairs:
                model.weight.data.copy_(one)

        with torch.device("meta"):
            naive, ours = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        loader(naive, [("w", torch.ones(2, 2))])
        assert naive.weight.is_meta  # and "success"
        ours.load_weights = lambda pairs: loader(ours, pairs)
        hw.load(ours, {"w": torch.ones(2, 2)}, device="cpu")
        assert ours.weight.tolist() == [[1, 1], [1, 1]]

    def test_a_read_that_is_swallowed_is_noted(self):
        """A recorder that only raises records the branch for tensors without values."""
        row = next(row for row in IDIOMS if row.name == "swallows a value read")
        tensors = weights(1)
        naive, right = Model(row.loader), Model(row.loader)
        with torch.no_grad():
            naive.load_weights((name, one.to("meta")) for name, one in tensors.items() if name != "w")
        own_loading(right, tensors)
        assert fingerprint(naive) != fingerprint(right)
        plan = hw.trace(right, hw.open(tensors).manifest, **ALLOWED)
        assert [(note.what, note.sources) for note in plan.graph_breaks] == [(".item()", ("w",))]
        assert "idioms.py:" in plan.graph_breaks[0].where

    @pytest.mark.parametrize("world", [1, 2])
    def test_each_rank_gets_its_rows_and_reads_no_others(self, world, tmp_path):
        """Every row says whose it is."""
        rows, columns = 8, 512
        tensors = {"w": torch.arange(rows).float()[:, None].expand(rows, columns).contiguous()}
        path = write_checkpoint(tmp_path, tensors)

        class Sliced(nn.Module):
            def __init__(self, rank):
                super().__init__()
                self.rank = rank
                self.weight = nn.Parameter(torch.zeros(rows // world, columns), requires_grad=False)

            def load_weights(self, pairs):
                for _, one in pairs:
                    self.weight.data.copy_(one.chunk(world)[self.rank])

        naive = Sliced(0).weight.data.copy_(tensors["w"][: rows // world])  # what rank 0 has cached, given to all
        for rank in range(world):
            ours = Sliced(rank)
            report = hw.load(ours, path)
            assert ours.weight[:, 0].tolist() == list(range(rank * rows // world, (rank + 1) * rows // world))
            assert torch.equal(naive, ours.weight) == (rank == 0)
            assert report.bytes_read == tensors["w"].nbytes // world

    @pytest.mark.parametrize("rank", [0, 1])
    def test_a_rank_of_the_engine(self, rank, tmp_path):
        """It reads half of what is sliced, by everything an engine's model does."""
        right, ours = engines(rank, 2)
        report = hw.load(ours, write_checkpoint(tmp_path, engine_checkpoint()))
        assert_loaded(ours, right)
        whole = hw.load(Engine(), write_checkpoint(tmp_path / "2", engine_checkpoint()))
        sliced = sum(engine_checkpoint()[name].nbytes for name in ("q", "k", "v", "gate", "up", "down.weight"))
        assert whole.bytes_read - report.bytes_read == sliced // 2

    def test_the_order_of_the_manifest_is_not_that_of_the_stream(self):
        """Whoever pairs them by position mixes up tensors of one shape."""
        tensors = engine_checkpoint()
        right, ours = engines()
        naive = dict(zip(hw.open(tensors).manifest, reversed(tensors.values()), strict=True))
        assert not torch.equal(naive["mixer.A"], tensors["mixer.A"])
        hw.load(ours, Ordered(tensors))  # its manifest runs the other way
        assert_loaded(ours, right)

    def test_broadcasts_are_refused_by_what_the_loader_does(self):
        """``copy_`` of [4] into [4, 4] succeeds in silence."""
        naive = torch.zeros(4, 4)
        naive.copy_(torch.ones(4))
        row = next(row for row in IDIOMS if row.name == "silent broadcast")
        with pytest.raises(PlanError, match=re.escape("p: [4] would be broadcast, silently, into [4, 4]")):
            hw.trace(Model(row.loader), hw.open(weights(1)).manifest, **ALLOWED)

    def test_meta_models_load_by_their_own_code(self, tmp_path):
        right, _ = engines()
        with torch.device("meta"):
            ours = Engine()
        ours.experts.expert_map = torch.tensor([1, -1, 0])
        ours.mixer._buffers["conv_weights"] = None
        ours.listed = Engine().listed
        ours.kept = ours.mixer.dt_bias.data
        before = {name: one.is_meta for name, one in ours.named_parameters()}
        assert all(before.values())
        with pytest.raises(PlanError, match="device="):
            hw.load(ours, engine_checkpoint())
        hw.load(ours, write_checkpoint(tmp_path, engine_checkpoint()), device="cpu")
        assert_same_bits(dict(ours.named_parameters()), dict(right.named_parameters()))


def test_two_threads_trace_at_once_and_leave_nothing_behind():
    """Each is followed into its own threads only; whoever began first ends first."""
    before = threading.Thread.start, ThreadPoolExecutor.submit
    inside, first_left = threading.Barrier(2), threading.Event()

    class Loader(nn.Module):
        def __init__(self, number):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3))
            self.number = number

        def load_weights(self, pairs):
            inside.wait(10)
            if self.number:
                assert first_left.wait(10)
            tensors = dict(pairs)
            worker = threading.Thread(target=lambda: self.weight.data.copy_(tensors["w"][self.number]))
            worker.start()
            worker.join()

    manifest = hw.Manifest([hw.TensorSpec("w", torch.float32, (2, 3))])
    plans = {}

    def trace(number):
        plans[number] = hw.trace(Loader(number), manifest)
        first_left.set()

    threads = [threading.Thread(target=trace, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert (threading.Thread.start, ThreadPoolExecutor.submit) == before
    for number in range(2):
        (step,) = plans[number].steps
        assert step.of.offset == 12 * number


class Fused(nn.Module):
    """Its loader reads a value, so that nothing of it is planned; with ``rebinds`` it repacks a weight at its end."""

    def __init__(self, rebinds=False):
        super().__init__()
        self.fused, self.plain = nn.Parameter(torch.full((4, 2), 7.0)), nn.Parameter(torch.full((2, 2), 7.0))
        self.rebinds = rebinds

    def load_weights(self, pairs):
        into = {"gate": self.fused.data[:2], "up": self.fused.data[2:], "plain": self.plain.data}
        for name, tensor in pairs:
            if tensor.isnan().any():
                raise ValueError(name)
            into[name].copy_(tensor)
        if self.rebinds:
            self.fused = nn.Parameter(self.fused.data / 2, requires_grad=False)


@pytest.mark.parametrize("rebinds", [False, True])
class TestPartsOfWhatFellBack:
    """A missing tensor leaves a part of a fused one as it was. That is refused as it is where a plan writes it."""

    @property
    def whole(self):
        return {name: torch.ones(2, 2) for name in ("gate", "up", "plain")}

    @property
    def part(self):
        return {name: torch.full((2, 2), 3.0) for name in ("gate", "plain")}

    def test_a_load_is_refused_and_the_advice_works(self, rebinds):
        assert hw.load(Fused(rebinds), self.whole).fell_back
        with pytest.raises(hw.IncompleteLoad, match=r"wrote parts: fused: 50%") as caught:
            hw.load(Fused(rebinds), self.part)
        assert 'allow_partial="fused"' in str(caught.value)
        model = Fused(rebinds)
        report = hw.load(model, self.part, allow_partial="fused")
        assert report.tensors[Fate.PARTIAL] == ("fused",)
        scale = 0.5 if rebinds else 1
        assert model.fused.tolist() == [[3.0 * scale] * 2] * 2 + [[7.0 * scale] * 2] * 2

    @pytest.mark.parametrize("atomic", ["staged", "journal"])
    def test_an_update_keeps_what_serves(self, rebinds, atomic):
        live = hw.LiveModel(Fused(), atomic=atomic)
        with pytest.raises(hw.IncompleteLoad, match=r"wrote parts: fused: 50%"):
            live.load(self.part)
        live.load(self.whole, version=1)
        with pytest.raises(hw.UpdateAborted, match=r"version 1 is live: .*wrote parts: fused: 50%"):
            live.update(self.part)
        assert {name: tensor.unique().tolist() for name, tensor in live.model.state_dict().items()} == {
            "fused": [1.0],
            "plain": [1.0],
        }
        live.update(self.whole)
