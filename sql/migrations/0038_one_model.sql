-- A document whose extraction is tried again has vectors of one model.
--
-- Between two steps of a re-embedding the passages of one document can have vectors of two models. Copied as they were they were all taken
-- for the first one's, or could not be taken up at all. Such a document goes back to embed, which takes what its user has of the serving
-- model and makes the rest.

CREATE OR REPLACE FUNCTION resume_extraction(d file_extractions) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    fresh file_extractions;
    has_one_model boolean := (
        SELECT count(DISTINCT c.embedding_model) < 2 FROM document_chunks AS c WHERE c.doc_id = d.doc_id AND c.version = d.version
    );
BEGIN
    UPDATE file_extractions AS f
    SET version = f.version + 1, milestone = 'uploaded', state = 'queued', claim = f.claim + 1, claim_job_id = NULL, lease_until = NULL,
        retry_count = 0, crash_count = 0, lone_crash_count = 0, requeue_count = 0, alone = FALSE, not_before = NULL,
        error_type = NULL, error_message = NULL, processing_started_at = NULL, processing_completed_at = NULL, updated_at = now()
    WHERE f.id = d.id;
    UPDATE file_extractions AS f
    SET milestone = CASE WHEN has_one_model THEN 'embeddings_stored' ELSE 'chunks_stored' END::document_milestone
    WHERE f.id = d.id
    RETURNING f.* INTO fresh;
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
    FROM document_chunks AS c WHERE c.doc_id = d.doc_id AND c.version = d.version AND has_one_model;
    PERFORM drop_waiting_jobs(d.doc_id);
    PERFORM defer_stage(d.doc_id, due_stage(fresh.milestone), d.priority);
    INSERT INTO document_events (doc_id, version, batch_id, user_id, correlation_id, stage, event, claim, detail)
    VALUES (d.doc_id, fresh.version, d.batch_id, d.user_id, d.correlation_id, 'extract', 'requeued_by_operator', fresh.claim,
        jsonb_build_object('failed_as', d.raw_extraction -> 'failure' ->> 'error_type', 'role', session_user));
    RETURN due_stage(fresh.milestone);
END;
$$;
COMMENT ON FUNCTION resume_extraction IS
    'Queues a complete document, whose lock is held, at extract, or at embed where its passages have vectors of two models; inside of requeue_extraction.';

CALL pin_search_path();
