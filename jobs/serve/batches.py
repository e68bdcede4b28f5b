"""Batches with their progress."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jobs.serve.paging import ROWS, key_of, paged, text_of
from jobs.serve.reading import Database
from jobs.serve.rendering import rendering_of
from models.stages import State

_PER_PAGE = 25  # each batch's documents are counted


async def batches(request: Request) -> Response:
    """List batches, the newest first."""
    database: Database = request.app.state.parts.database
    async with database.look() as look:
        rows = await look.rows("page_batches", before=key_of(request), limit=_PER_PAGE + 1)
    return rendering_of(request).page(request, "batches.html", page=paged(request, rows, "id", limit=_PER_PAGE))


async def batch(request: Request) -> Response:
    """Show one batch and its documents."""
    database: Database = request.app.state.parts.database
    batch_id, state = text_of(request, "id"), text_of(request, "state")
    if state and state not in {known.value for known in State}:
        raise HTTPException(400, "There is no such state.")
    async with database.look() as look:
        found = await look.row("page_batch", batch_id=batch_id)
        if found is None:
            raise HTTPException(404, "There is no batch of that name.")
        rows = await look.rows("page_batch_documents", batch_id=batch_id, state=state or None, after=key_of(request) or 0, limit=ROWS + 1)
    whole = f"{found['source_path']}/"
    shown = [row | {"inside": (row["source_path"] or "").removeprefix(whole)} for row in rows]
    page = paged(request, shown, "id", keep=("id", "state"))
    return rendering_of(request).page(request, "batch.html", batch=found, page=page, state=state, states=[known.value for known in State])


ROUTES = [Route("/batches", batches), Route("/batch", batch)]
