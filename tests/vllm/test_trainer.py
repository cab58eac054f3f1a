"""The trainer's end alone: what it reads of which source, what it tells the engines, what it raises."""

import pytest


class Engine:
    """Stands for an engine with one worker: it makes the calls of vLLM's client, and notes them."""

    def __init__(self, shape=(2, 3)):
        import torch

        import hotweights as hw

        self.live = hw.LiveModel(torch.nn.Linear(shape[1], shape[0], bias=False))
        self.live.load({"weight": torch.zeros(shape)}, version="zero")
        self.calls, self.failing, self.clients = [], None, [self]

    def world_size(self):
        return 1

    def init_weight_transfer_engine(self, init_info):
        import hotweights as hw

        self.receiver = hw.Receiver(init_info["address"], timeout=5, offer_timeout=5, reconnect=False)
        self.receiver.poll()

    def start_weight_update(self):
        self.calls.append("start")

    def update_weights(self, update_info):
        import hotweights as hw

        if self.failing == "elsewhere":  # Another trainer has connected, and the worker has left this one.
            return
        if self.failing == "before":
            self.receiver.close()
            raise ConnectionError("the server is gone")
        try:
            self.live.update(self.receiver)
        except hw.UpdateAborted:
            self.calls.append("refused")
        if self.failing == "after":
            raise ConnectionError("the answer was lost")

    def finish_weight_update(self, weight_version=None):
        self.calls.append(f"finish {weight_version}")
        if self.failing == "finish":
            raise ConnectionError("finish was lost")


class Meta:
    def __init__(self, name, shape, owners=None):
        import torch

        self.name, self.dtype, self.shape, self.owners = name, torch.float32, shape, owners


class Source:
    """Of vLLM 0.32; counts what is read."""

    def __init__(self, shape=(2, 3), held=None):
        self.shape, self.held, self.read = shape, held, 0

    def metadata(self):
        return [Meta("weight", self.shape), Meta("other", (1,))]

    def held_names(self):
        return self.held

    def __iter__(self):
        import torch

        for meta in self.metadata():
            self.read += 1
            yield meta.name, torch.ones(meta.shape)


class Newer(Source):
    """Of vLLM 0.33."""

    owners = (0,)

    @property
    def metadata(self):
        return [Meta("weight", self.shape, self.owners)]

    def iter_full(self):
        import torch

        self.read += 1
        yield "weight", torch.ones(self.shape)

    __iter__ = None


def outcome(act):
    try:
        return act()
    except Exception as error:
        return " ".join([type(error).__name__, str(error), *getattr(error, "__notes__", ())])


def life(source, rank=0, failing=None, shape=(2, 3), group=False):
    """What became of one call of ``send_weights``, and of everything that it touches."""
    import torch
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    from hotweights.engines.vllm import TrainerInit

    if group:
        torch.distributed.init_process_group("gloo", "tcp://127.0.0.1:0", rank=0, world_size=1)
    engine = Engine(shape)
    trainer = WeightTransferTrainerFactory.trainer_init(TrainerInit(rank=rank, timeout=5), client=engine, source=source)
    engine.failing = failing
    if failing == "elsewhere":
        engine.receiver.close()
    sent = outcome(trainer.send_weights)
    trainer.shutdown()
    return getattr(sent, "version", sent), engine.calls, engine.live.version, getattr(source, "read", None)


class OnlyWeight(Source):
    def metadata(self):
        return super().metadata()[:1]


class OfTwo(Newer):
    """Two ranks of the trainer have it, and rank 0 is the second of them."""

    owners = (1, 0)


class Pieces(Newer):
    def implements_iter_full(self):
        return False


@pytest.mark.parametrize("source", [OnlyWeight(), Newer(), OfTwo()])
def test_sources_of_both_versions_of_vllm(zoo, source):
    assert zoo.run(life, None, source) == (1, ["start", "finish 1"], 1, 1)


def model():
    import torch

    return torch.nn.Linear(3, 2, bias=False)


def test_the_model_itself_is_a_source(zoo):
    assert zoo.run(life, None, model()) == (1, ["start", "finish 1"], 1, None)


def test_other_ranks_read_along(zoo):
    assert zoo.run(life, None, OnlyWeight(), 1) == (None, [], "zero", 1)


def at_all_addresses():
    """What a trainer says that would tell engines of no host in particular."""
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    from hotweights.engines.vllm import TrainerInit

    where = TrainerInit(rank=0, timeout=5, address="tcps://0.0.0.0:0", insecure=True, receivers=1)
    engine, told = Engine((2, 3)), []
    engine.init_weight_transfer_engine = told.append
    return outcome(lambda: WeightTransferTrainerFactory.trainer_init(where, client=engine, source=Source())), told


def test_an_address_that_no_engine_can_connect_to_is_refused(zoo):
    said, told = zoo.run(at_all_addresses, None)
    assert "UsageError tcps://0.0.0.0:" in said
    assert "give the name or address of that host" in said
    assert told == [], "engines were told"


def test_a_source_that_does_not_gather_is_refused(zoo):
    newer = Newer()
    newer.owners = (1,)
    for source in (newer, Source(held=["weight"])):
        sent, calls, version, read = zoo.run(life, None, source)
        assert sent.startswith("UsageError rank 0 sends whole tensors")
        assert (calls, version, read) == ([], "zero", 0)


def test_a_source_that_has_pieces_only_is_refused(zoo):
    sent, calls, version, read = zoo.run(life, None, Pieces())
    assert sent.startswith("UsageError rank 0 sends whole tensors, and Pieces has pieces of them only")
    assert (calls, version, read) == ([], "zero", 0)


@pytest.mark.parametrize("group", [False, True])
def test_a_refused_version(zoo, group):
    """Other ranks of the trainer gather on: this one reads along, so that they do not wait for it."""
    sent, calls, version, read = zoo.run(life, None, Source(), 0, None, (2, 3), group)
    assert sent.startswith("TransferAborted")
    assert "other: unexpected" in sent
    assert (calls, version, read) == (["start", "refused", "finish None"], "zero", 2 if group else 0)


@pytest.mark.parametrize(
    ("failing", "said", "version", "finished"),
    [
        (
            "before",
            "Transfer(Aborted|Timeout) .*the call that asked .*the server is gone",
            "zero",
            None,
        ),
        ("elsewhere", "TransferTimeout .*An engine takes weights from one trainer", "zero", None),
        ("after", "TransferIncomplete version 1 was taken.*the answer was lost", 1, 1),
        ("finish", "ConnectionError finish was lost", 1, 1),
    ],
)
def test_calls_that_fail(zoo, failing, said, version, finished):
    sent, calls, live, _ = zoo.run(life, None, OnlyWeight(), 0, failing)
    assert (calls, live) == (["start", f"finish {finished}"], version)
    import re

    assert re.search(said, sent, re.DOTALL), sent
