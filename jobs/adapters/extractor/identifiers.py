"""E-mail addresses, web addresses and IBANs in a text. Every pattern is linear: possessive or bounded."""

from __future__ import annotations

import re
from collections.abc import Iterator

_EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9](?:[A-Za-z0-9._%+-]{0,63})@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,62}+)\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9_-])"
)
_URL = re.compile(r"(?<![A-Za-z])(?:https?|ftp)://[^\s<>\"'`|\\^{}\[\]]{3,2000}+")
_IBAN = re.compile(r"[A-Z](?<![A-Za-z0-9].)[A-Z][0-9]{2}(?:[ \u00a0]?[A-Z0-9]{4}){2,7}(?:[ \u00a0]?[A-Z0-9]{1,3})?(?![A-Za-z0-9])")


def find_emails(text: str) -> Iterator[str]:
    """Yield e-mail addresses, in lower case."""
    if "@" in text:
        for match in _EMAIL.finditer(text):
            yield match[0].lower()


def find_urls(text: str) -> Iterator[str]:
    """Yield http, https and ftp addresses without the punctuation of the sentence around them."""
    if "://" in text:
        for match in _URL.finditer(text):
            url = match[0].rstrip(".,;:!?*_")
            while url.endswith(")") and url.count("(") < url.count(")"):
                url = url[:-1].rstrip(".,;:!?*_")
            yield url


def find_ibans(text: str) -> Iterator[str]:
    """Yield bank account numbers whose check digits hold, without spaces."""
    for match in _IBAN.finditer(text):
        iban = "".join(match[0].split())
        if 15 <= len(iban) <= 34 and int("".join(str(int(character, 36)) for character in iban[4:] + iban[:4])) % 97 == 1:
            yield iban
