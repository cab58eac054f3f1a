"""The header of one safetensors file: parsed and validated, before any memory is allocated.

Format: 8 bytes little-endian length N, N bytes of JSON ``{name: {dtype, shape, data_offsets}}``, then the data, without
gaps. Source: https://github.com/huggingface/safetensors#format and ``safetensors/src/tensor.rs`` 0.8. This is as strict
as that, and also refuses duplicate names of tensors and what is no object where an object belongs.
"""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from ...dtypes import FORMAT_DTYPES, DType, OpaqueDtype
from ...errors import CheckpointError, Problem
from ...manifest import TensorSpec

if TYPE_CHECKING:
    import torch

MAX_HEADER_NBYTES = 100_000_000  # bytes; the bound of the reference implementation
_LARGEST = 2**63 - 1  # elements; torch counts in int64
_POINTER = b"version https://git-lfs.github.com/spec/"
BEGINNING = 512  # the block of a tar archive, which has its name near the end
"""Bytes that tell the formats apart."""
_ELSEWHERE = {
    b"PK\x03\x04": 'a zip archive (if torch.save wrote it, rename it to .bin: reader="torch" '
    "of hotweights.open, whose source load and update take, opens those)",
    b"GGUF": "a GGUF file",
    b"\x1f\x8b": "a gzip archive",
    b"\xfd7zXZ": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "an array of numpy",
}
PICKLES = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
"""How files of ``pickle`` begin."""
ZIP = b"PK\x03\x04"
"""How zip archives begin, such as files of ``torch.save``."""
_ELSEWHERE |= dict.fromkeys(PICKLES, "a pickle")


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One tensor of a file: its spec, and the first byte of its data in the file."""

    spec: TensorSpec
    offset: int


class FileHeader(NamedTuple):
    """What one file holds: entries by offset, and the file's free-text metadata."""

    entries: tuple[Entry, ...]
    metadata: dict[str, str]


View = Callable[[str, tuple[int, ...]], "tuple[DType, tuple[int, ...]]"]
"""What the format's name of a dtype, and its shape, are for the caller."""


class _RawEntry(msgspec.Struct, gc=False):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


_names = msgspec.json.Decoder(dict[str, msgspec.Raw])
_entry = msgspec.json.Decoder(_RawEntry)
_metadata = msgspec.json.Decoder(dict[str, str])


def read_header(file: str, size: int, pread: Callable[[int, int], bytes], view: View | None = None) -> FileHeader:
    """Parse and validate the header of ``file``.

    Args:
        file: its name, for messages.
        size: its size in bytes.
        pread: ``pread(nbytes, offset)``, returning exactly that many bytes or raising.
        view: how dtypes and shapes are said, ``as_torch`` or ``as_format``; by default as torch has them.

    Raises:
        CheckpointError: with every problem that was found in this file.
    """
    if size == 0:
        raise CheckpointError(f"{file}: the file is empty", cause="empty")
    start = pread(min(size, BEGINNING), 0)
    nbytes = int.from_bytes(start[:8], "little")
    if size < 8 or nbytes > size - 8:
        # Not before: a sound header of 640 bytes begins like a pickle, one of 64 MB like a zip archive.
        refuse_other_formats(file, size, start)
        refuse_text(file, size, start)
    if size >= 8 and nbytes == 0:
        raise CheckpointError(
            f"{file}: it begins with zero bytes where the length of its header belongs; was its space taken, and it "
            "never written?",
            cause="zeros",
        )
    if size < 8:
        raise CheckpointError(
            f"{file}: {size} bytes are too few for a safetensors file, whose header alone needs 8", cause="truncated"
        )
    # Both bounds come before the allocation: a forged length of 2^60 bytes would take all memory.
    if nbytes > MAX_HEADER_NBYTES and nbytes > size - 8:
        raise CheckpointError(
            f"{file}: no safetensors file: its first 8 bytes say a header of {nbytes} bytes, where at most "
            f"{MAX_HEADER_NBYTES} are allowed, and the file has {size}",
            cause="not_safetensors",
        )
    if nbytes > MAX_HEADER_NBYTES:
        raise CheckpointError(
            f"{file}: header of {nbytes} bytes; at most {MAX_HEADER_NBYTES} are allowed", cause="header_too_large"
        )
    if 8 + nbytes > size:
        raise CheckpointError(
            f"{file}: header of {nbytes} bytes expected, but the file ends after {size} bytes; is it truncated?",
            cause="truncated",
        )
    return _parse(file, pread(nbytes, 8), data_start=8 + nbytes, size=size, view=view or as_torch)


