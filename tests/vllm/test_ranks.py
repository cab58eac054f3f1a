"""Two tensor-parallel ranks: each reads its slices, and they take a version together or not at all."""

import re
import threading

import pytest
from drive import Talker
from trainers import BACKEND, caught, trained, trainer_of, without_last

TWO = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


def fail_on(worker, rank, count):
    """Let processing fail on one rank after ``count`` layers; with a negative count, not any more."""
    from hotweights.engines.vllm.attached import attached

    if worker.rank != rank:
        return
    live = attached(worker.get_model())
    process = live.__dict__.setdefault("_process_before", live._once._process)
    calls = []

    def failing(layer):
        calls.append(layer)
        if len(calls) > count:
            raise RuntimeError("this rank is broken")
        process(layer)

    live._once._process = process if count < 0 else failing


def send(path, address):
    """A trainer, of whom both ranks receive."""
    import hotweights as hw

    with hw.open(path) as source, hw.Sender(address, receivers=2) as sender:
        sender.send(source, version="sent")


def tour(talker: Talker, paths, address):
    import hotweights as hw
    from hotweights.engines import vllm as engine

    llm = talker.llm
    said = {"A": talker.tokens()}
    reports = {}
    for weights in "BAB":
        outcome = engine.update(llm, paths[weights], version=weights)
        assert [one["version"] for one in outcome.ranks] == [weights, weights]
        said[weights + " again" if weights in said else weights] = talker.tokens()
        reports[weights] = [one["report"]["bytes_read"] for one in outcome.ranks]
    refused = {}
    for rank in (0, 1):
        llm.collective_rpc(fail_on, args=(rank, 3))
        with pytest.raises(hw.UpdateAborted) as caught:
            engine.update(llm, paths["A"])
        llm.collective_rpc(fail_on, args=(rank, -1))
        refused[rank] = str(caught.value), talker.tokens(), [one["version"] for one in engine.status(llm)]
    with pytest.raises(hw.UpdateAborted) as caught:
        engine.update(llm, paths["A"] + "-not-there")
    refused["nothing"] = str(caught.value), talker.tokens(), [one["version"] for one in engine.status(llm)]
    trainer = threading.Thread(target=send, args=(paths["A"], address))
    trainer.start()
    outcome = engine.update(llm, address, timeout=30)
    trainer.join()
    said["A, sent"] = talker.tokens()
    assert [one["version"] for one in outcome.ranks] == ["sent", "sent"]
    return said, reports, refused, refits(talker, paths)


def refits(talker: Talker, paths):
    """By vLLM's weight transfer. Where one rank raised, the next call would read the answer of the other."""
    from vllm.distributed.weight_transfer.base import ModuleSource

    from hotweights.engines import vllm as engine

    llm, model = talker.llm, trained(paths["B"])
    trainer = trainer_of(engine.LLMClient(llm), ModuleSource(model))
    found = [(trainer.send_weights("refit").version, talker.tokens())]
    for rank in (None, 0, 1):  # Both refuse; then one of them fails.
        trainer.source = without_last(model) if rank is None else ModuleSource(model)
        if rank is not None:
            llm.collective_rpc(fail_on, args=(rank, 3))
        found.append((caught(trainer.send_weights), talker.tokens()))
        if rank is not None:
            llm.collective_rpc(fail_on, args=(rank, -1))
        ranks = engine.status(llm, digest=False)
        assert [(one["version"], one["session_open"]) for one in ranks] == [("refit", False)] * 2
    llm.start_weight_update()  # By a trainer that died.
    trainer.shutdown()
    trainer = trainer_of(engine.LLMClient(llm), ModuleSource(trained(paths["A"])))
    found.append((trainer.send_weights("last").version, talker.tokens()))
    found.append((llm.get_weight_version(), [one["version"] for one in engine.status(llm, digest=False)]))
    trainer.shutdown()
    return found


@pytest.mark.parametrize("name", ["qwen3"])
def test_ranks_take_a_version_together(zoo, name, tmp_path):
    paths = {weights: str(zoo.checkpoint(name, weights)) for weights in "AB"}
    expected = {weights: zoo.fresh(name, weights, **TWO) for weights in "AB"}
    assert expected["A"] != expected["B"]
    said, reports, refused, refits = zoo.run(
        tour, zoo.checkpoint(name, "A"), paths, f"unix:{tmp_path}/t", options={**BACKEND, **TWO}
    )
    assert {one: expected[one[0]] == tokens for one, tokens in said.items()} == dict.fromkeys(said, True)
    whole = sum(file.stat().st_size for file in zoo.checkpoint(name, "B").glob("*.safetensors"))
    for each in reports.values():
        assert max(each) < 0.9 * whole, "each rank reads its slices"
    for rank, (why, tokens, versions) in refused.items():
        assert tokens == expected["B"]
        assert versions == ["B", "B"]
        assert why.startswith("version 'B' is live on all ranks; ")
        if rank != "nothing":
            assert re.search(f"rank {rank}: .*this rank is broken", why)
            assert f"rank {1 - rank}" not in why
        else:
            assert "no such file" in why
    assert refits[0] == ("refit", expected["B"])
    assert [tokens for _, tokens in refits[1:4]] == [expected["B"]] * 3
    assert "lm_head.weight: missing" in refits[1][0]
    for rank in (0, 1):
        assert re.search(f"rank {rank} .*this rank is broken", refits[2 + rank][0])
    assert refits[4:] == [("last", expected["A"]), ("last", ["last", "last"])]
