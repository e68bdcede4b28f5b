"""Templates and how values are shown to people. Every value is escaped: the templates' environment does it, and no filter undoes it."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from importlib.resources import files
from typing import Any
from urllib.parse import urlencode

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from jobs.serve.guard import Visitor
from jobs.serve.sessions import Sessions
from jobs.visible import has_ink, visible
from models.settings import Settings

NAVIGATION = (
    ("/", "Overview"), ("/queues", "Queues"), ("/batches", "Batches"), ("/documents", "Documents"), ("/dead-letters", "Dead letters"),
    ("/workers", "Workers"), ("/providers", "Services"),
)  # fmt: skip
LONGEST_SHOWN = 20_000
"""Characters of one value that a page shows at most."""


def visitor_of(request: Request) -> Visitor:
    """Return who a request comes from."""
    visitor: Visitor = request.state.visitor
    return visitor


def rendering_of(request: Request) -> Rendering:
    """Return the rendering of the application that a request came to."""
    rendering: Rendering = request.app.state.parts.rendering
    return rendering


class Rendering:
    """Renders the pages of one application."""

    def __init__(self, settings: Settings, sessions: Sessions) -> None:
        self._settings = settings
        self._sessions = sessions
        self._templates = Environment(
            loader=FileSystemLoader(str(files("jobs.serve").joinpath("templates"))),
            autoescape=True,
            undefined=StrictUndefined,
            finalize=_visible,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters |= {
            "ago": ago, "duration": duration, "number": number, "size": size, "moment": moment, "iso": iso, "tidy": tidy, "data": data,
            "or_id": or_id,
            "money": money, "link": link,
        }  # fmt: skip

    def page(self, request: Request, template: str, /, status: int = 200, **values: Any) -> Response:
        """Render a template into an answer."""
        visitor = visitor_of(request)
        text = self._templates.get_template(template).render(
            values
            | {
                "path": request.url.path,
                "navigation": NAVIGATION,
                "csrf": self._sessions.form_token(visitor.id),
                "allowed": visitor.allowed,
                "signed_in": visitor.allowed and self._sessions.needed,
                "read_only": self._settings.serve_read_only,
                "now": datetime.now(UTC),
                "search_words": request.query_params.get("q", "")[:200] if request.url.path == "/search" else "",
            }
        )
        return HTMLResponse(text, status)

    def trouble(self, request: Request, status: int, title: str, message: str, *, again: bool = False) -> Response:
        """Say what went wrong, as a page or, to programs, as JSON."""
        if "text/html" not in request.headers.get("accept", "text/html") and "*/*" not in request.headers.get("accept", ""):
            return self.json({"error": title, "message": message}, status)
        answer = self.page(request, "trouble.html", status, title=title, message=message, again=again)
        if again:
            answer.headers["Retry-After"] = "5"
        return answer

    def json(self, value: object, status: int = 200) -> Response:
        """Return data."""
        text = json.dumps(value, ensure_ascii=False, indent=2, default=_plain) + "\n"
        return Response(text.encode("utf-8", "backslashreplace"), status, media_type="application/json")


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat()
    return float(value) if isinstance(value, Decimal) else str(value)


def number(value: float | Decimal | None) -> str:
    """Return a number with thousands separated; a dash for none."""
    if value is None:
        return "–"
    if float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(float(value)) >= 10 else f"{value:,.2f}"


def money(value: float | Decimal | None) -> str:
    """Return a price: enough digits for one call of a fraction of a cent."""
    if value is None:
        return "–"
    return f"{float(value):,.2f}" if value == 0 or abs(float(value)) >= 1 else f"{float(value):.6f}".rstrip("0")


def size(value: float | None) -> str:
    """Return bytes as people read them."""
    if value is None:
        return "–"
    amount, units = float(value), ["B", "kB", "MB", "GB", "TB"]
    while amount >= 1000 and len(units) > 1:
        amount, units = amount / 1000, units[1:]
    return f"{amount:.0f} {units[0]}" if units[0] == "B" or amount >= 100 else f"{amount:.1f} {units[0]}"


def duration(value: float | timedelta | Decimal | None) -> str:
    """Return seconds as people read them: `340 ms`, `2.5 s`, `3 min 20 s`, `5 h 12 min`, `3 d 4 h`."""
    if value is None:
        return "–"
    seconds = value.total_seconds() if isinstance(value, timedelta) else float(value)
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    for large, small, names in ((60, 1, "min s"), (3600, 60, "h min"), (86_400, 3600, "d h")):
        if seconds < large * 60 or large == 86_400:
            first, rest = divmod(int(seconds), large)
            words = names.split()
            return f"{first} {words[0]} {rest // small} {words[1]}" if first < 100 else f"{first:,} {words[0]}"
    return ""


def ago(value: datetime | None) -> str:
    """Return how long ago something was, or how soon it will be."""
    if value is None:
        return "–"
    seconds = (datetime.now(UTC) - value).total_seconds()
    if abs(seconds) < 1:
        return "now"
    return f"{_rough(seconds)} ago" if seconds > 0 else f"in {_rough(-seconds)}"


def _rough(seconds: float) -> str:
    for unit, name in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} s"


def moment(value: datetime | None) -> str:
    """Return a time in UTC to the second."""
    return "–" if value is None else value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")


def iso(value: datetime | None) -> str:
    """Return a time for programs."""
    return "" if value is None else value.astimezone(UTC).isoformat(timespec="milliseconds")


def tidy(value: object, longest: int = LONGEST_SHOWN) -> str:
    """Return text cut to a length; nothing for None."""
    text = "" if value is None else str(value)
    return text[:longest] + (f" … ({len(text):,} characters)" if len(text) > longest else "")


def or_id(file_name: str | None, doc_id: str) -> str:
    """Return a document's name, or its doc_id where there is none to be seen."""
    return file_name if file_name and has_ink(file_name) else doc_id


def _visible(value: Any) -> Any:
    """Make visible, in everything that a template puts out, what would turn or hide the letters around it."""
    return visible(value) if type(value) is str else value  # markup is a subclass, and was made by us


def data(value: object) -> str:
    """Return data as indented JSON; text is taken for such already."""
    if isinstance(value, str):
        return tidy(value)
    return tidy(json.dumps(value, ensure_ascii=False, indent=2, default=_plain))


def link(path: str, **params: object) -> str:
    """Return an address of ours with a query; names go there, because a doc_id may hold slashes and dots."""
    given = {key: str(value) for key, value in params.items() if value not in (None, "")}
    return f"{path}?{urlencode(given)}" if given else path
