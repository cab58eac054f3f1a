"""Tasks of one event loop read a live model while it is updated. Nothing here sleeps: tasks meet at events."""

import asyncio
import contextvars
import inspect
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from ends import Thread
from torch import nn

import hotweights as hw
from hotweights import signals
from hotweights.live.lock import ReadWriteLock

WAIT = 30  # seconds after which a test is wrong, not slow


def version_of(number):
    return {"weight": torch.full((4, 4), float(number)), "bias": torch.full((4,), float(number))}


def live_model(atomic="staged"):
    live = hw.LiveModel(nn.Linear(4, 4), atomic=atomic, keep_previous=atomic is not False)
    live.load(version_of(1), version=1)
    return live


def values(live):
    return {float(value) for tensor in live.model.state_dict().values() for value in tensor.flatten()}


def run(work):
    async def within():
        async with asyncio.timeout(WAIT):
            return await work

    return asyncio.run(within())


async def waits_to_write(live):
    """Until an update, in another thread, waits for readers."""
    while not live._current.guard._waiting:
        await asyncio.sleep(0)


async def awaits(live):
    """Until a task waits to read."""
    while not live._current.guard._awaiting:
        await asyncio.sleep(0)


def refused(act):
    with pytest.raises(hw.UsageError, match="it cannot"):
        act()


@pytest.mark.parametrize("atomic", ["staged", "journal", False])
def test_tasks_that_overlap_do_not_starve_an_update(atomic):
    """Each one begins before the one before it ends, for ever; the update still gets its turn."""
    live = live_model(atomic)

    async def main():
        seen, done = [], asyncio.Event()

        async def reader(entered, may_end):
            async with live.serving() as version:
                entered.set()
                await may_end.wait()
                seen.append((version, values(live)))

        async def overlapping():
            pending = []
            while not done.is_set():
                entered, may_end = asyncio.Event(), asyncio.Event()
                pending.append((entered, asyncio.create_task(reader(entered, may_end)), may_end))
                for _ in range(3):
                    await asyncio.sleep(0)
                if len(pending) > 1:
                    # Who came later may have entered first; who waits behind the update waits for that one too.
                    pending.sort(key=lambda item: not item[0].is_set())
                    _, task, end = pending.pop(0)
                    end.set()
                    # Once an update waits, the newer one waits behind it.
                    await task
            for _, task, end in pending:
                end.set()
                await task

        readers = asyncio.create_task(overlapping())
        await asyncio.sleep(0)
        report = await live.update_async(version_of(2), version=2)
        done.set()
        await readers
        return report, seen

    report, seen = run(main())
    assert report.version == 2
    assert all(found == {float(version)} for version, found in seen)
    assert values(live) == {2.0}


def test_a_task_that_comes_waits_behind_the_update_and_a_nested_one_does_not():
    live = live_model()

    async def main():
        async def nested():
            async with live.serving(0) as version:
                return version

        def in_a_thread():
            with live.serving(0) as version:
                return version

        async with live.serving():
            update = apart(live.update_async(version_of(2), version=2))
            await waits_to_write(live)
            late = apart(reading(live))
            await awaits(live)
            assert await nested() == 1
            assert await asyncio.create_task(nested()) == 1  # It was started by a holder, which may wait for it.
            assert await asyncio.to_thread(in_a_thread) == 1
            assert not late.done()
        assert (await update).version == 2
        assert await late in (1, 2)  # The update waits twice: to plan, and to commit.

    run(main())


def apart(work):
    """A task that does not come of the one that starts it."""
    return asyncio.get_running_loop().create_task(work, context=contextvars.Context())


async def reading(live, timeout=None):
    async with live.serving(timeout) as version:
        assert values(live) == {float(version)}
        return version


