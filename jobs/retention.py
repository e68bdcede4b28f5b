"""Removing rows that have been kept long enough, in small transactions that hold up nobody.

What may go is decided by the settings *_RETENTION_DAYS and by `sql/queries/prune.sql`: never anything of a document that has not ended. A
window of rows is one transaction, and after it there is a pause as long as it took, so that pruning takes half of one connection's time at
most. One process prunes at a time; another one that tries stops at once. A run that was cut off has lost nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg.rows import dict_row

from jobs.alerts import GIVE_UP_DAYS
from jobs.reconcile import SIDE_TASKS
from models.settings import Settings
from models.stages import STAGES
from sql import query

WINDOW = 1000  # rows that one transaction looks at
SUMMARIES = 50  # of them, where these are summaries, of up to 30 MB each
_LOCK = 0x646F636D707275  # "docmpru" in ASCII: the key of the transaction advisory lock of the one that prunes
_PAUSE = 1.0  # seconds: the longest between two windows


@dataclass(frozen=True, slots=True)
class Policy:
    """What is pruned by one setting: a name for people, the setting, the query, and where its first window begins."""

    what: str
    setting: str
    query: str
    start: Any = 0
    params: dict[str, Any] = field(default_factory=dict)


TASKS = [*(stage.name for stage in STAGES), *SIDE_TASKS]
POLICIES = (
    Policy("finished jobs", "job_retention_days", "prune_jobs", params={"tasks": TASKS}),
    Policy("events of deleted documents", "deleted_event_retention_days", "prune_deleted_events", params={"window": 200}),
    Policy("events of documents", "event_retention_days", "prune_events"),
    Policy("resolved dead letters", "dead_letter_retention_days", "prune_dead_letters"),
    Policy("alerts", "alert_retention_days", "prune_alerts", params={"give_up_days": GIVE_UP_DAYS}),
    Policy("resolved alert conditions", "alert_retention_days", "prune_alert_conditions"),
    Policy("calls to outside services", "usage_retention_days", "prune_usage", start="-infinity"),
    Policy("costs of what is gone", "usage_retention_days", "prune_cost_totals", start=""),
    Policy("replaced archives", "archive_retention_days", "prune_archives"),
    Policy("summaries of earlier runs", "summary_retention_days", "prune_summaries", params={"window": SUMMARIES}),
)


class SomebodyElsePrunes(Exception):
    """Another process is pruning at this moment."""


def prune_rows(
    settings: Settings,
    conn: psycopg.Connection[Any],
    *,
    stop: Callable[[], bool] = lambda: False,
    dry_run: bool = False,
    pause: Callable[[float], None] = time.sleep,
) -> dict[str, int]:
    """Remove what the settings let go and return how many rows of what; jobs count without their events, which go with them.

    Summaries that still speak of deleted documents are noted, for a reconciler to renew, and files of archives, to be removed.

    `conn` is in autocommit mode. `stop` is asked between two windows. `dry_run`: everything is done and undone, window by window.
    SomebodyElsePrunes: at once, or when another process has come in between.
    """
    removed: dict[str, int] = {}
    for policy in POLICIES:
        days: int = getattr(settings, policy.setting)
        if days == 0:
            continue
        removed[policy.what] = 0
        for more in _parts(conn, policy):
            params = {"window": WINDOW, **policy.params, **more, "days": days, "after": policy.start}
            removed[policy.what] += _all_windows(conn, policy.query, params, stop=stop, dry_run=dry_run, pause=pause)
    if not dry_run:
        users = [row[0] for row in conn.execute(query("users_who_deleted")).fetchall()]
        if users:
            params = {"window": SUMMARIES, "users": users, "after": 0}
            _all_windows(conn, "note_missed_summaries", params, stop=stop, dry_run=False, pause=pause)
    return removed


def _all_windows(
    conn: psycopg.Connection[Any],
    name: str,
    params: dict[str, Any],
    *,
    stop: Callable[[], bool],
    dry_run: bool,
    pause: Callable[[float], None],
) -> int:
    """Go through a table from `after` on and return how many rows went."""
    removed = 0
    while not stop():
        began = time.monotonic()
        row = _window(conn, name, params, dry_run=dry_run)
        removed += row["removed"]
        if not row["more"]:
            break
        params = {**params, "after": row["next"]}
        pause(min(_PAUSE, time.monotonic() - began))
    return removed


def _parts(conn: psycopg.Connection[Any], policy: Policy) -> list[dict[str, Any]]:
    """Return the parameters that a policy is gone through with, one after another: the ledger is ordered by time within a service, its
    sums by name within a scope."""
    if policy.query == "prune_cost_totals":
        return [{"scope": "document"}, {"scope": "batch"}]
    if policy.query != "prune_usage":
        return [{}]
    return [{"service": row[0]} for row in conn.execute(query("usage_services")).fetchall()]


def _window(conn: psycopg.Connection[Any], name: str, params: dict[str, Any], *, dry_run: bool) -> dict[str, Any]:
    with conn.transaction(force_rollback=dry_run), conn.cursor(row_factory=dict_row) as cursor:
        begun = cursor.execute(query("begin_pruning"), {"key": _LOCK}).fetchone()
        if begun is None or not begun["alone"]:
            raise SomebodyElsePrunes
        row = cursor.execute(query(name), params).fetchone()
        assert row is not None
        return row
