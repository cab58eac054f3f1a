"""The contract of a source, as checks that each take what makes one and the tensors that it holds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ...errors import BorrowedTensor, Closed, StaleLease
from ...manifest import TensorSpec
from ...memory.pool import Pool
from ...sources.contracts import Addressed, IOMode, Read, Source
from ..checks import Tensors, assert_apart, assert_same_bits, bits, raised

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
            copies: dict[str, torch.Tensor] = {}
            for lease in stream:
                assert lease.name not in copies
                assert lease.tensor.shape == expected[lease.name].shape
                copies[lease.name] = lease.tensor.clone()
        assert_same_bits(copies, expected)


def leases_end_when_the_stream_advances(make: MakeSource, expected: Tensors) -> None:
    """A lease that the stream has passed says so, and leaving the ``with`` ends the last one."""
    with make() as source:
        with source.leases() as stream:
            passed = list(stream)
        assert len(passed) == len(expected)
        for lease in passed:
            raised(StaleLease, partial(getattr, lease, "tensor"))


def owned_tensors_outlive_their_lease(make: MakeSource, expected: Tensors) -> None:
    """``own()`` gives tensors at addresses of their own that keep their bytes when the stream has ended."""
    for guard in ("off", "poison", "trap"):
        with make() as source, source.leases(guard=guard) as stream:
            owned = {lease.name: lease.own() for lease in stream}
        assert_same_bits(owned, expected)
        assert_apart(owned.values())


def tensors_are_owned(make: MakeSource, expected: Tensors) -> None:
    """``tensors()`` yields what a caller may keep and overwrite; neither a neighbour nor the source notices."""
    with make() as source:
        owned = dict(source.tensors())
        assert_same_bits(owned, expected)
        assert_apart(owned.values())
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
                raised(StaleLease, partial(getattr, lease, "tensor"))
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
                raised(BorrowedTensor, lease.tensor.data_ptr)
        stream.close()
        for name, view in views:
            assert repr(name) in str(raised(StaleLease, view.clone))


def a_closed_source_says_so(make: MakeSource, expected: Tensors) -> None:
    """``close`` may be called twice; streaming a closed source raises ``Closed``."""
    source = make()
    source.close()
    source.close()
    raised(Closed, lambda: list(source.leases()))
    raised(Closed, lambda: list(source.tensors()))


def reads_any_bytes_into_any_memory(make: MakeSource, expected: Tensors) -> None:
    """An addressed source: every range of every tensor, in any order, into memory and sinks, by every I/O path."""
    with make() as source:
        if not isinstance(source, Addressed):
            return
        for io in ("auto", "buffered", "direct"):
            with Pool(2, 64 * 1024) as pool:
                _read_ranges(source, pool, io, expected)


def _read_ranges(source: Addressed, pool: Pool, io: IOMode, expected: Tensors) -> None:
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
    bytes_by_io = source.read(reads, pool=pool, io=io, advance=counted.append)
    assert sum(bytes_by_io.values()) == sum(counted) == sum(read.nbytes for read in reads)
    for name, part, filled in wanted:
        assert len(filled) == 1, f"{name}: a sink was called {len(filled)} times"
        assert torch.equal(filled[0], part), f"{name}: other bytes by io={io}"
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
