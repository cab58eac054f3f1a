"""Through a relay it is as without one: the contract, the decision, whoever dies; and each byte comes once."""

import contextlib
import itertools
import json
import os
import queue
import signal
import threading

import pytest
import torch
from ends import TIMEOUT, Thread, receiver, sender, tensors
from processes import Child, Tiny, context, send_twice, value_of

import hotweights as hw
from hosts import follow, free_address, history, relay_process
from hotweights.ranges import Range
from hotweights.sources.contracts import Request
from hotweights.testing import TRANSPORT_CONTRACT, assert_same_bits
from hotweights.transfer import onward
from hotweights.transfer.channel import Channel
from hotweights.transfer.decision import Decision
from hotweights.transfer.messages import Accept, Crew, Offer
from hotweights.transfer.onward import Onward
from hotweights.transfer.relay import Relay


@contextlib.contextmanager
def relaying(source, to, **options):
    """A relay in a thread."""
    with Relay(source, to, timeout=TIMEOUT, **options) as relay:
        thread = Thread(relay.run)
        try:
            yield relay
        finally:
            relay.close()
            thread.result()


class Relayed:
    """A group whose receivers are all behind a relay; or behind two, one after the other."""

    def __init__(self, stack, trainer, worker, options):
        self._trainer, self._worker, self._options = trainer, worker, options
        stack.enter_context(relaying(trainer, worker))

    def sender(self, receivers):
        return sender(self._trainer, receivers=receivers, **self._options)

    def receiver(self):
        return receiver(self._worker)


@pytest.mark.parametrize("check", TRANSPORT_CONTRACT, ids=lambda check: check.__name__)
@pytest.mark.parametrize("options", [{}, {"digests": False, "slots": 4, "slot_nbytes": 1 << 20}], ids=str)
def test_a_relay_is_a_transport(check, options, trainer, worker):
    with contextlib.ExitStack() as stack:
        group = Relayed(stack, trainer, worker, options)
        check(lambda: group, tensors())


@pytest.mark.parametrize("chain", [False, True])
def test_the_keys_of_a_relay_are_for_other_hosts(chain, trainer, worker, tmp_path):
    pytest.importorskip("cryptography")
    from hotweights.transfer.keys import make_keys

    make_keys(tmp_path / "keys", ["127.0.0.1"])
    keys, between = tmp_path / "keys", free_address()
    with contextlib.ExitStack() as stack:
        stack.enter_context(relaying(trainer, [worker, between] if chain else worker, keys=keys))
        sending = stack.enter_context(sender(trainer, receivers=1 + chain, keys=keys))
        threads = [Thread(take, worker)]
        if chain:
            threads.append(Thread(lambda: take(between, keys=keys)))
        sending.send(tensors(), version=1)
        for thread in threads:
            assert_same_bits(thread.result(), tensors())


def test_a_relay_is_for_what_comes_from_another_host(trainer, worker):
    with pytest.raises(hw.UsageError, match=f"workers on this one connect to {worker}"):
        Relay(worker, "unix:/tmp/x/y")


def test_receivers_connect_before_an_offer_also_behind_a_relay(trainer, worker):
    """Two of them behind a relay and one without: the trainer counts each, and then sends to all."""
    with (
        relaying(trainer, worker),
        sender(trainer, receivers=3) as sending,
        receiver(worker) as first,
        receiver(worker) as second,
        receiver(trainer, name="apart") as third,
    ):
        connecting = [Thread(lambda each=each: each.connect(TIMEOUT)) for each in (first, second, third)]
        while any(thread.is_alive() for thread in connecting):
            assert len(sending.connected) <= 3
        assert [thread.result() for thread in connecting] == [True] * 3
        names = poll(lambda: len(names := sending.connected) == 3 and names)
        assert len([name for name in names if name.startswith("relay")]) == 2
        assert len([name for name in names if name.startswith("apart")]) == 1
        threads = [Thread(lambda each=each: dict(each.tensors())) for each in (first, second, third)]
        sending.send(tensors(), version=1)
        for thread in threads:
            assert_same_bits(thread.result(), tensors())


def poll(what):
    while not (found := what()):
        pass
    return found


def take(address, **options):
    with receiver(address, **options) as source:
        return dict(source.tensors())


