-- What the pages of batches and documents and the search box of `docmill serve` ask.

-- name: page_batches
SELECT n.id, p.batch_id, p.user_id, p.source_path, p.status, p.files_expected, p.files_ended, p.files_failed, p.files_cancelled, p.percent, p.per_second, p.seconds_left, p.started_at, p.completed_at
FROM batch_progress AS p
JOIN (
    SELECT b.id, b.batch_id
    FROM processing_jobs AS b
    WHERE %(before)s::bigint IS NULL OR b.id < %(before)s::bigint
    ORDER BY b.id DESC
    LIMIT %(limit)s
) AS n ON n.batch_id = p.batch_id
ORDER BY n.id DESC;

-- name: page_batch
SELECT p.batch_id, p.user_id, p.source_path, p.status, p.files_expected, p.files_ended, p.files_succeeded, p.files_failed, p.files_cancelled,
    p.files_unfinished, p.duplicate, p.queued, p.working, p.retrying, p.archives, p.archives_open, p.archives_failed, p.archives_cancelled,
    p.percent, p.per_second, p.seconds_left, p.last_progress_at, p.started_at, p.sealed_at, p.completed_at, p.error_message, p.run_id, b.correlation_id, cost_of_batch(p.batch_id) AS cost
FROM batch_progress AS p
JOIN processing_jobs AS b ON b.batch_id = p.batch_id
WHERE p.batch_id = %(batch_id)s;

-- name: page_batch_documents
SELECT d.id, d.doc_id, d.file_name, d.source_path, d.file_type, d.state, due_stage(d.milestone) AS stage_due, d.page_count, d.chunk_count,
    d.error_type, d.error_message, d.processing_duration_ms, d.updated_at
FROM file_extractions AS d
JOIN processing_jobs AS b ON b.batch_id = d.batch_id AND b.run_id = d.run_id
WHERE d.batch_id = %(batch_id)s AND d.id > %(after)s AND (%(state)s::document_state IS NULL OR d.state = %(state)s::document_state)
ORDER BY d.id
LIMIT %(limit)s;

-- name: page_documents
SELECT d.id, d.doc_id, d.file_name, d.file_type, d.file_size, d.state, due_stage(d.milestone) AS stage_due, d.page_count, d.chunk_count,
    d.error_type, d.error_message, d.processing_duration_ms, d.updated_at, d.batch_id
FROM file_extractions AS d
WHERE %(before)s::bigint IS NULL OR d.id < %(before)s::bigint
ORDER BY d.id DESC
LIMIT %(limit)s;

-- name: page_documents_of_state
SELECT d.id, d.doc_id, d.file_name, d.file_type, d.file_size, d.state, due_stage(d.milestone) AS stage_due, d.page_count, d.chunk_count,
    d.error_type, d.error_message, d.processing_duration_ms, d.updated_at, d.batch_id
FROM file_extractions AS d
WHERE d.state = %(state)s::document_state AND (%(before)s::bigint IS NULL OR d.id < %(before)s::bigint)
ORDER BY d.id DESC
LIMIT %(limit)s;

-- name: page_document
SELECT s.doc_id, s.file_name, s.user_id, s.batch_id, s.status, s.state, s.milestone, s.stage_due, s.file_type, s.file_size, s.page_count,
    s.chunk_count, s.version, s.served_version, s.retry_count, s.crash_count, s.error_type, s.error_message, s.correlation_id, s.claimed_by,
    s.lease_until, s.created_at, s.processing_started_at, s.processing_completed_at, s.processing_duration_ms, s.duplicate_of, s.priority,
    d.source_path, d.mime_type, d.content_sha256, CASE WHEN d.metadata <> '{}' THEN jsonb_pretty(d.metadata) END AS metadata,
    jsonb_pretty(d.raw_extraction) AS raw_extraction, m.parser, length(m.markdown) AS characters
FROM document_status AS s
JOIN file_extractions AS d ON d.doc_id = s.doc_id
LEFT JOIN document_markdown AS m ON m.doc_id = s.doc_id AND m.version = coalesce(s.served_version, s.version)
WHERE s.doc_id = %(doc_id)s;

