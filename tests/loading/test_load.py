"""Loading by name: what is written, what is refused, and what a failure leaves behind."""

import _thread
import threading
import tracemalloc
import weakref
from contextlib import nullcontext
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import hotweights as hw
from hotweights import CheckpointError, Fate, PlanError, Pool, TiedWeightsDiffer, UsageError
from hotweights.testing import FailingSource, assert_same_bits, bits, write_checkpoint


class Block(nn.Module):
    def __init__(self, width=24):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)  # persistent buffers, one of them a 0-dim integer
        self.register_buffer("constant", torch.full((3,), 0.0188), persistent=False)
        self.empty = nn.Parameter(torch.empty(0, width))


def model(width=24):
    layers = nn.Sequential(nn.Embedding(50, width), Block(width), Block(width), nn.Linear(width, 50, bias=False))
    layers[3].weight = layers[0].weight  # tied
    return layers


def other_weights(like):
    state = {name: torch.randn_like(t) if t.is_floating_point() else t + 7 for name, t in like.state_dict().items()}
    if "3.weight" in state:
        state["3.weight"] = state["0.weight"].clone()
    return state


def snapshot(module):
    return {name: tensor.detach().clone() for name, tensor in [*module.named_parameters(), *module.named_buffers()]}


@pytest.fixture(params=["files", "shards", "direct", "mapping", "ordered"])
def way(request, tmp_path):
    """From a state dict to something ``load`` takes, and its options."""

    def put(state):
        if request.param == "mapping":
            return state, {}
        if request.param == "ordered":
            return OrderedSource(state), {}
        write_checkpoint(tmp_path, state, shards=3 if request.param == "shards" else 1)
        return tmp_path, {"io": "direct" if request.param == "direct" else "auto"}

    return put