def refuse_text(file: str, size: int, start: bytes) -> None:
    """Refuse a file that begins with text."""
    begins = start[:40]
    if begins.isascii() and all(letter.isprintable() or letter.isspace() for letter in begins.decode()):
        raise CheckpointError(
            f"{file}: this is text ({size} bytes), not the weights; it begins {begins.decode()!r}", cause="text"
        )


def refuse_other_formats(
    file: str, size: int, start: bytes, *, but: Collection[bytes] = (), of: str = "safetensors"
) -> None:
    """Refuse what is neither weights nor an index by its first bytes: a pointer, a web page, an archive.

    Args:
        file: its name, for messages.
        size: its size in bytes.
        start: its first bytes, ``BEGINNING`` of them or all.
        but: what archives may begin with.
        of: whose file it should be, for messages.
    """
    if start.startswith(_POINTER):
        raise CheckpointError(
            f"{file}: this is a pointer to large-file storage ({size} bytes), not the weights; "
            "fetch them with: git lfs pull",
            cause="lfs_pointer",
        )
    if start.lstrip()[:9].lower().startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        raise CheckpointError(
            f"{file}: this is a web page ({size} bytes), not the weights: a server answered the download with an error "
            "or a login page; fetch the file again",
            cause="html_page",
        )
    if start[257:262] == b"ustar":
        raise CheckpointError(
            f"{file}: this is not a {of} file but a tar archive; unpack it: tar xf {shlex.quote(file)}",
            cause="other_format",
        )
    for magic, what in _ELSEWHERE.items():
        if start.startswith(magic) and magic not in but:
            if file.endswith((".bin", ".pt", ".pth")):
                what = what.replace("rename it to .bin: ", "")
            raise CheckpointError(f"{file}: this is not a {of} file but {what}", cause="other_format")


def _parse(file: str, raw: bytes, *, data_start: int, size: int, view: View) -> FileHeader:
    try:
        fields = _names.decode(raw)
        names = len(fields)
        metadata = _free_text(file, fields.pop("__metadata__", b"{}"))
        if raw.count(b":") != names + len(metadata) + 3 * len(fields):
            _refuse_duplicates(file, raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: header is not a JSON object of tensors: {error}", cause="not_safetensors"
        ) from error
    problems: list[str] = []
    entries: list[Entry] = []
    minus_zero = b"-0" in raw
    decode = _entry.decode
    for name, field in fields.items():
        try:
            entry = decode(field)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            problems.append(f"tensor {name!r}: {error}")
            continue
        if minus_zero and b"-0" in bytes(field):
            problems.append(f"tensor {name!r}: -0 is no length and no offset")
            continue
        start, stop = entry.data_offsets
        spec = _spec(name, entry, problems, view)
        if spec is not None:
            entries.append(Entry(spec, data_start + start))
            if stop - start != (nbytes := spec.nbytes):
                problems.append(
                    f"tensor {name!r}: {entry.dtype} {list(entry.shape)} is {nbytes} bytes; "
                    f"data_offsets {start}..{stop} hold {stop - start}"
                )
    # Only if all entries are sound: beside a broken one, its neighbours would be blamed for gaps.
    if not problems:
        entries.sort(key=_by_offset)
        problems = _gaps(entries, data_start, size)
    if problems:
        raise CheckpointError(file, problems, cause="bad_header")
    return FileHeader(tuple(entries), metadata)


def _free_text(file: str, field: msgspec.Raw | bytes) -> dict[str, str]:
    try:
        return _metadata.decode(field)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: __metadata__ of the header does not map names to text: {error}", cause="bad_header"
        ) from error


def _by_offset(entry: Entry) -> tuple[int, int]:
    return entry.offset, entry.spec.nbytes  # Empty tensors share an offset with the next one and come before it.


