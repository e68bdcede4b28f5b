-- What the front door runs. One statement a document, so that it can join a caller's transaction.

-- name: accept_document
-- What is not changed keeps its correlation_id.
SELECT a.outcome, a.version, a.state,
    CASE WHEN a.outcome IN ('unchanged', 'resumed') THEN correlation_id_of(%(doc_id)s) END AS kept_correlation_id
FROM accept_document(
    %(doc_id)s, %(user_id)s, %(file_name)s, %(file_path)s, %(source_path)s, %(file_size)s, %(content_sha256)s, %(metadata)s,
    %(priority)s, %(correlation_id)s, %(batch_id)s, %(run_id)s, %(lock_timeout_ms)s
) AS a;

-- name: accept_documents
-- Many new documents of a batch in one transaction, in one order for all who submit: all of them or, where one stands in the way, none.
SELECT e.doc_id, a.outcome, a.version, a.state,
    CASE WHEN a.outcome IN ('unchanged', 'resumed') THEN correlation_id_of(e.doc_id) END AS kept_correlation_id
FROM (
    SELECT t.* FROM jsonb_to_recordset(%(documents)s) AS t (
        doc_id text, user_id text, file_name text, file_path text, source_path text, file_size bigint, content_sha256 text,
        metadata jsonb, priority integer, correlation_id text, batch_id text, run_id uuid, lock_timeout_ms integer
    )
    ORDER BY t.doc_id
) AS e
CROSS JOIN LATERAL accept_document(
    e.doc_id, e.user_id, e.file_name, e.file_path, e.source_path, e.file_size, e.content_sha256, e.metadata,
    e.priority, e.correlation_id, e.batch_id, e.run_id, e.lock_timeout_ms
) AS a;

-- name: begin_batch
-- With the documents whose content has not changed, all of it or nothing.
WITH begun AS MATERIALIZED (
    SELECT begin_batch(
        %(batch_id)s, %(user_id)s, %(source_path)s, %(correlation_id)s, %(metadata)s, %(lock_timeout_ms)s, %(doc_ids)s
    ) AS run_id
)
SELECT b.run_id, adopt_documents(%(batch_id)s, b.run_id, %(user_id)s, %(doc_ids)s, %(lock_timeout_ms)s) AS adopted
FROM begun AS b;

-- name: begin_batch_with_documents
-- A run and the first documents that are new or changed in it, all of it or nothing: where they cannot be had, the batch stays as it is.
WITH begun AS MATERIALIZED (
    SELECT begin_batch(
        %(batch_id)s, %(user_id)s, %(source_path)s, %(correlation_id)s, %(metadata)s, %(lock_timeout_ms)s, %(doc_ids)s
    ) AS run_id
)
SELECT b.run_id, e.doc_id, a.outcome, a.version, a.state,
    CASE WHEN a.outcome IN ('unchanged', 'resumed') THEN correlation_id_of(e.doc_id) END AS kept_correlation_id
FROM begun AS b
CROSS JOIN (
    SELECT t.* FROM jsonb_to_recordset(%(documents)s) AS t (
        doc_id text, user_id text, file_name text, file_path text, source_path text, file_size bigint, content_sha256 text,
        metadata jsonb, priority integer, correlation_id text, batch_id text, lock_timeout_ms integer
    )
    ORDER BY t.doc_id
) AS e
CROSS JOIN LATERAL accept_document(
    e.doc_id, e.user_id, e.file_name, e.file_path, e.source_path, e.file_size, e.content_sha256, e.metadata,
    e.priority, e.correlation_id, e.batch_id, b.run_id, e.lock_timeout_ms
) AS a;

-- name: find_held_batch
-- The batch, if somebody's transaction holds it so that no document can be taken into it.
WITH free AS MATERIALIZED (
    SELECT b.id FROM processing_jobs AS b WHERE b.batch_id = %(batch_id)s FOR KEY SHARE SKIP LOCKED
)
SELECT b.batch_id FROM processing_jobs AS b WHERE b.batch_id = %(batch_id)s AND NOT EXISTS (SELECT FROM free AS f WHERE f.id = b.id);

-- name: seal_batch
SELECT seal_batch(%(batch_id)s, %(run_id)s, %(total_files)s, %(lock_timeout_ms)s) AS status;