class OrderedSource:
    """The least that a stranger's source can be: it streams, in an order of its own."""

    def __init__(self, state):
        self._source = hw.open(dict(reversed(state.items())))
        self.manifest = self._source.manifest
        self.leases, self.tensors, self.close = self._source.leases, self._source.tensors, self._source.close

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class TestRight:
    def test_equals_load_state_dict_and_keeps_every_address(self, way):
        ours, theirs = model(), model()
        state = other_weights(ours)
        addresses = {name: tensor.data_ptr() for name, tensor in ours.state_dict().items()}
        source, options = way(state)
        report = hw.load(ours, source, **options)
        theirs.load_state_dict(state)
        assert_same_bits(ours.state_dict(), theirs.state_dict())
        assert {name: tensor.data_ptr() for name, tensor in ours.state_dict().items()} == addresses
        assert ours[1].constant.tolist() == pytest.approx([0.0188] * 3)
        assert report.tensors[Fate.WRITTEN] == tuple(sorted(state.keys() - {tied(report)}))
        assert report.bytes_written == sum(t.nbytes for t in state.values()) - state["0.weight"].nbytes

    def test_tied_names_may_come_once_under_any_name(self, way):
        ours = model()
        state = other_weights(ours)
        del state["0.weight"]
        source, options = way(state)
        hw.load(ours, source, **options)
        assert torch.equal(ours[0].weight, state["3.weight"])
        assert ours[3].weight is ours[0].weight

    def test_casts_that_lose_nothing_are_done_and_reported(self, way):
        ours = Block().double()
        state = {name: t.float() if t.is_floating_point() else t for name, t in other_weights(ours).items()}
        source, options = way(state)
        report = hw.load(ours, source, **options)
        theirs = Block().double()
        theirs.load_state_dict(state)
        assert_same_bits(ours.state_dict(), theirs.state_dict())
        assert report.casts["linear.weight"] == "F32 -> F64"
        assert "linear.weight" in report.tensors[Fate.CAST]

    @pytest.mark.parametrize("slot_nbytes", [1, 12289, 20000, 1 << 20])
    def test_any_strides_and_any_slot_size(self, way, slot_nbytes):
        """Larger than a slot, unaligned, empty, 0-dim, not contiguous."""
        ours = nn.Module()
        for name, tensor in ODD.items():
            ours.register_buffer(
                name,
                tensor.clone()
                if tensor.ndim < 2
                else torch.empty_strided(*strided(tensor), dtype=tensor.dtype).zero_(),
            )
        source, options = way(ODD)
        slot_nbytes = max(slot_nbytes, 3 * 4096)  # two pages are kept for alignment
        with Pool(2, slot_nbytes) as pool:
            hw.load(ours, source, pool=pool, **options)
            assert pool.stats().leased == 0
        assert_same_bits({name: getattr(ours, name) for name in ODD}, ODD)

    def test_meta_tensors_become_real_where_the_caller_says(self, way):
        with torch.device("meta"):
            ours = model()
        ours[3].weight = ours[0].weight
        for block in (ours[1], ours[2]):
            block.constant = torch.full((3,), 0.0188)
        ours[1].linear.weight.requires_grad_(False)
        ours[1].linear.weight.weight_loader = "kept"
        state = other_weights(model())
        source, options = way(state)
        hw.load(ours, source, device="cpu", **options)
        assert_same_bits(ours.state_dict(), state)
        assert ours[3].weight is ours[0].weight
        assert not ours[1].linear.weight.requires_grad
        assert ours[1].linear.weight.weight_loader == "kept"
        assert isinstance(ours[1].linear.weight, nn.Parameter)

    def test_twice_is_once(self, way):
        ours = model()
        state = other_weights(ours)
        for _ in range(2):
            source, options = way(state)
            hw.load(ours, source, **options)
        assert_same_bits(ours.state_dict(), state)

    def test_hooks_of_load_state_dict_are_traced(self, way):
        """A rename by a hook, and a layout that the module's own loading code turns round."""

        class Turned(nn.Linear):
            def _load_from_state_dict(self, state, prefix, *rest):
                state[prefix + "weight"] = state[prefix + "weight"].t()
                super()._load_from_state_dict(state, prefix, *rest)

        def renamed(module, state, prefix, *rest):
            state[prefix + "weight"] = state.pop(prefix + "kernel")

        ours, theirs = (nn.Sequential(Turned(4, 4), nn.Linear(4, 4)) for _ in range(2))
        for model in (ours, theirs):
            model[1].register_load_state_dict_pre_hook(renamed)
        state = {
            "0.weight": torch.randn(4, 4),
            "0.bias": torch.randn(4),
            "1.kernel": torch.randn(4, 4),
            "1.bias": torch.randn(4),
        }
        theirs.load_state_dict(state)
        source, options = way(state)
        hw.load(ours, source, **options)
        assert_same_bits(ours.state_dict(), theirs.state_dict())

    @pytest.mark.parametrize("norm", [nn.BatchNorm1d(3), nn.InstanceNorm1d(3, affine=True, track_running_stats=True)])
    @pytest.mark.parametrize("hooked", [False, True])
    def test_counters_that_old_checkpoints_lack(self, way, norm, hooked):
        """As ``load_state_dict`` does it: they keep their values; made of meta tensors, they are zero."""
        state = {"0." + name: torch.rand(3) for name in norm.state_dict() if name != "num_batches_tracked"}
        source, options = way(state)
        ours, theirs = nn.Sequential(deepcopy(norm)), nn.Sequential(deepcopy(norm))
        for model in (ours, theirs):
            model[0].num_batches_tracked.fill_(5)
            if hooked:
                model.register_load_state_dict_post_hook(lambda module, keys: None)
        report = hw.load(ours, source, **options)
        theirs.load_state_dict(state)
        assert_same_bits(ours.state_dict(), theirs.state_dict())
        assert ours[0].num_batches_tracked == 5
        assert hooked or report.tensors[Fate.MISSING] == ("0.num_batches_tracked",)
        assert hooked or "0.num_batches_tracked" in str(report)

    @pytest.mark.parametrize("verify", ["off", "loader"])
    def test_counters_on_meta_become_zero(self, verify):
        with torch.device("meta"):
            ours = nn.BatchNorm1d(3)
        state = {name: torch.rand(3) for name in ours.state_dict() if name != "num_batches_tracked"}
        hw.load(ours, state, device="cpu", verify=verify)
        assert_same_bits(ours.state_dict(), state | {"num_batches_tracked": torch.tensor(0)})

    def test_a_shared_module_has_two_names(self):
        shared = nn.Linear(3, 3)
        ours = nn.ModuleDict({"a": shared, "b": shared})
        state = {name: tensor + 1 for name, tensor in ours.state_dict().items()}
        assert set(hw.load(ours, state).tensors[Fate.TIED]) == {"b.weight", "b.bias"}
        assert_same_bits(ours.state_dict(), state)

    def test_the_source_is_only_read(self):
        state = other_weights(model())
        before = {name: bits(tensor) for name, tensor in state.items()}
        hw.load(model(), state)
        assert all(torch.equal(bits(state[name]), before[name]) for name in state)

    def test_the_model_is_let_go(self, tmp_path):
        ours = Block()
        write_checkpoint(tmp_path, ours.state_dict())
        hw.load(ours, tmp_path)
        gone = weakref.ref(ours)
        del ours
        assert gone() is None


