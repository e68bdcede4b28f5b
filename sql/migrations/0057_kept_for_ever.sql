-- What was kept, or said, for ever: the summaries of all earlier runs of a batch, which one deletion rewrote in a single statement; the files of
-- deleted documents after a restore into another cluster; an alert about a service that nobody calls any more; and the name of a worker on a
-- job that was taken from it.

-- Summaries are renewed a part at a time. Nobody but renew_summaries calls the function that is dropped, and that by its name.

ALTER TABLE summaries_to_renew ADD COLUMN after_run uuid;
COMMENT ON COLUMN summaries_to_renew.after_run IS
    'The batch''s summaries up to this run_id say no more about it, and those behind it are still to be looked at; null: all are.';

DROP FUNCTION forget_deleted_documents(text);
CREATE FUNCTION forget_deleted_documents(batch_id text, runs uuid[] DEFAULT NULL) RETURNS integer LANGUAGE plpgsql AS $$
-- A summary holds names, errors and what was extracted: what is deleted must go from there too. The totals stay as they were.
DECLARE
    changed integer;
BEGIN
    UPDATE run_summaries AS r
    SET ui_json = without_deleted(r.ui_json), updated_at = now(),
        nested_summary = r.nested_summary || jsonb_build_object('folders', (
            SELECT coalesce(jsonb_agg(without_deleted(f.folder) ORDER BY f.place), '[]')
            FROM jsonb_array_elements(r.nested_summary -> 'folders') WITH ORDINALITY AS f (folder, place)
        ))
    WHERE r.batch_id = forget_deleted_documents.batch_id AND (runs IS NULL OR r.run_id = ANY(runs)) AND EXISTS (
        SELECT FROM jsonb_array_elements_text(summary_documents(r.ui_json, r.nested_summary)) AS e (doc_id)
        WHERE NOT EXISTS (SELECT FROM file_extractions AS d WHERE d.doc_id = e.doc_id)
    );
    GET DIAGNOSTICS changed = ROW_COUNT;
    RETURN changed;
END;
$$;
COMMENT ON FUNCTION forget_deleted_documents IS
    'Takes the cards of deleted documents out of the summaries of some runs of a batch, or of all (null), and returns how many changed. Call it after deletions, as a transaction of its own.';

CREATE OR REPLACE FUNCTION renew_summaries(batch_id text) RETURNS text LANGUAGE plpgsql AS $$
-- A batch may have had thousands of runs with thousands of files each, and to rewrite 10,000 cards takes a second or two. What is noted while
-- a round through the runs is under way begins the next one, so that each round ends.
#variable_conflict use_column
DECLARE
    most_cards CONSTANT integer := 10000;
    notes record;
    runs uuid[];
    last_run uuid;
    is_left boolean;
BEGIN
    PERFORM FROM processing_jobs AS b WHERE b.batch_id = renew_summaries.batch_id FOR NO KEY UPDATE SKIP LOCKED;
    IF NOT FOUND AND EXISTS (SELECT FROM processing_jobs AS b WHERE b.batch_id = renew_summaries.batch_id) THEN
        RETURN NULL;
    END IF;
    -- The notes first: what is deleted from here on makes a note of its own.
    WITH noted AS (
        DELETE FROM summaries_to_renew AS n WHERE n.batch_id = renew_summaries.batch_id RETURNING n.is_its_own, n.after_run
    )
    SELECT bool_or(n.is_its_own) AS is_due, bool_or(n.after_run IS NULL) AS has_new, max(n.after_run::text)::uuid AS after_run INTO notes
    FROM noted AS n;
    IF notes.has_new IS NULL OR NOT EXISTS (SELECT FROM processing_jobs AS b WHERE b.batch_id = renew_summaries.batch_id) THEN
        RETURN NULL;
    END IF;
    IF notes.is_due THEN
        PERFORM settle_batch(renew_summaries.batch_id);
    END IF;
    SELECT array_agg(c.run_id ORDER BY c.run_id) INTO runs
    FROM (
        SELECT r.run_id, sum(r.file_count) OVER (ORDER BY r.run_id) - r.file_count AS cards_before
        FROM run_summaries AS r
        WHERE r.batch_id = renew_summaries.batch_id AND (notes.after_run IS NULL OR r.run_id > notes.after_run)
    ) AS c
    WHERE c.cards_before < most_cards;
    PERFORM forget_deleted_documents(renew_summaries.batch_id, runs);
    last_run := runs[cardinality(runs)];
    is_left := EXISTS (SELECT FROM run_summaries AS r WHERE r.batch_id = renew_summaries.batch_id AND r.run_id > last_run);
    INSERT INTO summaries_to_renew (batch_id, is_its_own, after_run)
    SELECT renew_summaries.batch_id, FALSE, n.after_run
    FROM (VALUES (last_run, is_left), (NULL, notes.has_new AND notes.after_run IS NOT NULL)) AS n (after_run, is_to_do)
    WHERE n.is_to_do;
    RETURN CASE WHEN NOT FOUND THEN 'renewed' END;
END;
$$;
COMMENT ON FUNCTION renew_summaries IS
    'Brings the summaries of a batch up to date after documents of it have been deleted, of some runs a call; null while runs are left, which a note says, where nothing is noted, or while somebody holds the batch.';

-- As before, and it knows a transaction number of another cluster, which a dump has brought along: there may be a billion until it is reached.
CREATE OR REPLACE FUNCTION judge_file(path text) RETURNS text LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    note files_to_remove;
BEGIN
    SELECT n.* INTO note FROM files_to_remove AS n WHERE n.path = judge_file.path FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    IF note.settled_at_xid > pg_snapshot_xmax(pg_current_snapshot()) THEN
        note.settled_at_xid := NULL;
    END IF;
    IF note.settled_at_xid IS NULL AND EXISTS (
        SELECT FROM pg_snapshot_xip(pg_current_snapshot()) AS x WHERE x <> pg_current_xact_id()
    ) THEN
        UPDATE files_to_remove AS n SET settled_at_xid = pg_snapshot_xmax(pg_current_snapshot()) WHERE n.path = note.path;
        RETURN 'wait';
    END IF;
    IF note.settled_at_xid > pg_snapshot_xmin(pg_current_snapshot()) THEN
        RETURN 'wait';
    END IF;
    -- A statement of its own: it sees what those transactions have left.
    IF EXISTS (SELECT FROM file_extractions AS d WHERE d.file_path = note.path)
        OR EXISTS (SELECT FROM batch_archives AS a WHERE a.file_path = note.path)
        OR EXISTS (SELECT FROM processing_jobs AS b WHERE b.zip_path = note.path) THEN
        DELETE FROM files_to_remove AS n WHERE n.path = note.path;
        RETURN 'needed';
    END IF;
    RETURN 'free';
END;
$$;

-- As before, and the job names no worker, as all that have finished.
CREATE OR REPLACE FUNCTION end_job(job_id bigint) RETURNS void LANGUAGE sql AS $$
    UPDATE procrastinate_jobs AS j SET status = 'aborted', attempts = j.attempts + 1, abort_requested = FALSE, worker_id = NULL
    WHERE j.id = end_job.job_id AND j.status = 'doing';
$$;

CALL pin_search_path();
