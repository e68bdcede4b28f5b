"""What has been kept long enough goes, by policy; nothing of a document that has not ended ever does, and the audit trail else stays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import psycopg
import pytest

import jobs
from jobs import retention
from jobs.adapters.storage import LocalStorage
from jobs.batch.submission import archive_upload_id
from jobs.front import close_sync
from jobs.leftovers import remove_noted_files
from jobs.orphans import FEW, PARTS, Orphans, find_orphans, part_of
from jobs.retention import SomebodyElsePrunes, prune_rows
from models.settings import Settings, load_settings
from sql import query
from tests.archives import write_zip, zip_bytes
from tests.integration.batches import batch_of, begin
from tests.integration.conftest import Bench, sha
from tests.integration.test_cli import docmill, eventually

DAY = 86_400
AS_A_WORKER = """
import asyncio
from jobs.maintenance import app, prune

async def work():
    async with app.open_async():
        print(await prune(0))

asyncio.run(work())
"""


@pytest.fixture(autouse=True)
def front_door(settings: Settings) -> Iterator[None]:
    load_settings.cache_clear()
    yield
    close_sync()
    load_settings.cache_clear()


def prune(bench: Bench, *, dry_run: bool = False, **days: int) -> dict[str, int]:
    """Prune with these policies alone and return what went."""
    off = {policy.setting: 0 for policy in retention.POLICIES}
    removed = prune_rows(bench.settings.model_copy(update={**off, **days}), bench.conn, dry_run=dry_run, pause=lambda _: None)
    return {what: count for what, count in removed.items() if count}


def age(bench: Bench, days: float) -> None:
    """Let everything that is there have happened earlier."""
    bench.conn.execute("ALTER TABLE document_events DISABLE TRIGGER document_events_append_only")
    for table, column in (
        ("document_events", "at"), ("procrastinate_events", "at"), ("dead_letters", "created_at"), ("dead_letters", "resolved_at"),
        ("alerts", "at"), ("alerts", "forwarded_at"), ("provider_usage", "started_at"), ("provider_usage", "give_up_at"),
        ("alert_conditions", "resolved_at"),
    ):  # fmt: skip
        bench.conn.execute(f"UPDATE {table} SET {column} = {column} - make_interval(secs => %s)", [days * DAY])
    bench.conn.execute("ALTER TABLE document_events ENABLE TRIGGER document_events_append_only")


def counts(bench: Bench) -> dict[str, int]:
    tables = ("procrastinate_jobs", "procrastinate_events", "document_events", "dead_letters", "alerts", "provider_usage")
    return {table: bench.one(f"SELECT count(*) FROM {table}")[0] for table in tables}


async def test_ended_jobs_go_with_their_events_and_those_of_open_documents_and_of_applications_stay(bench: Bench) -> None:
    for doc_id in ("done", "open"):
        bench.submit(doc_id)
    bench.conn.execute("DELETE FROM procrastinate_jobs WHERE args->>'doc_id' = 'open'")
    await bench.drain()
    # Jobs of the open document that have ended, as after a hand-on; one of an application; one that only lately ended.
    bench.conn.execute(
        """INSERT INTO procrastinate_jobs (queue_name, task_name, args, status) VALUES
        ('cpu', 'validate', '{"doc_id": "open"}', 'doing'), ('q', 'own_task', '{}', 'doing'),
        ('cpu', 'parse', '{"doc_id": "gone"}', 'doing')"""
    )
    bench.conn.execute("UPDATE procrastinate_jobs SET status = 'succeeded' WHERE status = 'doing'")
    age(bench, 8)
    bench.conn.execute(
        "UPDATE procrastinate_events SET at = now() WHERE job_id = (SELECT max(id) FROM procrastinate_jobs) AND type = 'succeeded'"
    )
    before = counts(bench)
    assert prune(bench, job_retention_days=7, dry_run=True) == {"finished jobs": 1}
    assert counts(bench) == before
    assert prune(bench, job_retention_days=7) == {"finished jobs": 1}
    assert bench.all("SELECT task_name, args->>'doc_id' FROM procrastinate_jobs ORDER BY id") == [
        ("validate", "open"), ("own_task", None), ("parse", "gone"),
    ]  # fmt: skip
    assert bench.one(
        "SELECT count(*) FROM procrastinate_events e WHERE NOT EXISTS (SELECT FROM procrastinate_jobs j WHERE j.id = e.job_id)"
    ) == (0,)
    assert counts(bench)["document_events"] == before["document_events"]


async def test_nothing_goes_before_its_time_and_nothing_where_the_policy_is_to_keep_it(bench: Bench) -> None:
    bench.submit("a")
    await bench.drain()
    age(bench, 6)
    before = counts(bench)
    assert prune(bench, job_retention_days=7, event_retention_days=7) == {}
    age(bench, 1000)
    assert prune(bench) == {}
    assert counts(bench) == before


async def test_the_trail_of_a_deleted_document_goes_and_that_of_its_successor_and_of_others_stays(bench: Bench) -> None:
    for doc_id in ("gone", "back", "there"):
        bench.submit(doc_id)
    await bench.drain()
    for doc_id in ("gone", "back"):
        bench.conn.execute("SELECT delete_document(%s)", [doc_id])
    # A worker that came too late, after the deletion.
    bench.conn.execute("INSERT INTO document_events (doc_id, user_id, correlation_id, event) VALUES ('gone', 'u', 'c', 'fenced_off')")
    age(bench, 366)
    bench.submit("back")
    first = bench.one("SELECT min(id) FROM document_events WHERE doc_id = 'back' AND at > now() - interval '1 day'")[0]
    kept = bench.all("SELECT id FROM document_events WHERE doc_id = 'there' OR id >= %s ORDER BY id", first)
    removed = prune(bench, deleted_event_retention_days=365)
    assert removed["events of deleted documents"] > 10
    assert bench.all("SELECT id FROM document_events ORDER BY id") == kept
    assert prune(bench, deleted_event_retention_days=365) == {}


async def test_a_document_deleted_twice_keeps_what_is_younger_than_its_policy(bench: Bench) -> None:
    bench.submit("a")
    bench.conn.execute("SELECT delete_document('a')")
    age(bench, 300)
    bench.submit("a")
    age(bench, 100)
    bench.conn.execute("SELECT delete_document('a')")
    assert prune(bench, deleted_event_retention_days=365) == {"events of deleted documents": 2}
    assert bench.all("SELECT event FROM document_events ORDER BY id") == [("submitted",), ("deleted",)]


async def test_the_trail_of_a_document_that_is_there_goes_only_where_policy_says_so_and_not_before_it_has_ended(bench: Bench) -> None:
    bench.submit("ended")
    await bench.drain()
    bench.submit("open")
    age(bench, 40)
    assert prune(bench, deleted_event_retention_days=30) == {}
    assert prune(bench, event_retention_days=30)["events of documents"] >= 7
    assert bench.all("SELECT doc_id FROM document_events") == [("open",)]


def test_the_trail_lets_nobody_delete_in_passing(bench: Bench) -> None:
    bench.submit("a")
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="append-only"):
        bench.conn.execute("DELETE FROM document_events")
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="append-only"):
        bench.conn.execute("UPDATE document_events SET detail = '{}'")
    # Pruning opens the door for its own transaction only, on the same connection too.
    prune(bench, event_retention_days=1)
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="append-only"):
        bench.conn.execute("DELETE FROM document_events")


async def test_letters_alerts_and_the_ledger_go_when_they_are_settled_and_old(bench: Bench) -> None:
    for doc_id in ("resolved", "open"):
        bench.submit(doc_id)
        bench.conn.execute(
            """INSERT INTO dead_letters (doc_id, version, user_id, correlation_id, stage, error_type, error_message)
            VALUES (%s, 1, 'default', 'c', 'parse', 'PERMANENT', 'broken')""",
            [doc_id],
        )
        usage(bench, doc_id)
    bench.conn.execute("UPDATE dead_letters SET resolved_at = now(), resolution = 'discarded' WHERE doc_id = 'resolved'")
    bench.conn.execute("UPDATE alerts SET forwarded_at = now() WHERE id = 1")
    age(bench, 500)
    # Both documents are still queued.
    assert prune(bench, dead_letter_retention_days=90, usage_retention_days=400, alert_retention_days=90) == {"alerts": 2}
    bench.conn.execute("UPDATE file_extractions SET state = 'cancelled' WHERE doc_id = 'resolved'")
    assert prune(bench, dead_letter_retention_days=90, usage_retention_days=400, alert_retention_days=90) == {
        "resolved dead letters": 1,
        "calls to outside services": 1,
    }
    assert bench.all("SELECT doc_id FROM dead_letters") == [("open",)]
    assert bench.all("SELECT doc_id FROM provider_usage") == [("open",)]


def test_what_was_spent_is_known_while_the_document_or_its_ledger_is_there(bench: Bench) -> None:
    for doc_id in ("there", "gone", "gone but in the ledger"):
        bench.submit(doc_id)
        usage(bench, doc_id)
    bench.conn.execute("INSERT INTO processing_jobs (batch_id, correlation_id) VALUES ('batch there', 'c')")
    bench.conn.execute("UPDATE provider_usage SET cost = 0.5")
    bench.conn.execute(
        "INSERT INTO cost_totals VALUES ('batch', 'batch gone', 1, 3), ('batch', 'batch gone', 2, 3), ('batch', 'batch there', 1, 3)"
    )
    bench.conn.execute("DELETE FROM file_extractions WHERE doc_id <> 'there'")
    age(bench, 500)
    bench.conn.execute("UPDATE provider_usage SET started_at = now(), give_up_at = now() WHERE doc_ids = ARRAY['gone but in the ledger']")
    assert prune(bench, usage_retention_days=400) == {"calls to outside services": 1, "costs of what is gone": 3}
    assert bench.all("SELECT name FROM cost_totals ORDER BY name") == [("batch there",), ("gone but in the ledger",), ("there",)]
    assert prune(bench, usage_retention_days=400) == {}


def usage(bench: Bench, doc_id: str, service: str = "s") -> None:
    bench.conn.execute(
        """INSERT INTO provider_usage (id, service, kind, doc_ids, batch_ids, user_ids, shares, give_up_at, outcome, finished_at)
        VALUES (gen_random_uuid(), %s, 'parse', ARRAY[%s], ARRAY[NULL], ARRAY['default'], ARRAY[1.0], now(), 'ok', now())""",
        [service, doc_id],
    )


def test_an_alert_that_a_webhook_may_still_be_sent_stays(bench: Bench) -> None:
    bench.conn.execute("SELECT alert('x', 'sent'), alert('x', 'not yet')")
    bench.conn.execute("UPDATE alerts SET forwarded_at = now() WHERE message = 'sent'")
    age(bench, 3)
    assert prune(bench, alert_retention_days=1) == {"alerts": 1}
    assert bench.all("SELECT message FROM alerts") == [("not yet",)]
    age(bench, 5)
    assert prune(bench, alert_retention_days=1) == {"alerts": 1}


async def test_many_windows_are_gone_through_and_what_must_stay_holds_up_nothing_behind_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "WINDOW", 7)
    for number in range(40):
        usage(bench, f"d{number}", service=f"s{number % 3}")
        bench.submit(f"d{number}")
    bench.conn.execute("UPDATE file_extractions SET state = 'cancelled' WHERE id % 2 = 0")
    bench.conn.execute("UPDATE procrastinate_jobs SET status = 'cancelled'")
    age(bench, 500)
    removed = prune(bench, job_retention_days=7, usage_retention_days=400, event_retention_days=30)
    assert removed == {"finished jobs": 20, "calls to outside services": 20, "events of documents": 20}


async def test_two_who_prune_at_once_remove_each_row_once_and_one_of_them_gives_way(bench: Bench, database: str) -> None:
    for number in range(60):
        bench.submit(f"d{number}")
    bench.conn.execute("UPDATE file_extractions SET state = 'cancelled'")
    age(bench, 40)
    settings = bench.settings.model_copy(update={"event_retention_days": 30})
    start, removed, gave_way = threading.Barrier(4), [0], []

    def work() -> None:
        with psycopg.connect(database, autocommit=True) as conn:
            start.wait()
            try:
                removed.append(prune_rows(settings, conn, pause=lambda _: None)["events of documents"])
            except SomebodyElsePrunes:
                gave_way.append(True)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(removed) == 60 and len(removed) + len(gave_way) == 5
    with bench.conn.transaction():
        bench.conn.execute("SELECT pg_advisory_xact_lock(%s)", [retention._LOCK])
        with psycopg.connect(database, autocommit=True) as other, pytest.raises(SomebodyElsePrunes):
            prune_rows(settings, other)


async def test_a_job_that_somebody_holds_is_passed_over(bench: Bench, database: str) -> None:
    for doc_id in ("a", "b"):
        bench.submit(doc_id)
    await bench.drain()
    age(bench, 8)
    with psycopg.connect(database) as holder:
        holder.execute("SELECT FROM procrastinate_jobs ORDER BY id LIMIT 1 FOR UPDATE")
        bench.conn.execute("SET lock_timeout = '10s'")
        assert prune(bench, job_retention_days=7) == {"finished jobs": 1}
    assert prune(bench, job_retention_days=7) == {"finished jobs": 1}


def test_a_summary_goes_with_its_batch(bench: Bench) -> None:
    bench.conn.execute("SELECT begin_batch('b', 'default', NULL, 'c')")
    bench.conn.execute("SELECT seal_batch('b', (SELECT run_id FROM processing_jobs), 0)")
    bench.conn.execute("SELECT delete_batch('b')")
    assert bench.one("SELECT count(*) FROM run_summaries") == (0,)


async def test_summaries_of_earlier_runs_go_a_while_after_a_later_one_and_the_last_stays(bench: Bench) -> None:
    for _ in range(3):
        batch_of(bench, "a", "c")
        await bench.drain()
    left = "SELECT id FROM run_summaries ORDER BY id"
    _, second, last = bench.all(left)
    assert prune(bench, summary_retention_days=30) == {}
    bench.conn.execute("UPDATE run_summaries SET created_at = now() - interval '31 days' WHERE id <= %s", [second[0]])
    assert prune(bench, summary_retention_days=30, dry_run=True) == {"summaries of earlier runs": 1}
    assert prune(bench, summary_retention_days=30) == {"summaries of earlier runs": 1}
    assert bench.all(left) == [second, last], "it is 30 days only since the second took the place of the first"
    bench.conn.execute("UPDATE run_summaries SET created_at = created_at - interval '31 days'")
    begin(bench.conn)  # a run that has not ended has no summary, and that of the last one is all there is
    assert prune(bench, summary_retention_days=30) == {"summaries of earlier runs": 1}
    assert bench.all(left) == [last]
    assert prune(bench, summary_retention_days=30) == {}


MANY_RUNS = """INSERT INTO run_summaries OVERRIDING SYSTEM VALUE SELECT (
    jsonb_populate_record(r, jsonb_build_object('id', r.id + n, 'run_id', gen_random_uuid(), 'batch_id', r.batch_id))
).* FROM run_summaries AS r, generate_series(1, %s) AS n"""


async def test_what_summaries_still_say_of_the_deleted_is_looked_for_in_windows_with_a_pause_and_until_it_is_to_stop(bench: Bench) -> None:
    batch_of(bench, "a", "c")
    await bench.drain()
    bench.conn.execute(MANY_RUNS, [2 * retention.SUMMARIES])
    noted = "SELECT count(*) > 0 FROM summaries_to_renew"
    pauses: list[float] = []
    settings = bench.settings.model_copy(update={policy.setting: 0 for policy in retention.POLICIES})
    prune_rows(settings, bench.conn, pause=pauses.append)
    assert (pauses, bench.one(noted)) == ([], (False,)), "nobody has deleted anything"
    bench.conn.execute("SELECT delete_document('a')")
    bench.conn.execute("DELETE FROM summaries_to_renew")
    prune_rows(settings, bench.conn, stop=lambda: True, pause=pauses.append)
    assert (pauses, bench.one(noted)) == ([], (False,))
    # What is left to say stands in the last of them alone.
    bench.conn.execute(
        """UPDATE run_summaries SET ui_json = '{"files": []}', nested_summary = '{"folders": []}'
        WHERE id < (SELECT max(id) FROM run_summaries)"""
    )
    prune_rows(settings, bench.conn, stop=lambda: len(pauses) == 2, pause=pauses.append)
    assert (len(pauses), bench.one(noted)) == (2, (False,))
    prune_rows(settings, bench.conn, pause=pauses.append)
    assert (len(pauses), bench.one(noted)) == (4, (True,))


ARCHIVES = """INSERT INTO batch_archives (batch_id, run_id, user_id, entry_path, source_prefix, file_path, state, error_message, ended_at)
SELECT b.batch_id, md5('run ' || r)::uuid, 'ann', n || '.zip/', '', 'uploads/z', 'unpacked', NULL,
    now() - interval '30 days' FROM processing_jobs AS b, generate_series(1, %(runs)s) AS r, generate_series(1, %(paths)s) AS n
