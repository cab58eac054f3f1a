"""A soak: signals, threads, processes, files and hostile members for some minutes; seeded, and bounded.

Its parts take turns. Faults are printed as they come, and counts at the end; the exit code is 0 if there was no fault.
Ctrl-C ends it. With the seed it prints, the same choices are made again; the moments are the machine's.
"""

import argparse
import faulthandler
import gc
import os
import random
import secrets
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import interrupts
import members
import strangers
import torch
from tally import Tally

import checkpoints
import readers

PARTS = {part.NAME: part for part in (interrupts, readers, members, checkpoints, strangers)}
_TURN = 5.0  # seconds of a part of weight 1
_PATIENCE = 60  # seconds after which a turn that does not end is ended, with a stack of every thread
_MANY = 200  # faults after which a soak ends: one that stays makes many
_SLACK = 50_000_000  # bytes by which the process may have grown since the first round


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", default=None)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    return parser.parse_args()


def resources():
    """Open descriptors, threads, and bytes in memory."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return len(os.listdir("/proc/self/fd")), threading.active_count(), pages * os.sysconf("SC_PAGE_SIZE")


def rounds(tally, options, seed, folder):
    """Run the parts in turns until the time is over. Returns the resources after the first round."""
    began = said = time.monotonic()
    end = began + 60 * options.minutes
    unit = min(_TURN, 60 * options.minutes / (3 * sum(PARTS[name].WEIGHT for name in options.parts)))
    warm, turn = None, 0
    while time.monotonic() < end:
        for name in options.parts:
            turn += 1
            tally.place = f"{name} (turn {turn})"
            faulthandler.dump_traceback_later(_PATIENCE, exit=True)
            with tempfile.TemporaryDirectory(dir=folder) as own:
                until = min(end, time.monotonic() + unit * PARTS[name].WEIGHT)
                PARTS[name].run(tally, random.Random(f"{seed} {turn}"), until, Path(own))
            if time.monotonic() - said >= 60 or turn == len(options.parts):
                said = time.monotonic()
                print(f"{said - began:.0f} s: {tally.line()}", flush=True)
            if time.monotonic() >= end or len(tally.faults) > _MANY:
                return warm or resources()
        warm = warm or resources()
    return warm


def compare(tally, warm):
    now = resources()
    rows = "descriptors {}, threads {}, {:,} bytes in memory"
    print(f"after the first round: {rows.format(*warm)}\nat the end: {rows.format(*now)}")
    tally.place = "end"
    if now[:2] != warm[:2] or now[2] > warm[2] + _SLACK:
        tally.fault(f"it grew: {rows.format(*warm)} became {rows.format(*now)}")


def main():
    options = arguments()
    seed = options.seed or str(secrets.randbelow(10**9))
    print(f"seed {seed}, {options.minutes:g} minutes, process {os.getpid()}", flush=True)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit("terminated"))
    tally = Tally()
    interrupted = False
    with tempfile.TemporaryDirectory(prefix="hw-soak-") as folder:
        try:
            compare(tally, rounds(tally, options, seed, folder))
        except KeyboardInterrupt:
            interrupted = True
        except Exception as error:
            tally.fault("the soak itself", error)
        faulthandler.cancel_dump_traceback_later()
    print(tally.table())
    print(f"{len(tally.faults)} faults, seed {seed}" + (", interrupted" if interrupted else ""))
    return 130 if interrupted else bool(tally.faults)


if __name__ == "__main__":
    sys.exit(main())
