"""Whoever dies, sleeps, starts again or is overtaken: every list of events ends with each output there once, in order.

A search that finds nothing says little unless it finds what is missing, so it has to find each rule that is taken away.
An owner that was stopped for longer than its lease and wakes does nothing (`no_lease` takes that away). Nor would it do
harm: a grant has an epoch of its own, an owner takes nothing under another (`owner_goes_by_session`), and nobody hears
what an owner says after it was given up (`no_deafness`).
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from clients import websocket as client
from serve_app import directory, lease
from serve_app.directory import Directory, Grant
from serve_app.engine.sessions import SessionTable
from serve_app.errors import LockstepError
from serve_app.frame import Answer, Frame
from serve_app.ingress import websocket
from serve_app.ingress.outbox import Outbox
from serve_app.session import Session
from tests.search import replay, search, usual_until, walk
from tests.world import TIME_PASSES, World

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(autouse=True)
def world_of_its_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every world puts its own way in here."""
    monkeypatch.setattr(client, "connect", None)
    monkeypatch.setattr(client.WebSocketCarrier, "_watch", None)
    monkeypatch.setattr(lease, "now", None)
    monkeypatch.setattr(directory, "SETTLED_S", None)
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_nothing_is_lost_wherever_something_unusual_happens() -> None:
    """Two sessions: each fault, and each other order of two messages, at each point of the way."""
    found = search(World, max_deviations=1)
    assert found.trace is None, str(found)
    assert found.states > 10_000


def test_nothing_is_lost_on_long_walks() -> None:
    """By far not all there are: `python -m tests.search SEED` walks on until it finds something."""
    found = walk(World, seed=0, num_walks=500)
    assert found.trace is None, str(found)


def may_always_go_on(patch: pytest.MonkeyPatch) -> None:
    """The directory does not compare epochs; among few kinds of faults, or it would be too rare to be found."""
    faults = World.faults
    patch.setattr(Directory, "_may_go_on", lambda *_: True)
    patch.setattr(Directory, "_moves", lambda *_: Counter())
    patch.setattr(World, "faults", lambda world: [e for e in faults(world) if e.startswith(("kill ", "break "))])


def owner_goes_by_session(patch: pytest.MonkeyPatch) -> None:
    """An owner takes whatever is for a session that it has, under whichever epoch."""
    adopt, row_of, accept = SessionTable.adopt, SessionTable.row_of, SessionTable.accept
    later: dict[tuple[int, int], int] = {}

    def adopting(table: SessionTable, row: int, epoch: int, *args: object) -> None:
        later[id(table), int(table.epoch[row])] = epoch
        adopt(table, row, epoch, *args)

    def accepting(table: SessionTable, frame: Frame, *args: object) -> object:
        columns = frame.columns.copy()
        for i, epoch in enumerate(columns[1].tolist()):
            while (id(table), epoch) in later and row_of(table, epoch) < 0:
                epoch = later[id(table), epoch]
            columns[1, i] = epoch
        return accept(table, replace(frame, columns=columns), *args)

    patch.setattr(SessionTable, "adopt", adopting)
    patch.setattr(SessionTable, "accept", accepting)


def no_attachment(patch: pytest.MonkeyPatch) -> None:
    """Another sender may send to a session under the epoch that there is."""
    attach = Directory.attach

    def attaching(directory: Directory, session: str, sender: str) -> tuple[Grant, int]:
        record = directory._sessions.get(session)
        return attach(directory, session, sender if record is None else record.sender)

    patch.setattr(Directory, "attach", attaching)


def no_floor_at_acked(patch: pytest.MonkeyPatch) -> None:
    """A state is kept before the client has the outputs below."""

    def keep(session: Session) -> None:
        if session._keep is not None and session._keep_next is not None:
            (at, state), session._keep_next = session._keep_next, None
            session._keep(session, at, state)

    patch.setattr(Session, "_keep_if_due", keep)


def no_floor_at_progress(patch: pytest.MonkeyPatch) -> None:
    """A session goes on from its last state, though outputs below it may not have come."""

    def settle(session: Session) -> None:
        while len(session._checkpoints) > 1:
            session._checkpoints.popleft()
        session._drop_inputs()

    patch.setattr(Session, "_settle_checkpoints", settle)
    patch.setattr(Session, "can_move", property(lambda session: session._checkpoints and session.end_reason is None))


def no_rewind(patch: pytest.MonkeyPatch) -> None:
    """What was sent before its sender knew of a failed step is taken."""
    accept = SessionTable.accept
    patch.setattr(websocket, "_check_rewind", lambda *_: None)

    def accepting(table: SessionTable, frame: Frame, *args: object) -> object:
        columns = frame.columns.copy()
        for i, epoch in enumerate(columns[1].tolist()):
            if (row := table.row_of(epoch)) >= 0:
                columns[3, i] = table.rewind[row]
        return accept(table, replace(frame, columns=columns), *args)

    patch.setattr(SessionTable, "accept", accepting)


