"""All SQL that the program runs: named queries, loaded once from `queries/*.sql`, and the migrations."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from typing import LiteralString, cast

_HEADER = re.compile(r"^-- name: (\w+)$", re.MULTILINE)
# psycopg parses a statement of more than 4,096 bytes anew each time. Lines that are comments from their beginning are not sent.
_COMMENT = re.compile(r"^ *--(?! name: ).*\n", re.MULTILINE)


@cache
def _all() -> dict[str, LiteralString]:
    found: dict[str, LiteralString] = {}
    for path in sorted(files("sql").joinpath("queries").iterdir(), key=lambda p: p.name):
        parts = _HEADER.split(_COMMENT.sub("", path.read_text(encoding="utf-8")))
        for name, text in zip(parts[1::2], parts[2::2], strict=True):
            if name in found:
                raise ValueError(f"{path.name}: the query {name} is defined twice")
            # The files ship with the package and hold no caller's text, so they are as literal as if they stood here.
            found[name] = cast(LiteralString, text.strip())
    return found


def query(name: str) -> LiteralString:
    """Return the text of a named query, with psycopg's `%(name)s` parameters and without comments; an unknown name is a KeyError."""
    return _all()[name]
