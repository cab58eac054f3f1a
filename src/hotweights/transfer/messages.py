"""Messages of a transfer, and the frames that carry them: protocol, update, and the message as bytes."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple, get_args

import msgspec
import torch

from ..dtypes import OpaqueDtype
from ..errors import HotweightsError, ProtocolError, UpdateAborted, UsageError, grouped
from ..manifest import Manifest, TensorSpec
from ..ranges import Range
from ..text import some
from .decision import Decision, Known

PROTOCOL = 8  # another number for every change of what messages hold
MAX_SMALL = 16 * 1024  # bytes of a frame where only short messages may come: the longest of them is a reason
MAX_FRAME = 32 * 1024 * 1024  # bytes; a manifest of 100,000 tensors takes about 10
_MAGIC = b"hotw"
_ADDRESSES = 2**48  # bytes that a process can address
_REASONS = 50  # An error of 20,000 tensors must not outgrow a frame; whoever raised it has all of it.
SEATS_NAMED = 100  # members that are named to all others, each by ``SEAT_NAME`` characters at most
SEAT_NAME = 60
REASON = 2000  # characters of a reason that are sent
_SHOWN = 200  # characters of a version's name
NAME = 100  # characters of a receiver's name
HEADER = struct.Struct("<4sHHQI")  # magic, protocol, number of descriptors, update, bytes that follow


class _Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=str.lower):
    """Decoding checks the type of every field, and runs no code as unpickling does."""


class Hello(_Message, frozen=True):
    """A receiver's first word; the name is empty if it has none. ``crew`` is 1; of a relay, how many workers it has.

    ``past``: whether its ``Past`` follows the welcome; it takes no offer before that.
    """

    pid: int
    name: str = ""
    crew: int = 1
    past: bool = False


class Seat(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """A member of an update that is to vote: its place at the lead, how many processes it is, its name for people.

    Not all have a name: see ``SEATS_NAMED``.
    """

    place: int
    size: int
    name: str


class Account(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """What became of an update at a process, which was the member with this place, or stands behind it.

    Where it is in doubt, ``members`` are those that the lead had named when all were to prepare. A relay says only
    ``count`` times what several of its workers say. So a ``Past`` is short.
    """

    update: int
    place: int
    outcome: Known
    version: str | int
    members: tuple[Seat, ...] = ()
    count: int = 1


class Past(_Message, frozen=True):
    """What a receiver, or those behind a relay, know of the last update; and the last lead's epoch."""

    epoch: int
    accounts: tuple[Account, ...]


class Verdict(_Message, frozen=True):
    """What the next lead says to who is in doubt about an update. Without a decision: nobody comes who knows it."""

    about: int
    decision: Decision | None


class Crew(_Message, frozen=True):
    """A relay has so many workers now."""

    count: int


class Welcome(_Message, frozen=True):
    """The sender's first word; the memory of the slots and of the roll comes with it as a descriptor.

    ``timeout`` is the sender's patience with a single receiver; ``place`` is the receiver's in the roll. Between hosts
    no descriptor comes: the receiver has slots of its own, and shows ``token`` on a second connection, for the bytes,
    which the ``carrier`` brings. ``pid`` is the sender's, for people.
    """

    slots: int
    slot_nbytes: int
    timeout: float
    place: int
    token: bytes = b""
    carrier: str = ""
    pid: int = 0


class Origin(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """A rank of a sharded trainer that gives receivers bytes itself, on another host than the sender.

    Attributes:
        rank: its number.
        name: for people.
        host: its address.
        port: where it listens there.
        token: what this receiver shows it.
    """

    rank: int
    name: str
    host: str
    port: int
    token: bytes


class Offer(_Message, frozen=True):
    """A version and its tensors: name, dtype, shape. On one host the ballot comes with it as a descriptor.

    If it is ``relayed``, the ballot holds what this host's relay heard of the decision, which falls elsewhere.
    ``register`` says where the decision stands, if in one, as ``Register.told``. The receiver, or the first relay
    before it, has this ``place`` at the lead. Of two leads the one with the larger ``epoch`` is the present one. Some
    bytes may come from the ``origins``, if the receiver connects to them. With ``drop`` a relay goes on without other
    hosts behind it.
    ``patience`` is how many seconds a single answer may take.
    ``kept`` is 0; or a group has taken the version before, by this update, and a relay has kept it: who is prepared
    takes it, whatever becomes of the relay.
    """

    version: str | int
    digests: bool
    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]
    relayed: bool = False
    register: str = ""
    place: int = 0
    epoch: int = 0
    kept: int = 0
    origins: tuple[Origin, ...] = ()
    drop: bool = False
    patience: float = 0.0


