"""Engines in actors of Ray, by vLLM's own client for them: they take a version together or not at all."""

import re

from drive import OPTIONS
from trainers import BACKEND, DUMMY, caught, trained, trainer_of, without_last


def refits(paths):
    """A trainer of two actors, each of which has an engine of its own."""
    import ray
    from vllm import LLM
    from vllm.distributed.weight_transfer.base import ModuleSource
    from vllm.distributed.weight_transfer.clients import RayVLLMWeightSyncClient

    class Engine(LLM):
        """As users put it into an actor, and what this test asks of it."""

        def tokens(self):
            from drive import PROMPTS
            from vllm import SamplingParams

            greedy = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
            prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
            return [[*out.outputs[0].token_ids] for out in self.generate(prompts, greedy, use_tqdm=False)]

    options = {**OPTIONS, **BACKEND, **DUMMY}
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
    try:
        engines = [ray.remote(num_cpus=1)(Engine).remote(model=paths["A"], **options) for _ in range(2)]
        models = {weights: trained(paths[weights]) for weights in "AB"}
        trainer = trainer_of(RayVLLMWeightSyncClient(engines), ModuleSource(models["B"]), receivers=2, timeout=60)

        def state():
            ray.get([engine.reset_prefix_cache.remote() for engine in engines])
            return (
                ray.get([engine.tokens.remote() for engine in engines]),
                ray.get([engine.get_weight_version.remote() for engine in engines]),
            )

        found = [(len(trainer.send_weights("one").committed), *state())]
        trainer.source = without_last(models["A"])
        found.append((caught(lambda: trainer.send_weights("never")), *state()))
        trainer.source = ModuleSource(models["A"])
        found.append((len(trainer.send_weights("two").committed), *state()))

        # One of the two dies; its name is told, and a trainer of the other goes on.
        ray.kill(engines.pop())
        found.append((caught(lambda: trainer.send_weights("never")), *state()))
        trainer.shutdown()
        trainer = trainer_of(RayVLLMWeightSyncClient(engines), models["B"], receivers=1, timeout=60)
        found.append((len(trainer.send_weights("three").committed), *state()))
        trainer.shutdown()
    finally:
        ray.shutdown()
    return found


def test_engines_in_actors_take_versions_together(zoo):
    paths = {weights: str(zoo.checkpoint("llama", weights)) for weights in "AB"}
    said = {weights: zoo.fresh("llama", weights) for weights in "AB"}
    one, refused, two, lost, three = zoo.run(refits, None, paths)
    assert one == (2, [said["B"]] * 2, ["one"] * 2)
    assert "lm_head.weight: missing" in refused[0]
    assert refused[1:] == ([said["B"]] * 2, ["one"] * 2)
    assert two == (2, [said["A"]] * 2, ["two"] * 2)
    assert re.match("ActorDiedError|TransferAborted", lost[0]), lost[0]  # Whoever notices first.
    assert lost[1:] == ([said["A"]], ["two"])
    assert three == (1, [said["B"]], ["three"])
