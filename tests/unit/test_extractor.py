"""The local extractor reads facts that people would read, in English and German, and stays whole on any input."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from jobs.adapters.extractor import MAX_FACTS, amounts, dates, extract_locally
from jobs.adapters.extractor.amounts import find_amounts
from jobs.adapters.extractor.dates import find_dates
from jobs.adapters.extractor.identifiers import find_emails, find_ibans, find_urls
from jobs.adapters.markdown import cells, plain, read_structure
from jobs.adapters.sandbox import ProcessSandbox
from jobs.stages import Tools
from jobs.stages import extract as extract_stage
from models.documents import Document, PageMark
from models.stages import Milestone

ROOT = Path(__file__).parents[2]
SCHEMA = Draft202012Validator(json.loads((ROOT / "docs" / "raw_extraction.schema.json").read_text("utf-8")))

INVOICE = """# Rechnung

Rechnungsnummer: RE-2024-0017   Rechnungsdatum: 01.03.2024
**Kunde:** Bäckerei Sonnenschein GmbH

Bitte überweisen Sie den Gesamtbetrag von **1.234,56 €** bis zum 31. März 2024 auf das Konto
DE89 3704 0044 0532 0130 00. Fragen beantwortet buchhaltung@beispiel.example oder https://www.beispiel.example/hilfe.

## Positionen

| Artikel | Menge | Preis |
|---------|------:|------:|
| Mehl Typ 550 | 12 | 18,90 EUR |
| Hefe \\| frisch | 3 | 2,40 EUR |
"""

REPORT = """# Annual report

The company closed the year with revenue of $3.5 million and a loss of USD 12,345.67. The board met on March 1st, 2024
and again on 2 April 2024. Write to Investors@Example.com for the full statement of accounts.

| Field | Value |
|---|---|
| Auditor | Smith & Partners |
| Country | Ireland |

