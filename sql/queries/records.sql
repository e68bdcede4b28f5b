-- The operations on documents and batches that application code calls. What changes something is a function: sql/migrations.

-- name: get_document
SELECT d.doc_id, d.user_id, d.batch_id, d.run_id, d.file_name, d.source_path, d.file_path, d.file_type, d.mime_type, d.file_size,
    d.content_sha256, d.version, d.served_version, d.milestone, d.state, d.status, due_stage(d.milestone) AS stage_due, d.priority,
    d.page_count, d.chunk_count, original_of(d.doc_id, d.user_id, d.content_sha256, d.duplicate_of) AS duplicate_of, d.retry_count,
    d.crash_count, d.error_type, d.error_message, d.correlation_id, d.metadata,
    d.created_at, d.updated_at, d.processing_started_at, d.processing_completed_at, d.processing_duration_ms, d.raw_extraction
FROM file_extractions AS d
WHERE d.doc_id = %(doc_id)s;

-- name: list_batch_documents
-- Those of the batch's current run in the order of doc_ids, from behind one on.
SELECT d.doc_id, d.user_id, d.batch_id, d.run_id, d.file_name, d.source_path, d.file_path, d.file_type, d.mime_type, d.file_size,
    d.content_sha256, d.version, d.served_version, d.milestone, d.state, d.status, due_stage(d.milestone) AS stage_due, d.priority,
    d.page_count, d.chunk_count, original_of(d.doc_id, d.user_id, d.content_sha256, d.duplicate_of) AS duplicate_of, d.retry_count,
    d.crash_count, d.error_type, d.error_message, d.correlation_id, d.metadata,
    d.created_at, d.updated_at, d.processing_started_at, d.processing_completed_at, d.processing_duration_ms
FROM processing_jobs AS b
JOIN file_extractions AS d ON d.batch_id = b.batch_id AND d.run_id = b.run_id
WHERE b.batch_id = %(batch_id)s
    AND (%(state)s::document_state IS NULL OR d.state = %(state)s::document_state)
    AND d.doc_id COLLATE "C" > coalesce(%(after)s, '')
ORDER BY d.doc_id COLLATE "C"
LIMIT %(limit)s;

-- name: get_batch
SELECT b.batch_id, b.run_id, b.user_id, b.source_path, b.status, b.error_message, b.total_files, b.correlation_id, b.metadata,
    b.created_at, b.run_started_at, b.sealed_at, b.completed_at, b.updated_at
FROM processing_jobs AS b
WHERE b.batch_id = %(batch_id)s;

-- name: batch_statistics
SELECT s.batch_id, s.run_id, s.status, s.files, s.queued, s.working, s.retrying, s.complete, s.failed, s.duplicate, s.cancelled,
    s.archives_open, s.archives_failed, s.pages, s.passages, s.bytes, s.retries, s.crashes, s.first_started_at, s.last_progress_at,
    s.mean_duration_ms, s.max_duration_ms, s.by_file_type, s.by_error_type
FROM batch_statistics(%(batch_id)s) AS s;

-- name: run_summary
SELECT r.run_id, r.batch_id, r.user_id, r.ui_json, r.nested_summary, r.file_count, r.success_count, r.error_count, r.created_at, r.updated_at
FROM run_summary(%(id)s) AS r
WHERE r.run_id IS NOT NULL;

-- name: present_summary
SELECT b.run_id, b.batch_id, b.user_id, s.ui_json, s.nested_summary, s.file_count, s.success_count, s.error_count,
    now() AS created_at, now() AS updated_at
FROM processing_jobs AS b
CROSS JOIN LATERAL build_run_summary(b.batch_id) AS s
WHERE b.batch_id = %(id)s;

-- name: update_document
SELECT update_document(%(doc_id)s, %(metadata)s, %(priority)s);

-- name: update_batch
SELECT update_batch(%(batch_id)s, %(metadata)s);

-- name: fail_document_by_operator
SELECT fail_document_by_operator(%(doc_id)s, %(reason)s) AS state,
    (SELECT d.batch_id FROM file_extractions AS d WHERE d.doc_id = %(doc_id)s) AS batch_id;

-- name: fail_batch
SELECT fail_batch(%(batch_id)s, %(reason)s) AS status;

-- name: retry_document
SELECT requeue_document(%(doc_id)s, %(priority)s::integer) AS stage,
    (SELECT d.batch_id FROM file_extractions AS d WHERE d.doc_id = %(doc_id)s) AS batch_id;

-- name: count_retries
SELECT count(*) AS count FROM dead_letters AS l WHERE l.doc_id = %(doc_id)s AND l.resolution = 'requeued';

-- name: requeue_extraction
SELECT requeue_extraction(%(doc_id)s) AS stage,
    (SELECT d.batch_id FROM file_extractions AS d WHERE d.doc_id = %(doc_id)s) AS batch_id;

-- name: requeue_extractions
SELECT requeue_extractions(%(batch_id)s, %(user_id)s, %(ended_before)s, %(max_count)s) AS requeued;

-- name: look_at_clock
SELECT now() AS at;

-- name: should_reprocess
SELECT r.answer, r.reason FROM should_reprocess(%(doc_id)s, %(deadline_seconds)s, %(max_retries)s) AS r;

-- name: archives_of_batch
SELECT a.entry_path, a.state, a.entry_count, a.unpacked_count, a.skipped_count, a.error_message
FROM batch_archives AS a
JOIN processing_jobs AS b ON b.batch_id = a.batch_id AND b.run_id = a.run_id
WHERE a.batch_id = %(batch_id)s
ORDER BY a.entry_path;