def test_each_byte_crosses_the_network_once(trainer, worker, tmp_path):
    """Three workers on one host: two want all, one has a slice; and one beside the relay. The report says it."""
    content = {"w": torch.arange(40_000.0).view(200, 200), "v": torch.arange(7)}

    def cut():
        room = torch.zeros(200 * 100 * 4, dtype=torch.uint8)
        with receiver(worker, name="cut") as source:
            parts = (Range(400, 400, 200, 800),)
            source.wanted([Request("w", parts, lambda: room)])
            with source.leases() as stream:
                assert [lease.name for lease in stream] == ["w"]
            with source.decision():
                return room.view(torch.float32).view(200, 100)

    with relaying(trainer, worker), sender(trainer, receivers=4, slot_nbytes=1 << 16) as sending:
        threads = [Thread(take, worker), Thread(take, worker), Thread(cut), Thread(take, trainer)]
        report = sending.send(content, version=1)
        for thread in (threads[0], threads[1], threads[3]):
            assert_same_bits(thread.result(), content)
        assert torch.equal(threads[2].result(), content["w"][:, 100:])
    nbytes = sum(tensor.nbytes for tensor in content.values())
    assert 2 * nbytes <= report.network_nbytes < 2 * nbytes + 16_000  # to the relay, and to the one without
    (host,) = report.hosts
    assert (host.host, host.workers, host.network_nbytes) == ("127.0.0.1", 4, report.network_nbytes)
    assert report.shared_nbytes == 2 * nbytes + 80_000  # of the three behind the relay
    assert len(host.members) == 2
    assert list(host.phases) == ["answer the offer", "take bytes", "prepare", "commit"]
    assert report.slowest in host.members
    report.save_timeline(tmp_path / "send.json")
    events = json.loads((tmp_path / "send.json").read_text())["traceEvents"]
    (track,) = (event["pid"] for event in events if event.get("args") == {"name": "host 127.0.0.1"})
    rows = {event["args"]["name"] for event in events if event["pid"] == track and event["name"] == "thread_name"}
    assert rows == set(host.members)
    spans = [event for event in events if event["pid"] == track and event["ph"] == "X"]
    assert sorted(span["name"] for span in spans) == sorted([*host.phases] * 2)
    for row in {span["tid"] for span in spans}:  # They follow one another.
        own = sorted((span["ts"], span["ts"] + span["dur"]) for span in spans if span["tid"] == row)
        assert all(end <= start + 1 for (_, end), (start, _) in itertools.pairwise(own))
    assert "127.0.0.1: " in str(report)
    assert len(report.committed) == 4
    assert any(name.startswith(f"cut (process {os.getpid()}") for name in report.committed)


def test_relays_follow_one_another(trainer, worker, tmp_path):
    """A chain: what the first hands to its own worker goes on to the second, whose workers the trainer counts."""
    between, local = free_address(), f"unix:{tmp_path / 'other' / 'socket'}"
    lives = [hw.LiveModel(Tiny()) for _ in range(3)]

    def follow(live, address):
        with receiver(address) as source:
            live.load(source)
            while live.version == 1:
                assert value_of(live.model) == 1
                with contextlib.suppress(hw.UpdateAborted):  # Who is late does not see a version that was given up.
                    live.update(source)

    with (
        relaying(trainer, [worker, between]),
        relaying(between, local),
        sender(trainer, receivers=3) as sending,
    ):
        threads = [Thread(follow, live, to) for live, to in zip(lives, (worker, local, local), strict=True)]
        report = sending.send(Tiny(1), version=1)
        assert len(report.committed) == 3
        assert report.network_nbytes < report.nbytes + 4096
        with pytest.raises(hw.TransferAborted, match="relay"):
            sending.send({**Tiny(2).state_dict(), "one": torch.zeros(7)}, version=2)
        sending.send(Tiny(3), version=3)
        for thread in threads:
            thread.result()
    assert {(live.version, value_of(live.model)) for live in lives} == {(3, 3.0)}


# Whoever fails or dies.


