"""Who may come in: signed-in sessions, tokens of forms, and the slowing down of those who guess. Pure: no I/O, time is given."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections import OrderedDict
from dataclasses import dataclass

MOST_SESSIONS = 1000
_MOST_ADDRESSES = 10_000
_FREE_FAILURES = 3
_FIRST_PAUSE = 5.0  # seconds
_LONGEST_PAUSE = 60.0  # seconds
_FORGET = 900.0  # seconds after which failures are forgotten


class Sessions:
    """Sessions of this process. A cookie holds a random id that means nothing elsewhere; a restart signs everybody out."""

    def __init__(self, token: str | None, *, seconds: float) -> None:
        """`token` is the one to sign in with; None lets everybody in. A session lasts `seconds`."""
        self._digest = None if token is None else _digest(token)
        self._seconds = seconds
        self._form_key = secrets.token_bytes(32)
        self._until: OrderedDict[str, float] = OrderedDict()

    @property
    def needed(self) -> bool:
        """Whether anybody has to sign in at all."""
        return self._digest is not None

    def is_token(self, given: str) -> bool:
        """Compare a token in constant time."""
        return self._digest is not None and hmac.compare_digest(_digest(given), self._digest)

    def begin(self, now: float) -> str:
        """Return the id of a new signed-in session. The oldest one goes when there are too many."""
        session = secrets.token_urlsafe(32)
        self._until[session] = now + self._seconds
        while len(self._until) > MOST_SESSIONS:
            self._until.popitem(last=False)
        return session

    def is_open(self, session: str | None, now: float) -> bool:
        """Say whether a cookie's session is signed in."""
        return session is not None and self._until.get(session, 0.0) > now

    def end(self, session: str | None) -> None:
        """Sign a session out."""
        if session is not None:
            self._until.pop(session, None)

    def form_token(self, visitor: str) -> str:
        """Return what a form must bring back, for one visitor's cookie alone."""
        return hmac.new(self._form_key, visitor.encode(), hashlib.sha256).hexdigest()

    def is_form_token(self, visitor: str | None, given: str) -> bool:
        """Compare a form's token in constant time."""
        return visitor is not None and hmac.compare_digest(self.form_token(visitor).encode(), given.encode())


def _digest(token: str) -> bytes:
    # Of equal length whatever is given, so that the comparison tells nothing of the token's length either.
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


@dataclass(slots=True)
class _Failures:
    count: int
    last_at: float


class Slowdown:
    """Makes an address that has failed to sign in wait, longer with each failure. While it waits nothing it brings is looked at."""

    def __init__(self) -> None:
        self._failures: OrderedDict[str, _Failures] = OrderedDict()

    def wait(self, address: str, now: float) -> float:
        """Return the seconds until this address may try again; 0 for at once."""
        known = self._failures.get(address)
        if known is None or known.count < _FREE_FAILURES:
            return 0.0
        pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** (known.count - _FREE_FAILURES))
        return max(0.0, known.last_at + pause - now)

    def failed(self, address: str, now: float) -> None:
        """Note a failure."""
        known = self._failures.pop(address, None)
        count = 1 if known is None or now - known.last_at > _FORGET else known.count + 1
        self._failures[address] = _Failures(count, now)
        while len(self._failures) > _MOST_ADDRESSES:
            self._failures.popitem(last=False)

    def succeeded(self, address: str) -> None:
        """Forget the failures of an address."""
        self._failures.pop(address, None)