def no_deafness(patch: pytest.MonkeyPatch) -> None:
    """What an owner says that was given up, and wakes, is taken though its sessions have gone on elsewhere."""
    fail, take = Outbox._fail, Outbox._take_answer
    before: dict[Outbox, dict[int, Session]] = {}

    def failing(outbox: Outbox, error: LockstepError) -> None:
        before.setdefault(outbox, {}).update(outbox._sessions)
        fail(outbox, error)

    def taking(outbox: Outbox, answer: Answer) -> None:
        if outbox.failed:
            outbox._sessions = {**before[outbox]}
        take(outbox, answer)
        if outbox.failed:
            outbox._sessions = {}

    patch.setattr(Outbox, "_fail", failing)
    patch.setattr(Outbox, "_take_answer", taking)


def no_lease(patch: pytest.MonkeyPatch) -> None:
    """An owner that was stopped and wakes goes on as if nothing was."""
    patch.setattr(lease.Lease, "holds", True)


# Each with a seed from which on it is found soon; when the protocol changes, maybe later.
MUTANTS = {
    may_always_go_on: 650, owner_goes_by_session: 2640, no_deafness: 605, no_floor_at_acked: 176,
    no_floor_at_progress: 865, no_attachment: 20145, no_rewind: 20016, no_lease: 3,
}  # fmt: skip


@pytest.mark.parametrize("take_away", MUTANTS, ids=lambda take_away: take_away.__name__)
def test_the_search_finds_each_rule_that_is_missing(
    take_away: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    take_away(monkeypatch)
    found = walk(World, seed=MUTANTS[take_away], within_s=120)
    assert found.trace is not None, str(found)


# What it has found.


def test_an_owner_that_was_given_up_though_it_lives_takes_its_session_again() -> None:
    """It has calls of before that nobody hears the answers of: what it says to the next must not go with those."""
    world = World(num_clients=1, num_segments=2)
    usual_until(world, "open 1 ingress-0 > directory")
    world.do("drain owner-0")
    usual_until(world, "frame 2 ingress-0 > owner-1")
    world.do("give up frame 2 ingress-0 > owner-1")
    replay(world, [])


def hold_back(world: World, kind: str, until: float) -> None:
    """Let everything else happen, until that time."""
    while world.loop.now < until:
        world.do(next((event for event in world.events() if not event.startswith(kind)), TIME_PASSES))


def test_a_client_that_has_been_elsewhere_meanwhile_is_not_taken_for_another() -> None:
    """It comes back to the ingress where it was first, which has not heard of that, nor has the new directory."""
    world = World(num_clients=1, num_segments=2)

    def until(event: str) -> None:
        while world.trace[-1:] != [event]:
            world.do(next(e for e in world.events() if not e.startswith("answer to frame 2 ingress-0")))

    until("submit client-0")
    world.do("break client-0")
    until("message 1 ingress-1 > client-0")
    world.do("restart directory")
    world.do("break client-0")
    until("accepted 2 ingress-0 > client-0")
    replay(world, [])


def test_the_last_outputs_are_there_though_the_connection_breaks_when_all_is_said() -> None:
    """What was on its way is lost, and the owner tells the directory what has ended before the client is back."""
    world = World(num_clients=1, num_segments=2)
    while world.ingresses["ingress-0"].hub._sessions.get("client-0.1") is None or not world.clients["client-0"].closes:
        world.do(world.events()[0])
    session = world.ingresses["ingress-0"].hub.get("client-0.1")
    while session.end_reason is None:
        world.do(next(event for event in world.events() if not event.startswith("message 3 ingress-0")))
    world.do("break client-0")
    hold_back(world, "connect", 25.0)
    replay(world, [])


def test_who_has_everything_is_not_told_that_it_is_lost() -> None:
    """The session was given up meanwhile, since its client came too late to hear that it had closed in order."""
    world = World(num_clients=1, num_segments=2)
    while world.clients["client-0"].progress < 4:
        world.do(world.events()[0])
    world.do("break client-0")
    hold_back(world, "connect", 60.0)
    replay(world, [])


def test_the_last_outputs_are_there_though_owner_and_ingress_die_when_it_closes() -> None:
    """The next owner has nothing to run; the outputs are at the ingress only, and its client has none of them yet."""
    world = World(num_clients=1, num_segments=2)
    usual_until(world, "close client-0")
    session = world.ingresses["ingress-0"].hub.get("client-0.1")

    def go_on(*without: str) -> None:
        names = ("ingress-0 > client-0", *without)
        world.do(next((event for event in world.events() if not event.endswith(names)), TIME_PASSES))

    while session.progress < 4:
        go_on("message 4 client-0 > ingress-0")  # which is to close it
    first = session.owner
    world.do(f"kill {first}")
    while session.end_reason is None:
        go_on()
    assert session.owner != first
    while world.trace[-1] != TIME_PASSES:  # whatever there is to tell the directory
        go_on()
    world.do("kill ingress-0")
    replay(world, [])
