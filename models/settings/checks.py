"""The types of settings whose value must satisfy more than a range. A check returns the value or raises ValueError with the reason."""

from __future__ import annotations

import os
import string
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated
from urllib.parse import urlsplit

from annotated_types import Interval
from pydantic import AfterValidator, BeforeValidator, SecretStr

FILE_TYPES = ("pdf", "word", "excel", "powerpoint", "html", "email", "ebook", "text")
"""The types of documents that are accepted, as models.documents.FileType calls them."""


@dataclass(frozen=True)
class Words:
    """What the generated pages and the errors say where a range or the default itself would not do."""

    allowed: str = ""
    default: str = ""
    is_quoted: bool = True
    """Whether an error may show a value that is refused; not where people put keys that belong elsewhere."""


def _absolute(path: Path | None) -> Path | None:
    """Make a path independent of later changes of the working directory; `~` is the home directory."""
    if path is None:
        return None
    if "\0" in str(path):
        raise ValueError("contains a NUL character")
    try:
        return path.expanduser().absolute()
    except RuntimeError:
        raise ValueError("begins with ~, but there is no such home directory") from None


def _log_file(path: Path | None) -> Path | None:
    """Accept a file name whose braces are all ones that get filled in."""
    if path is None:
        return None
    if path.name in {"", ".."}:
        raise ValueError("names a folder and no file in it")
    try:
        parts = {name for _, name, _, _ in string.Formatter().parse(str(path)) if name is not None}
    except ValueError:
        parts = {"unbalanced"}
    if parts - {"role", "host", "pid"} or "\0" in str(path):
        raise ValueError("has braces around something else than role, host or pid")
    return path.expanduser()


def _inside_base(name: str) -> str:
    """Accept a relative path that cannot lead out of the storage base path."""
    path = PurePosixPath(name)
    if "\0" in name or path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError("is not a relative path that stays inside STORAGE_BASE_PATH")
    if path.parts[0] == "postgres":
        raise ValueError("is where the embedded server keeps its data")
    return str(path)


def _conninfo(value: SecretStr | None) -> SecretStr | None:
    """Let libpq read the connection string. Its own message is dropped: it may quote the password."""
    if value is None:
        return None
    from psycopg import ProgrammingError, conninfo  # noqa: PLC0415 - slow to import, and seldom needed here

    text = value.get_secret_value()
    try:
        ports = str(conninfo.conninfo_to_dict(text).get("port", "")).split(",")
    except ProgrammingError:
        raise ValueError("is not a connection string that Postgres clients can read") from None
    # An @ or / in a password cuts it in two, and the rest passes for host, port or database, which libpq's errors quote.
    address = text.partition("://")[2] if text.startswith(("postgresql://", "postgres://")) else ""
    place, _, path = address.partition("?")[0].partition("/")
    if "@" in path or "@" in place.partition("@")[2] or not all(port.strip().isdigit() for port in ports if port):
        raise ValueError("has a port that is no number, or a user or password in which @ : / ? # are not percent-encoded")
    return value


def _web_address(value: SecretStr | None) -> SecretStr | None:
    """Accept an address that can be posted to. It may hold a token, so no error quotes it."""
    if value is None:
        return None
    try:
        parts = urlsplit(value.get_secret_value())
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or any(letter.isspace() or not letter.isprintable() for letter in value.get_secret_value()):
        raise ValueError("is not a web address") from None
    return value


def _base_address(address: str | None) -> str | None:
    """Accept the address of a service. One with a user or a key in it would be shown with the other settings, so it is refused."""
    if address is None:
        return None
    try:
        parts = urlsplit(address)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0 and not parts.fragment
    except ValueError:
        usable = False
    if not usable or any(letter.isspace() or not letter.isprintable() for letter in address):
        raise ValueError("is not a web address")
    if parts.username is not None or "key=" in parts.query.lower():
        raise ValueError("holds a user or a key, which belongs into the setting for the key")
    return address.rstrip("/")


def _key(value: SecretStr | None) -> SecretStr | None:
    """Accept what can stand in a header. No error quotes it."""
    if value is None:
        return None
    text = value.get_secret_value()
    if not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError("holds a blank, a line break or another character that no key has")
    return value


def sizes_by_type(value: str) -> dict[str, int]:
    """Return the limits that `html=20,email=0` names, in MB by type. ValueError says what is wrong with it."""
    sizes: dict[str, int] = {}
    for pair in filter(None, (part.strip() for part in value.split(","))):
        name, sign, size = (part.strip() for part in pair.partition("="))
        if name not in FILE_TYPES:
            raise ValueError(f"names {name[:40]!r}, which is none of {', '.join(FILE_TYPES)}")
        if not sign or not (size.isascii() and size.isdigit() and len(size) <= 6):
            raise ValueError(f"has no whole number of MB behind {name}=")
        if name in sizes:
            raise ValueError(f"names {name} twice")
        sizes[name] = int(size)
    return sizes


def _sizes(value: str) -> str:
    """Accept what `sizes_by_type` can read."""
    return ",".join(f"{name}={size}" for name, size in sizes_by_type(value.lower()).items())


def usable_cores(at_most: int) -> int:
    """Count the cores that this process may run on, up to a limit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, at_most))


AnyCase = BeforeValidator(lambda value: value.strip().lower() if isinstance(value, str) else value)
AnyCaseUpper = BeforeValidator(lambda value: value.strip().upper() if isinstance(value, str) else value)
SizesByType = Annotated[
    str, AfterValidator(_sizes), Words(allowed=f"type=MB, separated by commas; types: {', '.join(FILE_TYPES)}", default="unset")
]
Folder = Annotated[Path, AfterValidator(_absolute), Words(allowed="a folder")]
FolderInBase = Annotated[str, AfterValidator(_inside_base), Words(allowed="a folder name inside STORAGE_BASE_PATH")]
OptionalFile = Annotated[Path | None, AfterValidator(_absolute)]
LogFile = Annotated[
    Path | None, AfterValidator(_log_file), Words(allowed="a file name, which may hold {role}, {host} and {pid}", default="unset")
]
Conninfo = Annotated[
    SecretStr | None,
    AfterValidator(_conninfo),
    Words(allowed="postgresql://user:password@host:5432/database?sslmode=verify-full or host=... dbname=...", default="unset"),
]
WebUrl = Annotated[
    SecretStr | None, AfterValidator(_web_address), Words(allowed="https://host/path or http://host:port/path", default="unset")
]
BaseUrl = Annotated[
    str, AfterValidator(_base_address), Words(allowed="https://host/path or http://host:port/path, without a key in it", is_quoted=False)
]
Key = Annotated[SecretStr | None, AfterValidator(_key), Words(allowed="a key as its service shows it", default="unset")]
Price = Annotated[float | None, Interval(ge=0, le=1_000_000), Words(allowed="0 to 1000000", default="unset")]
