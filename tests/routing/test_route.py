"""Routing: every component gets its own tensors, whole and its own to keep, from every source and in every order."""

import dataclasses
import itertools
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import hotweights as hw
from hotweights import Component, PlanError, RoutingError, UsageError
from hotweights.testing import (
    FailingSource,
    VisionLanguage,
    assert_same_bits,
    vision_language_checkpoint,
    write_checkpoint,
)

LANGUAGE, ADAPTER, VISION, SOUND = "language_model", "mlp1", "vision_model.radio_model", "sound_encoder"


def reused(state):
    """A reader with one buffer: it is filled with 0xFF, and then with the next tensor."""
    buffer = torch.empty(max(tensor.nbytes for tensor in state.values()), dtype=torch.uint8)
    for name, tensor in state.items():
        buffer.fill_(0xFF)
        view = buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        view.copy_(tensor)
        yield name, view
    buffer.fill_(0xFF)


class Ordered:
    """A source that only streams, through a pool of one small slot, poisoned."""

    def __init__(self, source):
        self._source = source
        self.manifest, self.close = source.manifest, source.close
        self.streams = []

    def leases(self, *, guard="off"):
        self.streams.append(self._source.leases(pool=hw.Pool(1, 3 * 4096, guard="poison")))
        return self.streams[-1]

    def tensors(self):
        raise AssertionError("tensor by tensor, a stream is not read")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Gone:
    """What a disabled component's tensors may be: whoever looks at it fails."""

    def __getattribute__(self, name):
        raise AssertionError(f"somebody asked for {name}")


def from_files(state, path):
    return write_checkpoint(path, state)


def from_stream(state, path):
    return Ordered(hw.open(write_checkpoint(path, state)))


WAYS = {
    "reused": lambda state, path: reused(state),
    "mapping": lambda state, path: state,
    "files": from_files,
    "ordered": from_stream,
}
IN_ORDER_OF_OURS = ("mapping", "files")


@pytest.fixture(params=WAYS)
def way(request, tmp_path):
    """From a state dict to something that ``route`` takes."""
    opened = []

    def make(state):
        opened.append(WAYS[request.param](state, tmp_path))
        return opened[-1]

    make.name = request.param
    make.streams = request.param not in IN_ORDER_OF_OURS
    yield make
    for source in opened:
        if isinstance(source, Ordered):
            source.close()


def right(state, **options):
    """The model as it is when each part is loaded by hand from tensors of its own."""
    model = VisionLanguage(**options)
    for part in (model.language_model, model.vision_model, model.sound_encoder):
        prefix = {model.language_model: "language_model.", model.vision_model: "vision_model.radio_model."}.get(
            part, "sound_encoder."
        )
        with torch.no_grad():
            part.load_weights((n.removeprefix(prefix), t.clone()) for n, t in state.items() if n.startswith(prefix))
    model.mlp1.load_state_dict({n.removeprefix("mlp1."): t for n, t in state.items() if n.startswith("mlp1.")})
    return model.state_dict()


def interleaved(state):
    """No component's tensors are together."""
    groups = {}
    for name, tensor in state.items():
        groups.setdefault(name.partition(".")[0], []).append((name, tensor))
    rounds = itertools.zip_longest(*groups.values())
    return dict(pair for pairs in rounds for pair in pairs if pair is not None)


class Collecting:
    """Loading code that keeps what it gets, and may stop early."""

    def __init__(self, stop=None, error_at=None):
        self.stop, self.error_at = stop, error_at
        self.kept, self.pairs = {}, None

    def __call__(self, pairs):
        self.pairs = pairs
        if self.stop == 0:
            return "stopped"
        for number, (name, tensor) in enumerate(pairs, 1):
            if number == self.error_at:
                raise RuntimeError("out of luck")
            self.kept[name] = tensor
            if number == self.stop:
                return "stopped"
        return "done"


def small():
    return {f"{part}.{n}": torch.full((3,), float(10 * p + n)) for n in range(3) for p, part in enumerate("abc")}


def collecting(**options):
    return {part: Collecting(**options.get(part, {})) for part in "abc"}


def parts(loaders, **options):
    return [Component(f"{part}.", loader, **options) for part, loader in loaders.items()]


