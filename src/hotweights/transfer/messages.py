"""The messages of a transfer, and frames: a message with its protocol and update, as bytes. No socket lives here."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import NamedTuple, get_args

import msgspec
import torch

from ..dtypes import OpaqueDtype
from ..errors import ProtocolError, UsageError
from ..manifest import Manifest, TensorSpec
from ..ranges import Range

PROTOCOL = 1
MAX_FRAME = 32 * 1024 * 1024  # bytes; a manifest of 100,000 tensors takes about 10
_MAGIC = b"hotw"
_ADDRESSES = 2**48  # bytes that a process can address
_REASONS = 50  # An error of 20,000 tensors must not outgrow a frame; both sides keep their own in full.
_REASON = 2000  # characters
HEADER = struct.Struct("<4sHHQI")  # magic, protocol, number of descriptors, update, bytes that follow


class _Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=str.lower):
    """Every field is checked when it is decoded: there is nothing to unpickle."""


class Hello(_Message, frozen=True):
    """A receiver's first word."""

    pid: int


class Welcome(_Message, frozen=True):
    """The sender's first word; the memory of the slots comes with it as a descriptor."""

    slots: int
    slot_nbytes: int
    timeout: float


class Offer(_Message, frozen=True):
    """A version and its tensors: name, dtype, shape. The ballot comes with it as a descriptor."""

    version: str | int
    digests: bool
    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]


class Wanted(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """Which bytes of a tensor are wanted, ascending; without ranges all of it."""

    tensor: int
    ranges: tuple[Range, ...] = ()


class Accept(_Message, frozen=True):
    """What of the offer is wanted, each tensor once, in the order that suits best."""

    wanted: tuple[Wanted, ...]


class Refuse(_Message, frozen=True):
    """A receiver cannot take this update, and why."""

    reasons: tuple[str, ...]


class Part(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """Bytes of a tensor, one behind the other from ``offset`` of a slot on; and the digest of what they shall be."""

    tensor: int
    range: Range
    offset: int
    digest: int | None


class Filled(_Message, frozen=True):
    """A slot is to be read, and holds still until it is released."""

    slot: int
    parts: tuple[Part, ...]


class Release(_Message, frozen=True):
    """This receiver reads these slots no more. It is the acknowledgement."""

    slots: tuple[int, ...]


class End(_Message, frozen=True):
    """Everything wanted was sent."""


class Prepared(_Message, frozen=True):
    """From here on a commit cannot fail."""


class Commit(_Message, frozen=True):
    """The group decided to take the version."""


class Abort(_Message, frozen=True):
    """The group decided not to, and why."""

    reason: str


class Done(_Message, frozen=True):
    """The decision was carried out, or what failed."""

    problem: str


class Broken(_Message, frozen=True):
    """The other side broke the protocol or is given up, and why. The connection ends; it may come at any time."""

    reason: str


Message = Hello | Welcome | Offer | Accept | Refuse | Filled | Release | End | Prepared | Commit | Abort | Done | Broken
_KINDS = get_args(Message)
_decoder = msgspec.msgpack.Decoder(Message)
_encoder = msgspec.msgpack.Encoder()


class Header(NamedTuple):
    """What stands before a message."""

    descriptors: int
    update: int
    nbytes: int


class Frame(NamedTuple):
    """A message and what it belongs to."""

    update: int
    message: Message
    descriptors: tuple[int, ...] = ()


def kind_of(message: Message | type) -> str:
    """The word for a kind of message, as the table of states has it."""
    return (message if isinstance(message, type) else type(message)).__name__.lower()


KINDS = tuple(map(kind_of, _KINDS))
"""Every kind there is."""

DESCRIPTORS: Mapping[str, int] = {"welcome": 1, "offer": 1}
"""How many descriptors come with a message; with all others none."""


def encode(update: int, message: Message, descriptors: int = 0) -> bytes:
    """The bytes of a frame.

    Raises:
        UsageError: it is larger than any receiver takes, or holds what is no text.
    """
    try:
        body = _encoder.encode(message)
    except UnicodeEncodeError as error:
        raise UsageError(f"a name or a version is no text that can be sent: {error}") from error
    if len(body) > MAX_FRAME:
        raise UsageError(f"a message of {len(body)} bytes is too large; {MAX_FRAME} is the most. Send fewer tensors")
    return HEADER.pack(_MAGIC, PROTOCOL, descriptors, update, len(body)) + body


def decode_header(raw: bytes | bytearray) -> Header:
    """What the first bytes of a frame promise.

    Raises:
        ProtocolError: it is no frame, or one of another protocol, or larger than any may be.
    """
    magic, protocol, descriptors, update, nbytes = HEADER.unpack_from(raw)
    if magic != _MAGIC:
        raise ProtocolError(f"these bytes are no frame of hotweights: {bytes(raw[:4])!r}")
    if protocol != PROTOCOL:
        raise ProtocolError(f"the other side speaks protocol {protocol}, this one {PROTOCOL}; install the same version")
    if nbytes > MAX_FRAME:
        raise ProtocolError(f"a frame of {nbytes} bytes is too large; {MAX_FRAME} is the most")
    return Header(descriptors, update, nbytes)


def decode(raw: bytes | bytearray) -> Message:
    """The message in the body of a frame.

    Raises:
        ProtocolError: it is none.
    """
    try:
        found: Message = _decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError) as error:
        raise ProtocolError(f"a frame holds no message: {error}") from error
    return found


def specs_of(offer: Offer) -> Manifest:
    """The manifest that an offer stands for.

    Raises:
        ProtocolError: it names a tensor twice, an unknown dtype or an impossible shape.
    """
    try:
        found = Manifest(TensorSpec(name, _dtype(dtype), shape) for name, dtype, shape in offer.tensors)
    except UsageError as error:
        raise ProtocolError(f"the offer is broken: {error}") from error
    impossible = [str(spec) for spec in found.values() if min(spec.shape, default=0) < 0 or spec.nbytes > _ADDRESSES]
    if impossible:
        raise ProtocolError("the offer is broken; no tensor can have these shapes", impossible)
    return found


def described(manifest: Mapping[str, TensorSpec]) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    """A manifest as it stands in an offer."""
    opaque = [str(spec) for spec in manifest.values() if isinstance(spec.dtype, OpaqueDtype)]
    if opaque:
        raise UsageError(f"the installed torch has no type for these, so they cannot be sent: {'; '.join(opaque)}")
    return tuple((spec.name, str(spec.dtype).removeprefix("torch."), spec.shape) for spec in manifest.values())


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise UsageError(f"the installed torch knows no dtype {name!r}")
    return found


def reasons_of(error: BaseException) -> tuple[str, ...]:
    """What the other side is told of an error: its problems, or its text; as much as fits."""
    problems: Iterable[str] = getattr(error, "problems", ()) or (f"{type(error).__name__}: {error}",)
    told = [str(problem)[:_REASON] for problem in problems]
    return tuple(told[:_REASONS]) + ((f"... and {len(told) - _REASONS} more",) if len(told) > _REASONS else ())