def test_a_worker_that_fails_is_named_through_its_relay(trainer, worker):
    def fail():
        with receiver(worker, name="rank3") as source, source.leases() as stream:
            for _ in stream:
                raise ValueError("no room")

    def go_on():
        with receiver(worker) as source:
            with pytest.raises(hw.TransferAborted, match="no room"):
                dict(source.tensors())
            return dict(source.tensors())

    content = tensors()
    with relaying(trainer, worker), sender(trainer, receivers=2) as sending:
        threads = [Thread(go_on), Thread(lambda: raised(fail))]
        name = (
            rf"relay \(process {os.getpid()} on 127.0.0.1\): rank3 \(process {os.getpid()}( #2)?\): ValueError: no room"
        )
        with pytest.raises(hw.TransferAborted, match=name):
            sending.send(content, version=1)
        threads[1].result()
        sending.send(content, version=2, receivers=1)
        assert_same_bits(threads[0].result(), content)


def test_a_worker_that_leaves_while_the_offer_is_on_its_way_is_missed(trainer, worker, monkeypatch):
    """Its relay has told that it is gone: nobody was lost, and yet fewer would take the version than are to."""
    say, told = Channel.send, threading.Event()
    stays, leaves = receiver(worker), receiver(worker)

    def saying(channel, message, **options):
        if isinstance(message, Offer) and message.version == 2 and not message.relayed:
            leaves.close()
            assert told.wait(TIMEOUT)
        say(channel, message, **options)
        if isinstance(message, Crew) and message.count == 1:
            told.set()

    def stay():
        with pytest.raises(hw.TransferAborted, match="left before"):
            dict(stays.tensors())
        return dict(stays.tensors())

    with relaying(trainer, worker), stays, sender(trainer, receivers=2) as sending:
        first = [Thread(lambda each=each: dict(each.tensors())) for each in (stays, leaves)]
        sending.send(tensors(), version=1)
        for thread in first:
            thread.result()
        monkeypatch.setattr(Channel, "send", saying)
        thread = Thread(stay)
        why = r"1 of 2 receivers answered; send again.*relay \(process .*1 of its 2 workers left before"
        with pytest.raises(hw.TransferAborted, match=why):
            sending.send(tensors(), version=2)
        sending.send(tensors(), version=3, receivers=1)
        assert_same_bits(thread.result(), tensors())


def raised(work):
    with pytest.raises(ValueError, match="no room"):
        work()


def sent_at_last(sending, model, version, **options):
    """A death that is noticed only now is told first; the next call waits for who comes in the place."""
    with contextlib.suppress(hw.TransferAborted):
        return sending.send(model, version=version, **options)
    return sending.send(model, version=version, **options)


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.long)])
def test_a_relay_killed_at_any_moment_takes_its_host_out(every, trainer, worker):
    """Its workers hold one version, together with all others: through the next relay the sender tells them which."""
    seen = set()
    for at in range(0, 200, every):
        with contextlib.ExitStack() as stack:
            behind = [stack.enter_context(Child(follow, worker)) for _ in range(2)]
            other = stack.enter_context(Child(follow, trainer))
            sending = stack.enter_context(sender(trainer, receivers=3))
            with Child(relay_process, trainer, worker, at) as killed:
                sending.send(Tiny(1), version=1)
                try:
                    committed = sending.send(Tiny(2), version=2).committed
                    told = str(committed)
                except (hw.TransferAborted, hw.TransferIncomplete) as error:
                    committed, told = getattr(error, "committed", ()), str(error)
                assert "on 127.0.0.1" in told
                killed.process.join(0 if len(committed) == 3 else TIMEOUT)
                if survived := killed.process.exitcode is None:
                    with contextlib.suppress(BrokenPipeError):
                        killed.say("end")
                    last = killed.heard()
                    survived = last is not None  # It may have come to that moment only now.
                    assert last in (None, [1, 2])
            assert killed.exitcode == (0 if survived else -signal.SIGKILL)
            with Child(relay_process, trainer, worker) as after:
                assert len(sent_at_last(sending, Tiny(3), version=3).committed) == 3
                after.say("end")
                after.heard()
            (first, doubt), (second, other_doubt) = map(history, behind)
            took, _ = history(other)
            assert (2 in took) == bool(committed), f"at point {at}"
            assert not (2 in first and 2 not in took), f"at point {at}"
            for versions, doubted in ((first, doubt), (second, other_doubt)):
                assert not doubted, f"at point {at}"
                assert (2 in versions) == (2 in took), f"at point {at}"
            seen.add((2 in took, 2 in first, 2 in second))
        if survived:
            break
    assert at > 20
    possible = {(False, False, False), (True, True, True)}
    assert seen == possible if every == 1 else seen <= possible


