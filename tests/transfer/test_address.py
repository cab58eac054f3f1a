"""One address, one sender: others are refused with its pid, what the dead left is replaced, strangers stay out."""

import contextlib
import os
import signal
import socket
import stat
import subprocess

import pytest
import torch
from ends import Thread, receiver, sender
from processes import Child, context

import hotweights as hw
from hotweights.transfer import address as address_module
from hotweights.transfer import connection as connection_module


def test_a_second_sender_is_refused_with_the_pid_of_the_first(address):
    def hold(pipe):
        with sender(address):
            pipe.send("held")
            pipe.recv()

    with Child(hold) as first:
        first.heard()
        with pytest.raises(hw.AddressTaken, match=f"another sender, process {first.process.pid}$"):
            sender(address)
        first.say("end")
    with sender(address), pytest.raises(hw.AddressTaken, match=f"in this process, {os.getpid()}"):
        sender(address)
    with sender(address):
        pass


def test_a_directory_whose_parent_does_not_exist(tmp_path):
    deep = tmp_path / "not" / "there yet"
    with pytest.raises(hw.UsageError, match="make it with: mkdir") as caught:
        sender(f"unix:{deep / 'socket'}")
    assert not deep.exists()
    subprocess.run(str(caught.value).rpartition("make it with: ")[2], shell=True, check=True, timeout=60)
    with sender(f"unix:{deep / 'socket'}"):
        pass


def test_starters_that_race_for_a_stale_socket_agree_on_one(address):
    path = address.removeprefix("unix:")
    for _ in range(5):
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        stale = socket.socket(socket.AF_UNIX)
        stale.bind(path)
        stale.close()  # as a process that was killed leaves it
        start = context.Barrier(4)

        def race(pipe, start=start):
            start.wait(10)
            try:
                held = sender(address)
            except hw.AddressTaken as error:
                pipe.send(str(error))
            else:
                pipe.send("won")
                pipe.recv()
                held.close()

        with contextlib.ExitStack() as stack:
            racers = [stack.enter_context(Child(race)) for _ in range(4)]
            said = [racer.heard() for racer in racers]
            assert said.count("won") == 1
            winner = racers[said.index("won")]
            refusals = [word for word in said if word != "won"]
            assert all(str(winner.process.pid) in refusal or "just started" in refusal for refusal in refusals)
            assert os.path.exists(path)
            winner.say("end")
        assert not os.listdir(os.path.dirname(path))


def test_a_killed_sender_leaves_nothing_that_stops_the_next(address):
    def die(pipe):
        sender(address)
        os.kill(os.getpid(), signal.SIGKILL)

    with Child(die) as killed:
        pass
    assert killed.exitcode == -signal.SIGKILL
    assert sorted(os.listdir(os.path.dirname(address.removeprefix("unix:")))) == ["socket", "socket.lock"]
    with sender(address):
        pass
    assert not os.listdir(os.path.dirname(address.removeprefix("unix:")))


def test_only_its_user_can_enter(address, tmp_path):
    path = address.removeprefix("unix:")
    with sender(address):
        assert stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode) == 0o700
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    os.chmod(os.path.dirname(path), 0o755)
    with pytest.raises(hw.UsageError, match="mode 755"):
        sender(address)


def test_another_user_is_refused_by_both_sides(address, monkeypatch):
    real = os.geteuid()

    def connect():
        with receiver(address, offer_timeout=2) as source:
            return source.manifest

    with sender(address, timeout=0.3) as sending:
        monkeypatch.setattr(address_module.os, "geteuid", lambda: real + 1)
        thread = Thread(connect)
        with pytest.raises(hw.ProtocolError, match=f"belongs to user {real}"):
            thread.result()
        with pytest.raises(hw.TransferTimeout, match="0 of 1"):
            sending.send({"w": torch.zeros(1)}, version=1)


def test_what_is_no_socket_is_left_alone(address):
    path = address.removeprefix("unix:")
    os.makedirs(os.path.dirname(path), 0o700)
    with open(path, "w") as file:
        file.write("precious")
    with pytest.raises(hw.UsageError, match="no socket"):
        sender(address)
    with open(path) as file:
        assert file.read() == "precious"


@pytest.mark.parametrize("wrong", ["run/socket", "tcp:127.0.0.1:80", "unix:", f"unix:/{'x' * 200}"])
def test_wrong_addresses_say_what_is_right(wrong):
    for make in (hw.Sender, hw.Receiver):
        with pytest.raises(hw.UsageError, match=r"unix:/|107 bytes"):
            make(wrong)


def test_a_receiver_refuses_a_directory_in_which_no_sender_would_listen(tmp_path):
    (tmp_path / "all").mkdir()
    (tmp_path / "all").chmod(0o755)
    address = f"unix:{tmp_path}/all/socket"
    with receiver(address) as source:
        for act in (lambda: sender(address), source.poll, lambda: source.manifest):
            with pytest.raises(hw.UsageError, match=r"not this user's alone \(mode 755\)"):
                act()


def test_a_wait_for_a_sender_is_logged_once(address, monkeypatch, caplog):
    monkeypatch.setattr(connection_module, "QUIET", 0.0)
    with receiver(address, offer_timeout=0.2) as source, pytest.raises(hw.TransferTimeout):
        source.manifest  # noqa: B018
    assert [record.getMessage() for record in caplog.records] == [
        f"waiting for a sender at {address}: nobody listens there"
    ]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [("tcps://trainer", "the port is missing"), ("/tmp/hw/socket", "is meant: unix:/tmp/hw/socket$")],
)
def test_what_an_address_lacks_is_said(wrong, said):
    for end in (hw.Sender, hw.Receiver):
        with pytest.raises(hw.UsageError, match=said):
            end(wrong, insecure=True) if wrong.startswith("tcps") else end(wrong)


def test_a_sender_is_no_source_and_its_receiver_is_named(address):
    with (
        sender(address) as sending,
        pytest.raises(hw.UsageError, match=r"a Sender sends; .* hotweights\.Receiver") as said,
    ):
        hw.LiveModel(torch.nn.Linear(1, 1)).load(sending)
    assert address in str(said.value)


def test_an_update_before_any_load_waits_for_nothing(address):
    with receiver(address, offer_timeout=0.2) as source:
        with pytest.raises(hw.UsageError, match="nothing was loaded yet"):
            hw.LiveModel(torch.nn.Linear(1, 1)).update(source)
        assert not source._connection.connected


def test_who_comes_late_needs_a_longer_timeout(address):
    with sender(address, timeout=0.01) as sending, pytest.raises(hw.TransferTimeout, match=r"raise timeout= of the"):
        sending.send({"a": torch.zeros(1)}, version=1)


def test_a_stream_left_by_break_lives_until_it_is_closed(address):
    """As help(Receiver) says."""
    content = {"a": torch.zeros(1), "b": torch.zeros(1)}

    def work():
        with receiver(address) as source, source.leases() as stream:
            for _ in stream:
                break
            assert not source._inbound.member.over

    with sender(address) as sending:
        worker = Thread(work)
        with pytest.raises(hw.TransferAborted):
            sending.send(content, version=1)
        worker.result()
