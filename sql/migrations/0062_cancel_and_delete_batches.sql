-- Cancelling a batch took its archives as it came upon them, and listing an archive inside of another takes both in the order of ids: the two
-- met in a deadlock, which cost one of them. So did deleting a batch. Both take archives in that order too.

CREATE OR REPLACE FUNCTION mark_batch_cancelled(batch_id text, lock_timeout_ms integer DEFAULT 5000) RETURNS boolean
LANGUAGE plpgsql SET lock_timeout FROM CURRENT AS $$
#variable_conflict use_column
DECLARE
    batch processing_jobs;
BEGIN
    PERFORM set_config('lock_timeout', mark_batch_cancelled.lock_timeout_ms || 'ms', TRUE);
    SELECT b.* INTO batch FROM processing_jobs AS b WHERE b.batch_id = mark_batch_cancelled.batch_id FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no batch "%"', coalesce(mark_batch_cancelled.batch_id, '') USING ERRCODE = 'no_data_found';
    END IF;
    IF batch.status IN ('completed', 'completed_with_errors', 'failed') AND NOT EXISTS (
        SELECT FROM file_extractions AS d WHERE d.batch_id = batch.batch_id AND d.state IN ('queued', 'working', 'retrying')
    ) AND NOT EXISTS (
        SELECT FROM batch_archives AS a WHERE a.batch_id = batch.batch_id AND a.state IN ('waiting', 'unpacking')
    ) THEN
        RETURN FALSE;
    END IF;
    UPDATE processing_jobs AS b SET status = 'cancelled', completed_at = clock_timestamp(), updated_at = now()
    WHERE b.id = batch.id AND b.status <> 'cancelled';
    PERFORM FROM batch_archives AS a
    WHERE a.batch_id = batch.batch_id AND a.state IN ('waiting', 'unpacking') ORDER BY a.id FOR NO KEY UPDATE;
    UPDATE batch_archives AS a SET state = 'cancelled', ended_at = clock_timestamp(), updated_at = now()
    WHERE a.batch_id = batch.batch_id AND a.state IN ('waiting', 'unpacking');
    RETURN TRUE;
END;
$$;

-- Deleting a batch met those who submit it in a deadlock as well: it holds documents and waits for the batch, they hold the batch and wait for
-- documents that are new. Whom Postgres ends then is chance, and may be a third who waits for the batch alone: so it waits for too short a time
-- for anybody to be ended.

CREATE OR REPLACE FUNCTION delete_batch(batch_id text, lock_timeout_ms integer DEFAULT 5000) RETURNS integer
LANGUAGE plpgsql SET lock_timeout FROM CURRENT AS $$
-- Documents first, then the batch, then the documents that were submitted meanwhile: while the batch is locked like this, none can be. Then its
-- archives in the order of ids, as in mark_batch_cancelled: of one that is being unpacked, whoever takes in its documents holds it.
#variable_conflict use_column
DECLARE
    batch processing_jobs;
    done integer;
    holds_documents boolean;
    -- Less than the deadlock_timeout that anybody has.
    short_ms CONSTANT integer := least(200, nullif(delete_batch.lock_timeout_ms, 0));
    tries_left integer := 5;
