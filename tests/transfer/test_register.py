"""A decision that is written where all hosts see it: who loses the sender reads it there, and nobody is in doubt."""

import contextlib
import os
import signal
import socket
import stat

import pytest
from ends import TIMEOUT, Thread, receiver, sender
from processes import Child, Killer, Tiny, context, value_of

import hotweights as hw
from hosts import follow, free_address, history, relay_process
from hotweights.transfer.decision import Decision
from hotweights.transfer.outbound import Outbound
from hotweights.transfer.registers.register import DecisionRecord, SharedRecord
from hotweights.transfer.registers.table import register_of
from hotweights.transfer.relay import Relay

COMMIT, ABORT = Decision.COMMIT, Decision.ABORT


@pytest.fixture
def register(tmp_path):
    (tmp_path / "shared run").mkdir()
    return f"file://{tmp_path}/shared%20run"


@pytest.mark.parametrize("first", Decision)
def test_a_record_is_written_once_by_whoever_is_first(first, register):
    written = DecisionRecord(first, (1, 5))
    assert register_of(register).decide(7, written) == written
    for other in Decision:
        assert register_of(register).decide(7, DecisionRecord(other, ())) == written
    assert register_of(register).decide(8, DecisionRecord(ABORT, ())) == DecisionRecord(ABORT, ())


def test_a_record_is_on_the_disk_before_anybody_acts_on_it(register, monkeypatch):
    """Its bytes before it has its name, and its name before it is told; also to who finds it there."""
    done, fsync, link = [], os.fsync, os.link
    monkeypatch.setattr(os, "link", lambda *paths: (done.append("name"), link(*paths)))
    monkeypatch.setattr(
        os, "fsync", lambda fd: (done.append("names" if stat.S_ISDIR(os.fstat(fd).st_mode) else "bytes"), fsync(fd))
    )
    for _ in range(2):
        register_of(register).decide(7, DecisionRecord(COMMIT, (1,)))
    assert done == ["bytes", "name", "names"] * 2


def test_racing_processes_read_one_record(register):
    start = context.Barrier(4)

    def vote(pipe, number):
        start.wait(TIMEOUT)
        for update in range(20):
            record = register_of(register).decide(update, DecisionRecord(list(Decision)[number % 2], (number,)))
            pipe.send((record.decision.name, record.places))

    with contextlib.ExitStack() as stack:
        voters = [stack.enter_context(Child(vote, number)) for number in range(4)]
        for _ in range(20):
            assert len({voter.heard() for voter in voters}) == 1


def test_a_commit_is_for_those_who_are_listed(register):
    register_of(register).decide(7, DecisionRecord(COMMIT, (1, 5)))
    assert [SharedRecord(register_of(register), 7, place).is_commit() for place in (1, 2, 5)] == [True, False, True]


@pytest.mark.parametrize("url", ["/shared", "redis://x", "", 7])
def test_what_is_no_register_is_refused(url):
    with pytest.raises(hw.UsageError, match="decision= is a place that all hosts see"):
        hw.Sender(free_address(), decision=url)


@pytest.mark.parametrize(
    "url",
    ["file://host/shared", "file:shared", "s3:///run", "s3://key:hush@bucket", "etcd:///run", "etcd://host:x/run"],
)
def test_a_register_s_address_says_where_it_is(url):
    with pytest.raises(hw.UsageError, match=r"that holds decisions looks like (file|s3|etcd)://"):
        hw.Sender(free_address(), decision=url)


def test_a_register_is_probed_before_it_is_trusted(tmp_path, register, monkeypatch):
    with pytest.raises(hw.UsageError, match=r"cannot hold decisions: .*No such file"):
        hw.Sender(free_address(), decision=f"file://{tmp_path}/absent")
    hw.Sender(free_address(), decision=register).close()
    (mark,) = os.listdir(tmp_path / "shared run")
    assert mark.startswith("hotweights-sender-")
    monkeypatch.setattr(os, "link", os.replace)
    with pytest.raises(hw.UsageError, match="it let two writers write one of them"):
        hw.Sender(free_address(), decision=register)


def test_a_register_out_of_reach_or_damaged_leaves_doubt(tmp_path, register):
    os.rmdir(tmp_path / "shared run")
    with pytest.raises(hw.TransferError, match="cannot be had from file://"):
        register_of(register).decide(7, DecisionRecord(ABORT, ()))
    os.mkdir(tmp_path / "shared run")
    for content in ("", "{}", '{"decision": "MAYBE", "places": []}', '{"decision": "COMMIT", "places": ["x"]}'):
        (tmp_path / "shared run" / "hotweights-0000000000000007.json").write_text(content)
        with pytest.raises(hw.TransferError, match="cannot be had from file://"):
            register_of(register).decide(7, DecisionRecord(ABORT, ()))


# A place of that name is there, and is not the sender's.

OWN = "file:///proc/self/cwd"  # as a directory of each host's own has one name on all of them


