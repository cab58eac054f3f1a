"""An oracle of its own: everything that a model leads to, to be compared before and after an update.

It follows ``__dict__``, containers, closures and what wrappers wrap, and imports nothing of the code under test. Paths
name the shortest way to an object; where two are as short, the first in the order of their names.
"""

import functools
import types
from collections import deque

import torch
from torch import nn

_WORDS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout)
_CLOSED = (type, types.ModuleType, types.BuiltinFunctionType, types.CellType)


def edges(model):
    """Pairs of a path and an object, for every reference that the model leads to; words and numbers are objects too."""
    queue, opened = deque([("", model)]), set()
    while queue:
        path, value = queue.popleft()
        yield path, value
        if isinstance(value, (*_WORDS, *_CLOSED)) or id(value) in opened:
            continue
        opened.add(id(value))
        queue.extend((path + step, item) for step, item in sorted(_inside(value), key=lambda pair: pair[0]))


def _inside(value):
    if isinstance(value, dict):
        yield from ((f"[{key!r}]", item) for key, item in value.items())
    elif isinstance(value, (list, tuple)):
        yield from ((f"[{number}]", item) for number, item in enumerate(value))
    elif isinstance(value, (set, frozenset)):
        yield from ((f"[{number}]", item) for number, item in enumerate(sorted(value, key=_content)))
    elif isinstance(value, functools.partial):
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
    elif isinstance(value, types.MethodType):
        yield from ((".__self__", value.__self__), (".__func__", value.__func__))
    elif isinstance(value, types.FunctionType):
        filled = [cell for cell in value.__closure__ or () if cell != types.CellType()]
        yield from ((f".__closure__[{number}]", cell.cell_contents) for number, cell in enumerate(filled))
    else:
        for key in _wrapped(value):
            yield f".{key}", getattr(value, key)
        yield from ((f".{key}", item) for key, item in getattr(value, "__dict__", {}).items())


def _content(item):
    return repr(_bytes(item)) if isinstance(item, torch.Tensor) else repr(item)


def _wrapped(tensor):
    return tensor.__tensor_flatten__()[0] if isinstance(tensor, torch.Tensor) and _is_wrapper(tensor) else ()


def _is_wrapper(tensor):
    return hasattr(type(tensor), "__tensor_flatten__")


def _bytes(tensor):
    if tensor.is_meta or not tensor.numel():
        return b""
    plain = tensor.detach().cpu().as_subclass(torch.Tensor).contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes()


def tensors(model):
    """Every tensor with bytes of its own, by each path that leads to it."""
    pairs = ((path, value) for path, value in edges(model) if isinstance(value, torch.Tensor))
    return {path: tensor for path, tensor in pairs if not _is_wrapper(tensor)}


def values(model):
    return {path: (tensor.dtype, tuple(tensor.shape), _bytes(tensor)) for path, tensor in tensors(model).items()}


def addresses(model, but=()):
    """Where tensors lie; not those that only code closes over, nor those with a part of ``but`` in their path."""
    skipped = ("__closure__", *but)
    return {path: tensor.data_ptr() for path, tensor in tensors(model).items() if not any(map(path.count, skipped))}


def objects(model):
    """The identity of all that is no word and no number, and those as they are."""
    return {path: value if isinstance(value, _WORDS) else id(value) for path, value in edges(model)}


def everything(model):
    """To be compared after an abort: values, addresses, objects."""
    found = tensors(model)
    return values(model), {path: tensor.data_ptr() for path, tensor in found.items()}, objects(model)


def _is_holder(value):
    """Whether an update keeps the object and changes what it holds. What owns memory is exchanged as a whole."""
    if isinstance(value, (dict, list, set, nn.Module)):
        return True
    code = (functools.partial, types.FunctionType, types.MethodType, torch.Tensor)
    if isinstance(value, (*_WORDS, *_CLOSED, *code)) or hasattr(type(value), "__del__"):
        return False
    return type(getattr(value, "__dict__", None)) is dict


def holders(model):
    """The identity of containers and objects but tuples, by path; not of those that only code leads to."""
    return {path: id(value) for path, value in _of_layers(model) if _is_holder(value)}


def _of_layers(model):
    """Edges but for those inside code or inside objects that own memory."""
    closed = []
    for path, value in edges(model):
        if any(path.startswith(prefix) and path[len(prefix)] in ".[" for prefix in closed):
            continue
        yield path, value
        if not isinstance(value, (tuple, torch.Tensor, *_WORDS)) and not _is_holder(value):
            closed.append(path)


def plain(model):
    """Words and numbers that layers hold; and of tensors the class, ``requires_grad``, strides and attributes."""
    found = {}
    for path, value in _of_layers(model):
        if isinstance(value, _WORDS):
            found[path] = value
        elif isinstance(value, torch.Tensor):
            found[path] = type(value), value.requires_grad, value.stride(), sorted(vars(value))
    return found
