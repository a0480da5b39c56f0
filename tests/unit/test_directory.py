"""The directory as lists of events: who has which session, who may go on with it, and what is kept of it."""

import dataclasses
import random
from collections import Counter
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app import directory as module
from serve_app.checkpoint_store import key_of
from serve_app.directory import GONE_KEPT, TAKEN_WITHIN_S, UNUSED_WITHIN_S, USUAL, Claim, Directory, Held, Owner, Turn
from serve_app.errors import (
    InvalidInput,
    LockstepError,
    NotOwner,
    SessionExists,
    StateLost,
    TooManySessions,
    Unavailable,
    UnknownModel,
    UnknownSession,
)
from serve_app.lease import LEASE_S, MARGIN_S
from serve_app.policy.autoscaling import IDLE
from serve_app.policy.session_queue import QueueLimits
from serve_app.spec import ModelSpec, SessionLimits, TensorSpec


def owner(name: str, fingerprint: str = "f", model: str = "sum", models: tuple[str, ...] = ()) -> Owner:
    spec = ModelSpec(model, TensorSpec((1,)), {}, fingerprint=fingerprint)
    return Owner(name, name, spec, SessionLimits(), max_sessions=10, max_bytes=100, checkpoints=True, models=models)


@pytest.fixture
def directory() -> Directory:
    return new(2)


def new(incarnation: int, *kept: str) -> Directory:
    """One with a store in which checkpoints of these sessions are."""
    directory = Directory(incarnation)
    directory.found(map(key_of, kept), keep_s=100, now=0)
    directory.register(owner("x"))
    return directory


def keep(directory: Directory, session: str, epoch: int, now: float = 0, at: str = "x") -> LockstepError | None:
    """A sender has a checkpoint kept."""
    held = {session: Held(epoch, at)}
    refused = directory.keep("s", held)
    if not refused:
        assert directory.has_kept(held, now) == []
    return refused.get(session)


def test_a_session_outlives_its_owner_only_if_a_checkpoint_is_kept(directory: Directory) -> None:
    for session in ("a", "b"):
        directory.open(session, "s", resumable=True)
    directory.open("c", "s")
    assert keep(directory, "a", directory.lookup("a").epoch) is None
    assert directory.unregister("x") == 3
    assert directory.lookup("a").owner is None
    assert directory.lookup("b").owner is None
    with pytest.raises(UnknownSession):
        directory.lookup("c")
    with pytest.raises(Unavailable):
        directory.restorable("a")  # nobody could take it
    directory.register(owner("y"))
    assert directory.restorable("a") == directory.lookup("a").epoch
    with pytest.raises(UnknownSession, match="no checkpoint of it is kept"):
        directory.restorable("b")
    with pytest.raises(SessionExists, match="waits to be resumed"):
        directory.open("a", "s")
    assert directory.open("c", "s").owner.name == "y"


def test_of_two_who_go_on_with_a_session_the_later_has_it(directory: Directory) -> None:
    first = directory.open("a", "s", resumable=True).epoch
    keep(directory, "a", first)
    directory.unregister("x")
    directory.register(owner("y"))
    claim = Claim(directory.restorable("a"))
    second = directory.open("a", "t", resumable=True, claim=claim).epoch
    assert second > first
    with pytest.raises(NotOwner, match=f"gone on elsewhere under epoch {second}"):
        directory.open("a", "u", resumable=True, claim=claim)  # which has asked at the same time
    with pytest.raises(NotOwner, match=f"under epoch {second}"):
        directory.open("a", "s", resumable=True, claim=Claim(first))  # the one before, which looks for an owner
    assert isinstance(keep(directory, "a", first), NotOwner)
    with pytest.raises(NotOwner, match="is held by 'y'"):
        directory.restorable("a")
    third, before = directory.attach("a", "u")
    assert before == second and third.epoch > second
    assert isinstance(keep(directory, "a", second), NotOwner)
    assert keep(directory, "a", third.epoch) is None