def take_elsewhere(pipe, folder, address, trainer):
    """A worker on a host that has another directory at the register's path; behind a relay if ``trainer`` is said."""
    os.chdir(folder)
    with contextlib.ExitStack() as stack:
        if trainer:
            relay = stack.enter_context(Relay(trainer, address, timeout=TIMEOUT))
            running = Thread(relay.run)
            stack.callback(running.result)
            stack.callback(relay.close)
        source = stack.enter_context(receiver(address))
        with pytest.raises(hw.HotweightsError, match="is another place on this host") as told:
            hw.LiveModel(Tiny()).load(source)
        pipe.send(str(told.value))
        pipe.recv()


@pytest.mark.parametrize("relayed", [False, True])
def test_who_sees_another_register_than_the_sender_refuses_the_version(relayed, tmp_path, monkeypatch):
    address, behind = free_address(), f"unix:{tmp_path / 'relay' / 'socket'}"
    for folder in ("trainer", "gpu1"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "trainer")
    arguments = (behind, address) if relayed else (address, "")
    with Child(take_elsewhere, tmp_path / "gpu1", *arguments) as worker:
        with sender(address, decision=OWN) as sending, pytest.raises(hw.TransferAborted) as told:
            sending.send(Tiny(1), version=1)
        assert f"decision='{OWN}' is another place on this host, {socket.gethostname()}, than on" in str(told.value)
        worker.heard()
        worker.say("end")
    assert not os.listdir(tmp_path / "gpu1")


def test_nobody_decides_in_a_place_that_is_not_the_sender_s(tmp_path, monkeypatch):
    """As where it was out of reach when it was looked at: who voted is in doubt, and does not write that all abort."""
    for folder in ("trainer", "gpu1"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "trainer")
    register = register_of(OWN)
    register.probe()
    register.decide(7, DecisionRecord(COMMIT, (1,)))
    told = SharedRecord(register_of(register.told), 7, 1)
    assert told.is_commit()
    monkeypatch.chdir(tmp_path / "gpu1")
    with pytest.raises(hw.TransferError, match="name one that all hosts see"):
        told.is_commit()
    assert not os.listdir(tmp_path / "gpu1")


def send_twice(pipe, addresses, register, at):
    """Send version 1, then version 2 with a killer."""
    with sender(addresses, receivers=4, decision=register) as sending, Killer(at) as killer:
        sending.send(Tiny(1), version=1)
        killer.arm()
        sending.send(Tiny(2), version=2)
        killer.arm(False)
        pipe.send("all points passed")
        pipe.recv()


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.long)])
def test_a_sender_killed_at_any_moment_leaves_all_hosts_at_one_version(every, register, tmp_path):
    """A worker on its own host, one on another, and two behind a relay. Nobody is in doubt."""
    local, trainer, behind = (
        f"unix:{tmp_path / 'run' / 'socket'}",
        free_address(),
        f"unix:{tmp_path / 'relay' / 'socket'}",
    )
    seen = set()
    for at in range(0, 300, every):
        with contextlib.ExitStack() as stack:
            relay = stack.enter_context(Child(relay_process, trainer, behind))
            workers = [stack.enter_context(Child(follow, to)) for to in (local, trainer, behind, behind)]
            with Child(send_twice, [local, trainer], register, at) as killed:
                if survived := killed.heard(3 * TIMEOUT) is not None:
                    killed.say("end")
            assert killed.exitcode == (0 if survived else -signal.SIGKILL)
            with sender([local, trainer], receivers=4, timeout=3 * TIMEOUT) as after:
                assert len(after.send(Tiny(3), version=3).committed) == 4
            relay.say("end")
            relay.heard()
            found = [history(worker) for worker in workers]
            assert not any(doubted for _, doubted in found), f"at point {at}"
            assert len({2 in versions for versions, _ in found}) == 1, f"at point {at}"
            seen.add(2 in found[0][0])
        if survived:
            break
    assert seen == {False, True}
    assert at > 20


def test_a_sender_that_decides_too_late_finds_the_record(register, monkeypatch):
    """A member that lost it wrote that nobody takes the version; the others are told so."""
    address = free_address()
    live = hw.LiveModel(Tiny())
    ask, lost = Outbound._ask, []

    def late(outbound):
        ask(outbound)
        lost.append(register_of(register).decide(outbound._update, DecisionRecord(ABORT, ())))

    def work():
        with receiver(address) as source:
            live.load(source)
            monkeypatch.setattr(Outbound, "_ask", late)
            with pytest.raises(hw.UpdateAborted):
                live.update(source)
            monkeypatch.setattr(Outbound, "_ask", ask)
            live.update(source)

    thread = Thread(work)
    with sender(address, decision=register) as sending:
        sending.send(Tiny(1), version=1)
        with pytest.raises(hw.TransferAborted, match="wrote the decision"):
            sending.send(Tiny(2), version=2)
        sending.send(Tiny(3), version=3)
    thread.result()
    assert lost
    assert (live.version, value_of(live.model)) == (3, 3)
