"""Forwards alerts to a webhook: a side task of every worker and of `docmill serve`, of which one at a time does it.

An alert is a row of the table `alerts`, so none is lost while nobody listens; the NOTIFY only says that there is one. A row is locked while
it is being sent and marked afterwards, so a crash between the two sends it again, with the same Idempotency-Key: at least once.
Nothing that goes wrong here may touch a document or end a worker.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any

import psycopg
from loguru import logger
from psycopg.rows import DictRow, dict_row

from jobs.adapters.webhook import Webhook
from jobs.database import conninfo_of
from jobs.outages import end_if_cancelled, outlive
from jobs.redaction import describe
from jobs.retry import calculate_backoff
from jobs.sessions import connect_async
from models.errors import DocmillError, ErrorType, RateLimitError
from models.settings import Settings
from sql import query

LOOK_SECONDS = 30.0
"""Between two looks for what no notification announced, and between two tries to become the one that forwards."""
RULE_SECONDS = 30.0
"""Between two looks at the alert rules, over all workers and servers."""
GIVE_UP_DAYS = 7
"""Older alerts are not sent any more, also not when a webhook is set for the first time; they stay in the table."""
_LOCK = 0x646F636D616C72  # "docmalr" in ASCII: the key of the session advisory lock of the one that forwards
_HELD_SECONDS = 1.0  # before the next look at an alert that is locked
_LONGEST_PAUSE = 60.0  # seconds between two tries while the webhook fails
_LONGEST_ALERT_PAUSE = 300.0  # seconds between two tries of one alert
_LONGEST_REFUSED_PAUSE = 3600.0  # the same for one that the webhook has refused for good, as far as it knows


def log_changes(changes: Iterable[Mapping[str, Any]]) -> None:
    """Say in the log what a look at the alert rules has changed: rows of evaluate_alerts."""
    for row in changes:
        level = "INFO" if row["change"] == "resolved" else "ERROR" if row["severity"] == "critical" else "WARNING"
        logger.bind(rule=row["rule"], subject=row["subject"]).log(level, "Alert {}: {}", row["rule"], row["message"])


class AlertForwarder:
    """Forwards alerts for as long as it runs, unless another process does."""

    def __init__(self, settings: Settings, *, look_seconds: float = LOOK_SECONDS) -> None:
        self._settings = settings
        self._look_seconds = look_seconds
        self._failures = 0  # in a row

    async def run(self) -> None:
        """Run until cancelled, over connections of its own. Without ALERT_WEBHOOK_URL there is nothing to do but wait.

        Never returns and never raises: procrastinate stops a worker whose side task fails and stops watching the others when one ends.
        """
        url = self._settings.alert_webhook_url
        if url is None:
            await asyncio.Event().wait()
            return
        webhook = Webhook(url, timeout=self._settings.alert_timeout_seconds)
        try:
            while True:
                try:
                    await outlive("The alert forwarder", lambda: self._serve(webhook))
                except Exception as error:
                    end_if_cancelled(error)
                    logger.error("The alert forwarder failed and starts again: {}: {}", type(error).__name__, describe(error))
                await asyncio.sleep(self._look_seconds)
        finally:
            await webhook.aclose()

    async def _serve(self, webhook: Webhook) -> None:
        """Forward over one connection until it breaks; return at once if another session forwards."""
        conninfo = await asyncio.to_thread(conninfo_of, self._settings, direct=True)
        async with await connect_async(self._settings, conninfo, row_factory=dict_row) as conn:
            leading = await (await conn.execute(query("lead_forwarding"), {"key": _LOCK})).fetchone()
            if leading is None or not leading["leads"]:
                return
            await conn.execute(query("prepare_forwarding"))
            await conn.execute(query("listen_for_alerts"))
            while True:
                wait = await self._drain(conn, webhook)
                async for _ in conn.notifies(timeout=wait, stop_after=1):
                    pass

    async def _drain(self, conn: psycopg.AsyncConnection[DictRow], webhook: Webhook) -> float:
        """Send everything that is due and return how many seconds to wait for a notification."""
        while True:
            pause = await self._forward_one(conn, webhook)
            if pause is None:
                break
            # A failing webhook is given its pause whatever is notified meanwhile.
            await asyncio.sleep(pause)
        due = await (await conn.execute(query("look_at_next_alert"), {"give_up_days": GIVE_UP_DAYS})).fetchone()
        seconds = None if due is None else due["seconds"]
        # What is due already, somebody else's transaction holds.
        return self._look_seconds if seconds is None else min(self._look_seconds, max(_HELD_SECONDS, seconds))

    async def _forward_one(self, conn: psycopg.AsyncConnection[DictRow], webhook: Webhook) -> float | None:
        """Send the next alert that is due. Return the seconds to pause before the one after it, or None if none was due."""
        async with conn.transaction():
            row = await (await conn.execute(query("take_alert"), {"give_up_days": GIVE_UP_DAYS})).fetchone()
            if row is None:
                return None
            try:
                await webhook.post(_payload(row), idempotency_key=str(row["idempotency_key"]))
            except DocmillError as error:
                delay, pause = self._back_off(row["attempts"], error)
                await conn.execute(query("alert_was_refused"), {"id": row["id"], "error": describe(error), "delay": delay})
                logger.warning("Alert {} was not forwarded, going on in {:.1f} s: {}", row["id"], pause, describe(error))
                return pause
            await conn.execute(query("alert_was_forwarded"), {"id": row["id"]})
        self._failures = 0
        return 0.0

    def _back_off(self, attempts: int, error: DocmillError) -> tuple[float, float]:
        """Return the seconds until this alert is tried again, and until any is.

        The one who waits goes behind all others that are due, so that an alert which the webhook never accepts holds up none of them.
        """
        longest = _LONGEST_REFUSED_PAUSE if error.error_type is ErrorType.PERMANENT else _LONGEST_ALERT_PAUSE
        pause = calculate_backoff(self._failures, 1.0, _LONGEST_PAUSE)
        if isinstance(error, RateLimitError) and error.retry_after is not None:
            pause = max(pause, min(error.retry_after, _LONGEST_REFUSED_PAUSE))
        self._failures += 1
        return calculate_backoff(attempts, 1.0, longest), pause


def _payload(row: DictRow) -> dict[str, Any]:
    """Return what is posted. `text` says it in one line, for chat services that show that."""
    return {
        "id": row["id"],
        "idempotency_key": str(row["idempotency_key"]),
        "at": row["at"].isoformat(),
        "kind": row["kind"],
        "message": row["message"],
        "detail": row["detail"],
        "text": f"docmill: {row['kind']}: {row['message']}",
    }
