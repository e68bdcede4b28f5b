"""What goes on for ever whatever the database does ends when it is told to."""

from __future__ import annotations

import asyncio

import pytest

from jobs.outages import outlive


async def test_who_is_cancelled_while_its_connection_breaks_does_not_go_on() -> None:
    begun = 0

    async def leave_badly() -> None:
        nonlocal begun
        begun += 1
        try:
            await asyncio.sleep(60)
        finally:
            raise OSError("the connection that is to be closed is broken")

    task = asyncio.create_task(outlive("The listener", leave_badly))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    async with asyncio.timeout(30):
        with pytest.raises(asyncio.CancelledError):
            await task
    assert begun == 1
