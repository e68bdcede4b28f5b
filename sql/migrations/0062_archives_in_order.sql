-- Cancelling a batch took its archives as it came upon them, and listing an archive inside of another takes both in the order of ids: the two
-- met in a deadlock, which cost one of them. So did deleting a batch, which met those who submit it as well. Both take archives in that order
-- too, and deleting gives way.

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

CREATE OR REPLACE FUNCTION delete_batch(batch_id text, lock_timeout_ms integer DEFAULT 5000) RETURNS integer
LANGUAGE plpgsql SET lock_timeout FROM CURRENT AS $$
-- Documents first, then the batch, then the documents that were submitted meanwhile: while the batch is locked like this, none can be. Its
-- archives in the order of ids, as in mark_batch_cancelled. Whoever submits the batch takes documents that are new while holding it, and an
-- archive that is being unpacked is held by whoever takes in its documents: where they meet, this gives way and begins again.
#variable_conflict use_column
DECLARE
    batch processing_jobs;
    done integer;
    tries_left integer := 3;
BEGIN
    PERFORM set_config('lock_timeout', delete_batch.lock_timeout_ms || 'ms', TRUE);
    LOOP
        BEGIN
            done := delete_documents(delete_batch.batch_id, NULL, delete_batch.lock_timeout_ms);
            SELECT b.* INTO batch FROM processing_jobs AS b WHERE b.batch_id = delete_batch.batch_id FOR UPDATE;
            IF NOT FOUND THEN
                RETURN NULL;
            END IF;
            done := done + delete_documents(delete_batch.batch_id, NULL, delete_batch.lock_timeout_ms);
            PERFORM FROM batch_archives AS a WHERE a.batch_id = batch.batch_id ORDER BY a.id FOR UPDATE;
            PERFORM note_file(a.file_path)
            FROM batch_archives AS a WHERE a.batch_id = batch.batch_id AND is_stored_archive(a.file_path, a.batch_id, a.entry_path);
            PERFORM note_file(batch.zip_path) WHERE is_stored_archive(batch.zip_path, batch.batch_id, '');
            DELETE FROM processing_jobs AS b WHERE b.id = batch.id;
            RETURN done;
        EXCEPTION WHEN deadlock_detected THEN
            tries_left := tries_left - 1;
            IF tries_left = 0 THEN
                RAISE;
            END IF;
            -- Or it would have the documents again before the other has woken up.
            PERFORM pg_sleep(0.1);
        END;
    END LOOP;
END;
$$;

CALL pin_search_path();