class Wanted(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """Which bytes of a tensor are wanted, ascending; without ranges all of it.

    ``rounded`` is the dtype to which the receiver casts them, and does nothing else with them; empty if there is none.
    """

    tensor: int
    ranges: tuple[Range, ...] = ()
    rounded: str = ""


class Accept(_Message, frozen=True):
    """What of the offer is wanted, each tensor once, in the order that suits best.

    Of a relay, what the first of its workers wants, and then the ``others``; ``crew`` names them all. What relays keep
    for themselves comes last, without a name.
    """

    wanted: tuple[Wanted, ...]
    others: tuple[tuple[Wanted, ...], ...] = ()
    crew: tuple[str, ...] = ()


class Refuse(_Message, frozen=True):
    """A receiver cannot take this update, and why."""

    reasons: tuple[str, ...]


class Chunk(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """Bytes of a tensor, packed in a slot from ``offset`` on; and the digest of what the sender holds.

    Where these elements lie there ``rounded``, in a dtype that every receiver casts them to, each takes less bytes:
    ``shrunk`` times less.
    """

    tensor: int
    range: Range
    offset: int
    digest: int | None
    rounded: str = ""
    shrunk: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes in the slot."""
        return self.range.size // max(1, self.shrunk)


class Filled(_Message, frozen=True):
    """A slot that may be read; it does not change until it is released, and bears this fill until then.

    ``origins``, where there are some: of each chunk, the rank that gives its bytes, or 0 where the sender does.
    """

    slot: int
    chunks: tuple[Chunk, ...]
    fill: int
    origins: tuple[int, ...] = ()


class Release(_Message, frozen=True):
    """This receiver does not read these slots any more."""

    slots: tuple[int, ...]


class End(_Message, frozen=True):
    """Everything wanted was sent. ``members``: those that are to vote, for who may be in doubt later."""

    members: tuple[Seat, ...] = ()


class Prepared(_Message, frozen=True):
    """From here on a commit cannot fail. Of a relay, ``lost`` are those behind it that it went on without."""

    lost: tuple[tuple[str, str], ...] = ()


class Commit(_Message, frozen=True):
    """The group decided to take the version."""


class Abort(_Message, frozen=True):
    """The group decided not to take the version, and why. In ``doubt``, a relay could not hear what it decided."""

    reason: str
    doubt: bool = False


class Done(_Message, frozen=True):
    """The decision was carried out; the problem, if any, came after that.

    Of a relay, ``lost`` are those of its workers that did not say so, and why.
    """

    problem: str
    lost: tuple[tuple[str, str], ...] = ()


class Broken(_Message, frozen=True):
    """The connection ends, and why: the other side broke the protocol, or is given up. It may come at any time."""

    reason: str


Message = (
    Hello
    | Past
    | Verdict
    | Crew
    | Welcome
    | Offer
    | Accept
    | Refuse
    | Filled
    | Release
    | End
    | Prepared
    | Commit
    | Abort
    | Done
    | Broken
)
_KINDS = get_args(Message)
_decoder = msgspec.msgpack.Decoder(Message)
_encoder = msgspec.msgpack.Encoder()


class FrameHeader(NamedTuple):
    """What a frame says before its message."""

    descriptors: int
    update: int
    nbytes: int


class Frame(NamedTuple):
    """A message, the update it belongs to, and the descriptors that came with it."""

    update: int
    message: Message
    descriptors: tuple[int, ...] = ()


def kind_of(message: Message | type) -> str:
    """The word for a kind of message, as the table of states has it."""
    return (message if isinstance(message, type) else type(message)).__name__.lower()


KINDS = tuple(map(kind_of, _KINDS))
"""Every kind there is."""

DESCRIPTORS: Mapping[str, int] = {"welcome": 1, "offer": 1}
"""How many descriptors come with a message of this kind; none with the others."""


LARGE = frozenset({"offer", "accept", "refuse", "filled", "release", "end", "done"})
"""Kinds that may be longer than ``MAX_SMALL``."""


def encode(update: int, message: Message, descriptors: int = 0) -> bytes:
    """The bytes of a frame.

    Raises:
        UsageError: it is larger than any receiver takes, or a name in it is no Unicode text, or a number too large.
    """
    try:
        body = _encoder.encode(message)
    except UnicodeEncodeError as error:
        raise UsageError(f"a name or a version is no text that can be sent: {error}") from error
    except OverflowError as error:
        raise UsageError(
            "a version that is a number has 64 bits at most; give a larger one as text, version=str(...)"
        ) from error
    if len(body) > MAX_FRAME:
        raise UsageError(f"a message of {len(body)} bytes is too large; {MAX_FRAME} is the most. Send fewer tensors")
    return HEADER.pack(_MAGIC, PROTOCOL, descriptors, update, len(body)) + body


def decode_header(raw: bytes | bytearray, most: int = MAX_FRAME) -> FrameHeader:
    """The header of a frame.

    Raises:
        ProtocolError: it is no frame, or one of another protocol, or larger than any may be.
    """
    magic, protocol, descriptors, update, nbytes = HEADER.unpack_from(raw)
    if magic != _MAGIC:
        raise ProtocolError(f"these bytes are no frame of hotweights: {bytes(raw[:4])!r}")
    if protocol != PROTOCOL:
        raise ProtocolError(
            f"the other side speaks protocol {protocol}, this one {PROTOCOL}; install the same hotweights on both"
        )
    if nbytes > most:
        raise ProtocolError(f"a frame of {nbytes} bytes is too large; {most} is the most now")
    return FrameHeader(descriptors, update, nbytes)


def decode(raw: bytes | bytearray) -> Message:
    """The message in the body of a frame.

    Raises:
        ProtocolError: it holds none.
    """
    try:
        message: Message = _decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError) as error:
        raise ProtocolError(f"a frame holds no message: {error}") from error
    return message


def is_kind(raw: bytes | bytearray, kind: type[Message]) -> bool:
    """Whether the body of a frame holds a message of this kind, by how it begins."""
    word = kind_of(kind).encode()
    return raw[1 : 2 + len(word)] == bytes([0xA0 | len(word)]) + word


def specs_of(offer: Offer) -> Manifest:
    """The manifest in an offer.

    Raises:
        ProtocolError: it names a tensor twice, an unknown dtype or an impossible shape.
    """
    try:
        manifest = Manifest(TensorSpec(name, _dtype(dtype), shape) for name, dtype, shape in offer.tensors)
    except UsageError as error:
        raise ProtocolError(f"the offer is broken: {error}") from error
    impossible = [str(spec) for spec in manifest.values() if min(spec.shape, default=0) < 0 or spec.nbytes > _ADDRESSES]
    if impossible:
        raise ProtocolError("the offer is broken; no tensor can have these shapes", impossible)
    return manifest


def described(manifest: Mapping[str, TensorSpec]) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    """A manifest as it stands in an offer.

    Raises:
        UsageError: the installed torch has no type for some tensors.
    """
    opaque = [str(spec) for spec in manifest.values() if isinstance(spec.dtype, OpaqueDtype)]
    if opaque:
        raise UsageError(f"the installed torch has no type for these, so they cannot be sent: {some(opaque)}")
    return tuple((spec.name, str(spec.dtype).removeprefix("torch."), spec.shape) for spec in manifest.values())


def word_of(dtype: torch.dtype | None) -> str:
    """How messages name a dtype; ``None`` is empty."""
    return "" if dtype is None else str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise UsageError(f"the installed torch knows no dtype {name!r}")
    return dtype


def words_of(part: Range) -> str:
    """A range for people: ``bytes 0 to 24``, ``3 runs of 8 bytes from byte 64 on, 16 apart``."""
    if part.count == 1:
        return f"bytes {part.start} to {part.stop}"
    return f"{part.count} runs of {part.nbytes} bytes from byte {part.start} on, {part.stride} apart"


def short_version(version: str | int) -> str | int:
    """The version's name for people: what is said between two versions is short."""
    return version if isinstance(version, int) else version[:_SHOWN]


def reasons_of(error: BaseException) -> tuple[str, ...]:
    """What the other side is told of an error: its problems, those of many names in one line, or its text.

    As much as fits. Of a live model's update it is what ended that: which version is live here is no news there. What
    is advised about the weights comes last: often only the sender can follow it.
    """
    if isinstance(error, UpdateAborted) and not error.problems and error.__cause__ is not None:
        error = error.__cause__
    text = str(error) if isinstance(error, HotweightsError) else f"{type(error).__name__}: {error}"
    problems = grouped(getattr(error, "problems", ()))
    reasons = [str(problem)[:REASON] for problem in problems or [text]]
    more = [f"... and {len(reasons) - _REASONS} more"] if len(reasons) > _REASONS else []
    lines = getattr(error, "advice", "")[:REASON].splitlines() if problems else []
    # That is an argument of this side's load.
    advice = [f"at the receiver: {line}" if "allow_" in line else line for line in lines]
    return (*reasons[:_REASONS], *more, *advice)


def listed(reasons: Sequence[str]) -> str:
    """The reasons of a receiver as one text: the only one, or a line for each."""
    if len(reasons) == 1:
        return reasons[0]
    return "\n    - ".join(("it refused the version:", *(reason.replace("\n", "\n    ") for reason in reasons)))