class TestBorrowed:
    """Borrowed tensors that are kept or copied late, first in code that is wrong."""

    def test_naive_code_is_bitten(self):
        state = small()
        kept = dict(reused(state))  # a callback that keeps its dictionary does the same
        assert all(bool(tensor.isnan().all()) for tensor in kept.values())
        sorted_first = {part: [t for n, t in reused(state) if n.startswith(part)] for part in "abc"}
        assert all(bool(tensor.isnan().all()) for tensors in sorted_first.values() for tensor in tensors)
        model, prefix = VisionLanguage(), "language_model."  # in a model that is right with tensors of its own
        pairs = reused(vision_language_checkpoint())
        with torch.no_grad():
            model.language_model.load_weights((n.removeprefix(prefix), t) for n, t in pairs if n.startswith(prefix))
        expected = right(vision_language_checkpoint())
        assert not torch.equal(model.language_model.down[0], expected["language_model.down.0"])

    def test_a_kept_tensor_stays_right(self, way):
        state, loaders = small(), collecting()
        hw.route(way(state), parts(loaders))
        kept = {f"{part}.{name}": tensor for part, loader in loaders.items() for name, tensor in loader.kept.items()}
        assert_same_bits(kept, state)
        assert len({tensor.data_ptr() for tensor in kept.values()}) == len(state)
        assert not {tensor.data_ptr() for tensor in kept.values()} & {tensor.data_ptr() for tensor in state.values()}

    def test_sorted_lists_and_weights_that_wait_for_scales(self, way):
        state = interleaved(vision_language_checkpoint())
        model = VisionLanguage()
        hw.route(way(state), model.components())
        assert_same_bits(model.state_dict(), right(state))

    def test_a_thread_pool_that_copies_after_the_stream_has_ended(self, way):
        state, copied, ended = small(), {}, threading.Event()

        def copy(name, tensor):
            assert ended.wait(30)
            copied[name] = tensor.clone()

        with ThreadPoolExecutor(3) as pool:
            futures = []

            def load(pairs):
                futures.extend(pool.submit(copy, name, tensor) for name, tensor in pairs)

            hw.route(way(state), [Component("", load)])
            ended.set()
            for future in futures:
                future.result(30)
        assert_same_bits(copied, state)

    def test_the_trainer_may_go_on(self):
        state, loaders = small(), collecting()
        before = {name: tensor.clone() for name, tensor in state.items()}
        hw.route(state, parts(loaders))
        for tensor in state.values():
            tensor.fill_(torch.nan)
        assert_same_bits({f"a.{name}": tensor for name, tensor in loaders["a"].kept.items()}, only(before, "a"))

    @pytest.mark.parametrize("wrap", [dict, lambda state: iter(state.items())], ids=["mapping", "pairs"])
    def test_what_is_not_borrowed_is_not_copied(self, wrap):
        state, loaders = small(), collecting()
        hw.route(wrap(state), parts(loaders), borrowed=False)
        addresses = {tensor.data_ptr() for loader in loaders.values() for tensor in loader.kept.values()}
        assert addresses == {tensor.data_ptr() for tensor in state.values()}

    def test_copies_are_of_no_graph_and_contiguous(self):
        leaf = torch.randn(4, 3, requires_grad=True)
        load = Collecting()
        hw.route([("a.w", (leaf * 2).t())], [Component("a.", load)])
        assert not load.kept["w"].requires_grad
        assert load.kept["w"].is_contiguous()

    @pytest.mark.parametrize("shape", [(3, 1 << 20), (1 << 20, 3)])
    def test_a_large_tensor_is_copied_as_a_small_one(self, shape):
        tensor = torch.randn(shape)
        load = Collecting()
        hw.route(reused({"a.w": tensor}), [Component("a.", load)])
        hw.route([("a.t", tensor.t())], [Component("a.", load)])
        assert_same_bits(load.kept, {"w": tensor, "t": tensor.t()})
        assert load.kept["t"].is_contiguous()

    def test_of_the_streaming_component_no_more_than_two_copies_live(self):
        state = {f"a.{number}": torch.zeros(8) for number in range(20)}
        alive, peak = weakref.WeakSet(), []

        def load(pairs):
            for _, tensor in pairs:
                alive.add(tensor)
                peak.append(len(alive))

        hw.route(reused(state), [Component("a.", load)])
        assert max(peak) <= 2


def only(state, part):
    return {name: tensor for name, tensor in state.items() if name.startswith(f"{part}.")}


