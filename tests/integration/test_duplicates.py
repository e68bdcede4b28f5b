"""Equal content under several ids of one user: one is processed, the others wait for it and copy, or are skipped."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from jobs.pipeline.claims import NotClaimed, claim_document
from jobs.pipeline.work import Work
from jobs.reconcile import Reconciler
from jobs.stages import Tools, extract, parse
from models.documents import Document, FileType
from models.errors import ParseError
from models.stages import State
from sql import query
from tests.integration.batches import batch_of, reconciler, summary
from tests.integration.conftest import STAGE_NAMES, Bench, sha


async def claim(bench: Bench, doc_id: str, *, serialise: bool = True) -> Work | NotClaimed:
    async with bench.pool.connection() as conn:
        return await claim_document(
            conn, doc_id, job_id=1, worker="w:1", lease_seconds=60, reconcile_seconds=5, serialise=serialise
        )  # fmt: skip


def submit_validated(bench: Bench, *doc_ids: str, content: str = "1", user_id: str = "default") -> None:
    """Submit equals that have come as far as parse, where they wait."""
    for doc_id in doc_ids:
        bench.submit(doc_id, content, user_id)
        bench.conn.execute(
            "UPDATE file_extractions SET state = 'working', claim = claim + 1, lease_until = now() WHERE doc_id = %s", [doc_id]
        )
        bench.conn.execute(
            "UPDATE file_extractions SET state = 'queued', milestone = 'upload_validated', lease_until = NULL WHERE doc_id = %s", [doc_id]
        )
        bench.conn.execute("SELECT drop_waiting_jobs(%s), defer_stage(%s, 'parse', 0)", [doc_id, doc_id])


async def claimed(bench: Bench, doc_id: str) -> Work:
    work = await claim(bench, doc_id)
    assert isinstance(work, Work)
    return work


def states(bench: Bench) -> dict[str, str]:
    return dict(bench.all("SELECT doc_id, state FROM file_extractions ORDER BY id"))


def end(bench: Bench, doc_id: str, state: str) -> None:
    """End a claimed document as a checkpoint, a cancel or a failure does."""
    bench.conn.execute(
        """UPDATE file_extractions SET state = %s, lease_until = NULL, error_type = 'PERMANENT', error_message = 'm',
            milestone = CASE WHEN %s = 'complete' THEN 'complete' ELSE milestone END,
            served_version = CASE WHEN %s = 'complete' THEN version END, processing_completed_at = now() WHERE doc_id = %s""",
        [state, state, state, doc_id],
    )


async def test_of_unfinished_equals_one_is_parsed_and_the_others_wait_ever_longer(bench: Bench) -> None:
    submit_validated(bench, *"abc")
    await claimed(bench, "a")
    for waited, wait in (("0 s", 1), ("20 s", 20), ("1 h", 900)):
        bench.conn.execute("UPDATE file_extractions SET updated_at = now() - %s::interval WHERE doc_id <> 'a'", [waited])
        for doc_id in "bc":
            refused = await claim(bench, doc_id)
            assert isinstance(refused, NotClaimed)
            assert (refused.state, refused.waits_for) == (State.QUEUED, "a")
            assert refused.wait_seconds is not None
            assert wait <= refused.wait_seconds < wait + 5


async def test_who_waits_for_an_equal_that_waits_itself_looks_again_when_that_goes_on(bench: Bench) -> None:
    submit_validated(bench, *"ab")
    await claimed(bench, "a")
    for left, wait in (("5 min", 300), ("6 h", 900)):
        bench.conn.execute(
            "UPDATE file_extractions SET state = 'retrying', lease_until = NULL, not_before = now() + %s::interval WHERE doc_id = 'a'",
            [left],
        )
        refused = await claim(bench, "b")
        assert isinstance(refused, NotClaimed)
        assert refused.wait_seconds is not None
        assert wait - 60 < refused.wait_seconds <= wait


@pytest.mark.parametrize(("state", "woken"), [("complete", ["b", "c"]), ("failed", ["b"])])
async def test_who_was_not_woken_by_the_end_of_the_one_that_is_processed_is_woken_by_the_reconciler(
    bench: Bench, database: str, state: str, woken: list[str]
) -> None:
    submit_validated(bench, *"abc")
    await claimed(bench, "a")
    bench.conn.execute("UPDATE procrastinate_jobs SET status = 'succeeded' WHERE queueing_lock = 'parse:a'")
    bench.conn.execute("UPDATE procrastinate_jobs SET scheduled_at = now() + interval '15 min' WHERE status = 'todo'")
    assert await Reconciler(bench.settings, bench.pool).pass_once() == {}
    with psycopg.connect(database) as other:
        other.execute("SELECT FROM procrastinate_jobs FOR UPDATE")
        end(bench, "a", state)
    assert bench.one("SELECT count(*) FROM procrastinate_jobs WHERE scheduled_at > now()") == (2,)
    assert await Reconciler(bench.settings, bench.pool).pass_once() == {"woken": len(woken)}
    waiting = bench.all("SELECT args->>'doc_id' FROM procrastinate_jobs WHERE scheduled_at IS NULL AND status = 'todo' ORDER BY id")
    assert [row[0] for row in waiting] == woken
    assert await Reconciler(bench.settings, bench.pool).pass_once() == {}


async def test_equals_are_validated_without_waiting_and_not_carried_on_to_parse(bench: Bench) -> None:
    """A thousand empty files fail side by side."""
    bench.submit("a", "1")
    bench.submit("b", "1")
    assert (await claimed(bench, "a")).may_parse
    bench.conn.execute("UPDATE procrastinate_jobs SET status = 'succeeded' WHERE queueing_lock = 'validate:a'")
    found = bench.fetch()
    assert found is not None
    await bench.runner().run(*found)
    assert bench.calls == ["validate"]
    assert bench.one("SELECT milestone, state, owns_content FROM file_extractions WHERE doc_id = 'b'") == (
        "upload_validated",
        "queued",
        False,
    )


async def test_two_equals_that_are_claimed_at_the_same_moment_do_not_both_begin(bench: Bench) -> None:
    submit_validated(bench, *"abcdef")
    made = await asyncio.gather(*(claim(bench, doc_id) for doc_id in "abcdef"))
    assert sum(isinstance(it, Work) for it in made) == 1
    assert bench.one("SELECT count(*) FROM file_extractions WHERE owns_content") == (1,)


@pytest.mark.parametrize("state", ["failed", "cancelled", "deleted", "new version"])
async def test_the_next_takes_over_when_the_one_that_is_processed_ends_without_completing(bench: Bench, state: str) -> None:
    submit_validated(bench, "a", "b")
    await claimed(bench, "a")
    match state:
        case "deleted":
            bench.conn.execute("SELECT delete_document('a')")
        case "new version":
            bench.submit("a", "2")
        case _:
            end(bench, "a", state)
    await claimed(bench, "b")
    assert bench.all("SELECT doc_id FROM file_extractions WHERE owns_content") == [("b",)]


async def test_a_complete_original_lets_all_its_equals_go_at_once(bench: Bench) -> None:
    submit_validated(bench, *"abc")
    await claimed(bench, "a")
    end(bench, "a", "complete")
    for doc_id in "bc":
        await claimed(bench, doc_id)
    assert bench.one("SELECT count(*) FROM file_extractions WHERE owns_content") == (0,)


@pytest.mark.parametrize(("state", "woken"), [("complete", ["b", "c"]), ("failed", ["b"])])
async def test_the_end_of_the_one_that_is_processed_wakes_those_that_wait_or_the_next(bench: Bench, state: str, woken: list[str]) -> None:
    submit_validated(bench, *"abc")
    submit_validated(bench, "other content", content="2")
    submit_validated(bench, "other user", user_id="ann")
    await claimed(bench, "a")
    bench.conn.execute("UPDATE procrastinate_jobs SET scheduled_at = now() + interval '1 h' WHERE status = 'todo'")
    end(bench, "a", state)
    waiting = bench.all("SELECT args->>'doc_id' FROM procrastinate_jobs WHERE scheduled_at IS NULL AND status = 'todo' ORDER BY id")
    assert [row[0] for row in waiting] == woken


async def test_waiting_counts_as_no_attempt_and_ends_complete(bench: Bench) -> None:
    submit_validated(bench, "a", "b")
    await claimed(bench, "a")
    bench.conn.execute("UPDATE procrastinate_jobs SET status = 'succeeded' WHERE queueing_lock = 'parse:a'")
    found = bench.fetch()
    assert found is not None
    await bench.runner().run(*found)
    assert bench.calls == []
    counts = "SELECT state, retry_count, crash_count, requeue_count, owns_content FROM file_extractions WHERE doc_id = 'b'"
    assert bench.one(counts) == ("queued", 0, 0, 0, False)
    assert bench.one("SELECT count(*) FROM procrastinate_jobs WHERE status = 'todo' AND id > %s AND scheduled_at > now()", found[0].id) == (
        1,
    )
    end(bench, "a", "failed")
    await bench.drain()
    assert states(bench) == {"a": "failed", "b": "complete"}


async def test_equals_of_two_users_never_wait_for_each_other_nor_know_each_other(bench: Bench) -> None:
    submit_validated(bench, "a", user_id="ann")
    submit_validated(bench, "b", user_id="bob")
    await claimed(bench, "a")
    await claimed(bench, "b")
    end(bench, "a", "complete")
    end(bench, "b", "failed")
    for doc_id in ("bob's first", "bob's second"):
        bench.submit(doc_id, "1", user_id="bob")
        await bench.drain(duplicate_policy="skip")
    assert bench.all("SELECT doc_id, state, duplicate_of FROM file_extractions WHERE length(doc_id) > 1 ORDER BY id") == [
        ("bob's first", "complete", None),
        ("bob's second", "duplicate", "bob's first"),
    ]


async def test_policy_process_waits_for_nobody(bench: Bench) -> None:
    submit_validated(bench, "a", "b")
    assert isinstance(await claim(bench, "a", serialise=False), Work)
    assert isinstance(await claim(bench, "b", serialise=False), Work)


@pytest.mark.parametrize("handoff", ["inline", "queue"])
async def test_policy_skip_ends_as_a_duplicate_after_validate_without_rows(bench: Bench, handoff: str) -> None:
    bench.submit("a", "1")
    bench.submit("b", "1")
    await bench.drain(duplicate_policy="skip", handoff=handoff)
    assert bench.all("SELECT doc_id, state, status, milestone, duplicate_of, served_version FROM file_extractions ORDER BY id") == [
        ("a", "complete", "completed", "complete", None, 1),
        ("b", "duplicate", "completed", "upload_validated", "a", None),
    ]
    assert bench.calls.count("parse") == 1
    assert bench.calls.count("validate") == 2
    assert bench.all("SELECT DISTINCT doc_id FROM document_chunks") == [("a",)]
    assert bench.one("SELECT detail->>'duplicate_of' FROM document_events WHERE event = 'duplicate'") == ("a",)
    assert bench.one("SELECT count(*) FROM procrastinate_jobs WHERE status IN ('todo', 'doing')") == (0,)


async def test_a_new_version_that_is_a_duplicate_takes_the_old_version_from_readers(bench: Bench) -> None:
    bench.submit("a", "1")
    bench.submit("b", "2")
    await bench.drain()
    bench.submit("b", "1")
    await bench.drain(duplicate_policy="skip")
    assert bench.one("SELECT state, version, served_version, raw_extraction FROM file_extractions WHERE doc_id = 'b'") == (
        "duplicate", 2, None, None,
    )  # fmt: skip
    assert bench.all("SELECT DISTINCT doc_id FROM document_chunks") == [("a",)]
    assert bench.all("SELECT doc_id FROM document_markdown") == [("a",)]


@pytest.mark.parametrize("handoff", ["inline", "queue"])
async def test_content_that_is_not_known_before_validate_is_serialised_after_it(bench: Bench, handoff: str) -> None:
    statement = "SELECT submit_document('uploads/x', doc_id => %s)"
    for doc_id in "ab":
        bench.conn.execute(statement, [doc_id])
    runner = bench.runner(duplicate_policy="skip", handoff=handoff)
    plain = runner._runs._stages["validate"]

    async def validate(document: Document, tools: Tools) -> Document:
        return replace(await plain(document, tools), content_sha256="1" * 64)

    runner._runs._stages["validate"] = validate
    jobs = [bench.fetch(), bench.fetch()]
    for job in jobs:
        assert job is not None
        await runner.run(*job)
    assert bench.all("SELECT milestone, state FROM file_extractions") == [("upload_validated", "queued")] * 2
    while job := bench.fetch():
        await runner.run(*job)
    assert states(bench) == {"a": "complete", "b": "duplicate"}
    assert bench.calls.count("parse") == 1


@pytest.mark.parametrize("gone", ["deleted", "new version"])
async def test_duplicates_are_queued_again_when_their_original_is_gone_and_one_becomes_the_original(bench: Bench, gone: str) -> None:
    for doc_id in "abc":
        bench.submit(doc_id, "1")
    await bench.drain(duplicate_policy="skip")
    assert states(bench) == {"a": "complete", "b": "duplicate", "c": "duplicate"}
    if gone == "deleted":
        bench.conn.execute("SELECT delete_document('a')")
        assert states(bench) == {"b": "queued", "c": "queued"}
    else:
        bench.submit("a", "2")
        done = await Reconciler(bench.settings, bench.pool).pass_once()
        assert done == {"requeued": 2}
    assert bench.one("SELECT count(*) FROM document_events WHERE event = 'requeued' AND detail->>'duplicate_of' = 'a'") == (2,)
    await bench.drain(duplicate_policy="skip")
    found = states(bench)
    assert sorted([found["b"], found["c"]]) == ["complete", "duplicate"]
    assert await Reconciler(bench.settings, bench.pool).pass_once() == {}


async def test_a_locked_duplicate_is_left_to_the_reconciler(bench: Bench, database: str) -> None:
    bench.submit("a", "1")
    bench.submit("b", "1")
    await bench.drain(duplicate_policy="skip")
    with psycopg.connect(database) as other:
        other.execute("SELECT FROM file_extractions WHERE doc_id = 'b' FOR UPDATE")
        bench.conn.execute("SELECT delete_document('a')")
        assert states(bench) == {"b": "duplicate"}
    assert await Reconciler(bench.settings, bench.pool).pass_once() == {"requeued": 1}


async def test_a_copy_whose_original_goes_while_it_is_worked_on_becomes_no_second_one(bench: Bench) -> None:
    bench.submit("a", "1")
    await bench.drain(duplicate_policy="skip")
    bench.submit("b", "1")
    bench.submit("c", "1")
    begun, go_on = asyncio.Event(), asyncio.Event()
    others: list[asyncio.Task[None]] = []

    async def delete(document: Document) -> None:
        if document.doc_id == "b" and not others:
            bench.conn.execute("SELECT delete_document('a')")
            other = bench.fetch()
            assert other is not None
            others.append(asyncio.create_task(bench.runner("test:2", duplicate_policy="skip").run(*other)))
            await begun.wait()

    async def hold(document: Document) -> None:
        if document.doc_id == "c":  # which has the place now
            begun.set()
            await go_on.wait()

    bench.also |= {"validate": delete, "check": hold}
    job = bench.fetch()
    assert job is not None
    await bench.runner(duplicate_policy="skip").run(*job)
    left = states(bench)["b"]
    go_on.set()
    await asyncio.gather(*others)
    assert left == "queued"
    await bench.drain(duplicate_policy="skip")
    assert states(bench) == {"b": "duplicate", "c": "complete"}


async def drain_and_compare(bench: Bench) -> None:
    """Run all waiting jobs with a check that looks for an equal document, as the real one does."""
    runner = bench.runner()
    plain = runner._runs._stages["check"]

    async def check(document: Document, tools: Tools) -> Document:
        return replace(await plain(document, tools), duplicate_of=await tools.find_original(document))

    runner._runs._stages["check"] = check
    while job := bench.fetch():
        await runner.run(*job)


def originals(bench: Bench) -> dict[str, str | None]:
    """What each document of the batch is called a duplicate of, the same wherever that is shown."""
    shown = dict(bench.all("SELECT doc_id, duplicate_of FROM document_status WHERE batch_id = 'b'"))
    with bench.conn.cursor(row_factory=dict_row) as cursor:
        for name in ("get_document", "show_document", "page_document"):
            for doc_id, original in shown.items():
                row = cursor.execute(query(name), {"doc_id": doc_id}).fetchone()
                assert row is not None
                assert row["duplicate_of"] == original, name
        listed = cursor.execute(query("list_batch_documents"), {"batch_id": "b", "state": None, "after": None, "limit": 10}).fetchall()
        assert {row["doc_id"]: row["duplicate_of"] for row in listed} == shown
    ui, _ = summary(bench)
    assert {card["doc_id"]: card["duplicate_of"] for card in ui["files"]} == shown
    assert ui["totals"]["duplicates"] == sum(original is not None for original in shown.values())
    return shown


async def test_a_document_is_called_a_duplicate_of_one_that_is_there_with_that_content(bench: Bench) -> None:
    batch_of(bench, *"abc")
    await drain_and_compare(bench)
    assert originals(bench) == {"a": None, "b": "a", "c": "a"}
    bench.conn.execute("SELECT delete_document('a')")
    assert (await reconciler(bench).pass_once())["renewed"] == 1
    assert originals(bench) == {"b": None, "c": "b"}
    assert bench.all("SELECT original, doc_ids FROM duplicate_documents") == [("b", ["c"])]
    bench.submit("b", "2", user_id="ann")
    bench.conn.execute("SELECT settle_batch('b')")
    assert originals(bench) == {"c": None}
    assert bench.all("SELECT original FROM duplicate_documents") == []


class Unused:
    """A sandbox that nobody may ask."""

    async def run(self, *_: Any, **__: Any) -> Any:
        raise ParseError("it was asked")

    run_each = run


def real_tools(bench: Bench, **changes: Any) -> Tools:
    return replace(bench.runner(**changes)._runs._tools, sandbox=Unused())


@pytest.mark.parametrize("policy", ["reuse", "skip"])
async def test_text_and_extraction_of_the_original_are_copied_and_nothing_of_another_user(bench: Bench, policy: str) -> None:
    bench.submit("a", "1")
    await bench.drain()
    bench.conn.execute(
        """UPDATE file_extractions SET file_name = 'a.txt', raw_extraction = '{"extractor": {"name": "paid", "version": "9"}, "cost": 1}'"""
    )
    bench.submit("b", "1")
    bench.submit("c", "1", user_id="ann")
    b, c = (await claimed(bench, "b")).document, (await claimed(bench, "c")).document
    tools = real_tools(bench, duplicate_policy=policy)  # with skip, of one that does not stay: its file has been moved
    known: dict[str, Any] = {"file_type": FileType.TEXT, "mime_type": "text/plain"}
    copied = await parse.run(replace(b, **known), tools)
    assert (copied.markdown, copied.parser, copied.reused_from, copied.duplicate_of) == ("text of a version 1", "plain 1", "a", "a")
    checked = replace(copied, markdown_sha256=bench.one("SELECT markdown_sha256 FROM document_markdown")[0])
    extracted = await extract.run(checked, tools)
    assert (extracted.raw_extraction, extracted.reused_from) == ({"extractor": {"name": "paid", "version": "9"}, "cost": 1}, "a")
    for document in (replace(c, **known), replace(b, file_type=FileType.TEXT, mime_type="text/csv")):
        with pytest.raises((ParseError, FileNotFoundError)):
            await parse.run(document, tools)
    with pytest.raises(ParseError):
        await extract.run(replace(checked, markdown_sha256="0" * 64), tools)
    with pytest.raises((ParseError, FileNotFoundError)):
        await parse.run(replace(b, **known), real_tools(bench, duplicate_policy="process"))


async def test_every_stage_of_a_reusing_document_leaves_its_event(bench: Bench) -> None:
    bench.submit("a", "1")
    bench.submit("b", "1")
    await bench.drain()
    told = bench.all("SELECT stage FROM document_events WHERE doc_id = 'b' AND event IN ('stage_completed', 'completed') ORDER BY id")
    assert [row[0] for row in told] == STAGE_NAMES


async def test_an_owner_that_comes_back_knows_of_an_equal_that_has_completed_past_it(bench: Bench) -> None:
    """One that failed after parse owns nothing any more, and needs not to own anything to go on from there."""
    submit_validated(bench, "a", "b")
    assert (await claimed(bench, "a")).is_sole
    bench.conn.execute("UPDATE file_extractions SET milestone = 'parse_complete' WHERE doc_id = 'a'")
    end(bench, "a", "failed")
    assert (await claimed(bench, "b")).is_sole
    bench.conn.execute("UPDATE file_extractions SET state = 'retrying', lease_until = NULL WHERE doc_id = 'b'")
    bench.conn.execute("UPDATE file_extractions SET state = 'queued', claim = claim + 1 WHERE doc_id = 'a'")
    assert not (await claimed(bench, "a")).is_sole
    end(bench, "a", "complete")
    assert not (await claimed(bench, "b")).is_sole


@pytest.mark.parametrize("wanted", ["held by thousands", "held by nobody"])
async def test_whether_a_text_has_a_vector_is_found_out_without_reading_all_passages_that_have_it(bench: Bench, wanted: str) -> None:
    bench.submit("a")
    await bench.drain()
    bench.conn.execute(
        """INSERT INTO document_chunks (
            id, doc_id, user_id, version, chunk_index, content, content_sha256, heading_path, char_start, char_end, embedding,
            embedding_model
        )
        SELECT gen_random_uuid(), c.doc_id, c.user_id, c.version, 100 + n, c.content, c.content_sha256, '{}', 0, 1, c.embedding, 'eye'
        FROM document_chunks AS c CROSS JOIN generate_series(1, 3000) AS n WHERE c.chunk_index = 0"""
    )
    bench.conn.execute("VACUUM ANALYZE document_chunks")
    (held,) = bench.one("SELECT content_sha256 FROM document_chunks WHERE chunk_index = 0")
    hashes = [held] if wanted == "held by thousands" else [sha(f"none {number}") for number in range(100)]
    params = {"user_id": "default", "embedding_model": "eye", "hashes": hashes}
    assert len(bench.conn.execute(query("find_known_vectors"), params).fetchall()) == (wanted == "held by thousands")
    (plan,) = bench.conn.execute("EXPLAIN (ANALYZE, FORMAT JSON) " + query("find_known_vectors"), params).fetchone() or ()
    assert read(plan[0]["Plan"]) <= len(hashes)


def read(node: dict[str, Any]) -> float:
    """How many passages a plan has read, also those that it has thrown away."""
    own = (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"]
    return (own if node.get("Alias") == "c" else 0) + sum(map(read, node.get("Plans", ())))
