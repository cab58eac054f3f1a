"""A model that hotweights loads is what vLLM loads, tensor by tensor, before and after processing."""

import cases
import pytest

OPTIONS = ({"load_format": "auto"}, {"load_format": "hotweights"})


def join():
    """Be the only rank of an engine that is none."""
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    torch.accelerator.empty_cache = lambda: None  # As vLLM's CPU worker has it.
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, "tcp://127.0.0.1:0", 0, backend="gloo")
        initialize_model_parallel(1)


def load(path, options):
    """The model, as an engine's worker would have it loaded, and vLLM's config of it."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    config = EngineArgs(
        model=path, skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True, max_model_len=256, **options
    ).create_engine_config()
    with set_current_vllm_config(config):
        return get_model(vllm_config=config), config


def compared(path, options, plain):
    """Names of the tensors that differ between vLLM's own load and ours, and how many there are."""
    import torch
    import vllm._custom_ops as ops
    import vllm.model_executor.layers.utils as utils

    from hotweights.model.digests import digest_of

    if plain:  # Nothing is packed out of sight.
        ops._supports_onednn = False
        utils.check_cpu_sgl_kernel = lambda *_: False
    join()
    found = []
    for one in OPTIONS:
        torch.manual_seed(len(found))
        found.append(digest_of(load(path, {**options, **one})[0]).tensors)
    theirs, ours = found
    return sorted(name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)), len(theirs)


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "packed"])
@pytest.mark.parametrize("name", cases.CASES)
def test_every_tensor_is_what_vllm_makes_of_it(zoo, name, plain):
    options = cases.CASES[name].engine
    differing, count = zoo.run(compared, None, str(zoo.checkpoint(name, "A")), options, plain)
    assert differing == []
    assert count > 10