class TestOrder:
    @pytest.mark.parametrize("order", [*itertools.permutations(range(4))], ids=lambda order: "".join(map(str, order)))
    def test_every_order_of_components(self, way, order):
        state, model = interleaved(vision_language_checkpoint()), VisionLanguage()
        components = [model.components()[number] for number in order]
        report = hw.route(way(state), components)
        assert_same_bits(model.state_dict(), right(state))
        assert list(report.tensors) == [component.name for component in components]
        largest, first = LANGUAGE, next(part.name for part in components if part.name != ADAPTER)
        assert report.streamed == {"reused": first, "ordered": largest}.get(way.name)

    @examples(60)
    @given(data=st.data())
    def test_every_order_of_tensors(self, data):
        state = vision_language_checkpoint()
        names = data.draw(st.permutations(list(state)))
        order = data.draw(st.permutations(range(4)))
        model = VisionLanguage()
        report = hw.route(reused({name: state[name] for name in names}), [model.components()[n] for n in order])
        assert_same_bits(model.state_dict(), right(state))
        waited = sum(count for name, count in report.nbytes.items() if name != report.streamed)
        assert report.peak_waiting_bytes == waited

    def test_files_are_read_as_they_lie(self, tmp_path):
        write_checkpoint(tmp_path, small(), shards=2)
        load = Collecting()
        with hw.open(tmp_path) as source:
            hw.route(source, [Component("", load)])
            assert list(load.kept) == sorted(load.kept, key=source.position) != sorted(load.kept)

    def test_nothing_waits_where_the_source_is_asked_in_our_order(self, way):
        report = hw.route(way(small()), parts(collecting()))
        assert report.peak_waiting_bytes == (2 * 3 * 12 if way.streams else 0)
        assert (report.streamed is not None) == way.streams

    @pytest.mark.parametrize("part", "abc")
    @pytest.mark.parametrize("stop", range(4))
    def test_loading_code_that_stops_early_starves_nobody(self, way, part, stop):
        state, loaders = small(), collecting(**{part: {"stop": stop}})
        source = way(state)
        report = hw.route(source, parts(loaders))
        for loaded, loader in loaders.items():
            expected = list(only(state, loaded).items())[: stop if loaded == part else 3]
            assert_same_bits({f"{loaded}.{name}": tensor for name, tensor in loader.kept.items()}, dict(expected))
        untaken = tuple(only(state, part))[stop:]
        assert report.untaken == ({part: untaken} if untaken else {})
        assert report.returned[part] == "stopped"
        assert report.nbytes[part] == 12 * stop
        if way.name == "reused":
            assert next(source, None) is None, "the stream was not exhausted"

    def test_a_kept_iterator_gives_nothing_more(self, way):
        loaders = collecting(a={"stop": 1}, b={"stop": 1}, c={"stop": 1})
        hw.route(way(small()), parts(loaders))
        assert all(next(iter(loader.pairs), None) is None for loader in loaders.values())

    def test_an_iterator_is_not_asked_again_after_its_end(self):
        class Once:
            def __init__(self):
                self.pairs, self.ended = iter(small().items()), False

            def __iter__(self):
                return self

            def __next__(self):
                assert not self.ended, "it would wait for ever"
                pair = next(self.pairs, None)
                self.ended = pair is None
                if self.ended:
                    raise StopIteration
                return pair

        hw.route(Once(), parts(collecting()))

    def test_code_that_yields_is_run(self, way):
        given = {}

        def load(pairs):
            for name, tensor in pairs:
                given[name] = tensor
                yield name

        report = hw.route(way(small()), [Component("", load)])
        assert_same_bits(given, small())
        assert sorted(report.returned["everything else"]) == sorted(small())