def tied(report):
    (name,) = report.tensors[Fate.TIED]
    return name


WIDE = torch.randn(16, 1000)
ODD = {
    "three": torch.arange(3, dtype=torch.uint8),
    "bf16": torch.randn(3).to(torch.bfloat16),
    "wide": WIDE,
    "scalar": torch.tensor(3.0),
    "empty": torch.empty(0, 4),
    "deep": torch.randn(2, 3, 5, 700),
    "flags": torch.rand(4097) > 0.5,
}


def strided(tensor):
    """Shape, and strides that are not row-major: written backwards, and with a hole behind each row."""
    strides, step = [], 1
    for length in tensor.shape:
        strides.append(step)
        step *= max(1, length + 1)
    return tuple(tensor.shape), tuple(strides)


class TestRefused:
    @pytest.fixture(autouse=True)
    def unharmed(self):
        """Whatever is refused leaves the model as it was."""
        self.model = model()
        before = snapshot(self.model)
        yield
        assert_same_bits(snapshot(self.model), before)

    def test_all_problems_at_once(self, way):
        """A missing tensor, another shape and a stranger are listed together, before anything changes."""
        state = other_weights(self.model)
        del state["1.linear.weight"]
        state["2.linear.bias"] = torch.zeros(25)
        state["stranger"] = torch.zeros(1)
        source, options = way(state)
        with pytest.raises(PlanError) as caught:
            hw.load(self.model, source, **options)
        assert tuple(problem.partition(" (in ")[0] for problem in caught.value.problems) == (
            "1.linear.weight: missing; F32 [24, 24] expected",
            "2.linear.bias: shape [24] expected, [25] found",
            "stranger: unexpected; the model has no such name",
        )

    def test_allowed_is_reported(self, tmp_path):
        ours = model()
        state = other_weights(ours)
        gone = state.pop("1.linear.weight")
        before = ours[1].linear.weight.clone()
        report = hw.load(ours, {**state, "extra.a": gone}, allow_missing="1.linear.*", allow_unexpected=["extra.*"])
        assert report.tensors[Fate.MISSING] == ("1.linear.weight",)
        assert report.tensors[Fate.UNEXPECTED] == ("extra.a",)
        assert torch.equal(ours[1].linear.weight, before)

    def test_tied_names_that_differ(self, tmp_path):
        """The last one wins elsewhere; here nothing is written."""
        state = other_weights(self.model)
        state["3.weight"][-1, -1] += 1
        write_checkpoint(tmp_path, state)
        for source in (tmp_path, state):
            with pytest.raises(TiedWeightsDiffer, match=r"0\.weight and 3\.weight"):
                hw.load(self.model, source)

    def test_a_shard_that_is_absent(self, tmp_path):
        write_checkpoint(tmp_path, other_weights(self.model), shards=3)
        (tmp_path / "model-00002-of-00003.safetensors").unlink()
        with pytest.raises(CheckpointError, match="00002"):
            hw.load(self.model, tmp_path)

    def test_sources_that_are_none(self):
        with pytest.raises(UsageError, match="a source is"):
            hw.load(self.model, 3)
        with pytest.raises(UsageError, match="'w' is a list"):
            hw.load(self.model, {"w": [1.0]})
        with pytest.raises(UsageError, match="'w' is on meta"):
            hw.load(self.model, {"w": torch.empty(1, device="meta")})

    def test_meta_without_a_device(self):
        with torch.device("meta"):
            ours = nn.Linear(2, 2)
        with pytest.raises(PlanError, match="device="):
            hw.load(ours, nn.Linear(2, 2))
        assert ours.weight.is_meta

    def test_buffers_that_would_be_garbage(self):
        with torch.device("meta"):
            ours = Block()
        with pytest.raises(PlanError, match="constant: is a non-persistent buffer on the meta device"):
            hw.load(ours, Block(), device="cpu")
        hw.load(ours, Block(), device="cpu", init_missing=lambda name, tensor: tensor.fill_(4))
        assert torch.equal(ours.constant, torch.full_like(ours.constant, 4))

    def test_state_that_is_no_tensor(self):
        extra = nn.Linear(2, 2)
        extra.__class__ = type("Extra", (nn.Linear,), {"set_extra_state": lambda self, state: None})
        with pytest.raises(PlanError, match=r"0\._extra_state: missing; Extra keeps extra state"):
            hw.load(nn.Sequential(extra), nn.Sequential(nn.Linear(2, 2)))

    def test_tensors_without_plain_bytes(self):
        ours = nn.Module()
        ours.register_buffer("sparse", torch.eye(3).to_sparse())
        ours.register_buffer("expanded", torch.zeros(1).expand(3))
        ours.lazy = nn.LazyLinear(3)
        with pytest.raises(PlanError) as caught:
            hw.load(ours, {name: torch.zeros(3, 3) for name in ("sparse", "expanded", "lazy.weight", "lazy.bias")})
        text = str(caught.value)
        assert "expanded: is an expanded tensor" in text
        assert "sparse: has the layout" in text
        assert "lazy.weight: is uninitialised" in text

    def test_views_of_each_other(self):
        ours = nn.Module()
        ours.weight = nn.Parameter(torch.zeros(4, 4))
        ours.register_buffer("rows", ours.weight.data[:2])
        with pytest.raises(PlanError, match="rows: shares memory with weight"):
            hw.load(ours, {"weight": torch.ones(4, 4), "rows": torch.ones(2, 4)})


