"""The engine: sessions in, steps over whatever is ready, outputs out. One thread owns it; time comes in as `now`."""

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from serve_app.config import AppConfig, EngineConfig
from serve_app.engine.calibration import Calibration
from serve_app.engine.checkpoints import Checkpointer
from serve_app.engine.columns import MOVERS
from serve_app.engine.cuda_runner import CudaRunner
from serve_app.engine.mailbox import Mailbox, Ticket
from serve_app.engine.packed_layers import pack_weights
from serve_app.engine.runner import EagerRunner, Step, StepRunner
from serve_app.engine.scheduler import Batch, Scheduler
from serve_app.engine.sessions import NEVER, SessionTable, Status, Verdict, check_frame
from serve_app.engine.slots import SlotTable
from serve_app.engine.state_pool import StatePool
from serve_app.engine.stats import Stats, StepRecord
from serve_app.engine.timesteps import EVERYTHING, TimestepStore
from serve_app.errors import ConfigError, InvalidInput, LockstepError, NotOwner, StepFailed
from serve_app.frame import ABORT, ADOPTED, MOVE, NO_CLOSE, UNKNOWN, Answer, Checkpoints, Frame, Notice, Open
from serve_app.models.fingerprint import fingerprint
from serve_app.models.interface import RecurrentModel
from serve_app.policy.batching import powers_of_two
from serve_app.spec import ModelSpec, SessionLimits

logger = logging.getLogger(__name__)

ELSEWHERE = "elsewhere"
"""Where a session goes on that is not here any more: it was given back, or this owner was away for too long."""
LOOK_WITHIN_S = 3600.0
"""So often `expire` looks at least, however long sessions may be idle."""