BEGIN
    PERFORM set_config('lock_timeout', delete_batch.lock_timeout_ms || 'ms', TRUE);
    LOOP
        holds_documents := FALSE;
        BEGIN
            done := delete_documents(delete_batch.batch_id, NULL, delete_batch.lock_timeout_ms);
            holds_documents := TRUE;
            PERFORM set_config('lock_timeout', short_ms || 'ms', TRUE);
            SELECT b.* INTO batch FROM processing_jobs AS b WHERE b.batch_id = delete_batch.batch_id FOR UPDATE;
            IF NOT FOUND THEN
                RETURN NULL;
            END IF;
            done := done + delete_documents(delete_batch.batch_id, NULL, short_ms);
            PERFORM FROM batch_archives AS a WHERE a.batch_id = batch.batch_id ORDER BY a.id FOR UPDATE;
            PERFORM note_file(a.file_path)
            FROM batch_archives AS a WHERE a.batch_id = batch.batch_id AND is_stored_archive(a.file_path, a.batch_id, a.entry_path);
            PERFORM note_file(batch.zip_path) WHERE is_stored_archive(batch.zip_path, batch.batch_id, '');
            DELETE FROM processing_jobs AS b WHERE b.id = batch.id;
            RETURN done;
        EXCEPTION
            WHEN lock_not_available OR deadlock_detected THEN
                tries_left := tries_left - 1;
                IF tries_left = 0 OR NOT holds_documents THEN
                    RAISE;
                END IF;
            WHEN foreign_key_violation THEN
                RAISE EXCEPTION 'could not delete batch "%": documents were submitted to it that this transaction does not see', batch.batch_id
                    USING ERRCODE = 'serialization_failure', HINT = 'Try again in a new transaction.';
        END;
        -- Nothing is held any more: whoever waited for its documents goes first, and whoever has the batch is waited for as long as was asked.
        PERFORM pg_sleep(0.1);
        BEGIN
            PERFORM FROM processing_jobs AS b WHERE b.batch_id = delete_batch.batch_id FOR UPDATE;
            RAISE SQLSTATE 'DMFRE';
        EXCEPTION WHEN SQLSTATE 'DMFRE' THEN
            NULL;
        END;
    END LOOP;
END;
$$;

-- What was submitted again while the documents of a cancelled batch were still being cancelled, some at a time or by a reconciler, was cancelled
-- with them. Whoever cancels holds the batch as it is, so that nobody begins a run meanwhile.

DROP FUNCTION cancel_documents(text, integer);
CREATE FUNCTION cancel_documents(batch_id text, max_count integer DEFAULT NULL, lock_timeout_ms integer DEFAULT 5000) RETURNS integer
LANGUAGE plpgsql SET lock_timeout FROM CURRENT AS $$
-- Documents that somebody holds are passed over, not waited for, because the batch is held. They are cancelled with the next call, or by the
-- reconciler.
DECLARE
    candidate bigint;
    d file_extractions;
    done integer := 0;
BEGIN
    PERFORM set_config('lock_timeout', cancel_documents.lock_timeout_ms || 'ms', TRUE);
    PERFORM FROM processing_jobs AS b WHERE b.batch_id = cancel_documents.batch_id AND b.status = 'cancelled' FOR SHARE;
    IF NOT FOUND THEN
        RETURN 0;
    END IF;
    FOR candidate IN
        SELECT f.id FROM file_extractions AS f
        WHERE f.batch_id = cancel_documents.batch_id AND f.run_id IS NOT NULL AND f.state IN ('queued', 'working', 'retrying')
        ORDER BY f.id
    LOOP
        EXIT WHEN done >= max_count;
        SELECT f.* INTO d FROM file_extractions AS f
        WHERE f.id = candidate AND f.batch_id = cancel_documents.batch_id AND f.state IN ('queued', 'working', 'retrying')
        FOR UPDATE SKIP LOCKED;
        CONTINUE WHEN NOT FOUND;
        PERFORM stop_document(d);
        done := done + 1;
    END LOOP;
    RETURN done;
END;
$$;
COMMENT ON FUNCTION cancel_documents IS
    'Cancels unfinished documents of a batch that is cancelled, at most max_count (null: all), and returns how many.';

CREATE OR REPLACE FUNCTION cancel_straggler(doc_id text) RETURNS text LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    d file_extractions;
BEGIN
    SELECT f.* INTO d FROM file_extractions AS f
    WHERE f.doc_id = cancel_straggler.doc_id AND f.run_id IS NOT NULL AND f.state IN ('queued', 'working', 'retrying')
    FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    -- This transaction holds a document, so it may not wait for its batch.
    PERFORM FROM processing_jobs AS b WHERE b.batch_id = d.batch_id AND b.status = 'cancelled' FOR SHARE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    PERFORM stop_document(d);
    RETURN 'cancelled';
END;
$$;

CALL pin_search_path();
