"""Public contract tests for sources and pools, tiny checkpoints, faulty sources. Needs no GPU, no network, no luck.

A contract is a tuple of checks; each takes what makes the thing under test and raises ``AssertionError``::

    @pytest.mark.parametrize("check", hotweights.testing.SOURCE_CONTRACT, ids=lambda check: check.__name__)
    def test_my_source(check):
        check(lambda: MySource(...), expected_tensors)
"""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType

import torch

from .errors import BorrowedTensor, Closed, PoolTimeout, StaleLease
from .guards import Guard
from .manifest import Manifest, TensorSpec, format_name
from .memory import Pool
from .sources.contracts import Addressed, Read, Reading, Source, Stream

__all__ = [
    "POOL_CONTRACT",
    "SOURCE_CONTRACT",
    "FailingSource",
    "ManualEvent",
    "ReusedBuffer",
    "assert_same_bits",
    "bits",
    "write_checkpoint",
    "write_safetensors",
]

Tensors = Mapping[str, torch.Tensor]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes, ``uint8 [nbytes]``, a copy: NaN equals itself and -0.0 differs from 0.0."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).clone()


def assert_same_bits(found: Tensors, expected: Tensors) -> None:
    """Same names, dtypes, shapes and bytes."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, f"{name}: {found[name].dtype}, expected {tensor.dtype}"
        assert found[name].shape == tensor.shape, f"{name}: {found[name].shape}, expected {tensor.shape}"
        assert torch.equal(bits(found[name]), bits(tensor)), f"{name}: other bytes"


# --- tiny checkpoints ------------------------------------------------------------------------------------------------


def write_safetensors(path: str | Path, tensors: Tensors, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file in the mapping's order; in our own words, to compare with the reference's."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    data = bytearray()
    for name, tensor in tensors.items():
        raw = bytes(bits(tensor).tolist())
        shape = list(tensor.shape)
        if tensor.dtype == getattr(torch, "float4_e2m1fn_x2", None):
            shape[-1] *= 2
        header[name] = {
            "dtype": format_name(tensor.dtype),
            "shape": shape,
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (
        -len(text) % 8
    )  # As the reference pads it, so that tensors are aligned unless the mapping says otherwise.
    Path(path).write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_checkpoint(directory: str | Path, tensors: Tensors, *, shards: int = 1) -> Path:
    """Write a checkpoint directory: one file, or several and an index, tensors dealt out in turn."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        write_safetensors(directory / "model.safetensors", tensors)
        return directory
    names = [f"model-{number + 1:05}-of-{shards:05}.safetensors" for number in range(shards)]
    weight_map = {name: names[position % shards] for position, name in enumerate(tensors)}
    for shard in names:
        write_safetensors(directory / shard, {name: tensors[name] for name in tensors if weight_map[name] == shard})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


# --- faults ----------------------------------------------------------------------------------------------------------


class ManualEvent:
    """An event that happens when the test says so."""

    def __init__(self) -> None:
        self._happened = threading.Event()

    def query(self) -> bool:
        """Has it happened?"""
        return self._happened.is_set()

    def happen(self) -> None:
        """Let it happen."""
        self._happened.set()


class ReusedBuffer:
    """Gives every tensor in the same memory, filled with 0xFF as soon as the iterator advances or ends.

    It does at once what a reader that uses its buffers again does sooner or later: whoever keeps a tensor finds NaN in
    it, or the tensor that came after it. Can be iterated again and again.
    """

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self._memory = torch.empty(max((tensor.nbytes for tensor in tensors.values()), default=0), dtype=torch.uint8)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._tensors.items():
            lent = self._memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            lent.copy_(tensor)
            try:
                yield name, lent
            finally:
                self._memory.fill_(0xFF)


