"""Sessions spread over owners: where new ones go, which are moved, and that nothing is lost or run twice by that."""

import asyncio
import random
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app import directory as directory_module
from serve_app import session as session_module
from serve_app.directory import ARRIVE_WITHIN_S, Claim, Directory, Owner
from serve_app.ingress.hub import Hub
from serve_app.policy.placement import LEVEL, choose_owner, moves_of
from tests.fakes import SumModel
from tests.local import LocalCluster, local
from tests.unit.test_directory import owner
from tests.unit.test_failover import CONFIG, collect, numbers


@st.composite
def owners(draw: st.DrawFn) -> tuple[dict[str, int], dict[str, int]]:
    """Loads and capacities."""
    capacity = draw(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 60)))
    return {name: draw(st.integers(0, most)) for name, most in capacity.items()}, capacity


def moved(load: Mapping[str, int], capacity: Mapping[str, int], moves: Mapping[str, int]) -> dict[str, int]:
    """Loads when all have arrived where the directory places them."""
    after = dict(load)
    for giver, count in moves.items():
        for _ in range(count):
            taker = choose_owner({name: left for name, left in after.items() if name != giver}, capacity)
            assert taker is not None, "there is a place for each"
            after[giver] -= 1
            after[taker] += 1
    return after


@given(owners(), st.integers(0, 200), st.data())
def test_moves_end_when_all_have_the_same_share_and_none_goes_back(
    found: tuple[dict[str, int], dict[str, int]], limit: int, data: st.DataObject
) -> None:
    load, capacity = found
    none = dict.fromkeys(load, 0)
    moves = moves_of(load, capacity, none, limit)
    assert moves.total() <= limit
    after = moved(load, capacity, moves)
    assert all(after[name] <= load[name] for name in moves), "who gives gets none"
    assert all(after[name] <= capacity[name] for name in after)
    if moves.total() == limit:
        moves = moves_of(load, capacity, none, 1000)
        after = moved(load, capacity, moves)
    assert not moves_of(after, capacity, none, 1000), "and then it is over"
    if not load:
        return
    mean = sum(load.values()) / sum(capacity.values())
    low, high = (choose(after, key=lambda name: after[name] / capacity[name]) for choose in (min, max))
    spread = after[high] / capacity[high] - mean, mean - after[low] / capacity[low]
    assert max(spread) <= LEVEL * mean + 1e-6 or (after[low] + 1) / capacity[low] > (after[high] - 1) / capacity[high]
    leaving = {name: data.draw(st.integers(0, count)) for name, count in moves.items()}
    rest = moves_of(load, capacity, {**none, **leaving}, 1000)
    assert all(leaving.get(name, 0) + rest[name] <= moves[name] for name in load), (
        "what is on its way is not sent again"
    )


def test_a_few_sessions_stay_where_they_are_unless_it_is_worth_it() -> None:
    def moves(*load: int) -> int:
        names = "abcdef"[: len(load)]
        capacity = dict.fromkeys(names, 16384)
        return moves_of(dict(zip(names, load, strict=True)), capacity, dict.fromkeys(names, 0), 1000).total()

    assert [moves(1, 0), moves(2, 0), moves(2, 1), moves(3, 1), moves(2, 2, 0)] == [0, 1, 0, 1, 1]
    assert [moves(10, 9), moves(11, 9), moves(1000, 900), moves(1000, 800)] == [0, 0, 0, 10]
    assert moves(100, 100, 100, 0) == 68, "until it has nine tenths of what all have on the average"
    assert moves(60, 0) == 27


