"""What a summary is made of: whatever documents hold, whatever they are called, however many there are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

import sql.migrate
from jobs.retention import prune_rows
from tests.integration.batches import BATCH, accept, add_archive, batch_of, begin, reconciler, seal, summary
from tests.integration.conftest import Bench
from tests.summaries import check, shape

COMPLETE = """UPDATE file_extractions SET state = 'complete', milestone = 'complete', served_version = 1, lease_until = NULL,
    chunk_count = 0, raw_extraction = %s, processing_started_at = now(), processing_completed_at = clock_timestamp()"""


def completed(bench: Bench, extraction: Any = None, *doc_ids: str) -> None:
    """A batch whose documents are complete with this extraction."""
    batch_of(bench, *(doc_ids or ("a",)))
    bench.conn.execute("UPDATE file_extractions SET state = 'working', claim = claim + 1, lease_until = now() + interval '1 min'")
    bench.conn.execute(COMPLETE, [Jsonb(extraction)])
    bench.conn.execute("SELECT settle_batch('b')")


EXTRACTION = {
    "title": {"text": '=HYPERLINK("http://x") <b>\u202eTitle', "source": "heading"},
    "language": {"code": "de", "confidence": 0.9},
    "dates": [{"iso": f"2024-01-{day:02}"} for day in range(1, 20)],
    "amounts": [{"currency": "EUR", "value": "1.50", "text": "1,50 €", "page": 1}, {"value": 7}],
    "key_values": [{"key": "K" * 100, "value": "v" * 1000}] * 20,
    "statistics": {"words": 12},
}


async def test_key_fields_are_few_short_and_stay_data(bench: Bench) -> None:
    completed(bench, EXTRACTION)
    fields = summary(bench)[0]["files"][0]["key_fields"]
    assert fields["title"] == '=HYPERLINK("http://x") <b>\u202eTitle'
    assert (fields["language"], fields["words"]) == ("de", 12)
    assert fields["dates"] == [f"2024-01-0{day}" for day in range(1, 6)]
    assert fields["amounts"] == [
        {"currency": "EUR", "value": "1.50", "text": "1,50 €"},
        {"currency": None, "value": "7", "text": None},
    ]
    assert (len(fields["key_values"]), len(fields["key_values"][0]["key"]), len(fields["key_values"][0]["value"])) == (8, 60, 300)


@pytest.mark.parametrize(
    "extraction",
    [
        {}, [], "text", 5, None, {"title": 5, "language": [], "dates": "2024", "amounts": {"x": 1}, "key_values": [1, [2], None]},
        {"dates": {"iso": 5}, "statistics": "no", "title": {"text": {"deep": [1]}}, "amounts": [[{"value": {"a": 1}}]]},
    ],
)  # fmt: skip
async def test_an_extraction_of_another_shape_leaves_fields_empty(bench: Bench, extraction: Any) -> None:
    completed(bench, extraction)
    assert summary(bench)[0]["files"][0]["outcome"] == "succeeded"


@pytest.mark.parametrize(
    ("source", "batch", "wanted"),
    [
        ("/data/in/a/b.txt", "/data/in", "a/b.txt"),
        ("/data/in/a/b.txt", "/data/in/", "a/b.txt"),
        ("/data/in/z.zip/x/b.txt", "/data/in", "z.zip/x/b.txt"),
        ("/data/in.zip/x/b.txt", "/data/in.zip", "x/b.txt"),
        ("x/b.txt", "/data/in.zip", "x/b.txt"),
        ("/data/inner/b.txt", "/data/in", "name"),
        ("/x/z.ZIP/y/b.txt", None, "z.ZIP/y/b.txt"),
        ("/b.txt", "/", "b.txt"),
        (None, "/data/in", "name"),
        ("/elsewhere/b.txt", None, "name"),
        ("/elsewhere/b.txt", "", "name"),
        ("/x/z.zip/y/b.txt", "", "z.zip/y/b.txt"),
    ],
)
def test_the_path_of_a_file_inside_its_batch(conn: psycopg.Connection, source: str | None, batch: str | None, wanted: str) -> None:
    assert conn.execute("SELECT path_in_batch(%s, %s, 'name')", [source, batch]).fetchone() == (wanted,)


async def test_times_are_utc_whatever_the_session_thinks(bench: Bench) -> None:
    bench.conn.execute("SET timezone = 'Asia/Tokyo'")
    bench.conn.execute("SET search_path = pg_catalog")
    bench.conn.execute("CREATE SCHEMA app; SET search_path = app, public")
    completed(bench)
    ui, _ = summary(bench)
    assert all(moment["at"].endswith("+00:00") for moment in ui["timeline"])
    assert bench.one("SHOW timezone") == ("Asia/Tokyo",)


async def test_the_progress_of_a_larger_batch_is_in_its_timeline(bench: Bench) -> None:
    completed(bench, None, *(f"d{number:02}" for number in range(12)))
    assert [moment["text"] for moment in summary(bench)[0]["timeline"]] == [
        "the submission began", "everything was submitted", "work began", "25 % of the files done", "50 % of the files done",
        "75 % of the files done", "completed",
    ]  # fmt: skip


async def test_beyond_the_limit_those_that_did_not_succeed_are_listed(bench: Bench) -> None:
    run = begin(bench.conn)
    add_archive(bench.conn, run, "z.zip/", "failed", "z.zip is no zip.")
    accept(bench.conn, run, "a", "c")
    accept(bench.conn, run, "d", folder="/data/in/deep")
    bench.conn.execute("UPDATE file_extractions SET state = 'working', claim = claim + 1, lease_until = now() + interval '1 min'")
    bench.conn.execute(COMPLETE, [None])
    cards = bench.one("SELECT summary_cards(b, 2) FROM processing_jobs AS b")[0]
    assert [card["path"] for card in cards] == ["a.txt", "z.zip"]
    tree = bench.one("SELECT summary_tree(b, 2) FROM processing_jobs AS b")[0]
    assert [(f["path"], f["files_here"], f["files_omitted"], len(f["files"])) for f in tree["folders"]] == [
        ("", 3, 1, 2),
        ("deep", 1, 1, 0),
    ]
    assert bench.one("SELECT summary_tree(b, 1) -> 'folders_omitted' FROM processing_jobs AS b") == (1,)
    seal(bench.conn, run, 3)
    summary(bench)


async def test_a_batch_ends_also_where_its_summary_would_be_larger_than_json_can_be(bench: Bench) -> None:
    bench.conn.execute(
        """CREATE OR REPLACE FUNCTION summary_cards(batch processing_jobs, most integer) RETURNS jsonb LANGUAGE plpgsql AS $$ BEGIN
            IF most > 0 THEN RAISE 'too large' USING ERRCODE = 'program_limit_exceeded'; END IF;
            RETURN '[]'; END $$"""
    )
    completed(bench, None, "a", "c")
    assert bench.one(BATCH)[0] == "completed"
    ui, nested = summary(bench)
    assert (ui["files_omitted"], ui["totals"]["files"], nested["folders"][0]["files_omitted"]) == (2, 2, 2)


async def test_very_deep_folders_are_counted_at_a_limit(bench: Bench) -> None:
    run = begin(bench.conn)
    accept(bench.conn, run, "a", folder="/data/in" + "/d" * 500)
    seal(bench.conn, run, 1)
    await bench.drain()
    _, nested = summary(bench)
    assert max(folder["depth"] for folder in nested["folders"]) == 32
    assert nested["folders"][-1]["files_here"] == 1


async def test_a_deleted_documents_card_leaves_the_summaries_of_all_its_runs(bench: Bench) -> None:
    for _ in range(2):
        batch_of(bench, "a", "c")
        await bench.drain()
        bench.conn.execute("SELECT settle_batch('b')")
    assert bench.one("SELECT forget_deleted_documents('b')") == (0,)
    bench.conn.execute("DELETE FROM file_extractions WHERE doc_id = 'a'")
    assert bench.one("SELECT forget_deleted_documents('b')") == (2,)
    for ui, nested in bench.all("SELECT ui_json, nested_summary FROM run_summaries"):
        check(ui, nested)
        assert [card["doc_id"] for card in ui["files"]] == ["c"]
        assert (ui["files_omitted"], ui["totals"]["files"]) == (1, 2)
        assert "a.txt" not in json.dumps(nested)
    bench.conn.execute("SELECT settle_batch('b')")
    assert bench.one("SELECT total_files FROM processing_jobs") == (1,), "settled again, the present run tells of what there is"


async def test_a_deleted_documents_card_leaves_the_summary_of_a_batch_that_it_had_left(bench: Bench) -> None:
    batch_of(bench, "a", "c")
    await bench.drain()
    other = begin(bench.conn, "other")
    accept(bench.conn, other, "a", "c", batch_id="other")
    seal(bench.conn, other, 2, "other")
    for batch_id in ("b", "other"):
        cards = "SELECT jsonb_path_query_array(ui_json, '$.files[*].doc_id') FROM run_summaries WHERE batch_id = %s"
        assert bench.one(cards, batch_id) == (["a", "c"],)
    bench.conn.execute("SELECT delete_document('a')")
    assert (await reconciler(bench).pass_once())["renewed"] == 2
    for batch_id, total in (("b", 2), ("other", 1)):
        assert bench.one(cards, batch_id) == (["c"],)
        assert bench.one("SELECT total_files FROM processing_jobs WHERE batch_id = %s", batch_id) == (total,)
    assert bench.one("SELECT count(*) FROM summaries_to_renew") == (0,)


async def test_a_deleted_documents_card_leaves_also_the_summary_of_a_batch_that_only_had_it(bench: Bench) -> None:
    batch_of(bench, "a", "c")
    await bench.drain()
    for batch_id in ("second", "third"):
        run = begin(bench.conn, batch_id)
        bench.conn.execute("SELECT adopt_documents(%s, %s, 'ann', ARRAY['a', 'c'], 1000)", [batch_id, run])
        seal(bench.conn, run, 2, batch_id)
        bench.conn.execute("SELECT settle_batch(%s)", [batch_id])
    bench.conn.execute("SET docmill.prune = 'on'")
    bench.conn.execute("TRUNCATE document_events")  # what was done long ago is told by nothing else
    bench.conn.execute("SELECT delete_document('a')")
    assert (await reconciler(bench).pass_once())["renewed"] == 1
    for _ in range(2):
        prune_rows(bench.settings, bench.conn, dry_run=True)
        assert bench.one("SELECT count(*) FROM summaries_to_renew") == (0,)
    prune_rows(bench.settings, bench.conn)
    prune_rows(bench.settings, bench.conn)
    assert (await reconciler(bench).pass_once())["renewed"] == 2
    prune_rows(bench.settings, bench.conn)
    assert bench.one("SELECT count(*) FROM summaries_to_renew") == (0,)
    cards = "SELECT batch_id, jsonb_path_query_array(ui_json, '$.files[*].doc_id') FROM run_summaries ORDER BY 1"
    assert bench.all(cards) == [("b", ["c"]), ("second", ["c"]), ("third", ["c"])]
    assert bench.one("SELECT count(*) FROM run_summaries WHERE nested_summary::text LIKE '%%a.txt%%'") == (0,)


def test_batches_from_before_are_taken_over_as_they_stood(empty_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = sql.migrate._own()
    with psycopg.connect(empty_database, autocommit=True) as conn:
        monkeypatch.setattr(sql.migrate, "_own", lambda: [path for path in everything if path.name < "0009"])
        sql.migrate.migrate(conn)
        for batch_id in ("ended", "open"):
            run = begin(conn, batch_id)
            accept(conn, run, batch_id, batch_id=batch_id)
            seal(conn, run, 1, batch_id)
        conn.execute("UPDATE file_extractions SET state = 'cancelled'")
        conn.execute("SELECT settle_batch('ended')")
        monkeypatch.undo()
        sql.migrate.migrate(conn)
        rows = conn.execute(
            "SELECT batch_id, status, settled_at = completed_at, run_started_at = created_at FROM processing_jobs ORDER BY 1"
        )
        assert rows.fetchall() == [("ended", "failed", True, True), ("open", "processing", None, True)]
        conn.execute("SELECT settle_batch('open')")
        assert conn.execute("SELECT batch_id FROM run_summaries").fetchall() == [("open",)]


def test_the_example_is_what_the_schema_says_and_has_every_field(request: pytest.FixtureRequest) -> None:
    docs = Path(request.config.rootpath) / "docs"
    example = json.loads((docs / "run_summary.example.json").read_text("utf-8"))
    check(example["ui_json"], example["nested_summary"])
    assert {".ui_json.files[].key_fields.title", ".nested_summary.folders[].files[].sections[].heading"} <= set(shape(example))