class FailingSource:
    """An addressed source that raises ``error`` at its read, or its tensor, number ``at``, counted from 0."""

    def __init__(self, source: Addressed, *, at: int, error: BaseException) -> None:
        self._source = source
        self._at = at
        self._error = error

    @property
    def manifest(self) -> Manifest:
        """That of the source."""
        return self._source.manifest

    def position(self, name: str) -> tuple[int, int]:
        """That of the source."""
        return self._source.position(name)

    def leases(self, *, guard: Guard = "off") -> Stream:
        """Those of the source."""
        return self._source.leases(guard=guard)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Those of the source, up to the fault."""
        for number, pair in enumerate(self._source.tensors()):
            if number == self._at:
                raise self._error
            yield pair

    def read(
        self,
        reads: Iterable[Read],
        *,
        pool: Pool,
        reading: Reading = "auto",
        threads: int | None = None,
        advance: Callable[[int], None] | None = None,
        stop: threading.Event | None = None,
    ) -> dict[str, int]:
        """Do the reads one after another, in the given order, up to the fault."""
        roads: dict[str, int] = {}
        for read in reads:
            self._at -= 1
            if self._at < 0:
                raise self._error
            one = self._source.read([read], pool=pool, reading=reading, threads=1, advance=advance, stop=stop)
            roads = {road: roads.get(road, 0) + count for road, count in one.items()}
        return roads

    def close(self) -> None:
        """Close the source."""
        self._source.close()

    def __enter__(self) -> FailingSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# --- the contract of a source ----------------------------------------------------------------------------------------

MakeSource = Callable[[], Source]


def promises_what_it_holds(make: MakeSource, expected: Tensors) -> None:
    """The manifest names every tensor with its dtype, shape and size."""
    with make() as source:
        assert set(source.manifest) == set(expected)
        for name, tensor in expected.items():
            spec = source.manifest[name]
            assert spec == TensorSpec(name, tensor.dtype, tuple(tensor.shape))
            assert spec.nbytes == tensor.numel() * tensor.element_size()
        assert source.manifest.nbytes == sum(tensor.numel() * tensor.element_size() for tensor in expected.values())


def leases_carry_every_tensor_once(make: MakeSource, expected: Tensors) -> None:
    """Every tensor comes once, with its own bytes, under every guard."""
    for guard in ("off", "poison", "trap"):
        with make() as source, source.leases(guard=guard) as stream:
            found: dict[str, torch.Tensor] = {}
            for lease in stream:
                assert lease.name not in found
                assert lease.tensor.shape == expected[lease.name].shape
                found[lease.name] = lease.tensor.clone()
        assert_same_bits(found, expected)


def leases_end_when_the_stream_advances(make: MakeSource, expected: Tensors) -> None:
    """A lease that the stream has passed says so, and leaving the ``with`` ends the last one."""
    with make() as source:
        with source.leases() as stream:
            passed = list(stream)
        assert len(passed) == len(expected)
        for lease in passed:
            _raises(StaleLease, partial(getattr, lease, "tensor"))


def owned_tensors_outlive_their_lease(make: MakeSource, expected: Tensors) -> None:
    """``own()`` gives tensors at addresses of their own that keep their bytes when the stream has ended."""
    for guard in ("off", "poison", "trap"):
        with make() as source, source.leases(guard=guard) as stream:
            owned = {lease.name: lease.own() for lease in stream}
        assert_same_bits(owned, expected)
        _assert_apart(owned.values())


def tensors_are_owned(make: MakeSource, expected: Tensors) -> None:
    """``tensors()`` yields what a caller may keep and overwrite; neither a neighbour nor the source notices."""
    with make() as source:
        owned = dict(source.tensors())
        assert_same_bits(owned, expected)
        _assert_apart(owned.values())
        for tensor in owned.values():
            tensor.view(torch.uint8).fill_(0xA5) if tensor.numel() and tensor.ndim else tensor.zero_()
        assert_same_bits(dict(source.tensors()), expected)


def streams_can_be_left_early(make: MakeSource, expected: Tensors) -> None:
    """Leaving a stream after any tensor, with a lease in hand or not, neither hangs nor spoils the next stream."""
    for count in range(len(expected) + 1):
        with make() as source:
            with source.leases() as stream:
                held = [next(stream) for _ in range(count)]
            for lease in held:
                _raises(StaleLease, partial(getattr, lease, "tensor"))
            stream.close()
            with source.leases() as again:
                assert {lease.name for lease in again} == set(expected)


def a_trap_names_the_stale_tensor(make: MakeSource, expected: Tensors) -> None:
    """Under ``guard="trap"`` a borrowed tensor, and every view of it, raises at its first use after the lease."""
    with make() as source, source.leases(guard="trap") as stream:
        views: list[tuple[str, torch.Tensor]] = []
        for lease in stream:
            if lease.borrowed and expected[lease.name].numel():
                views += [(lease.name, lease.tensor), (lease.name, lease.tensor.unsqueeze(0).data)]
                _raises(BorrowedTensor, lease.tensor.data_ptr)
        stream.close()
        for name, view in views:
            assert repr(name) in str(_raises(StaleLease, view.clone))


def a_closed_source_says_so(make: MakeSource, expected: Tensors) -> None:
    """``close`` may be called twice; streaming a closed source raises ``Closed``."""
    source = make()
    source.close()
    source.close()
    _raises(Closed, lambda: list(source.leases()))
    _raises(Closed, lambda: list(source.tensors()))


def reads_any_bytes_into_any_memory(make: MakeSource, expected: Tensors) -> None:
    """An addressed source: every range of every tensor, in any order, into memory and through sinks, by every road."""
    with make() as source:
        if not isinstance(source, Addressed):
            return
        for reading in ("auto", "buffered", "direct"):
            with Pool(2, 64 * 1024) as pool:
                _read_ranges(source, pool, reading, expected)


def _read_ranges(source: Addressed, pool: Pool, reading: Reading, expected: Tensors) -> None:
    reads: list[Read] = []
    wanted: list[tuple[str, torch.Tensor, list[torch.Tensor]]] = []
    for name, tensor in reversed(list(expected.items())):
        whole = bits(tensor)
        for start, stop in {(0, len(whole)), (len(whole) // 3, len(whole)), (len(whole) // 2, len(whole) // 2 + 1)}:
            stop = min(stop, len(whole))
            if start < stop:
                memory, seen = torch.zeros(stop - start, dtype=torch.uint8), list[torch.Tensor]()
                reads.append(Read(name, start, stop - start, memory))
                wanted.append((name, whole[start:stop], [memory]))
                if stop - start <= pool.slot_nbytes // 2:
                    reads.append(Read(name, start, stop - start, partial(_keep, seen)))
                    wanted.append((name, whole[start:stop], seen))
    counted: list[int] = []
    roads = source.read(reads, pool=pool, reading=reading, advance=counted.append)
    assert sum(roads.values()) == sum(counted) == sum(read.nbytes for read in reads)
    for name, right, found in wanted:
        assert len(found) == 1, f"{name}: a sink was called {len(found)} times"
        assert torch.equal(found[0], right), f"{name}: other bytes by road {reading}"
    assert pool.stats().leased == 0


def _keep(seen: list[torch.Tensor], raw: torch.Tensor) -> None:
    seen.append(raw.clone())


SOURCE_CONTRACT: tuple[Callable[[MakeSource, Tensors], None], ...] = (
    promises_what_it_holds,
    leases_carry_every_tensor_once,
    leases_end_when_the_stream_advances,
    owned_tensors_outlive_their_lease,
    tensors_are_owned,
    streams_can_be_left_early,
    a_trap_names_the_stale_tensor,
    a_closed_source_says_so,
    reads_any_bytes_into_any_memory,
)
"""What every source must do. Each check takes what makes the source, and the tensors it holds."""


# --- the contract of a pool ------------------------------------------------------------------------------------------

MakePool = Callable[[int, int, Guard], Pool]  # slots, slot_nbytes, guard


def never_more_than_its_slots(make: MakePool) -> None:
    """It hands out each of its slots once; their memories are apart, page-aligned and of the promised size."""
    with make(3, 4096, "off") as pool:
        slots = [pool.acquire(f"holder {number}") for number in range(3)]
        for number, slot in enumerate(slots):
            assert slot.memory.numel() == pool.slot_nbytes
            assert slot.memory.data_ptr() % 4096 == 0
            slot.memory.fill_(number)
        assert all(bool((slot.memory == number).all()) for number, slot in enumerate(slots))
        assert pool.stats().leased == pool.stats().peak == 3
        for slot in slots:
            slot.release()
        assert pool.stats().leased == 0
        assert pool.stats().peak == 3


def a_wait_in_vain_names_the_holders(make: MakePool) -> None:
    """Past its deadline a wait raises ``PoolTimeout`` that says who holds the slots."""
    with make(2, 4096, "off") as pool:
        held = [pool.acquire("model.embed"), pool.acquire("model.head")]
        message = str(_raises(PoolTimeout, lambda: pool.acquire("model.norm", timeout=0.01)))
        assert all(name in message for name in ("model.embed", "model.head", "model.norm"))
        held[0].release()
        pool.acquire("model.norm", timeout=0.01)


def close_ends_every_wait(make: MakePool) -> None:
    """A thread that waits for a slot is woken with ``Closed`` when the pool closes, and when its ``stop`` says so."""
    for end in ("close", "stop"):
        pool, stop, ended = make(1, 4096, "off"), threading.Event(), list[BaseException]()
        pool.acquire("somebody")
        asked = threading.Event()

        def stopped(stop: threading.Event = stop, asked: threading.Event = asked) -> bool:
            asked.set()
            return stop.is_set()

        def wait(pool: Pool = pool, stopped: Callable[[], bool] = stopped, ended: list[BaseException] = ended) -> None:
            ended.append(_raises(Closed, lambda: pool.acquire("waiter", timeout=60, stop=stopped)))

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        assert asked.wait(30)
        if end == "close":
            pool.close()
        else:
            stop.set()
            pool.wake()
        thread.join(30)
        assert not thread.is_alive(), f"the wait outlived {end}"
        assert ended
        pool.close()
        _raises(Closed, partial(pool.acquire, "late"))


def a_slot_waits_for_its_events(make: MakePool) -> None:
    """Released ``after`` an event, a slot is not handed out before the event has happened."""
    with make(1, 4096, "off") as pool:
        for way in ("slot", "lease"):
            slot, event = pool.acquire("copying"), ManualEvent()
            if way == "slot":
                slot.release(event)
            else:
                lease = slot.lease(TensorSpec("w", torch.uint8, (8,)), 0)
                slot.release()
                lease.release(after=event)
            assert "has not finished" in str(_raises(PoolTimeout, lambda: pool.acquire("next", timeout=0.01)))
            event.happen()
            pool.acquire("next", timeout=10).release()


def a_slot_outlives_its_leases(make: MakePool) -> None:
    """A slot comes back when its holder and every lease out of it have let go, in any order."""
    with make(1, 4096, "off") as pool:
        for last in range(3):
            slot = pool.acquire("holder")
            leases = [slot.lease(TensorSpec(f"w{number}", torch.uint8, (8,)), 64 * number) for number in range(2)]
            ends: list[Callable[[], None]] = [slot.release, leases[0].release, leases[1].release]
            for end in (*ends[:last], *ends[last + 1 :]):
                end()
            _raises(PoolTimeout, lambda: pool.acquire("early", timeout=0.01))
            ends[last]()
            pool.acquire("next", timeout=10).release()


def poison_fills_what_comes_back(make: MakePool) -> None:
    """Under a guard, memory of an ended lease holds NaN where the dtype has one, and changes in any case."""
    for guard in ("poison", "trap"):
        with make(1, 4096, guard) as pool:
            for dtype in (
                torch.float32,
                torch.bfloat16,
                torch.float8_e4m3fn,
                torch.float8_e4m3fnuz,
                torch.int16,
                torch.bool,
            ):
                for deferred in (False, True):
                    slot = pool.acquire("holder")
                    slot.memory.zero_()
                    stale = slot.memory[: 4 * dtype.itemsize].view(dtype)
                    lease, event = slot.lease(TensorSpec("w", dtype, (4,)), 0), ManualEvent()
                    slot.release()
                    lease.release(after=event if deferred else None)
                    event.happen()
                    pool.acquire("next").release()
                    assert bool(bits(stale).all()), f"{dtype} was not poisoned"
                    if dtype.is_floating_point:
                        assert bool(stale.float().isnan().all()), f"{dtype} holds {stale.float()}"
                    assert not bool(slot.memory[4 * dtype.itemsize :].any()), "poison beyond the lease"


POOL_CONTRACT: tuple[Callable[[MakePool], None], ...] = (
    never_more_than_its_slots,
    a_wait_in_vain_names_the_holders,
    close_ends_every_wait,
    a_slot_waits_for_its_events,
    a_slot_outlives_its_leases,
    poison_fills_what_comes_back,
)
"""What every pool must do. Each check takes what makes a pool of so many slots of so many bytes with a guard."""


def _raises(kind: type[BaseException], act: Callable[[], object]) -> BaseException:
    try:
        act()
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} was not raised")


def _assert_apart(tensors: Iterable[torch.Tensor]) -> None:
    spans = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors if t.numel())
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(spans)), "tensors share memory"