@pytest.fixture(autouse=True)
def nobody_settles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions move to an owner as soon as it is there."""
    monkeypatch.setattr("serve_app.directory.SETTLED_S", 0.0)


def member(name: str, moves_per_s: int = 20) -> Owner:
    return replace(owner(name), max_sessions=100, moves_per_s=moves_per_s)


def test_owners_are_told_how_many_to_give_back_no_more_a_second_than_may_move() -> None:
    directory = Directory(2)
    directory.register(member("x"))
    grants = [directory.open(f"{i}", "s") for i in range(60)]
    assert directory.give_back("x") == 0, "there is no other"
    directory.register(member("y"))
    directory.register(member("z"))
    told = []
    for tenth in range(1, 30):
        directory.tick(now := tenth / 10)
        for name in "xyz":
            directory.heard(name)
            told.append(count := directory.give_back(name))
            assert name == "x" or not count
            for _ in range(count):
                grant = grants.pop()
                assert directory.open(grant.session, "s", claim=Claim(grant.epoch)).owner.name in ("y", "z")
        assert sum(told) <= 20 * (now + 0.9) + 1e-9, "those of a second may go at once"
    assert directory.num_sessions() == {"x": 22, "y": 19, "z": 19}
    assert directory.num_moved() == {"sum": 38}


def test_none_moves_while_owners_are_still_coming(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.directory.SETTLED_S", 2.0)
    directory = Directory(2)
    directory.register(member("x"))
    for i in range(40):
        directory.open(f"{i}", "s")
    found = []
    for second in range(6):
        directory.tick(second)
        directory.heard("x")
        if second in (1, 2):
            directory.register(member(f"y{second}"))
        for name in ("y1", "y2"):
            directory.heard(name)
        found.append(directory.give_back("x"))
    assert found[:4] == [0, 0, 0, 0] and found[4] > 0, "the last came at 2 s"


def test_what_is_on_its_way_is_not_asked_for_again_until_it_is_late() -> None:
    directory = Directory(2)
    directory.register(member("x", 1000))
    for i in range(40):
        directory.open(f"{i}", "s")
    directory.register(member("y", 1000))
    directory.tick(1.0)
    assert [directory.give_back("x") for _ in range(3)] == [18, 0, 0]
    for half in range(2, 14):
        directory.tick(half / 2)
        directory.heard("x")
        directory.heard("y")
        assert directory.give_back("x") == (18 if half / 2 > 1 + ARRIVE_WITHIN_S else 0)


def test_none_goes_to_an_owner_of_other_weights_that_nobody_can_reach_that_is_full_or_leaves() -> None:
    directory = Directory(2)
    directory.register(member("x"))
    grants = [directory.open(f"{i}", "s") for i in range(4)]
    directory.register(replace(owner("other", "g"), moves_per_s=20))
    directory.tick(1.0)
    assert directory.give_back("x") == 0
    directory.register(replace(member("y"), max_sessions=1))
    directory.suspect("y")
    assert directory.give_back("x") == 0
    directory.heard("y")
    assert directory.give_back("x") == 0, "a quarter of x is as much as it would be of y"
    grant = directory.open("0", "s", claim=Claim(grants[0].epoch))
    assert grant.owner.name == "y", "it is moved by hand, and does not go to the empty one of other weights"
    grant = directory.open("1", "s", claim=Claim(grants[1].epoch))
    assert grant.owner.name == "x", "its own place is still there when all others are full"
    directory.unregister("y")
    assert directory.give_back("x") == 0


def test_none_goes_to_an_owner_that_retires() -> None:
    directory = Directory(2)
    directory.register(member("x"))
    for i in range(40):
        directory.open(f"{i}", "s")
    directory.register(member("y"))
    directory.tick(1.0)
    directory.retire("y")
    assert directory.give_back("x") == 0
    directory.register(member("y"))
    assert directory.give_back("x") > 0


def test_it_can_be_turned_off() -> None:
    for one in (member("x", 0), replace(member("x"), checkpoints=False)):
        directory = Directory(2)
        directory.register(one)
        for i in range(8):
            directory.open(f"{i}", "s")
        directory.register(replace(one, name="y"))
        directory.tick(1.0)
        assert directory.give_back("x") == 0


async def report(cluster: LocalCluster, until: asyncio.Event) -> None:
    """All owners report, and give back what they are told to."""
    while not until.is_set():
        await cluster.report()
        await asyncio.sleep(0.01)


async def level(cluster: LocalCluster) -> list[int]:
    """Sessions of each owner, when they are as even as they become."""
    while True:
        counts = [cluster.directory.num_sessions()[name] for name in cluster.alive]
        if max(counts) <= (1 + LEVEL) * np.mean(counts) + 1 and min(counts) >= (1 - LEVEL) * np.mean(counts) - 1:
            return counts
        await asyncio.sleep(0.01)


async def stream(hub: Hub, seed: int, until: asyncio.Event) -> int:
    """A session of random segments, always some of them on their way; compared with the sums."""
    rng, x = random.Random(seed), numbers(seed, 20_000)
    session = await hub.open(f"{seed}")
    reader = asyncio.create_task(collect(session, acknowledge=not hub._ack_on_receipt))
    while not until.is_set():
        session.submit(x[session.next : session.next + rng.randint(1, 12)])
        await asyncio.sleep(rng.choice([0.005, 0.01, 0.03]))
        if session.next - session.progress > 100:
            await session.wait()
    session.close()
    np.testing.assert_array_equal(await reader, x[: session.next].cumsum(0))
    return session.next


@pytest.mark.parametrize("acknowledge", [False, True], ids=["handle", "ingress"])
async def test_a_new_owner_gets_its_share_while_all_sessions_run_and_nothing_runs_again(
    acknowledge: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory_module, "SETTLED_S", 0.2)
    monkeypatch.setattr(directory_module, "ARRIVE_WITHIN_S", 0.5)
    done = asyncio.Event()
    async with local(SumModel(), config=CONFIG, ack_on_receipt=not acknowledge) as (cluster, hub):
        reporting = asyncio.create_task(report(cluster, done))
        streams = [asyncio.create_task(stream(hub, seed, done)) for seed in range(40)]
        await asyncio.sleep(0.1)
        for _ in range(2):
            cluster.add(SumModel())
            await level(cluster)
            await asyncio.sleep(0.1)
        (moved,) = cluster.directory.num_moved().values()
        done.set()
        submitted = sum(await asyncio.gather(*streams))
        await reporting
        assert 27 <= moved <= 45
        assert sum(engine.stats.timesteps for engine in cluster.engines.values()) == submitted
        while any(engine.gauges()["retained_bytes"] for engine in cluster.engines.values()):
            await asyncio.sleep(0.01)  # what clients have is still on its way
        for engine in cluster.engines.values():
            engine.check()


async def test_those_at_rest_are_given_back_first_and_those_that_close_or_nobody_calls_for_are_not() -> None:
    async with local(SumModel(), SumModel(), config=CONFIG) as (cluster, hub):
        engine = cluster.engines["owner-0"]
        sessions = [session for session in [await hub.open(f"{i}") for i in range(12)] if session.owner == "owner-0"]
        engine.give_back(2)
        mailbox = next(iter(engine._mail.values()))
        rows = [engine._sessions.row_of(session.epoch) for session in sessions]
        assert mailbox.leaving == {sessions[0].epoch, sessions[3].epoch}, "from all over the table"
        mailbox.leaving.clear()
        engine._sessions.close_at[rows[0]] = 99
        engine._sessions.next[rows[1:5]] += 1
        engine.give_back(2)
        assert mailbox.leaving == {sessions[5].epoch, sessions[1].epoch}
        mailbox.leaving.clear()
        calls, mailbox.calls = mailbox.calls, type(mailbox.calls)()
        engine.give_back(9)
        assert not mailbox.leaving
        mailbox.calls = calls
        engine._sessions.close_at[rows[0]], engine._sessions.next[rows[1:5]] = -1, 0


async def test_who_is_told_to_give_back_and_then_nothing_more_gives_back() -> None:
    async with local(SumModel(), SumModel(), config=CONFIG) as (cluster, hub):
        sessions = [await hub.open(f"{i}") for i in range(4)]
        while not any(mailbox.calls for mailbox in cluster.engines["owner-0"]._mail.values()):
            await asyncio.sleep(0.01)
        cluster.give_back("owner-0", 2)
        cluster.give_back("owner-0", 0)
        async with asyncio.timeout(5):
            while [session.owner for session in sessions].count("owner-1") < 4:
                await asyncio.sleep(0.01)


async def test_a_session_that_has_never_paused_for_a_checkpoint_moves_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its inputs were given up long ago, but the state comes with all that has run."""
    monkeypatch.setattr(session_module, "MAX_RETAINED", 20)
    config = replace(CONFIG, session=replace(CONFIG.session, checkpoint_timesteps=10_000))
    async with local(SumModel(), SumModel(), config=config) as (cluster, hub):
        session = await hub.open()
        reader = asyncio.create_task(collect(session, acknowledge=False))
        x = numbers(1, 120)
        for at in range(0, 60, 4):
            session.submit(x[at : at + 4])
            await session.wait()
        assert not session.can_move
        await asyncio.sleep(0.05)  # a call is waiting at its owner
        before = session.owner
        cluster.give_back(before, 1)
        for at in range(60, 120, 4):
            session.submit(x[at : at + 4])
        await session.wait()
        assert session.owner != before
        session.close()
        np.testing.assert_array_equal(await reader, x.cumsum(0))
