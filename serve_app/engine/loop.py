"""The thread that owns an engine: frames in from any thread, answers out in one delivery a step."""

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence

from serve_app.engine.cores import pin_thread
from serve_app.engine.engine import Engine
from serve_app.engine.mailbox import Ticket
from serve_app.engine.runner import inference_mode, limit_threads
from serve_app.errors import LockstepError, Unavailable
from serve_app.frame import Answer, Frame
from serve_app.lease import Freehold, Lease

logger = logging.getLogger(__name__)

PART_WITHIN_S = 0.5
"""A loop that stops waits so long for the next call of each sender, which is to bring its sessions' states back."""

UNLEASED_S = FENCE_POLL_S = 0.05
"""So often it is looked whether there is a lease again; whether the thread has dropped all sessions, or is dead."""

Delivery = Sequence[tuple[Ticket, Answer | LockstepError]]


class EngineLoop:
    """Runs an engine until stopped. Every call is answered: by the engine, or with Unavailable once the loop is dead.

    `deliver` is called on the loop's thread, with all answers that became due together; when the loop has ended, on a
    caller's. `cores`: that this thread, and torch's beside it, are pinned to (0: they run anywhere). While its `lease`
    does not hold nothing is launched, and nothing answered.
    """

    def __init__(
        self, engine: Engine, deliver: Callable[[Delivery], None], cores: int = 0, lease: Lease | None = None
    ) -> None:
        self._engine = engine
        self._deliver = deliver
        self._cores = cores
        self._lease = lease or Freehold()
        self._fenced: threading.Event | None = None  # who waits until all is dropped
        self._give_back = 0  # so many sessions
        self._idle_s, self._idle_since = 0.0, math.inf
        self._arrived = threading.Condition()
        self._inbox: list[tuple[Frame, Ticket]] = []
        self._stopping = False
        self._dead: BaseException | None = None
        self._open_tickets: set[Ticket] = set()
        self._thread = threading.Thread(target=self._run, name="lockstep-engine", daemon=True)
        self._thread.start()

    def call(self, frame: Frame, ticket: Ticket) -> None:
        """Hand a frame to the engine, from any thread; `deliver` gets the ticket (hashable, unique) with its answer.

        Also when the loop has ended: what it said last must be heard before that, since it may give sessions back.
        """
        with self._arrived:
            if self._dead is None:
                self._inbox.append((frame, ticket))
                self._arrived.notify()
                return
        self._deliver([(ticket, self._unavailable())])

    def check_health(self) -> None:
        """Raise Unavailable when the loop has ended."""
        with self._arrived:
            self._raise_if_dead()

    @property
    def idle_s(self) -> float:
        """Seconds in which there was nothing to do, since the start."""
        with self._arrived:
            return self._idle_s + max(0.0, time.monotonic() - self._idle_since)

    def give_back(self, count: int) -> None:
        """See Engine.give_back, from any thread."""
        with self._arrived:
            self._give_back += count
            self._arrived.notify()

    def fence(self) -> None:
        """Drop all sessions, since others have them: whoever still sends to one here is told that it is not."""
        fenced = threading.Event()
        with self._arrived:
            self._fenced = fenced
            self._arrived.notify()
        while not fenced.wait(FENCE_POLL_S) and self._thread.is_alive():
            pass

    def stop(self) -> None:
        """End the loop after the steps that run; senders get all there is, so that their sessions can go on elsewhere.

        Calls still open then are answered with Unavailable.
        """
        with self._arrived:
            self._stopping = True
            self._arrived.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            limit_threads()
            if self._cores:
                pin_thread(self._cores)
            with inference_mode():
                while not self._stopping:
                    self._turn()
                self._part()
        except BaseException as error:
            logger.exception("the engine has died")
            self._die(error)
        else:
            self._die(Unavailable("the replica is stopping: ask the directory for another"))

    def _turn(self) -> None:
        """Take what has arrived, run one step, hand out what can be answered."""
        with self._arrived:
            is_idle = not self._engine.ready or not self._lease.holds
            if is_idle and not (self._inbox or self._stopping or self._fenced or self._give_back):
                wait_s = self._engine.wake_at() - time.monotonic() if self._lease.holds else UNLEASED_S
                self._idle_since = time.monotonic()
                self._arrived.wait(max(0.0, wait_s))
                self._idle_s, self._idle_since = self._idle_s + time.monotonic() - self._idle_since, math.inf
            num_leaving, self._give_back = self._give_back, 0
        replies = self._receive()
        if self._fenced is not None:
            logger.warning("this replica was away for longer than its lease: its sessions have gone on elsewhere")
            self._engine.drop_all(time.monotonic())
            self._fenced.set()
            self._fenced = None
        if self._lease.holds:
            if num_leaving:
                self._engine.give_back(num_leaving)
            self._engine.step(time.monotonic())
            self._engine.expire(time.monotonic())
        if self._lease.holds:
            replies += self._engine.answers(time.monotonic())
        self._reply(replies)

    def _part(self) -> None:
        """Hand all sessions back to their senders, with calls that are here or come soon."""
        deadline = time.monotonic() + PART_WITHIN_S
        if self._lease.holds:
            self._reply(self._engine.farewell(time.monotonic()))
        while self._lease.holds and not self._engine.parted and (left_s := deadline - time.monotonic()) > 0:
            with self._arrived:
                self._arrived.wait_for(lambda: self._inbox, left_s)
            refused = self._receive()
            self._reply([*refused, *self._engine.farewell(time.monotonic())])

    def _receive(self) -> list[tuple[Ticket, Answer | LockstepError]]:
        """Hand the engine what has arrived; returns what it refuses."""
        with self._arrived:
            arrivals, self._inbox = self._inbox, []
        refused: list[tuple[Ticket, Answer | LockstepError]] = []
        for frame, ticket in arrivals:
            self._open_tickets.add(ticket)
            try:
                self._engine.receive(frame, ticket, time.monotonic())
            except LockstepError as error:
                refused.append((ticket, error))
        return refused

    def _reply(self, replies: Delivery) -> None:
        if replies:
            self._open_tickets.difference_update(ticket for ticket, _ in replies)
            self._deliver(replies)

    def _die(self, error: BaseException) -> None:
        with self._arrived:
            self._dead = error
            lost = [*self._open_tickets, *(ticket for _, ticket in self._inbox)]
            self._open_tickets.clear()
            self._inbox.clear()
        self._deliver([(ticket, self._unavailable()) for ticket in lost])

    def _raise_if_dead(self) -> None:
        if self._dead is not None:
            raise self._unavailable()

    def _unavailable(self) -> Unavailable:
        return Unavailable(f"the engine of this replica has ended ({self._dead}): its sessions are lost")
