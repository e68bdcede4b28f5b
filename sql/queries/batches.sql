-- What submitting a batch asks and writes beside accept_document, begin_batch and seal_batch.

-- name: find_known_documents
SELECT d.doc_id, d.content_sha256, d.version, d.state, d.batch_id, d.run_id, d.correlation_id
FROM file_extractions AS d
WHERE d.doc_id = ANY(%(doc_ids)s) AND d.user_id = %(user_id)s;

-- name: look_at_batch
SELECT b.run_id, b.sealed_at IS NOT NULL AS sealed,
    (SELECT count(*) FROM file_extractions AS d WHERE d.batch_id = b.batch_id AND d.run_id = b.run_id) AS documents
FROM processing_jobs AS b
WHERE b.batch_id = %(batch_id)s AND b.user_id = %(user_id)s;

-- name: adopt_documents
-- Takes known documents, whose content has not changed, into a run, unless a later run has been begun or this one cancelled meanwhile. Locked in the order
-- of ids, as everywhere.
WITH mine AS (
    SELECT d.id
    FROM file_extractions AS d
    WHERE d.doc_id = ANY(%(doc_ids)s) AND d.user_id = %(user_id)s AND d.run_id IS DISTINCT FROM %(run_id)s
        AND EXISTS (SELECT FROM processing_jobs AS b WHERE b.batch_id = %(batch_id)s AND b.run_id = %(run_id)s AND b.status <> 'cancelled')
    ORDER BY d.id
    FOR UPDATE
)
UPDATE file_extractions AS d
SET batch_id = %(batch_id)s, run_id = %(run_id)s
FROM mine
WHERE d.id = mine.id;

-- name: limit_lock_wait
SELECT set_config('lock_timeout', %(lock_timeout_ms)s || 'ms', TRUE);
