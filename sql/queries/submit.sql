-- What the front door runs. One statement a document, so that it can join a caller's transaction.

-- name: accept_document
SELECT a.outcome, a.version, a.state
FROM accept_document(
    %(doc_id)s, %(user_id)s, %(file_name)s, %(file_path)s, %(source_path)s, %(file_size)s, %(content_sha256)s, %(metadata)s,
    %(priority)s, %(correlation_id)s, %(batch_id)s, %(run_id)s, %(lock_timeout_ms)s
) AS a;

-- name: begin_batch
SELECT begin_batch(%(batch_id)s, %(user_id)s, %(source_path)s, %(correlation_id)s, %(metadata)s) AS run_id;

-- name: seal_batch
SELECT seal_batch(%(batch_id)s, %(run_id)s, %(total_files)s) AS status;