def test_a_sender_killed_at_any_moment_leaves_the_hosts_workers_at_one_version(trainer, worker):
    seen = set()
    for at in range(100):
        decided = context.Value("i", 0)
        with contextlib.ExitStack() as stack:
            relay = stack.enter_context(Child(relay_process, trainer, worker))
            workers = [stack.enter_context(Child(follow, worker)) for _ in range(2)]
            with Child(send_twice, trainer, at, decided) as killed:
                if survived := killed.heard() is not None:
                    killed.say("end")
            assert killed.exitcode == (0 if survived else -signal.SIGKILL)
            with sender(trainer, receivers=2) as after:
                assert len(after.send(Tiny(3), version=3).committed) == 2
            relay.say("end")
            relay.heard()
            (first, doubt), (second, other_doubt) = map(history, workers)
            took = 2 in first
            assert (2 in second) == took, f"at point {at}"
            assert not doubt, f"at point {at}"
            assert not other_doubt, f"at point {at}"
            if decided.value != Decision.COMMIT.value:
                assert not took, f"at point {at}"
            seen.add((took, decided.value))
        if survived:
            break
    # Also: a commit that nobody had heard of when its sender died.
    assert seen == {(False, 0), (False, Decision.COMMIT.value), (True, Decision.COMMIT.value)}
    assert at > 15


@pytest.mark.parametrize("on_lost", ["abort", "drop"])
def test_a_worker_killed_at_any_moment_is_named(on_lost, trainer, worker):
    seen = set()
    for at in range(100):
        with contextlib.ExitStack() as stack:
            relay = stack.enter_context(Child(relay_process, trainer, worker))
            other = stack.enter_context(Child(follow, worker))
            victim = stack.enter_context(Child(follow, worker, at))
            sending = stack.enter_context(sender(trainer, receivers=2, on_lost=on_lost))
            sending.send(Tiny(1), version=1)
            try:
                report = sending.send(Tiny(2), version=2)
                committed, told = report.committed, str(report)
            except (hw.TransferAborted, hw.TransferIncomplete) as error:
                committed, told = getattr(error, "committed", ()), str(error)
            assert victim.name in told
            victim.heard()
            survived = victim.heard() is not None
            victim.process.join(0 if survived else TIMEOUT)  # A pipe may close before a socket.
            assert f"{other.name} on 127.0.0.1" in sent_at_last(sending, Tiny(3), 3, receivers=1).committed
            versions, doubted = history(other)
            assert (2 in versions) == (f"{other.name} on 127.0.0.1" in committed), f"at point {at}"
            assert not doubted
            seen.add(2 in versions)
            relay.say("end")
            relay.heard()
        assert victim.exitcode == (0 if survived else -signal.SIGKILL)
        if survived:
            break
    assert seen == {False, True}  # Also with "drop": a host takes a version as one.
    assert at > 10


def test_hosts_join_and_leave_between_versions(trainer, worker, tmp_path):
    """A host that came late has the next version; one that left is not waited for; a new trainer goes on with both."""
    other = f"unix:{tmp_path / 'other' / 'socket'}"

    def sent(sending, version, sources):
        threads = [Thread(lambda each=each: dict(each.tensors())) for each in sources]
        committed = sending.send(tensors(version), version=version, receivers=len(sources)).committed
        for thread, source in zip(threads, sources, strict=True):
            assert_same_bits(thread.result(), tensors(version))
            assert source.version == version
        return len(committed)

    with contextlib.ExitStack() as stack:
        first_host = stack.enter_context(contextlib.ExitStack())
        first_host.enter_context(relaying(trainer, worker))
        first = first_host.enter_context(receiver(worker))
        with sender(trainer) as sending:
            assert sent(sending, 1, [first]) == 1
            stack.enter_context(relaying(trainer, other))
            late = [stack.enter_context(receiver(other)) for _ in range(2)]
            assert sent(sending, 2, [first, *late]) == 3
            first_host.close()
            assert sent(sending, 3, late) == 2
        with sender(trainer) as sending:
            assert sent(sending, 4, late) == 2


