"""Adapters: names that PEFT gives to tensors, and what to do with them where a model has no adapter."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from ..text import some

# What begins the parts of a name that only an adapter brings, by PEFT's kinds of adapters.
_KINDS = (
    "lora_",
    "hada_",
    "lokr_",
    "ia3_",
    "oft_",
    "boft_",
    "vera_",
    "vblora_",
    "fourierft_",
    "hra_",
    "bone_",
    "randlora_",
    "adalora_",
    "ln_tuning_",
    "c3a_kernel",
    "delora_",
    "gralora_",
    "hira_",
    "miss_block",
    "poly_lora_",
    "pvera_",
    "road_theta",
    "road_alpha",
    "shira_",
    "tinylora_",
    "waveft_",
    "trainable_tokens_",
    "modules_to_save",
)


_A_KIND = re.compile(rf"(?:^|\.)(?:{'|'.join(_KINDS)})")


def of_adapter(name: str) -> bool:
    """Whether it is the name of a tensor that PEFT adds to a model: of LoRA, or of another kind of adapter."""
    return _A_KIND.search(name) is not None


def of_ranks(name: str) -> bool:
    """Whether it is the name of a tensor whose shape is the rank of a LoRA adapter's."""
    return any(part.startswith(("lora_A", "lora_B", "lora_embedding_")) for part in name.split("."))


def homeless_adapter(
    names: Collection[str], manifest: Collection[str], targets: Collection[str], *, alone: bool
) -> tuple[str, str]:
    """What is wrong, and what to do, where ``names`` of an adapter have no place among ``targets``.

    Args:
        names: of tensors of the source, for people.
        manifest: names of all tensors of the source.
        targets: names of the model's tensors.
        alone: whether the source has nothing but an adapter.
    """
    has_one = any(map(of_adapter, targets))
    count = f"{len(names)} names of the source are" if len(names) > 1 else "one name of the source is"
    problem = f"{count} of a PEFT adapter, and the model has {'not that one' if has_one else 'none'}: " + some(
        sorted(names), 3
    )
    if has_one:
        return problem, _on_other_layers(manifest, targets) or (
            "The model has an adapter of another name or shape. hotweights.engines.peft.load_adapter(model, source, "
            "adapter_name=) fills one by the names that peft.get_peft_model_state_dict gives."
        )
    merge = "Merge it before saving or sending, which is copy.deepcopy(peft_model).merge_and_unload()"
    give = (
        "or give the model the adapter before its first load, peft.get_peft_model(model, config), and fill it by "
        "hotweights.engines.peft.load_base and load_adapter"
    )
    if alone:
        return problem, f"The source is an adapter without the model under it. {merge}; {give}."
    return problem, f"Without its adapter the model would compute as its base does. {merge}; {give}."


def _on_other_layers(manifest: Iterable[str], targets: Iterable[str]) -> str:
    """What to do where the source's adapter is on other layers than the model's; or nothing."""
    theirs, ours = _layers_with_adapter(manifest), _layers_with_adapter(targets)
    if theirs == ours:
        return ""
    kinds = ({layer.rpartition(".")[2] for layer in layers} for layers in (theirs, ours))
    shown = [some(sorted(names), 3) for names in kinds]
    if shown[0] == shown[1]:
        shown = [some(sorted(layers), 3) for layers in (theirs - ours or theirs, ours - theirs or ours)]
    return (
        f"The source's adapter is on {shown[0]}, the model's on {shown[1]}. Give the model one on the same layers: "
        "peft.get_peft_model(model, config) with the target_modules of the source's adapter_config.json, before the "
        "first load."
    )


def _layers_with_adapter(names: Iterable[str]) -> set[str]:
    found = ((name, _A_KIND.search(name)) for name in names)
    return {name[: match.start()].removeprefix("base_model.model.") for name, match in found if match is not None}


def by_parts(manifest: Collection[str], targets: Collection[str], missing: Collection[str]) -> str:
    """What to do where a model has adapters, and a source is one of them alone or the model under them; or nothing."""
    if not any(map(of_adapter, targets)) or not missing:
        return ""
    if all(map(of_adapter, missing)):
        if any(map(of_adapter, manifest)):
            return _on_other_layers(manifest, targets)
        return (
            "This source is the model under the adapters: hotweights.engines.peft.load_base(model, source) loads it, "
            "and they stay. If adapters are merged into it they would count twice: load it into a model without them, "
            "or send peft.get_peft_model_state_dict(model)."
        )
    if manifest and all(map(of_adapter, manifest)) and not any(map(of_adapter, missing)):
        return "This source is an adapter alone: hotweights.engines.peft.load_adapter(model, source) takes it."
    return ""


def left_under(written: Iterable[str], skipped: Iterable[str]) -> tuple[str, ...]:
    """A warning where weights under adapters were ``written``, and others of the source ``skipped``: half of a base."""
    others = [name for name in skipped if not of_adapter(name)]
    if not others or not any("base_layer" in name.split(".") for name in written):
        return ()
    return (
        f"only= wrote layers that have an adapter, and left out {len(others)} tensors of the source: {some(others, 3)}"
        "; hotweights.engines.peft.load_base(model, source) takes all of the model under the adapters",
    )