ORDER BY r, n"""


@pytest.mark.parametrize(("runs", "paths"), [(1, 12000), (12000, 1)])
def test_a_window_of_archives_reads_no_more_of_them_the_more_their_batch_has(bench: Bench, runs: int, paths: int) -> None:
    begin(bench.conn)
    bench.conn.execute(ARCHIVES, {"runs": runs, "paths": paths})
    bench.conn.execute("ANALYZE batch_archives")
    read = """SELECT sum(pg_stat_get_xact_tuples_returned(c.oid)) FROM pg_class AS c LEFT JOIN pg_index AS i ON i.indexrelid = c.oid
        WHERE coalesce(i.indrelid, c.oid) = 'batch_archives'::regclass"""
    for days, removed in ((60, 0), (7, 0 if runs == 1 else 100)):
        for _ in range(7):  # by the plan for any values too
            with bench.conn.transaction(force_rollback=True):
                before = bench.one(read)[0]
                window = {"after": 0, "window": 100, "days": days}
                row = bench.conn.execute(query("prune_archives"), window, prepare=True).fetchone()
                assert row is not None and (row[0], row[3]) == (removed, True)
                assert bench.one(read)[0] - before < 1000


def test_an_archive_may_have_a_long_path_in_a_batch_with_a_long_name(bench: Bench) -> None:
    begin(bench.conn, "\U0001f4e6".join("abcdefghij") * 10)
    bench.conn.execute("UPDATE processing_jobs SET source_path = NULL")
    for number in range(2):
        path = "".join(sha256(f"{number} {n}".encode()).hexdigest() for n in range(60))[:2600] + "/"
        bench.conn.execute(
            """INSERT INTO batch_archives (batch_id, run_id, user_id, entry_path, source_prefix, file_path)
            SELECT b.batch_id, b.run_id, 'ann', %s, '', 'uploads/z' FROM processing_jobs AS b""",
            [path],
        )
    assert bench.one("SELECT count(*) FROM batch_archives") == (2,)


def test_of_archives_those_go_that_a_later_one_was_unpacked_for_long_enough_ago(bench: Bench) -> None:
    """By what has become of the archives of one path, in order: the last of them is of the present run."""
    run = begin(bench.conn)
    cases = {
        "oo": "-o", "fo": "-o", "co": "-o", "wo": "wo", "oy": "oy", "of": "of", "ow": "ow", "oyy": "oyy", "ofo": "--o", "oof": "-of",
        "ooy": "-oy", "yo": "-o", "yoy": "-oy", "o": "o",
    }  # fmt: skip
    states = {"o": ("unpacked", 8), "y": ("unpacked", 6), "f": ("failed", 8), "c": ("cancelled", 8), "w": ("waiting", None)}
    for path, fates in {**{case: case for case in cases}, "other": "f"}.items():
        for place, fate in enumerate(fates):
            state, days = states[fate]
            bench.conn.execute(
                """INSERT INTO batch_archives (
                    batch_id, run_id, user_id, entry_path, source_prefix, file_path, state, error_message, ended_at
                ) VALUES ('b', %s, 'ann', %s, '', 'uploads/z', %s, 'no', now() - make_interval(days => %s))""",
                [run if place == len(fates) - 1 else sha(f"{place}")[:32], f"{path}/", state, days],
            )
    prune(bench, archive_retention_days=7)
    left = dict(bench.all("SELECT entry_path, count(*) FROM batch_archives GROUP BY 1"))
    assert left == {f"{case}/": len(kept.strip("-")) for case, kept in cases.items()} | {"other/": 1}


# Files


def storage_of(bench: Bench) -> LocalStorage:
    return LocalStorage.prepared(bench.settings)


def look(bench: Bench, days: float = 8, **more: Any) -> Orphans:
    return find_orphans(bench.settings, bench.conn, now=time.time() + days * DAY, **more)


def test_an_archive_goes_once_another_was_unpacked_in_its_place_and_its_documents_stay(bench: Bench, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write_zip(folder / "same.zip", {"c.txt": "A text about belts."})
    for words in ("pumps", "valves"):
        inner = zip_bytes({"deep.txt": f"A text about small {words}."})
        write_zip(folder / "changing.zip", {"a.txt": f"A text about {words}.", "in.zip": inner})
        assert docmill("ingest", folder).returncode == 0
    bench.conn.execute("UPDATE batch_archives SET ended_at = ended_at - interval '10 days'")
    assert prune(bench, archive_retention_days=30) == {}
    stored = bench.all("SELECT DISTINCT file_path FROM batch_archives")
    assert prune(bench, archive_retention_days=7, dry_run=True) == {"replaced archives": 3}
    base = bench.settings.storage_base_path
    for (path,) in stored:
        os.utime(base / path, (0, 0))  # nobody is storing it at this moment
    told = docmill("prune", ARCHIVE_RETENTION_DAYS="7")
    assert "3 replaced archives" in told.stdout, told.stderr
    kept = bench.all("SELECT entry_path FROM batch_archives ORDER BY entry_path")
    assert kept == [("changing.zip/",), ("changing.zip/in.zip/",), ("same.zip/",)]
    # What has not changed is the same file for both runs. While transactions of other tests are open, the files are left for the next time.
    eventually(lambda: docmill("prune").returncode == 0 and sum((base / path).exists() for (path,) in stored) == 3)
    assert "nothing to do" in docmill("ingest", folder).stdout
    assert prune(bench, archive_retention_days=7) == {}


def test_a_replaced_archive_takes_no_file_along_that_was_not_stored_for_its_batch(bench: Bench) -> None:
    storage = storage_of(bench)
    others = storage.store_upload(archive_upload_id("bob's", ""), b"an earlier version of Bob's", 100).file_path
    own = storage.store_upload(archive_upload_id("b", ""), b"an earlier version of her own", 100).file_path
    (storage.base / "inbox").mkdir()
    (storage.base / "inbox/june.zip").write_bytes(b"hers")
    for number, path in enumerate(("inbox/june.zip", others, own, "inbox/july.zip")):
        bench.conn.execute(
            "SELECT submit_batch(%s, batch_id => 'b', user_id => 'alice', content_sha256 => repeat(%s, 64))", [path, str(number)]
        )
        bench.conn.execute("UPDATE batch_archives SET state = 'unpacked', ended_at = now() - interval '8 days'")
    assert prune(bench, archive_retention_days=7) == {"replaced archives": 3}
    assert bench.all("SELECT path FROM files_to_remove") == [(own,)]
    assert [path for path in (others, own, "inbox/june.zip") if (storage.base / path).exists()] == [others, own, "inbox/june.zip"]


def test_a_file_whose_submission_was_cut_off_goes_and_those_of_documents_stay(bench: Bench) -> None:
    for content in (b"one", b"two"):
        jobs.submit_document(content, doc_id="known")
    cut_off = storage_of(bench).base / storage_of(bench).store_upload("unknown", b"three", 100).file_path
    assert look(bench, days=6).noted == 0
    assert look(bench, dry_run=True).noted == 1
    assert bench.one("SELECT count(*) FROM files_to_remove") == (0,)
    assert look(bench) == Orphans(folders=2, noted=1)
    assert look(bench).noted == 0, "it is noted already"
    assert remove_noted_files(bench.settings, bench.conn) == 0, "nobody may have touched it for a while"
    os.utime(cut_off, (1, 1))
    while cut_off.exists():
        remove_noted_files(bench.settings, bench.conn)
    assert len(list((storage_of(bench).base / "uploads").rglob("*"))) == 3, "both versions of the document, in their folder"


def test_a_file_that_is_submitted_after_all_stays(bench: Bench, database: str) -> None:
    storage = storage_of(bench)
    stored = storage.store_upload("late", b"content", 100)
    with psycopg.connect(database) as caller:
        jobs.submit_document(b"content", doc_id="late", connection=caller)
        assert look(bench).noted == 1, "not committed, so nothing speaks for it yet"
        os.utime(storage.base / stored.file_path, (1, 1))
        assert remove_noted_files(bench.settings, bench.conn) == 0
        caller.commit()
    assert remove_noted_files(bench.settings, bench.conn) == 0
    until = time.monotonic() + 20
    while (
        bench.one("SELECT count(*) FROM files_to_remove") != (0,) and time.monotonic() < until
    ):  # other tests' transactions are waited for
        assert remove_noted_files(bench.settings, bench.conn) == 0
        time.sleep(0.05)
    assert (storage.base / stored.file_path).exists()
    assert bench.one("SELECT count(*) FROM files_to_remove") == (0,)


def test_files_of_another_database_are_not_taken_for_left_overs(bench: Bench) -> None:
    storage = storage_of(bench)
    for number in range(FEW + 1):
        storage.store_upload(f"d{number}", b"x", 100)
    assert look(bench) == Orphans(folders=FEW + 1, suspicious=FEW + 1)
    assert bench.one("SELECT count(*) FROM files_to_remove") == (0,)
    assert look(bench, believe=True).noted == FEW + 1


def test_files_of_another_database_stay_also_where_each_part_has_few_of_them(bench: Bench) -> None:
    storage = storage_of(bench)
    for number in range(40):
        storage.store_upload(f"d{number}", b"x", 100)
    looks = [look(bench, part=part) for part in range(PARTS)]
    assert max(found.folders for found in looks) <= FEW
    assert bench.one("SELECT count(*) FROM files_to_remove") == (0,)
    assert {found.suspicious for found in looks if found.folders} == {40}, "what is said is said of the whole storage"


def test_a_left_over_goes_also_where_it_is_much_of_its_part(bench: Bench) -> None:
    for number in range(30):
        jobs.submit_document(b"x", doc_id=f"d{number}")
    storage_of(bench).store_upload("unknown", b"x", 100)
    assert sum(look(bench, part=part).noted for part in range(PARTS)) == 1


def test_all_parts_together_look_at_each_folder_once(bench: Bench) -> None:
    for number in range(30):
        jobs.submit_document(b"x", doc_id=f"d{number}")
    assert sum(look(bench, part=part).folders for part in range(PARTS)) == 30


@pytest.mark.parametrize("hours", [range(24), range(8, 19), range(3, 4)], ids=["round the clock", "in working hours", "one hour"])
def test_workers_look_at_all_parts_whatever_hours_they_run(hours: range) -> None:
    hour, day = 3600, 86_400
    looks = [part_of(1_700_000_000 // day * day + n * day + at * hour + 17 * 60) for n in range(PARTS) for at in hours]
    assert set(looks) == set(range(PARTS))
    if len(hours) == 24:
        assert all(set(looks[start : start + 24]) == set(range(PARTS)) for start in range(len(looks) - 24)), "within any day"


def test_what_is_not_ours_among_the_files_stays(bench: Bench, tmp_path: Path) -> None:
    base = storage_of(bench).base
    outside = tmp_path / "outside"
    outside.mkdir(exist_ok=True)
    (outside / ("a" * 64)).write_text("not ours")
    uploads = base / "uploads"
    (uploads / ("b" * 64)).symlink_to(outside)
    (uploads / ("c" * 64)).write_text("a file, not a folder")
    (uploads / "notes").mkdir()
    (uploads / "notes" / ("d" * 64)).write_text("ours? no")
    (uploads / ("e" * 64)).mkdir()
    (uploads / ("e" * 64) / "readme.txt").write_text("no")
    found = look(bench)
    assert (found.noted, found.suspicious) == (0, 0)


def test_half_written_files_of_the_dead_go(bench: Bench) -> None:
    temp = storage_of(bench).ensure_directory("temp")
    (temp / ("0" * 32 + ".part")).write_text("half")
    (temp / "other.part").write_text("not ours")
    (temp / "unpack-dead").mkdir()
    assert look(bench, days=6).temporary == 1, "the folder, whose owner is dead"
    assert look(bench).temporary == 1
    assert [path.name for path in temp.iterdir()] == ["other.part"]


@pytest.mark.parametrize("why", ["too many orphans", "orphans are kept"])
def test_half_written_files_of_the_dead_go_where_no_orphan_does(bench: Bench, why: str) -> None:
    storage = storage_of(bench)
    for number in range(FEW + 1):
        storage.store_upload(f"d{number}", b"x", 100)
    (storage.base / "temp" / ("0" * 32 + ".part")).write_text("half")
    (storage.base / "temp" / "unpack-dead").mkdir()
    if why == "orphans are kept":
        bench.settings = bench.settings.model_copy(update={"orphan_file_days": 0})
    assert look(bench, days=6).temporary == 1, "the folder, whose owner is dead"
    found = look(bench)
    assert (found.noted, found.suspicious, found.temporary) == (0, FEW + 1 if why == "too many orphans" else 0, 1)
    assert list((storage.base / "temp").iterdir()) == []


def test_a_worker_prunes_every_hour_and_the_command_at_once(bench: Bench) -> None:
    bench.submit("a")
    bench.conn.execute("UPDATE file_extractions SET state = 'cancelled'")
    bench.conn.execute("UPDATE procrastinate_jobs SET status = 'cancelled'")
    age(bench, 8)
    for arguments in (["-m", "jobs.cli", "prune", "--dry-run", "--json"], ["-c", AS_A_WORKER], ["-m", "jobs.cli", "prune"]):
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        if "--json" in arguments:
            told = json.loads(done.stdout)
            assert told["dry_run"] and told["removed"]["finished jobs"] == 1
        elif "-c" in arguments:
            assert "'finished jobs': 1" in done.stdout
            assert "Pruned: 1 finished jobs" in done.stderr
        else:
            assert "0 finished jobs" in done.stdout
