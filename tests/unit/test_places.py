"""Places of a worker: as many documents in work as there are places, and more only while some of them merely wait."""

from __future__ import annotations

import asyncio
import inspect

from procrastinate.worker import Worker

from jobs.places import Places, SharedPlace


def places_of(count: int, documents: int) -> Places:
    return Places(count, most_documents=documents, most_requests=4)


async def is_free(places: Places) -> bool:
    try:
        async with asyncio.timeout(0.01):
            return await places.acquire()
    except TimeoutError:
        return False


async def test_a_lent_place_is_anothers_until_it_comes_back_and_then_one_must_leave_for_good() -> None:
    places = places_of(2, 1)
    assert await places.acquire()
    assert await places.acquire()
    assert not await is_free(places)
    with places.lent(1, 0):
        assert await is_free(places)
        assert not await is_free(places)
    # Three work now on two places.
    places.release()
    assert not await is_free(places)
    places.release()
    assert await is_free(places)


async def test_no_more_places_are_lent_than_may_be_and_each_comes_back_also_after_an_error() -> None:
    places = places_of(1, 1)
    assert await places.acquire()
    with places.lent(1, 0), places.lent(1, 0):
        assert await is_free(places)
        assert not await is_free(places)
    places.release()
    places.release()
    try:
        with places.lent(1, 0):
            raise ValueError
    except ValueError:
        pass
    assert await is_free(places)
    assert not await is_free(places)


async def test_who_waits_for_a_place_is_woken_by_one_that_is_lent() -> None:
    places = places_of(1, 1)
    assert await places.acquire()
    waiting = asyncio.create_task(places.acquire())
    await asyncio.sleep(0)
    with places.lent(1, 0):
        async with asyncio.timeout(10):
            assert await waiting


async def test_a_shared_place_is_lent_while_all_that_are_in_it_wait() -> None:
    places = places_of(1, 3)
    assert await places.acquire()
    shared = SharedPlace(3, places.lent)
    with shared.waiting(0.25), shared.waiting(0.25):
        assert not await is_free(places)
        with shared.waiting(0.25):
            assert await is_free(places)
            assert not await is_free(places)
        places.release()
        assert not await is_free(places)
        shared.leave()
        assert await is_free(places)
    places.release()
    shared.leave()
    shared.leave()
    places.release()
    assert await is_free(places)


async def test_places_are_lent_for_no_more_documents_than_may_wait() -> None:
    places = places_of(2, 3)
    assert await places.acquire()
    assert await places.acquire()
    with places.lent(2, 0), places.lent(2, 0):
        assert await is_free(places)
        assert not await is_free(places)


async def test_places_are_lent_until_the_texts_that_wait_fill_all_requests() -> None:
    places = Places(3, most_documents=100, most_requests=1.5)
    for _ in range(3):
        assert await places.acquire()
    with places.lent(1, 1), places.lent(1, 0.5), places.lent(1, 0.1):
        assert await is_free(places)
        assert await is_free(places)
        assert not await is_free(places)
    places.release()
    places.release()
    with places.lent(1, 1), places.lent(1, 0.1):
        assert await is_free(places)
        assert await is_free(places)
        assert not await is_free(places)


async def test_one_place_is_always_lent_however_much_waits_in_it() -> None:
    places = Places(2, most_documents=4, most_requests=1)
    assert await places.acquire()
    assert await places.acquire()
    with places.lent(16, 3), places.lent(1, 0):
        assert await is_free(places)
        assert not await is_free(places)
    places.release()
    with places.lent(1, 0):
        assert await is_free(places)


async def test_a_shared_place_weighs_as_much_as_all_that_wait_in_it() -> None:
    places = Places(3, most_documents=100, most_requests=1)
    for _ in range(3):
        assert await places.acquire()
    shared, other = SharedPlace(2, places.lent), SharedPlace(1, places.lent)
    with other.waiting(0.5), shared.waiting(0.3), shared.waiting(0.3):
        assert await is_free(places)
        assert not await is_free(places)
    places.release()
    with other.waiting(0.5), shared.waiting(0.3), shared.waiting(0.2):
        assert await is_free(places)
        assert await is_free(places)


async def test_closing_waits_for_all_who_work_or_wait_and_lets_nobody_in() -> None:
    places = places_of(2, 1)
    assert await places.acquire()
    with places.lent(1, 0):
        closing = asyncio.create_task(places.close(60))
        await asyncio.sleep(0)
        assert not await is_free(places)
        assert not closing.done()
    assert not await is_free(places)
    assert not closing.done()
    places.release()
    async with asyncio.timeout(10):
        await closing
    assert not await is_free(places)


async def test_closing_waits_for_who_only_waits_no_longer_than_it_has_patience_and_for_who_works_as_long_as_that_takes() -> None:
    places = places_of(2, 2)
    assert await places.acquire()
    assert await places.acquire()
    with places.lent(1, 0):
        closing = asyncio.create_task(places.close(0.01))
        await asyncio.sleep(0.1)
        assert not closing.done()  # one works
        places.release()
        async with asyncio.timeout(10):
            await closing
    assert not await is_free(places)


def test_procrastinates_worker_takes_places_from_what_side_tasks_begin_with() -> None:
    source = inspect.getsource(Worker._run_loop)
    assert 0 < source.index("self._job_semaphore = ") < source.index("self._start_side_tasks()")
    assert "self._job_semaphore.acquire()" in inspect.getsource(Worker._fetch_and_process_jobs)
