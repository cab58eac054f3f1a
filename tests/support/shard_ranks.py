"""Trainer ranks for tests: processes with a group that sends nothing, which do what a test says, one by one."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from unittest import mock

import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # it registers the backend
from ends import Thread, receiver
from namespaces import enter
from processes import Child, Tiny, value_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial

import hotweights as hw
from hotweights.transfer.relay import Relay
from hotweights.transfer.sharded import meeting_place
from hotweights.transfer.sharded import rank as rank_module
from hotweights.transfer.sharded.filling import fill
from hotweights.transfer.sharded.link import Link
from hotweights.transfer.slot_flow import SlotOutflow


class Broad(nn.Module):
    """More than rank 0 has to bring: chunks that their ranks send themselves."""

    def __init__(self, value=0.0):
        super().__init__()
        self.one = nn.Parameter(torch.full((1200, 100), float(value)), requires_grad=False)
        self.two = nn.Parameter(torch.full((7,), float(value)).bfloat16(), requires_grad=False)
        self.three = nn.Parameter(torch.full((64, 1000), float(value)), requires_grad=False)


def content(kind, rank, size, value):
    """What a rank sends of a ``Tiny``: some rows of one tensor, and all of the other."""
    if kind == "copies":
        return Broad(value).state_dict()
    if kind == "broad":
        return broad(rank, size, value)
    full = Tiny(value).state_dict()
    rows = full["one"].chunk(size)
    start = sum(len(part) for part in rows[:rank])
    own = [hw.Shard("one", rows[rank], offset=(start, 0), shape=(300, 10))]
    if kind == "partly" and rank == 1:
        own = []
    if kind == "twice" and rank == 1:
        own = [hw.Shard("one", full["one"][: start + 1], offset=(0, 0), shape=(300, 10))]
    if kind == "apart":
        return [*own, ("two", full["two"] + (rank == 1))]
    if kind == "renamed" and rank == 1:
        own = [hw.Shard("model.one", rows[rank], offset=(start, 0), shape=(300, 10))]
    if kind == "summand" and rank == 1:
        mesh = init_device_mesh("cpu", (size,))
        partial = DTensor.from_local(full["one"], mesh, [Partial()], run_check=False)
        return {"one": partial, "two": full["two"]}
    if kind == "fails" and rank == 1:
        return failing()
    return [*own, ("two", full["two"])]


def broad(rank, size, value):
    """What a rank sends of a ``Broad``: some rows of one, all of the second, and the last rank all of the third."""
    full = Broad(value).state_dict()
    rows = full["one"].chunk(size)
    start = sum(len(part) for part in rows[:rank])
    third = [("three", full["three"])] if rank == size - 1 else []
    return [hw.Shard("one", rows[rank], offset=(start, 0), shape=(1200, 100)), ("two", full["two"]), *third]


def failing():
    yield "two", torch.ones(7).bfloat16()
    raise ValueError("no more")


SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "ctrl-c": signal.SIGINT}


def filling_and_writing(memory, tasks, held):
    digests = fill(memory, tasks, held)
    held.tensors[0].add_(0)
    return digests


class LinkKiller:
    """Kills, stops or interrupts this process before or after its ``at``-th word, said or heard, once it is armed.

    A part of a slot that is given away is a word, too.
    """

    def __init__(self, at):
        self.left, self.armed, self.signal = at, False, signal.SIGKILL

    def point(self):
        if self.armed:
            if self.left == 0:
                self.armed = False
                os.kill(os.getpid(), self.signal)
            self.left -= 1

    def __enter__(self):
        send, read, give = Link.send, Link.read, SlotOutflow.give

        def sending(link, word, **options):
            self.point()
            send(link, word, **options)
            self.point()

        def reading(link):
            word = read(link)
            if word is not None:
                self.point()
            return word

        def giving(flow, *what):
            self.point()
            give(flow, *what)
            self.point()

        self._patches = [mock.patch.object(Link, "send", sending), mock.patch.object(Link, "read", reading)]
        self._patches.append(mock.patch.object(SlotOutflow, "give", giving))
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *error):
        for patch in self._patches:
            patch.stop()


@contextmanager
def as_far(far=True):
    """Do as if rank 0 were on another host: its memory cannot be reached."""
    with mock.patch.object(meeting_place, "_linked", return_value=None) if far else nullcontext():
        yield


def tried(work):
    """What it returned, or the kind and the words of what it raised."""
    try:
        return work()
    except (Exception, KeyboardInterrupt) as error:
        return type(error).__name__, str(error)


def rank_of(pipe, rank, size, store, address, options):
    """A rank: it makes its sender, and sends what it is told."""
    dist.init_process_group("fake", store=dist.FileStore(store, 99), rank=rank, world_size=size)
    options = {"slots": 2, "slot_nbytes": 4096, **options}
    if hosts := options.pop("hosts", None):
        enter(hosts[rank])
    with as_far(rank in options.pop("far", ())):
        made = tried(lambda: hw.Sender(address, group=dist.group.WORLD, **options))
    if isinstance(made, tuple):
        pipe.send(made)
        return
    pipe.send("ready")
    with made, LinkKiller(-1) as killer:
        while (order := pipe.recv()) is not None:
            kind, version, value = order
            if kind == "destroy":
                dist.destroy_process_group()
                continue
            if kind in SIGNALS:
                killer.left, killer.armed, killer.signal = value, True, SIGNALS[kind]
                continue
            writes = mock.patch.object(rank_module, "fill", filling_and_writing) if kind == "writes" else nullcontext()
            with writes:
                report = tried(lambda: made.send(content(kind, rank, size, value), version=version))  # noqa: B023
            pipe.send(report if isinstance(report, tuple) else ("sent", str(report.version)))


class Trainer:
    """Some ranks of one group."""

    def __init__(self, ranks):
        self.ranks = ranks

    def order(self, kind, version, value=0, ranks=None):
        for rank in self.ranks if ranks is None else [self.ranks[number] for number in ranks]:
            rank.say((kind, version, value))

    def heard(self, ranks=None):
        return [
            rank.heard(60.0) for rank in (self.ranks if ranks is None else [self.ranks[number] for number in ranks])
        ]

    def send(self, kind, version, value=0, ranks=None):
        """What all these ranks say when they have sent."""
        self.order(kind, version, value, ranks)
        return self.heard(ranks)


@contextmanager
def trainer(folder, address, size, *, ranks=None, **options):
    """A trainer of so many ranks, which end with the ``with``; ``ranks`` are those that come.

    ``far`` are those that do as if they were on another host; ``hosts`` are the namespaces of all.
    """
    store = str(folder / f"store-{len(list(folder.iterdir()))}")
    open(store, "w").close()
    with ExitStack() as stack:
        own = [
            stack.enter_context(Child(rank_of, rank, size, store, address, options))
            for rank in (range(size) if ranks is None else ranks)
        ]
        yield Trainer(own)
        for rank in own:
            if rank.process.is_alive():
                with suppress(BrokenPipeError):
                    rank.say(None)


def relays(pipe, host, source, to):
    """A relay on a host, until it is killed."""
    enter(host)
    with Relay(source, to, insecure=True, timeout=60) as running:
        pipe.send("there")
        running.run()


def works(pipe, host, address, model=Tiny):
    """A worker on a host: it takes versions until one is called ``last``, and says each."""
    enter(host)
    live = hw.LiveModel(model())
    with receiver(address, insecure=address.startswith("tcps"), timeout=60, offer_timeout=60) as source:
        while live.version != "last":
            try:
                live.load(source) if live.version is None else live.update(source)
            except hw.UpdateAborted:
                continue
            pipe.send((live.version, value_of(live.model)))


@contextmanager
def relayed(host, source, to):
    """A relay on a host, meanwhile."""
    with Child(relays, host, source, to) as relay:
        assert relay.heard() == "there"
        yield
        relay.process.kill()


class Worker:
    """Takes versions in a thread until one is called ``last``; ``values`` are those that it had."""

    def __init__(self, address, model=Tiny):
        self.live = hw.LiveModel(model())
        self.values = []
        self._thread = Thread(self._follow, address)

    def _follow(self, address):
        with receiver(address, offer_timeout=60) as source:
            while self.live.version != "last":
                try:
                    self.live.load(source) if self.live.version is None else self.live.update(source)
                except hw.UpdateAborted:
                    continue
                self.values.append((self.live.version, value_of(self.live.model)))

    def taken(self):
        self._thread.result()
        return self.values


def until_third(worker):
    """The versions that it had until the third, each whole."""
    had = set()
    while 3 not in had:
        version, value, _ = worker.heard(30.0)
        assert value == version
        had.add(version)
    return had


def alike(said, kind, words):
    """All ranks raised this, in the same words."""
    assert len(set(said)) == 1, said
    assert said[0][0] == kind
    assert words in said[0][1], said[0][1]