```python
price = "$99.99"  # on 2020-01-01
```
"""


def extract(markdown: str, pages: tuple[PageMark, ...] = (), file_name: str = "a.txt", **metadata: Any) -> dict[str, Any]:
    found = extract_locally(markdown, pages, file_name, metadata)
    SCHEMA.validate(found)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert "\\u0000" not in json.dumps(found)
    return found


def facts(found: dict[str, Any], name: str, *keys: str) -> list[tuple[Any, ...]]:
    return [tuple(fact[key] for key in keys) for fact in found[name]]


def test_a_german_invoice_gives_its_facts() -> None:
    found = extract(INVOICE, (PageMark(1, 0), PageMark(2, INVOICE.index("## Pos"))))
    assert found["title"] == {"text": "Rechnung", "source": "heading"}
    assert found["language"]["code"] == "de"
    assert found["outline"] == [{"level": 1, "text": "Rechnung", "page": 1}, {"level": 2, "text": "Positionen", "page": 2}]
    assert facts(found, "key_values", "key", "value") == [
        ("Rechnungsnummer", "RE-2024-0017"),
        ("Rechnungsdatum", "01.03.2024"),
        ("Kunde", "Bäckerei Sonnenschein GmbH"),
    ]
    assert facts(found, "dates", "iso", "text", "page") == [("2024-03-01", "01.03.2024", 1), ("2024-03-31", "31. März 2024", 1)]
    assert facts(found, "amounts", "currency", "value", "page") == [("EUR", "1234.56", 1), ("EUR", "18.90", 2), ("EUR", "2.40", 2)]
    assert facts(found, "ibans", "iban") == [("DE89370400440532013000",)]
    assert facts(found, "emails", "address") == [("buchhaltung@beispiel.example",)]
    assert facts(found, "urls", "url") == [("https://www.beispiel.example/hilfe",)]
    assert found["tables"] == [
        {
            "page": 2,
            "header": ["Artikel", "Menge", "Preis"],
            "rows": [["Mehl Typ 550", "12", "18,90 EUR"], ["Hefe | frisch", "3", "2,40 EUR"]],
            "row_count": 2,
        }
    ]
    assert found["statistics"]["pages"] == 2


def test_an_english_report_gives_its_facts_and_its_code_gives_none() -> None:
    found = extract(REPORT)
    assert found["language"]["code"] == "en"
    assert facts(found, "dates", "iso") == [("2024-03-01",), ("2024-04-02",)]
    assert facts(found, "amounts", "currency", "value") == [("USD", "3500000"), ("USD", "12345.67")]
    assert facts(found, "emails", "address") == [("investors@example.com",)]
    assert facts(found, "key_values", "key", "value") == [("Auditor", "Smith & Partners"), ("Country", "Ireland")]
    assert found["statistics"]["code_blocks"] == 1
    assert found["statistics"]["tables"] == 1


@pytest.mark.parametrize(
    ("text", "iso", "ambiguous"),
    [
        ("2024-03-01", "2024-03-01", False),
        ("at 2024-03-01T12:00:00Z", "2024-03-01", False),
        ("2024/3/1", "2024-03-01", False),
        ("1.3.2024", "2024-03-01", False),
        ("01. 03. 2024", "2024-03-01", False),
        ("1.\u00a03. 2024", "2024-03-01", False),
        ("01.03. 2024", "2024-03-01", False),
        ("01.03.24", "2024-03-01", False),
        ("31.12.99", "1999-12-31", False),
        ("31/12/2024", "2024-12-31", False),
        ("12/31/2024", "2024-12-31", False),
        ("03/04/2024", "2024-04-03", True),
        ("03/03/2024", "2024-03-03", False),
        ("1 March 2024", "2024-03-01", False),
        ("1st of March, 2024", "2024-03-01", False),
        ("March 1, 2024", "2024-03-01", False),
        ("Sept. 22nd, 2024", "2024-09-22", False),
        ("01-Mar-2024", "2024-03-01", False),
        ("1. März 2024", "2024-03-01", False),
        ("24. Dez. 2024", "2024-12-24", False),
        ("im Oktober 2024", "2024-10", False),
        ("1er janvier 2024", "2024-01-01", False),
        ("1 de marzo de 2024", "2024-03-01", False),
    ],
)
def test_a_date_is_read_as_people_read_it(text: str, iso: str, ambiguous: bool) -> None:
    assert [(found.iso, found.ambiguous) for _, found in find_dates([text])] == [(iso, ambiguous)]


@pytest.mark.parametrize(
    "text",
    [
        "31.02.2024", "version 1.2.2024.5", "192.168.20.2024", "section 1.2.24", "99/99/2024", "12345-01-01", "1.2.3", "tel 555-12-2024x",
        "1.2.3.4", "1.2.3.4-5.6.7.8", "10.0.0.1/10.0.0.9", "1.2.2024.5-1.3.2024", "1.2.2024-1.3.2024.5", "v1.2.2024-1.3.2024",
        "part 12.11.10-55.66.77", "1.2.24-1.3.24", "12-11-10/12-11-11", "01-02-2024-03-04-2024", "01.02.2024-03/04/2024", "030/12.34.56-78",
        "31. 02. 2024", "1. 2. 3", "1. 2. 24", "01.\n03.\n2024", "01.  03.  2024", "1. 2. 2024-5",
    ],
)  # fmt: skip
def test_what_is_no_date_gives_none(text: str) -> None:
    assert list(find_dates([text])) == []


@pytest.mark.parametrize(
    ("text", "isos"),
    [
        ("01.01.2024-31.12.2024", ["2024-01-01", "2024-12-31"]),
        ("01/01/2024-31/12/2024", ["2024-01-01", "2024-12-31"]),
        ("12/01/2024-12/31/2024", ["2024-12-01", "2024-12-31"]),
        ("2024-01-01/2024-02-01", ["2024-01-01", "2024-02-01"]),
        ("2024/1/1-2024/2/1.", ["2024-01-01", "2024-02-01"]),
        ("01.03.2024/02.03.2024", ["2024-03-01", "2024-03-02"]),
        ("01.03.24-02.04.24", ["2024-03-01", "2024-04-02"]),
        ("01.03.2024–02.03.2024", ["2024-03-01", "2024-03-02"]),
        ("01. 03. 2024 - 02. 03. 2024", ["2024-03-01", "2024-03-02"]),
    ],
)
def test_both_dates_of_a_range_are_found(text: str, isos: list[str]) -> None:
    assert [found.iso for _, found in find_dates([f"vom {text}, "])] == isos


def test_dates_that_decide_show_the_custom_for_those_that_do_not() -> None:
    found = [(date.iso, date.ambiguous) for _, date in find_dates(["03/04/2024 and 12/31/2024", "05/06/2024"])]
    assert found == [("2024-03-04", False), ("2024-12-31", False), ("2024-05-06", False)]


@pytest.mark.parametrize(
    ("text", "currency", "value"),
    [
        ("$1,234.56", "USD", "1234.56"),
        ("1.234,56 €", "EUR", "1234.56"),
        ("EUR 1.234", "EUR", "1234"),
        ("1 234,50 EUR", "EUR", "1234.50"),
        ("£0.99", "GBP", "0.99"),
        ("$0.125", "USD", "0.125"),
        ("CHF 1'234.50", "CHF", "1234.50"),
        ("12,-- €", "EUR", "12"),
        ("-5,00 €", "EUR", "-5.00"),
        ("$-50.00", "USD", "-50.00"),
        ("−3 EUR", "EUR", "-3"),
        ("-€50", "EUR", "-50"),
        ("-50 €", "EUR", "-50"),
        ("-EUR 50", "EUR", "-50"),
        ("EUR -50", "EUR", "-50"),
        ("(-50 €)", "EUR", "-50"),
        ("3,5 Mio. Euro", "EUR", "3500000"),
        ("2 Mrd. €", "EUR", "2000000000"),
        ("$1.2bn", "USD", "1200000000"),
        ("1.234.567,89 EUR", "EUR", "1234567.89"),
        ("US$ 10", "USD", "10"),
    ],
)
def test_an_amount_is_read_in_either_writing(text: str, currency: str, value: str) -> None:
    assert [(found.currency, found.value) for found in find_amounts(f"Sum: {text} due")] == [(currency, value)]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("- 100 € pro Monat\n- 1.200,50 EUR im Jahr", ["100", "1200.50"]),
        ("- € 5", ["5"]),
        ("− 50 €", ["50"]),
        ("Hotel - 120 EUR", ["120"]),
        ("Hotel -\u00a0$120", ["120"]),
        ("5 - 10 EUR", ["10"]),
        ("5-10 EUR", ["10"]),
        ("5 €-10 €", ["5", "10"]),
        ("EUR 5-EUR 10", ["5", "10"]),
    ],
)
def test_a_dash_that_does_not_touch_an_amount_or_joins_two_is_no_sign(text: str, values: list[str]) -> None:
    assert [found.value for found in find_amounts(text)] == values


@pytest.mark.parametrize("text", ["1,234.56", "$x$ and $5$", "EURO2024", "page 5 of 7", "A12 EUROPE"])
def test_what_is_no_amount_gives_none(text: str) -> None:
    assert list(find_amounts(text)) == []


def test_identifiers_are_clean_and_checked() -> None:
    assert list(find_emails("Mail <a.b+c@sub.example.org>, or x@y. Not @home or a@b")) == ["a.b+c@sub.example.org"]
    assert list(find_urls("see (https://example.org/a_(b)) and http://example.org/x?y=1.")) == [
        "https://example.org/a_(b)",
        "http://example.org/x?y=1",
    ]
    assert list(find_ibans("GB29 NWBK 6016 1331 9268 19 but not GB28 NWBK 6016 1331 9268 19")) == ["GB29NWBK60161331926819"]


@pytest.mark.parametrize(
    ("markdown", "metadata", "expected"),
    [
        ("---\ntitle: 'Front'\n---\n# Head\n", {"title": "Own"}, ("Front", "front_matter")),
        ("# Head\n", {"title": "Own words"}, ("Own words", "metadata")),
        ("# Head\n", {"title": "Microsoft Word - draft.docx"}, ("Head", "heading")),
        ("# Head\n", {"title": 7}, ("Head", "heading")),
        ("Head line\n=========\n\ntext", {}, ("Head line", "heading")),
        ("\n```text\n**First** line\n```\n", {}, ("First line", "first_line")),
        ("| 1 | 2 |\n|---|---|\n", {}, ("report", "file_name")),
    ],
)
def test_a_title_is_taken_from_the_best_source_and_names_it(markdown: str, metadata: dict[str, Any], expected: tuple[str, str]) -> None:
    title = extract_locally(markdown, (), "report.pdf", metadata)["title"]
    assert (title["text"], title["source"]) == expected


@pytest.mark.parametrize("text", ["", "12 34 56", "|---|---|", "...", "\U0001f600"])
def test_no_language_is_named_where_there_is_none(text: str) -> None:
    assert extract(text)["language"] is None


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("fr", "La facture est payable dans les trente jours suivant sa réception."),
        ("es", "La factura debe pagarse dentro de los treinta días siguientes a su recepción."),
        ("ja", "請求書は受領後三十日以内にお支払いください。"),
        ("ru", "Счёт подлежит оплате в течение тридцати дней."),
    ],
)
def test_other_languages_are_told_apart(code: str, text: str) -> None:
    assert extract(text)["language"]["code"] == code


def test_cells_of_forms_become_pairs() -> None:
    found = extract("| Order: | 17 | Cinema: | Downtown |\n|---|---|---|---|\n| Date: | 1 May 2024 | Note: |  |\n")
    assert facts(found, "key_values", "key", "value") == [("Order", "17"), ("Cinema", "Downtown"), ("Date", "1 May 2024")]


def test_limits_are_kept_and_named() -> None:
    many = "\n\n".join(f"Key{chr(97 + n % 26)}{chr(97 + n // 26)}: {n} EUR a{n}@example.org\n\n# H{n}" for n in range(MAX_FACTS + 20))
    table = "\n\n| a | b |\n|---|---|\n" + "| x | y |\n" * 600
    found = extract(many + table)
    assert found["truncated"] == ["amounts", "emails", "key_values", "outline", "tables"]
    assert len(found["emails"]) == MAX_FACTS
    assert (len(found["tables"][0]["rows"]), found["tables"][0]["row_count"]) == (500, 600)
    assert len(json.dumps(extract("| " + "cell " * 500 + "|\n|---|\n" + ("| " + "x" * 5000 + " |\n") * 3000))) < 1_000_000


def test_repeated_facts_are_counted_once_with_their_first_page() -> None:
    found = extract("5 EUR\n\n5 EUR\n", (PageMark(1, 0), PageMark(2, 7)))
    assert found["amounts"] == [{"currency": "EUR", "value": "5", "text": "5 EUR", "page": 1, "count": 2}]


_PIECES = st.sampled_from([
    "1", "12", "31", "2024", "99", "/", "-", " ", "\n", "March", "septiembre", "st", "of ", "del ", ".", ",", "€", "$", "EUR", "Franken",
    "Mio.", "1,234.56", "01.03.", "1. 2. ", "2024-01-01", "--", "–", "x" * 30, "y" * 62, " " * 45, "de", "T1", "ſ",
])  # fmt: skip


@settings(deadline=None, max_examples=500)
@given(st.lists(_PIECES, max_size=40).map("".join))
def test_looking_around_digits_alone_misses_and_adds_nothing(text: str) -> None:
    assert [match.span() for match in dates._find(text)] == [match.span() for match in dates._DATE.finditer(text)]
    everywhere = [" ".join(match[0].split()) for match in amounts._AMOUNT.finditer(text)]
    assert [found.text for found in find_amounts(text)] == everywhere


@pytest.mark.parametrize(
    "fact",
    [
        "31st   of septiembre.,   del 2024", "1 May 1999de", "März 2024", "2024-03-01T1", "01. 03. 2024", "01.01.2024-31.12.2024",
        "2024-01-01/2024-02-01", "01/03/24-02/03/24", "US$ - 1,234 million", "US$ -1,234 million", "1 Euros", "Fr. 5",
    ],
)  # fmt: skip
def test_where_the_digits_around_a_fact_lie_is_no_matter(fact: str) -> None:
    for gap in range(30, 110):
        for text in (f"2024 {'z' * gap} {fact}", f"2024{'z' * gap} {fact} {'z' * gap}7 EUR 2023", f"{fact}{' ' * gap}{fact}"):
            assert [match.span() for match in dates._find(text)] == [match.span() for match in dates._DATE.finditer(text)]
            everywhere = [" ".join(match[0].split()) for match in amounts._AMOUNT.finditer(text)]
            assert [found.text for found in find_amounts(text)] == everywhere


@pytest.mark.parametrize("text", ["a_b c-d ß² 12", "“naïve” – café", "Ω μέγα_x", "日本 語", "", "\x81\x8d _"])
def test_words_are_runs_of_letters_and_digits_whatever_the_characters(text: str) -> None:
    assert extract_locally(text, (), "a", {})["statistics"]["words"] == len(re.findall(r"[^\W_]+", text))


@settings(deadline=None, max_examples=200)
@given(
    st.one_of(st.text(max_size=300), st.text("|-:\n#`*_[]()<>=\\&;$€0123.,-/ @ab", max_size=300)),
    st.text(max_size=40),
    st.lists(st.integers(0, 300)),
)
def test_any_text_gives_output_that_fits_the_schema(markdown: str, name: str, starts: list[int]) -> None:
    pages = tuple(PageMark(number, start) for number, start in enumerate(sorted(starts), start=1))
    assert extract(markdown, pages, name, title=name) == extract(markdown, pages, name, title=name)


@pytest.mark.parametrize(
    "unit",
    [
        "1,234 ",
        "@",
        "a@a.",
        "€1",
        " ",
        "1 jan ",
        "1.1.2024-",
        "1. 1. ",
        "a: b  ",
        "[",
        "[a](",
        "<a",
        "\\",
        "|",
        "&#1",
        "\n",
        "DE89 3704 ",
        "https://",
        "x:\t",
        "# ",
    ],
)
def test_hostile_repetition_ends(unit: str) -> None:
    extract(unit * (200_000 // len(unit)))


def test_structure_sees_blocks_as_markdown_does() -> None:
    text = (
        "---\nkey: value\n---\nOne\n===\n- item\n---\n~~~\n# code\n~~~\n    # indented\n"
        "### **Bold** `x` ###\n#none\n| a \\| b | c |\n|:-:|--|\n| 1 | 2 |\nend"
    )
    structure = read_structure(text)
    assert [(heading.level, heading.text) for heading in structure.headings] == [(1, "One"), (3, "Bold x")]
    assert [text[fence.start : fence.end] for fence in structure.fences] == ["~~~\n# code\n~~~\n"]
    assert [text[table.start : table.end] for table in structure.tables] == ["| a \\| b | c |\n|:-:|--|\n| 1 | 2 |\n"]
    assert cells("| a \\| b | c |") == ["a | b", "c"]
    assert plain("![pic](x) [word](y) snake_case _it_ ~~no~~ \\*") == "pic word snake_case it no *"


@pytest.mark.parametrize(
    ("block", "info"),
    [
        ("```\n    ```\n# code\n\t~~~\n```\n", ""),
        ("   ```sh\n# code\n      ```\n", "sh"),
        ("~~~ a `b` c\n# code\n~~~~\n", "a `b` c"),
        ("````\n```\n# code\n````\n", ""),
    ],
    ids=["indented inside", "in a list", "info with backticks", "shorter inside"],
)
def test_a_code_block_ends_where_markdown_ends_it(block: str, info: str) -> None:
    text = f"{block}# After\n"
    structure = read_structure(text)
    assert [(text[fence.start : fence.end], fence.info) for fence in structure.fences] == [(block, info)]
    assert [heading.text for heading in structure.headings] == ["After"]
    assert not read_structure("``` a`b\n").fences


@pytest.mark.parametrize(
    "front",
    [
        "---\nkey: value\n---\n",
        "---\n# a comment\n\ntags:\n- a\n- b\n...\n",
        "---\n- a\nkey:\n  # of units\n---\n",
        "\n---\nkey: value\n---\n",
        '+++\n# a comment\ntitle = "x"\n[menu]\n+++\n',
    ],
    ids=["key first", "comment first", "list first", "blank before", "toml"],
)
def test_front_matter_is_no_text(front: str) -> None:
    structure = read_structure(f"{front}# Text\n")
    assert structure.front_matter_end == len(front)
    assert [heading.text for heading in structure.headings] == ["Text"]


@pytest.mark.parametrize(
    "text",
    [
        "---\n# Text\nDate: 2020\nand a sentence.\n\n---\n",
        "---\n\n# Text\nDate: 2020\n\n---\n",
        "\n---\n# Text\nNote: this\nis prose.\n\n---\n",
        "+++\n# Text\n+++\n",
        "---\n# Text\nDate: 2020\n",
    ],
)
def test_text_between_rules_is_no_front_matter(text: str) -> None:
    structure = read_structure(text)
    assert (structure.front_matter_end, [heading.text for heading in structure.headings]) == (0, ["Text"])


def test_a_title_is_found_in_front_matter_of_both_kinds() -> None:
    for front in ('---\n# a comment\ntitle: "The title"\n---\n', '+++\ndraft = true\ntitle = "The title"\n+++\n'):
        assert extract(f"{front}# Text\n")["title"] == {"text": "The title", "source": "front_matter"}


@pytest.mark.parametrize(
    "block",
    ["<!--\n# old\n\nOld\n---\n\n-->\n", "<!-- # x --> \n", "<PRE class='x'>\n# code\n\n```\n</pre>\n", "  <pre>\n| a |\n|---|\n</PRE>\n"],
)
def test_comments_and_preformatted_html_have_no_blocks(block: str) -> None:
    structure = read_structure(f"Text\n\n{block}# After\n\n<!-- x\n\n<pre>\n# Last\n")
    assert [heading.text for heading in structure.headings] == ["After", "Last"], "what never ends is no block"
    assert not structure.fences + structure.tables
    assert not read_structure("<presto>\n").headings and len(read_structure("<presto>\n# a\n</pre>").headings) == 1


def test_real_documents_fit_the_schema() -> None:
    corpus = Path(os.environ.get("DOCMILL_CORPUS", ROOT.parent / "shared" / "corpus"))
    if not corpus.is_dir():
        pytest.skip("no corpus: set DOCMILL_CORPUS")
    files = sorted([*(corpus / "good" / "md").iterdir(), *(corpus / "good" / "gt").glob("*.md")])
    assert files
    for file in files:
        extract(file.read_text("utf-8", errors="replace"), file_name=file.name)


async def test_the_stage_fills_raw_extraction_from_a_child_process() -> None:
    sandbox = ProcessSandbox(children=1)
    tools = cast("Tools", SimpleNamespace(extractor=None, paid=None, sandbox=sandbox))
    document = Document("d", 1, "u", "invoice.pdf", "p", Milestone.EMBEDDINGS_STORED, markdown=INVOICE, parse_metadata={"title": "Own"})
    try:
        done = await extract_stage.run(document, tools)
    finally:
        await sandbox.aclose()
    assert done.raw_extraction == extract_locally(INVOICE, (), "invoice.pdf", {"title": "Own"})
    assert done == replace(document, raw_extraction=done.raw_extraction)


async def test_the_outline_of_code_has_no_comments() -> None:
    sandbox = ProcessSandbox(children=1)
    tools = cast("Tools", SimpleNamespace(extractor=None, paid=None, sandbox=sandbox))
    text = "# the limit in units\nlimit: 5\n"
    document = Document("d", 1, "u", "app.yml", "p", Milestone.EMBEDDINGS_STORED, markdown=text, mime_type="text/plain")
    try:
        code, note = [await extract_stage.run(replace(document, file_name=name), tools) for name in ("app.yml", "app.txt")]
    finally:
        await sandbox.aclose()
    assert [len((done.raw_extraction or {})["outline"]) for done in (code, note)] == [0, 1]
