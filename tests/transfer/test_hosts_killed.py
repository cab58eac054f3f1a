"""Three hosts, which are network namespaces: a trainer and two workers on each of two. One process is killed, anywhere.

It is killed at its first point of the second version, in the next fleet at its second, and so on until there is none:
before and after each word that it says, and after each that it hears. Then every worker has one version, or serves the
one before and is in doubt until the next trainer tells it; and the third version comes to all.

``make kills`` tries all points, in a quarter of an hour; else every 13th is tried.
"""

import contextlib
import os
import signal

import pytest
from ends import TIMEOUT, sender
from namespaces import enter
from processes import Child, Tiny, send_twice

import hotweights as hw
from hosts import follow, history, relay_process

ADDRESS = "tcps://10.77.0.3:7600"
EVERY = int(os.environ.get("HOTWEIGHTS_KILL_EVERY", "13"))  # 1: all points
RELAYED = pytest.mark.parametrize(
    "relayed", [pytest.param(False, marks=pytest.mark.long, id="direct"), pytest.param(True, id="relays")]
)


class Fleet(contextlib.ExitStack):
    """The processes of a trainer, four workers and, if ``relayed``, two relays; they end with it."""

    def __init__(self, hosts, folder, relayed):
        super().__init__()
        self._hosts = hosts
        folder.mkdir()
        self.to = [f"unix:{folder / name / 'socket'}" if relayed else ADDRESS for name in hosts.names[:2]]

    def start(self, host, work, *arguments, **options):
        """A process on a host."""
        name = self._hosts.names[host]
        return self.enter_context(Child(lambda pipe: (enter(name), work(pipe, *arguments, **options))))

    def relay(self, host, at=None):
        running = self.start(host, relay_process, ADDRESS, self.to[host], at, insecure=True)
        self.callback(end, running)
        return running

    def worker(self, host, at=None):
        direct = {"insecure": True} if self.to[host] == ADDRESS else {}
        return self.start(host, follow, self.to[host], at, timeout=6 * TIMEOUT, offer_timeout=6 * TIMEOUT, **direct)

    def trainer(self, work, *arguments):
        return self.start(2, work, ADDRESS, *arguments, receivers=4, insecure=True, timeout=3 * TIMEOUT)


def end(child):
    """Tell a relay to end, if it lives."""
    with contextlib.suppress(OSError):
        child.say("end")


def send_three(pipe, address, **options):
    """Send versions 1, 2 and, when somebody says so, 3; say who took each, or why nobody did."""
    with sender(address, **options) as sending:
        for version in (1, 2):
            try:
                pipe.send(sending.send(Tiny(version), version=version).committed)
            except hw.TransferIncomplete as error:
                pipe.send(error.committed)
            except hw.TransferAborted as error:
                pipe.send(str(error))
        pipe.recv()
        send_last(pipe, sending)


def send_last(pipe, sending):
    """A death that is noticed only now is told first; the next call waits for who comes in the place."""
    with contextlib.suppress(hw.TransferAborted, hw.TransferIncomplete):
        pipe.send(sending.send(Tiny(3), version=3).committed)
        return
    pipe.send(sending.send(Tiny(3), version=3).committed)


def send_third(pipe, address, **options):
    with sender(address, **options) as sending:
        send_last(pipe, sending)


def died(child, survived):
    child.process.join(0 if survived else TIMEOUT)
    return child.process.exitcode == (None if survived else -signal.SIGKILL)


def second_of(trainer):
    """Who took the second version, or why nobody did. All took the first."""
    assert len(trainer.heard(6 * TIMEOUT)) == 4
    return trainer.heard(6 * TIMEOUT)


def all_took(trainer, workers, at):
    """Whether these workers took the second version, all or none, when all have the third."""
    trainer.say("the last")
    assert len(trainer.heard(6 * TIMEOUT)) == 4
    took = [2 in history(worker)[0] for worker in workers]
    assert len(set(took)) == 1, f"at point {at}: {took}"
    return took[0]


@pytest.mark.timeout(3600)
@RELAYED
def test_a_trainer_killed_at_any_message_leaves_one_version_on_all_hosts(relayed, hosts, tmp_path):
    seen = set()
    for at in range(0, 400, EVERY):
        with Fleet(hosts, tmp_path / str(at), relayed) as fleet:
            if relayed:
                fleet.relay(0)
                fleet.relay(1)
            workers = [fleet.worker(number // 2) for number in range(4)]
            trainer = fleet.trainer(send_twice, at, None)
            if survived := trainer.heard(6 * TIMEOUT) is not None:
                trainer.say("end")
                trainer.process.join(6 * TIMEOUT)  # It has the address until then.
            else:
                assert died(trainer, survived)
            assert len(fleet.trainer(send_third).heard(6 * TIMEOUT)) == 4
            took = [2 in history(worker)[0] for worker in workers]
        assert len(set(took)) == 1, f"at point {at}: {took}"
        seen.add(took[0])
        if survived:
            break
    assert survived
    assert seen == {False, True} if EVERY == 1 else seen
    assert at > 20


@pytest.mark.timeout(3600)
def test_a_relay_killed_at_any_message_takes_its_host_out(hosts, tmp_path):
    seen = set()
    for at in range(0, 400, EVERY):
        with Fleet(hosts, tmp_path / str(at), True) as fleet:
            killed = fleet.relay(0, at)
            fleet.relay(1)
            workers = [fleet.worker(number // 2) for number in range(4)]
            trainer = fleet.trainer(send_three)
            said = second_of(trainer)
            assert isinstance(said, tuple) or "on 10.77.0.1" in said
            killed.process.join(0 if len(said) == 4 else TIMEOUT)
            if survived := killed.process.exitcode is None:
                end(killed)
                last = killed.heard()
                survived = last is not None  # It may have come to that point only now.
            fleet.relay(0)
            took = all_took(trainer, workers, at)
        assert took == isinstance(said, tuple), f"at point {at}"
        seen.add(took)
        if survived:
            break
    assert survived
    assert seen == {False, True} if EVERY == 1 else seen
    assert at > 20


@pytest.mark.timeout(3600)
@RELAYED
def test_a_worker_killed_at_any_message_is_named_and_replaced(relayed, hosts, tmp_path):
    seen = set()
    for at in range(0, 400, EVERY):
        with Fleet(hosts, tmp_path / str(at), relayed) as fleet:
            if relayed:
                fleet.relay(0)
                fleet.relay(1)
            workers = [fleet.worker(number // 2) for number in range(1, 4)]
            killed = fleet.worker(0, at)
            trainer = fleet.trainer(send_three)
            said = second_of(trainer)
            assert killed.name in str(said) or isinstance(said, tuple)
            assert killed.heard() is not None
            survived = killed.heard() is not None
            if not survived:
                assert died(killed, survived)
                fleet.worker(0)
            took = all_took(trainer, workers, at)
        assert took == isinstance(said, tuple), f"at point {at}"
        seen.add(took)
        if survived:
            break
    assert survived
    assert seen == {False, True} if EVERY == 1 else seen
    assert at > 10
