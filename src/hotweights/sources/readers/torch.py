"""Torch's own format: .bin, .pt and .pth that hold one flat dictionary of tensors. Read with ``weights_only=True``.

Such a file has no header. Opening runs its pickle once on the meta device, where no tensor takes memory. Streaming
holds one file in memory at a time.
"""

from __future__ import annotations

import os
import pickletools
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

import torch

from ...errors import CheckpointError
from ...manifest import TensorSpec
from ..files.header import BEGINNING, PICKLES, ZIP, Entry, FileHeader, refuse_other_formats, refuse_text
from ..files.layout import DIFFUSERS, Layout
from ..files.place import Readable
from ..pairs import Pair
from .reader import Reader

_READ_SAFELY = 3  # the latest pickle protocol whose instructions torch's safe reader knows
_LOOKED_AT = 1 << 20  # bytes of a pickle
_TORCH_SAVED = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the number with which files of torch.save began before 1.6


def _parse(file: Readable) -> FileHeader:
    tensors = _load(file.path, "meta")
    if not isinstance(tensors, Mapping):
        raise CheckpointError(
            f"{file.path}: holds a {type(tensors).__name__}, not a dictionary of tensors", cause="other_format"
        )
    strangers = [problem for name, value in tensors.items() if (problem := _strange(name, value))]
    if strangers:
        raise CheckpointError(
            f"{file.path}: holds more than dense tensors by name; torch.load it, and open the dictionary in it that "
            "holds the tensors",
            strangers,
        )
    return FileHeader(tuple(Entry(TensorSpec(name, t.dtype, tuple(t.shape)), 0) for name, t in tensors.items()), {})


def _read(files: Sequence[str], *, borrow: bool) -> Iterator[Pair]:
    for path in files:
        tensors = dict(_load(path, "cpu"))
        # Tied weights, and slices of one tensor, lie in one storage of the file.
        users = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
        while tensors:
            name = next(iter(tensors))
            tensor = tensors.pop(name)
            shared = tensor.numel() and users[tensor.untyped_storage().data_ptr()] > 1
            yield name, tensor.clone(memory_format=torch.contiguous_format) if shared else tensor


def _strange(name: object, value: object) -> str | None:
    if not isinstance(value, torch.Tensor):
        return f"{name!r} is a {type(value).__name__}"
    if not isinstance(name, str):
        return f"the key {name!r} is no name"
    return f"{name!r} is {value.layout}" if value.layout is not torch.strided else None


def _load(path: str, device: str) -> Mapping[str, torch.Tensor]:
    _refuse_other_files(path)
    _refuse_plain_pickle(path)
    try:
        loaded: Mapping[str, torch.Tensor] = torch.load(path, map_location=device, weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # A broken file raises KeyError, EOFError, UnpicklingError, RuntimeError and others.
        if called := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise _with_code(path, called[1]) from None  # Torch's text says how to run it all the same.
        if (protocol := _protocol(path)) > _READ_SAFELY:
            raise CheckpointError(
                f"{path}: is written by pickle protocol {protocol}, and torch.load with weights_only=True reads 2 and "
                f"{_READ_SAFELY}; where you trust whoever wrote it, torch.load it with weights_only=False, and "
                "torch.save it without pickle_protocol=",
                cause="other_format",
            ) from error
        raise CheckpointError(
            f"{path}: torch.load with weights_only=True refuses it: {_reason(error)}", cause="other_format"
        ) from error
    return loaded


def _protocol(path: str) -> int:
    """The pickle protocol of a file of torch.save; 0 where it cannot be told."""
    with open(path, "rb") as file, suppress(zipfile.BadZipFile, StopIteration, OSError, NotImplementedError):
        if zipfile.is_zipfile(file):
            archive = zipfile.ZipFile(file)
            start = archive.open(next(name for name in archive.namelist() if name.endswith("/data.pkl"))).read(2)
        else:
            file.seek(0)
            start = file.read(2)
        return start[1] if start[:1] == b"\x80" else 0
    return 0


def _refuse_other_files(path: str) -> None:
    """Refuse what torch.save did not write, which torch would call an unsafe pickle: a web page, say, or no byte."""
    size = os.path.getsize(path)
    if size == 0:
        raise CheckpointError(f"{path}: the file is empty", cause="empty")
    with open(path, "rb") as file:
        start = file.read(BEGINNING)
    if start[8:9] == b"{" and 8 + int.from_bytes(start[:8], "little") <= size:
        raise CheckpointError(
            f"{path}: this is a safetensors file; rename it to .safetensors, and open it without reader=",
            cause="other_format",
        )
    refuse_other_formats(path, size, start, but=(ZIP, *PICKLES), of="torch")
    refuse_text(path, size, start)
    if not start.strip(b"\0"):
        raise CheckpointError(
            f"{path}: it begins with zero bytes; was its space taken, and it never written?", cause="zeros"
        )
    if start.startswith(ZIP) and not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path}: the archive that torch.save wrote has no end ({size} bytes); is it truncated?", cause="truncated"
        )


def _refuse_plain_pickle(path: str) -> None:
    """Refuse what pickle has written without torch.save, which torch would call an unsupported operand."""
    with open(path, "rb") as file:
        start = file.read(_LOOKED_AT)
    if start[:1] != b"\x80" or _TORCH_SAVED in start[:64]:
        return
    if called := _called(start):
        raise _with_code(path, called)
    raise CheckpointError(
        f"{path}: is a plain pickle, and no file of torch.save; where you trust it, load it as it was written, and "
        "torch.save the dictionary of tensors in it",
        cause="other_format",
    )


def _called(pickled: bytes) -> str | None:
    """The first function or class that a pickle names; nothing is run."""
    texts: list[str] = []
    try:
        for opcode, value, _ in pickletools.genops(pickled):
            if opcode.name in ("GLOBAL", "INST"):
                return str(value).replace(" ", ".")
            if opcode.name == "STACK_GLOBAL":
                return ".".join(texts[-2:])
            if "UNICODE" in opcode.name:
                texts.append(str(value))
    except ValueError:  # It ends too early, or is none.
        pass
    return None


def _with_code(path: str, called: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: is a pickle that calls {called}: it holds code, or objects of a class, beside tensors, and is not "
        "opened. Where you trust whoever wrote it, torch.save its dictionary of tensors alone",
        cause="pickle_with_code",
    )


def _reason(error: Exception) -> str:
    # Torch's text begins with how to load the file all the same, and run whatever code it holds.
    text = str(error).partition("WeightsUnpickler error:")[2] or str(error)
    if "weights_only" in text:
        return f"{type(error).__name__}: it holds more than tensors and plain values"
    return f"{type(error).__name__}: {text.strip().partition(chr(10))[0]}"


READER = Reader(_read, lends=False, owns=True, layout=Layout(("pytorch_model", DIFFUSERS), ".bin", _parse))
