"""Documents: the list, one document's story, and its passages."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jobs.serve.paging import ROWS, key_of, paged, text_of
from jobs.serve.reading import Database, Row
from jobs.serve.rendering import rendering_of
from models.stages import STAGES, State

_PASSAGES = 20
_EVENTS = 100


async def documents(request: Request) -> Response:
    """List documents, the newest first; of one state if asked for."""
    database: Database = request.app.state.parts.database
    state = text_of(request, "state")
    if state and state not in {known.value for known in State}:
        raise HTTPException(400, "There is no such state.")
    async with database.look() as look:
        name = "page_documents_of_state" if state else "page_documents"
        rows = await look.rows(name, state=state, before=key_of(request), limit=ROWS + 1)
    states = [known.value for known in State]
    return rendering_of(request).page(
        request, "documents.html", page=paged(request, rows, "id", keep=("state",)), state=state, states=states
    )


async def document(request: Request) -> Response:
    """Show one document: facts, what comes next, timeline, passages, cost."""
    database: Database = request.app.state.parts.database
    doc_id = text_of(request, "id")
    async with database.look() as look:
        found = await look.row("page_document", doc_id=doc_id)
        events = await look.rows("page_events", doc_id=doc_id, before=key_of(request, "before"), limit=_EVENTS + 1)
        if found is None and not events:
            raise HTTPException(404, "There is no document of that doc_id.")
        outlook = await look.row("page_what_next", doc_id=doc_id)
        letters = await look.rows("page_letters_of_document", doc_id=doc_id)
        cost = await look.rows("page_cost_of_document", doc_id=doc_id)
        passages = await look.rows(
            "page_passages", doc_id=doc_id, after=key_of(request) if key_of(request) is not None else -1, limit=_PASSAGES + 1
        )
    return rendering_of(request).page(
        request,
        "document.html",
        doc_id=doc_id,
        document=found,
        steps=_steps(found),
        outlook=outlook,
        letters=letters,
        events=events[:_EVENTS][::-1],
        older=events[_EVENTS - 1]["id"] if len(events) > _EVENTS else None,
        cost=cost,
        passages=paged(request, passages, "chunk_index", keep=("id",), limit=_PASSAGES),
    )


def _steps(found: Row | None) -> list[tuple[str, str]]:
    """Return each stage with how it stands: done, now, next or later."""
    if found is None:
        return []
    due = found["stage_due"]
    names = [stage.name for stage in STAGES]
    place = len(names) if due is None else names.index(due)
    here = {"working": "now", "queued": "next", "retrying": "retrying", "failed": "failed"}.get(found["state"], "later")
    return [(name, "done" if number < place else here if number == place else "later") for number, name in enumerate(names)]


ROUTES = [Route("/documents", documents), Route("/document", document)]
