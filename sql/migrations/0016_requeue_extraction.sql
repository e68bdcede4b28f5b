-- A complete document whose extraction failed can have it tried again.
--
-- Within a version milestones only go forward, and what is served stays until something better is swapped in. So the document becomes a new
-- version of the same content that begins behind embed, with its text, passages and vectors in the buffers: extract and finalize are all
-- that is left to do. Until finalize swaps it in, and also where it fails, searches see the version from before.

CREATE FUNCTION resume_extraction(d file_extractions) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    fresh file_extractions;
BEGIN
    UPDATE file_extractions AS f
    SET version = f.version + 1, milestone = 'uploaded', state = 'queued', claim = f.claim + 1, claim_job_id = NULL, lease_until = NULL,
        retry_count = 0, crash_count = 0, lone_crash_count = 0, requeue_count = 0, alone = FALSE, not_before = NULL,
        error_type = NULL, error_message = NULL, processing_started_at = NULL, processing_completed_at = NULL, updated_at = now()
    WHERE f.id = d.id;
    UPDATE file_extractions AS f SET milestone = 'embeddings_stored' WHERE f.id = d.id RETURNING f.* INTO fresh;
    DELETE FROM chunk_buffer AS b WHERE b.doc_id = d.doc_id;
    DELETE FROM vector_buffer AS b WHERE b.doc_id = d.doc_id;
    DELETE FROM extraction_buffer AS b WHERE b.doc_id = d.doc_id;
    INSERT INTO document_markdown (doc_id, version, markdown, markdown_sha256, page_map, parser, parse_metadata)
    SELECT m.doc_id, fresh.version, m.markdown, m.markdown_sha256, m.page_map, m.parser, m.parse_metadata
    FROM document_markdown AS m WHERE m.doc_id = d.doc_id AND m.version = d.version;
    INSERT INTO chunk_buffer (
        doc_id, version, chunk_index, id, content, content_sha256, heading_path, page_start, page_end, char_start, char_end, metadata
    )
    SELECT c.doc_id, fresh.version, c.chunk_index, c.id, c.content, c.content_sha256, c.heading_path, c.page_start, c.page_end,
        c.char_start, c.char_end, c.metadata
    FROM document_chunks AS c WHERE c.doc_id = d.doc_id AND c.version = d.version;
    INSERT INTO vector_buffer (doc_id, version, chunk_index, embedding_model, embedding)
    SELECT c.doc_id, fresh.version, c.chunk_index, c.embedding_model, c.embedding
    FROM document_chunks AS c WHERE c.doc_id = d.doc_id AND c.version = d.version;
    PERFORM drop_waiting_jobs(d.doc_id);
    PERFORM defer_stage(d.doc_id, due_stage(fresh.milestone), d.priority);
    INSERT INTO document_events (doc_id, version, batch_id, user_id, correlation_id, stage, event, claim, detail)
    VALUES (d.doc_id, fresh.version, d.batch_id, d.user_id, d.correlation_id, 'extract', 'requeued_by_operator', fresh.claim,
        jsonb_build_object('failed_as', d.raw_extraction -> 'failure' ->> 'error_type', 'role', session_user));
    RETURN due_stage(fresh.milestone);
END;
$$;
COMMENT ON FUNCTION resume_extraction IS 'Queues a complete document, whose lock is held, at extract; inside of requeue_extraction.';

CREATE FUNCTION requeue_extraction(doc_id text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    d file_extractions := hold_document(requeue_extraction.doc_id);
BEGIN
    IF d.state = 'complete' AND d.raw_extraction ? 'failure' AND d.replaced_by IS NULL THEN
        RETURN resume_extraction(d);
    END IF;
    IF d.state IN ('queued', 'working', 'retrying') AND d.served_version IS NOT NULL AND d.raw_extraction ? 'failure' THEN
        RETURN due_stage(d.milestone);
    END IF;
    RAISE EXCEPTION 'document "%" is % and has no failed extraction%', d.doc_id, d.state,
        CASE WHEN d.state = 'failed' THEN '; requeue_document() takes it up again at the stage that failed' ELSE '' END
        USING ERRCODE = 'object_not_in_prerequisite_state';
END;
$$;
COMMENT ON FUNCTION requeue_extraction IS
    'Has the extraction of a complete document that lacks it (raw_extraction.failure) tried again, and returns the stage that is due; nothing happens if it is under way already. Searches see it all the while. Then, if it has a batch: SELECT reopen_batch(batch_id).';

CREATE FUNCTION requeue_extractions(
    batch_id text DEFAULT NULL, user_id text DEFAULT NULL, ended_before timestamptz DEFAULT now(), max_count integer DEFAULT 1000
) RETURNS integer LANGUAGE plpgsql AS $$
-- Documents that somebody else holds are passed over rather than waited for, as in requeue_dead_letters.
DECLARE
    candidate bigint;
    d file_extractions;
    done integer := 0;
BEGIN
    FOR candidate IN
        SELECT f.id
        FROM file_extractions AS f
        WHERE f.state = 'complete' AND f.raw_extraction ? 'failure' AND f.replaced_by IS NULL AND f.processing_completed_at < ended_before
            AND (requeue_extractions.batch_id IS NULL OR f.batch_id = requeue_extractions.batch_id)
            AND (requeue_extractions.user_id IS NULL OR f.user_id = requeue_extractions.user_id)
        ORDER BY f.id
    LOOP
        EXIT WHEN done >= max_count;
        SELECT f.* INTO d FROM file_extractions AS f WHERE f.id = candidate FOR UPDATE SKIP LOCKED;
        IF FOUND AND d.state = 'complete' AND d.raw_extraction ? 'failure' AND d.replaced_by IS NULL
            AND d.processing_completed_at < ended_before THEN
            PERFORM resume_extraction(d);
            done := done + 1;
        END IF;
    END LOOP;
    RETURN done;
END;
$$;
COMMENT ON FUNCTION requeue_extractions IS
    'Does requeue_extraction for the documents of a batch, or of a user, that were complete before a time, at most max_count, and returns how many; with the same time, call it until it returns 0. Ended batches go on again within seconds.';

-- As before, and: an original whose extraction is tried again still stands there to be searched.
CREATE OR REPLACE FUNCTION has_original(d file_extractions) RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT EXISTS (
        SELECT FROM file_extractions AS o
        WHERE o.doc_id = d.duplicate_of AND o.user_id = d.user_id AND o.content_sha256 = d.content_sha256 AND o.replaced_by IS NULL
            AND (o.state = 'complete' OR (
                o.state IN ('queued', 'working', 'retrying') AND o.served_version = o.version - 1 AND o.raw_extraction ? 'failure'
            ))
    );
$$;

CALL pin_search_path();