def test_with_in_coroutines_is_held_by_several_and_let_go_in_any_order():
    live = live_model()

    async def main():
        ends = [asyncio.Event() for _ in range(3)]
        entered = []

        async def reader(number):
            with live.serving() as version:
                entered.append(number)
                await ends[number].wait()
                return version, values(live)

        tasks = [asyncio.create_task(reader(number)) for number in range(2)]
        while len(entered) < 2:
            await asyncio.sleep(0)
        refused(lambda: live.update(version_of(2)))  # The loop would stand still, and no reader could leave.
        update = asyncio.create_task(live.update_async(version_of(2), version=2))
        await waits_to_write(live)
        tasks.append(asyncio.create_task(reader(2)))  # It cannot wait without keeping the others from ending.
        while len(entered) < 3:
            await asyncio.sleep(0)
        for number in (0, 2, 1):
            ends[number].set()
            assert await tasks[number] == (1, {1.0})
        assert (await update).version == 2

    run(main())


def test_a_coroutine_rolls_back_while_another_one_reads():
    live = live_model()
    live.update(version_of(2), version=2)

    async def main():
        entered, leave = asyncio.Event(), asyncio.Event()

        async def reader():
            async with live.serving() as version:
                entered.set()
                await leave.wait()
                return version

        reads = asyncio.create_task(reader())
        await entered.wait()
        with pytest.raises(
            hw.UsageError, match=r"another task of this thread reads the model; .*await rollback_async\(\)"
        ):
            live.rollback()
        back = asyncio.create_task(live.rollback_async(timeout=WAIT))
        await waits_to_write(live)
        leave.set()
        assert (await reads, await back) == (2, 1)
        with pytest.raises(hw.LiveModelError, match="taken back already"):
            await live.rollback_async()

    run(main())
    assert values(live) == {1.0}
    assert inspect.signature(hw.LiveModel.rollback_async) == inspect.signature(hw.LiveModel.rollback)


def test_who_would_wait_for_itself_is_told():
    live = live_model("journal")
    live.update(version_of(2))

    async def main():
        async with live.serving():
            refused(lambda: live.update(version_of(2)))  # a task
            for work in (live.update_async(version_of(2)), live.rollback_async()):
                with pytest.raises(
                    hw.UsageError, match=r"it cannot update or roll back there\. Leave serving\(\) first"
                ):
                    await work  # what a task waits for
        with live.begin() as update:
            update.feed(version_of(2))
            with pytest.raises(hw.UsageError, match="this thread is writing"):
                await reading(live)
            with pytest.raises(hw.UsageError, match="this thread is writing"), live.serving():
                pass
            other = apart(reading(live))
            await awaits(live)  # Another task waits.
            update.commit(2)
        assert await other == 2

    run(main())


def test_a_hold_may_end_in_another_thread():
    """Frameworks enter and leave in threads of a pool."""
    live = live_model()
    serving = live.serving()
    Thread(serving.__enter__).result()
    with pytest.raises(hw.UpdateAborted, match="being read"):
        live.update(version_of(2), timeout=0)
    Thread(serving.__exit__).result()
    live.update(version_of(2), timeout=0)


def test_timeouts_of_a_reader():
    live = live_model("journal")

    async def main():
        with live.begin() as update:
            update.feed(version_of(2))
            for timeout in (0, 0.01):
                with pytest.raises(TimeoutError, match="an update is writing"):
                    await apart(reading(live, timeout))
        assert not live._current.guard._awaiting
        assert await reading(live, 0) == 1

    run(main())


def test_an_update_that_has_no_thread_yet_is_cancelled_at_once():
    live, go_on = live_model(), threading.Event()

    async def main():
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1) as only:
            loop.set_default_executor(only)
            try:
                busy = loop.run_in_executor(None, go_on.wait)
                update = asyncio.create_task(live.update_async(version_of(2), version=2))
                await asyncio.sleep(0)  # It has begun, and waits for the thread.
                update.cancel()
                for _ in range(20):
                    await asyncio.sleep(0)
                assert update.cancelled()
                assert not busy.done()
            finally:
                go_on.set()
            await busy
            await live.update_async(version_of(3), version=3)
        assert (live.version, live.status()["committed"]) == (3, 2)

    run(main())


