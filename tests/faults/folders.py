"""A folder that changes at random, and which documents are to be expected of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.adapters.archives import is_archive
from jobs.arguments import derive_doc_id, path_doc_id
from tests.archives import Raw, raw_zip, zip_bytes

TEXTS = ["text one.\n", "text two.\n", "text three.\n", "text bad.\n"]
BAD = TEXTS[-1]
"""What no parser can read."""
DAMAGED = ""
"""Of an entry that cannot be unpacked: a document that has failed."""
PLACES = ["A.txt", "a.txt", "b ä.txt", "d/a.txt", "d/e/b.txt", "d/z.zip", "e/b.txt", "x", "z.zip"]
INNER = "d"

Content = str | Mapping[str, Any] | None
"""A text, the entries of an archive, or None for an archive that is broken."""


def made_zip(entries: Content) -> bytes:
    """Write an archive, field by field: an entry of the text BAD by the name `damaged` has a wrong checksum."""
    if entries is None or isinstance(entries, str):
        return zip_bytes({"one.txt": "x"})[:-30]
    raw = []
    for name, content in entries.items():
        data = content.encode() if isinstance(content, str) else made_zip(content)
        raw.append(Raw(name.encode(), data, crc=7 if name == "damaged.txt" else None))
    return raw_zip(raw)


@dataclass
class Tree:
    """The folder, and what was put into which archive."""

    root: Path
    archives: dict[bytes, Content] = field(default_factory=dict)

    def put(self, place: str, content: Content) -> None:
        data = content.encode() if isinstance(content, str) else made_zip(content)
        if not isinstance(content, str):
            self.archives[data] = content
        path = self.root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".new {path.name}")
        new.write_bytes(data)
        new.replace(path)

    def files(self) -> dict[str, Path]:
        found = sorted(path for path in self.root.rglob("*") if not path.is_dir() and not path.name.startswith("."))
        return {str(path.relative_to(self.root)): path for path in found}

    def content(self, place: str) -> Content:
        data = (self.root / place).read_bytes()
        return self.archives[data] if data in self.archives else data.decode()

    def is_archive(self, place: str) -> bool:
        return is_archive(self.root / place, place)

    def parts(self, place: str) -> dict[str, str | None]:
        """What lies at a place by the path inside of it, "" for the file itself: a text, or None for an archive that cannot be unpacked."""
        if not self.is_archive(place):
            return {"": (self.root / place).read_bytes().decode(errors="replace")}
        return dict(_entries("", self.content(place)))

    def doc_ids(self, place: str, inside: str, roots: Sequence[str]) -> list[str]:
        """The documents of a file, or of what lies inside of an archive for each folder that is synced."""
        if not inside:
            return [path_doc_id("default", self.root / place)]
        made = []
        for root in roots:
            if not root or place.startswith(f"{root}/"):
                batch = path_doc_id("default", self.root / root if root else self.root)
                made.append(derive_doc_id("default", f"{batch}\n{place.removeprefix(f'{root}/')}{inside}"))
        return made


def _entries(above: str, content: Content) -> Any:
    if content is None or content == {}:
        yield above, None
    elif isinstance(content, str):
        yield above, content
    else:
        for name, inner in content.items():
            if name == "damaged.txt":
                yield f"{above}/{name}", DAMAGED
            else:
                yield from _entries(f"{above}/{name}", inner)


def same_time(path: Path, change: Callable[[], object]) -> None:
    """Change a file and give it the modification time that it had, as rsync and cp -p do."""
    kept = path.stat()
    change()
    os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))
