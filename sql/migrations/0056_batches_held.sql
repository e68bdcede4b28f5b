-- A batch that somebody's open transaction holds is waited for no longer than a document is, and a batch that is submitted again without
-- metadata keeps what it has: folders, archives and syncs are mostly submitted without any, so that whatever update_batch had set was gone
-- with the next change of a file.

CREATE OR REPLACE FUNCTION begin_batch(
    batch_id text, user_id text, source_path text, correlation_id text, metadata jsonb DEFAULT '{}'
) RETURNS uuid LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    run uuid;
BEGIN
    INSERT INTO processing_jobs AS b (batch_id, user_id, source_path, correlation_id, metadata, status)
    VALUES (begin_batch.batch_id, begin_batch.user_id, begin_batch.source_path, begin_batch.correlation_id, begin_batch.metadata, 'pending')
    ON CONFLICT (batch_id) DO UPDATE
    SET run_id = gen_random_uuid(), status = 'pending', source_path = EXCLUDED.source_path, correlation_id = EXCLUDED.correlation_id,
        metadata = CASE WHEN EXCLUDED.metadata = '{}' THEN b.metadata ELSE EXCLUDED.metadata END,
        total_files = 0, direct_files = 0, zip_path = NULL, content_sha256 = NULL, error_message = NULL,
        sealed_at = NULL, completed_at = NULL, updated_at = now()
    WHERE b.user_id = EXCLUDED.user_id
    RETURNING b.run_id INTO run;
    IF run IS NULL THEN
        RAISE EXCEPTION 'batch_id "%" is taken; choose another', begin_batch.batch_id USING ERRCODE = 'unique_violation';
    END IF;
    RETURN run;
END;
$$;
COMMENT ON FUNCTION begin_batch(text, text, text, text, jsonb) IS
    'Opens a run of a batch, new or known, and returns its run_id. Metadata, unless empty, takes the place of the old.';

CREATE FUNCTION begin_batch(
    batch_id text, user_id text, source_path text, correlation_id text, metadata jsonb, lock_timeout_ms integer, doc_ids text[]
) RETURNS uuid LANGUAGE plpgsql SET lock_timeout FROM CURRENT AS $$
DECLARE
    held text;
BEGIN
    PERFORM set_config('lock_timeout', begin_batch.lock_timeout_ms || 'ms', TRUE);
    -- Documents first, then the batch, as in delete_batch: who waits for a document must not hold the batch.
    BEGIN
        PERFORM FROM file_extractions AS d WHERE d.doc_id = ANY(begin_batch.doc_ids) ORDER BY d.id FOR UPDATE;
    EXCEPTION WHEN lock_not_available THEN
        held := SQLERRM;
    END;
    BEGIN
        IF held IS NULL THEN
            RETURN begin_batch(
                begin_batch.batch_id, begin_batch.user_id, begin_batch.source_path, begin_batch.correlation_id, begin_batch.metadata
            );
        END IF;
        -- If the batch is held too, that is what to tell: no other document can be had either.
        PERFORM FROM processing_jobs AS b WHERE b.batch_id = begin_batch.batch_id FOR NO KEY UPDATE NOWAIT;
    EXCEPTION WHEN OTHERS THEN
        -- The statement is about documents too: whoever reads the error has to know that it is the batch which stands in the way.
        RAISE EXCEPTION USING ERRCODE = SQLSTATE, MESSAGE = SQLERRM, TABLE = 'processing_jobs';
    END;
    RAISE EXCEPTION USING ERRCODE = 'lock_not_available', MESSAGE = held;
END;
$$;
COMMENT ON FUNCTION begin_batch(text, text, text, text, jsonb, integer, text[]) IS
    'Does as begin_batch without lock_timeout_ms does, once it has locked those of the documents that are known, and waits no longer than that for each lock. An error about the batch names the table processing_jobs.';

CREATE FUNCTION seal_batch(batch_id text, run_id uuid, total_files integer, lock_timeout_ms integer) RETURNS text
LANGUAGE plpgsql SET lock_timeout FROM CURRENT AS $$
BEGIN
    PERFORM set_config('lock_timeout', seal_batch.lock_timeout_ms || 'ms', TRUE);
    RETURN seal_batch(seal_batch.batch_id, seal_batch.run_id, seal_batch.total_files);
END;
$$;
COMMENT ON FUNCTION seal_batch(text, uuid, integer, integer) IS
    'Does as seal_batch without lock_timeout_ms does, but waits no longer than that for somebody''s transaction.';

CALL pin_search_path();
