"""Random schedules of three hosts: a trainer, two workers on each of two, relays; whoever dies, one version or a doubt.

    make schedules N=500           # as root: hosts are network namespaces; else this host by loopback, and no cut links
    make schedules N=500 SEED=7    # the same choices again

After each schedule every worker that lives tells its history. It is a fault if a worker is torn; if it does not serve
what it says, or goes back to an older version; if of a version that must be all or none one worker has it and another,
that took part and is not in doubt, has not; or if the last version, sent when everything is back, does not reach
everybody. Some relays keep versions for workers that come later, which take them for themselves.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import random
import secrets
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from namespaces import Hosts, end_once, enter, why_not
from processes import Child, Killer, Tiny, value_of

import hotweights as hw
from hotweights.transfer.relay import Relay

KINDS = (
    "none",
    "trainer dies",
    "relay dies",
    "worker dies",
    "somebody stands still",
    "cut",
    "worker leaves",
    "all of it",
)
LAST = 99
TIMEOUT = 3.0


def train(pipe, host, address, drop):
    """Send what it is told to; at a point that it is told of it dies."""
    if host:
        enter(host)
    with hw.Sender(
        address,
        receivers=4,
        timeout=TIMEOUT,
        insecure=True,
        slots=2,
        slot_nbytes=4096,
        on_lost="drop" if drop else "abort",
    ) as sender:
        while (asked := pipe.recv()) is not None:
            version, at = asked
            with Killer(-1 if at is None else at) as killer:
                killer.arm(at is not None)
                try:
                    said = ("taken", sender.send(Tiny(version), version=version, show_progress=False).committed)
                except hw.TransferIncomplete as error:
                    said = ("taken", error.committed)
                except hw.TransferError as error:
                    said = ("refused", str(error))
                killer.arm(False)
            pipe.send(said)


def relay(pipe, host, source, to, keep):
    if host:
        enter(host)
    with Relay(source, to, insecure=True, timeout=TIMEOUT, keep=keep) as running:
        running.run()


def work(pipe, host, address, atomic):
    """Take versions until the last, or until it is killed or sent away; tell of each attempt."""
    with contextlib.suppress(KeyboardInterrupt):
        _work(pipe, host, address, atomic)


def _work(pipe, host, address, atomic):
    if host:
        enter(host)
    live = hw.LiveModel(Tiny(), atomic=atomic)
    options = {"insecure": True} if address.startswith("tcps") else {}
    with hw.Receiver(address, timeout=TIMEOUT, offer_timeout=120.0, **options) as receiver:
        while live.version != LAST:
            doubt, before = False, receiver.version
            try:
                live.load(receiver, show_progress=False) if live.version is None else live.update(
                    receiver, show_progress=False
                )
            except hw.HotweightsError as error:
                cause = error.__cause__ if isinstance(error, hw.UpdateAborted) else error
                doubt = isinstance(cause, hw.TransferInDoubt)
                if not isinstance(cause, hw.TransferError):
                    raise
            tried = receiver.version if receiver.version != before or live.version == receiver.version else None
            if tried != live.version and receiver._inbound is not None and receiver._inbound.member._is_kept:
                tried = None  # It came too late to be a member.
            pipe.send((tried, live.version, None if live.version is None else value_of(live.model), doubt))


class Schedule:
    """One: what is chosen depends on the seed alone."""

    def __init__(self, chance, hosts, number, folder, stack):
        self.chance, self.hosts, self.folder, self.stack = chance, hosts, folder, stack
        where = "10.77.0.3" if hosts else "127.0.0.1"
        self.address = f"tcps://{where}:{20000 + number % 10000}"
        self.drop, self.relayed = chance.random() < 0.4, [chance.random() < 0.6 for _ in range(2)]
        self.atomic = chance.choice(["staged", "journal"])
        # Of 12 kB each: none, one at a time, or two.
        self.keep = [chance.choice([None, "15kB", "1MB"]) for _ in range(2)]
        self.log, self.faults, self.seen = [], [], {}
        self.trainer = self.start(train, 2, self.address, self.drop)
        self.relays = [self.start_relay(host) if self.relayed[host] else None for host in range(2)]
        self.workers = [self.start_worker(number // 2) for number in range(4)]

    def start(self, what, host, *more):
        child = Child(what, self.hosts.names[host] if self.hosts else "", *more)
        self.stack.callback(self.end, child)
        return child

    def socket(self, host):
        return f"unix:{self.folder / f'{host}' / 'socket'}"

    def start_relay(self, host):
        return self.start(relay, host, self.address, self.socket(host), self.keep[host])

    def start_worker(self, host):
        return self.start(work, host, self.socket(host) if self.relayed[host] else self.address, self.atomic)

    def end(self, child):
        with contextlib.suppress(ValueError):  # It was ended.
            child.process.kill()
            child.process.join(20)
            child.process.close()
        child._pipe.close()

    def listen(self, child, name, last=False):
        """Take what a worker has said so far; with ``last``, until it has the last version."""
        history = self.seen.setdefault(child, (name, []))[1]
        with contextlib.suppress(EOFError, ConnectionResetError):
            while child._pipe.poll(30.0 if last and (not history or history[-1][1] != LAST) else 0):
                said = child._pipe.recv()
                if isinstance(said, Exception):
                    self.faults.append(f"{name}: {said}")
                    return
                history.append(said)
        if last and (not history or history[-1][1] != LAST):
            self.faults.append(f"{name}: it never had the last version: {history}")

    def send(self, version, at=None, meanwhile=None):
        """Returns what the trainer said; ``None`` if it died, and another is there now."""
        self.trainer.say((version, at))
        if meanwhile:
            meanwhile()
        if not self.trainer._pipe.poll(90):
            self.faults.append(f"version {version}: the trainer says nothing")
            self.trainer.process.kill()
        said = None
        with contextlib.suppress(EOFError, ConnectionResetError):
            said = self.trainer._pipe.recv()
        if isinstance(said, Exception):
            self.faults.append(f"version {version}: the trainer: {said}")
            said = None
        if said is None:
            self.end(self.trainer)
            self.trainer = self.start(train, 2, self.address, self.drop)
        self.log.append((version, said))
        return said

    def strike(self, kind):
        """Let something happen while a version is sent."""
        chance = self.chance
        time.sleep(chance.uniform(0.0, 0.08))
        host, number = chance.randrange(2), chance.randrange(4)
        running = [child for child in (*self.workers, *self.relays, self.trainer) if child]
        if kind == "relay dies" and self.relays[host]:
            self.relays[host].process.kill()
            self.relays[host] = self.start_relay(host)
        elif kind == "worker dies" or kind == "worker leaves":
            self.listen(self.workers[number], f"worker {number}, dead")
            os.kill(self.workers[number].process.pid, signal.SIGKILL if kind == "worker dies" else signal.SIGTERM)
            self.seen.pop(self.workers[number], None)
            self.workers[number] = self.start_worker(number // 2)
        elif kind == "somebody stands still":
            pid = chance.choice(running).process.pid
            os.kill(pid, signal.SIGSTOP)
            time.sleep(chance.uniform(0.1, 1.5 * TIMEOUT))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        elif kind == "cut" and self.hosts:
            self.hosts.link(host, "down")
            time.sleep(chance.choice([0.3, 2.0, 6.0]))
            self.hosts.link(host, "up")

    def run(self):
        if (said := self.send(1)) is None or said[0] != "taken":
            said = self.send(1)  # A slow machine.
        for version in range(2, 2 + self.chance.randint(1, 3)):
            kind = self.chance.choice(KINDS)
            at = self.chance.randrange(80) if kind in ("trainer dies", "all of it") else None
            if kind == "all of it":
                kind = self.chance.choice(KINDS[2:-1])
            self.log.append((version, kind, at))
            self.send(version, at, lambda kind=kind: self.strike(kind))
        # A worker that just died may be counted as there still, and dropped; the one in its place then comes too late.
        for version in range(LAST - 8, LAST):
            if (said := self.send(version)) and said[0] == "taken" and len(said[1]) == len(self.workers):
                break
        for _ in range(8):
            if (said := self.send(LAST)) and said[0] == "taken":
                break
        for number, worker in enumerate(self.workers):
            self.listen(worker, f"worker {number}", last=True)
        self.judge()
        return self.faults

    def judge(self):
        taken, left = {}, {}
        for name, history in self.seen.values():
            had = [live for _, live, _, _ in history if live is not None]
            if had != sorted(had):
                self.faults.append(f"{name}: it went back: {had}")
            for tried, live, value, doubt in history:
                if live is not None and value != float(live):
                    self.faults.append(f"{name}: torn: {live} is served as {value}")
                if live is not None:
                    taken.setdefault(live, name)
                if tried not in (None, live) and not doubt:
                    left.setdefault(tried, []).append(name)
        sent = {version: said for version, said, *more in self.log if not more and isinstance(said, tuple)}
        for version, names in left.items():
            # An earlier version may be offered twice, by two trainers; and with on_lost="drop" some are left out.
            twice = sum(entry[0] == version and len(entry) == 2 for entry in self.log) > 1
            if version in taken and not self.drop and not twice:
                self.faults.append(f"version {version}: {taken[version]} took it, and {', '.join(names)} did not")
            if not self.drop and not twice and sent.get(version, ("",))[0] == "taken":
                self.faults.append(f"version {version}: the trainer says it was taken, and {', '.join(names)} did not")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=500, help="how many")
    parser.add_argument("--seed", help="the choices of an earlier run")
    parser.add_argument("--only", type=int, help="only the schedule with this number")
    options = parser.parse_args()
    seed = options.seed or str(secrets.randbelow(10**9))
    reason = why_not()
    print(f"seed {seed}, {options.n} schedules, {f'by loopback: {reason}' if reason else 'in namespaces'}", flush=True)
    torch.set_num_threads(1)
    logging.getLogger("hotweights").setLevel(logging.ERROR)  # Relays tell of each sender that is gone.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end_once)
    bad, began = 0, time.monotonic()
    with contextlib.ExitStack() as whole:
        hosts = None if reason else whole.enter_context(Hosts())
        for number in range(options.n) if options.only is None else [options.only]:
            with tempfile.TemporaryDirectory(prefix="hw-") as folder, contextlib.ExitStack() as stack:
                schedule = Schedule(random.Random(f"{seed} {number}"), hosts, number, Path(folder), stack)
                faults = schedule.run()
            if faults:
                bad += 1
                told = f"drop={schedule.drop}, relays={schedule.relayed}, keep={schedule.keep}, {schedule.atomic}"
                print(f"schedule {number}: {told}, {schedule.log}", *faults, sep="\n  ", flush=True)
            if number % 20 == 19:
                print(f"{time.monotonic() - began:.0f} s: {number + 1} schedules, {bad} with faults", flush=True)
    print(f"{bad} with faults, seed {seed}")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
