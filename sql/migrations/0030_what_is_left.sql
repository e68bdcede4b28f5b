-- Three things that were left over: a deleted document's card in the summary of a batch that had it without doing anything with it, which no
-- event tells of; a complete document whose extraction was tried again in a cancelled batch, which the reconciler then cancelled as a straggler;
-- and the name of a worker, which two processes in containers with the host's network could share.

CREATE FUNCTION summary_documents(ui_json jsonb, nested_summary jsonb) RETURNS jsonb LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN jsonb_path_query_array(ui_json, '$.files[*].doc_id ? (@ != null)')
    || jsonb_path_query_array(nested_summary, '$.folders[*].files[*].doc_id ? (@ != null)');
COMMENT ON FUNCTION summary_documents IS 'The doc_ids that a summary speaks of, as a JSON array.';
CREATE INDEX run_summaries_documents ON run_summaries USING gin (summary_documents(ui_json, nested_summary) jsonb_path_ops);

CREATE OR REPLACE FUNCTION note_deleted_document() RETURNS trigger LANGUAGE plpgsql AS $$
-- Not done at once: this transaction holds a document, so it may not wait for its batch.
BEGIN
    INSERT INTO summaries_to_renew (batch_id, is_its_own)
    SELECT m.batch_id, bool_or(m.is_its_own)
    FROM (
        SELECT o.batch_id, TRUE AS is_its_own FROM old_documents AS o WHERE o.batch_id IS NOT NULL
        UNION ALL
        SELECT r.batch_id, FALSE
        FROM old_documents AS o
        JOIN run_summaries AS r ON summary_documents(r.ui_json, r.nested_summary) @> jsonb_build_array(o.doc_id)
    ) AS m
    GROUP BY m.batch_id;
    RETURN NULL;
END;
$$;

CREATE OR REPLACE FUNCTION forget_deleted_documents(batch_id text) RETURNS integer LANGUAGE plpgsql AS $$
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
    WHERE r.batch_id = forget_deleted_documents.batch_id AND EXISTS (
        SELECT FROM jsonb_array_elements_text(summary_documents(r.ui_json, r.nested_summary)) AS e (doc_id)
        WHERE NOT EXISTS (SELECT FROM file_extractions AS d WHERE d.doc_id = e.doc_id)
    );
    GET DIAGNOSTICS changed = ROW_COUNT;
    RETURN changed;
END;
$$;

-- Summaries that a deletion has missed so far.
INSERT INTO summaries_to_renew (batch_id, is_its_own)
SELECT DISTINCT r.batch_id, FALSE
FROM run_summaries AS r, jsonb_array_elements_text(summary_documents(r.ui_json, r.nested_summary)) AS e (doc_id)
WHERE NOT EXISTS (SELECT FROM file_extractions AS d WHERE d.doc_id = e.doc_id);

DROP TRIGGER file_extractions_taken_up ON file_extractions;
CREATE TRIGGER file_extractions_taken_up BEFORE UPDATE OF state ON file_extractions
    FOR EACH ROW WHEN (OLD.state IN ('complete', 'failed', 'cancelled', 'duplicate') AND NEW.state = 'queued' AND NEW.run_id IS NOT NULL)
    EXECUTE FUNCTION leave_cancelled_run();

COMMENT ON COLUMN worker_registry.worker IS 'host:pid, in a container host:pid:namespace.';
COMMENT ON COLUMN worker_health.worker IS 'host:pid, in a container host:pid:namespace.';

CALL pin_search_path();
