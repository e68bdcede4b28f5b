"""Copies of parsed texts for people to read, below the folder of extracted texts. Nothing in docmill reads one.

The name of a copy says whose text it is and which: `<SHA-256 of doc_id>-<first 16 digits of the text's SHA-256>.md`, in a folder of its
first two digits. So whoever writes late, or twice, can put no older text in the place of a newer one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from jobs.adapters.storage.faults import storage_faults
from jobs.adapters.storage.local import LocalStorage
from jobs.adapters.storage.names import folder_name

FOLDERS = dict.fromkeys(f"{number:02x}" for number in range(256))
"""Names of the folders that copies lie in, in order."""
_COPY = re.compile("[0-9a-f]{64}-[0-9a-f]{16}[.]md")


def copy_name(doc_id: str, text_sha256: str) -> str:
    """Return where the copy of a text lies, relative to the folder of extracted texts."""
    digest = folder_name(doc_id)
    return f"{digest[:2]}/{digest}-{text_sha256[:16]}.md"


@dataclass(frozen=True, slots=True)
class TextCopies:
    """The copies in a storage. Names are those of `copy_name`. Errors are the storage's."""

    storage: LocalStorage

    def write(self, name: str, text: str) -> None:
        """Write a copy: a reader sees none or all of it. After a power failure it may be missing or cut short."""
        self.storage.write(f"{self.storage.extracted_dir}/{name}", text, durable=False)

    def remove(self, name: str) -> bool:
        """Remove a copy; tell whether there was one."""
        return self.storage.delete(f"{self.storage.extracted_dir}/{name}")

    def present(self, folders: Iterable[str] = FOLDERS, doc_ids: Iterable[str] | None = None) -> dict[str, int]:
        """Return the names of the copies in some folders, or of some documents' there, with their sizes in bytes."""
        digests = None if doc_ids is None else {folder_name(doc_id) for doc_id in doc_ids}
        found: dict[str, int] = {}
        for folder in folders:
            path = self.storage.base / self.storage.extracted_dir / folder
            with storage_faults(self.storage.base, self.storage.extracted_dir), suppress(FileNotFoundError), os.scandir(path) as entries:
                for entry in entries:
                    if (digests is None or entry.name[:64] in digests) and _COPY.fullmatch(entry.name):
                        with suppress(FileNotFoundError):  # it has just gone
                            found[f"{folder}/{entry.name}"] = entry.stat(follow_symlinks=False).st_size
        return found