-- name: page_events
SELECT e.id, e.at, e.version, e.stage, e.event, event_in_words(e.event, e.stage, e.attempt, e.detail) AS what, e.attempt, e.duration_ms,
    e.cpu_ms, e.peak_memory_mb, e.worker, e.detail
FROM document_events AS e
WHERE e.doc_id = %(doc_id)s AND (%(before)s::bigint IS NULL OR e.id < %(before)s::bigint)
ORDER BY e.id DESC
LIMIT %(limit)s;

-- name: page_what_next
SELECT o.standing, o.next_at, o.next
FROM file_extractions AS d
CROSS JOIN LATERAL document_outlook(d) AS o
WHERE d.doc_id = %(doc_id)s;

-- name: page_letters_of_document
SELECT l.id, l.version, l.stage, l.error_type, l.error_message, l.created_at, l.resolved_at, l.resolution
FROM dead_letters AS l
WHERE l.doc_id = %(doc_id)s
ORDER BY l.id DESC
LIMIT 20;

-- name: page_cost_of_document
SELECT c.kind, c.calls, c.calls_ok, c.calls_unknown, c.tokens_in, c.tokens_out, c.pages, c.cost
FROM (
    SELECT u.kind, count(*) AS calls, count(*) FILTER (WHERE u.outcome = 'ok') AS calls_ok,
        count(*) FILTER (WHERE u.outcome = 'unknown' AND u.give_up_at < now()) AS calls_unknown,
        round(sum(u.tokens_in * s.share)) AS tokens_in, round(sum(u.tokens_out * s.share)) AS tokens_out, sum(u.pages * s.share) AS pages,
        sum(coalesce(u.cost, u.estimated_cost) * s.share::numeric) AS cost
    FROM provider_usage AS u, unnest(u.doc_ids, u.shares) AS s (doc_id, share)
    WHERE u.doc_ids @> ARRAY[%(doc_id)s::text] AND s.doc_id = %(doc_id)s AND u.outcome <> 'not_sent'
    GROUP BY u.kind
) AS c
ORDER BY c.kind;

-- name: page_passages
SELECT c.chunk_index, c.content, c.heading_path, c.page_start, c.page_end, c.language, c.embedding_model, c.version
FROM document_chunks AS c
JOIN file_extractions AS d ON d.doc_id = c.doc_id AND d.served_version = c.version
WHERE c.doc_id = %(doc_id)s AND c.chunk_index > %(after)s
ORDER BY c.chunk_index
LIMIT %(limit)s;

-- name: page_find_documents
-- A whole doc_id alone; else what was submitted last, among the newest of all documents: a name may stand anywhere in a file name.
WITH whole AS MATERIALIZED (
    SELECT d.doc_id, d.file_name, d.state, due_stage(d.milestone) AS stage_due, d.updated_at, d.batch_id
    FROM file_extractions AS d
    WHERE d.doc_id = %(words)s
)
SELECT w.doc_id, w.file_name, w.state, w.stage_due, w.updated_at, w.batch_id FROM whole AS w
UNION ALL
(
    SELECT d.doc_id, d.file_name, d.state, due_stage(d.milestone), d.updated_at, d.batch_id
    FROM file_extractions AS d
    WHERE NOT EXISTS (SELECT FROM whole) AND (d.file_name ILIKE %(pattern)s OR d.doc_id ILIKE %(pattern)s)
    ORDER BY d.id DESC
    LIMIT %(limit)s
);

-- name: page_find_batches
SELECT b.batch_id, b.source_path, b.status, b.created_at
FROM processing_jobs AS b
WHERE b.batch_id ILIKE %(pattern)s OR b.source_path ILIKE %(pattern)s OR b.correlation_id = %(words)s
ORDER BY b.id DESC
LIMIT %(limit)s;

-- name: page_find_passages
SELECT s.doc_id, s.file_name, s.chunk_index, s.content, s.page_start, s.heading_path
FROM search_by_text(query_text => %(words)s, limit_to => %(limit)s) AS s;
