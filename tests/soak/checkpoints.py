"""Files: a process replaces a checkpoint by renaming its directory, while loads and updates run."""

import contextlib
import itertools
import os
import shutil
import time

from children import Child
from layers import WAYS, Layers, live_model, numbers_in, version_of

import hotweights as hw
from hotweights.testing import write_checkpoint

NAME, WEIGHT = "files", 1


def run(tally, draw, until, folder):
    path = folder / "checkpoint"
    write_checkpoint(path, version_of(0), shards=3)
    live = live_model("staged")
    live.load(version_of(0), version=0)
    with Child(_replace, path, draw.random()) as writer:
        for number in itertools.count(1):
            if time.monotonic() > until:
                break
            (_load if draw.random() < 0.5 else _update)(tally, draw, live, path, number)
            if not writer.alive or writer.pipe.poll():
                tally.fault(f"the writer died: {writer.heard(1)}")
                break


def _load(tally, draw, live, path, number):
    model = Layers()
    with _read(tally, "loads"):
        hw.load(model, path, cache=draw.random() < 0.5)
        found = numbers_in(model)
        if len(found) != 1:
            tally.fault(f"a load holds the versions {sorted(found)}")


def _update(tally, draw, live, path, number):
    before = numbers_in(live.model)
    atomic = draw.choice(WAYS)
    with _read(tally, "updates"):
        live.update(path, version=number, atomic=atomic)
    found = numbers_in(live.model)
    if live.state is hw.State.TORN:
        live.update(version_of(0), version=number)
        return
    if len(found) != 1 or (live.version != number and found != before):
        tally.fault(f"{live!r} was {sorted(before)} and holds {sorted(found)}; {atomic}")


@contextlib.contextmanager
def _read(tally, what):
    try:
        yield
        tally.add(what)
    except (hw.CheckpointError, FileNotFoundError):  # Between two renames there is no such directory.
        tally.add(f"{what} refused")
    except hw.UpdateAborted as error:
        tally.add(f"{what} refused")
        if not isinstance(error.__cause__, (hw.CheckpointError, FileNotFoundError)):
            tally.fault("an update", error)
    except Exception as error:
        tally.fault(what, error)


def _replace(pipe, path, seed):
    """The recipe: write beside, then rename."""
    new, old = path.with_name("new"), path.with_name("old")
    for number in itertools.count(1):
        write_checkpoint(new, version_of(number), shards=3)
        os.rename(path, old)
        os.rename(new, path)
        shutil.rmtree(old)
        time.sleep((number * 7919 % 100) / 20000)  # up to 5 ms: at other moments of a load each time
