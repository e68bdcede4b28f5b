"""Looking at the alert rules, and forwarding what they find, also where no worker runs: that is when most is to be told."""

from __future__ import annotations

import asyncio

import psycopg
from loguru import logger

from jobs.alerts import RULE_SECONDS, AlertForwarder, log_changes
from jobs.redaction import describe
from jobs.serve.reading import Database
from models.settings import Settings


async def keep_watch(settings: Settings, database: Database) -> None:
    """Do so until cancelled, beside the workers, of which one or this server does it at a time. A server that only shows does not."""
    if settings.serve_read_only:
        return
    await database.keep_trying()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(AlertForwarder(settings).run())
        tasks.create_task(_keep_evaluating(database))


async def _keep_evaluating(database: Database) -> None:
    while True:
        try:
            log_changes(await database.act("evaluate_alerts", every_seconds=RULE_SECONDS))
        except psycopg.errors.InsufficientPrivilege:
            logger.info("This server's role may not write, so workers alone look at the alert rules")
            return
        except Exception as error:
            logger.warning("The alert rules could not be evaluated: {}", describe(error))
        await asyncio.sleep(RULE_SECONDS)
