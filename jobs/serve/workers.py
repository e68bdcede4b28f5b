"""Workers, and outside services with what they cost."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jobs.serve.charts import lines
from jobs.serve.reading import Database
from jobs.serve.rendering import rendering_of


async def workers(request: Request) -> Response:
    """List the workers with what they hold."""
    database: Database = request.app.state.parts.database
    return rendering_of(request).page(request, "workers.html", workers=await database.shared("page_workers"))


async def providers(request: Request) -> Response:
    """List outside services: breaker, budget, calls and cost."""
    database: Database = request.app.state.parts.database
    days = await database.shared("page_cost_by_day", seconds=30)
    labels = [row["day"].strftime("%m-%d") for row in days]
    return rendering_of(request).page(
        request,
        "providers.html",
        services=await database.shared("page_providers", seconds=5),
        days=days,
        chart=lines(labels, {"cost": [row["cost"] for row in days]}, title="Cost of each day"),
        dearest=await database.shared("page_dearest_documents", limit=10, seconds=30),
        calls=await database.shared("page_failed_calls", limit=20, seconds=5),
    )


ROUTES = [Route("/workers", workers), Route("/providers", providers)]
