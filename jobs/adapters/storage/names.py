"""File names that are kept as data and shown to people. They never become part of a path: there a digest stands for whom a file is."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from pathlib import Path, PurePosixPath

LONGEST_NAME = 255
_LONGEST_SUFFIX = 20
_LONGEST_READ = 4096
"""Characters at the end of a submitted name that are looked at: the longest path of common systems."""
_SEPARATORS = re.compile(r"[/\\]")
_SURROGATES = re.compile("[\ud800-\udfff]")
_UNSHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")
"""Control characters, line and paragraph separators, bidirectional controls, byte order mark."""
_ESCAPE = re.compile(r"\\(?:x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8}|[nrt])")


def safe_display_name(name: str) -> str:
    """Return the last component of a submitter's file name, at most 255 characters, fit to be stored, shown and logged.

    Control and bidirectional characters are dropped, bytes that were no UTF-8 become U+FFFD, and a long name keeps its suffix.
    """
    name = _SURROGATES.sub("\ufffd", _UNSHOWN.sub("", name[-_LONGEST_READ:]))
    parts = [part.strip() for part in _SEPARATORS.split(unicodedata.normalize("NFC", name))]
    name = next((part for part in reversed(parts) if part not in {"", ".", ".."}), "unnamed")
    if len(name) <= LONGEST_NAME:
        return name
    suffix = PurePosixPath(name).suffix
    if len(suffix) > _LONGEST_SUFFIX:
        suffix = ""
    return name[: LONGEST_NAME - len(suffix)] + suffix


def storable_path(path: Path) -> str:
    """Return a path as text that Postgres can hold and terminals can show: bytes that are no UTF-8 and control characters are escaped."""
    return storable_text(str(path))


def storable_text(text: str) -> str:
    """Do as `storable_path` does, for text that is no path of this system."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def restored_text(text: str) -> str:
    """Undo `storable_text`, for text whose own backslashes, if it had any, are gone."""
    return _ESCAPE.sub(lambda escape: escape[0].encode().decode("unicode_escape"), text)


def folder_name(doc_id: str) -> str:
    """Return what the folder for a document's files is called, or an archive's: nothing that a caller names becomes part of a path."""
    return hashlib.sha256(doc_id.encode()).hexdigest()
