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
