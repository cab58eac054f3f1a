"""Workers that are killed at each step of a refit: other engines hold whole versions, the trainer is told."""

import os
import signal

import pytest
from drive import Talker
from trainers import BACKEND, caught, trained, trainer_of

TWO = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
PHASES = (
    *("before receive_weights", "before Accept", "in stream", "in processing", "before Prepared"),
    *("after Prepared", "before commit", "before Done", "after receive_weights"),
)
"""Where a worker is killed. Before the last four it cannot have taken the version, and nobody has it then."""


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def doom(worker, rank, phase):
    """Have this worker killed there in its next update."""
    from hotweights.engines.vllm.attached import attached
    from hotweights.engines.vllm.backend import Backend
    from hotweights.live.update import Update
    from hotweights.transfer.channel import Channel
    from hotweights.transfer.inbound import Inbound

    if worker.rank != rank:
        return
    when, what = phase.split()
    if what == "processing":
        attached(worker.get_model())._once._process = lambda layer: kill()
        return
    places = {
        "receive_weights": (Backend, "receive_weights"),
        "stream": (Inbound, "_lease"),
        "commit": (Update, "_make_live"),
    }
    owner, name = places.get(what, (Channel, "send"))
    act = getattr(owner, name)

    def deadly(self, first, *given, **more):
        here = owner is not Channel or type(first).__name__ == what
        if here and when == "before":
            kill()
        result = act(self, first, *given, **more)
        if here:  # After the first tensor, where it is in the stream.
            kill()
        return result

    setattr(owner, name, deadly)


def serve(talker: Talker, pipe):
    """An engine that does what it is told, until nobody tells it anything."""
    from hotweights.engines import vllm as engine

    client = engine.LLMClient(talker.llm)
    acts = {
        "tokens": talker.tokens,
        "doom": lambda *given: talker.llm.collective_rpc(doom, args=given),
        "state": lambda: (
            {one["version"] for one in engine.status(talker.llm, digest=False)},
            {one["session_open"] for one in engine.status(talker.llm, digest=False)},
            talker.llm.get_weight_version(),
            talker.llm.llm_engine.is_sleeping(),
        ),
    }
    while True:
        try:
            what, given = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((acts.get(what) or getattr(client, what))(*given))
        except Exception as error:
            pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))


class Remote:
    """The client of an engine in another process; of ours it has all that a trainer calls."""

    def __init__(self, pipe):
        self.pipe = pipe

    def ask(self, what, *given):
        self.pipe.send((what, given))
        answer = self.pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def world_size(self):
        return self.ask("world_size")

    def init_weight_transfer_engine(self, init_info):
        self.ask("init_weight_transfer_engine", init_info)

    def start_weight_update(self):
        self.ask("start_weight_update")

    def update_weights(self, update_info):
        self.ask("update_weights", update_info)

    def finish_weight_update(self, weight_version=None):
        self.ask("finish_weight_update", weight_version)


def refits(paths, phase, rank, pipes):
    """A trainer of two engines, of whose second a worker is killed; what the first has then, and after the next one."""
    from hotweights.engines.vllm import Clients

    well, ill = map(Remote, pipes)
    trainer = trainer_of(Clients(well, ill), trained(paths["B"]), timeout=60)
    found = [trainer.send_weights("one").version, well.ask("tokens"), ill.ask("state")]
    ill.ask("doom", rank, phase)
    trainer.source = trained(paths["A"])
    found += [caught(lambda: trainer.send_weights("two")), well.ask("state"), well.ask("tokens")]
    found.append(caught(lambda: trainer.send_weights("three")))
    found.append(well.ask("state"))
    trainer.shutdown()
    trainer = trainer_of(Clients(well), trained(paths["B"]), timeout=60)
    found += [len(trainer.send_weights("four").committed), well.ask("state"), well.ask("tokens")]
    trainer.shutdown()
    return found


@pytest.fixture(scope="module")
def well(zoo):
    """The engine that outlives them all."""
    with zoo.serving(serve, zoo.checkpoint("llama", "A"), options=BACKEND) as pipe:
        yield pipe


def killed(zoo, well, phase, rank, options):
    paths = {weights: str(zoo.checkpoint("llama", weights)) for weights in "AB"}
    said = {weights: zoo.fresh("llama", weights) for weights in "AB"}
    with zoo.serving(serve, zoo.checkpoint("llama", "A"), options={**BACKEND, **options}) as ill:
        found = zoo.run(refits, None, paths, phase, rank, (well, ill))
    first, tokens, state, told, after, held, third, still, count, last, again = found
    assert (first, tokens) == ("one", said["B"])
    assert state == ({"one"}, {False}, "one", False)
    decided = phase in PHASES[-3:] or (phase == "after Prepared" and "TransferIncomplete" in told)
    live = "two" if decided else "one"
    assert ("TransferIncomplete" if decided else "TransferAborted") in told
    assert held == said["A" if decided else "B"]
    assert after == still == ({live}, {False}, live, False), "its label is the version, and it goes on"
    assert third != "nothing was raised"
    assert (count, last, again) == (1, ({"four"}, {False}, "four", False), said["B"])


@pytest.mark.parametrize("phase", PHASES)
def test_an_engine_of_one_worker_is_killed(zoo, well, phase):
    killed(zoo, well, phase, 0, {})


@pytest.mark.parametrize(
    ("phase", "rank"), [("in stream", 1), ("in processing", 0), ("before Prepared", 1), ("before commit", 1)]
)
def test_one_of_two_ranks_is_killed(zoo, well, phase, rank):
    """vLLM ends such an engine as a whole."""
    killed(zoo, well, phase, rank, TWO)
