"""The stages refuse what does not fit, in words that name the file and the rule; none of it needs a database."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Literal, cast
from unittest.mock import patch
from uuid import UUID

import numpy as np
import pytest
from numpy.typing import NDArray
from psycopg._queries import PostgresQuery
from psycopg.adapt import PyFormat, Transformer

from jobs.adapters.embedders import HashedText
from jobs.adapters.storage import Fingerprint
from jobs.pipeline.rows import buffer_params, chunk_params
from jobs.stages import Tools
from jobs.stages.check import checked, normalise, normalise_pages
from jobs.stages.embed import AT_ONCE, missing_texts, refuse_vectors
from jobs.stages.embed import run as run_embed
from jobs.stages.finalize import inconsistencies
from jobs.stages.validate import refuse_file, refuse_size
from models.chunks import Chunk
from models.documents import Document, FileType, PageMark
from models.errors import ParseError, PermanentError
from models.stages import Milestone
from sql import query


def chunk(index: int, text: str = "text") -> Chunk:
    return Chunk(
        id=UUID(int=index), index=index, content=text, content_sha256=text, heading_path=(), page_start=None, page_end=None,
        char_start=0, char_end=len(text),
    )  # fmt: skip


WHOLE = Document(
    doc_id="d",
    version=1,
    user_id="u",
    file_name="report.pdf",
    file_path="uploads/d",
    milestone=Milestone.EXTRACTED,
    file_size=3,
    content_sha256="1" * 64,
    file_type=FileType.PDF,
    mime_type="application/pdf",
    markdown="text",
    markdown_sha256="2" * 64,
    chunks=(chunk(0), chunk(1)),
    vectors=np.ones((2, 4), np.float32),
    embedding_model="m@1",
    raw_extraction={},
)


def test_a_whole_document_has_no_inconsistencies() -> None:
    assert inconsistencies(WHOLE) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chunks": (), "vectors": np.ones((0, 4), np.float32)}, "there are no chunks"),
        ({"chunks": (chunk(0), chunk(2))}, "not numbered"),
        ({"chunks": (chunk(0), replace(chunk(0), index=1))}, "share an id"),
        ({"vectors": np.ones((1, 4), np.float32)}, "2 chunks have 1 vectors"),
        ({"vectors": None}, "2 chunks have 0 vectors"),
        ({"embedding_model": None}, "model is not known"),
        ({"mime_type": None}, "type of the file is not known"),
        ({"markdown_sha256": None}, "not checked"),
        ({"raw_extraction": None}, "nothing was extracted"),
    ],
)
def test_each_thing_that_does_not_fit_is_named_alone(change: dict[str, Any], words: str) -> None:
    found = inconsistencies(replace(WHOLE, **change))
    assert len(found) == 1
    assert words in found[0]


def test_vectors_of_a_wrong_shape_or_with_nan_are_refused() -> None:
    refuse_vectors("report.pdf", np.ones((2, 4), np.float32), 2, 4)
    with pytest.raises(PermanentError, match=r"report\.pdf: .*shape \(1, 4\) for 2 texts of 4"):
        refuse_vectors("report.pdf", np.ones((1, 4), np.float32), 2, 4)
    with pytest.raises(PermanentError, match="NaN"):
        refuse_vectors("report.pdf", np.array([[np.nan, 1.0]], np.float32), 1, 2)


def test_a_text_that_is_known_or_repeated_is_not_embedded_again() -> None:
    chunks = (chunk(0, "a"), chunk(1, "b"), chunk(2, "a"), chunk(3, "c"))
    assert list(missing_texts(chunks, {"b": np.ones(4, np.float32)})) == ["a", "c"]


@pytest.mark.parametrize("text", ["", " \n\t\n"])
def test_a_text_without_characters_is_refused(text: str) -> None:
    with pytest.raises(ParseError, match=r"report\.pdf: the file holds no text"):
        checked(replace(WHOLE, markdown=text))


def test_a_text_that_is_mostly_lost_is_refused() -> None:
    with pytest.raises(ParseError, match="could not be decoded"):
        checked(replace(WHOLE, markdown="ab" + "\ufffd" * 8))
    assert checked(replace(WHOLE, markdown="a" * 8 + "\ufffd")).markdown == "a" * 8 + "\ufffd"


@pytest.mark.parametrize("starts", [(0, 5, 3), (2, 4), (0, 8)])
def test_a_page_map_that_would_lose_text_is_refused(starts: tuple[int, ...]) -> None:
    with pytest.raises(PermanentError, match="page map is not in order"):
        checked(replace(WHOLE, markdown="one two", pages=tuple(PageMark(i + 1, start) for i, start in enumerate(starts))))


def test_marks_stay_true_when_the_text_around_them_shrinks() -> None:
    markdown = "one  \r\n\r\n\r\n\r\nmore\n\n" + "two\x00\n\n" + "three"
    starts = [0, markdown.index("two"), markdown.index("three")]
    text, marks = normalise_pages(markdown, [PageMark(i + 1, start) for i, start in enumerate(starts)])
    assert text == "one\n\nmore\n\ntwo\n\nthree"
    assert [text[mark.start :].split("\n")[0] for mark in marks] == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("markdown", "starts"),
    [
        ("one\n\ntwo\n\nthree", (0, 5, 10)),
        ("one\n\ntwo\n\nthree\n", (0, 5, 10)),
        ("one\n\ntwo \n\nthree", (0, 5, 11)),
        ("one\n\n\ntwo", (0, 6)),
        ("one\ntwo", (0, 4)),
        ("\n\none", (0, 2)),
        ("one\n\n\n\ntwo", (0, 5, 7)),
        ("\none \u2013 two\x00", ()),
        ("one \u2013 two\n", ()),
        ("", (0,)),
    ],
)
def test_pages_are_normalised_each_by_itself_and_a_sound_text_is_returned_itself(markdown: str, starts: tuple[int, ...]) -> None:
    ends = (*starts[1:], len(markdown))
    parts = [normalise(markdown[start:end]) for start, end in zip(starts or (0,), ends[-max(1, len(starts)) :], strict=True)]
    wanted = "\n\n".join(parts)
    begins = [sum(len(part) + 2 for part in parts[:number]) for number in range(len(starts))]
    text, marks = normalise_pages(markdown, [PageMark(number, start) for number, start in enumerate(starts, 1)])
    assert (text, marks) == (wanted, tuple(PageMark(number, begin) for number, begin in enumerate(begins, 1)))
    assert (text is markdown) == (wanted == markdown)


def test_normalising_twice_changes_nothing() -> None:
    once = normalise("\ufeffu\u0308ber \u2028 x\r\ry\n\n\n\nz\u0085 ")
    assert once == "\u00fcber\n x\n\ny\n\nz"
    assert normalise(once) == once


@pytest.mark.parametrize("mark", ["\x0b", "\x0c", "\x85", "\u2028", "\u2029"])
def test_what_parts_lines_never_joins_the_words_beside_it(mark: str) -> None:
    assert normalise(f"Ende Seite 1{mark}Seite 2 {mark}{mark}\n{mark}x{mark}") == "Ende Seite 1\nSeite 2\n\nx"
    assert normalise(f"| a{mark}b | c |{mark}\n{mark}| - | - |\n\nd{mark}| e") == "| a b | c |\n | - | - |\n\nd\n| e"


def test_marks_stay_true_where_pages_begin_end_and_part_in_form_feeds() -> None:
    markdown = "one\x0cmore\x0c" + "\x0ctwo\x0c\u2028\x0cmore" + "\x0c" + "\u2028three\x0c"
    starts = [0, markdown.index("\x0ctwo"), markdown.index("\x0c\u2028three"), markdown.index("three")]
    text, marks = normalise_pages(markdown, [PageMark(i + 1, start) for i, start in enumerate(starts)])
    assert text == "one\nmore\n\ntwo\n\nmore\n\n\n\nthree"
    assert [text[mark.start :].split("\n")[0] for mark in marks] == ["one", "two", "", "three"]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (Fingerprint(0, "1" * 64), "empty"),
        (Fingerprint(2_000_001, "1" * 64), "2,000,001 bytes is more than MAX_FILE_SIZE_MB=2"),
        (Fingerprint(3, "9" * 64), "changed between submission and validation"),
    ],
)
def test_a_file_that_breaks_a_rule_is_refused_by_name(found: Fingerprint, words: str) -> None:
    refuse_file(WHOLE, Fingerprint(3, "1" * 64), 2)
    with pytest.raises(PermanentError, match=rf"report\.pdf: .*{words}"):
        refuse_file(WHOLE, found, 2)


def test_a_type_may_have_a_lower_limit_or_be_refused() -> None:
    refuse_size("a.html", 2_000_000, FileType.HTML, 2)
    with pytest.raises(PermanentError, match=r"^a\.html: 2,000,001 bytes is more than MAX_FILE_SIZE_MB_BY_TYPE allows .*html=2"):
        refuse_size("a.html", 2_000_001, FileType.HTML, 2)
    with pytest.raises(PermanentError, match=r"^a\.eml: files of type email are not accepted .*email=0"):
        refuse_size("a.eml", 10, FileType.EMAIL, 0)


class Noting(HashedText):
    """Notes how many texts it is given at a time."""

    def __init__(self) -> None:
        super().__init__(4)
        self.given: list[int] = []

    async def embed(self, texts: Sequence[str], kind: Literal["passage", "query"] = "passage") -> NDArray[np.float32]:
        self.given.append(len(texts))
        return await super().embed(texts, kind)


async def test_vectors_stand_in_the_order_of_the_passages_however_many_calls_made_them() -> None:
    texts = [f"passage {number}" for number in range(2 * AT_ONCE)]
    texts += [texts[0], "known", texts[-1]]
    document = replace(WHOLE, chunks=tuple(chunk(index, text) for index, text in enumerate(texts)), vectors=None)
    embedder = Noting()
    known = np.full(4, 0.5, np.float32)

    async def known_vectors(_: Document) -> dict[str, NDArray[np.float32]]:
        return {"known": known}

    tools = SimpleNamespace(embedder=embedder, choose_embedder=None, known_vectors=known_vectors, paid=None)
    embedded = await run_embed(document, cast(Tools, tools))
    expected = await HashedText(4).embed(texts)
    expected[-2] = known
    assert embedded.vectors is not None
    assert np.array_equal(embedded.vectors, expected)
    assert embedder.given == [AT_ONCE, AT_ONCE]
    assert embedded.embedded_count == 2 * AT_ONCE


async def test_a_document_without_passages_has_an_empty_array_of_vectors() -> None:
    async def known_vectors(_: Document) -> dict[str, NDArray[np.float32]]:
        return {}

    tools = SimpleNamespace(embedder=Noting(), choose_embedder=None, known_vectors=known_vectors, paid=None)
    embedded = await run_embed(replace(WHOLE, chunks=(), vectors=None), cast(Tools, tools))
    assert embedded.vectors is not None
    assert embedded.vectors.shape == (0, 4)


def test_metadata_is_sent_as_text_and_an_empty_one_without_an_encoder() -> None:
    metadata: tuple[dict[str, Any], ...] = ({}, {"Maß": [1, None]}, {})
    chunks = tuple(replace(chunk(number), metadata=each) for number, each in enumerate(metadata))
    with patch.object(json, "dumps", wraps=json.dumps) as dumps:
        (params,) = chunk_params(replace(WHOLE, chunks=chunks, vectors=np.ones((3, 4), np.float32)))
    assert params["metadata"] == ["{}", '{"Ma\\u00df": [1, null]}', "{}"]
    assert dumps.call_count == 1


def test_a_statement_is_the_same_one_whatever_numbers_it_is_given() -> None:
    def types_of(*chunks: Chunk) -> tuple[tuple[int, ...], list[Any]]:
        (params,) = buffer_params(replace(WHOLE, chunks=chunks))
        made = PostgresQuery(Transformer())
        made.convert(query("store_chunk_buffer"), params)
        return made.types, list(made.formats or ())

    small, large = chunk(0), replace(chunk(40_000), char_start=1, char_end=3_000_000, page_start=1, page_end=70_000)
    assert types_of(small) == types_of(large) == types_of(small, large)


def test_what_a_checkpoint_sends_leaves_nothing_beside_the_passages() -> None:
    text = "„Maß für Maß“ " * 1000
    document = replace(WHOLE, chunks=(chunk(0, text),), vectors=np.ones((1, 4), np.float32))
    before = sys.getsizeof(text)
    (params,) = chunk_params(document)
    sent = Transformer().get_dumper(params["contents"], PyFormat.BINARY).dump(params["contents"])
    assert text.encode() in bytes(sent or b"")
    assert sys.getsizeof(text) == before
