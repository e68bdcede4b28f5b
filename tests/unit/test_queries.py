"""The named queries, as psycopg takes them."""

from __future__ import annotations

import re

import pytest
from psycopg._queries import MAX_CACHED_STATEMENT_LENGTH, MAX_CACHED_STATEMENT_PARAMS

from sql import _all, query


@pytest.mark.parametrize("name", _all())
def test_a_query_is_within_what_psycopg_parses_once(name: str) -> None:
    text = query(name)
    assert len(text.encode()) <= MAX_CACHED_STATEMENT_LENGTH
    assert len(set(re.findall(r"%\((\w+)\)", text))) <= MAX_CACHED_STATEMENT_PARAMS


def test_comments_stay_in_the_files() -> None:
    assert not [name for name in _all() if "--" in query(name)]
    assert query("held_documents").startswith("WITH free AS MATERIALIZED (\n    SELECT d.doc_id FROM file_extractions AS d")
    assert query("hold_documents").endswith("FOR NO KEY UPDATE OF d SKIP LOCKED;")