class TestFailure:
    @pytest.mark.parametrize("part", "abc")
    @pytest.mark.parametrize("at", [1, 3])
    def test_an_exception_in_each_component(self, way, part, at):
        closed = []

        def closing(pairs):
            try:
                yield from pairs
            finally:
                closed.append(True)

        loaders = collecting(**{part: {"error_at": at}})
        source = way(small())
        before = threading.active_count()
        with pytest.raises(RuntimeError, match="out of luck") as caught:
            hw.route(closing(source) if way.name == "reused" else source, parts(loaders))
        (note,) = caught.value.__notes__
        assert f"component {part!r}" in note
        assert f"after it was given '{at - 1}'" in note
        assert f"loaded by then: {', '.join('abc'['abc'.index('a') : 'abc'.index(part)]) or 'none'}" in note
        assert threading.active_count() == before
        if way.name == "reused":
            assert closed
        if way.name == "ordered":
            # It had ended when the others were loaded; else it was closed.
            with pytest.raises(hw.Closed if part == "a" else StopIteration):
                next(source.streams[0])

    def test_a_failure_lets_go_of_the_copies_that_wait(self):
        copies = weakref.WeakSet()
        clone = torch.Tensor.clone

        class Watched(torch.Tensor):
            def clone(self, **options):
                copy = clone(self, **options)
                copies.add(copy)
                return copy

            def detach(self):
                return self

        state = {name: tensor.as_subclass(Watched) for name, tensor in small().items()}
        loaders = collecting(a={"error_at": 3})
        with pytest.raises(RuntimeError, match="out of luck") as caught:
            hw.route(iter(state.items()), parts(loaders))
        assert caught.value.__traceback__ is not None
        loaders["a"].kept.clear()
        assert len(copies) <= 1, "the error's frames hold the copies; one, the loading code's own, it may"

    @pytest.mark.parametrize("stop", [False, True], ids=["raises", "swallowed"])
    def test_a_stream_that_fails_does_not_look_like_its_end(self, stop):
        def broken():
            yield from itertools.islice(reused(small()), 5)
            raise OSError("the disk is gone")

        def load(pairs):
            try:
                for _ in pairs:
                    pass
            except OSError:
                if not stop:
                    raise

        with pytest.raises(OSError, match="the disk is gone") as caught:
            hw.route(broken(), [Component("a.", load), Component("", Collecting())])
        assert "component 'a'" in caught.value.__notes__[0]

    @pytest.mark.parametrize("at", range(3))
    def test_a_source_that_fails_is_closed_and_named(self, tmp_path, at):
        write_checkpoint(tmp_path, small())
        before = threading.active_count()
        with (
            FailingSource(hw.open(tmp_path), at=3 * at, error=OSError("the disk is gone")) as source,
            pytest.raises(OSError, match="the disk is gone") as caught,
        ):
            hw.route(source, parts(collecting()))
        assert f"component {'abc'[at]!r}" in caught.value.__notes__[0]
        assert threading.active_count() == before

    def test_an_error_of_its_own_keeps_the_streams_as_its_cause(self):
        def broken():
            yield "a.0", torch.ones(1)
            raise OSError("the disk is gone")

        def load(pairs):
            try:
                list(pairs)
            except OSError as error:
                raise ValueError("incomplete") from error

        with pytest.raises(ValueError, match="incomplete") as caught:
            hw.route(broken(), [Component("a.", load)])
        assert isinstance(caught.value.__cause__, OSError)

    def test_a_manifest_that_promises_what_never_comes(self, tmp_path):
        source = from_stream(small(), tmp_path)
        extra = hw.TensorSpec("b.9", torch.float32, (1,))
        source.manifest = hw.Manifest([*source.manifest.values(), extra])
        loaders = collecting()
        with source, pytest.raises(RoutingError, match=r"never came: b: b\.9"):
            hw.route(source, parts(loaders))

    def test_an_open_source_stays_open(self, tmp_path):
        write_checkpoint(tmp_path, small())
        with hw.open(tmp_path) as source:
            for _ in range(2):
                hw.route(source, parts(collecting()))


def problems(source, components, **options):
    with pytest.raises((PlanError, RoutingError)) as caught:
        hw.route(source, components, **options)
    return caught.value.problems


