"""Invariants of chunking: exact, whole, in order, deterministic, bounded, and cut where it does the least harm."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.stages import Tools
from jobs.stages.chunk import chunk_id, cut, run, verify
from jobs.stages.chunk.spans import is_cluster_break
from models.chunks import Chunk
from models.documents import Document, PageMark
from models.errors import ConfigurationError, PermanentError
from models.stages import Milestone

SENTENCE = "The quick brown fox jumps over the lazy dog near the river bank. "
ECHO = "echo hello world\n" * 9
TABLE_HEAD = "| Item | Price |\n|------|-------|\n"

BLOCK = st.sampled_from(
    [
        "# Title\n",
        "## Section\n\n",
        "### Deep ###\n",
        "Set\n===\n\n",
        SENTENCE * 3 + "\n\n",
        SENTENCE + "\n",
        "word " * 80,
        "- item one\n- item two\n",
        "```python\n# no heading\nx = 1\n```\n\n",
        "```\n",
        TABLE_HEAD + "| apple | 1.20 |\n| pear | 2.30 |\n\n",
        TABLE_HEAD + "| some longer cell of text | 1.20 |\n" * 30 + "\n",
        "x" * 700,
        "漢字仮名交じり文" * 40,
        "ภาษาไทยไม่มีช่องว่าง" * 20,
        "👨‍👩‍👧‍👦🏳️‍🌈🇩🇪🇫🇷" * 30,
        "e\u0301" * 200,
        "\n\n\n",
        "   \t ",
        "> quoted\n",
        "---\n",
        "\u00a0\ufeff",
    ]
)
MARKDOWN = st.one_of(st.lists(BLOCK, max_size=25).map("".join), st.text(max_size=400))


def chunks_of(markdown: str, size: int = 300, overlap: int = 40, pages: tuple[PageMark, ...] = ()) -> tuple[Chunk, ...]:
    return cut(markdown, pages, doc_id="doc", size=size, overlap=overlap)


@settings(deadline=None, max_examples=300)
@given(MARKDOWN, st.integers(50, 600), st.data())
def test_passages_cover_the_text_exactly_in_order_and_within_the_size(markdown: str, size: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, size - 1))
    chunks = chunks_of(markdown, size, overlap)
    covered = [False] * len(markdown)
    for number, chunk in enumerate(chunks):
        assert chunk.index == number
        assert chunk.content == markdown[chunk.char_start : chunk.char_end]
        assert 0 < len(chunk.content) <= size
        assert chunk.content.strip()
        assert chunk.content_sha256 == hashlib.sha256(chunk.content.encode("utf-8", "surrogatepass")).hexdigest()
        covered[chunk.char_start : chunk.char_end] = [True] * len(chunk.content)
        if number:
            assert chunks[number - 1].char_end - chunk.char_start <= overlap
            assert chunks[number - 1].char_start <= chunk.char_start
            assert chunks[number - 1].char_end < chunk.char_end
    assert all(done or character.isspace() for done, character in zip(covered, markdown, strict=True))
    assert chunks == chunks_of(markdown, size, overlap)
    assert len({chunk.id for chunk in chunks}) == len(chunks)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.text("abc de", min_size=1, max_size=60), st.integers(0, 99999)), min_size=3, max_size=60), st.integers(150, 500)
)
def test_a_table_row_that_fits_is_never_cut(cells: list[tuple[str, int]], size: int) -> None:
    rows = [f"| {text} | {number} |" for text, number in cells]
    markdown = f"# Prices\n\n{SENTENCE}\n\n" + TABLE_HEAD + "\n".join(rows) + f"\n\n{SENTENCE}"
    for chunk in chunks_of(markdown, size, 30):
        assert chunk.char_start == 0 or markdown[chunk.char_start - 1] == "\n"
        for line in chunk.content.split("\n"):
            assert not line.startswith("|") or line in rows or line in TABLE_HEAD


def test_a_header_stays_with_its_first_row_and_later_passages_name_the_columns() -> None:
    markdown = SENTENCE * 4 + "\n\n" + TABLE_HEAD + "| apple and more | 1.20 |\n" * 60
    chunks = chunks_of(markdown)
    first = next(chunk for chunk in chunks if "| Item" in chunk.content)
    assert "| apple" in first.content
    later = [chunk for chunk in chunks if chunk.index > first.index]
    assert later
    assert all(chunk.metadata == {"has_table": True, "table_header": ["Item", "Price"]} for chunk in later)
    assert first.metadata == {"has_table": True}
    assert chunks[0].metadata == {} or chunks[0] is first


def test_a_row_longer_than_a_passage_is_cut_between_cells() -> None:
    cell = "a cell with several words in it"
    chunks = chunks_of("| a | b |\n|---|---|\n" + "| " + " | ".join([cell] * 40) + " |\n", overlap=0)
    assert len(chunks) > 3
    assert all(chunk.content.rstrip().endswith("|") for chunk in chunks)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 8), min_size=1, max_size=12), st.integers(200, 600))
def test_a_heading_is_never_left_alone_at_the_end_of_a_passage(lengths: list[int], size: int) -> None:
    markdown = "".join(f"## Part {number}\n\n{SENTENCE * length}\n\n" for number, length in enumerate(lengths))
    for chunk in chunks_of(markdown, size, size // 10):
        assert not chunk.content.split("\n")[-1].startswith("#")


def test_headings_above_a_passage_are_its_path() -> None:
    markdown = (
        f"# Book\n\n{SENTENCE * 3}\n\n## One\n\n{SENTENCE * 3}\n\n### **Deep** [link](http://x)\n\n{SENTENCE * 3}\n\n"
        f"Two\n---\n\n{SENTENCE * 3}\n\n```sh\n# not a heading\n{ECHO}```\n\n# Next\n\n{SENTENCE * 3}"
    )
    paths = [chunk.heading_path for chunk in chunks_of(markdown)]
    assert list(dict.fromkeys(paths)) == [("Book",), ("Book", "One"), ("Book", "One", "Deep link"), ("Book", "Two"), ("Next",)]
    opening = next(chunk for chunk in chunks_of(markdown) if "## One" in chunk.content)
    assert opening.content.startswith("## One")


def test_pages_are_those_where_the_passage_begins_and_ends() -> None:
    first, second = SENTENCE * 3 + "\n\n", SENTENCE * 6 + "\n\n"
    markdown = first + second + SENTENCE
    pages = (PageMark(3, 0), PageMark(4, len(first)), PageMark(7, len(first + second)))
    for chunk in chunks_of(markdown, 250, 30, pages):
        expected = [page.number for page in pages if page.start < chunk.char_end]
        assert chunk.page_end == expected[-1]
        assert chunk.page_start == [page.number for page in pages if page.start <= chunk.char_start][-1]
    assert all(chunk.page_start is None and chunk.page_end is None for chunk in chunks_of(markdown))


def test_neighbours_repeat_whole_words_up_to_the_overlap_and_nothing_across_headings() -> None:
    chunks = chunks_of("".join(f"word{number} " for number in range(300)), 300, 60)
    for before, after in pairwise(chunks):
        assert 0 < before.char_end - after.char_start <= 60
        assert after.content.startswith("word")
    sections = chunks_of("".join(f"# H{number}\n\n{SENTENCE * 4}\n\n" for number in range(5)), 300, 60)
    for before, after in pairwise(sections):
        if after.content.startswith("#"):
            assert after.char_start >= before.char_end


@pytest.mark.parametrize("text", ["👨‍👩‍👧‍👦", "🇩🇪", "e\u0301\u0323", "👍🏽", "ก็"])
def test_what_people_see_as_one_character_is_never_parted(text: str) -> None:
    for chunk in chunks_of(text * 400, 200, 37):
        assert len(chunk.content) % len(text) == 0
        assert chunk.content == text * (len(chunk.content) // len(text))
    assert not any(is_cluster_break(text * 3, at) for at in range(1, len(text)))


@pytest.mark.parametrize("line", ["x" * 300_000, "word " * 60_000, "文書管理、" * 30_000, "|" * 200_000, "#" * 100_000, "`" * 100_000])
def test_a_huge_line_is_cut_into_full_passages(line: str) -> None:
    chunks = chunks_of(line, 1000, 100)
    assert len(chunks) <= len(line) / 450


def test_nothing_visible_gives_no_passages() -> None:
    assert chunks_of("") == chunks_of(" \n\t\n") == ()
    assert [chunk.content for chunk in chunks_of("\n\n  x\n\n")] == ["  x"]


def test_small_remainders_are_joined_to_their_neighbours() -> None:
    markdown = "\n\n".join([SENTENCE * 4, "End.", SENTENCE * 4, "Fin."])
    assert all(len(chunk.content) >= 30 for chunk in chunks_of(markdown, 300, 0))


def test_ids_follow_document_place_and_content_alone() -> None:
    markdown = SENTENCE * 20
    chunks = chunks_of(markdown)
    assert str(chunk_id("doc", 0, hashlib.sha256(b"x").hexdigest())) == "3f58a565-062f-52e4-8186-60a2bb36cc55"
    assert all(chunk.id == chunk_id("doc", chunk.index, chunk.content_sha256) for chunk in chunks)
    assert not {chunk.id for chunk in chunks} & {chunk.id for chunk in cut(markdown, (), doc_id="other", size=300, overlap=40)}


@pytest.mark.parametrize(("size", "overlap"), [(49, 0), (300, 300), (300, -1)])
def test_sizes_that_make_no_sense_are_refused_by_name(size: int, overlap: int) -> None:
    with pytest.raises(ConfigurationError, match=r"CHUNK_SIZE.*CHUNK_OVERLAP"):
        chunks_of("text", size, overlap)


def test_a_lost_or_altered_passage_does_not_pass_the_check() -> None:
    markdown = SENTENCE * 20
    chunks = chunks_of(markdown)
    verify(chunks, markdown, "doc")
    broken: list[list[Chunk]] = [
        list(chunks[:-1]),
        [*chunks[:1], *(replace(chunk, index=chunk.index - 1) for chunk in chunks[2:])],
        [*chunks[:1], *chunks[2:]],
        [replace(chunks[0], content="other text"), *chunks[1:]],
        [replace(chunks[0], content="   "), *chunks[1:]],
        [*chunks, replace(chunks[-1], index=len(chunks))],
    ]
    for wrong in broken:
        with pytest.raises(PermanentError, match="chunking doc"):
            verify(wrong, markdown, "doc")


@pytest.mark.parametrize(
    ("name", "mime_type", "paths"),
    [
        ("deploy.PY", "text/plain", {()}),
        ("app.yaml", "text/plain", {()}),
        ("app.d/Dockerfile", "text/plain", {()}),
        ("notes.txt", "text/plain", {("One",), ("One", "Two")}),
        ("notes", "text/plain", {("One",), ("One", "Two")}),
        ("notes.md", "text/markdown", {("One",), ("One", "Two")}),
        ("page.php", "text/html", {("One",), ("One", "Two")}),
    ],
)
async def test_comments_in_code_and_configuration_are_no_headings(name: str, mime_type: str, paths: set[tuple[str, ...]]) -> None:
    tools = cast("Tools", SimpleNamespace(settings=SimpleNamespace(chunk_size=200, chunk_overlap=20)))
    text = f"# One\n\n{SENTENCE * 5}\n\nTwo\n---\n\n{SENTENCE * 5}\n"
    done = await run(Document("doc", 1, "u", name, "p", Milestone.PARSE_VALIDATED, markdown=text, mime_type=mime_type), tools)
    assert {chunk.heading_path for chunk in done.chunks or ()} == paths
    assert all(chunk.content == text[chunk.char_start : chunk.char_end] for chunk in done.chunks or ())


async def test_the_stage_cuts_by_the_settings_and_refuses_a_text_without_characters() -> None:
    tools = cast("Tools", SimpleNamespace(settings=SimpleNamespace(chunk_size=200, chunk_overlap=20)))
    pages = (PageMark(1, 0), PageMark(2, 300))
    document = Document("doc", 1, "u", "notes.md", "p", Milestone.PARSE_VALIDATED, markdown=SENTENCE * 20, pages=pages)
    done = await run(document, tools)
    assert done.chunks == chunks_of(SENTENCE * 20, 200, 20, pages)
    assert done == replace(document, chunks=done.chunks)
    with pytest.raises(PermanentError, match=r"notes\.md"):
        await run(replace(document, markdown=" \n"), tools)