class Engine:
    """Serves one model to the sessions it owns.

    `receive` takes a frame, `step` runs one batch, `answers` says which calls can be answered, with what. Frames that
    name another owner than `owner` are refused.
    """

    def __init__(self, model: RecurrentModel, config: AppConfig, owner: str = "local", *, spare_rows: int = 0) -> None:
        """spare_rows: for sessions beyond the limit (see `spare_rows_of`)."""
        self.owner = owner
        self._config = config
        device = choose_device(config.engine.device, model)
        known_by = fingerprint(model, config.model.options)
        if isinstance(model, torch.nn.Module):
            model.to(device).eval().requires_grad_(False)
            flatten_weights(model)
            if device.type == "cpu":
                pack_weights(model)
        self._model = model
        max_rows = config.session.max_sessions + spare_rows
        self._sessions = SessionTable(max_rows, config.session.max_window_timesteps)
        max_batch_size = min(config.engine.max_batch_size, config.engine.slots)
        self._scheduler = Scheduler(
            max_batch_size, step_timesteps(config.engine, device), max_rows, config.engine.delay_target_s
        )
        self._takes_any = not config.engine.step_timesteps  # number of timesteps in a step
        self._slots = SlotTable(config.engine.slots, max_rows)
        self._page_of = np.full(max_rows, -1, np.int64)  # of evicted states, by row
        self._pool = StatePool(model, config.engine.slots, device)
        together = 1 if device.type == "cpu" else max(1, max_batch_size // 4)
        apart_s = config.session.checkpoint_apart_s
        self._checkpoints = Checkpointer(self._pool, self._sessions, max_rows, together, apart_s)
        self._runner = make_runner(model, self._pool, config, device)
        self._flights: deque[_Flight] = deque()  # steps on their way
        self._in_flight = 0  # timesteps
        self._completed_at = 0.0  # the last step
        self._inputs = TimestepStore([model.input.nbytes], max_rows, compacts=False)
        self._outputs = TimestepStore([spec.nbytes for spec in model.outputs.values()], max_rows, compacts=True)
        self._acked: tuple[np.ndarray, np.ndarray] | None = None  # rows, and what they hold: to be dropped
        self._mailboxes: dict[str, int] = {}
        self._mail: dict[int, Mailbox] = {}
        self._last_sender = 0
        self._parted: set[int] = set()
        self._left: set[str] = set()  # senders that might be gone, at the last look
        self._exports: set[int] = set()  # epochs of sessions whose states are wanted
        self._expire_at = 0.0
        self.answer_within_s = config.frame.answer_within_s
        self.stats = Stats()
        self.spec = ModelSpec(
            config.model.served_name,
            model.input,
            dict(model.outputs),
            self._pool.state_bytes,
            getattr(model, "sample_rate", None),
            getattr(model, "input_name", "x"),
            known_by,
        )
        output_bytes = max(1, self.spec.output_bytes)
        self._max_retained = config.engine.max_retained_bytes // output_bytes  # timesteps
        session = config.session
        max_window = min(session.max_window_timesteps, self._max_retained)
        #: What senders must keep to. A session that has more outputs than are kept here would wait for ever.
        self.limits = SessionLimits(session.max_segment_timesteps, max_window, session.nan == "refuse")
        #: What a frame may hold, for the same reason.
        self.max_frame_bytes = min(config.frame.max_bytes, config.engine.max_pending_bytes)
        self._checkpoint_every = config.session.checkpoint_timesteps
        self._max_answered = max(1, config.frame.max_bytes // output_bytes)  # timesteps of one answer

    def prepare(self) -> None:
        """Set up what the shortest steps need, of however many sessions, and the smallest and largest of the longest.

        Live sessions bring a timestep at a time, of many numbers of sessions as soon as they start: each would have all
        wait while a graph is captured. Those of more timesteps take much memory, and may never come.
        """
        shortest, longest = (int(self._scheduler.timesteps[i]) for i in (0, -1))
        most = self._scheduler.max_batch_size
        for batch in (most, 1):
            self._runner.prepare(longest, batch)
        for batch in range(most, 0, -1):  # smaller ones may use the memory of larger ones
            self._runner.prepare(shortest, batch)
        if self._checkpoint_every:
            self._pool.prepare(most)

    def step(self, now: float) -> bool:
        """Launch a batch of whatever is ready, complete one that has run; False when there was nothing to do.

        Waits for a step only when as many as may be are on their way, or nothing else is to be done.
        """
        launched = self._launch(now)
        self._drop_acked()  # while that runs
        if not self._flights or (launched and len(self._flights) < self._runner.depth):
            return launched
        self._complete(self._flights.popleft(), now)
        return True

    def receive(self, frame: Frame, ticket: Ticket, now: float) -> None:
        """Take a frame in; `ticket` comes back from `answers`. Raises InvalidInput or NotOwner, having done nothing."""
        if frame.owner != self.owner:
            raise NotOwner(f"the frame is for owner {frame.owner!r}, this is {self.owner!r}: ask the directory")
        check_frame(frame, self.spec.input)
        sender, mailbox = self._mailbox(frame.sender)
        for ask in frame.opens:
            mailbox.notices.append(self._open(ask, sender, now))
        self._drop_acked()
        accepted = self._sessions.accept(frame, now, self._room(frame))
        rows = accepted.running
        if len(rows):
            self._inputs.add([frame.x], rows, np.zeros(len(rows), np.int64), accepted.offset, accepted.take)
            self._scheduler.add(rows, accepted.take, now)
            self.stats.segments += len(rows)
        if accepted.verdict is not None:
            self._receive_odd(frame, accepted.rows, accepted.verdict, mailbox)
        elif len(frame):
            self._acked = accepted.rows, accepted.acked
        self._exports.update(frame.exports)
        mailbox.calls.append((ticket, now + self.answer_within_s))

    def answers(self, now: float) -> list[tuple[Ticket, Answer]]:
        """Calls to answer now: the oldest of each sender that has mail, and those that have waited long enough."""
        answers: list[tuple[Ticket, Answer]] = []

        def checkpoint(sender: int, due: np.ndarray) -> Checkpoints | None:
            self._checkpoints.add(due, now)
            self._read_checkpoints(now)
            return self._checkpoints.take(sender)

        for name, sender in list(self._mailboxes.items()):
            mailbox = self._mail[sender]
            if mailbox.leaving and mailbox.calls:
                answers.append(self._give_back(mailbox, now))
            while mailbox.due(now) or (mailbox.calls and self._checkpoints.is_awaited(sender)):
                ticket, _ = mailbox.calls.popleft()
                answer = mailbox.write_answer(
                    self._sessions, self._outputs, self.spec.outputs, self._max_answered, self._checkpoint_every,
                    checkpoint,
                )  # fmt: skip
                answers.append((ticket, answer))
            if mailbox.idle:
                del self._mailboxes[name], self._mail[sender]
                self._checkpoints.forget(sender)
        self._read_checkpoints(now)
        if self._exports and self._export(now):
            answers += self.answers(now)
        return answers

    def farewell(self, now: float) -> list[tuple[Ticket, Answer]]:
        """Complete what is on its way, and answer the oldest call of each sender with all there is, states too.

        Its sessions are to go on elsewhere; what has not run by now runs there. May be called again, for senders that
        had no call here before.
        """
        while self._flights:
            self._complete(self._flights.popleft(), now)
        answers: list[tuple[Ticket, Answer]] = []
        for sender, mailbox in self._mail.items():
            if mailbox.calls and sender not in self._parted:
                self._parted.add(sender)
                ticket, _ = mailbox.calls.popleft()
                rows = np.flatnonzero((self._sessions.sender == sender) & (self._sessions.status == Status.OPEN))
                answers.append((ticket, self._parting(mailbox, rows)))
        return answers

    def give_back(self, count: int) -> None:
        """Have so many sessions go on elsewhere: their senders get them with the next answers, states too.

        Those first that have nothing to run now, and of these every so manieth, since rows are in the order of opening.
        None that closes, that nobody calls for, or of which its sender may not have the inputs since another had it.
        """
        table = self._sessions
        calling = [sender for sender, mailbox in self._mail.items() if mailbox.calls]
        can = (table.status == Status.OPEN) & (table.close_at == NO_CLOSE) & (table.checkpointed != NEVER)
        can &= np.isin(table.sender, calling)
        rests = table.next == table.progress
        for rows in (np.flatnonzero(can & rests), np.flatnonzero(can & ~rests)):
            num_given = min(count, len(rows))
            for row in rows[np.arange(num_given) * len(rows) // max(1, num_given)].tolist():
                self._mail[int(table.sender[row])].leaving.add(int(table.epoch[row]))
            count -= num_given

    @property
    def parted(self) -> bool:
        """Whether `farewell` has told all who have sessions."""
        return all(sender in self._parted for sender, mailbox in self._mail.items() if mailbox.num_sessions)

    def _give_back(self, mailbox: Mailbox, now: float) -> tuple[Ticket, Answer]:
        """The oldest call of a sender, and its answer, with those of its sessions that are to go on elsewhere."""
        while self._flights:
            self._complete(self._flights.popleft(), now)
        leaving = np.array([self._sessions.row_of(epoch) for epoch in mailbox.leaving], np.int64)
        mailbox.leaving.clear()
        rows = leaving[leaving >= 0]
        rows = rows[(self._sessions.status[rows] == Status.OPEN) & (self._sessions.sender[rows] == mailbox.sender)]
        self._scheduler.drop(rows)
        self._inputs.drop(rows)
        self._sessions.next[rows] = self._sessions.progress[rows]
        ticket, _ = mailbox.calls.popleft()
        answer = self._parting(mailbox, rows)
        for row in rows.tolist():
            self._end(row, ELSEWHERE)
        return ticket, answer

    def _parting(self, mailbox: Mailbox, rows: np.ndarray) -> Answer:
        """All there is for a sender, and the states of `rows`, which it is to go on with elsewhere."""
        moving = [Notice(epoch, "moving") for epoch in self._sessions.epoch[rows].tolist()]
        answer = mailbox.write_answer(self._sessions, self._outputs, self.spec.outputs, EVERYTHING, 0, _never)
        return replace(answer, notices=(*answer.notices, *moving), checkpoints=self._states_of(rows))

    def _states_of(self, rows: np.ndarray) -> Checkpoints | None:
        """The states of all of `rows` that have run or came with one; no step is on its way."""
        slots, pages = self._slots.slot_of[rows], self._page_of[rows]
        in_slots, in_pages = rows[slots >= 0], rows[pages >= 0]
        parts = [self._pool.read(slots[slots >= 0]).arrays()] if len(in_slots) else []
        parts += [self._pool.read_pages(pages[pages >= 0]).arrays()] if len(in_pages) else []
        if not parts:
            return None
        known = np.concatenate([in_slots, in_pages])
        state = tuple(np.concatenate(leaves) for leaves in zip(*parts, strict=True))
        return Checkpoints(self._sessions.epoch[known], self._sessions.progress[known], state)

    def drop_all(self, now: float) -> None:
        """Forget all sessions, since others may have them; who still sends to one is told that it is elsewhere."""
        while self._flights:
            self._complete(self._flights.popleft(), now)
        for row in np.flatnonzero(self._sessions.status != Status.FREE).tolist():
            self._notify(row, Notice(int(self._sessions.epoch[row]), "moving"))
            self._end(row, ELSEWHERE)
        for mailbox in self._mail.values():
            mailbox.marked.clear()
            self._checkpoints.forget(mailbox.sender)

    def expire(self, now: float) -> None:
        """End sessions that have been idle for too long, forget who is gone. Looks every tenth of that time."""
        if now >= self._expire_at:
            timeout_s = self._config.session.idle_timeout_s
            self._expire_at = now + min(timeout_s / 10, LOOK_WITHIN_S)
            for row in self._sessions.idle_since(now - timeout_s).tolist():
                self._end(row, "idle")
            left = {name for name, sender in self._mailboxes.items() if self._mail[sender].is_left}
            for name in left & self._left:
                sender = self._mailboxes.pop(name)
                del self._mail[sender]
                self._checkpoints.forget(sender)
            self._left = left

    @property
    def ready(self) -> bool:
        """Whether `step` has something to do."""
        return self._scheduler.total > 0 or bool(self._flights) or self._acked is not None

    def wake_at(self) -> float:
        """When `answers` or `expire` has something to do even if nothing arrives."""
        return min(
            [
                self._expire_at,
                self._checkpoints.read_at,
                *(mail.calls[0][1] for mail in self._mail.values() if mail.calls),
            ]
        )

    def gauges(self) -> dict[str, float]:
        """How full everything with a bound is, by name. Changes nothing: other threads ask."""
        return {
            "sessions_open": self._sessions.num_open,
            "sessions_running": int((self._scheduler.left > 0).sum()),
            "sessions_evicted": self._pool.num_pages_used,
            "slots_used": self._slots.num_used,
            "slot_use": self._slots.num_used / self._config.engine.slots,
            "pending_bytes": self._inputs.nbytes,
            "retained_bytes": self._outputs.timesteps * self.spec.output_bytes,
        }

    @property
    def num_sessions(self) -> int:
        """Sessions that are open."""
        return self._sessions.num_open

    @property
    def step_sizes(self) -> tuple[np.ndarray, int]:
        """How many timesteps a step may take of a session, rising; and how many sessions at most."""
        return self._scheduler.timesteps, min(self._scheduler.max_batch_size, self._config.session.max_sessions)

    def longest_wait_s(self, now: float) -> float:
        """For how long who waits longest for its step has waited. Changes nothing: other threads ask."""
        return self._scheduler.longest_wait_s(now)

    def check(self) -> None:
        """Assert what must always hold between calls."""
        self._sessions.check()
        self._scheduler.check()
        self._slots.check()
        self._inputs.check()
        self._outputs.check()
        left = self._sessions.next - self._sessions.progress
        for flight in self._flights:
            running = self._sessions.running(flight.batch.rows, flight.epochs)
            left[flight.batch.rows[running]] -= flight.batch.counts[running]
        assert (left == self._scheduler.left).all(), "accepted and ready timesteps differ"
        assert self._pool.num_pages_used == (self._page_of >= 0).sum(), "a page is lost"
        assert not ((self._page_of >= 0) & (self._slots.slot_of >= 0)).any(), "a state is in two places"

    def _open(self, ask: Open, sender: int, now: float) -> Notice:
        try:
            if not 0 <= ask.epoch < 2**63:
                raise InvalidInput(f"a session with the epoch {ask.epoch} was opened: it must have 63 bits, no sign")
            if ask.initial_state is not None:
                self._pool.check_initial(ask.initial_state)
            if ask.adopts >= 0:
                return self._adopt(ask, sender, now)
            if not self._sessions.holds(ask.epoch):
                row = self._sessions.open(ask.epoch, ask.session, sender, now, ask.start, ask.rewind, ask.acked)
                self._mail[sender].num_sessions += 1
                if ask.initial_state is not None:
                    with self._pool.moving(after_steps=False):
                        self._page_of[row] = self._pool.admit(ask.initial_state)
        except LockstepError as error:
            return Notice(ask.epoch, "refused", error.to_wire())
        self.stats.taken.append((ask.epoch, ask.session))
        return Notice(ask.epoch, "opened")

    def _adopt(self, ask: Open, sender: int, now: float) -> Notice:
        """Let another sender go on with a session."""
        row = self._sessions.row_of(ask.adopts)
        if row < 0 or self._sessions.status[row] != Status.OPEN:
            raise NotOwner(f"session {ask.session!r} is not here any more, or has ended")
        acked = int(self._sessions.acked[row]) if ask.acked == UNKNOWN else ask.acked
        if acked < (first := max(int(self._sessions.acked[row]), int(self._sessions.began[row]))):
            raise NotOwner(f"outputs of session {ask.session!r} are here from timestep {first} on, not {acked}")
        while self._flights:  # they know it by its old epoch
            self._complete(self._flights.popleft(), now)
        if self._sessions.status[row] != Status.OPEN:
            raise NotOwner(f"session {ask.session!r} has ended")
        before = self._mail[int(self._sessions.sender[row])]
        before.num_sessions -= 1
        if ask.adopts != ask.epoch:  # else it is asked for again, by the same sender
            before.notices.append(Notice(ask.adopts, "ended", reason=ADOPTED, progress=acked))
        self._mail[sender].num_sessions += 1
        self._sessions.adopt(row, ask.epoch, sender, acked, now)
        rows = np.array([row])
        self._outputs.drop_below(rows, self._sessions.acked[rows])
        self._mail[sender].mark(rows)
        self.stats.taken.append((ask.epoch, ask.session))
        accepted, rewind = int(self._sessions.next[row]), int(self._sessions.rewind[row])
        return Notice(ask.epoch, "opened", progress=accepted, rewind=rewind, acked=acked)

    def _read_checkpoints(self, now: float) -> None:
        if self._checkpoints.read_at <= now:
            self.stats.checkpoints += self._checkpoints.read(self._slots.slot_of, self._rows_on_their_way(), now)

    def _export(self, now: float) -> bool:
        """Read the states that are wanted, of sessions that are at rest; whether there were any."""
        rows = np.array([self._sessions.row_of(epoch) for epoch in self._exports])
        rows = rows[rows >= 0]
        rows = rows[self._sessions.status[rows] == Status.OPEN]
        busy = self._rows_on_their_way()
        read = self._checkpoints.read_wanted(rows, self._slots.slot_of, self._page_of, busy, now)
        self.stats.checkpoints += len(read)
        fresh = rows[(self._slots.slot_of[rows] < 0) & (self._page_of[rows] < 0)]
        for row in fresh.tolist():
            self._notify(row, Notice(int(self._sessions.epoch[row]), "fresh"))
        done = np.concatenate([read, fresh])
        self._exports = set(self._sessions.epoch[np.setdiff1d(rows, done)].tolist())
        return len(done) > 0

    def _rows_on_their_way(self) -> list[np.ndarray]:
        return [flight.batch.rows for flight in self._flights]

    def _receive_odd(self, frame: Frame, rows: np.ndarray, verdict: np.ndarray, mailbox: Mailbox) -> None:
        """What a frame with resends, refusals or closes asks for beside running its timesteps."""
        known = rows[rows >= 0]
        self._outputs.drop_below(known, self._sessions.acked[known])
        mailbox.mark(known[self._sessions.sent[known] < self._sessions.progress[known]])
        for i in verdict.nonzero()[0].tolist():
            mailbox.notices.append(self._refuse(int(verdict[i]), frame, i, int(rows[i])))
        self._end_some(frame, rows, known)

    def _drop_acked(self) -> None:
        if self._acked is not None:
            self._outputs.drop_below(*self._acked)
            self._acked = None

    def _room(self, frame: Frame) -> int:
        """Timesteps that may still be accepted: within the bounds on inputs held and on outputs kept."""
        if self._inputs.nbytes + frame.x.nbytes > self._config.engine.max_pending_bytes:
            return 0
        return self._max_retained - self._outputs.timesteps - self._scheduler.total - self._in_flight

    def _bring_in(self, rows: np.ndarray, now: float) -> None:
        """Give every row a slot with its state in it."""
        placement = self._slots.place(rows, self._scheduler.left, now)
        if not len(placement.enter_rows):
            return
        if num_evicted := len(placement.evict_rows):
            slots = placement.enter_slots[-num_evicted:]
            self.stats.checkpoints += self._checkpoints.read_leaving(
                placement.evict_rows, slots, self._rows_on_their_way(), now
            )
        in_flight = bool(self._flights) and placement.used_at >= self._flights[0].launched_at
        with self._pool.moving(after_steps=in_flight):
            pages = self._page_of[placement.enter_rows]
            kept = pages >= 0
            if num_evicted or kept.any():
                taken = self._pool.exchange(placement.enter_slots, num_evicted, pages)
                self._page_of[placement.enter_rows] = -1
                self._page_of[placement.evict_rows] = taken
                self.stats.evictions += num_evicted
                self.stats.restores += int(kept.sum())
            if not kept.all():
                self._pool.reset(placement.enter_slots[~kept])

    def _launch(self, now: float) -> bool:
        batch = self._scheduler.schedule(now, len(self._flights), ragged=self._runner.ragged and self._takes_any)
        if batch is None:
            return False
        rows = batch.rows
        self._bring_in(rows, now)
        x = self._take_inputs(batch)
        began = time.monotonic()
        try:
            counts = None if batch.k else batch.counts
            step = self._runner.launch(x, batch.k, self._slots.slot_of[rows], counts)
        except torch.AcceleratorError:
            raise  # the device is in an unknown state: this process can serve nobody any more
        except Exception as error:
            while self._flights:  # of the same sessions, maybe
                self._complete(self._flights.popleft(), now)
            self._fail(batch, error)
        else:
            self._flights.append(_Flight(batch, self._sessions.epoch[rows], step, began, now))
            self._in_flight += batch.timesteps
        return True

    def _take_inputs(self, batch: Batch) -> np.ndarray:
        """The timesteps of a step, as bytes in the order that the runner takes; they have run now."""
        runner, rows, counts, k = self._runner, batch.rows, batch.counts, batch.k
        across = len(rows) if runner.time_major and k else 1
        plan = self._inputs.plan(rows, np.zeros(len(rows), np.int64), counts, across)
        if (runner.takes_views or not k) and plan.at >= 0:
            x = self._inputs.view(plan, 0)
        else:
            x = runner.buffer(k, len(rows)) if k else np.empty(batch.timesteps * self.spec.input.nbytes, np.uint8)
            self._inputs.copy(plan, 0, x, across)
        self._inputs.drop_first(rows, counts)
        return x

    def _complete(self, flight: "_Flight", now: float) -> None:
        batch, values = flight.batch, flight.step.outputs()
        rows, counts, waited_us, k = batch
        self._in_flight -= batch.timesteps
        self.stats.graph_steps += flight.step.captured
        done = time.monotonic()
        took_s = done - flight.began
        alone_s = done - max(flight.began, self._completed_at)
        if k:
            self._scheduler.took(k, len(rows), alone_s)
        self._completed_at = done
        timesteps = k or batch.timesteps / len(rows)
        self.stats.add_step(StepRecord(len(rows), timesteps, float(waited_us[0]) / 1e6, took_s, alone_s))
        members, rows, starts, closing, sender = self._sessions.advance(
            rows, flight.epochs, counts, waited_us, int(took_s * 1e6), now
        )
        if len(rows):
            offsets = members * k if k else (counts.cumsum() - counts)[members]
            self._outputs.add(values, rows, starts, offsets, counts[members])
            self._mark(rows, sender)
            for row in closing.tolist():
                self._end(row, "closed")

    def _fail(self, batch: Batch, error: Exception) -> None:
        """A step raised: its sessions are where they were before it, everything accepted from there on is given up."""
        logger.error("a step of %d sessions, %d timesteps, failed", len(batch.rows), batch.timesteps, exc_info=error)
        self.stats.failed_steps += 1
        self._scheduler.drop(batch.rows)
        self._inputs.drop(batch.rows)
        self._sessions.fail(batch.rows)
        for row in batch.rows.tolist():
            due = int(self._sessions.next[row])
            failed = StepFailed(
                f"the model failed at timestep {due} ({type(error).__name__}: {error}): resend from {due}",
                expected=due,
                rewind=int(self._sessions.rewind[row]),
            )
            self._notify(row, Notice(int(self._sessions.epoch[row]), "failed", failed.to_wire()))

    def _end_some(self, frame: Frame, rows: np.ndarray, known: np.ndarray) -> None:
        """End what this frame aborts or lets close; free what it has acknowledged to the end."""
        for row in rows[(frame.close == ABORT) & (rows >= 0)].tolist():
            self._end(row, "aborted")
        for row in rows[(frame.close == MOVE) & (rows >= 0)].tolist():
            self._mail[int(self._sessions.sender[row])].leaving.add(int(self._sessions.epoch[row]))
        for row in self._sessions.due_to_close(known).tolist():
            self._end(row, "closed")
        for row in known[self._sessions.status[known] == Status.ENDED].tolist():
            if self._sessions.has_all_acked(row):
                self._free(row, "closed")

    def _end(self, row: int, reason: str) -> None:
        """End a session. Closed in order, its outputs are kept until acknowledged; else they are given up.

        One that goes on elsewhere is just forgotten here: neither its sender nor the directory is told.
        """
        rows = np.array([row])
        progress = int(self._sessions.progress[row])
        if reason != ELSEWHERE:
            self._notify(row, Notice(int(self._sessions.epoch[row]), "ended", reason=reason, progress=progress))
        if self._sessions.status[row] == Status.OPEN:
            self._scheduler.drop(rows)
            self._inputs.drop(rows)
            self._slots.release(rows)
            if self._page_of[row] >= 0:
                self._pool.free_pages(self._page_of[rows])
                self._page_of[row] = -1
            self._sessions.end(row, reason)
            self.stats.ends[reason] += 1
            self._tell_model(self._sessions.names[row], reason)
        if reason != "closed" or self._sessions.has_all_acked(row):
            self._free(row, reason)

    def _free(self, row: int, reason: str) -> None:
        mailbox = self._mail[int(self._sessions.sender[row])]
        mailbox.num_sessions -= 1
        self._outputs.drop(np.array([row]))
        if reason != ELSEWHERE:  # not told before: somebody may come for its outputs
            self.stats.ended_epochs.append(int(self._sessions.epoch[row]))
        self._sessions.sender[row] = 0
        self._sessions.free(row)

    def _tell_model(self, session: str, reason: str) -> None:
        tell = getattr(self._model, "session_ended", None)
        if tell is None:
            return
        try:
            tell(session, reason)
        except Exception:
            logger.exception("%s.session_ended(%r, %r) failed", type(self._model).__name__, session, reason)

    def _refuse(self, verdict: int, frame: Frame, i: int, row: int) -> Notice:
        epoch = int(frame.epoch[i])
        stone = self._sessions.tombstones.get(epoch) if verdict in (Verdict.UNKNOWN, Verdict.ENDED) else None
        if stone is not None and stone.reason == ELSEWHERE:
            return Notice(epoch, "moving")
        if stone is not None:
            return Notice(epoch, "ended", reason=stone.reason, progress=stone.progress)
        error = self._sessions.refusal(verdict, frame, i, row)
        self.stats.refusals[error.code] += 1
        return Notice(epoch, "refused", error.to_wire())

    def _mailbox(self, name: str) -> tuple[int, Mailbox]:
        if name not in self._mailboxes:
            self._last_sender += 1
            self._mailboxes[name] = self._last_sender
            self._mail[self._last_sender] = Mailbox(self._last_sender)
        sender = self._mailboxes[name]
        return sender, self._mail[sender]

    def _mark(self, rows: np.ndarray, sender: int) -> None:
        """These rows have outputs to send, to that sender, or -1: to several."""
        if sender >= 0:
            self._mail[sender].mark(rows)
        else:
            senders = self._sessions.sender[rows]
            for each in np.unique(senders).tolist():
                self._mail[each].mark(rows[senders == each])

    def _notify(self, row: int, notice: Notice) -> None:
        self._mail[int(self._sessions.sender[row])].notices.append(notice)


def _never(sender: int, rows: np.ndarray) -> None:
    """No checkpoint."""


class _Flight(NamedTuple):
    """A step that was launched, and the epochs [B] of its sessions then."""

    batch: Batch
    epochs: np.ndarray
    step: Step
    began: float
    launched_at: float


def spare_rows_of(max_sessions: int) -> int:
    """Rows for sessions whose place the directory has given to others, before the end of them has arrived here.

    The sender of such a session has seen all of it; that it has rides on a frame of the next second.
    """
    return max(64, max_sessions // 8)


def make_runner(model: RecurrentModel, pool: StatePool, config: AppConfig, device: torch.device) -> StepRunner:
    """What runs steps on that device."""
    if device.type == "cpu":
        return EagerRunner(model, pool)
    spare = MOVERS if config.session.max_sessions > config.engine.slots else 0
    return CudaRunner(model, pool, device, Calibration(model, device, config.engine.calibration_file, spare))


def step_timesteps(config: EngineConfig, device: torch.device) -> Sequence[int]:
    """How many timesteps a step may take of a session: any number on a CPU; few on a GPU, where each has its graphs."""
    if config.step_timesteps:
        return config.step_timesteps
    limit = config.max_step_timesteps
    return range(1, limit + 1) if device.type == "cpu" else powers_of_two(limit)


def flatten_weights(model: torch.nn.Module) -> None:
    """Put the weights of each of torch's RNNs in one piece, or cuDNN copies them at every call."""
    torch.backends.cudnn.CUDNN_TENSOR_DTYPES.add(torch.bfloat16)  # cuDNN takes it, flatten_parameters asks here
    for module in model.modules():
        if isinstance(module, torch.nn.RNNBase):
            module.flatten_parameters()


def choose_device(name: str, model: object = None) -> torch.device:
    """The device of that name; `auto` is the first GPU, else the CPU. Raises ConfigError for any other GPU.

    A model that says cpu_only runs on the CPU; ConfigError where another device is named.
    """
    if getattr(model, "cpu_only", False):
        if name not in ("auto", "cpu"):
            raise ConfigError(f"engine.device={name}: this model runs on the CPU only, say engine.device=cpu")
        return torch.device("cpu")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.index:
        raise ConfigError(
            f"engine.device={name}: a replica uses the first GPU that it sees; say cuda, and choose by num_gpus (Ray "
            "then does) or by CUDA_VISIBLE_DEVICES"
        )
    return device