class TestProblems:
    def test_all_that_is_wrong_together_before_the_first_byte(self, tmp_path):
        state = {**small(), "stray.w": torch.ones(2), "d.0": torch.ones(1), "e.0": torch.ones(1), "e.00": torch.ones(1)}
        state["adapter.weight"] = torch.ones(3, 2)
        write_checkpoint(tmp_path, state, shards=3)
        touched = Collecting()
        components = [
            Component("a.", touched, strip="vision."),
            Component("b", touched),
            Component("c.", touched),
            Component("d.", None),
            Component("e.", touched, rename=lambda name: name.strip("0") + "w"),
            Component("gone.", touched),
            Component("adapter.", nn.Linear(2, 4)),
        ]
        failing = FailingSource(hw.open(tmp_path), at=0, error=AssertionError("a byte was read"))
        with failing as source:
            listed = problems(source, components)
        expected = [
            *(f"a: a.{n} does not begin with 'vision.'" for n in range(3)),
            "adapter: bias",
            "adapter: weight",
            *(f"b: b.{n} would become '.{n}'" for n in range(3)),
            "d: its load_weights is None, but there are tensors for it: d.0;",
            "e: e.0 and e.00 both become w",
            "gone: is missing",
            "stray.w: is unexpected",
        ]
        assert len(listed) == len(expected)
        assert all(problem.startswith(begin) for problem, begin in zip(listed, expected, strict=True)), "\n".join(
            listed
        )
        assert not touched.kept

    def test_the_same_of_a_stream_once_it_has_passed(self):
        state = {**small(), "stray.w": torch.ones(2), "d.0": torch.ones(1)}
        loaders = collecting()
        pairs = [*reused_copy(state), ("b.0", torch.ones(3))]
        listed = problems(iter(pairs), [*parts(loaders), Component("d.", None), Component("gone.", Collecting())])
        assert [problem.split(",")[0].split(" (")[0] for problem in listed] == [
            "b: b.0 comes twice",
            "d: its load_weights is None",
            "gone: is missing",
            "stray.w: is unexpected",
        ]
        assert loaders["a"].kept
        assert not loaders["b"].kept
        assert not loaders["c"].kept

    def test_a_part_that_got_nothing_is_not_called(self, way):
        never = Collecting()
        report = hw.route(way(small()), [Component("gone.", never, required=False), *parts(collecting())])
        assert never.pairs is None
        assert "gone" not in report.tensors

    def test_an_absent_part_for_which_there_is_nothing_is_no_problem(self, way):
        hw.route(way(small()), [*parts(collecting()), Component("sound.", None)])

    def test_two_predicates(self, way):
        loaders = collecting()
        components = [
            *parts(loaders),
            Component(lambda name: name.endswith("0"), Collecting(), name="zeros"),
            Component(lambda name: name == "b.0", Collecting(), name="one"),
        ]
        assert "b.0: fits zeros and one" in problems(way(small()), components)

    @pytest.mark.parametrize(
        ("components", "message"),
        [
            (list, "there are no components"),
            (
                lambda: [Component("a.", print), Component("a.", print)],
                "two have the name 'a'; two have the prefix 'a.'",
            ),
            (lambda: [Component(lambda n: True, print), Component(lambda n: True, print)], "the name '<lambda>'"),
            (lambda: ["a."], "'a.' is no Component"),
            (lambda: [Component(3, print)], "not a int"),
            (lambda: [Component("a.", {})], "not a dict"),
        ],
    )
    def test_components_that_are_none(self, components, message):
        with pytest.raises(UsageError, match=message.replace("(", r"\(").replace(".", r"\.")):
            hw.route({}, components())

    def test_what_is_no_source(self):
        with pytest.raises(UsageError, match="int"):
            hw.route(3, [Component("", print)])
        with pytest.raises(UsageError, match=r"'a\.0' is a list"):
            hw.route([("a.0", [1.0])], [Component("", list)])


def reused_copy(state):
    return [(name, tensor.clone()) for name, tensor in state.items()]