def test_a_grant_that_came_to_nothing_can_be_given_back(directory: Directory) -> None:
    first = directory.open("a", "s", resumable=True)
    keep(directory, "a", first.epoch)
    grant, _ = directory.attach("a", "t")
    directory.release("a", first.epoch)  # too late
    assert directory.lookup("a").owner == "x"
    directory.release("a", grant.epoch)
    assert directory.num_sessions() == {"x": 0}
    again = directory.open("a", "t", resumable=True, claim=Claim(directory.restorable("a")))
    assert again.epoch > grant.epoch
    directory.release("a", again.epoch)
    directory.ended("x", [again.epoch])
    with pytest.raises(UnknownSession):
        directory.lookup("a")


def test_a_grant_without_a_checkpoint_leaves_the_name_free_when_it_is_given_back(directory: Directory) -> None:
    directory.open("a", "s", resumable=True)
    grant, _ = directory.attach("a", "t")
    directory.release("a", grant.epoch)
    directory.open("a", "u")


def test_who_moves_a_session_gets_another_grant_for_its_last(directory: Directory) -> None:
    """Whether the directory knows that the owner is gone or not, and whether the session can be resumed or not."""
    for resumable in (False, True):
        epoch = directory.open("a", "s", resumable=resumable).epoch
        moved = directory.open("a", "s", resumable=resumable, claim=Claim(epoch)).epoch
        directory.unregister("x")
        directory.register(owner("x"))
        moved = directory.open("a", "s", resumable=resumable, claim=Claim(moved)).epoch
        assert directory.num_sessions() == {"x": 1}
        directory.ended("x", [moved])


def test_only_what_was_opened_for_it_can_be_attached_from_elsewhere(directory: Directory) -> None:
    directory.open("a", "s")
    with pytest.raises(InvalidInput, match="'a' was not opened to be resumed: open it with resumable=true"):
        directory.attach("a", "t")


def test_of_several_models_one_has_to_be_named() -> None:
    directory, both = Directory(1), ("sum", "vad")
    directory.register(owner("x", models=both))
    directory.register(owner("y", model="vad", models=both))
    assert directory.models().keys() == {"sum", "vad"}
    assert {directory.open(name, "s", name).owner.name for name in both} == {"x", "y"}
    with pytest.raises(InvalidInput, match="2 models are served here, say which one: sum, vad"):
        directory.open("a", "s")
    with pytest.raises(UnknownModel, match="'bert' is not served here: sum, vad"):
        directory.open("a", "s", "bert")
    directory.unregister("y")
    with pytest.raises(Unavailable, match="no replica of model 'vad' is ready"):
        directory.open("a", "s", "vad")
    with pytest.raises(InvalidInput, match="say which one: sum, vad"):
        directory.open("a", "s")
    assert directory.open("a", "s", "sum").owner.name == "x"


def test_a_state_is_given_to_its_own_model_only(directory: Directory) -> None:
    keep(directory, "a", directory.open("a", "s", resumable=True).epoch)
    directory.unregister("x")
    directory.register(owner("y", fingerprint="g"))
    claim = Claim(directory.restorable("a"), "f")
    with pytest.raises(StateLost, match="'a' is of model 'sum' with fingerprint f, the one that is served has g"):
        directory.open("a", "t", "sum", resumable=True, claim=claim)
    with pytest.raises(UnknownModel):
        directory.open("a", "t", "other", resumable=True, claim=claim)
    directory.register(owner("z"))  # beside the other, as when code is rolled out
    assert directory.open("a", "t", "sum", resumable=True, claim=claim).owner.name == "z"


def test_a_session_that_ends_is_dropped_at_once(directory: Directory) -> None:
    epoch = directory.open("a", "s", resumable=True).epoch
    keep(directory, "a", epoch)
    assert directory.ended("x", [epoch, epoch, 77]) == [key_of("a")]
    assert directory.open("a", "s").epoch > epoch
    second = directory.open("b", "s", resumable=True).epoch
    keep(directory, "b", second)
    directory.unregister("x")
    assert directory.ended("x", [second]) == [key_of("b")], "though its owner is gone"
    assert directory.ended("y", [3]) == []


def test_what_is_kept_of_a_session_that_ends_meanwhile_is_dropped_again(directory: Directory) -> None:
    epoch = directory.open("a", "s", resumable=True).epoch
    held = {"a": Held(epoch, "x")}
    assert directory.keep("s", held) == {}
    directory.ended("x", [epoch])
    assert directory.has_kept(held, 0) == [key_of("a")]
    assert isinstance(keep(directory, "a", epoch), UnknownSession), "what comes later is not kept at all"
    directory.open("a", "s")


