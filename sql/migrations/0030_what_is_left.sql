-- A deleted document's card stayed in the summary of a batch that had found it unchanged, which no event tells of. Who prunes looks for such
-- cards now; to look at each deletion would mean to read all summaries of its user. And the name of a worker was one that two processes in
-- containers with the host's network could share.

CREATE FUNCTION summary_documents(ui_json jsonb, nested_summary jsonb) RETURNS jsonb LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN jsonb_path_query_array(ui_json, '$.files[*].doc_id ? (@ != null)')
    || jsonb_path_query_array(nested_summary, '$.folders[*].files[*].doc_id ? (@ != null)');
COMMENT ON FUNCTION summary_documents IS 'The doc_ids that a summary speaks of, as a JSON array.';
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

COMMENT ON COLUMN file_extractions.claimed_by IS 'The worker that holds or last held the claim: host:pid, in a container host:pid:namespace.';
COMMENT ON COLUMN document_events.worker IS 'The worker: host:pid, in a container host:pid:namespace.';
COMMENT ON COLUMN worker_registry.worker IS 'Its name: host:pid, in a container host:pid:namespace.';
COMMENT ON COLUMN reembeddings.worker IS 'The worker that last worked on it: host:pid, in a container host:pid:namespace.';
COMMENT ON COLUMN provider_usage.worker IS 'The worker that called: host:pid, in a container host:pid:namespace.';
COMMENT ON COLUMN document_status.claimed_by IS 'The worker that works on it or last did: host:pid, in a container host:pid:namespace.';
COMMENT ON COLUMN worker_health.worker IS 'Its name: host:pid, in a container host:pid:namespace.';
COMMENT ON COLUMN stuck_documents.worker IS 'The worker that has it or last had it: host:pid, in a container host:pid:namespace.';

CALL pin_search_path();
