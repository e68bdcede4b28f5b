"""What callers say, checked: names, metadata, priorities; and the doc_ids that are derived where none is given."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from psycopg.types.json import Jsonb

from models.errors import OperationRefused, SubmitError

DOCUMENT_NAMESPACE = uuid.UUID("6f0d2a3e-5b7c-5d1e-9a44-646f636d696c")
"""Namespace of derived doc_ids: UUIDv5 of user and absolute path, or of user and SHA-256 for bytes and open files."""


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_DEEPEST = 100
"""Levels of metadata: the table's limit."""
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")
"""In JSON: a backslash before it makes it six characters of their own."""


_WORDS = frozenset({"doc_id", "batch_id", "after", "reason"})
_UNSTORABLE = re.compile(r"[\x00\ud800-\udfff]")


def storable(words: str) -> str:
    """Return words as Postgres takes them: NUL and what is no Unicode become U+FFFD, as in the names of files."""
    return _UNSTORABLE.sub("\ufffd", words)


def as_key(word: str) -> str:
    """Return a word to look for an id by. One that no id can be finds none: what Postgres does not take becomes a control character, and no
    id has one."""
    return _UNSTORABLE.sub("\x01", word)


def lookup(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return what something is looked up by as Postgres takes it.

    OperationRefused for an id or reason that is no string: asking with it would end the transaction of a caller who gave a connection.
    """
    for name, value in params.items():
        if name in _WORDS and value is not None and not isinstance(value, str):
            raise OperationRefused(f"{name} must be a string, not {type(value).__name__}.")
    plain = {name: as_key(value) if isinstance(value, str) else value for name, value in params.items()}
    return plain | ({"reason": storable(params["reason"])} if params.get("reason") else {})


def derive_doc_id(user_id: str, what: str) -> str:
    """Return the UUIDv5 of a user and an absolute path, or of a user and a SHA-256."""
    return str(uuid.uuid5(DOCUMENT_NAMESPACE, f"{user_id}\n{what}"))


def absolute_path(path: str | os.PathLike[str]) -> Path:
    """Return a path from the root on, without `..`, links left as they are; SubmitError for what no path can be."""
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise SubmitError(f"A path is a string or a pathlib.Path, not {type(path).__name__}.")
    if not os.fspath(path):
        raise SubmitError("A path must not be empty.")
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:
        raise SubmitError(f"File {os.fspath(path)!r:.200} has a character in its name that no file name can have.") from error
    if "\0" in os.fspath(path):
        raise SubmitError(f"File {os.fspath(path)!r:.200} has a NUL character in its name, which no file name can have.")
    return Path(os.path.abspath(path))  # noqa: PTH100 - Path.absolute keeps `..`, Path.resolve follows links


def path_doc_id(user_id: str, path: Path) -> str:
    """Return the derived id of the document, folder or archive at an absolute path, also of one whose name is no UTF-8."""
    return derive_doc_id(user_id, str(path).encode("utf-8", "backslashreplace").decode())


def check_name(kind: str, value: str) -> str:
    """Return the value of a doc_id, user_id, batch_id or correlation_id if it has 1 to 200 characters and no control characters."""
    if not isinstance(value, str) or not 1 <= len(value) <= 200 or _CONTROL.search(value):
        raise SubmitError(f"{kind} {value!r} must be 1 to 200 characters without control characters.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise SubmitError(f"{kind} {value!r} has a character that is not valid Unicode.") from error
    return value


def check_metadata(metadata: Mapping[str, Any] | None) -> Jsonb:
    """Return a submitter's own data as Postgres takes it; SubmitError if it is no JSON object that Postgres can hold."""
    if metadata is not None and not isinstance(metadata, Mapping):
        raise SubmitError(f"metadata must be a mapping, not {type(metadata).__name__}.")
    try:
        text = json.dumps(dict(metadata or {}), allow_nan=False, ensure_ascii=False)
        text.encode()
        made = json.loads(text)
    except (TypeError, ValueError) as error:  # a UnicodeEncodeError is a ValueError
        raise SubmitError(f"metadata must be JSON: {error}.") from error
    except RecursionError:
        raise SubmitError(f"metadata must not be nested more than {_DEEPEST} levels deep.") from None
    _check_readable(made)
    if _NUL.search(text):
        raise SubmitError("metadata must not hold NUL characters: Postgres cannot store them.")
    return Jsonb(made)


def _check_readable(value: Any, level: int = 0) -> None:
    """Refuse what some reader of JSON gives up at: many levels, and numbers beyond what a double holds."""
    if level > _DEEPEST:
        raise SubmitError(f"metadata must not be nested more than {_DEEPEST} levels deep.")
    if isinstance(value, int | float) and abs(value) > 1e308:
        raise SubmitError("metadata must not hold numbers beyond 1e308.")
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_readable(each, level + 1)


def check_priority(priority: int) -> int:
    """Return a priority if it is a whole number of 32 bits."""
    if not isinstance(priority, int) or isinstance(priority, bool) or not -(2**31) <= priority < 2**31:
        raise SubmitError(f"priority {priority!r} must be a whole number of 32 bits.")
    return priority
