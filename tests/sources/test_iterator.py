"""IteratorSource: what it promises, when it advances, what it refuses. Its contract is in test_contract."""

import threading
import weakref

import numpy
import pytest
import torch
from torch import nn

import hotweights as hw
from hotweights.sources import IteratorSource, Source
from hotweights.sources import iterator as module
from hotweights.sources.opening import is_pairs, opened
from hotweights.testing import ManualEvent, ReusedBuffer, assert_same_bits

TENSORS = {f"layers.{number}.weight": torch.full((4, 3), float(number + 1)) for number in range(4)}
NAMES = list(TENSORS)
MANIFEST = hw.open(TENSORS).manifest


class Watched:
    """A one-shot iterator that tells how far it is and whether it was closed."""

    def __init__(self, tensors=TENSORS):
        self.pairs = iter(tensors.items())
        self.given = 0
        self.closed = 0

    def __iter__(self):
        return self

    def __next__(self):
        pair = next(self.pairs)
        self.given += 1
        return pair

    def close(self):
        self.closed += 1


class TestManifest:
    def test_none_is_needed_to_load_safely(self):
        with hw.from_iterator(ReusedBuffer(TENSORS)) as source:
            assert_same_bits(dict(source.tensors()), TENSORS)

    def test_without_one_it_is_no_source_to_plan_from(self):
        pairs = Watched()
        with hw.from_iterator(pairs) as source:
            assert not isinstance(source, Source)
            assert not hasattr(source, "manifest")
            with pytest.raises(hw.NoManifest, match=r"manifest=.*\.collect\(\)"):
                source.manifest  # noqa: B018
            with pytest.raises(hw.UsageError, match="without a manifest"):
                hw.trace(nn.Linear(2, 2), source.manifest)
            assert pairs.given == 0, "asking about it advanced it"
            with pytest.raises(AttributeError, match="no attribute 'manifests'"):
                source.manifests  # noqa: B018
            assert isinstance(hw.from_iterator([], MANIFEST), Source)

    def test_trace_does_not_use_it_up_to_get_one(self):
        pairs = Watched()
        with hw.from_iterator(pairs) as source, pytest.raises(hw.NoManifest, match="manifest="):
            hw.trace(nn.Linear(2, 2), source)
        assert pairs.given == 0

    def test_a_sender_collects_as_load_does(self, tmp_path):
        with (
            hw.Sender(f"unix:{tmp_path}/socket", timeout=0.01) as sender,
            hw.from_iterator(TENSORS.items()) as source,
            pytest.raises(hw.TransferTimeout),  # Not refused: only receivers are missing.
        ):
            sender.send(source, version=1)

    @pytest.mark.parametrize("pairs", [list(TENSORS.items()), iter(TENSORS.items()), TENSORS.items()])
    def test_bare_pairs_are_no_source(self, pairs):
        assert is_pairs(pairs)
        assert not any(is_pairs(source) for source in ("path", TENSORS, nn.ReLU(), hw.from_iterator(pairs), 3))
        with pytest.raises(hw.UsageError, match=r"goes through hotweights\.from_iterator"), opened(pairs):
            pass

    def test_collect_makes_one(self):
        with hw.from_iterator(ReusedBuffer(TENSORS)) as source, source.collect() as kept:
            assert dict(kept.manifest) == dict(MANIFEST)
            assert_same_bits({lease.name: lease.own() for lease in kept.leases()}, TENSORS)

    def test_its_order_is_not_assumed(self):
        with hw.from_iterator(reversed(TENSORS.items()), MANIFEST) as source:
            assert [name for name, _ in source.tensors()] == NAMES[::-1]

    @pytest.mark.parametrize("way", ["tensors", "leases"])
    @pytest.mark.parametrize(
        ("change", "words", "given"),
        [
            ({NAMES[1]: None}, [f"tensor '{NAMES[1]}': was promised, and never came"], 3),
            ({NAMES[1]: None, NAMES[3]: None}, ["2 problems", NAMES[1], NAMES[3]], 2),
            ({"bias": torch.zeros(1)}, ["tensor 'bias': came, and the manifest does not name it"], 4),
            ({NAMES[2]: torch.zeros(3, 4)}, [NAMES[2], "F32 [4, 3] was promised", "F32 [3, 4] came"], 2),
            ({NAMES[2]: torch.zeros(4, 3).bfloat16()}, [NAMES[2], "F32 [4, 3] was promised", "BF16 [4, 3] came"], 2),
        ],
        ids=["missing", "two missing", "unexpected", "shape", "dtype"],
    )
    def test_a_broken_promise_is_refused(self, change, words, given, way):
        pairs = [(name, tensor) for name, tensor in {**TENSORS, **change}.items() if tensor is not None]
        with hw.from_iterator(iter(pairs), MANIFEST) as source:
            got = []
            with pytest.raises(hw.SourceError) as caught:  # noqa: PT012 - how far it came counts
                for item in getattr(source, way)():
                    got.append(item)
            assert all(word in str(caught.value) for word in words), str(caught.value)
            assert len(got) == given

    @pytest.mark.parametrize("manifest", [None, MANIFEST])
    def test_a_name_that_comes_twice_is_refused(self, manifest):
        pairs = [*TENSORS.items(), (NAMES[1], torch.zeros(4, 3))]
        with (
            hw.from_iterator(pairs, manifest) as source,
            pytest.raises(hw.SourceError, match=f"'{NAMES[1]}': came twice"),
        ):
            dict(source.tensors())