def test_a_directory_that_starts_again_learns_of_sessions_from_those_who_have_them() -> None:
    before, after = new(2), new(3)
    epoch = before.open("a", "s", resumable=True).epoch
    for _ in range(2):
        assert keep(after, "a", epoch) is None
    grant, of = after.attach("a", "t")
    assert (grant.owner.name, of) == ("x", epoch) and grant.epoch > epoch
    gone = before.open("b", "s", resumable=True).epoch
    assert keep(after, "b", gone, at="nobody knows") is None
    assert after.restorable("b") == gone
    after.register(owner("nobody knows"))
    assert keep(after, "b", gone, at="nobody knows") is None
    assert after.attach("b", "s")[0].owner.name == "nobody knows"


def test_a_directory_that_starts_again_believes_the_last_of_those_who_had_a_session() -> None:
    """Both have it under an epoch of the directory before, and one of them does not know that it is behind."""
    before, after = new(2), new(3)
    first = before.open("a", "s", resumable=True).epoch
    second = before.attach("a", "t")[0].epoch
    assert keep(after, "a", first) is None
    assert keep(after, "a", second) is None
    assert isinstance(keep(after, "a", first), NotOwner)
    with pytest.raises(NotOwner):
        after.open("a", "s", resumable=True, claim=Claim(first))

    after = new(3)
    moved = after.open("a", "s", resumable=True, claim=Claim(first)).epoch  # its owner was gone, too
    again = after.open("a", "s", resumable=True, claim=Claim(moved)).epoch
    last = after.open("a", "t", resumable=True, claim=Claim(second)).epoch
    for epoch in (first, second, moved, again):
        assert isinstance(keep(after, "a", epoch), NotOwner)
    assert keep(after, "a", last) is None


def test_nobody_from_before_has_a_session_that_its_client_has_come_back_for() -> None:
    before, after = new(2), new(3, "a")
    first = before.open("a", "s", resumable=True).epoch
    second = before.attach("a", "t")[0].epoch
    assert after.unknown(["a", "b"]) == ["a"]
    after.recall("a", first)  # under which the checkpoint was written
    after.recall("a", first - 1)
    with pytest.raises(UnknownSession) as caught:
        after.attach("a", "u")
    assert caught.value.details == {"epoch": first}
    grant = after.open("a", "u", resumable=True, claim=Claim(after.restorable("a"), "f"))
    assert isinstance(keep(after, "a", second), NotOwner)
    assert keep(after, "a", grant.epoch) is None


def test_a_directory_that_starts_again_finds_what_is_in_the_store() -> None:
    directory = new(3, "a")
    with pytest.raises(SessionExists, match="waits to be resumed"):
        directory.open("a", "s")
    with pytest.raises(UnknownSession):
        directory.attach("a", "s")
    assert directory.restorable("a") == 0
    grant = directory.open("a", "s", "sum", resumable=True, claim=Claim(0, "f"))
    with pytest.raises(NotOwner):
        directory.open("a", "t", "sum", resumable=True, claim=Claim(0, "f"))
    directory.unregister("x")
    directory.register(owner("y"))
    assert directory.restorable("a") == grant.epoch


def test_checkpoints_that_nobody_comes_back_for_are_given_up() -> None:
    directory = new(3, "found")
    for session in ("runs", "waits"):
        keep(directory, session, directory.open(session, "s", resumable=True).epoch)
    directory.release("waits", directory.lookup("waits").epoch)
    assert directory.expire(50) == set()
    assert directory.expire(55) == (), "it looks now and then only"
    assert directory.expire(101) == {key_of("found"), key_of("waits")}
    assert directory.expire(1000) == set(), "one that runs needs no new one"
    for session in ("found", "waits"):
        directory.open(session, "s")
    assert directory.lookup("runs").owner == "x"


def test_who_may_go_on_is_remembered_though_nothing_is_kept(directory: Directory) -> None:
    """Else a sender that is behind could have the session before the one that its client has gone to."""
    first = directory.open("a", "s", resumable=True).epoch
    second = directory.attach("a", "t")[0].epoch
    directory.unregister("x")
    directory.register(owner("y"))
    directory.expire(now=100)  # it may be on its way
    with pytest.raises(NotOwner, match=f"under epoch {second}"):
        directory.open("a", "s", claim=Claim(first))
    with pytest.raises(UnknownSession):
        directory.restorable("a")
    assert directory.has_kept({"a": Held(second, "x")}, now=100) == []
    assert directory.restorable("a") == second


