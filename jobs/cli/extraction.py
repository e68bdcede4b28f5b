"""`docmill extract`: have failed extractions tried again."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.cli.errors import ExitCode
from jobs.cli.output import complain, print_json, say
from jobs.cli.session import quiet_logs, rows, run_async
from jobs.records import retry_extraction_async
from models.errors import OperationRefused, SubmitConflict
from models.settings import Settings, load_settings

AT_A_TIME = 100
"""Documents that one transaction of `--all` takes up again; their passages and vectors are copied."""


def requeue_some(doc_ids: Sequence[str], *, json: bool) -> ExitCode:
    """Requeue the extraction of the documents; one that cannot be is reported and keeps no other from it."""
    settings = load_settings()
    quiet_logs(settings)
    return run_async(_some(doc_ids, json=json))


def requeue_all(batch_id: str | None, user_id: str | None, *, json: bool) -> ExitCode:
    """Requeue all failed extractions that match."""
    settings = load_settings()
    quiet_logs(settings)
    return run_async(_all(settings, batch_id, user_id, json=json))


async def _some(doc_ids: Sequence[str], *, json: bool) -> ExitCode:
    done, refused = [], []
    for doc_id in dict.fromkeys(doc_ids):
        try:
            stage = await retry_extraction_async(doc_id)
        except (OperationRefused, SubmitConflict) as error:
            refused.append({"doc_id": doc_id, "error": str(error)})
            complain(str(error))
            continue
        done.append({"doc_id": doc_id, "stage": stage})
        if not json:
            say(f"{doc_id}: goes on at {stage}")
    if json:
        print_json({"requeued": done, "refused": refused})
    return ExitCode.FAILED if refused else ExitCode.OK


async def _all(settings: Settings, batch_id: str | None, user_id: str | None, *, json: bool) -> ExitCode:
    # Documents whose extraction fails once more meanwhile end later than this, so it comes to an end.
    filters = {"batch_id": batch_id, "user_id": user_id, "ended_before": (await rows(settings, "look_at_clock"))[0]["at"]}
    count = 0
    while made := (await rows(settings, "requeue_extractions", max_count=AT_A_TIME, **filters))[0]["requeued"]:
        count += made
    if batch_id is not None and count:
        await rows(settings, "reopen_batch", batch_id=batch_id)
    if json:
        print_json({"requeued": count})
    else:
        say(f"{count} extraction{'' if count == 1 else 's'} requeued")
    return ExitCode.OK
