-- What submitting a zip and unpacking it asks and writes. The steps themselves are functions: sql/migrations/0008_batches.sql.

-- name: submit_zip
SELECT s.outcome, s.run_id, s.status
FROM submit_zip(
    %(batch_id)s, %(user_id)s, %(source_path)s, %(zip_path)s, %(content_sha256)s, %(metadata)s, %(priority)s, %(correlation_id)s,
    %(lock_timeout_ms)s
) AS s;

-- name: submit_zip_again
-- A zip that is another by now than the one that a run began with; nothing happens if the run is over.
SELECT s.run_id
FROM (
    SELECT b.batch_id, b.user_id, b.source_path, b.zip_path, b.metadata, b.correlation_id
    FROM processing_jobs AS b
    WHERE b.batch_id = %(batch_id)s AND b.run_id = %(run_id)s AND b.status <> 'cancelled'
    FOR UPDATE NOWAIT
) AS b
CROSS JOIN LATERAL submit_zip(
    b.batch_id, b.user_id, b.source_path, b.zip_path, NULL, b.metadata, %(priority)s, b.correlation_id, %(lock_timeout_ms)s
) AS s;

-- name: add_archive
SELECT add_archive(
    %(batch_id)s, %(run_id)s, %(user_id)s, %(entry_path)s, %(source_prefix)s, %(file_path)s, %(content_sha256)s, %(priority)s,
    %(parent_id)s, %(lock_timeout_ms)s, %(keeps_cancelled)s
) AS archive_id;

-- name: begin_unpacking
SELECT begin_unpacking(%(archive_id)s, %(max_attempts)s) AS outcome;

-- name: look_at_archive
SELECT a.id, a.batch_id, a.run_id, a.user_id, a.entry_path, a.source_prefix, a.file_path, a.content_sha256, a.depth, a.priority,
    a.keeps_cancelled, a.retry_count, coalesce(extract(epoch FROM now() - a.waiting_since)::float8, 0) AS waited_seconds, b.source_path, b.correlation_id
FROM batch_archives AS a
JOIN processing_jobs AS b ON b.batch_id = a.batch_id
WHERE a.id = %(archive_id)s;

-- name: record_listing
SELECT r.all_entries, r.all_bytes
FROM record_listing(%(archive_id)s, %(content_sha256)s, %(entry_count)s, %(skipped_count)s, %(unpacked_bytes)s) AS r;

-- name: count_batch_files
SELECT count_batch_files(%(batch_id)s, %(run_id)s) AS total_files;

-- name: find_inner_archives
SELECT a.entry_path FROM batch_archives AS a WHERE a.parent_id = %(archive_id)s;

-- name: find_deleted_since
-- Documents that somebody has deleted since the run was begun.
SELECT DISTINCT e.doc_id
FROM document_events AS e
JOIN processing_jobs AS b ON b.batch_id = %(batch_id)s AND b.run_id = %(run_id)s AND e.at >= b.run_started_at
WHERE e.doc_id = ANY(%(doc_ids)s) AND e.event = 'deleted' AND e.user_id = %(user_id)s;

-- name: accept_entries
SELECT accept_entries(%(archive_id)s, %(entries)s, %(unpacked_count)s, %(lock_timeout_ms)s) AS accepted;

-- name: end_archive
SELECT end_archive(%(archive_id)s, %(state)s, %(error_message)s);

-- name: put_off_archive
SELECT put_off_archive(%(archive_id)s, %(delay)s, %(reason)s, %(waits)s);

-- name: put_off_held_archive
SELECT put_off_held_archive(%(archive_id)s);

-- name: archives_of_batches
-- Of the last runs of batches, for those who wait for them.
SELECT a.id, a.batch_id, a.entry_path, a.state, a.entry_count, a.unpacked_count, a.skipped_count, a.error_message, b.source_path
FROM batch_archives AS a
JOIN processing_jobs AS b ON b.batch_id = a.batch_id AND b.run_id = a.run_id
WHERE a.batch_id = ANY(%(batch_ids)s)
ORDER BY a.batch_id, a.entry_path;

-- name: unpacked_documents
-- What became of each document in a batch's run when it was submitted; `outcome` is null for those that this run found unchanged.
SELECT d.doc_id, d.file_name, d.source_path, d.version, d.state, d.correlation_id, (
        SELECT e.detail ->> 'outcome'
        FROM document_events AS e
        WHERE e.doc_id = d.doc_id AND e.correlation_id = b.correlation_id AND e.event IN ('submitted', 'resubmitted')
        ORDER BY e.id DESC
        LIMIT 1
    ) AS outcome
FROM processing_jobs AS b
JOIN file_extractions AS d ON d.batch_id = b.batch_id AND d.run_id = b.run_id
WHERE b.batch_id = %(batch_id)s
ORDER BY d.source_path, d.doc_id;
