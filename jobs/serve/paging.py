"""Pages of long lists by key: the last row of a page names where the next begins, however long the list is and whatever comes in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.requests import Request

from jobs.serve.reading import Row
from jobs.serve.rendering import link

ROWS = 50


@dataclass(frozen=True, slots=True)
class Paged:
    """One page of a list, and the addresses of the next one and of the first."""

    rows: Sequence[Row]
    following: str | None
    first: str | None


def key_of(request: Request, name: str = "after") -> int | None:
    """Return the key that a page begins after; None for the first page. 400 for what is no number."""
    given = request.query_params.get(name)
    if given is None or given == "":
        return None
    if not (given.isascii() and given.removeprefix("-").isdigit() and len(given) < 19):
        raise HTTPException(400, f"`{name}` is not the number of a row.")
    return int(given)


def text_of(request: Request, name: str, longest: int = 500) -> str:
    """Return a parameter as text that Postgres takes: no NUL, no lone surrogates, not too long."""
    given = request.query_params.get(name, "").replace("\x00", "").encode("utf-8", "replace").decode()
    return given[:longest].strip() if name == "q" else given[:longest]


def paged(request: Request, rows: Sequence[Row], key: str, *, keep: Sequence[str] = (), limit: int = ROWS) -> Paged:
    """Make a page of rows that were asked for with one more than `limit`; `keep` are the parameters that go on to the next."""
    kept = {name: text_of(request, name) for name in keep}
    following = link(request.url.path, **kept, after=rows[limit - 1][key]) if len(rows) > limit else None
    first = link(request.url.path, **kept) if "after" in request.query_params else None
    return Paged(rows[:limit], following, first)
