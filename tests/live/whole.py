"""Everything that a model holds, in closures and wrappers too, to be compared before and after."""

from hotweights.anchors import anchors
from hotweights.live.holders import held_by, state_of
from hotweights.live.wrappers import is_wrapper, leaves
from hotweights.testing import bits


def tensors(model):
    found = {
        path: one
        for name, tensor in anchors(model).items()
        for path, one in leaves(name, tensor)
        if "extra_repr" not in path
    }
    return {path: one for path, one in found.items() if not is_wrapper(one)}


def values(model):
    return {name: (one.dtype, tuple(one.shape), bytes(bits(one).tolist())) for name, one in tensors(model).items()}


def addresses(model, but=()):
    return {
        name: one.data_ptr()
        for name, one in tensors(model).items()
        if not any(part in name for part in ("__closure__", *but))
    }


def objects(model):
    """Ids of tensors, wrappers, containers and objects; and what is no tensor, as it is."""
    found = {path: id(one) for name, tensor in anchors(model).items() for path, one in leaves(name, tensor)}
    for name, module in model.named_modules():
        for path, held in held_by(state_of(module)).items():
            found[f"{name}.{path}"] = id(held.holder)
        found[f"{name} holds"] = {key: id(one) for key, one in state_of(module).items()}
    return found


def everything(model):
    """To be compared after an abort: values, addresses, objects."""
    return values(model), {name: one.data_ptr() for name, one in tensors(model).items()}, objects(model)
