"""The search box: what a person may mean by some words."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jobs.serve.paging import text_of
from jobs.serve.reading import Database
from jobs.serve.rendering import rendering_of

_MOST = 20


async def search(request: Request) -> Response:
    """Find documents by doc_id or name, batches by id or folder, and passages by their words."""
    database: Database = request.app.state.parts.database
    words = text_of(request, "q", longest=200)
    found: dict[str, list[dict[str, object]]] = {"documents": [], "batches": [], "passages": []}
    if words:
        pattern = "%" + words.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%"
        async with database.look() as look:
            found["documents"] = await look.rows("page_find_documents", words=words, pattern=pattern, limit=_MOST)
            found["batches"] = await look.rows("page_find_batches", words=words, pattern=pattern, limit=_MOST)
            found["passages"] = await look.rows("page_find_passages", words=words, limit=_MOST)
    return rendering_of(request).page(request, "search.html", words=words, found=found)


ROUTES = [Route("/search", search)]