def test_what_was_never_kept_is_forgotten_after_a_while(directory: Directory) -> None:
    directory.open("a", "s", resumable=True)
    directory.unregister("x")
    for now in (100, 120):
        directory.expire(now)
    with pytest.raises(UnknownSession):
        directory.lookup("a")


def test_when_a_takeover_comes_to_nothing_the_sender_before_can_go_on(directory: Directory) -> None:
    first = directory.open("a", "s", resumable=True).epoch
    grant, _ = directory.attach("a", "t")
    directory.unregister("x")
    directory.register(owner("y"))
    directory.release("a", grant.epoch)
    assert directory.open("a", "s", resumable=True, claim=Claim(first)).epoch > grant.epoch


def test_a_sender_whose_client_has_left_it_ends_nothing_in_a_directory_that_starts_again() -> None:
    """That knows of a session by its checkpoint, which may be of the grant before the last."""
    directory = new(2, "a")
    epoch = (1 << 24) + 7
    directory.recall("a", epoch)
    assert directory.ended("x", [epoch]) == []
    assert directory.restorable("a") == epoch


def test_an_owner_that_is_not_heard_of_is_given_up_and_its_model_with_it(directory: Directory) -> None:
    directory.register(owner("y", model="other"))
    session = directory.open("a", "s", model="sum", resumable=True)
    for now in np.arange(1, LEASE_S + 2, MARGIN_S / 2).tolist():
        directory.tick(now)
        assert directory.heard("y")
    assert not directory.heard("x") and directory.gone(["x", "y"]) == ["x"]
    assert list(directory.models()) == ["other"]
    assert directory.lookup("a").owner is None and directory.lookup("a").epoch == session.epoch
    assert directory.open("b", "s").owner.name == "y", "there is one model now"


def test_a_directory_that_stood_still_first_hears_what_owners_have_said(directory: Directory) -> None:
    directory.tick(1)
    directory.tick(100)
    assert directory.heard("x")
    directory.tick(100 + MARGIN_S)
    assert directory.knows("x") and directory.gone(["x"]) == []


def pass_time(directory: Directory, seconds: float, now: float = 0.0) -> float:
    """Its owners are heard of all the time; how late it is then."""
    end = now + seconds
    while now < end:
        now += MARGIN_S / 2
        directory.tick(now)
        for name in ("x", "y"):
            directory.heard(name)
    return now


def test_a_grant_that_no_owner_takes_up_is_given_up(directory: Directory) -> None:
    """Its sender has died, or was not answered."""
    now = pass_time(directory, 1)
    for session in ("taken", "kept", "resumed", "lost", "gone"):
        directory.open(session, "s", resumable=True)
    directory.taken("x", ((directory.lookup(session).epoch, session) for session in ("taken", "resumed", "lost")))
    assert keep(directory, "kept", directory.lookup("kept").epoch) is None
    assert keep(directory, "lost", directory.lookup("lost").epoch) is None
    for session in ("resumed", "lost"):
        directory.attach(session, "another")
    directory.taken("x", [(directory.lookup("resumed").epoch, "resumed")])
    now = pass_time(directory, TAKEN_WITHIN_S - 1, now)
    assert all(directory.lookup(session).owner == "x" for session in ("taken", "kept", "resumed", "lost", "gone"))
    pass_time(directory, 2, now)
    assert all(directory.lookup(session).owner == "x" for session in ("taken", "kept", "resumed"))
    assert directory.lookup("lost").owner is None, "its checkpoint is there"
    with pytest.raises(UnknownSession):
        directory.lookup("gone")
    directory.open("gone", "s")


def test_a_directory_that_stood_still_first_hears_what_owners_have_taken(directory: Directory) -> None:
    now = pass_time(directory, 1)
    epoch = directory.open("a", "s").epoch
    directory.tick(now + 10 * TAKEN_WITHIN_S)
    directory.taken("x", [(epoch, "a")])
    directory.heard("x")
    pass_time(directory, 2, now + 10 * TAKEN_WITHIN_S)
    assert directory.lookup("a").owner == "x"


