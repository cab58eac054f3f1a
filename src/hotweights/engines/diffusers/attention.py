"""The names of attention in checkpoints of before it had a class of its own, as diffusers renames them."""

from __future__ import annotations

from typing import Any

from ...manifest import Manifest


def names_on_load(model: Any, manifest: Manifest) -> dict[str, str]:
    """The names that diffusers gives to tensors of old checkpoints; none for models of others."""
    rename = getattr(model, "_fix_state_dict_keys_on_load", None)
    if rename is None:
        return {}
    origins: dict[str, str] = {name: name for name in manifest}
    rename(origins)
    return {origin: name for name, origin in origins.items()}