class TestBroken:
    """A failure half-way says so; nothing leaks, and the next load succeeds."""

    def test_at_every_read(self, tmp_path):
        ours = model()
        state = other_weights(ours)
        write_checkpoint(tmp_path, state)
        threads = threading.active_count()
        reads = len(state) + 1 - 2  # the tied pair is compared first; the empty ones are not read
        for at in range(reads + 1):
            with hw.open(tmp_path) as source, Pool(2, 16384) as pool:
                fault = FailingSource(source, at=at, error=CheckpointError("injected"))
                with pytest.raises(CheckpointError, match="injected") if at < reads else nullcontext():
                    hw.load(ours, fault, pool=pool)
                assert pool.stats().leased == 0
            hw.load(ours, tmp_path)
            assert_same_bits(ours.state_dict(), state)
        assert threading.active_count() == threads

    def test_meta_parameters_are_on_meta_again(self, tmp_path):
        with torch.device("meta"):
            ours = nn.Linear(4, 4)
        write_checkpoint(tmp_path, nn.Linear(4, 4).state_dict())
        before = ours.weight
        with hw.open(tmp_path) as source, pytest.raises(CheckpointError, match="injected"):
            hw.load(ours, FailingSource(source, at=1, error=CheckpointError("injected")), device="cpu")
        assert ours.weight is before
        hw.load(ours, tmp_path, device="cpu")

    def test_the_error_says_what_was_written(self, tmp_path):
        ours = nn.Linear(1000, 1000)
        state = other_weights(ours)
        calls = []

        source = OrderedSource(state)
        stream = source.leases

        def failing(guard="off"):
            calls.append(guard)
            return Failing(stream(guard=guard), at=1)

        source.leases = failing
        with pytest.raises(CheckpointError) as caught:
            hw.load(ours, source)
        assert calls
        assert "4.0 kB of 4.0 MB had been read into the model" in caught.value.__notes__[0]

    def test_ctrl_c_stops_frees_and_tells(self, tmp_path):
        """The interrupt comes in the middle of a read by several threads."""
        ours = nn.Linear(3000, 3000)
        write_big(tmp_path, ours)
        threads = threading.active_count()
        with hw.open(tmp_path) as source, Pool(2, 65536) as pool:
            interrupted = Interrupting(source)
            with pytest.raises(KeyboardInterrupt) as caught:
                hw.load(ours, interrupted, pool=pool, threads=2)
            assert pool.stats().leased == 0
            assert interrupted.seen < ours.weight.nbytes, "it was read to the end"
        for thread in threading.enumerate():
            if thread.name.startswith("hotweights"):
                thread.join(30)  # one that was being started when the interrupt came
        assert threading.active_count() == threads
        assert "may hold tensors of both versions" in caught.value.__notes__[0]


