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

from models.errors import SubmitError

DOCUMENT_NAMESPACE = uuid.UUID("6f0d2a3e-5b7c-5d1e-9a44-646f636d696c")
"""Namespace of derived doc_ids: UUIDv5 of user and absolute path, or of user and SHA-256 for bytes and open files."""


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")
"""In JSON: a backslash before it makes it six characters of their own."""


def derive_doc_id(user_id: str, what: str) -> str:
    """Return the UUIDv5 of a user and an absolute path, or of a user and a SHA-256."""
    return str(uuid.uuid5(DOCUMENT_NAMESPACE, f"{user_id}\n{what}"))


def absolute_path(path: str | os.PathLike[str]) -> Path:
    """Return a path from the root on, without `..`, links left as they are; SubmitError for what no path can be."""
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
        raise SubmitError("metadata is nested too deeply.") from None
    if _NUL.search(text):
        raise SubmitError("metadata must not hold NUL characters: Postgres cannot store them.")
    return Jsonb(made)


def check_priority(priority: int) -> int:
    """Return a priority if it is a whole number of 32 bits."""
    if not isinstance(priority, int) or not -(2**31) <= priority < 2**31:
        raise SubmitError(f"priority {priority!r} must be a whole number of 32 bits.")
    return priority
