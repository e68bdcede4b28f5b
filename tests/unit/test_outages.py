"""What goes on for ever whatever the database does ends when it is told to."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from jobs.outages import outlive
from jobs.reconcile import Reconciler
from models.settings import Settings


async def test_who_is_cancelled_while_its_connection_breaks_does_not_go_on() -> None:
    begun = asyncio.Event()

    async def leave_badly() -> None:
        if begun.is_set():
            return
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            raise OSError("the connection that is to be closed is broken")

    task = asyncio.create_task(outlive("The listener", leave_badly))
    await begun.wait()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


async def test_a_reconciler_that_is_cancelled_while_its_connection_breaks_makes_no_other_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = asyncio.Event()

    async def leave_badly(self: Reconciler) -> dict[str, int]:
        if begun.is_set():
            raise ValueError("another pass")
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            raise OSError("the connection that is to be closed is broken")

    monkeypatch.setattr(Reconciler, "pass_once", leave_badly)
    pool: Any = None
    task = asyncio.create_task(Reconciler(Settings(reconcile_seconds=0.05), pool).run())
    await begun.wait()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
