"""Processes: a sender and two workers; one is killed or stopped at a random moment. All do what the sender says."""

import itertools
import os
import signal
import time
from dataclasses import dataclass, field

from children import Child
from layers import WAYS, live_model, numbers_in, version_of

import hotweights as hw

NAME, WEIGHT = "processes", 2
_TIMEOUT = 3.0  # seconds of one wait of a member; a member that is stopped for longer is lost
_LONG = 4 * _TIMEOUT + 20  # seconds after which a member that says nothing hangs


def follow(pipe, address, atomic):
    """A worker: take versions for ever, and say after each what is live."""
    live = live_model(atomic)
    with hw.Receiver(address, timeout=_TIMEOUT, offer_timeout=600) as receiver:
        while True:
            said = ""
            try:
                live.load(receiver) if live.version is None else live.update(receiver)
            except hw.HotweightsError as error:
                said = f"{type(error).__name__}: {error}: {error.__cause__}"
            pipe.send((live.version, live.state.value, sorted(numbers_in(live.model)), said))


def send(pipe, address, on_lost, digests):
    """The sender: send each version that it is told to, and say what became of it."""
    options = {"slots": 2, "slot_nbytes": 4096, "timeout": _TIMEOUT, "on_lost": on_lost, "digests": digests}
    with hw.Sender(address, receivers=2, **options) as sender:
        while True:
            number = pipe.recv()
            try:
                report = sender.send(version_of(number), version=number)
                pipe.send((True, report.committed, str(dict(report.lost))))
            except hw.TransferIncomplete as error:
                pipe.send((True, error.committed, str(error)))
            except (hw.TransferAborted, hw.TransferTimeout) as error:
                pipe.send((False, (), str(error)))


@dataclass
class Worker:
    """A worker's process, and what it said since it was started."""

    child: Child
    atomic: object
    versions: list = field(default_factory=list)  # each version that was live, in order
    killed: bool = False


class Group:
    """The three processes, and what is known of each version that was sent."""

    def __init__(self, tally, draw, address):
        self._tally, self._draw, self._address = tally, draw, address
        self._sender = None
        self._workers = []
        self._numbers = itertools.count(1)
        self._refused = set()
        self._undecided = []  # versions during which the sender died, and the workers that were there
        self._seconds = 0.05  # what a send takes

    def turn(self):
        """Send one version while something happens to one member; see that all do what the sender says."""
        self._start()
        number, began = next(self._numbers), time.monotonic()
        self._sender.say(number)
        mischief = self._draw.choice(("nothing", "kill", "stop", "stop"))
        victim = self._draw.choice([self._sender, *(worker.child for worker in self._workers)])
        self._happen(mischief, victim)
        outcome = self._outcome(number)
        if mischief == "nothing" and outcome is not None:
            self._seconds = 0.9 * self._seconds + 0.1 * (time.monotonic() - began)
        if outcome is None:
            self._tally.add("without an outcome")
            if self._on_lost == "abort":  # Otherwise members may have been dropped before.
                self._undecided.append((number, list(self._workers)))
            self._sender.close()
            self._sender = None
        elif outcome[0]:
            self._tally.add("versions taken")
            for worker in self._workers:
                if worker.child.name in outcome[1] and not self._holds(worker, number):
                    self._tally.fault(f"{worker.child.name} committed {number}, says the sender, and has none")
        else:
            self._tally.add("versions refused")
            self._refused.add(number)
        self._hear_all()
        self._compare()

    def close(self):
        for child in (self._sender, *(worker.child for worker in self._workers)):
            if child is not None:
                child.close()

    def _start(self):
        if self._sender is None:
            self._on_lost = self._draw.choice(("abort", "abort", "drop"))
            self._sender = Child(send, self._address, self._on_lost, self._draw.random() < 0.5)
            self._tally.add("started")
        for worker in list(self._workers):
            if not worker.child.alive:
                self._drop(worker)
        while len(self._workers) < 2:
            atomic = self._draw.choice(WAYS)
            self._workers.append(Worker(Child(follow, self._address, atomic), atomic))
            self._tally.add("started")

    def _drop(self, worker):
        self._hear(worker)
        if not worker.killed:
            self._tally.fault(f"{worker.child.name} died by itself")
        worker.child.close()
        self._workers.remove(worker)

    def _happen(self, mischief, victim):
        time.sleep(self._draw.uniform(0, 1.5 * self._seconds))
        if mischief == "kill":
            for worker in self._workers:
                worker.killed |= worker.child is victim
            victim.signal(signal.SIGKILL)
            victim.process.join(10)
            self._tally.add("kills")
        elif mischief == "stop":
            victim.signal(signal.SIGSTOP)
            is_long = self._draw.random() < 0.1
            time.sleep(_TIMEOUT * 1.2 if is_long else self._draw.expovariate(10))
            victim.signal(signal.SIGCONT)
            self._tally.add("stops")

    def _outcome(self, number):
        """What the sender says of it; ``None`` if it was killed."""
        outcome = self._sender.heard(_LONG)
        if isinstance(outcome, Exception) or (outcome is None and self._sender.alive):
            self._tally.fault(f"the sender of {number}: {outcome or 'it hangs'}")
            return None
        return outcome

    def _holds(self, worker, number):
        """Whether it says that it holds the version, now or soon."""
        end = time.monotonic() + _LONG
        while number not in worker.versions and time.monotonic() < end:
            if not self._hear(worker, end - time.monotonic()):
                return worker.killed or number in worker.versions
        return number in worker.versions

    def _hear_all(self):
        for worker in self._workers:
            while self._hear(worker):
                pass

    def _hear(self, worker, seconds=0):
        """Take one word of a worker. Returns whether there was one."""
        said = worker.child.heard(seconds)
        if said is None:
            return False
        if isinstance(said, Exception):
            self._tally.fault(f"{worker.child.name}, {worker.atomic}", said)
            worker.killed = True
            return False
        version, state, numbers, why = said
        self._tally.add("attempts")
        if version is not None and version not in worker.versions:
            worker.versions.append(version)
        whole = state == "serving" and numbers == [float(version)]
        torn = state == "torn" and worker.atomic is False
        if version is not None and not whole and not torn:
            self._tally.fault(f"{worker.child.name}, {worker.atomic}: {version}, {state}, holds {numbers[:4]}; {why}")
        if version in self._refused:
            self._tally.fault(f"{worker.child.name}, {worker.atomic}: holds {version}, which the sender gave up; {why}")
        return True

    def _compare(self):
        """A version whose sender died is held by all or by none. Known when each took a later one, or is gone."""
        for entry in list(self._undecided):
            number, workers = entry
            workers = [worker for worker in workers if worker in self._workers]
            if len(workers) < 2:
                self._undecided.remove(entry)
            elif all(max(worker.versions, default=0) > number for worker in workers):
                self._undecided.remove(entry)
                held = {worker.child.name: number in worker.versions for worker in workers}
                if len(set(held.values())) > 1:
                    self._tally.fault(f"the sender of {number} died, and who holds it? {held}")
                self._tally.add("agreed without a sender")


def run(tally, draw, until, folder):
    (folder / "group").mkdir(mode=0o700)
    group = Group(tally, draw, f"unix:{folder / 'group' / 's'}")
    try:
        while time.monotonic() < until:
            group.turn()
    finally:
        group.close()
        os.unlink(folder / "group" / "s") if (folder / "group" / "s").exists() else None