def test_a_thread_behind_an_update_that_waits_is_told_that_nothing_is_written():
    live = live_model()

    def forward():
        with live.serving(0.01) as version:
            return version

    async def main():
        entered = asyncio.Event()

        async def updates():  # Begun outside of serving().
            await entered.wait()
            await live.update_async(version_of(2), version=2)

        update = asyncio.create_task(updates())
        async with live.serving():
            entered.set()
            await waits_to_write(live)
            with pytest.raises(TimeoutError, match=r"waits until 1 of serving\(\).*nothing is written yet.*to_thread"):
                await asyncio.get_running_loop().run_in_executor(None, forward)
            assert await asyncio.to_thread(forward) == 1  # What it advises.
        await update

    run(main())


def test_a_reader_that_is_cancelled_while_it_waits_holds_nothing():
    live = live_model("journal")

    async def main():
        with live.begin() as update:
            update.feed(version_of(2))
            waiting = apart(reading(live))
            await awaits(live)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        await live.update_async(version_of(3), version=3, timeout=0)

    run(main())


@pytest.mark.parametrize("atomic", ["staged", "journal", False])
def test_an_update_that_waits_too_long_for_readers_is_aborted(atomic):
    live = live_model(atomic)
    inside, go = threading.Event(), threading.Event()

    def read():
        with live.serving() as version:
            inside.set()
            assert go.wait(WAIT)
            return version, values(live)

    reader = Thread(read)
    assert inside.wait(WAIT)
    told = (
        r"version 's2' was not taken; version 1 is live: waited 0\.01 seconds.*Nothing is wrong with the version: try"
    )
    with pytest.raises(hw.UpdateAborted, match=told) as caught:
        live.update(version_of(2), version="s2", timeout=0.01)
    assert isinstance(caught.value.__cause__, TimeoutError)
    assert (live.version, live.state) == (1, hw.State.SERVING)
    assert run(reading(live, 0)) == 1  # Nobody waits any more.
    go.set()
    assert reader.result() == (1, {1.0})
    live.update(version_of(2), version=2, timeout=0)


def test_the_commit_of_an_update_by_hand_has_what_is_left_of_the_timeout():
    live = live_model()
    inside, go = threading.Event(), threading.Event()

    def read():
        with live.serving():
            inside.set()
            assert go.wait(WAIT)

    with live.begin(timeout=0.01) as update:
        update.feed(version_of(2))
        update.prepare()
        reader = Thread(read)
        assert inside.wait(WAIT)
        with pytest.raises(hw.UpdateAborted, match="being read"):
            update.commit(2)
    assert values(live) == {1.0}
    go.set()
    reader.result()


@pytest.mark.parametrize("timeout", [-1, float("nan"), "5", True])
def test_a_timeout_is_seconds(timeout):
    live = live_model()
    for act in (lambda: live.serving(timeout), lambda: live.update(version_of(2), timeout=timeout)):
        with pytest.raises(hw.UsageError, match="timeout= is"):
            act()
    assert values(live) == {1.0}


def blocked(live, number):
    """A source whose second tensor comes when it is told to."""
    asked, go = threading.Event(), threading.Event()

    def pairs():
        for position, pair in enumerate(version_of(number).items()):
            if position:
                asked.set()
                assert go.wait(WAIT)
            yield pair

    return hw.from_iterator(pairs(), hw.open(version_of(number)).manifest), asked, go


@pytest.mark.parametrize("atomic", ["staged", "journal"])
def test_who_cancels_an_update_aborts_it(atomic):
    live = live_model(atomic)

    async def main():
        source, asked, go = blocked(live, 2)
        update = asyncio.create_task(live.update_async(source, version=2))
        while not asked.is_set():
            await asyncio.sleep(0)
        update.cancel()
        await asyncio.sleep(0)
        assert not update.done()  # It waits for the thread.
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await update
        assert (live.version, live.state, values(live)) == (1, hw.State.SERVING, {1.0})
        assert await reading(live, 0) == 1
        assert (await live.update_async(version_of(3), version=3)).version == 3

    run(main())


