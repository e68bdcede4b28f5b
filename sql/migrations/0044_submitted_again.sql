-- A document that is submitted with new content and without metadata keeps what it has. Folders, archives and syncs never say any, so that
-- whatever update_document had set was gone with the next change of the file, and searches that filter by it no longer found the document. And a
-- submission that changes nothing is told the correlation_id that stands in logs and events.

CREATE OR REPLACE FUNCTION accept_document(
    doc_id text, user_id text, file_name text, file_path text, source_path text, file_size bigint, content_sha256 text,
    metadata jsonb, priority integer, correlation_id text, batch_id text, run_id uuid, lock_timeout_ms integer,
    OUT outcome text, OUT version integer, OUT state document_state
) LANGUAGE plpgsql SET lock_timeout FROM CURRENT AS $$
-- The SET clause restores the caller's own lock_timeout on the way out.
#variable_conflict use_column
DECLARE
    known file_extractions;
    run_status text;
    tries_left integer := 10;
BEGIN
    PERFORM set_config('lock_timeout', accept_document.lock_timeout_ms || 'ms', TRUE);
    IF accept_document.run_id IS NOT NULL THEN
        SELECT b.status INTO run_status
        FROM processing_jobs AS b WHERE b.batch_id = accept_document.batch_id AND b.run_id = accept_document.run_id;
        IF run_status IS NULL OR run_status = 'cancelled' THEN
            RAISE EXCEPTION 'batch "%": %', accept_document.batch_id, CASE
                WHEN run_status = 'cancelled' THEN 'this run of it has been cancelled'
                WHEN EXISTS (SELECT FROM processing_jobs AS b WHERE b.batch_id = accept_document.batch_id) THEN 'a newer run has begun'
                ELSE 'it has been deleted'
            END USING ERRCODE = 'object_not_in_prerequisite_state';
        END IF;
    END IF;
    LOOP
        INSERT INTO file_extractions AS d (
            doc_id, batch_id, run_id, user_id, file_name, file_path, source_path, file_size, content_sha256, priority, correlation_id, metadata
        ) VALUES (
            accept_document.doc_id, accept_document.batch_id, accept_document.run_id, accept_document.user_id,
            accept_document.file_name, accept_document.file_path, accept_document.source_path, accept_document.file_size,
            accept_document.content_sha256, accept_document.priority, accept_document.correlation_id, accept_document.metadata
        ) ON CONFLICT (doc_id) DO NOTHING
        RETURNING d.* INTO known;
        IF FOUND THEN
            outcome := 'accepted';
            EXIT;
        END IF;
        SELECT d.* INTO known FROM file_extractions AS d WHERE d.doc_id = accept_document.doc_id FOR UPDATE;
        EXIT WHEN FOUND;
        -- Deleted while this waited for the lock: then it is a new document. Or there for good, and hidden by row-level security.
        tries_left := tries_left - 1;
        EXIT WHEN tries_left = 0;
    END LOOP;
    IF outcome IS NULL THEN
        IF known.user_id IS DISTINCT FROM accept_document.user_id THEN
            RAISE EXCEPTION 'doc_id "%" is taken; choose another', accept_document.doc_id USING ERRCODE = 'unique_violation';
        END IF;
        IF known.content_sha256 = accept_document.content_sha256 THEN
            -- The same content again: nothing happens, except that a cancelled document is taken up where it was left.
            UPDATE file_extractions AS d SET batch_id = accept_document.batch_id, run_id = accept_document.run_id
            WHERE d.id = known.id AND d.run_id IS DISTINCT FROM accept_document.run_id AND accept_document.run_id IS NOT NULL;
            IF known.replaced_by IS NOT NULL THEN
                -- Its file is back where it was before it was moved.
                UPDATE file_extractions AS d SET replaced_by = NULL WHERE d.id = known.id;
            END IF;
            IF known.state <> 'cancelled' THEN
                outcome := 'unchanged';
                version := known.version;
                state := known.state;
                RETURN;
            END IF;
            UPDATE file_extractions AS d
            SET state = 'queued', claim = d.claim + 1, claim_job_id = NULL, retry_count = 0, crash_count = 0, lone_crash_count = 0,
                requeue_count = 0, alone = FALSE, not_before = NULL, processing_completed_at = NULL, updated_at = now()
            WHERE d.id = known.id RETURNING d.* INTO known;
            outcome := 'resumed';
            UPDATE dead_letters AS l SET resolved_at = now(), resolution = 'requeued'
            WHERE l.doc_id = known.doc_id AND l.resolved_at IS NULL;
        ELSE
            UPDATE file_extractions AS d
            SET version = d.version + 1, milestone = 'uploaded', state = 'queued', claim = d.claim + 1, claim_job_id = NULL,
                lease_until = NULL, batch_id = accept_document.batch_id, run_id = accept_document.run_id,
                file_name = accept_document.file_name, file_path = accept_document.file_path,
                source_path = accept_document.source_path, file_size = accept_document.file_size,
                content_sha256 = accept_document.content_sha256,
                -- What is served keeps its type, by which searches find it, until validate knows the new one.
                file_type = CASE WHEN d.served_version IS NOT NULL THEN d.file_type END,
                mime_type = CASE WHEN d.served_version IS NOT NULL THEN d.mime_type END,
                page_count = NULL, chunk_count = NULL, duplicate_of = NULL, priority = accept_document.priority,
                correlation_id = accept_document.correlation_id,
                metadata = CASE WHEN accept_document.metadata = '{}' THEN d.metadata ELSE accept_document.metadata END, retry_count = 0,
                crash_count = 0, lone_crash_count = 0, requeue_count = 0, alone = FALSE, not_before = NULL,
                error_type = NULL, error_message = NULL, updated_at = now(),
                processing_started_at = NULL, processing_completed_at = NULL
            WHERE d.id = known.id RETURNING d.* INTO known;
            outcome := 'new_version';
            DELETE FROM chunk_buffer AS b WHERE b.doc_id = known.doc_id;
            DELETE FROM vector_buffer AS b WHERE b.doc_id = known.doc_id;
            DELETE FROM extraction_buffer AS b WHERE b.doc_id = known.doc_id;
            DELETE FROM document_markdown AS m
            WHERE m.doc_id = known.doc_id AND m.version IS DISTINCT FROM known.served_version;
            UPDATE dead_letters AS l SET resolved_at = now(), resolution = 'superseded'
            WHERE l.doc_id = known.doc_id AND l.resolved_at IS NULL;
        END IF;
        PERFORM drop_waiting_jobs(known.doc_id);
    END IF;
    PERFORM defer_stage(known.doc_id, due_stage(known.milestone), known.priority);
    INSERT INTO document_events (doc_id, version, batch_id, user_id, correlation_id, event, claim, detail)
    VALUES (known.doc_id, known.version, known.batch_id, known.user_id, known.correlation_id,
        CASE outcome WHEN 'accepted' THEN 'submitted' ELSE 'resubmitted' END, known.claim,
        jsonb_build_object('outcome', outcome, 'file_name', known.file_name, 'file_size', known.file_size));
    version := known.version;
    state := known.state;
END;
$$;
COMMENT ON FUNCTION accept_document IS
    'Takes in a stored upload. outcome: accepted, unchanged (same content: nothing happens), new_version (metadata, unless empty, takes the place of the old), or resumed (was cancelled).';

CREATE FUNCTION correlation_id_of(doc_id text) RETURNS text LANGUAGE plpgsql AS $$
-- Looks anew, where the statement that asks has begun before another submission of the document was committed.
BEGIN
    RETURN (SELECT d.correlation_id FROM file_extractions AS d WHERE d.doc_id = correlation_id_of.doc_id);
END;
$$;
COMMENT ON FUNCTION correlation_id_of IS 'The correlation_id that a document bears now.';

CALL pin_search_path();
