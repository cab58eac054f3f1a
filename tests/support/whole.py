"""Everything that a model holds, in closures and wrappers too, to be compared before and after."""

from hotweights.live.attributes import held_by, state_of
from hotweights.memory.wrappers import is_wrapper, leaves
from hotweights.model.reachable import reachable
from hotweights.testing import bits


def tensors(model):
    found = {
        path: one
        for name, tensor in reachable(model).items()
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
    found = {path: id(one) for name, tensor in reachable(model).items() for path, one in leaves(name, tensor)}
    for name, module in model.named_modules():
        for path, held in held_by(state_of(module)).items():
            found[f"{name}.{path}"] = id(held.holder)
        found[f"{name} holds"] = {key: id(one) for key, one in state_of(module).items()}
    return found


def everything(model):
    """To be compared after an abort: values, addresses, objects."""
    return values(model), {name: one.data_ptr() for name, one in tensors(model).items()}, objects(model)


def holders(model):
    """Ids of containers and objects but tuples, by path."""
    found = {}
    for name, module in model.named_modules():
        for path, held in held_by(state_of(module)).items():
            if not isinstance(held.holder, tuple):
                found[f"{name}.{path}"] = id(held.holder)
    return found


def plain(model):
    """Everything that is no tensor and no object: numbers, flags, words, classes of tensors and their attributes."""
    found = {}
    for name, module in model.named_modules():
        holders = {"": (module, state_of(module)), **held_by(state_of(module))}
        for path, (_, state) in holders.items():
            found[name, path] = {
                key: one for key, one in state.items() if isinstance(one, (str, int, float, type(None)))
            }
    for path, tensor in reachable(model).items():
        found[path] = type(tensor), tensor.requires_grad, tensor.stride(), dict(tensor.__dict__)
    return found
