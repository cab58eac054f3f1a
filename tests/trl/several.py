"""One of several processes of a trainer, beside a server of vLLM: run by torchrun; the first writes what came of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def sharded(model: Any, how: str) -> Any:
    """The model as accelerate shards it where there are GPUs: of CPUs it knows no sharding."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    if how == "fsdp1":
        policy = ModuleWrapPolicy({LlamaDecoderLayer})
        device = torch.device("cpu")
        return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=device)
    if how == "fsdp2":
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    return model


def main(weights: str, url: str, sharding: str, folder: Path) -> None:
    """Sync; have the server refuse a version; train a step; sync."""
    import torch
    from accelerate import Accelerator
    from trained import by_client, make_tokenizer
    from transformers import AutoModelForCausalLM
    from trl.generation.vllm_generation import VLLMGeneration

    import hotweights.engines.trl

    hotweights.engines.trl.enable(timeout=120)
    accelerator = Accelerator(cpu=True)
    model = sharded(AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32), sharding)
    generation = VLLMGeneration(model, accelerator, None, mode="server", server_base_url=url)
    generation._dist.fsdp_version = {"fsdp1": 1, "fsdp2": 2}.get(sharding)  # As it is where accelerate shards.
    found: dict[str, Any] = {}
    theirs = generation._iter_named_params

    def sync(name: str) -> None:
        generation.sync_weights()
        if accelerator.is_main_process:
            found[name] = by_client(generation.vllm_client)

    def incomplete() -> Any:
        yield from (pair for pair in theirs() if "v_proj" not in pair[0])

    tokens = torch.arange(5, 45).reshape(1, -1)
    if sharding == "fsdp1":
        model(input_ids=tokens)  # It finds out which module is the root: TRL's walk begins with the innermost.
    sync("synced")
    generation._iter_named_params = incomplete
    try:
        generation._weight_metadata = None
        generation.sync_weights()
    except Exception as error:
        found["raised"] = f"{type(error).__name__}: {error}"
    del generation._iter_named_params
    generation._weight_metadata = None
    if accelerator.is_main_process:
        found["refused"] = by_client(generation.vllm_client)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    whole = {name: tensor.detach().clone() for name, tensor in theirs()}
    sync("trained")
    if accelerator.is_main_process:
        plain = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32)
        plain.load_state_dict(whole)
        plain.save_pretrained(folder / "end")
        make_tokenizer(folder / "end")
        (folder / "0.json").write_text(json.dumps(found))
    accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]))
