"""Names of archive entries: bytes in many encodings become paths for people, and those that would lead somewhere else are told apart."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterable, Sequence

from jobs.adapters.folders import is_hidden
from jobs.adapters.legacy_encoding import part_to_guess_by
from jobs.adapters.storage import storable_text
from jobs.adapters.zip_directory import DirectoryEntry

LONGEST_PATH = 1200
"""Bytes of an entry's path in UTF-8; a longer one is refused."""

_EAST_ASIAN = ("cp932", "gb18030", "big5", "cp949", "euc_jp")
_CYRILLIC = ("cp866", "cp1251", "koi8_r")
_WESTERN = ("cp437", "cp850", "cp1252", "cp1250")
_DRIVE = re.compile(r"[A-Za-z]:[/\\]")


def decode_names(entries: Sequence[DirectoryEntry]) -> list[str]:
    """Return the entries' names as text, in order.

    Each is UTF-8 where the archive or the bytes say so, or what the Unicode path field says. The others are in one legacy encoding, guessed
    over all of them together: few letters say little alone.
    """
    names = [_as_unicode(entry) for entry in entries]
    legacy = guess_legacy([entry.name for entry, name in zip(entries, names, strict=True) if name is None])
    return [entry.name.decode(legacy, errors="replace") if name is None else name for entry, name in zip(entries, names, strict=True)]


def _as_unicode(entry: DirectoryEntry) -> str | None:
    if entry.unicode_name is not None and not entry.utf8:
        return entry.unicode_name
    try:
        return entry.name.decode("utf-8")
    except UnicodeDecodeError:
        return None


def guess_legacy(names: Sequence[bytes]) -> str:
    """Return the Python name of the encoding that these names most likely are in; cp437, the format's own, where nothing speaks."""
    if not names:
        return "cp437"
    from charset_normalizer import from_bytes  # noqa: PLC0415 - slow to import, and most archives need no guess

    text = b"\n".join(names)
    best = from_bytes(part_to_guess_by(text), cp_isolation=[*_EAST_ASIAN, *_CYRILLIC, *_WESTERN], threshold=0.5).best()
    found = "cp437" if best is None else best.encoding
    if found == "big5" and _latin_letters(text, "gb2312") is not None:
        return "gb18030"  # of Big5's characters nearly half are none in GB 2312
    if found not in _WESTERN:
        return found
    # Single accented letters say too little to a language model, but few of their bytes are letters in the other code pages too.
    return max(_WESTERN, key=lambda encoding: -1 if (count := _latin_letters(text, encoding)) is None else count)


def _latin_letters(text: bytes, encoding: str) -> int | None:
    """Count the letters beyond ASCII that are Latin in an encoding; None if it is another one."""
    try:
        letters = [letter for letter in text.decode(encoding) if letter > "\x7f" and letter.isalpha()]
    except UnicodeDecodeError:
        return None
    return sum(unicodedata.name(letter, "").startswith("LATIN") for letter in letters)


def is_folder(name: str) -> bool:
    """Say whether a name is that of a folder."""
    return name.endswith(("/", "\\"))


def split_path(name: str) -> tuple[str, ...]:
    """Return the parts of a name, whatever its system's separator is, without empty ones and those that mean the same folder."""
    return tuple(part for part in name.replace("\\", "/").split("/") if part not in {"", "."})


def escapes(name: str) -> str | None:
    """Say in words how a name leads out of the folder that it would be unpacked into; None if it does not."""
    if ".." in split_path(name):
        return "its path leads out of the archive ('..')"
    if name.startswith(("/", "\\")) or _DRIVE.match(name):
        return "its path is absolute"
    return None


def is_system_file(name: str) -> bool:
    """Say whether a file, or a folder that it lies in, belongs to a system or program rather than to a person."""
    return any(is_hidden(part) for part in split_path(name))


def shown_path(name: str) -> str:
    """Return an entry's path for people and for storing: `/` between the parts, control characters visible."""
    if escapes(name):
        return storable_text(name.replace("\\", "/")) or "unnamed"
    return storable_text("/".join(split_path(name))) or "unnamed"


def tell_apart(paths: Iterable[str]) -> list[str]:
    """Return the paths with ` (2)`, ` (3)` and so on before the suffix of those that have come before, or are a folder of others too."""
    wanted = list(paths)
    ordered = sorted(wanted)
    taken = set(wanted)
    seen: dict[str, int] = {}
    return [_next_free(path, seen, taken, ordered) for path in wanted]


def _is_folder_of(path: str, ordered: Sequence[str]) -> bool:
    """Say whether one of the sorted paths lies below a path."""
    at = bisect_left(ordered, f"{path}/")
    return at < len(ordered) and ordered[at].startswith(f"{path}/")


def _next_free(path: str, seen: dict[str, int], taken: set[str], ordered: Sequence[str]) -> str:
    number = seen.get(path, 0) + 1
    seen[path] = number
    if number == 1:
        if not _is_folder_of(path, ordered):
            return path
        number = 2
    folder, slash, name = path.rpartition("/")
    stem, dot, suffix = name.rpartition(".")
    if not stem:
        stem, dot, suffix = name, "", ""
    while True:
        other = f"{folder}{slash}{stem} ({number}){dot}{suffix}"
        if other not in taken and not _is_folder_of(other, ordered):
            taken.add(other)
            seen[path] = number
            return other
        number += 1