def test_who_waits_for_more_is_told_of_a_relay_and_its_workers(trainer, worker):
    with relaying(trainer, worker), sender(trainer, receivers=2, timeout=TIMEOUT) as sending:
        with receiver(worker) as source:
            while not source.connect(0.05) or not sending.connected:
                assert len(sending.connected) < 2
            sending._way._group._timeout = 0.1
            with pytest.raises(hw.TransferTimeout, match=r"1 of 2 receivers .* on 127.0.0.1\) with 1 worker"):
                sending.send({"a": torch.zeros(1)}, version=1)
        while sending.connected:
            pass
        with pytest.raises(hw.TransferTimeout, match=r"0 of 2 receivers .* on 127.0.0.1\) with 0 workers"):
            sending.send({"a": torch.zeros(1)}, version=1)


# Trees.


class Tree:
    """A relay that feeds two others, each with a worker; and one at the trainer. All are processes."""

    def __init__(self, stack, trainer, folder, at):
        self._stack, self._trainer, self._between = stack, trainer, free_address()
        self._local = {name: f"unix:{folder / name / 'socket'}" for name in ("middle", "leaf", "other")}
        self.workers = {
            name: stack.enter_context(Child(follow, to)) for name, to in {**self._local, "direct": trainer}.items()
        }
        self.relays = {name: self.start(name, at.get(name)) for name in self._local}

    def start(self, name, at=None):
        """One of the relays; it dies at a point of its second version."""
        local = self._local[name]
        source, to = (self._trainer, [local, self._between]) if name == "middle" else (self._between, local)
        running = self._stack.enter_context(Child(relay_process, source, to, at))
        self._stack.callback(self._end, running)
        return running

    def _end(self, running):
        if running.process.is_alive():
            with contextlib.suppress(BrokenPipeError):
                running.say("end")
                running.heard()


def sent_with_losses(sending, version):
    """Who took it, and who is told not to have."""
    try:
        report = sending.send(Tiny(version), version=version)
        return report.committed, " ".join(report.lost)
    except hw.TransferIncomplete as error:
        return error.committed, " ".join(error.problems)


POINTS = [("leaf", 2), ("leaf", 14), ("leaf", 26), ("middle", 2), ("middle", 20), ("middle", 38)]  # before the end


@pytest.mark.parametrize(("who", "at"), POINTS)
def test_a_tree_loses_the_branch_that_dies_and_nobody_else(who, at, trainer, tmp_path):
    with contextlib.ExitStack() as stack:
        tree = Tree(stack, trainer, tmp_path, {who: at})
        sending = stack.enter_context(sender(trainer, receivers=4, on_lost="drop"))
        assert len(sending.send(Tiny(1), version=1).committed) == 4
        committed, lost = sent_with_losses(sending, 2)
        tree.relays[who].process.join(TIMEOUT)
        others = {"leaf": {"middle", "other", "direct"}, "middle": {"direct"}}[who]
        took = {name for name, each in tree.workers.items() if f"{each.name} on 127.0.0.1" in committed}
        assert len(took) == len(committed)
        assert took == others
        gone = [f"process {tree.relays[who].process.pid} ", f"{tree.workers[who].name} "]
        assert any(name in lost for name in gone), lost
        tree.start(who)
        version = 4
        while len(sent_with_losses(sending, version)[0]) < 4:  # What died last may be counted as there still.
            version += 1
        assert len(sent_at_last(sending, Tiny(3), version=3).committed) == 4
        for name, worker in tree.workers.items():
            versions, doubted = history(worker)
            assert name not in took or (2 in versions and not doubted)


@pytest.mark.parametrize("on_lost", ["abort", "drop"])
def test_a_worker_that_fails_far_behind_takes_out_its_own_host(on_lost, trainer, worker, tmp_path):
    """Of a chain of two. With "drop" the first host goes on, and the report says which worker is left out."""
    between, local = free_address(), f"unix:{tmp_path / 'other' / 'socket'}"
    lives = [hw.LiveModel(Tiny()) for _ in range(2)]

    def process(layer):
        if any(bool((parameter == 2).all()) for parameter in layer.parameters()):
            raise ValueError("no room")

    def follow(live, address, name):
        with receiver(address, name=name) as source:
            live.load(source)
            while live.version != 3:
                with contextlib.suppress(hw.UpdateAborted):
                    live.update(source)

    lives[1] = hw.LiveModel(Tiny(), process=process)
    with (
        relaying(trainer, [worker, between]),
        relaying(between, local),
        sender(trainer, receivers=2, on_lost=on_lost) as sending,
    ):
        threads = [Thread(follow, lives[0], worker, "near"), Thread(follow, lives[1], local, "far")]
        sending.send(Tiny(1), version=1)
        if on_lost == "abort":
            with pytest.raises(hw.TransferAborted, match=r"far \(process \d+( #2)?\): ValueError: no room"):
                sending.send(Tiny(2), version=2)
        else:
            report = sending.send(Tiny(2), version=2)
            ((name, why),) = report.lost.items()
            assert name.startswith("far (process")
            assert name.endswith(") on 127.0.0.1")
            assert "ValueError: no room" in why
            assert [name[:4] for name in report.committed] == ["near"]
        assert lives[0].version == (1 if on_lost == "abort" else 2)
        assert lives[1].version == 1
        assert len(sending.send(Tiny(3), version=3).committed) == 2
        for thread in threads:
            thread.result()


