"""`docmill worker`: the procrastinate worker in this process."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import typer

from jobs.cli.errors import ExitCode
from models.stages import STAGES

if TYPE_CHECKING:
    from jobs.worker import DocmillApp


def _chosen(queues: str | None) -> list[str] | None:
    """Return the queues of a comma-separated list; a name that no stage uses would wait for ever, so it is refused."""
    if queues is None:
        return None
    known = list(dict.fromkeys(stage.queue for stage in STAGES))
    names = [name.strip() for name in queues.split(",") if name.strip()]
    if not names or (unknown := [name for name in names if name not in known]):
        what = ", ".join(repr(name) for name in unknown) if names else "nothing"
        raise typer.BadParameter(f"{what} is no queue; there are {', '.join(known)}.", param_hint="--queues")
    return names


def run(queues: str | None, concurrency: int | None) -> ExitCode:
    """Work until a signal comes. Logs as the settings say, like any worker."""
    chosen = _chosen(queues)
    from procrastinate_app import app  # noqa: PLC0415 - reads the settings and configures logging when it is imported

    asyncio.run(_work(app, chosen, concurrency))
    return ExitCode.OK


async def _work(app: DocmillApp, queues: list[str] | None, concurrency: int | None) -> None:
    given = {} if concurrency is None else {"concurrency": concurrency}
    async with app.open_async():
        await app.run_worker_async(queues=queues, **given)
