"""The demo's part in int8: a quantized MiniLM takes weights in the checkpoint's precision while it answers."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from ...engines import transformers as engine
from ...engines.torchao import quantize
from ...errors import CheckpointError
from ...loading.load import load
from ...memory.wrappers import is_wrapper, leaves
from ...text import size
from .live import Embed, prove_reloads


def serve_quantised(console: Console, checkpoint: Path, embed: Embed) -> None:
    """Quantize by torchao, then do what the part before does; the proof is that torchao makes the same of a cold load.

    Raises:
        MissingPackage: torchao is not installed.
    """
    console.rule("[bold]7. The same in int8: each layer is quantized anew, in place")
    process = quantize()
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    plain = engine.build(checkpoint)
    load(plain, checkpoint, device="cpu")
    live = prove_reloads(
        console, checkpoint, embed, process=process, finish=lambda model: quantize_(model, Int8WeightOnlyConfig())
    )
    alike = float((embed(plain) * embed(live.model)).sum(1).min())
    if alike < 0.98:
        raise CheckpointError("int8 understands sentences otherwise", [f"cosine {alike:.3f}"])
    console.print(
        f"{'int8':>10}  {size(_nbytes(live.model))} of memory instead of {size(_nbytes(plain))}; "
        f"cosine of its embeddings to those: {alike:.3f} at least\n"
    )


def _nbytes(model: torch.nn.Module) -> int:
    tensors = (leaf for name, tensor in model.state_dict().items() for _, leaf in leaves(name, tensor))
    return sum(tensor.nbytes for tensor in tensors if not is_wrapper(tensor))