class TestOnce:
    @pytest.mark.parametrize("first", ["tensors", "leases", "broken off"])
    @pytest.mark.parametrize("second", ["tensors", "leases", "collect"])
    def test_an_iterator_is_streamed_once(self, first, second):
        with hw.from_iterator(iter(TENSORS.items())) as source:
            if first == "tensors":
                dict(source.tensors())
            else:
                with source.leases() as stream:
                    next(stream) if first == "broken off" else list(stream)
            with pytest.raises(hw.UsageError, match="once"):
                getattr(source, second)()

    def test_a_list_is_streamed_again(self):
        with hw.from_iterator(list(TENSORS.items())) as source:
            assert_same_bits(dict(source.tensors()), TENSORS)
            assert_same_bits(dict(source.tensors()), TENSORS)


class TestOwning:
    def test_borrowed_memory_is_copied(self):
        with hw.from_iterator(TENSORS.items()) as source:
            for name, tensor in source.tensors():
                assert tensor.data_ptr() != TENSORS[name].data_ptr()

    def test_other_memory_is_not(self):
        with hw.from_iterator(TENSORS.items(), borrowed=False) as source:
            for name, tensor in source.tensors():
                assert tensor.data_ptr() == TENSORS[name].data_ptr()
            for lease in source.leases():
                assert not lease.borrowed
                assert lease.own().data_ptr() == TENSORS[lease.name].data_ptr()

    def test_owned_tensors_are_contiguous(self):
        with hw.from_iterator([("w", torch.randn(3, 4).t())], borrowed=False) as source:
            assert dict(source.tensors())["w"].is_contiguous()

    def test_misaligned_memory_is_copied(self):
        memory = bytearray(64)
        at_odd = torch.frombuffer(memory, dtype=torch.float32, count=2, offset=1)
        assert at_odd.data_ptr() % 4
        with hw.from_iterator([("w", at_odd)], borrowed=False) as source:
            assert dict(source.tensors())["w"].data_ptr() % 4 == 0

    def test_parameters_come_without_their_history(self):
        layer = nn.Linear(2, 2)
        with hw.from_iterator(layer.named_parameters()) as source:
            assert not any(tensor.requires_grad for _, tensor in source.tensors())

    @pytest.mark.parametrize("way", ["tensors", "leases"])
    def test_what_the_user_drops_is_gone_before_the_next_comes(self, way):
        memories = []

        def fresh():
            array = numpy.ones(3)
            memories.append(weakref.ref(array))
            return torch.from_numpy(array)

        def pairs():
            for name in NAMES:
                assert all(memory() is None for memory in memories)
                yield name, fresh()

        with hw.from_iterator(pairs(), borrowed=False) as source:
            for item in getattr(source, way)():
                del item
        assert len(memories) == len(NAMES)


