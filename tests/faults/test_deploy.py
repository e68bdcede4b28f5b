"""Workers and databases of different versions: nothing is lost, everything can be seen and taken up again."""

from __future__ import annotations

import pytest

from tests.faults.harness import Arena, documents

UNKNOWN = """SELECT procrastinate_defer_jobs_v1(ARRAY[ROW('cpu', 'classify', 0, NULL, 'classify:d0001', '{"doc_id": "d0001"}', NULL)
    ::procrastinate_job_to_defer_v1])"""


def test_a_job_of_an_unknown_task_fails_visibly_and_harms_no_document(arena: Arena) -> None:
    arena.submit(documents(6))
    with arena.connect() as conn:
        conn.execute(UNKNOWN)
    arena.fault()
    arena.worker()
    arena.settle()
    assert arena.one("SELECT status::text FROM procrastinate_jobs WHERE task_name = 'classify'") == "failed"
    assert arena.one("SELECT count(*) FROM file_extractions WHERE state <> 'complete'") == 0
    arena.judge("12 deploys", "a job whose task no worker knows")


def test_a_document_whose_task_is_unknown_to_all_workers_is_parked_visibly_and_can_be_requeued(arena: Arena) -> None:
    """A newer docmill has renamed a stage's task; the workers that run are of the present version."""
    arena.submit(documents(6))
    rename = """CREATE FUNCTION rename_task() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN NEW.task_name := 'embed_v2'; RETURN NEW; END $$;
        CREATE TRIGGER rename_task BEFORE INSERT ON procrastinate_jobs FOR EACH ROW
        WHEN (NEW.task_name = 'embed') EXECUTE FUNCTION rename_task();"""
    with arena.connect() as conn:
        conn.execute(rename)
    arena.fault()
    arena.worker("-q", "cpu,extract", MAX_REQUEUES="2")
    arena.worker("-q", "embed", MAX_REQUEUES="2")
    arena.wait(lambda: arena.one("SELECT count(*) FROM dead_letters WHERE resolved_at IS NULL") == 6, "all to be parked", 90)
    assert arena.all("SELECT DISTINCT stage, state::text, milestone::text FROM dead_letters JOIN file_extractions USING (doc_id)") == [
        ("embed", "failed", "chunks_stored")
    ]
    message = arena.one("SELECT error_message FROM dead_letters LIMIT 1")
    assert "version of docmill" in message
    with arena.connect() as conn:
        conn.execute("DROP TRIGGER rename_task ON procrastinate_jobs")
        conn.execute("SELECT requeue_document(doc_id) FROM file_extractions")
    arena.fault()
    arena.settle()
    assert arena.one("SELECT count(*) FROM file_extractions WHERE state <> 'complete'") == 0
    arena.judge("12 deploys", "documents whose task no worker knows, parked and requeued")


def test_a_worker_refuses_an_older_schema_with_a_clear_message_and_loses_nothing(arena: Arena) -> None:
    arena.submit(documents(3))
    with arena.connect() as conn:
        last = conn.execute("SELECT max(name) FROM docmill_migrations WHERE component = 'docmill'").fetchone()
        assert last is not None
        conn.execute("DELETE FROM docmill_migrations WHERE component = 'docmill' AND name = %s", last)
    worker = arena.worker()
    assert worker.wait(60) == 1
    assert "docmill migrate" in worker.log.read_text()
    assert "Traceback" not in worker.log.read_text()
    with arena.connect() as conn:
        conn.execute("INSERT INTO docmill_migrations (component, name) VALUES ('docmill', %s)", last)
    arena.fault()
    arena.worker()
    arena.settle()
    arena.judge("12 deploys", "a worker before a database that lacks a migration")


@pytest.mark.parametrize("missing", ["a table"])
def test_documents_survive_a_schema_that_lags_behind_its_workers(arena: Arena, missing: str) -> None:
    """What a worker needs is missing for a while, as during a migration that went wrong; then it is there."""
    arena.submit(documents(6))
    with arena.connect() as conn:
        conn.execute("ALTER TABLE document_markdown RENAME TO document_markdown_away")
        arena.worker(RETRY_BASE_DELAY_SECONDS="1", RETRY_MAX_DELAY_SECONDS="2")
        arena.wait(lambda: arena.one("SELECT count(*) FROM file_extractions WHERE state = 'failed'") == 6, "the failures", 60)
        conn.execute("ALTER TABLE document_markdown_away RENAME TO document_markdown")
        conn.execute("SELECT requeue_document(doc_id) FROM file_extractions")
    arena.fault()
    arena.settle()
    assert arena.one("SELECT count(*) FROM file_extractions WHERE state <> 'complete'") == 0
    arena.judge("12 deploys", f"{missing} missing for a while, then requeued")
