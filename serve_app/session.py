"""The sending side of a session: numbers timesteps, keeps inputs until accepted and outputs until read.

Used wherever segments start: in the ingress for its clients, in a handle client, in a WebSocket client. How they travel
is a Carrier's business. Everything here runs on one event loop.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from serve_app.checkpoint import Checkpoint, encode_checkpoint
from serve_app.errors import (
    InvalidInput,
    LockstepError,
    Overloaded,
    Rewound,
    SessionEnded,
    StartMismatch,
    StateLost,
    StepFailed,
    WindowFull,
    from_wire,
)
from serve_app.frame import ABORT, NO_CLOSE
from serve_app.segment import Outputs, Run, Timing
from serve_app.spec import ModelSpec, SessionLimits, check_segment

logger = logging.getLogger(__name__)

State = tuple[np.ndarray, ...] | None
MAX_RETAINED = 16384
"""Timesteps since the last checkpoint. Where none comes for so long the session cannot be gone on with elsewhere, until
the next does."""
MAX_SHARED_RUNS = 8
"""Each keeps all that its answer brought, of other sessions too: so many that nobody has acknowledged are copied."""
Keep = Callable[["Session", int, State], None]
"""Keeps the state of a session after so many timesteps where it can be had from when this side is gone."""


class Carrier(Protocol):
    """What brings a session's inputs to its owner, and its outputs back."""

    def notify(self, session: "Session") -> None:
        """The session has something to send: `take` it when there is room."""
        ...

    def notify_later(self, session: "Session") -> None:
        """The owner was full: `take` again after a while."""
        ...

    def notify_ack(self, session: "Session") -> None:
        """The session has acknowledged more: tell the owner with whatever goes there next."""
        ...

    def want_state(self, session: "Session") -> None:
        """The session's state is wanted: `exported` hears of it."""
        ...


class Entry(NamedTuple):
    """What a session sends at once: a frame's entry, or a message."""

    start: int
    x: np.ndarray
    acked: int
    rewind: int
    close: int


class Exported(NamedTuple):
    """A session after its first `at` timesteps, as `serve_app.checkpoint` encodes it."""

    at: int
    record: bytes


