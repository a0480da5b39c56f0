"""Many calls in one: each has its own answer, and none waits for ever."""

import asyncio
from collections.abc import Sequence

import pytest

from serve_app.errors import Unavailable
from serve_app.ingress import together
from serve_app.ingress.together import Together

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(10)]


class Work:
    """Doubles what it is given, or fails, once `free` is set."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.free = asyncio.Event()

    async def __call__(self, asks: Sequence[int]) -> Sequence[int]:
        self.calls.append(list(asks))
        await self.free.wait()
        if 13 in asks:
            raise Unavailable("not today")
        return [2 * ask for ask in asks]


async def test_what_comes_while_a_call_is_on_its_way_goes_with_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "MAX_TOGETHER", 3)
    work = Work()
    many = Together(work)
    tasks = [asyncio.ensure_future(many.call(0))]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    tasks += [asyncio.ensure_future(many.call(ask)) for ask in range(1, 5)]
    await asyncio.sleep(0)
    work.free.set()
    assert await asyncio.gather(*tasks) == [0, 2, 4, 6, 8]
    assert work.calls == [[0], [1, 2, 3], [4]]
    assert await many.call(5) == 10, "and it begins again"


async def test_more_than_go_in_one_call_do_not_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "MAX_TOGETHER", 2)
    work = Work()
    many = Together(work)
    tasks = [asyncio.ensure_future(many.call(ask)) for ask in (1, 13, 2, 3, 4)]
    async with asyncio.timeout(5):
        while len(work.calls) < 3:
            await asyncio.sleep(0)
    assert work.calls == [[1, 13], [2, 3], [4]], "all on their way, though none was answered"
    work.free.set()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(each) for each in found[:2]] == [Unavailable, Unavailable]
    assert found[2:] == [4, 6, 8]


async def test_a_failure_is_of_those_who_were_in_that_call() -> None:
    work = Work()
    many = Together(work)
    tasks = [asyncio.ensure_future(many.call(ask)) for ask in (13, 1)]
    await asyncio.sleep(0)
    late = asyncio.ensure_future(many.call(2))
    await asyncio.sleep(0)
    work.free.set()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(each) for each in found] == [Unavailable, Unavailable]
    assert await late == 4


async def test_one_who_has_gone_does_not_matter_to_the_others() -> None:
    work = Work()
    many = Together(work)
    gone, stays = (asyncio.ensure_future(many.call(ask)) for ask in (1, 2))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.sleep(0)
    work.free.set()
    assert await stays == 4


@pytest.mark.parametrize("after", [0, 1, 5])
async def test_what_is_stopped_answers_nobody_and_calls_nothing(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "MAX_TOGETHER", 2)
    work = Work()
    many = Together(work)
    tasks = [asyncio.ensure_future(many.call(0))]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    tasks += [asyncio.ensure_future(many.call(ask)) for ask in range(1, after + 1)]
    await asyncio.sleep(0)
    await many.stop()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(each) for each in found] == [Unavailable] * (1 + after)
    with pytest.raises(Unavailable, match="was stopped"):
        await many.call(2)
    assert work.calls == [[0]]