class TestMatching:
    def test_the_longest_prefix_wins_and_a_predicate_before_it(self, way):
        state = {"m.a": torch.ones(1), "m.v.a": torch.ones(2), "m.v.r.a": torch.ones(3), "m.v.r.bias": torch.ones(4)}
        m, v, r, p = (Collecting() for _ in range(4))
        components = [Component("m.", m), Component("m.v.", v), Component("m.v.r.", r)]
        hw.route(way(state), [*components, Component(lambda name: name.endswith("bias"), p, name="biases")])
        assert [sorted(part.kept) for part in (m, v, r, p)] == [["a"], ["a"], ["a"], ["m.v.r.bias"]]
        assert [part.kept[name].numel() for part, name in ((m, "a"), (v, "a"), (r, "a"), (p, "m.v.r.bias"))] == [
            1,
            2,
            3,
            4,
        ]

    def test_what_is_matched_need_not_be_what_is_stripped(self, way):
        load = Collecting()
        component = Component("vision_model.radio_model.", load, strip="vision_model.", rename=str.upper)
        hw.route(way({"vision_model.radio_model.x": torch.ones(1)}), [component])
        assert list(load.kept) == ["RADIO_MODEL.X"]

    @pytest.mark.parametrize("limits", [{"image": 0}, {"audio": 0}, {"image": 0, "audio": 0}])
    def test_a_limit_of_zero_leaves_the_part_alone(self, way, limits):
        state = vision_language_checkpoint()
        model = VisionLanguage(limits=limits)
        report = hw.route(way(state), model.components())
        off = (("mlp1", "vision_model") if limits.get("image") == 0 else ()) + (
            ("sound_encoder",) if limits.get("audio") == 0 else ()
        )
        before, after = VisionLanguage().state_dict(), right(state)
        torch.manual_seed(0)
        for name, tensor in model.state_dict().items():
            if name.startswith(("vision_model", "sound_encoder")):
                assert_same_bits({"": tensor}, {"": (before if name.startswith(off) else after)[name]})
        assert {name.partition(".")[0] for name in report.disabled} == set(off)
        assert all(report.disabled.values())

    def test_a_model_without_sound(self, way):
        model, state = VisionLanguage(sound=False), vision_language_checkpoint(sound=False)
        assert SOUND not in hw.route(way(state), model.components()).tensors
        with_sound = way(vision_language_checkpoint())
        assert any(
            problem.startswith(f"{SOUND}: its load_weights is None")
            for problem in problems(with_sound, model.components())
        )

    def test_what_is_disabled_is_not_looked_at(self):
        pairs = [("a.0", torch.ones(2)), ("off.0", Gone()), ("a.1", torch.ones(2)), ("off.1", Gone())]
        load = Collecting()
        off = Component("off.", Gone(), strip="no", rename=lambda name: pytest.fail("renamed"), enabled=False)
        report = hw.route(iter(pairs), [Component("a.", load), off])
        assert list(load.kept) == ["0", "1"]
        assert report.disabled == {"off": ("off.0", "off.1")}

    def test_what_is_disabled_is_not_read(self, tmp_path):
        write_checkpoint(tmp_path, small())

        asked = set()

        class Listening(FailingSource):
            def read(self, reads, **options):
                reads = list(reads)
                asked.update(read.name for read in reads)
                return self._source.read(reads, **options)

        with Listening(hw.open(tmp_path), at=0, error=AssertionError()) as source:
            components = [*parts({"a": Collecting(), "b": Collecting()}), Component("c.", Gone(), enabled=False)]
            hw.route(source, components)
        assert asked == {"a.0", "a.1", "a.2", "b.0", "b.1", "b.2"}


class TestLimit:
    def test_what_waits_is_counted_and_limited(self, way):
        nbytes = 2 * 3 * 12
        assert hw.route(way(small()), parts(collecting()), memory_limit=nbytes)
        if not way.streams:
            assert hw.route(way(small()), parts(collecting()), memory_limit=0)
            return
        kind = PlanError if way.name == "ordered" else RoutingError
        loaders = collecting()
        with pytest.raises(kind, match=f"memory_limit={nbytes - 1}") as caught:
            hw.route(way(small()), parts(loaders), memory_limit=nbytes - 1)
        assert bool(loaders["a"].kept) == (kind is RoutingError), "by a manifest it is known before"
        assert not loaders["b"].kept
        assert kind is PlanError or "c: with c.2 (12 bytes)" in str(caught.value)

    def test_swallowing_it_does_not_help(self):
        def load(pairs):
            try:
                list(pairs)
            except Exception:
                return

        with pytest.raises(RoutingError, match="memory_limit=0"):
            hw.route(reused(small()), [Component("a.", load), Component("", Collecting())], memory_limit=0)

    def test_it_is_a_number_of_bytes(self):
        with pytest.raises(UsageError, match="memory_limit= is a whole number of at least 0; found -1"):
            hw.route(small(), parts(collecting()), memory_limit=-1)