class Session:
    """One session on the number line: acked <= progress <= accepted <= handed <= next.

    `next`: timesteps submitted; `handed`: given to the carrier; `accepted`: the owner has them; `progress`: outputs are
    here; `acked`: the owner may free the outputs below. With `ack_on_receipt` that is `progress`, since this side holds
    them; without, whoever uses the session acknowledges for the client behind it. What runs again of a session that was
    restored is the exception: its client has had the outputs, so `acked` is beyond `progress` for a while.
    """

    def __init__(
        self,
        name: str,
        spec: ModelSpec,
        limits: SessionLimits,
        carrier: Carrier,
        *,
        epoch: int = 0,
        ack_on_receipt: bool = True,
        initial_state: tuple[np.ndarray, ...] | None = None,
        retains: bool = False,
        keeps_unanswered: bool = False,
    ) -> None:
        """retains: inputs are kept until a checkpoint has made them unnecessary, for the owner may be lost.

        keeps_unanswered: they are kept until their outputs are here, and those from `kept` on, for what is between here
        and the owner may go.
        """
        self.name = name
        self.spec = spec
        self.limits = limits
        self.epoch = epoch
        #: Who has it; only where it is known.
        self.owner = ""
        self.next = self.handed = self.accepted = self.progress = self.acked = 0
        self.rewind = 0
        #: The owner was told so.
        self.acked_told = 0
        #: The owner that was to take it in has not, and is gone.
        self.is_unopened = False
        #: A frame with inputs of this session is on its way, and not known to be accepted.
        self.in_flight = False
        #: Why the session ended (closed, idle, aborted, …), None while it lives.
        self.end_reason: str | None = None
        self.carrier = carrier
        #: Of all outputs that have come since some were handed out.
        self.timing = Timing()
        #: Called, on the event loop, whenever there are more outputs, or a failure, or the session has ended.
        self.changed: Callable[[], None] | None = None
        self._ack_on_receipt = ack_on_receipt
        self._close = NO_CLOSE
        self._close_told = False
        self._inputs: deque[tuple[int, np.ndarray]] = deque()
        self._retains, self._keeps_unanswered = retains, keeps_unanswered
        #: Lets go of the session, when another connection of its client takes it over.
        self.leave: Callable[[], None] | None = None
        #: It is left as it is at its owner when this side stops: its client can take it over elsewhere.
        self.stays = False
        #: The directory, which has started again, did not say so when the client came back: another may have it.
        self.is_unconfirmed = False
        #: The inputs below are not needed any more, whatever is lost; None where the session is lost with its way in.
        self.kept: int | None = None
        self._keep: Keep | None = None
        self._keep_next: tuple[int, State] | None = None  # when the client has the outputs below
        self._must_number = False  # its client has to say where the next segment starts
        #: States by timestep, rising: the first can be gone on from, others when the outputs below have come.
        self._checkpoints: deque[tuple[int, State]] = deque([(0, initial_state)])
        self._adopted_at = 0  # inputs below are not here: they were sent to the owner from elsewhere, or given up
        self._outputs: deque[Run] = deque()
        self._copied: deque[Run] = deque()  # what was there before those
        self._early: dict[int, Run] = {}  # that overtook others
        self._read = 0  # outputs below were handed to the user
        self._end: tuple[str, int] | None = None  # told by the owner, while outputs below are still on their way
        self._error: LockstepError | None = None  # ended the session
        self._failure: LockstepError | None = None  # the last that did not; the user has to be told once
        self._num_failures = self._failures_told = 0
        self._waiting: list[asyncio.Future[None]] = []
        self._num_exporting = 0
        self._exported: Exported | None = None  # the last, while it may be wanted

    # What a user of the session calls.

    def submit(self, x: np.ndarray, start: int | None = None) -> int:
        """Queue the segment x [T, *features]; returns the timestep it ends at. Never blocks.

        start: the segment's first timestep; what lies below `next` was submitted before and is not sent again. Raises
        InvalidInput, StartMismatch, WindowFull, SessionEnded, and once what made the session rewind.
        """
        self._raise_if_ended()
        if start is None:
            self._raise_failure()
            self._raise_unnumbered()
            start = self.next
        if start < 0:
            raise InvalidInput(
                f"a segment of session {self.name!r} starts at {start}, the first timestep is 0: send from {self.next}"
            )
        if start > self.next:
            raise StartMismatch(
                f"a segment of session {self.name!r} starts at {start}, {self.next} was expected: "
                f"resend from {self.next}",
                expected=self.next,
                rewind=self.rewind,
            )
        check_segment(x, self.spec.input, self.limits)
        self._must_number = False
        end = start + len(x)
        if end > self.next:
            if self._close >= 0:
                raise SessionEnded(f"session {self.name!r} closes at timestep {self._close}: nothing further is taken")
            held = end - (self._read if self._ack_on_receipt else self.acked)
            if held > self.limits.max_window:
                how = "read" if self._ack_on_receipt else "acknowledged"
                raise WindowFull(
                    f"session {self.name!r} would have {held} timesteps submitted and not {how}, the limit is "
                    f"{self.limits.max_window}: take outputs first, or raise session.max_window_timesteps and "
                    "engine.max_retained_bytes",
                    expected=self.next,
                )
            self._failures_told = self._num_failures
            self._inputs.append((self.next, x[self.next - start :].copy()))
            self.next = end
            self.offer()
        return end

    async def wait(self, timestep: int | None = None) -> int:
        """Wait until `progress` reaches the timestep (None: all that is submitted); returns `progress`.

        Raises InvalidInput for a timestep not submitted, the error that ended the session, or what rewound it: once,
        but to all who were waiting then.
        """
        known = self._num_failures
        target = self.next if timestep is None else timestep
        if self._failures_told == known and target > self.next:
            self._raise_if_ended()
            raise InvalidInput(f"session {self.name!r} has {self.next} timesteps submitted, {target} was waited for")
        while self.progress < target:
            self._raise_failure(known)
            self._raise_if_ended()
            await self._change()
        return self.progress

    async def export(self) -> Exported:
        """The session as it is when all that is submitted by now has run, or later. Raises the error that ended it.

        After a step that fails meanwhile it is the session before that: what fails is told to others.
        """
        target = self.next
        self._num_exporting += 1
        try:
            is_asked = False
            while (found := self._exported) is None or found.at < min(target, self.next):
                self._raise_if_ended()
                if self.progress >= min(target, self.next) and (found is not None or not is_asked):
                    self.carrier.want_state(self)
                    self._exported, is_asked = None, True  # one that is too early is of a session that runs again
                await self._change()
            return found
        finally:
            self._num_exporting -= 1
            if not self._num_exporting:
                self._exported = None

    async def available(self, start: int | None = None) -> bool:
        """Wait for outputs from timestep `start` on (None: not read yet); False when the session closes without any.

        Raises the error that ended the session, or once what rewound it.
        """
        while self.progress <= (self._read if start is None else start):
            self._raise_failure()
            if self.end_reason == "closed":
                return False
            self._raise_if_ended()
            await self._change()
        return True

    def check(self) -> None:
        """Raise the error that ended the session, or once what rewound it; nothing when it has closed in order."""
        self._raise_failure()
        if self._error is not None:
            raise self._error

    async def outputs(self) -> AsyncIterator[Outputs]:
        """Outputs in order, each timestep once, as they come; ends with the session."""
        while await self.available():
            if outputs := self.read():
                yield outputs

    def read(self) -> Outputs | None:
        """All outputs that are here and were not read yet; None without any."""
        outputs = self.peek(self._read)
        if outputs is not None:
            self._read = self.progress
            if self._ack_on_receipt:
                self._copied.clear()
                self._outputs.clear()
        return outputs

    def peek(self, start: int) -> Outputs | None:
        """All outputs that are here from timestep `start` on, still to be read and acknowledged; None without any."""
        runs = [run.cut(start) for run in (*self._copied, *self._outputs) if run.end > start]
        if not runs:
            return None
        # Copies, since a run shares memory with all that its answer brought.
        if len(runs) == 1:
            values = {name: runs[0].rows(name).copy() for name in self.spec.outputs}
        else:
            values = {name: np.concatenate([run.rows(name) for run in runs]) for name in self.spec.outputs}
        timing, self.timing = self.timing, Timing()
        return Outputs(runs[0].start, values, timing)

    def between(self, start: int, end: int) -> dict[str, np.ndarray]:
        """The outputs of timesteps `start` … `end`, all of which are here: for use at once, as in `Run`."""
        parts = [run for run in (*self._copied, *self._outputs) if run.end > start and run.start < end]
        if len(parts) == 1:
            (run,) = parts
            first, last = run.at + start - run.start, run.at + end - run.start
            return {name: values[first:last] for name, values in run.values.items()}
        empty = {name: np.empty((0, *spec.shape), spec.dtype) for name, spec in self.spec.outputs.items()}
        return {
            name: np.concatenate([none, *(run.cut(start).rows(name) for run in parts)])[: end - start]
            for name, none in empty.items()
        }

    def ack(self, timestep: int) -> None:
        """The client behind this side holds the outputs below the timestep. Lower than before is no error.

        Raises InvalidInput when there are no such outputs yet.
        """
        if timestep > max(self.progress, self.acked):
            raise InvalidInput(
                f"session {self.name!r} has outputs up to timestep {self.progress}, {timestep} was acknowledged: "
                "acknowledge what has arrived, not what was sent"
            )
        self.acked = max(self.acked, timestep)
        self._read = max(self._read, self.acked)
        while (runs := self._copied or self._outputs) and runs[0].end <= self.acked:
            runs.popleft()
        self.carrier.notify_ack(self)
        self._keep_if_due()

    def close(self, start: int | None = None) -> None:
        """End the session when everything submitted has run. Further calls do nothing.

        start: what whoever asks has submitted. Raises StartMismatch if that is not all, or more.
        """
        if start is None:
            self._raise_unnumbered()
        elif start != self.next:
            raise StartMismatch(
                f"session {self.name!r} was to close at timestep {start}, {self.next} are submitted: resend from "
                f"{self.next}, or close there",
                expected=self.next,
                rewind=self.rewind,
            )
        if self._close == NO_CLOSE and self.end_reason is None:
            self._close = self.next
            self.offer()

    def abort(self) -> None:
        """End the session at once; what is pending is dropped."""
        if self.end_reason is None and self._close != ABORT:
            self._close, self._close_told = ABORT, False
            self._inputs.clear()
            self.handed = self.next
            self.offer()

    async def closed(self) -> str:
        """Wait for the end; returns its reason. Raises the error, where one ended the session, or what rewound it.

        A session that was rewound is open again: what was lost can be submitted again, and then be closed.
        """
        known = self._num_failures
        while self.end_reason is None:
            self._raise_failure(known)
            await self._change()
        if self._error is not None and self.end_reason not in ("closed", "aborted"):
            raise self._error
        return self.end_reason

    # What a carrier calls.

    @property
    def sendable(self) -> bool:
        """Whether `take` would bring something that is worth a call."""
        if self.end_reason is not None:
            return False
        closes = self._close != NO_CLOSE and not self._close_told
        return (closes and self._close == ABORT) or (not self.in_flight and (closes or self.handed < self.next))

    @property
    def done(self) -> bool:
        """Whether the carrier can forget the session: it has ended and the owner, if it cares, knows all is here."""
        return self.end_reason is not None and (self.end_reason != "closed" or self.acked_told >= self.progress)

    @property
    def has_all_acked(self) -> bool:
        """Whether it has ended, and its client has all that came of it."""
        return self.end_reason is not None and self.acked >= self.progress

    def take(self, max_timesteps: int) -> Entry:
        """What to send now: up to max_timesteps inputs, the acknowledgement, and the close once all inputs are out."""
        room = min(max_timesteps, self.limits.max_window)  # what runs again may be more than the owner takes at once
        start, end = self.handed, min(self.next, self.handed + room)
        x = self._pending(start, end)
        self.handed = end
        close = NO_CLOSE
        if self.handed == self.next and self.end_reason is None and not self._close_told:
            close, self._close_told = self._close, self._close != NO_CLOSE
        self.in_flight = end > start or close != NO_CLOSE
        self.acked_told = min(self.acked, self.progress)  # or the owner would leave out what is to come here
        return Entry(start, x, self.acked_told, self.rewind, close)

    def offer(self) -> None:
        """Tell the carrier, if there is something to send."""
        if self.sendable:
            self.carrier.notify(self)

    def arrived(self, handed: int) -> None:
        """The frame has arrived after whose `take` `handed` was that; unless another has followed it, one may now."""
        if handed >= self.handed:
            self.in_flight = False
            self.offer()

    def deliver(self, accepted: int, rewind: int, outputs: Run | None) -> None:
        """The owner has accepted the inputs below `accepted`, and these are outputs; in any order, repeated or not.

        rewind: as it was when that was said; what was accepted before the last rewind counts no more.
        """
        if accepted > self.accepted and rewind == self.rewind:
            self.accepted = min(accepted, self.next)
            self._drop_inputs()
            if self.accepted >= self.handed:
                self.arrived(self.accepted)
        if outputs is not None and outputs.end > self.progress:
            if outputs.start == self.progress and not self._early:
                self._outputs.append(outputs)
                self.progress = outputs.end
            else:
                self._early[outputs.start] = outputs
                self._join()
            self._progressed()

    def checkpoint(self, at: int, state: tuple[np.ndarray, ...]) -> None:
        """The owner's state after the first `at` timesteps, all of whose outputs are here or on their way."""
        self._export(at, state)
        if self._keep is not None and self._keep_next is None and at > (self.kept or 0):
            self._keep_next = at, state
            self._keep_if_due()
        last = self._checkpoints[-1][0] if self._checkpoints else self._adopted_at - 1
        if self._retains and at > last:
            self._checkpoints.append((at, state))
            self._settle_checkpoints()

    def exported(self, found: Exported) -> None:
        """What `want_state` has asked for."""
        if self._num_exporting:
            self._exported = found
            self._wake()

    @property
    def is_due(self) -> bool:
        """Whether something is to come from the owner: outputs, a state, or the end that was asked for."""
        asked = self.progress < self.next or self._close != NO_CLOSE or self._num_exporting > 0
        return asked and self.end_reason is None

    @property
    def has_all(self) -> bool:
        """Whether it is to close, and its last output is here."""
        return self._close == self.next == self.progress

    @property
    def can_move(self) -> bool:
        """Whether it can go on at another owner."""
        if not self._checkpoints or self.end_reason is not None or self._close == ABORT:
            return False
        at, _ = self._checkpoints[0]
        has_inputs = self._retains or (self.is_unopened and self.accepted == at)
        return has_inputs and at <= self.progress

    @property
    def can_return(self) -> bool:
        """Whether its client may come back for it when it is given up here."""
        return self.stays and self.kept is not None and self.end_reason is None and self._close != ABORT

    def restore_point(self) -> tuple[int, State]:
        """From which timestep on it can go on elsewhere, with which state (None: the model's own)."""
        return self._checkpoints[0]

    def adopt(self, acked: int) -> None:
        """It was sent from elsewhere until now, and its client has the outputs below `acked`; the others come here.

        Or, where `adopted` says so, more of them.
        """
        self.progress = self.acked = self.acked_told = self._read = acked
        self._checkpoints.clear()  # one comes with the first outputs

    def adopted(self, accepted: int, rewind: int, acked: int = 0) -> None:
        """The owner has its inputs below `accepted`, after so many failed steps, and its outputs from `acked` on."""
        if acked > self.progress:
            self.progress = acked
            self._join()
        self.acked = self._read = max(self.acked, acked)
        if rewind >= self.rewind:  # else a step has failed since, which was heard of first
            self.next = self.handed = self.accepted = accepted
            self.rewind = rewind
        self._adopted_at = self.next
        self.progress = min(self.progress, self.next)  # what its client has had may have to run again there
        self.acked_told = min(self.acked_told, self.next)
        while self._checkpoints and self._checkpoints[0][0] < self.next:
            self._checkpoints.popleft()  # inputs from there on are not all here

    def begin_at(self, at: int) -> None:
        """Its initial state is that after `at` timesteps, which were those of another session."""
        self.next = self.handed = self.accepted = self.progress = self.acked_told = self._adopted_at = at
        self.acked = self._read = at
        self._checkpoints[0] = at, self._checkpoints[0][1]

    def restore(self, at: int, acked: int, rewind: int) -> None:
        """Its initial state is that after `at` timesteps; its client has the outputs below `acked`.

        rewind: the failed steps that the client knows of.
        """
        self.begin_at(at)
        self.acked = self._read = acked
        self.rewind, self._must_number = rewind, True

    def keep_with(self, keep: Keep, kept: int) -> None:
        """Have checkpoints kept, each when its client has the outputs below; the last was that of `kept`."""
        self._keep, self.kept = keep, kept

    def must_number(self) -> None:
        """Its client has to say where its next segment starts: what is here may not be all that it has sent."""
        self._must_number = True

    def returned(self, acked: int) -> None:
        """Its client is back, and has the outputs below `acked`: what was read from there on has not arrived."""
        self.ack(min(acked, self.progress))
        self.acked = self._read = max(self.acked, acked)

    def resumed(self, accepted: int, rewind: int) -> None:
        """There is a way to the owner again, who has the inputs below `accepted`, after so many failed steps."""
        self.in_flight = self._close_told = False
        first = self._inputs[0][0] if self._inputs else self.next
        if accepted < first and self._close != ABORT:
            raise StateLost(
                f"session {self.name!r} can go on from timestep {accepted}, its inputs are here from {first} on: "
                "open a new one",
                expected=accepted,
            )
        self._ask_again()
        if rewind != self.rewind:
            failed = StepFailed(f"the model failed at timestep {accepted}: resend from {accepted}", expected=accepted)
            self._rewind(accepted, rewind, failed)
            return
        self.handed = self.accepted = min(accepted, self.next)
        self.acked_told = 0
        self.offer()

    def moved(self, carrier: Carrier, timestep: int) -> None:
        """Another owner has it, from that timestep on: what is not known to have run is sent again."""
        self.carrier = carrier
        self.handed = self.accepted = timestep
        self.acked_told = 0
        self.is_unopened = self.in_flight = self._close_told = False
        self._end = None
        self._early.clear()  # all comes again, and if a step fails there, not as it was
        while len(self._checkpoints) > 1:
            self._checkpoints.pop()
        self._ask_again()
        self.offer()

    def notice(self, kind: str, error: dict[str, Any] | None, reason: str, progress: int) -> None:
        """The owner says something that is not an output (see frame.Notice)."""
        if kind == "ended":
            self._end = (reason, progress)
            self._finish_if_due()
        elif kind == "fresh":
            self._export(0, None)
        elif error is not None:
            self._refused(from_wire(error))

    def fail(self, error: LockstepError) -> None:
        """The session is lost."""
        if self.end_reason is None:
            self._error, self.end_reason = error, error.code
            self._inputs.clear()
            self._wake()

    # Inside.

    def _export(self, at: int, state: State) -> None:
        if self._num_exporting:
            of = Checkpoint(self.name, self.spec.name, self.spec.fingerprint, self.epoch, at, state)
            self.exported(Exported(at, encode_checkpoint(of)))

    def _ask_again(self) -> None:
        """There is another way to the owner, or another owner."""
        if self._num_exporting:
            self.carrier.want_state(self)

    def _drop_inputs(self) -> None:
        """Forget what is not needed any more."""
        needed = min(self.accepted, self.progress) if self._keeps_unanswered else self.accepted
        if self._keeps_unanswered and self.kept is not None:
            needed = min(needed, max(self.kept, needed - MAX_RETAINED))
        if self._retains:
            needed = self._checkpoints[0][0] if self._checkpoints else self._adopted_at  # where the first may be
            if self.accepted - needed > MAX_RETAINED:
                self._adopted_at = needed = min(self.accepted, self.progress)
                self._checkpoints.clear()
        while self._inputs and self._inputs[0][0] + len(self._inputs[0][1]) <= needed:
            self._inputs.popleft()

    def _settle_checkpoints(self) -> None:
        """The last checkpoint below which all outputs are here is the first."""
        while len(self._checkpoints) > 1 and self._checkpoints[1][0] <= self.progress:
            self._checkpoints.popleft()
        self._drop_inputs()

    def _pending(self, start: int, end: int) -> np.ndarray:
        """Timesteps start … end of what is submitted and not accepted."""
        if self._inputs and self._inputs[-1][0] == start:
            return self._inputs[-1][1][: end - start]
        parts: list[np.ndarray] = []
        for first, x in reversed(self._inputs):
            if first < end:
                parts.insert(0, x[max(0, start - first) : end - first])
            if first <= start:
                break
        return np.concatenate([np.empty((0, *self.spec.input.shape), self.spec.input.dtype), *parts])

    def _join(self) -> None:
        """Append what continues the line; the rest waits for what it overtook."""
        while early := [part for part in self._early.values() if part.start <= self.progress]:
            for part in early:
                del self._early[part.start]
                if part.end > self.progress:
                    self._outputs.append(part.cut(self.progress))
                    self.progress = part.end

    def _copy_outputs(self) -> None:
        values = {name: np.concatenate([run.rows(name) for run in self._outputs]) for name in self.spec.outputs}
        self._copied.append(Run(self._outputs[0].start, self._outputs[-1].end, values))
        self._outputs.clear()

    def _progressed(self) -> None:
        """There are more outputs."""
        if len(self._outputs) >= MAX_SHARED_RUNS:
            self._copy_outputs()
        if self._ack_on_receipt:
            self.acked = self.progress
        if self.acked > self.acked_told:
            self.carrier.notify_ack(self)
        if len(self._checkpoints) > 1:
            self._settle_checkpoints()
        if self._keeps_unanswered:
            self._drop_inputs()
        self._wake()
        if self._end is not None:
            self._finish_if_due()

    def _keep_if_due(self) -> None:
        if self._keep is not None and self._keep_next is not None and self._keep_next[0] <= self.acked:
            (at, state), self._keep_next = self._keep_next, None
            self._keep(self, at, state)

    def _refused(self, error: LockstepError) -> None:
        expected = error.details.get("expected")
        if isinstance(error, Rewound):
            return  # the StepFailed that it follows has said it all
        if isinstance(error, Overloaded):
            self._resend(expected or 0)
            self.carrier.notify_later(self)
        elif isinstance(error, StartMismatch) and expected is not None:
            self._resend(expected)
            self.offer()
        elif isinstance(error, StepFailed | InvalidInput) and expected is not None:
            if (rewind := int(error.details["rewind"])) > self.rewind:  # else it was told before, when this was resumed
                self._rewind(expected, rewind, error)
        else:
            self.fail(error)

    def _resend(self, expected: int) -> None:
        self.handed = max(expected, self.accepted)  # more may have been accepted since that was said
        self.in_flight = False
        self._close_told = False

    def _rewind(self, timestep: int, rewind: int, error: LockstepError) -> None:
        """Give up the inputs from `timestep` on; the next segment starts there.

        Those that had run before, and whose outputs are no news, are not given up, but sent again where they are here.
        """
        first = self._inputs[0][0] if self._inputs else self.next
        following = timestep
        if first <= timestep < (known := min(self.next, max(self.progress, self.acked))):
            following = known
            error = type(error)(
                f"{error.message}; {known} timesteps had run before: resend from {known}", **error.details
            )
            error.details["expected"] = known
        while self._inputs and self._inputs[-1][0] >= following:
            self._inputs.pop()
        if self._inputs:
            first, x = self._inputs[-1]
            self._inputs[-1] = first, x[: following - first]
        self.next = following
        self.handed = self.accepted = timestep
        self._adopted_at = min(self._adopted_at, timestep)
        self.rewind = rewind
        self.in_flight = self._close_told = False
        self._close = NO_CLOSE
        self._failure = error
        self._num_failures += 1
        if timestep < following:
            self.carrier.notify_later(self)
        self._wake()

    def _finish_if_due(self) -> None:
        if self._end is None or self.end_reason is not None:
            return
        reason, progress = self._end
        if reason == "closed" and self.progress < progress:
            return  # outputs are still on their way
        self.end_reason = reason
        self.in_flight = False  # the owner has said so after all that was sent
        if reason != "closed":
            self._error = SessionEnded(
                f"session {self.name!r} has ended ({reason}) at timestep {progress}: open a new one",
                reason=reason,
                progress=progress,
            )
        self._inputs.clear()
        self._wake()

    def _raise_if_ended(self) -> None:
        if self._error is not None:
            raise self._error
        if self.end_reason is not None:
            raise SessionEnded(
                f"session {self.name!r} has ended ({self.end_reason}): open a new one", reason=self.end_reason
            )

    def _raise_unnumbered(self) -> None:
        if self._must_number:
            raise StartMismatch(
                f"session {self.name!r} goes on from timestep {self.next}, and a message came without a start: "
                f"resend from {self.next}, and say so",
                expected=self.next,
                rewind=self.rewind,
            )

    def _raise_failure(self, known: int | None = None) -> None:
        """Raise what rewound the session if nobody was told, or if it happened after the first `known` failures."""
        told = self._failures_told if known is None else min(known, self._failures_told)
        if self._failure is not None and self._num_failures > told:
            self._failures_told = self._num_failures
            raise self._failure

    async def _change(self) -> None:
        """Wait until something about the session has changed."""
        changed = asyncio.get_running_loop().create_future()
        self._waiting.append(changed)
        await changed

    def _wake(self) -> None:
        if self.changed is not None:
            try:
                self.changed()
            except Exception:  # costs this session only, not the others whose outputs came with these
                logger.exception("whoever uses session %r cannot go on, it is aborted", self.name)
                self.abort()
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        for changed in waiting:
            if not changed.done():  # its waiter may have gone
                changed.set_result(None)
