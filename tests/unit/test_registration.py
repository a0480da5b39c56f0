"""An owner that leaves: its sessions go to others in parts, while its lease goes on."""

import pytest

from serve_app.config import DurabilityConfig
from serve_app.deployments import registration
from serve_app.deployments.registration import HAND_OVER_TURNS, News, Registration, Standing
from serve_app.directory import Owner
from serve_app.errors import Unavailable
from serve_app.lease import Lease
from serve_app.policy.autoscaling import IDLE, Load
from tests.unit.test_directory import owner


class Registry:
    """See registration.Registry; it has been asked for `events`, and after so many of them can be asked no more."""

    def __init__(self, others_free: bool = True, dies_after: int = 10**6) -> None:
        self.others_free, self.dies_after = others_free, dies_after
        self.events: list[str] = []

    async def register(self, owner: Owner, durability: DurabilityConfig) -> int:
        self._event("register")
        return 1

    async def retire(self, owner: str) -> bool:
        self._event("retire")
        return self.others_free

    async def unregister(self, owner: str) -> None:
        self._event("unregister")

    async def report(self, owner: str, news: News, ends: dict[str, int], load: Load = IDLE) -> Standing:
        self._event("report")
        return Standing(1, is_known=True)

    async def is_down(self) -> bool:
        return False

    def _event(self, what: str) -> None:
        if len(self.events) >= self.dies_after:
            raise Unavailable("the directory starts: try again in a moment")
        self.events.append(what)


class Sessions:
    """Of an owner: those given back are gone by the next turn."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.given: list[int] = []

    def give_back(self, count: int) -> None:
        self.given.append(count)
        self.count -= min(count, self.count)


async def hand_over(registry: Registry, sessions: Sessions) -> None:
    async def fence() -> None:
        raise AssertionError("nobody has given the owner up")

    registering = Registration(registry, owner("x"), DurabilityConfig(), Lease(), fence)
    await registering.register()
    await registering.hand_over(lambda: sessions.count, sessions.give_back, lambda: registering.renew(News([], []), {}))


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "HAND_OVER_EVERY_S", 0.0)


@pytest.mark.parametrize("count", [1, 3, HAND_OVER_TURNS, 50, 8192])
async def test_sessions_are_given_back_in_equal_parts_under_a_lease(count: int) -> None:
    registry, sessions = Registry(), Sessions(count)
    await hand_over(registry, sessions)
    assert sum(sessions.given) == count
    assert len(sessions.given) == min(count, HAND_OVER_TURNS)
    assert max(sessions.given) - min(sessions.given) <= 1
    assert registry.events == ["register", *["retire", "report"] * len(sessions.given)]


async def test_those_that_stay_though_they_were_to_go_do_not_hold_it_up() -> None:
    registry, sessions = Registry(), Sessions(40)
    sessions.give_back = lambda count: sessions.given.append(count)  # type: ignore[method-assign]
    await hand_over(registry, sessions)
    assert len(sessions.given) == HAND_OVER_TURNS
    assert sessions.given[-1] == 40, "all that are left"


@pytest.mark.parametrize(("others_free", "count"), [(False, 40), (True, 0)])
async def test_nothing_is_given_back_where_nothing_is_or_nobody_can_take_it(others_free: bool, count: int) -> None:
    sessions = Sessions(count)
    await hand_over(Registry(others_free), sessions)
    assert sessions.given == []


async def test_a_directory_that_dies_meanwhile_ends_it() -> None:
    registry, sessions = Registry(dies_after=6), Sessions(100)
    with pytest.raises(Unavailable):
        await hand_over(registry, sessions)
    assert sum(sessions.given) < 100