class TestAdvancing:
    @pytest.fixture
    def pairs(self):
        return Watched()

    def test_one_at_a_time(self, pairs):
        with hw.from_iterator(pairs) as source, source.leases() as stream:
            for number, _ in enumerate(stream, start=1):
                assert pairs.given == number

    def test_not_before_the_event_has_happened(self, pairs):
        with hw.from_iterator(pairs) as source, source.leases() as stream:
            event, got = AskedEvent(), []
            next(stream).release(after=event)
            thread = threading.Thread(target=lambda: got.append(next(stream)), daemon=True)
            thread.start()
            assert event.asked.wait(30)
            assert (pairs.given, got) == (1, [])
            event.happen()
            thread.join(30)
            assert [lease.name for lease in got] == [NAMES[1]]

    @pytest.mark.parametrize("who", ["stream", "source"])
    def test_nor_is_it_closed_before(self, pairs, who):
        source = hw.from_iterator(pairs)
        stream, event = source.leases(), AskedEvent()
        next(stream).release(after=event)
        thread = threading.Thread(target=(stream if who == "stream" else source).close, daemon=True)
        thread.start()
        assert event.asked.wait(30)
        assert pairs.closed == 0
        event.happen()
        thread.join(30)
        assert pairs.closed == 1
        stream.close()

    @pytest.mark.parametrize("who", ["stream", "source"])
    def test_close_ends_the_wait(self, pairs, who):
        source = hw.from_iterator(pairs)
        stream = source.leases()
        event, ended = AskedEvent(), []

        def advance():
            try:
                next(stream)
            except hw.Closed as error:
                ended.append(error)

        next(stream).release(after=event)
        thread = threading.Thread(target=advance, daemon=True)
        thread.start()
        assert event.asked.wait(30)
        (stream if who == "stream" else source).close()
        event.happen()  # The iterator is let go of only then.
        thread.join(30)
        assert len(ended) == 1
        assert (pairs.given, pairs.closed) == (1, 1)
        stream.close()
        source.close()
        assert pairs.closed == 1

    def test_the_wait_has_a_deadline(self, pairs, monkeypatch):
        monkeypatch.setattr(module, "_PATIENCE", 0.01)
        with hw.from_iterator(pairs) as source:
            stream = source.leases()
            event = ManualEvent()
            next(stream).release(after=event)
            with pytest.raises(hw.PoolTimeout, match=NAMES[0]):
                next(stream)
            assert pairs.given == 1

    def test_copies_out_of_device_memory_are_waited_for(self, pairs, monkeypatch):
        event = AskedEvent()
        monkeypatch.setattr(module, "record_event", lambda device: event)
        with hw.from_iterator(pairs) as source:
            owned, got = source.tensors(), []
            got.append(next(owned))
            thread = threading.Thread(target=lambda: got.append(next(owned)), daemon=True)
            thread.start()
            assert event.asked.wait(30)
            assert (pairs.given, len(got)) == (1, 1)
            event.happen()
            thread.join(30)
            assert (pairs.given, len(got)) == (2, 2)


class TestClosing:
    @pytest.mark.parametrize("how", ["exhausted", "left early", "never begun", "by the source", "raising"])
    def test_generators_are_closed(self, how):
        closed = []

        def pairs():
            try:
                yield from TENSORS.items()
            finally:
                closed.append(True)

        generator = pairs()
        with hw.from_iterator(generator) as source:
            if how == "exhausted":
                dict(source.tensors())
            elif how == "left early":
                with source.leases() as stream:
                    next(stream)
            elif how == "by the source":
                stream = source.leases()
                lease = next(stream)
                source.close()
                with pytest.raises(hw.StaleLease):
                    lease.tensor  # noqa: B018
                with pytest.raises(hw.Closed):
                    next(stream)
            elif how == "raising":
                with pytest.raises(RuntimeError, match="mine"), source.leases() as stream:  # noqa: PT012
                    next(stream)
                    raise RuntimeError("mine")
            assert closed or how == "never begun"
        assert generator.gi_frame is None

    def test_streams_of_a_list_are_closed_with_the_source(self):
        closed = []

        class Again:
            def __iter__(self):
                try:
                    yield from TENSORS.items()
                finally:
                    closed.append(True)

        source = hw.from_iterator(Again())
        with source.leases() as stream, source.leases() as other:
            assert (next(stream).name, next(other).name) == (NAMES[0], NAMES[0])
            source.close()
            assert closed == [True, True]

    def test_an_error_of_the_iterator_arrives_as_it_is(self):
        class Lost(Exception):
            pass

        def pairs():
            yield NAMES[0], TENSORS[NAMES[0]]
            raise Lost("the bucket is gone")

        for way in ("tensors", "leases"):
            with hw.from_iterator(pairs(), MANIFEST) as source, pytest.raises(Lost, match="the bucket is gone"):
                list(getattr(source, way)())


