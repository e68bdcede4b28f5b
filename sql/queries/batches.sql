-- What submitting a folder or list asks and writes beside accept_document, begin_batch and seal_batch.

-- name: find_known_documents
SELECT d.doc_id, d.content_sha256, d.version, d.state, d.batch_id, d.run_id, d.correlation_id
FROM file_extractions AS d
WHERE d.doc_id = ANY(%(doc_ids)s) AND d.user_id = %(user_id)s;

-- name: look_at_batch
-- `lacking`: something of its run that submitting it again would bring back; cancelled documents only where these are to be taken up.
SELECT b.user_id, b.run_id, b.sealed_at IS NOT NULL AS sealed, b.direct_files, b.content_sha256, b.status,
    CASE WHEN %(resume)s THEN NOT run_is_whole(b) ELSE run_lacks_deleted(b) END AS lacking
FROM processing_jobs AS b
WHERE b.batch_id = %(batch_id)s;

-- name: adopt_documents
SELECT adopt_documents(%(batch_id)s, %(run_id)s, %(user_id)s, %(doc_ids)s, %(lock_timeout_ms)s) AS adopted;

-- name: direct_archives
-- The archives of a batch's last run that lie in no other, with what they hold.
SELECT a.entry_path, a.content_sha256, a.state
FROM batch_archives AS a
JOIN processing_jobs AS b ON b.batch_id = a.batch_id AND b.run_id = a.run_id
WHERE b.batch_id = %(batch_id)s AND b.user_id = %(user_id)s AND a.parent_id IS NULL;

-- name: open_transaction
-- Makes a connection that is not in autocommit mode open its transaction, so that a block inside of it is a savepoint.
SELECT;