def test_who_cancels_an_update_twice_does_not_wait_and_it_is_aborted_all_the_same():
    live = live_model()

    async def main():
        source, asked, go = blocked(live, 2)
        update = asyncio.create_task(live.update_async(source, version=2))
        while not asked.is_set():
            await asyncio.sleep(0)
        for _ in range(2):
            update.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await update
        assert live.state is hw.State.UPDATING
        go.set()

    run(main())  # It waits for the threads of its executor.
    assert (live.version, live.state, values(live)) == (1, hw.State.SERVING, {1.0})


def test_an_update_that_waits_for_readers_can_be_cancelled():
    live = live_model()

    async def main():
        async with live.serving():
            update = apart(live.update_async(version_of(2)))
            await waits_to_write(live)
            update.cancel()
            with pytest.raises(asyncio.CancelledError):
                await update
        assert live.state is hw.State.SERVING

    run(main())
    assert values(live) == {1.0}


@pytest.mark.parametrize("atomic", ["staged", "journal"])
def test_ctrl_c_in_asyncio_run_leaves_one_version_and_the_handlers(atomic):
    live, before = live_model(atomic), signal.getsignal(signal.SIGINT)

    async def main():
        source, asked, go = blocked(live, 2)
        reader = asyncio.Event()

        async def read():
            async with live.serving():
                reader.set()
                await asyncio.Event().wait()

        async def strike():
            while not asked.is_set():
                await asyncio.sleep(0)
            reads = asyncio.create_task(read())  # With "journal" it waits for the update.
            if atomic == "staged":
                await reader.wait()
            signal.raise_signal(signal.SIGINT)
            for _ in range(3):  # The main task is cancelled first.
                await asyncio.sleep(0)
            go.set()
            await reads

        strikes = asyncio.create_task(strike())
        await live.update_async(source, version=2)
        await strikes

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())
    assert (live.version, live.state, values(live)) == (1, hw.State.SERVING, {1.0})
    assert signal.getsignal(signal.SIGINT) is before
    live.update(version_of(3), version=3, timeout=0)


def test_a_reader_whose_leaving_was_cut_short_holds_nothing():
    """Ctrl-C at the first instruction of ``__aexit__``, in a loop whose handler raises."""
    live = live_model()

    async def main():
        serving = live.serving()
        await serving.__aenter__()

    run(main())
    live.update(version_of(2), timeout=0)


def test_a_closed_loop_is_not_woken():
    lock = ReadWriteLock()
    hold = lock.begin_writing()
    loop = asyncio.new_event_loop()
    lock._awaiting.append(loop.create_future())
    loop.close()
    lock.end_writing(hold)
    lock.end_reading(lock.begin_reading(0))


def test_update_async_takes_what_update_takes():
    """A new argument of one is one of the other."""
    assert inspect.signature(hw.LiveModel.update_async) == inspect.signature(hw.LiveModel.update)


def test_a_serving_that_is_entered_is_not_entered_again():
    """The first hold would be lost, and every update would wait for it."""
    live = live_model()
    serving = live.serving()
    with serving, pytest.raises(hw.UsageError, match=r"entered already; call serving\(\) for each with"):
        serving.__enter__()

    async def tasks():
        async with serving:
            with pytest.raises(hw.UsageError, match="entered already"):
                await serving.__aenter__()

    run(tasks())
    with serving as number:
        assert number == 1
    assert live.update(version_of(2), timeout=WAIT).version == 2


@pytest.mark.parametrize("writes", [True, False])
def test_work_that_is_stopped_while_it_takes_the_lock_does_not_lose_it(writes):
    """Cancelled as it took its turn to write, an update left the model locked for good."""
    lock, stop = ReadWriteLock(), signals.Stop()
    holds = []

    def work():
        stop.asked = True
        holds.append(lock.begin_writing() if writes else lock.begin_reading(None))

    with suppress(signals.Stopped):
        stop.run(work)
    for hold in holds:
        (lock.end_writing if writes else lock.end_reading)(hold)
    with lock.writing(timeout=0.5):
        pass
