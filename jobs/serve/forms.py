"""Forms that people send."""

from __future__ import annotations

from urllib.parse import parse_qs

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from jobs.serve.rendering import visitor_of

_MOST_FIELDS = 1000


async def form_of(request: Request) -> dict[str, list[str]]:
    """Return the fields of a form from a page that this visitor was shown. 400 for what is no form, 403 for one from elsewhere."""
    if not request.headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
        raise HTTPException(400, "This is not a form.")
    try:
        body = (await request.body()).decode("ascii")
        fields = parse_qs(body, keep_blank_values=True, max_num_fields=_MOST_FIELDS)
    except ClientDisconnect:
        raise HTTPException(400, "The form did not come whole.") from None
    except ValueError:
        raise HTTPException(400, "This is not a form.") from None
    given = fields.get("csrf", [""])[0]
    if not request.app.state.parts.sessions.is_form_token(visitor_of(request).id, given):
        raise HTTPException(403, "This form is too old or was made elsewhere. Go back, reload the page and send it again.")
    return fields