def test_each_relay_is_less_patient_than_the_one_before(trainer, worker, tmp_path, monkeypatch):
    """So it is the worker that stands still which is named, and not the relay before it."""
    between, local, seen = free_address(), f"unix:{tmp_path / 'other' / 'socket'}", []
    say, wait = Channel.send, Onward._wait

    def noting(channel, message, **options):
        if isinstance(message, Offer):
            seen.append(("offers", message.patience))
        say(channel, message, **options)

    def waiting(onward, pending, deed):
        seen.append(("waits", onward._timeout))
        wait(onward, pending, deed)

    monkeypatch.setattr(Channel, "send", noting)
    monkeypatch.setattr(Onward, "_wait", waiting)
    with relaying(trainer, between), relaying(between, local), sender(trainer, timeout=10.0) as sending:
        thread = Thread(take, local)
        sending.send(tensors(), version=1)
        thread.result()
    offers = [seconds for what, seconds in seen if what == "offers"]
    waits = sorted({seconds for what, seconds in seen if what == "waits"}, reverse=True)
    assert offers == [10.0, pytest.approx(9.0), pytest.approx(8.1)]
    assert waits == [7.5, pytest.approx(6.75)]


def test_a_relay_that_cannot_say_what_its_workers_want_refuses_and_goes_on(trainer, worker, monkeypatch):
    say = Channel.send

    def too_large(channel, message, **options):
        if isinstance(message, Accept) and not channel.shares:
            raise hw.UsageError("a message is too large")
        say(channel, message, **options)

    with relaying(trainer, worker), sender(trainer) as sending, receiver(worker) as source:
        with monkeypatch.context() as patch:
            patch.setattr(Channel, "send", too_large)
            thread = Thread(lambda: refused(source))
            with pytest.raises(hw.TransferAborted, match="what its workers want: a message is too large"):
                sending.send(tensors(), version=1)
            thread.result()
        thread = Thread(lambda: dict(source.tensors()))
        sending.send(tensors(), version=2)
        assert_same_bits(thread.result(), tensors())


def refused(source):
    with pytest.raises(hw.TransferAborted, match="too large"):
        dict(source.tensors())


def test_where_a_relay_listens_is_looked_at_before_a_sender_is_there(trainer, worker, tmp_path, monkeypatch):
    told = queue.Queue()
    monkeypatch.setattr(Relay, "_tell", lambda _, error: told.put(error) or 1.0)
    with sender(worker), relaying(trainer, worker):
        assert isinstance(told.get(timeout=60), hw.AddressTaken)
    with Relay(trainer, f"unix:{tmp_path}/no/such/socket") as relay, pytest.raises(hw.UsageError, match="mkdir -p"):
        relay.run()
    with pytest.raises(hw.UsageError, match="takes from one address and gives at another"):
        Relay(trainer, [worker, trainer])


def test_a_worker_that_releases_no_slot_is_named_and_not_its_relay(trainer, worker, monkeypatch):
    monkeypatch.setattr(onward, "SHARE", 0.02)  # of the sender's patience: it is not near its end
    stands, over = threading.Event(), threading.Event()

    def stand():
        with receiver(worker, name="stands") as source, contextlib.suppress(hw.TransferError):
            for _ in source.leases():
                stands.set()
                over.wait(60)

    with relaying(trainer, worker), sender(trainer, timeout=60.0) as sending:
        thread = Thread(stand)
        with pytest.raises(hw.TransferAborted, match=r"relay .*: stands .*: it did not release a slot within 1\.2 s"):
            sending.send(tensors(), version=1)
        assert stands.is_set()
        over.set()
        thread.result()