def test_who_was_granted_a_session_and_not_answered_asks_again(directory: Directory) -> None:
    first = directory.open("a", "s", resumable=True).epoch
    directory.register(owner("y"))
    claim = Claim(first)
    unheard = directory.open("a", "s", resumable=True, claim=claim)
    with pytest.raises(NotOwner):
        directory.open("a", "another", resumable=True, claim=claim)
    again = directory.open("a", "s", resumable=True, claim=claim)
    assert again.epoch > unheard.epoch > first
    assert directory.lookup("a").epoch == again.epoch
    assert sum(directory.num_sessions().values()) == 1
    directory.attach("a", "another")
    with pytest.raises(NotOwner):
        directory.open("a", "s", resumable=True, claim=Claim(again.epoch))


def test_a_directory_that_has_just_started_cannot_tell_who_is_gone() -> None:
    directory = Directory(2, now=100)
    directory.tick(101)
    assert directory.gone(["x"]) == []


def test_where_somebody_cannot_reach_an_owner_nothing_is_placed_until_it_is_heard_of(directory: Directory) -> None:
    directory.register(owner("y"))
    directory.suspect("x")
    assert {directory.open(f"{i}", "s").owner.name for i in range(3)} == {"y"}
    directory.suspect("y")
    with pytest.raises(Unavailable):
        directory.open("a", "s")
    assert directory.heard("x")
    assert directory.open("a", "s").owner.name == "x"


def test_an_unloaded_model_gets_no_new_sessions_and_keeps_those_it_has() -> None:
    directory = Directory(2)
    for each, model in (("x", "sum"), ("y", "other")):
        directory.register(owner(each, model=model, models=("sum", "other")))
    before = directory.open("a", "s", "sum")
    directory.unload("sum")
    assert directory.statistics()["sum"].open == 1 and directory.unloaded() == {"sum": False}
    for _ in range(2):
        with pytest.raises(Unavailable, match="model 'sum' is unloaded: load it before a session starts"):
            directory.open("b", "s", "sum")
        assert directory.open("a", "s", "sum", claim=Claim(before.epoch)).owner.name == "x", "it may move"
        before = directory.grant_of("a") or before
        directory.register(owner("x", model="sum", models=("sum", "other")))  # again, as owners may
    directory.open("c", "s", "other")
    directory.ended("x", [before.epoch])
    assert directory.statistics()["sum"].open == 0
    directory.unregister("x")
    directory.unload("sum", gone=True)
    with pytest.raises(Unavailable, match="model 'sum' is unloaded"):
        directory.open("b", "s", "sum")
    directory.load("sum")
    with pytest.raises(Unavailable, match="no replica of model 'sum' is ready"):
        directory.open("b", "s", "sum")
    directory.register(owner("z", model="sum"))
    assert directory.open("b", "s", "sum").owner.name == "z"


def test_an_unloaded_model_that_is_deployed_anew_is_loaded(directory: Directory) -> None:
    directory.unload("sum")
    directory.register(owner("y"))
    assert directory.unloaded() == {"sum": False}, "Serve may replace a replica while sessions run"
    directory.unregister("x")
    directory.unregister("y")
    directory.unload("sum", gone=True)
    directory.register(owner("z"))
    assert directory.unloaded() == {}


def test_an_owner_that_retires_keeps_its_sessions_until_others_have_them_and_gets_none(directory: Directory) -> None:
    grants = [directory.open(f"{i}", "s", resumable=True) for i in range(2)]
    assert not directory.retire("x"), "there is no other"
    with pytest.raises(Unavailable):
        directory.open("new", "s")
    directory.register(owner("other weights", fingerprint="g"))
    assert not directory.retire("x")
    directory.register(owner("y"))
    assert directory.retire("x")
    assert directory.heard("x"), "it works on"
    for grant in grants:
        assert directory.lookup(grant.session).owner == "x"
        assert directory.open(grant.session, "s", resumable=True, claim=Claim(grant.epoch)).owner.name == "y"
    directory.suspect("y")
    assert not directory.retire("x"), "nobody can reach the other"
    directory.heard("y")
    assert not directory.retire("y"), "both leave"
    assert directory.open("new", "s").owner.name == "other weights"
    directory.register(owner("x"))
    assert directory.retire("y"), "x has come back"
    assert not directory.retire("unknown")


