"""The ASGI application: what is at which address, and what is shown when something goes wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files

import psycopg
from loguru import logger
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from jobs.health import COMPONENTS
from jobs.redaction import describe
from jobs.serve import batches, documents, letters, overview, search, signing, workers
from jobs.serve.alarms import keep_watch
from jobs.serve.examining import Doctor, all_work
from jobs.serve.guard import Guard, host_names
from jobs.serve.metrics import SCRAPE_SECONDS, Meter
from jobs.serve.reading import Database, DatabaseAway, TooSlow
from jobs.serve.rendering import Rendering, rendering_of, visitor_of
from jobs.serve.sessions import Sessions, Slowdown
from models.settings import Settings

_COUNT_SECONDS = 15.0  # between two looks for new events while nobody scrapes
_LARGEST_FORM = 65_536  # bytes
_LONGEST_SCRAPE = 60.0  # seconds


@dataclass(slots=True)
class Parts:
    """What the pages work with; `request.app.state.parts`."""

    settings: Settings
    database: Database
    doctor: Doctor
    meter: Meter
    sessions: Sessions
    slowdown: Slowdown
    rendering: Rendering


def make_app(settings: Settings) -> ASGIApp:
    """Return the application. It connects to the database when it starts, or as soon as that is there."""
    database = Database(settings)
    doctor = Doctor(settings)
    token = None if settings.serve_token is None else settings.serve_token.get_secret_value()
    sessions = Sessions(token, seconds=settings.serve_session_hours * 3600)
    slowdown = Slowdown()
    parts = Parts(settings, database, doctor, Meter(database, doctor), sessions, slowdown, Rendering(settings, sessions))
    app = Starlette(
        routes=_routes(),
        exception_handlers={
            HTTPException: _not_shown,
            DatabaseAway: _database_away,
            TooSlow: _too_slow,
            psycopg.Error: _refused,
            Exception: _unforeseen,
        },
        lifespan=lambda _: _lifespan(parts),
        max_body_size=_LARGEST_FORM,
    )
    app.state.parts = parts
    return Guard(app, sessions, slowdown, host_names(settings))


def _routes() -> list[Route | Mount]:
    static = StaticFiles(directory=str(files("jobs.serve").joinpath("static")))
    return [
        Route("/healthz", healthz),
        Route("/readyz", readyz),
        Route("/metrics", metrics),
        *signing.ROUTES,
        *overview.ROUTES,
        *batches.ROUTES,
        *documents.ROUTES,
        *workers.ROUTES,
        *search.ROUTES,
        *letters.ROUTES,
        Mount("/static", static, name="static"),
    ]


@asynccontextmanager
async def _lifespan(parts: Parts) -> AsyncIterator[None]:
    background = [asyncio.create_task(_keep_counting(parts)), asyncio.create_task(keep_watch(parts.settings, parts.database))]
    try:
        yield
    finally:
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        await parts.database.close()


async def _keep_counting(parts: Parts) -> None:
    await parts.database.keep_trying()
    for found in await parts.doctor.examine():
        if found.name == "migrations" and found.health == "down":
            logger.warning("The schema is not the present one, so the pages show nothing yet: {}", found.message)
    while True:
        try:
            await parts.meter.catch_up()
        except Exception as error:
            logger.error("Counting events for /metrics failed: {}", describe(error))
        await asyncio.sleep(_COUNT_SECONDS)


async def healthz(_: Request) -> Response:
    """Say that this process answers."""
    return PlainTextResponse("ok\n")


async def readyz(request: Request) -> Response:
    """Say whether documents that are submitted now will be worked on, and how each component is: 200 or 503.

    `?only=database,storage` judges by those alone.
    """
    components = await request.app.state.parts.doctor.examine()
    only = {name for name in request.query_params.get("only", "").split(",") if name}
    if unknown := only - set(COMPONENTS):
        raise HTTPException(400, f"There is no component {sorted(unknown)[0][:50]!r}; there are {', '.join(COMPONENTS)}.")
    ready = all_work(components, only)
    told: dict[str, object] = {"ready": ready}
    if visitor_of(request).allowed:
        told["components"] = {
            found.name: {"health": found.health, "message": found.message, "detail": found.detail} for found in components
        }
    return rendering_of(request).json(told, 200 if ready else 503)


async def metrics(request: Request) -> Response:
    """Return Prometheus' text a second before the scraper gives up."""
    try:
        within = max(1.0, float(request.headers.get("x-prometheus-scrape-timeout-seconds", "")) - 1)
    except ValueError:
        within = SCRAPE_SECONDS
    text = await request.app.state.parts.meter.text(within=min(within, _LONGEST_SCRAPE))
    return Response(text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


async def _not_shown(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    titles = {404: "There is nothing here", 405: "Not that way", 413: "Too much", 403: "Not allowed"}
    return rendering_of(request).trouble(request, error.status_code, titles.get(error.status_code, "That did not work"), error.detail)


def _can_be_repeated(request: Request) -> bool:
    """Say whether a browser may ask again by itself: for a form it would ask for a page that is not there."""
    return request.method == "GET"


async def _database_away(request: Request, error: Exception) -> Response:
    what_now = "This page tries again by itself." if _can_be_repeated(request) else "Go back, reload the page and see what was done."
    return rendering_of(request).trouble(
        request, 503, "The database is away", f"{describe(error)} {what_now}", again=_can_be_repeated(request)
    )


async def _too_slow(request: Request, error: Exception) -> Response:
    return rendering_of(request).trouble(request, 504, "The database is slow", describe(error))


async def _refused(request: Request, error: Exception) -> Response:
    logger.error("The database refused what {} asked: {}", request.url.path, describe(error))
    if isinstance(error, psycopg.errors.UndefinedTable | psycopg.errors.UndefinedColumn | psycopg.errors.UndefinedFunction):
        return rendering_of(request).trouble(
            request, 503, "The schema is not current", "Run `docmill migrate`.", again=_can_be_repeated(request)
        )
    if isinstance(error, psycopg.errors.InsufficientPrivilege):
        return rendering_of(request).trouble(request, 403, "The database does not allow this", describe(error))
    return rendering_of(request).trouble(request, 500, "The database refused", describe(error))


async def _unforeseen(request: Request, _: Exception) -> Response:
    # uvicorn logs it with its traceback
    return rendering_of(request).trouble(request, 500, "Something unforeseen happened", "The log of this server says more.")
