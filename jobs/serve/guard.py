"""What every request passes before a page sees it: the name it used for us, who it is, where a form comes from; headers for all answers."""

from __future__ import annotations

import ipaddress
import secrets
import time
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from markupsafe import Markup
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobs.serve.sessions import Sessions, Slowdown
from jobs.transport import is_loopback
from models.settings import Settings

COOKIE = "docmill_session"
OPEN_PATHS = ("/healthz", "/readyz", "/login", "/static/")
"""What needs no session; /readyz tells nothing but its status then."""
_BEARER_PATHS = ("/metrics", "/readyz")
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # with no-referrer, forms would come with Origin: null
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-store",
}


def host_names(settings: Settings) -> frozenset[str] | None:
    """Return the names that requests may use for this server; None for any.

    A page from elsewhere can make a browser believe that its own name is ours (DNS rebinding). Where nobody signs in, the name is all that
    tells such a request from our own.
    """
    given = frozenset((settings.serve_allowed_hosts or "").split(",")) - {""}
    if given or is_loopback(settings.serve_host):
        return given | {"localhost", "127.0.0.1", "::1", settings.serve_host.lower()}
    return None


def name_of(host: str) -> str:
    """Return the name in a Host header, in lower case, without port and brackets; empty for one that is none."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


@dataclass(slots=True)
class Visitor:
    """Who a request comes from; `request.state.visitor`."""

    id: str
    """Value of the cookie, made up for who has none."""
    allowed: bool
    """Whether everything may be shown."""
    is_new: bool = False
    """Whether the cookie must be set."""


@dataclass(slots=True)
class Guard:
    """ASGI middleware around the whole application."""

    app: ASGIApp
    sessions: Sessions
    slowdown: Slowdown
    hosts: frozenset[str] | None
    """Names that requests may use; None for any."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer it here."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive)
        visitor = self._visitor(request)
        scope.setdefault("state", {})["visitor"] = visitor

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                if visitor.is_new and scope["path"] not in ("/healthz", "/readyz", "/metrics") and not scope["path"].startswith("/static/"):
                    headers.append("Set-Cookie", cookie(visitor.id, secure=request.url.scheme == "https"))
            await send(message)

        answer = self._refusal(request, visitor)
        await (answer or self.app)(scope, receive, send_guarded)

    def _visitor(self, request: Request) -> Visitor:
        now = time.monotonic()
        known = _cookie_of(request.headers)
        if known is not None and self.sessions.is_open(known, now):
            return Visitor(known, allowed=True)
        visitor = Visitor(known or secrets.token_urlsafe(32), allowed=not self.sessions.needed, is_new=known is None)
        bearer = _bearer_of(request.headers)
        if bearer is not None and self.sessions.needed and request.url.path.startswith(_BEARER_PATHS):
            address = address_of(request)
            if self.slowdown.wait(address, now) == 0:
                visitor.allowed = self.sessions.is_token(bearer)
                if not visitor.allowed:
                    self.slowdown.failed(address, now)
        return visitor

    def _refusal(self, request: Request, visitor: Visitor) -> Response | None:
        """Return the answer to a request that may not pass; None for one that may."""
        path = request.url.path
        if path == "/healthz":
            return None
        if self.hosts is not None and name_of(request.headers.get("host", "")) not in self.hosts:
            visitor.allowed = False
            if path != "/readyz":
                return PlainTextResponse("This server does not go by that name; SERVE_ALLOWED_HOSTS lists the names that it does.\n", 421)
        if visitor.is_new and _comes_by_a_foreign_link(request):
            visitor.is_new = False
            return _come_again(request)
        if request.method not in ("GET", "HEAD") and not self._from_our_own_page(request):
            return PlainTextResponse("This form did not come from a page of this server.\n", 403)
        if visitor.allowed or path.startswith(OPEN_PATHS):
            return None
        return self._sign_in_first(request)

    def _sign_in_first(self, request: Request) -> Response:
        path = request.url.path
        if path.startswith(_BEARER_PATHS):
            wait = self.slowdown.wait(address_of(request), time.monotonic())
            if wait:
                return PlainTextResponse("Too many wrong tokens.\n", 429, {"Retry-After": f"{wait + 0.5:.0f}"})
            return PlainTextResponse("A token is needed: Authorization: Bearer SERVE_TOKEN\n", 401, {"WWW-Authenticate": "Bearer"})
        if request.headers.get("x-fragment"):
            return PlainTextResponse("Signed out.\n", 401)
        if request.method not in ("GET", "HEAD"):
            return RedirectResponse("/login", 303)  # whoever has signed in asks for pages, and a form's address is none
        target = path + (f"?{request.url.query}" if request.url.query else "")
        return RedirectResponse(f"/login?next={quote(target, safe='')}" if path != "/" else "/login", 303)

    def _from_our_own_page(self, request: Request) -> bool:
        """Say whether the browser, where it tells, says that a form was sent by a page of ours."""
        if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return False
        origin, host = request.headers.get("origin"), request.headers.get("host", "")
        if origin is None:
            return True
        scheme, _, netloc = origin.lower().partition("://")
        # Behind a proxy the Host header may be the proxy's name for us.
        return scheme in ("http", "https") and (netloc == host.lower() or (self.hosts is not None and name_of(netloc) in self.hosts))


def cookie(value: str, *, secure: bool, max_age: int | None = None) -> str:
    """Return a Set-Cookie header for the session. Scripts cannot read it and no other site's link or form brings it along."""
    parts = [f"{COOKIE}={value}", "Path=/", "HttpOnly", "SameSite=Strict"]
    if max_age is not None:
        parts.append(f"Max-Age={max_age}")
    if secure:
        parts.append("Secure")
    return "; ".join(parts)


def our_own(target: str) -> str:
    """Return where to go on, if it is an address of this server's own; else the first page."""
    if not target.startswith("/") or target.startswith(("//", "/\\")) or not target.isprintable() or "\\" in target:
        return "/"
    return target


def address_of(request: Request) -> str:
    """Return where a request comes from, as far as slowing it down goes: an IPv6 host has its whole network to guess from."""
    host = request.client.host if request.client is not None else ""
    try:
        address = ipaddress.ip_address(host.split("%")[0])
    except ValueError:
        return host
    return str(ipaddress.ip_network((address, 64), strict=False)) if address.version == 6 else str(address)


def _cookie_of(headers: Headers) -> str | None:
    for part in headers.get("cookie", "").split(";"):
        name, _, value = part.strip().partition("=")
        if name == COOKIE and 20 <= len(value) <= 100 and value.replace("-", "").replace("_", "").isalnum() and value.isascii():
            return value
    return None


def _bearer_of(headers: Headers) -> str | None:
    kind, _, value = headers.get("authorization", "").partition(" ")
    return value.strip() if kind.lower() == "bearer" else None


def _comes_by_a_foreign_link(request: Request) -> bool:
    told = request.headers.get("sec-fetch-site"), request.headers.get("sec-fetch-dest")
    return request.method == "GET" and told == ("cross-site", "document")


def _come_again(request: Request) -> Response:
    """Have the browser ask again from a page of ours: coming from another site it leaves its cookie at home (SameSite=Strict)."""
    target = our_own(request.url.path + (f"?{request.url.query}" if request.url.query else ""))
    refresh = Markup('<meta http-equiv="refresh" content="0;url={}">').format(target)
    link = Markup('<a href="{}">Go on</a>').format(target)
    return HTMLResponse(f'<!DOCTYPE html><html lang="en"><title>docmill</title>{refresh}{link}')
