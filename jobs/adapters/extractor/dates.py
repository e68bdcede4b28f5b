"""Dates in a text, normalised to ISO 8601.

Understood: 2024-03-01, 2024/03/01; 1.3.2024, 01. 03. 2024, 01.03.24; 01/03/2024, 01-03-2024; 1 March 2024, March 1st, 2024, 1. März 2024,
01-Mar-2024; March 2024 (becomes 2024-03). Month names in English, German, French and Spanish, full and in their usual abbreviations.

Day or month first: with dots the day comes first, as everywhere that dots are used. With slashes or hyphens a number over 12 decides for
itself; for the others the majority of those that decide in the same document decides, else the day is taken first. A date that only
this custom could decide is marked ambiguous. Two-digit years are 1970 to 2069.

A hyphen or slash joins two dates of numbers where it is not what stands inside them: 01.01.2024-31.12.2024, 2024-01-01/2024-02-01. Where
one of the two is no day there is, neither is a date: such numbers are part numbers more often.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date

_MONTHS = (
    "january jan januar jän jänner janvier enero",
    "february feb februar febr feber février febrero",
    "march mar märz maerz mrz mär mars marzo",
    "april apr avril abril",
    "may mai mayo",
    "june jun juni juin junio",
    "july jul juli juillet julio",
    "august aug août agosto",
    "september sep sept septembre septiembre",
    "october oct oktober okt octobre octubre",
    "november nov novembre noviembre",
    "december dec dezember dez décembre diciembre",
)
MONTH_NUMBERS = {name: number for number, names in enumerate(_MONTHS, start=1) for name in names.split()}
_MONTH = "|".join(sorted(MONTH_NUMBERS, key=len, reverse=True))
_STARTS = "".join(sorted({first for name in MONTH_NUMBERS for first in (name[0], name[0].upper())}))
_SPACE = r"[ \u00a0\u2009\u202f]"
_JOINED = r"(?:[12][0-9]{3}(?P=s7)[01]?[0-9](?P=s7)[0-3]?[0-9]|[0-3]?[0-9](?P=s7)[0-3]?[0-9](?P=s7)(?:[12][0-9]{3}|[0-9]{2}))"
"""One date of two that are joined; both have the separator `s7`."""
_DATE = re.compile(
    rf"""
    (?=[0-9{_STARTS}])(?<![\w./-])(?:
      (?P<y1>[12][0-9]{{3}})(?P<s1>[-/.])(?P<m1>[01]?[0-9])(?P=s1)(?P<d1>[0-3]?[0-9])(?=T[0-9]|(?!\w|[./-][0-9]))
    | (?P<a>[0-3]?[0-9])(?P<s2>[-/.])(?P<b>[0-3]?[0-9])(?P=s2)(?P<y2>[12][0-9]{{3}}|[0-9]{{2}})(?!\w|[./-][0-9])
    | (?P<d6>[0-3]?[0-9])\.{_SPACE}?(?P<m6>[01]?[0-9])\.{_SPACE}?(?P<y6>[12][0-9]{{3}})(?!\w|[./-][0-9])
    | (?=[0-9]{{1,4}}(?P<s7>[-/.]))(?P<from>{_JOINED})(?!(?P=s7))[-/](?P<to>{_JOINED})(?!\w|[./-][0-9])
    | (?P<d3>[0-3]?[0-9])(?:st|nd|rd|th|er|\.)?[\s-]{{0,3}}(?:of\s|de\s)?(?P<m3>{_MONTH})\b\.?,?[\s-]{{1,3}}(?:del?\s)?
      (?P<y3>[12][0-9]{{3}})(?!\w)
    | (?P<m4>{_MONTH})\b\.?\s{{1,3}}(?P<d4>[0-3]?[0-9])(?:st|nd|rd|th)?,?\s{{1,3}}(?P<y4>[12][0-9]{{3}})(?!\w)
    | (?P<m5>{_MONTH})\b\.?,?\s{{1,3}}(?:de\s)?(?P<y5>[12][0-9]{{3}})(?![\w]|[./-][0-9])
    )""",
    re.VERBOSE | re.IGNORECASE,
)
_YEAR = re.compile(r"[0-9](?:(?<=[12])(?<!\w[12])[0-9]{3}|[-/.][0-3]?[0-9][-/.][0-9]{2})")
"""In every date: a year of four digits, or the last of three numbers. Far quicker to look for than all that a date can begin with.

