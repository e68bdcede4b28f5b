"""An extraction is copied from equal content only where it would be the same, or costs money."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.adapters.extractor import EXTRACTOR, extract_locally
from jobs.stages.extract import fits
from models.documents import Document, OriginalExtraction
from models.stages import Milestone


def document(file_name: str) -> Document:
    return Document("d", 1, "u", file_name, "uploads/d", Milestone.EMBEDDINGS_STORED)


LOCAL: dict[str, Any] = {"extractor": dict(EXTRACTOR), "title": {"text": "Notice", "source": "heading"}}


@pytest.mark.parametrize(
    ("found", "file_name", "copied"),
    [
        (LOCAL, "other.md", True),
        ({**LOCAL, "title": {"text": "a", "source": "file_name"}}, "other.md", False),
        ({**LOCAL, "title": {"text": "a", "source": "file_name"}}, "a.md", True),
        ({**LOCAL, "title": None}, "other.md", False),
        ({**LOCAL, "extractor": {**EXTRACTOR, "version": "0"}}, "a.md", False),
        ({"extractor": {"name": "a paid model", "version": "1"}, "title": {"source": "file_name"}}, "other.md", True),
        ({"title": "of unknown origin"}, "other.md", True),
    ],
)
def test_what_the_file_name_or_another_version_would_change_is_worked_out_again(
    found: dict[str, Any], file_name: str, copied: bool
) -> None:
    assert fits(document(file_name), OriginalExtraction("o", "a.md", found)) is copied


def test_a_copied_extraction_is_what_the_local_extractor_would_find() -> None:
    texts = ["# Notice\n\nPay 10.00 EUR by 2026-01-05.", "just a line of words", "|a|b|\n|---|---|\n|1|2|", "1 2 3"]
    assert not fits(document("b.py"), OriginalExtraction("o", "a.md", LOCAL)), "a comment in code is no heading"
    for text in texts:
        found = extract_locally(text, (), "a.md", {})
        if fits(document("b.txt"), OriginalExtraction("o", "a.md", found)):
            assert extract_locally(text, (), "b.txt", {}) == found
