"""An engine in a process of its own, with requests in flight while it is updated."""

import asyncio

from drive import OPTIONS, PROMPTS
from trainers import BACKEND, caught, trained, trainer_of, without_last

LONG = 120  # tokens: enough for an update to come in between


def asked(paths):
    return asyncio.run(_asked(paths))


async def _asked(paths):
    from vllm import SamplingParams
    from vllm.config import WeightTransferConfig
    from vllm.distributed.weight_transfer.base import ModuleSource
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    import hotweights as hw
    from hotweights.engines import vllm as hotweights

    options = {**OPTIONS, **BACKEND, "weight_transfer_config": WeightTransferConfig("hotweights")}
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=paths["A"], **options))

    async def request(name, count, begun=None):
        greedy = SamplingParams(
            temperature=0,
            max_tokens=count,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.CUMULATIVE,
        )
        async for output in engine.generate({"prompt_token_ids": PROMPTS[1]}, greedy, name):
            if begun is not None and len(output.outputs[0].token_ids) >= 3:
                begun.set()
        return [*output.outputs[0].token_ids], output.outputs[0].finish_reason

    async def across(mode, source):
        """A request that has begun when the update comes, and one that comes after it."""
        begun = asyncio.Event()
        running = asyncio.create_task(request(mode, LONG, begun))
        await begun.wait()
        outcome = await hotweights.update_async(engine, source, version=f"by {mode}", mode=mode)
        return outcome.version, await running, await request(f"{mode} after", 16)

    async def refits():
        """By a trainer in another thread, while a request runs."""
        model, client = trained(paths["A"]), hotweights.AsyncLLMClient(engine, asyncio.get_running_loop())
        here = caught(client.start_weight_update)
        trainer = await asyncio.to_thread(trainer_of, client, ModuleSource(model))
        begun = asyncio.Event()
        running = asyncio.create_task(request("in flight", LONG, begun))
        await begun.wait()
        report = await asyncio.to_thread(trainer.send_weights, "refit")
        found = [here, report.version, await running, await request("refitted", 16)]
        trainer.source = without_last(model)
        found += [await asyncio.to_thread(caught, trainer.send_weights), await request("refused", 16)]
        found += [await engine.get_weight_version(), await engine.is_paused()]
        await asyncio.to_thread(trainer.shutdown)
        return found

    try:
        found = {"A": await request("first", LONG)}
        found["wait"] = await across("wait", paths["B"])
        found["B"] = await request("second", LONG)
        try:
            await hotweights.update_async(engine, paths["A"] + "-not-there")
        except hw.UpdateAborted as error:
            found["refused"] = str(error), await engine.is_paused(), await request("third", 16)
        found["keep"] = await across("keep", paths["A"])
        found["abort"] = await across("abort", paths["B"])
        found["status"] = await hotweights.status_async(engine)
        found["refits"] = await refits()
    finally:
        engine.shutdown()
    return found


def test_requests_in_flight_of_another_process(zoo):
    paths = {weights: str(zoo.checkpoint("llama", weights)) for weights in "AB"}
    found = zoo.run(asked, None, paths)
    short = {weights: (zoo.fresh("llama", weights)[1], "length") for weights in "AB"}
    for weights in "AB":
        assert found[weights][0][:16] == short[weights][0]
    assert found["wait"] == ("by wait", found["A"], short["B"])
    assert "no such file" in found["refused"][0]
    assert found["refused"][1:] == (False, short["B"])
    version, (tokens, reason), after = found["keep"]
    assert (version, reason, after) == ("by keep", "length", short["A"])
    assert tokens[:3] == found["B"][0][:3]
    assert tokens not in (found["A"][0], found["B"][0])
    version, (tokens, reason), after = found["abort"]
    assert (version, reason, after) == ("by abort", "abort", short["B"])
    assert tokens == found["A"][0][: len(tokens)]
    assert [one["version"] for one in found["status"]] == ["by abort"]

    here, version, (tokens, reason), after, refused, still, label, is_paused = found["refits"]
    assert "let it run in another thread" in here
    assert (version, reason, after, still) == ("refit", "length", short["A"], short["A"])
    assert tokens[:3] == found["B"][0][:3]
    assert tokens not in (found["A"][0], found["B"][0])
    assert "missing" in refused
    assert (label, is_paused) == ("refit", False)
