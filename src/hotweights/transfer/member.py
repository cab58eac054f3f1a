"""Member: a receiver's part in its group's decision about one version: it votes, and does what was decided."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

from .. import signals
from ..errors import Closed, CommitHookError, TransferAborted, TransferError, TransferInDoubt, UsageError
from ..timeline import Timeline
from .ballot import Ballot
from .connection import Connection
from .decision import Decision, Known, of_member
from .messages import Abort, Account, Commit, Done, Message, Prepared, Refuse, Seat, reasons_of, short_version
from .pending_leases import PendingLeases
from .registers.register import SharedRecord
from .roll import Roll
from .states import SessionState
from .waits import holding, left

_LOOK = 1.0  # seconds between two looks into a register that was out of reach
_BEFORE_VOTING = (SessionState.OFFERED, SessionState.STREAMING, SessionState.ENDED)


class Standing(NamedTuple):
    """What the sender's roll says about one receiver and one update."""

    roll: Roll
    place: int
    update: int

    def listed(self) -> bool:
        """Whether the decision, once it has fallen, is about this receiver."""
        return self.roll.lists(self.place, self.update)

    def struck(self) -> bool:
        """Whether the group goes on without this receiver."""
        return self.roll.struck(self.place, self.update)


@signals.held_throughout
class Member:
    """A receiver's vote on one version, and what follows from it. Owns the ballot until the version is over.

    Attributes:
        version: its name.
        over: whether it was decided, or the sender lost.
        in_doubt: whether it has voted and lost its sender, and waits for somebody who knows the decision.
        electors: those that vote with it, of which the sender has told it.
        decides: whether the consumer takes part by ``decision``. If not, the end of the stream is its consent. Set
            before the stream, by what the consumer says that it wants.
        timeline: what the time of this version is spent on.
    """

    def __init__(
        self,
        connection: Connection,
        ballot: Ballot | None,
        standing: Standing | None,
        pending: PendingLeases,
        *,
        version: str | int,
        timeout: float,
        record: SharedRecord | None,
        update: int,
        place: int,
        is_elsewhere: bool,
        is_kept: bool,
    ) -> None:
        """``is_elsewhere``: whether the decision falls in a register, ``record``, or on another host.

        ``is_kept``: whether a group has taken the version before, so that the decision has fallen.

        A ballot holds then what was heard of it, if any. ``place`` is that at the lead, also behind a relay.
        """
        self.version = version
        self.decides = False
        self.over = False
        self.in_doubt = False
        self.electors: tuple[Seat, ...] = ()
        self.timeline = Timeline()
        self._connection = connection
        self._ballot = ballot
        self._standing = standing  # until the version is over: it keeps the slots mapped
        self._pending = pending
        self._timeout = timeout
        self._is_elsewhere = is_elsewhere
        self._is_kept = is_kept
        self._record = record
        self._update, self._place = update, place
        self._resolved = False  # Whether the decision came from somebody who does not wait for what follows.
        self._cancelled = False
        self._deciding = threading.RLock()  # held by whoever decides, refuses or commits
        self._interrupted: BaseException | None = None  # by what, after the group had decided to commit
        self._note(Known.KEPT)  # Until it votes.

    @property
    def _longest(self) -> float:
        """Seconds of a single wait: the sender may be waiting for another receiver first."""
        return self._connection.patience + self._timeout

    @property
    def state(self) -> SessionState:
        """Where the two sides stand."""
        return self._connection.session.state

    @property
    def aborted(self) -> bool:
        """Whether the group gave it up, and the sender still waits to hear that it was put back."""
        stopped = (SessionState.ABORTED, SessionState.REFUSED)
        return not self.over and self._connection.connected and self.state in stopped

    def require(self, state: SessionState, otherwise: str) -> None:
        """Check that the version is in this state.

        Raises:
            UsageError: it is not; ``otherwise`` says what that means.
            Closed: the receiver was closed.
        """
        self._connection.check_open()
        if self.over or self.state is not state:
            raise UsageError(f"version {self.version!r} {'is over' if self.over else otherwise}")

    # While it streams.

    def next_message(self) -> Message:
        """The sender's next message within the stream.

        Raises:
            TransferAborted: the group gave the version up.
            TransferError: the sender is lost, or said nothing in time.
            Closed: ``cancel`` was called, or the receiver was closed.
        """
        with self.timeline.event("wait for the sender"):
            return self._next(lambda: self._cancelled)

    def cancel(self) -> None:
        """End the stream's wait, from any thread."""
        self._cancelled = True
        self._connection.wake()

    def fail(self, error: BaseException) -> None:
        """The stream failed. Whoever decides puts version N back now, and refuses when that is done."""
        if not self.decides:
            self.refuse(error)
        elif not self.over and self._connection.connected:
            self._vote_no(error)

    def leave(self) -> None:
        """The consumer closed its stream; if that was before the end, it refuses."""
        unfinished = (SessionState.OFFERED, SessionState.STREAMING)
        if not self.over and self._connection.connected and self.state in unfinished:
            self.fail(TransferError("the consumer left before the last tensor"))

    def give_up(self, error: BaseException) -> None:
        """End the connection and say why: sender and receiver do not understand each other any more."""
        self._connection.drop("; ".join(reasons_of(error)))
        self._finish()

    # The decision.

    @contextmanager
    @signals.held
    def decision(self) -> Iterator[None]:
        """Wait until the group has decided to commit; inside, commit. Leaving tells the sender.

        From here on a commit must not be able to fail. The first Ctrl-C ends the wait while the group can still
        decide to abort; after that it is raised at the end.

        Raises:
            TransferAborted: the group decided to abort; the message says why.
            TransferError: the sender is gone, and had not decided; so this is an abort for all.
        """
        with signals.first_waits(self._connection.wake) as interruption, self._alone():
            with self.timeline.event("wait for the group"):
                self._prepare(interruption)
            try:
                yield
            except BaseException as error:
                self._done(error)
                raise
            self._done(None)

    def refuse(self, error: BaseException) -> None:
        """Tell the sender why this version cannot be taken; whatever it wrote is put back. Nothing when it is over."""
        with self._alone():
            if not self.over:
                self._refuse(error)

    def _alone(self) -> AbstractContextManager[None]:
        """Inside, no other thread refuses or ends this version; ``Receiver.close`` may come at any time."""
        return holding(self._deciding, self._longest)

    def _prepare(self, interruption: signals.Interruption) -> None:
        """Vote for the version, and wait for the decision. Returns if it is to commit."""
        self.require(SessionState.ENDED, "has not streamed to its end")
        if self._record is not None:
            self._record.check()
        try:
            self._connection.send(Prepared())
            self._hear(lambda: interruption.came or (self._cancelled and not self.decides))
            self._note(Known.COMMITTED)
        except TransferAborted:
            raise
        except BaseException as error:
            # The decision may have fallen without this member having heard of it.
            if self._is_elsewhere:
                self._hear_from_afar(error, interruption)
                return
            is_commit = of_member(voted=True, record=self._sealed()) is Decision.COMMIT
            self._note(Known.COMMITTED if is_commit else Known.KEPT)
            if not is_commit:
                self.give_up(TransferError("it was interrupted") if interruption.came else error)
                raise
            self._interrupted = None if isinstance(error, Exception) else error
            if isinstance(error, TransferError) or not self._hears_late():
                self._connection.drop("it waited for the decision in vain, and read it")

    def _sealed(self) -> Decision | None:
        """What the group has decided about this member. If it had decided nothing, it aborts now.

        Where the decision falls elsewhere, only a commit is known here: whoever heard of it, a relay, has noted it.
        """
        if self._is_kept:
            return Decision.COMMIT
        standing, ballot = self._standing, self._ballot
        otherwise = None if self._is_elsewhere else Decision.ABORT
        # The others need not hear of it if it was struck.
        if standing is None or ballot is None or standing.struck():
            return otherwise
        # In this order: the sender lists its members, and then decides.
        committed = ballot.decide(Decision.ABORT) is Decision.COMMIT and standing.listed()
        return Decision.COMMIT if committed else otherwise

    def _hear(self, stop: Callable[[], bool]) -> None:
        """Wait for the sender to say commit. It may be waiting for other receivers first."""
        message = self._next(stop)
        assert isinstance(message, Commit), "the table lets nothing else pass"

    def _hear_from_afar(self, error: BaseException, interruption: signals.Interruption) -> None:
        """Wait on after ``error``: who has voted to take the version can only hear what its sender decided.

        Raises:
            TransferAborted: it decided to abort.
            TransferInDoubt: nobody says what it decided.
        """
        heard = None
        if not isinstance(error, TransferError) and not self._connection.stopped:
            self._interrupted = None if isinstance(error, Exception) else error
            try:
                self._hear(bool)
                heard = Decision.COMMIT
            except TransferAborted as aborted:
                heard, error = Decision.ABORT, aborted
            except BaseException as later:  # A second signal does not wait.
                error = later
        if heard is None:
            # From here on no word of the lead before can be heard: the next one relies on that.
            self._connection.drop(str(error) or type(error).__name__)
        decision = of_member(voted=True, heard=heard, record=None if heard else self._read())
        self._resolved = heard is None
        if decision is None:
            decision = self._doubted(error, interruption)
        if decision is Decision.COMMIT:
            self._note(Known.COMMITTED)
            return
        self._note(Known.IN_DOUBT if decision is None else Known.KEPT)
        reason = str(error) or type(error).__name__
        failure = self._doubt(reason) if decision is None else TransferAborted("the update was aborted", [reason])
        self._finish()
        raise failure from error

    def _read(self) -> Decision | None:
        """What is written about this member, in a register or by its relay; ``None`` if it cannot be read."""
        if self._record is None:
            return self._sealed()
        try:
            return Decision.COMMIT if self._record.is_commit() else Decision.ABORT
        except TransferError:
            return None

    def _doubted(self, error: BaseException, interruption: signals.Interruption) -> Decision | None:
        """Wait for the next lead, or for the register, as long as for anything else. The version before is live."""
        self._note(Known.IN_DOUBT)
        self.in_doubt = True
        # Who was interrupted already waits no longer.
        deadline = time.monotonic() + (0 if self._interrupted or interruption.came else self._timeout)
        try:
            with self.timeline.event("in doubt"):
                return self._asked(deadline, lambda: interruption.came)
        except (TransferError, Closed):
            return None
        finally:
            self.in_doubt = False

    def _asked(self, deadline: float, stop: Callable[[], bool]) -> Decision | None:
        if self._record is None:
            return self._connection.verdict(self._update, deadline, stop)
        while left(deadline):  # No lead can know better than the register.
            self._connection.pause(min(_LOOK, left(deadline)), stop)
            if (written := self._read()) is not None:
                return written
        return None

    def _note(self, outcome: Known) -> None:
        if self._is_kept and outcome is not Known.COMMITTED:  # It is none of those that were to vote.
            return
        members = self.electors if outcome is Known.IN_DOUBT else ()
        self._connection.note(Account(self._update, self._place, outcome, short_version(self.version), members))

    def _doubt(self, reason: str) -> TransferInDoubt:
        return TransferInDoubt(
            f"version {self.version!r} was voted for, and whether the group took it is not known here; it is not live "
            "here. The next version ends the doubt",
            [reason],
        )

    def _hears_late(self) -> bool:
        """Whether the sender says what was read from the ballot, which it does unless it is lost."""
        try:
            self._hear(bool)
        except (TransferError, Closed):
            return False
        except BaseException as error:  # A second signal: the commit is not left to the others for it.
            self._interrupted = error
            return False
        return True

    def _done(self, error: BaseException | None) -> None:
        """Say that the commit was carried out, and what went wrong after it."""
        if self.over:
            return
        if self._resolved:  # Nobody waits for it.
            pass
        elif error is not None and not isinstance(error, CommitHookError):
            self._connection.drop(f"the version was to be taken, and was not: {' '.join(reasons_of(error))}")
        elif self._connection.connected:
            self._connection.send(Done("" if error is None else "; ".join(reasons_of(error))))
        self._finish()
        interrupted, self._interrupted = self._interrupted, None
        if interrupted is not None and error is None:
            raise interrupted

    def _refuse(self, error: BaseException) -> None:
        try:
            self._vote_no(error)
            while self.state is not SessionState.ABORTED:  # Slots may be under way still.
                self._connection.receive(time.monotonic() + self._longest, meanwhile=self._pending.give_back)
            self._put_back()
        except BaseException as failure:
            self.give_up(failure)
            if not isinstance(failure, (TransferError, Closed)):
                raise

    def _vote_no(self, error: BaseException) -> None:
        if self.state in _BEFORE_VOTING:
            self._connection.send(Refuse(reasons_of(error)))

    def _put_back(self) -> None:
        """The abort is carried out, and the sender may use its slots again."""
        self._pending.settle()
        self._connection.send(Done(""))
        self._finish()

    def _next(self, stop: Callable[[], bool]) -> Message:
        frame = self._connection.receive(time.monotonic() + self._longest, stop=stop, meanwhile=self._pending.give_back)
        if isinstance(frame.message, Abort):
            if frame.message.doubt:
                raise self._doubt(frame.message.reason)
            if not self.decides:
                self._put_back()
            raise TransferAborted("the update was aborted", [frame.message.reason])
        return frame.message

    def _finish(self) -> None:
        self.over = True
        self._standing = None
        self._pending.forget()
        if self._ballot is not None:
            self._ballot.close()