def test_a_session_that_an_earlier_directory_has_granted_can_be_dropped() -> None:
    directory = new(2, "a")
    directory.recall("a", (1 << 24) + 7)
    assert directory.drop_waiting("a") == [key_of("a")]
    directory.open("a", "s")
    directory.open("never kept", "s", resumable=True)
    directory.unregister("x")
    assert directory.drop_waiting("never kept") == []
    with pytest.raises(UnknownSession):
        directory.lookup("never kept")


def test_what_ended_at_owners_that_are_gone_stays_counted_without_them(directory: Directory) -> None:
    directory.tell("x", {"closed": 1, "idle": 2}, IDLE)
    for i in range(2 * GONE_KEPT):
        directory.register(owner(f"{i}"))
        directory.tell(f"{i}", {"closed": 1}, IDLE)
        directory.unregister(f"{i}")
        directory.unregister(f"{i}")
    assert directory.statistics()["sum"].ended == {"closed": 2 * GONE_KEPT + 1, "idle": 2}
    assert len(directory._tallies["sum"].ends) == GONE_KEPT + 1


def test_an_owner_that_comes_again_is_counted_once(directory: Directory) -> None:
    directory.tell("x", {"closed": 3}, IDLE)
    for ends in ({"closed": 3}, {"closed": 4, "idle": 1}):
        before = directory.statistics()
        directory.unregister("x")
        directory.register(owner("x"))
        assert directory.statistics() == before
        directory.tell("x", ends, IDLE)
        assert directory.statistics()["sum"].ended == ends


def test_where_a_session_was_to_go_is_forgotten_with_it(directory: Directory) -> None:
    directory.open("a", "s")
    directory.register(owner("y"))
    directory.migrate("a", "y")
    directory.unregister("x")
    directory.register(owner("x"))
    assert directory.open("b", "s").owner.name == "y"
    assert directory.open("a", "s").owner.name == "x", "there is more room"


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch, directory: Directory) -> Directory:
    """One that grants places ahead though its owners take ten sessions each."""
    monkeypatch.setattr(module, "MIN_FREE", 0)
    return directory


def test_a_place_granted_ahead_is_a_session_when_its_owner_says_so(roomy: Directory) -> None:
    (first, second) = roomy.open_ahead("s", "sum", 2)
    assert (first.epoch < second.epoch, first.owner.name) == (True, "x")
    assert (roomy.statistics()["sum"].open, roomy.statistics()["sum"].opened) == (0, 0)
    assert roomy.sessions("", 10) == []
    roomy.taken("x", [(first.epoch, "a")])
    assert roomy.lookup("a").epoch == first.epoch
    assert roomy.describe("a").sender == "s"
    assert (roomy.statistics()["sum"].open, roomy.statistics()["sum"].opened) == (1, 1)
    roomy.ended("x", [first.epoch])
    assert roomy.statistics()["sum"].open == 0
    roomy.ended("x", [second.epoch])  # its sender says so before its owner has said that it was taken in
    roomy.taken("x", [(second.epoch, "b")])
    roomy.ended("x", [second.epoch])
    assert (roomy.statistics()["sum"].open, roomy.statistics()["sum"].opened) == (0, 2)
    with pytest.raises(UnknownSession):
        roomy.lookup("b")


def test_one_that_went_on_elsewhere_before_its_owner_told_of_it_stays_there(roomy: Directory) -> None:
    (grant,) = roomy.open_ahead("s", "sum", 1)
    roomy.register(owner("y"))
    moved = roomy.open("a", "s", claim=Claim(grant.epoch))
    roomy.taken("x", [(grant.epoch, "a")])
    assert roomy.lookup("a").epoch == moved.epoch
    assert roomy.statistics()["sum"].opened == 1
    assert sum(roomy.num_sessions().values()) == 1


