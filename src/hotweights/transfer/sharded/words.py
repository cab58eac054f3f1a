"""Words: what the ranks of a sharded trainer and the one that leads them say to each other, and how it travels."""

from __future__ import annotations

import math
import struct
from typing import NamedTuple, get_args

import msgspec

from ...errors import ProtocolError
from .holding import Table

PROTOCOL = 4  # another number for every change of what words hold
MAX_WORD = 1024 * 1024 * 1024  # bytes; the table of 60,000 tensors takes about 5 MB
HEADER = struct.Struct("<4sHI")  # magic, protocol, bytes that follow
_MAGIC = b"hotr"


class _Word(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=str.lower):
    """Decoding checks the type of every field."""


class Join(_Word, frozen=True):
    """A rank's first word: which of how many it is."""

    rank: int
    size: int
    pid: int


class SlotMemory(_Word, frozen=True):
    """The slots, whose descriptor comes with it. ``mark`` is what the lead wrote into the store of its group.

    A rank on another host gets no descriptor: it makes slots of its own, and sends what it packs there by the flow that
    ``token`` is for.
    """

    slots: int
    slot_nbytes: int
    timeout: float
    mark: str
    token: bytes = b""


class Mapped(_Word, frozen=True):
    """The rank has mapped the slots, or connected its flow. Then receivers can come to this ``port`` of its host.

    0: to none.
    """

    port: int = 0


class Complete(_Word, frozen=True):
    """All ranks are there."""


class Here(_Word, frozen=True):
    """The rank sends this version in this round; ``table`` is the digest of what it holds, or it cannot send it."""

    round: int
    version: str | int
    table: bytes
    problem: str = ""


class Describe(_Word, frozen=True):
    """The lead does not know the rank's table."""

    round: int


class Described(_Word, frozen=True):
    """The table."""

    round: int
    table: Table


class Tick(_Word, frozen=True):
    """The round goes on."""

    round: int


class Patch(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """A box of a rank's tensor, and where it goes. The last dimension is the bytes of an element.

    Attributes:
        row: which of the task's rows.
        begin: the first index in the rank's tensor.
        lengths: of the box.
        into: where its first byte goes, counted from the chunk's first byte.
        strides: bytes between neighbours there.
    """

    row: int
    begin: tuple[int, ...]
    lengths: tuple[int, ...]
    into: int
    strides: tuple[int, ...]


class Task(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """What a rank does for one chunk of a slot. Of tensors that are alike only ``start`` and ``rows`` differ.

    Attributes:
        start: first byte of the chunk in the slot.
        rows: of the rank's table, those that are read.
        patches: what of them, and where it goes.
        hashed: it says the digest of the chunk, all of which it makes.
        dtype: what it casts its elements to, where that is not what its table says.
        whole: it makes all of the chunk.
        comes: of a rank on another host, whether the lead takes the bytes; if not, only receivers do.
    """

    start: int
    rows: tuple[int, ...]
    patches: tuple[Patch, ...]
    hashed: bool
    dtype: str = ""
    whole: bool = False
    comes: bool = True

    @property
    def nbytes(self) -> int:
        """How many bytes it makes."""
        return sum(math.prod(patch.lengths) for patch in self.patches)


class Fill(_Word, frozen=True):
    """The rank fills its part of a slot."""

    round: int
    slot: int
    tasks: tuple[Task, ...]


class Packed(_Word, frozen=True):
    """It has done so; the digests are those of the tasks that are hashed."""

    round: int
    slot: int
    digests: tuple[int, ...]


class Expect(_Word, frozen=True):
    """The receivers that may come to a rank on another host, by their places; each shows its token. Nobody else may."""

    round: int
    tokens: tuple[tuple[int, bytes], ...]


class Met(_Word, frozen=True):
    """These have come."""

    round: int
    places: tuple[int, ...]


class Give(_Word, frozen=True):
    """The rank sends receivers parts of a slot that it has filled: first byte and end of each, ``to`` whom by place.

    It does so when the receiver is told, and in that order; ``fill`` is what it was told.
    """

    round: int
    slot: int
    fill: int
    to: tuple[tuple[int, tuple[tuple[int, int], ...]], ...]


class Dismiss(_Word, frozen=True):
    """This receiver is lost. Nothing that the rank still has for it may be sent."""

    round: int
    place: int


class Severed(_Word, frozen=True):
    """Nothing can be sent to this receiver any more, and why."""

    round: int
    place: int
    reason: str


class Compare(_Word, frozen=True):
    """The rank says a digest of each group of rows, of which others hold copies; no ``groups``: those of before."""

    round: int
    groups: tuple[tuple[int, ...], ...]


class Compared(_Word, frozen=True):
    """It does so."""

    round: int
    digests: tuple[int, ...]


class Check(_Word, frozen=True):
    """Nothing more is read of this version."""

    round: int


class Checked(_Word, frozen=True):
    """The names of tensors that were written meanwhile."""

    round: int
    written: tuple[str, ...]


class Leave(_Word, frozen=True):
    """The rank gives the round up, and why. If it is ``late``, the lead did not come in time."""

    round: int
    reason: str
    late: bool = False


class RoundEnd(_Word, frozen=True):
    """How the round ended: a report, or an error, which every rank raises in the same words."""

    round: int
    version: str | int
    report: bytes = b""
    kind: str = ""
    title: str = ""
    problems: tuple[str, ...] = ()
    committed: tuple[str, ...] = ()


class Farewell(_Word, frozen=True):
    """The connection ends, and why."""

    reason: str


Word = (
    Join
    | SlotMemory
    | Mapped
    | Complete
    | Here
    | Describe
    | Described
    | Tick
    | Fill
    | Packed
    | Expect
    | Met
    | Give
    | Dismiss
    | Severed
    | Compare
    | Compared
    | Check
    | Checked
    | Leave
    | RoundEnd
    | Farewell
)
_decoder = msgspec.msgpack.Decoder(Word)
_encoder = msgspec.msgpack.Encoder()
WORDS = get_args(Word)


class WordHeader(NamedTuple):
    """What comes before a word."""

    nbytes: int


def encode(word: Word) -> bytes:
    """The bytes of a word."""
    body = _encoder.encode(word)
    return HEADER.pack(_MAGIC, PROTOCOL, len(body)) + body


def decode_header(raw: bytes | bytearray) -> WordHeader:
    """How long the word is.

    Raises:
        ProtocolError: no rank of a trainer speaks, or one of another hotweights.
    """
    magic, protocol, nbytes = HEADER.unpack_from(raw)
    if magic != _MAGIC:
        raise ProtocolError(f"these bytes are no word of a trainer's rank: {bytes(raw[:4])!r}")
    if protocol != PROTOCOL:
        raise ProtocolError(f"a rank speaks protocol {protocol}, this one {PROTOCOL}; install one hotweights on all")
    if nbytes > MAX_WORD:
        raise ProtocolError(f"a word of {nbytes} bytes is too large")
    return WordHeader(nbytes)


def decode(raw: bytes | bytearray) -> Word:
    """The word.

    Raises:
        ProtocolError: it is none.
    """
    try:
        word: Word = _decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, OverflowError) as error:
        raise ProtocolError(f"a rank's word is broken: {error}") from error
    return word
