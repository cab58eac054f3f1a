"""The contract of a pool, as checks that each take what makes one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import torch

from ...errors import Closed, PoolTimeout
from ...manifest import TensorSpec
from ...memory.guards import Guard
from ...memory.pool import Pool
from ..checks import bits, raised
from ..faults import ManualEvent

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
        message = str(raised(PoolTimeout, lambda: pool.acquire("model.norm", timeout=0.01)))
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
            ended.append(raised(Closed, lambda: pool.acquire("waiter", timeout=60, stop=stopped)))

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
        raised(Closed, partial(pool.acquire, "late"))


def a_slot_waits_for_its_events(make: MakePool) -> None:
    """Released ``after`` an event, a slot is not handed out before the event has happened."""
    with make(1, 4096, "off") as pool:
        for released in ("slot", "lease"):
            slot, event = pool.acquire("copying"), ManualEvent()
            if released == "slot":
                slot.release(event)
            else:
                lease = slot.lease(TensorSpec("w", torch.uint8, (8,)), 0)
                slot.release()
                lease.release(after=event)
            assert "has not finished" in str(raised(PoolTimeout, lambda: pool.acquire("next", timeout=0.01)))
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
            raised(PoolTimeout, lambda: pool.acquire("early", timeout=0.01))
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