class TestByName:
    def test_a_module_is_loaded_as_load_does_it(self, way):
        module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        state = {
            f"adapter.{name}": torch.rand_like(t) if t.is_floating_point() else t + 3
            for name, t in module.state_dict().items()
        }
        addresses = {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}
        report = hw.route(way({**small(), **state}), [*parts(collecting()), Component("adapter.", module)])
        assert_same_bits({f"adapter.{name}": tensor for name, tensor in module.state_dict().items()}, state)
        assert {name: tensor.data_ptr() for name, tensor in module.state_dict().items()} == addresses
        assert report.returned["adapter"].tensors[hw.Fate.WRITTEN]
        assert report.nbytes["adapter"] == sum(tensor.nbytes for tensor in state.values())
        assert not report.untaken

    def test_it_may_be_the_largest(self, way):
        module = nn.Linear(50, 50)
        state = {f"adapter.{name}": torch.rand_like(tensor) for name, tensor in module.state_dict().items()}
        report = hw.route(way({**small(), **state}), [Component("adapter.", module), *parts(collecting())])
        assert torch.equal(module.weight, state["adapter.weight"])
        assert report.streamed == {"ordered": "adapter", "reused": "a"}.get(way.name)

    def test_a_module_with_loading_code_is_loaded_by_that(self, way):
        state, model = vision_language_checkpoint(), VisionLanguage()
        report = hw.route(
            way(state), [Component("language_model.", model.language_model), Component("", None, enabled=False)]
        )
        assert "embed" in report.returned[LANGUAGE]

    def test_what_does_not_fit_names_component_and_tensor(self, way):
        state = {"adapter.weight": torch.ones(3, 3), "adapter.extra": torch.ones(1)}
        listed = problems(way(state), [Component("adapter.", nn.Linear(2, 3))])
        assert [problem for problem in listed if "weight" in problem]
        assert [problem for problem in listed if "extra" in problem]
        assert [problem for problem in listed if "bias" in problem]


class TestTogether:
    def test_a_model_that_routes_has_a_plan(self, tmp_path):
        """Its load_weights is traced through ``route``: copies of fake tensors cost nothing and are seen through."""
        state, model = vision_language_checkpoint(), VisionLanguage()
        report = hw.load(model, write_checkpoint(tmp_path, state))
        assert_same_bits(model.state_dict(), right(state))
        assert report.fell_back == ()
        assert report.planned == len(state)

    def test_fake_tensors_wait_in_no_memory(self, tmp_path):
        class Limited(VisionLanguage):
            def load_weights(self, pairs):
                return hw.route(pairs, self.components(), memory_limit=0)

        report = hw.load(Limited(), write_checkpoint(tmp_path, vision_language_checkpoint()))
        assert report.fell_back == ()

    def test_the_report_is_frozen_and_prints(self):
        model = VisionLanguage(limits={"audio": 0})
        report = hw.route(reused(vision_language_checkpoint()), model.components())
        with pytest.raises(dataclasses.FrozenInstanceError):
            report.streamed = "other"
        text = str(report)
        assert "language_model  2.3 kB in 21 tensors, streamed" in text
        assert "sound_encoder  disabled, 2 tensors left alone" in text
        assert "1.4 kB waiting at peak" in text
        stopped = hw.route(small(), parts(collecting(a={"stop": 1})))
        assert "12 B in 3 tensors; stopped before 2: a.1, a.2" in str(stopped)


@pytest.mark.parametrize("kind", ["no manifest", "a manifest", "runai", "fastsafetensors", "safetensors", "torch"])
def test_iterators_and_readers_of_other_packages(kind, tmp_path, monkeypatch):
    """The real packages; runai with the memory limit that makes it use its memory again."""
    monkeypatch.setenv("RUNAI_STREAMER_MEMORY_LIMIT", "0")
    state = {f"{part}.{number}": torch.full((64,), float(number)) for part in "ab" for number in range(8)}
    if kind == "torch":
        torch.save(state, tmp_path / "pytorch_model.bin")
        source = hw.open(tmp_path, reader=kind)
    elif kind == "no manifest":
        source = hw.from_iterator(reused(state))
    elif kind == "a manifest":
        source = hw.from_iterator(reused(state), manifest=hw.open(state).manifest)
    else:
        write_checkpoint(tmp_path, state)
        source = hw.open(tmp_path, reader=kind)
    kept = {"a": {}, "b": {}}
    with source:
        hw.route(source, [Component(f"{part}.", lambda pairs, part=part: kept[part].update(pairs)) for part in kept])
    for part, tensors in kept.items():
        assert_same_bits(tensors, {name[2:]: tensor for name, tensor in state.items() if name.startswith(part)})
        assert len({tensor.data_ptr() for tensor in tensors.values()}) == 8
