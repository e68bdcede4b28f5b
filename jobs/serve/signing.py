"""Signing in and out."""

from __future__ import annotations

import time

from loguru import logger
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from jobs.serve.forms import form_of
from jobs.serve.guard import address_of, cookie, our_own
from jobs.serve.rendering import rendering_of, visitor_of


async def login(request: Request) -> Response:
    """Ask for the token, and compare it."""
    parts = request.app.state.parts
    following = our_own(request.query_params.get("next", "/"))
    if not parts.sessions.needed or visitor_of(request).allowed:
        return RedirectResponse(following, 303)
    if request.method != "POST":
        return rendering_of(request).page(request, "login.html", following=following, complaint="")
    fields = await form_of(request)
    following, now, address = our_own(fields.get("next", ["/"])[0]), time.monotonic(), address_of(request)
    wait = parts.slowdown.wait(address, now)
    if wait:
        answer = rendering_of(request).page(
            request, "login.html", 429, following=following, complaint=f"Too many tries: wait {wait + 0.5:.0f} s."
        )
        answer.headers["Retry-After"] = f"{wait + 0.5:.0f}"
        return answer
    if not parts.sessions.is_token(fields.get("token", [""])[0].strip()):
        parts.slowdown.failed(address, now)
        logger.warning("Somebody at {} tried to sign in with a wrong token", address)
        return rendering_of(request).page(request, "login.html", 403, following=following, complaint="That is not the token.")
    parts.slowdown.succeeded(address)
    answer = RedirectResponse(following, 303)
    session = parts.sessions.begin(now)
    answer.headers["Set-Cookie"] = cookie(session, secure=request.url.scheme == "https")
    return answer


async def logout(request: Request) -> Response:
    """End the session."""
    await form_of(request)
    request.app.state.parts.sessions.end(visitor_of(request).id)
    answer = RedirectResponse("/login", 303)
    answer.headers["Set-Cookie"] = cookie("", secure=request.url.scheme == "https", max_age=0)
    return answer


ROUTES = [Route("/login", login, methods=["GET", "POST"]), Route("/logout", logout, methods=["POST"])]