class TestGuards:
    @pytest.mark.parametrize("guard", ["poison", "trap"])
    def test_memory_that_is_not_ours_is_never_written(self, guard):
        tensors = {name: tensor.clone() for name, tensor in TENSORS.items()}
        with hw.from_iterator(tensors.items()) as source, source.leases(guard=guard) as stream:
            list(stream)
        assert_same_bits(tensors, TENSORS)

    def test_poison_is_loud(self):
        with hw.from_iterator(TENSORS.items()) as source, source.leases(guard="poison") as stream:
            kept = [lease.tensor for lease in stream]
        assert all(tensor.isnan().all() for tensor in kept)

    def test_poison_waits_for_the_event(self):
        with hw.from_iterator(TENSORS.items()) as source:
            stream, event = source.leases(guard="poison"), AskedEvent()
            lease = next(stream)
            kept = lease.tensor
            lease.release(after=event)
            thread = threading.Thread(target=next, args=(stream,), daemon=True)
            thread.start()
            assert event.asked.wait(30)
            assert torch.equal(kept, TENSORS[NAMES[0]])
            event.happen()
            thread.join(30)
            assert kept.isnan().all()
            stream.close()

    def test_trap_names_the_tensor(self):
        with hw.from_iterator(ReusedBuffer(TENSORS)) as source, source.leases(guard="trap") as stream:
            kept = {lease.name: lease.tensor for lease in stream}
        for name, tensor in kept.items():
            with pytest.raises(hw.StaleLease, match=name):
                tensor + 1

    def test_unknown(self):
        with hw.from_iterator([]) as source, pytest.raises(hw.UnknownName, match="poison"):
            source.leases(guard="loud")


class TestMisuse:
    @pytest.mark.parametrize("what", [TENSORS, nn.Linear(1, 1), 3, None])
    def test_what_is_no_iterator(self, what):
        with pytest.raises(hw.UsageError, match=r"hotweights\.open"):
            hw.from_iterator(what)

    @pytest.mark.parametrize(
        ("item", "words"),
        [
            ("name", "found 'name' among them"),
            (("name",), "found tuple among them"),
            (None, "found None among them"),
            (("w", None), "'w' is a NoneType"),
            ((1, torch.ones(1)), "found a pair of 1 and Tensor"),
            (("w", torch.ones(1, device="meta")), "'w' is on meta"),
            (("w", torch.eye(2).to_sparse()), "'w' is torch.sparse_coo"),
        ],
    )
    def test_what_is_no_named_tensor(self, item, words):
        with hw.from_iterator([item]) as source, pytest.raises(hw.UsageError, match=words):
            list(source.tensors())

    def test_a_manifest_is_a_manifest(self):
        with pytest.raises(hw.UsageError, match=r"hotweights\.Manifest"):
            hw.from_iterator([], TENSORS)

    def test_elsewhere_it_says_where_iterators_go(self):
        for call in (hw.open, lambda pairs: hw.load(nn.Linear(1, 1), pairs)):
            with pytest.raises(hw.UsageError, match="from_iterator"):
                call(iter(TENSORS.items()))

    def test_it_tells_its_state(self):
        assert repr(hw.from_iterator([], MANIFEST)) == "<IteratorSource 4 tensors, borrowed>"
        assert repr(hw.from_iterator([], borrowed=False)) == "<IteratorSource no manifest, not borrowed>"
        assert isinstance(hw.from_iterator([]), IteratorSource)


class AskedEvent(ManualEvent):
    """Says when somebody waits for it."""

    def __init__(self):
        super().__init__()
        self.asked = threading.Event()

    def query(self):
        happened = super().query()
        self.asked.set()
        return happened