class Failing:
    def __init__(self, stream, at):
        self.stream, self.at = stream, at

    def __iter__(self):
        for number, lease in enumerate(self.stream):
            if number == self.at:
                raise CheckpointError("injected")
            yield lease

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stream.close()


def write_big(directory, module):
    from safetensors.torch import save_file

    save_file(module.state_dict(), directory / "model.safetensors")


class Interrupting(FailingSource):
    """Sends Ctrl-C to the main thread when the first bytes arrive; no thread reads on before it was seen."""

    def __init__(self, source):
        super().__init__(source, at=1 << 60, error=KeyboardInterrupt())
        self.seen = 0

    def read(self, reads, *, pool, advance=None, **options):
        sent, seen = threading.Event(), threading.Event()
        wake = pool.wake
        pool.wake = lambda: (seen.set(), wake())  # The crew wakes the pool when it has been told to stop.

        def interrupt(nbytes):
            self.seen += nbytes
            if not sent.is_set():
                sent.set()
                _thread.interrupt_main()
            seen.wait(30)

        return self._source.read(reads, pool=pool, advance=interrupt, **options)


class TestReport:
    def test_it_prints_as_a_short_table(self, tmp_path):
        ours = model()
        state = {**other_weights(ours), "extra": torch.zeros(1)}
        text = str(hw.load(ours, state, allow_unexpected="*"))
        assert len(text.splitlines()) <= 8
        assert "memory" in text
        assert "1: extra" in text

    def test_bytes_are_counted_once(self, tmp_path):
        ours = Block()
        state = other_weights(ours)
        write_checkpoint(tmp_path, state)
        nbytes = sum(tensor.nbytes for tensor in state.values())
        report = hw.load(ours, tmp_path)
        assert report.bytes_read == report.bytes_written == nbytes
        assert sum(report.bytes_by_io.values()) == nbytes
        assert report.as_dict()["tensors"]["written"] == sorted(state)

    def test_no_python_memory_per_byte(self, tmp_path):
        """No byte of a tensor passes through a Python object."""
        ours = nn.Linear(1000, 1000)
        write_big(tmp_path, ours)
        hw.load(ours, tmp_path)
        tracemalloc.start()
        hw.load(ours, tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
        tracemalloc.stop()


class TestSurprises:
    """What a user does on an ordinary day, and what must not end in silence."""

    def test_code_around_load_state_dict(self):
        hooked = nn.Linear(2, 2, bias=False)

        def doubled(module, keys):
            module.weight.data.mul_(2)

        hooked.register_load_state_dict_post_hook(doubled)
        hw.load(hooked, {"weight": torch.ones(2, 2)})
        assert hooked.weight.tolist() == [[2.0, 2.0]] * 2

        class Doubled(nn.Linear):
            def load_state_dict(self, state, strict=True, assign=False):
                return super().load_state_dict({name: 2 * tensor for name, tensor in state.items()}, strict, assign)

        own = Doubled(2, 2)
        hw.load(own, {"weight": torch.ones(2, 2), "bias": torch.ones(2)})
        assert own.weight.tolist() == [[2.0, 2.0]] * 2

    def test_loading_code_that_yields_or_rebinds(self, tmp_path):
        class Yields(nn.Linear):
            def load_weights(self, weights):
                for name, tensor in weights:
                    getattr(self, name).data.copy_(tensor)
                    yield name

        class Rebinds(nn.Linear):
            def load_weights(self, weights):
                for name, tensor in weights:
                    getattr(self, name).data = tensor

        state = {"weight": torch.randn(2, 2), "bias": torch.randn(2)}
        write_checkpoint(tmp_path, state)
        for kind in (Yields, Rebinds):
            for source in (tmp_path, state):
                ours = kind(2, 2)
                hw.load(ours, source)
                assert_same_bits(ours.state_dict(), state)

    def test_state_that_no_key_can_see_is_traced_anew(self):
        class Rank(nn.Module):
            def __init__(self, where):
                super().__init__()
                self.p, self.where = nn.Parameter(torch.zeros(4), requires_grad=False), where

            def load_weights(self, weights):
                for _, tensor in weights:
                    self.p.data.copy_(tensor[self.where] if isinstance(self.where, slice) else tensor[self.where.part])

        class Slots:
            __slots__ = ("part",)

        for cache in (None, True):
            for make in (lambda part: part, lambda part: SimpleNamespace(part=part), None):
                ours = Rank(None)
                for part in (slice(0, 4), slice(4, 8)):
                    if make is None:
                        ours.where = Slots()
                        ours.where.part = part
                    else:
                        ours.where = make(part)
                    hw.load(ours, {"w": torch.arange(8.0)}, cache=cache)
                    assert ours.p.tolist() == list(range(part.start, part.stop))

    def test_models_made_under_inference_mode(self, tmp_path):
        state = {"weight": torch.randn(2, 2), "bias": torch.randn(2)}
        write_checkpoint(tmp_path, state)
        for source in (tmp_path, state):
            with torch.inference_mode():
                ours = nn.Linear(2, 2).double()
            hw.load(ours, source)
            assert torch.equal(ours.weight, state["weight"].double())

    def test_names_with_brackets_and_wrong_numbers(self):
        ours = nn.Linear(2, 2)
        hw.load(ours, {**ours.state_dict(), "a[0].bias": torch.zeros(1)}, allow_unexpected=["a[0].bias"])
        with pytest.raises(UsageError, match="threads= is a whole number of at least 1; found 0"):
            hw.load(ours, ours, threads=0)

    def test_options_are_checked_with_a_plan_too(self):
        ours = nn.Linear(2, 2)
        plan = hw.trace(ours, ours)
        with pytest.raises(hw.UnknownName, match="unknown cast 'none'; known are: error, floats, loader"):
            hw.load(ours, ours, plan=plan, cast="none")
        with pytest.raises(UsageError, match="device='nonsense' is no device"):
            hw.load(ours, ours, plan=plan, device="nonsense")
