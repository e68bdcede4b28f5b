"""Meetings: what several ask for is asked for once, nobody waits for who has left, and a failure of all is nobody's answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from jobs.pipeline import together as module
from jobs.pipeline.together import NotTogether, Together


class Asked:
    """Answers a number with its square, all numbers at once, and remembers what it was asked."""

    def __init__(self, error: Exception | None = None) -> None:
        self.times: list[list[int]] = []
        self.error = error

    async def __call__(self, items: list[int]) -> Sequence[int | Exception]:
        self.times.append(items)
        if self.error is not None:
            raise self.error
        return [item * item if item >= 0 else ValueError(str(item)) for item in items]


async def test_what_all_members_ask_for_is_asked_for_once() -> None:
    together, asked = Together(3), Asked()
    assert await asyncio.gather(*(together.ask("square", n, asked) for n in (1, 2, 3))) == [1, 4, 9]
    assert asked.times == [[1, 2, 3]]


async def test_an_answer_that_is_an_exception_is_raised_for_its_asker_alone() -> None:
    together, asked = Together(2), Asked()
    found = await asyncio.gather(together.ask("square", 2, asked), together.ask("square", -1, asked), return_exceptions=True)
    assert found[0] == 4
    assert isinstance(found[1], ValueError)


async def test_members_at_different_meetings_do_not_wait_for_each_other() -> None:
    together, one, other = Together(4), Asked(), Asked()
    asks = [together.ask("one", 1, one), together.ask("one", 2, one), together.ask("other", 3, other), together.ask("other", 4, other)]
    assert await asyncio.gather(*asks) == [1, 4, 9, 16]
    assert one.times == [[1, 2]]
    assert other.times == [[3, 4]]


async def test_nobody_waits_for_a_member_that_has_left() -> None:
    together, asked = Together(3), Asked()
    waiting = asyncio.gather(together.ask("square", 1, asked), together.ask("square", 2, asked))
    await asyncio.sleep(0)
    assert not asked.times
    together.leave()
    assert list(await asyncio.wait_for(waiting, 0.5)) == [1, 4]


async def test_nobody_waits_for_a_member_that_is_away_and_who_comes_back_is_waited_for_again() -> None:
    together, asked, answer = Together(4), Asked(), asyncio.Event()

    async def goes_outside(number: int) -> int:
        with together.away():
            await answer.wait()
        return await together.ask("square", number, asked)

    outside = [asyncio.create_task(goes_outside(number)) for number in (3, 4)]
    here = asyncio.gather(together.ask("square", 1, asked), together.ask("square", 2, asked))
    assert list(await asyncio.wait_for(here, 0.5)) == [1, 4]
    together.leave()
    last = asyncio.create_task(together.ask("square", 5, asked))
    answer.set()
    assert await asyncio.wait_for(asyncio.gather(*outside, last), 0.5) == [9, 16, 25]
    assert asked.times[0] == [1, 2]
    assert sorted(asked.times[1]) == [3, 4, 5]


async def test_who_cannot_wait_meets_those_alone_who_come_at_once() -> None:
    together, asked = Together(4), Asked()
    waiting = asyncio.create_task(together.ask("other", 9, asked))
    await asyncio.sleep(0)
    at_once = [together.ask("square", number, asked, at_once=True) for number in (1, 2)]
    assert await asyncio.wait_for(asyncio.gather(*at_once), 0.5) == [1, 4]
    with pytest.raises(NotTogether):
        await together.ask("square", 3, asked, at_once=True)
    assert (asked.times, waiting.done()) == ([[1, 2]], False)
    waiting.cancel()


async def test_who_goes_away_is_waited_for_no_longer_by_those_who_wait_already() -> None:
    together, asked = Together(3), Asked()
    waiting = asyncio.gather(together.ask("square", 1, asked), together.ask("square", 2, asked))
    await asyncio.sleep(0)
    with together.away():
        assert list(await asyncio.wait_for(waiting, 0.5)) == [1, 4]


async def test_who_comes_late_is_waited_for_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.01)
    together, asked = Together(3), Asked()
    assert list(await asyncio.gather(together.ask("square", 1, asked), together.ask("square", 2, asked))) == [1, 4]
    with pytest.raises(NotTogether):  # nobody else comes to this one
        await together.ask("square", 3, asked)
    assert asked.times == [[1, 2]]


@pytest.mark.parametrize("error", [RuntimeError("away"), ExceptionGroup("several", [ValueError()])])
async def test_where_all_fail_together_each_asks_alone(error: Exception) -> None:
    together, asked = Together(2), Asked(error)
    found = await asyncio.gather(together.ask("square", 1, asked), together.ask("square", 2, asked), return_exceptions=True)
    assert all(isinstance(answer, NotTogether) for answer in found)


async def test_a_cancelled_member_is_left_out_and_the_others_have_their_answers() -> None:
    together, asked = Together(3), Asked()
    tasks = [asyncio.create_task(together.ask("square", n, asked)) for n in (1, 2, 3)]
    tasks[1].cancel()
    await asyncio.sleep(0)
    together.leave()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [found[0], found[2]] == [1, 9]
    assert isinstance(found[1], asyncio.CancelledError)


async def test_the_last_member_asks_alone() -> None:
    together = Together(2)
    together.leave()
    with pytest.raises(NotTogether):
        await together.ask("square", 1, Asked())


async def test_too_few_answers_are_no_answers_and_nobody_waits_for_ever() -> None:
    async def too_few(items: list[int]) -> Sequence[int]:
        return items[1:]

    together = Together(2)
    asks = asyncio.gather(together.ask("x", 1, too_few), together.ask("x", 2, too_few), return_exceptions=True)
    assert all(isinstance(answer, NotTogether) for answer in await asyncio.wait_for(asks, 5))
