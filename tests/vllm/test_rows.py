"""Kinds of models that were tried once, several in one process: each tensor is what vLLM's own load makes of it.

Loaded from A, updated to B, and back. Nothing is packed out of sight, and no engine runs.
"""

import cases
import pytest
from test_loading import join, load


def rows(paths):
    """For each model, the names of the tensors that differ after the load, the update and the one back."""
    import torch
    import vllm._custom_ops as ops
    import vllm.model_executor.layers.utils as utils

    from hotweights.engines.vllm.attached import as_loaded, attached
    from hotweights.model.digests import digest_of

    ops._supports_onednn = False
    utils.check_cpu_sgl_kernel = lambda *_: False
    join()
    found = {}
    for name, by_weights in paths.items():
        theirs, options = {}, cases.MORE[name].engine
        for weights, path in by_weights.items():
            theirs[weights] = digest_of(load(path, options)[0]).tensors
        assert theirs["A"] != theirs["B"]
        model, config = load(by_weights["A"], {**options, "load_format": "hotweights"})
        differing = []
        for weights in "ABA":
            if differing or weights == "B":
                with as_loaded(model, config), torch.no_grad():
                    attached(model).update(by_weights[weights])
            ours = digest_of(model).tensors
            wanted = theirs[weights]
            differing.append(sorted(key for key in {**ours, **wanted} if ours.get(key) != wanted.get(key)))
        found[name] = differing
    return found


@pytest.mark.parametrize(
    "names",
    [
        ("olmoe", "qwen2-moe", "deepseek-v3"),
        ("gemma2", "olmo2", "granite"),
        ("phi3", "starcoder2", "gpt-neox"),
        ("gpt2", "opt", "bloom", "w4a16"),
    ],
    ids="-".join,
)
def test_every_tensor_after_a_load_and_two_updates(zoo, names):
    paths = {name: {weights: str(zoo.checkpoint(name, weights)) for weights in "AB"} for name in names}
    assert zoo.run(rows, None, paths) == {name: [[], [], []] for name in names}
