"""Hostile members: a process connects, and says nothing, half, or nonsense, while good members take versions."""

import contextlib
import itertools
import os
import random
import socket
import threading
import time

from children import Child
from layers import WAYS, fault_of, live_model, version_of

import hotweights as hw
from hotweights.transfer.messages import HEADER, PROTOCOL, Accept, Done, Hello, Prepared, Release, Wanted, encode

NAME, WEIGHT = "hostile", 1
_TIMEOUT = 5.0  # seconds that the sender waits for a member
_BOUND = 60.0  # seconds that a send may take at most
_HELLO = encode(0, Hello(1))


def run(tally, draw, until, folder):
    (folder / "hostile").mkdir(mode=0o700)
    path = folder / "hostile" / "s"
    address = f"unix:{path}"
    on_lost = draw.choice(("drop", "drop", "abort"))
    sender = hw.Sender(address, receivers=2, slots=2, slot_nbytes=4096, timeout=_TIMEOUT, on_lost=on_lost)
    receivers = [hw.Receiver(address, timeout=10, offer_timeout=60) for _ in range(2)]
    members = [
        threading.Thread(target=_follow, args=(tally, receiver, draw.choice(WAYS)), daemon=True)
        for receiver in receivers
    ]
    with Child(_harm, str(path), draw.random()) as stranger:
        for member in members:
            member.start()
        try:
            for number in itertools.count(1):
                if time.monotonic() > until:
                    break
                _send(tally, sender, number, on_lost)
            if stranger.pipe.poll():
                tally.fault(f"the stranger ended: {stranger.heard(1)}")
        finally:
            for end in (*receivers, sender):
                end.close()
            for member in members:
                member.join(30)
                if member.is_alive():
                    tally.fault("a good member does not end")


def _send(tally, sender, number, on_lost):
    began, good, lost = time.monotonic(), f"process {os.getpid()}", []
    try:
        report = sender.send(version_of(number), version=number)
        tally.add("versions taken")
        tally.add("strangers dropped", len(report.lost))
        lost = [f"{name}: {why}" for name, why in report.lost.items()]
    except (hw.TransferAborted, hw.TransferIncomplete) as error:
        tally.add("versions refused")
        lost = [*error.problems]
    except hw.TransferTimeout:
        tally.add("good members came too late")
    except Exception as error:
        tally.fault("a send", error)
    if on_lost == "drop" and (mine := [line for line in lost if line.startswith(good)]):
        tally.fault(f"a good member was lost with version {number}: {mine}")
    if (seconds := time.monotonic() - began) > _BOUND:
        tally.fault(f"a send took {seconds:.0f} s")


def _follow(tally, receiver, atomic):
    live = live_model(atomic)
    while True:
        try:
            live.load(receiver) if live.version is None else live.update(receiver)
            tally.add("updates")
        except hw.Closed:
            return
        except hw.HotweightsError as error:
            if isinstance(error.__cause__, hw.Closed):
                return
            tally.add("failed updates")
        except Exception as error:
            tally.fault("a good member", error)
            return
        if live.version is not None and (wrong := fault_of(live)):
            tally.fault(f"a good member, {atomic}: {wrong}")


# What strangers say. Each takes a socket and a random generator.


def nothing(connection, draw):
    pass


def half_a_frame(connection, draw):
    connection.sendall(_HELLO[: draw.randrange(len(_HELLO))])


def the_start_of_a_large_frame(connection, draw):
    connection.sendall(HEADER.pack(b"hotw", PROTOCOL, 0, 0, 32 * 1024 * 1024) + bytes(200_000))


def noise(connection, draw):
    connection.sendall(draw.randbytes(draw.randrange(1, 5000)))


def noise_after_a_hello(connection, draw):
    connection.sendall(_HELLO + draw.randbytes(draw.randrange(1, 5000)))


def out_of_turn(connection, draw):
    messages = (Hello(1), Accept((Wanted(0),)), Release((0, 1, 2**40)), Prepared(), Done("x" * 1000))
    connection.sendall(_HELLO + b"".join(encode(draw.randrange(3), draw.choice(messages)) for _ in range(50)))


def a_damaged_frame(connection, draw):
    frame = bytearray(encode(0, Accept(tuple(map(Wanted, range(20))))))
    for _ in range(5):
        frame[draw.randrange(len(frame))] = draw.randrange(256)
    connection.sendall(_HELLO + frame)


def a_hello_and_no_answer(connection, draw):
    connection.sendall(_HELLO)


_WORDS = (
    *(nothing, half_a_frame, the_start_of_a_large_frame, noise, noise_after_a_hello, out_of_turn, a_damaged_frame) * 5,
    a_hello_and_no_answer,
)


def _harm(pipe, path, seed):
    """Connect again and again; some twenty connections are kept for a while."""
    draw = random.Random(seed)
    kept = []
    while True:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(0.5)
        with contextlib.suppress(OSError):
            connection.connect(path)
            draw.choice(_WORDS)(connection, draw)
        kept.append(connection)
        while len(kept) > 20 or (kept and draw.random() < 0.3):
            kept.pop(draw.randrange(len(kept))).close()
        time.sleep(draw.expovariate(100))