def test_places_granted_ahead_are_taken_from_nobody_for_long(roomy: Directory) -> None:
    assert len(roomy.open_ahead("s", "sum", 100)) == 5, "half of them"
    for i in range(5):
        roomy.open(f"s{i}", "s")
    with pytest.raises(TooManySessions) as waiting:
        roomy.open("last", "s")
    assert waiting.value.details["ask_again_s"] > 0, "those that are not used will be given back"
    for turn, waited_s in ((USUAL, UNUSED_WITHIN_S), (Turn(max_wait_s=0.5), 0.5), (Turn(max_wait_s=0), 0)):
        with pytest.raises(TooManySessions, match="5 sessions are open and 5 about to be") as refused:
            roomy.open("last", "s", turn=turn, waited_s=waited_s)
        assert "ask_again_s" not in refused.value.details
    pass_time(roomy, TAKEN_WITHIN_S + 2)
    assert roomy.open("last", "s").owner.name == "x", "their sender is dead, it seems"


def test_none_is_granted_ahead_where_others_wait_or_places_are_few(
    monkeypatch: pytest.MonkeyPatch, roomy: Directory
) -> None:
    monkeypatch.setattr(module, "MIN_FREE", 10)
    assert roomy.open_ahead("s", "sum", 1) == []
    roomy.register(owner("y"))
    grants = roomy.open_ahead("s", "sum", 20)
    assert sorted(grant.owner.name for grant in grants) == ["x"] * 5 + ["y"] * 5
    roomy.unused({"x": [grant.epoch for grant in grants], "y": [grant.epoch for grant in grants]})
    for i in range(20):
        roomy.open(f"s{i}", "s")
    assert roomy.open_ahead("s", "sum", 1) == []
    roomy.register(dataclasses.replace(owner("z", model="other"), queue=QueueLimits(max_wait_s=10), max_sessions=21))
    for i in range(21):
        roomy.open(f"o{i}", "s", "other")
    with pytest.raises(TooManySessions):
        roomy.open("waits", "s", "other")
    roomy.ended("z", [roomy.lookup(f"o{i}").epoch for i in range(21)])
    assert roomy.open_ahead("s", "other", 1) == [], "the first place is for who waits"
    roomy.open("waits", "s", "other")
    assert len(roomy.open_ahead("s", "other", 1)) == 1
    roomy.unload("other")
    assert roomy.open_ahead("s", "other", 1) == []
    with pytest.raises(UnknownModel):
        roomy.open_ahead("s", "unknown", 1)


def test_places_granted_ahead_are_gone_with_their_owner(roomy: Directory) -> None:
    (grant,) = roomy.open_ahead("s", "sum", 1)
    assert roomy.unregister("x") == 0
    roomy.register(owner("x"))
    roomy.taken("x", [(grant.epoch, "a")])
    assert roomy.statistics()["sum"].opened == 0
    assert roomy.num_sessions() == {"x": 0}


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_no_owner_is_ever_promised_more_sessions_than_it_takes(seed: int) -> None:
    """Whatever is opened, granted ahead, taken, used or not, and ends; and in the end all places are free."""
    rng = random.Random(seed)
    directory, ahead, live, number = Directory(2), [], [], 0
    for name in "xy":
        directory.register(owner(name))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MIN_FREE", rng.choice([0, 5, 15]))
        for _ in range(200):
            what, number = rng.random(), number + 1
            if what < 0.3:
                with suppress(TooManySessions):
                    grant = directory.open(f"s{number}", "s")
                    live.append((grant.owner.name, grant.epoch))
            elif what < 0.5:
                ahead += directory.open_ahead("s", "sum", rng.randint(1, 8))
            elif what < 0.7 and ahead:
                grant = ahead.pop(rng.randrange(len(ahead)))
                directory.taken(grant.owner.name, [(grant.epoch, f"a{number}")])
                live.append((grant.owner.name, grant.epoch))
            elif what < 0.8 and ahead:
                grant = ahead.pop(rng.randrange(len(ahead)))
                directory.unused({grant.owner.name: [grant.epoch]})
            elif live:
                at, epoch = live.pop(rng.randrange(len(live)))
                directory.ended(at, [epoch])
            promised = Counter([at for at, _ in live] + [grant.owner.name for grant in ahead])
            assert max(promised.values(), default=0) <= 10
            assert directory.statistics()["sum"].open == len(live)
        assert len({epoch for _, epoch in live} | {grant.epoch for grant in ahead}) == len(live) + len(ahead)
        for at, epoch in live:
            directory.ended(at, [epoch])
        directory.unused({name: [grant.epoch for grant in ahead] for name in "xy"})
        assert [directory.open(f"e{i}", "s").owner.name for i in range(20)].count("x") == 10
