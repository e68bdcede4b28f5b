"""Dead letters: the list, one with its traceback, and what an operator does about them."""

from __future__ import annotations

from datetime import datetime

import psycopg
from loguru import logger
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from jobs.redaction import describe
from jobs.serve.forms import form_of
from jobs.serve.guard import address_of, our_own
from jobs.serve.paging import ROWS, key_of, paged, text_of
from jobs.serve.reading import Database, DatabaseAway, TooSlow
from jobs.serve.rendering import link, rendering_of
from models.errors import ErrorType
from models.stages import STAGE_BY_NAME

_ACTIONS = {"requeue": "requeue_dead_letter", "discard": "discard_dead_letter"}
_REFUSALS = (psycopg.errors.NoDataFound, psycopg.errors.ObjectNotInPrerequisiteState, TooSlow)
_MOST_AT_ONCE = 500


async def letters(request: Request) -> Response:
    """List the open dead letters, the newest first."""
    database: Database = request.app.state.parts.database
    kind, stage = text_of(request, "error_type"), text_of(request, "stage")
    if (kind and kind not in set(ErrorType)) or (stage and stage not in STAGE_BY_NAME):
        raise HTTPException(400, "There is no such kind of failure, or no such stage.")
    async with database.look() as look:
        groups = await look.rows("metric_dead_letters")
        rows = await look.rows("page_letters", error_type=kind or None, stage=stage or None, before=key_of(request), limit=ROWS + 1)
    done = {name: count for name in ("requeued", "discarded") if (count := key_of(request, name)) is not None}
    page = paged(request, rows, "id", keep=("error_type", "stage"))
    return rendering_of(request).page(request, "letters.html", page=page, groups=groups, error_type=kind, stage=stage, done=done)


async def letter(request: Request) -> Response:
    """Show one dead letter with its traceback and context."""
    database: Database = request.app.state.parts.database
    async with database.look() as look:
        found = await look.row("show_dead_letter", id=key_of(request, "id"))
        advice = await look.row("page_letter_advice", id=key_of(request, "id"))
    if found is None:
        raise HTTPException(404, "There is no dead letter of that number.")
    return rendering_of(request).page(request, "letter.html", letter=found, advice=advice)


async def resolve(request: Request) -> Response:
    """Requeue or discard the letters that a form names, each in a transaction of its own; say which could not be."""
    parts = request.app.state.parts
    if parts.settings.serve_read_only:
        raise HTTPException(403, "This server only shows (SERVE_READ_ONLY).")
    fields = await form_of(request)
    action = fields.get("action", [""])[0]
    ids = [int(given) for given in dict.fromkeys(fields.get("id", [])) if given.isascii() and given.isdigit() and len(given) < 19]
    if action not in _ACTIONS or len(ids) > _MOST_AT_ONCE:
        raise HTTPException(400, "Choose what to do, and with at most 500 dead letters.")
    if not ids:
        raise HTTPException(400, "No dead letter was chosen.")
    refused, done = await _resolve(parts.database, action, ids)
    logger.info("Somebody at {} had {} of {} dead letters {}ed", address_of(request), done, len(ids), action.removesuffix("e"))
    if refused:
        return rendering_of(request).page(request, "refused.html", 409, refused=refused, done=done, action=action)
    back = our_own(fields.get("next", ["/dead-letters"])[0]).partition("?")[0]
    return RedirectResponse(link(back, **{f"{action.removesuffix('e')}ed": done}), 303)


async def _resolve(database: Database, action: str, ids: list[int]) -> tuple[list[tuple[int, str]], int]:
    """Return the numbers that could not be resolved with the reason, and how many were."""
    refused, done = [], 0
    [start] = await database.act("look_at_dead_letters")
    try:
        for place, number in enumerate(ids):
            try:
                await database.act(_ACTIONS[action], id=number, priority=None)
                done += 1
            except _REFUSALS as error:
                refused.append((number, describe(error)))
            except DatabaseAway as error:
                refused += [(left, describe(error)) for left in ids[place:]]
                break
    finally:
        if action == "requeue" and done:
            await _reopen_batches(database, start["at"])
    return refused, done


async def _reopen_batches(database: Database, since: datetime) -> None:
    try:
        # The batch row is never locked in a document's transaction.
        await database.act("reopen_batches", since=since)
    except (DatabaseAway, TooSlow, psycopg.Error) as error:
        logger.warning("The batches of what was requeued stay as they are until one of their documents ends: {}", describe(error))


ROUTES = [
    Route("/dead-letters", letters),
    Route("/dead-letter", letter),
    Route("/dead-letters/resolve", resolve, methods=["POST"]),
]