def _refuse_duplicates(file: str, raw: bytes) -> None:
    """Parse the header again, with all of its pairs: of two equal names the decoder silently keeps the last.

    That is slow. It is needed only if the header has more colons than the names that the decoder kept: a name that it
    dropped has a colon, too, and JSON cannot write that colon in another way. A sound header with colons in its names
    is also parsed again.
    """
    try:
        # Objects become tuples of pairs, to tell them from arrays.
        header = json.loads(raw, object_pairs_hook=tuple)
    except ValueError as error:
        raise CheckpointError(
            f"{file}: header is not a JSON object of tensors: {error}", cause="not_safetensors"
        ) from error
    problems = [f"the name {name!r} occurs twice in the header" for name in _twice(header)]
    for name, entry in header:
        if isinstance(entry, tuple) and name != "__metadata__":  # Free text: the last one counts.
            problems += [f"tensor {name!r}: {key!r} occurs twice" for key in _twice(entry)]
    if problems:
        raise CheckpointError(file, problems, cause="bad_header")


def _twice(pairs: Iterable[tuple[str, object]]) -> list[str]:
    return [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]


def _spec(name: str, entry: _RawEntry, problems: list[str], view: View) -> TensorSpec | None:
    if entry.dtype not in FORMAT_DTYPES:
        problems.append(f"tensor {name!r}: unknown dtype {entry.dtype!r}; known are: {', '.join(FORMAT_DTYPES)}")
        return None
    if entry.shape and min(entry.shape) < 0:
        problems.append(f"tensor {name!r}: negative length in shape {list(entry.shape)}")
        return None
    bits = FORMAT_DTYPES[entry.dtype][0]
    count = math.prod(entry.shape)
    # torch multiplies the strides from the nonzero lengths: [2**62, 0] overflows, though it is empty.
    if count > _LARGEST or (not count and math.prod(filter(None, entry.shape)) > _LARGEST):
        problems.append(f"tensor {name!r}: shape {list(entry.shape)} has more elements than any memory")
        return None
    if count * bits % 8:
        problems.append(f"tensor {name!r}: {entry.dtype} {list(entry.shape)} does not end on a whole byte")
        return None
    dtype, shape = view(entry.dtype, entry.shape)
    return TensorSpec(name, dtype, shape)


def as_torch(name: str, shape: tuple[int, ...]) -> tuple[DType, tuple[int, ...]]:
    """The dtype of this name and the shape as torch has them; opaque where it has no such type."""
    import torch

    bits, attribute = FORMAT_DTYPES[name]
    dtype: torch.dtype | None = getattr(torch, attribute, None) if attribute else None
    if dtype is not None and bits == 8 * dtype.itemsize:
        return dtype, shape
    packed = 8 // bits if bits < 8 and 8 % bits == 0 else 0
    if dtype is not None and packed and shape and shape[-1] % packed == 0:
        return dtype, (*shape[:-1], shape[-1] // packed)
    return as_format(name, shape)


def as_format(name: str, shape: tuple[int, ...]) -> tuple[DType, tuple[int, ...]]:
    """Both as the format has them. This does not need torch."""
    return OpaqueDtype(name, FORMAT_DTYPES[name][0]), shape


def _gaps(entries: Iterable[Entry], data_start: int, size: int) -> list[str]:
    problems: list[str] = []
    position, last = data_start, ""
    cut: list[str] = []
    for entry in entries:
        spec, offset = entry.spec, entry.offset
        stop = offset + spec.nbytes
        if offset != position:
            before, at = f"tensor {last!r}" if last else "the header", offset - data_start
            problems.append(
                f"tensor {spec.name!r}: starts at byte {at} of the data, inside {before}"
                if offset < position
                else f"tensor {spec.name!r}: starts at byte {at} of the data; {before} ends at "
                f"{position - data_start}, and no tensor holds the bytes between"
            )
        if stop > size:
            end, held = stop - data_start, size - data_start
            cut.append(f"tensor {spec.name!r}: ends at byte {end} of the data; the file holds {held}")
        position, last = max(position, stop), spec.name
    if cut:  # A cut takes all tensors behind it. To name each would bury the reason.
        others = f"this tensor and {len(cut) - 1} later ones are cut off" if len(cut) > 1 else "is it truncated?"
        problems.append(Problem(f"{cut[0]}; {others}", "truncated"))
    if not problems and position < size:
        problems.append(f"{size - position} trailing bytes belong to no tensor")
    return problems
