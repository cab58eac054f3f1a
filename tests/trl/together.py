"""One process of a trainer that has several, with vLLM in each: run by torchrun, writes what came of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(start: str, weights: str, ranks: int, folder: Path) -> None:
    """Sync; have another process fail; sync again. ``ranks`` is how many share one model of vLLM."""
    import torch
    from accelerate import Accelerator
    from drive import Talker
    from trained import small_engines
    from transformers import AutoModelForCausalLM
    from trl.generation.vllm_generation import VLLMGeneration

    import hotweights.engines.trl

    small_engines()
    hotweights.engines.trl.enable()
    accelerator = Accelerator(cpu=True)
    model = AutoModelForCausalLM.from_pretrained(weights)
    model.name_or_path = start
    generation = VLLMGeneration(model, accelerator, None, mode="colocate", tensor_parallel_size=ranks)
    talker = Talker.__new__(Talker)
    talker.llm = generation.llm
    found = {"start": talker.tokens()}  # What follows a sync is asked first, so that nothing of it was cached.
    generation.sync_weights()
    found["synced"] = talker.tokens()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for tensor in model.parameters():
        tensor.data.mul_(1.5)
    theirs = generation._iter_named_params

    def failing():
        for number, pair in enumerate(theirs()):
            if number == 4 and accelerator.process_index == 1:
                raise RuntimeError("the gather failed")
            yield pair

    generation._iter_named_params = failing
    try:
        generation.sync_weights()
    except Exception as error:
        found["raised"] = f"{type(error).__name__}: {error}"
    generation.llm.reset_prefix_cache()  # Two ranks compute the rest of a cached prompt with other roundings.
    found["refused"] = talker.tokens()
    generation._iter_named_params = theirs
    generation.sync_weights()
    found["again"] = talker.tokens()
    model.load_state_dict(before)
    generation.sync_weights()
    found["back"] = talker.tokens()
    (folder / f"{accelerator.process_index}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
