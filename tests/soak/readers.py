"""Threads: readers within ``serving()``, tasks among them, see one version; another thread updates, fails and mends."""

import asyncio
import itertools
import threading
import time

from layers import WAYS, fault_of, live_model, numbers_in, streamed, version_of

import hotweights as hw

NAME, WEIGHT = "threads", 1
_READERS, _TASKS = 3, 3


def run(tally, draw, until, folder):
    end = threading.Event()
    live = live_model("staged")
    live.load(version_of(0), version=0)
    readers = [threading.Thread(target=_read, args=(tally, live, end), daemon=True) for _ in range(_READERS)]
    readers.append(threading.Thread(target=lambda: asyncio.run(_tasks(tally, live, end)), daemon=True))
    for reader in readers:
        reader.start()
    try:
        for number in itertools.count(1):
            if time.monotonic() > until:
                break
            _update(tally, draw, live, number)
    finally:
        end.set()
        for reader in readers:
            reader.join(20)
            if reader.is_alive():
                tally.fault("a reader does not end")


def _update(tally, draw, live, number):
    atomic = draw.choice(WAYS)
    before = live.version
    fails = draw.random() < 0.3
    source = _failing(draw, number) if fails else draw.choice((version_of, streamed))(number)
    try:
        live.update(source, version=number, atomic=atomic)
        tally.add("updates")
    except hw.UpdateAborted as error:
        tally.add("failed updates")
        if not fails or live.version != before:
            tally.fault(f"{atomic}, {live!r} was {before}", error)
    if live.state is hw.State.TORN and atomic is not False:
        tally.fault(f"{live!r} is torn")
    if wrong := fault_of(live):
        tally.fault(f"{atomic}: {wrong}")
    if live.state is hw.State.TORN:
        live.update(version_of(number), version=number)


def _failing(draw, number):
    tensors = version_of(number)
    last = draw.randrange(len(tensors))

    def pairs():
        for position, pair in enumerate(tensors.items()):
            if position == last:
                raise OSError("the stream broke off")
            yield pair

    return hw.from_iterator(pairs(), hw.open(tensors).manifest)


def _read(tally, live, end):
    while not end.is_set():
        try:
            with live.serving(timeout=20) as version:
                for _ in range(2):
                    found = numbers_in(live.model)
                    if found != {float(version)}:
                        tally.fault(f"a reader of version {version} found {sorted(found)}")
                with live.serving(timeout=20) as again:
                    if again != version:
                        tally.fault(f"a reader of version {version} reads {again} within")
            tally.add("reads")
        except hw.LiveModelError:
            tally.add("refused reads")  # torn
            time.sleep(0.001)
        except BaseException as error:
            tally.fault("a reader", error)


async def _tasks(tally, live, end):
    """Readers that overlap, each of them with a nested one."""
    await asyncio.gather(*(_task(tally, live, end) for _ in range(_TASKS)))


async def _task(tally, live, end):
    while not end.is_set():
        try:
            async with live.serving(timeout=20) as version:
                for _ in range(2):
                    await asyncio.sleep(0)
                    if (found := numbers_in(live.model)) != {float(version)}:
                        tally.fault(f"a task that reads version {version} found {sorted(found)}")
                async with live.serving(timeout=20) as again:
                    if again != version:
                        tally.fault(f"a task that reads version {version} reads {again} within")
            tally.add("reads by tasks")
        except hw.LiveModelError:
            tally.add("refused reads")  # torn
            await asyncio.sleep(0.001)
        except BaseException as error:
            tally.fault("a task", error)