What follows is no matter here: the end of what is looked at may hide it, so there must be more of that whatever it is.
"""
_AROUND = 64
"""More than a date has before and after its `_YEAR`."""


@dataclass(frozen=True, slots=True)
class FoundDate:
    """A date as found: `iso` is YYYY-MM-DD or YYYY-MM."""

    iso: str
    text: str
    ambiguous: bool


def find_dates(texts: Sequence[str]) -> Iterator[tuple[int, FoundDate]]:
    """Yield (number of the text, date) in order. All texts are one document: they share the custom for day and month."""
    matches = [(number, _apart(match)) for number, text in enumerate(texts) for match in _find(text)]
    month_first = _month_comes_first(match for _, joined in matches for match in joined)
    for number, joined in matches:
        found = [it for match in joined if (it := _read(match, month_first))]
        if len(found) == len(joined):
            yield from ((number, it) for it in found)


def _find(text: str) -> Iterator[re.Match[str]]:
    """Yield what `_DATE` matches in a text, looked for around years alone."""
    start = end = 0
    for year in _YEAR.finditer(text):
        if year.start() - _AROUND > end:
            yield from _DATE.finditer(text, start, end)
            start = year.start() - _AROUND
        end = year.end() + _AROUND
    yield from _DATE.finditer(text, start, end)


def _apart(match: re.Match[str]) -> list[re.Match[str]]:
    """Return the two dates of a match that is two joined, else the match itself."""
    if not match["from"]:
        return [match]
    return [half for part in ("from", "to") if (half := _DATE.fullmatch(match[part]))]


def _month_comes_first(matches: Iterable[re.Match[str]]) -> bool:
    votes = 0
    for match in matches:
        if match["a"] and match["s2"] != ".":
            first, second = int(match["a"]), int(match["b"])
            votes += (second > 12 >= first) - (first > 12 >= second)
    return votes > 0


def _read(match: re.Match[str], month_first: bool) -> FoundDate | None:
    text = " ".join(match[0].split())
    if match["m5"]:
        return FoundDate(f"{match['y5']}-{MONTH_NUMBERS[match['m5'].lower()]:02d}", text, False)
    if match["a"]:
        return _read_numeric(match, text, month_first)
    if match["y1"]:
        parts = int(match["y1"]), int(match["m1"]), int(match["d1"])
    elif match["y6"]:
        parts = int(match["y6"]), int(match["m6"]), int(match["d6"])
    elif match["m3"]:
        parts = int(match["y3"]), MONTH_NUMBERS[match["m3"].lower()], int(match["d3"])
    else:
        parts = int(match["y4"]), MONTH_NUMBERS[match["m4"].lower()], int(match["d4"])
    iso = _iso(*parts)
    return FoundDate(iso, text, False) if iso else None


def _read_numeric(match: re.Match[str], text: str, month_first: bool) -> FoundDate | None:
    first, second, separator = int(match["a"]), int(match["b"]), match["s2"]
    if len(match["y2"]) == 2:
        if separator == "-" or len(match["a"]) != 2 or len(match["b"]) != 2:
            return None  # 1.2.24 is a section or a version more often than a day
        year = 1900 + int(match["y2"])
        year += 100 if year < 1970 else 0
    else:
        year = int(match["y2"])
    day_first_iso, month_first_iso = _iso(year, second, first), _iso(year, first, second)
    if separator == ".":
        iso = day_first_iso or month_first_iso
        return FoundDate(iso, text, False) if iso else None
    if day_first_iso and month_first_iso:
        iso = month_first_iso if month_first else day_first_iso
        return FoundDate(iso, text, first != second and not month_first)
    iso = day_first_iso or month_first_iso
    return FoundDate(iso, text, False) if iso else None


def _iso(year: int, month: int, day: int) -> str | None:
    try:
        return date(year, month, day).isoformat()
    except ValueError:
        return None
