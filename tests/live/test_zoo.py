"""The differential test: random models, orders, chunks, sources, ways; every update against a cold load."""

import random

import pytest
import zoo
from examples import examples
from hypothesis import given
from hypothesis import strategies as st

import hotweights as hw
from hotweights.testing import ReusedBuffer, assert_same_bits, write_checkpoint

WAYS = ("journal", "staged", False)
WEIGHTS = [mode for mode in zoo.MODES if mode != "late"]
EVERYTHING = zoo.Spec(
    (
        *(("Plain", mode) for mode in WEIGHTS),
        *((kind, mode) for kind in ("Fused", "Padded", "Kept", "Composed", "Scaled", "Sum") for mode in WEIGHTS[:3]),
        ("Tied", "transpose", "nothing"),
        ("Tied", "in_place", "in_place"),
        ("Tied", "nothing", "quantise"),
        *((kind, mode) for kind in ("Aliased", "Foreign", "Shared") for mode in ("nothing", "transpose", "in_place")),
        ("Odd", "nothing"),
        ("Attention", "nothing"),
        ("Attention", "empty"),
    )
)


def by_mapping(live, tensors, chance, directory):
    live.update(tensors)


def by_files(live, tensors, chance, directory):
    live.update(write_checkpoint(directory / str(chance.random()), tensors, shards=chance.randint(1, 3)))


def by_stream(live, tensors, chance, directory):
    manifest = hw.open(tensors).manifest
    live.update(hw.from_iterator(tensors.items(), manifest=manifest))


def by_borrowed_stream(live, tensors, chance, directory):
    live.update(hw.from_iterator(ReusedBuffer(tensors), borrowed=True, manifest=hw.open(tensors).manifest))


def by_pushes(live, tensors, chance, directory):
    items = list(tensors.items())
    with live.begin() as update:
        while items:
            count = chance.randint(1, len(items))
            chunk, items = dict(items[:count]), items[count:]
            update.feed(chunk if chance.random() < 0.5 else ReusedBuffer(chunk))
        update.commit()


ROADS = (by_mapping, by_files, by_stream, by_borrowed_stream, by_pushes)


def shuffled(tensors, chance):
    names = list(tensors)
    chance.shuffle(names)
    return {name: tensors[name] for name in names}


def check(model, spec, seed, before=None):
    expected = zoo.cold(spec, seed)
    assert_same_bits(zoo.state(model), zoo.state(expected))
    assert zoo.words(model) == zoo.words(expected)
    if before is not None:
        assert zoo.addresses(model) == before


def loaded(spec, **options):
    model = zoo.Model(spec)
    live = zoo.live_model(model, **options)
    live.load(zoo.checkpoint(spec, 0), **zoo.allowed(model))
    return model, live


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("processed", ["all", "quant_method", "none"])
@pytest.mark.parametrize("atomic", WAYS)
def test_everything_at_once(tmp_path, atomic, processed, road):
    spec = EVERYTHING._replace(processed=processed)
    model, live = loaded(spec, atomic=atomic)
    check(model, spec, 0)
    before = zoo.addresses(model)
    for seed in (1, 2):
        road(live, zoo.checkpoint(spec, seed), random.Random(seed), tmp_path)
        check(model, spec, seed, before)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("atomic", WAYS)
def test_what_falls_back_is_updated_too(tmp_path, atomic, road):
    """Loading code that reads values cannot be planned: the model's own code loads those layers."""
    blocks = (("Plain", "transpose"), ("Asking", "nothing"), ("Asking", "quantise"), ("Tied", "nothing", "in_place"))
    blocks = (*blocks, ("Sum", "nothing"), ("Aliased", "in_place"), ("Shared", "nothing"))
    for processed in ("none", "quant_method", "all"):
        spec = zoo.Spec((*blocks, ("Attention", "once")), processed)
        model, live = loaded(spec, atomic=atomic)
        before = zoo.addresses(model)
        for seed in (1, 2):
            road(live, shuffled(zoo.checkpoint(spec, seed), random.Random(seed)), random.Random(seed), tmp_path)
            check(model, spec, seed, before)


def modes(kind):
    ways = st.sampled_from(WEIGHTS)
    if kind == "Odd":
        return st.just(("Odd", "nothing"))
    return st.tuples(st.just(kind), ways, ways) if kind == "Tied" else st.tuples(st.just(kind), ways)


PLANNED = sorted(zoo.BLOCKS.keys() - {"Asking"})
SPECS = st.builds(
    zoo.Spec,
    st.lists(st.sampled_from(PLANNED).flatmap(modes), min_size=1, max_size=5).map(tuple),
    st.sampled_from(("all", "quant_method", "none")),
)


def layer_nbytes(model):
    """Bytes of the largest block in checkpoint format, each tensor on a cache line of its own."""
    blocks = [zoo.state(block).values() for block in model.children()]
    return max(sum(-(-one.nbytes // 64) * 64 + 64 for one in block) for block in blocks)


STEPS = st.lists(st.tuples(st.sampled_from(ROADS), st.sampled_from(WAYS)), min_size=2, max_size=3)


@examples(40)
@given(spec=SPECS, first=st.sampled_from(ROADS[:4]), steps=STEPS, seed=st.integers(0, 2**16))
def test_any_model_any_way(tmp_path_factory, spec, first, steps, seed):
    chance, directory = random.Random(seed), tmp_path_factory.mktemp("any")
    model = zoo.Model(spec)
    bound, live = layer_nbytes(model), zoo.live_model(model)
    tensors = shuffled(zoo.checkpoint(spec, seed), chance)
    first(_First(live, zoo.allowed(model)), tensors, chance, directory)
    check(model, spec, seed)
    before = zoo.addresses(model)
    for number, (road, atomic) in enumerate(steps, seed + 1):
        live._atomic = atomic
        road(live, shuffled(zoo.checkpoint(spec, number), chance), chance, directory)
        check(model, spec, number, before)
    if "Attention" not in {kind for kind, *_ in spec.blocks}:  # Its layers are open until all others are done.
        report = live.update(write_checkpoint(directory / "last", zoo.checkpoint(spec, seed)))
        sources = 2 * 2 * zoo.N * zoo.N * 4  # of two programs: one runs, the next is read
        assert report.peak_scratch_bytes <= bound + sources


class _First:
    """A first load, by the roads of updates."""

    def __init__(self, live, options):
        self._live, self._options = live, options

    def update(self, source):
        self._live.load(source, **self._options)
