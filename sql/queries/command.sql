-- What the command `docmill` asks. Nothing here writes.

-- name: look_at_progress
SELECT d.doc_id, d.state, due_stage(d.milestone) AS stage_due
FROM file_extractions AS d
WHERE d.doc_id = ANY(%(doc_ids)s);

-- name: documents_by_id
SELECT s.doc_id, s.file_name, s.file_type, s.page_count, s.chunk_count, s.status, s.state, s.stage_due, s.version, s.error_type,
    s.error_message, s.processing_duration_ms
FROM document_status AS s
WHERE s.doc_id = ANY(%(doc_ids)s);

-- name: live_workers
SELECT count(*) AS workers
FROM procrastinate_workers AS w
WHERE w.last_heartbeat > now() - interval '30 seconds';

-- name: count_documents_by_state
SELECT d.state, count(*) AS documents, min(d.updated_at) AS oldest
FROM file_extractions AS d
GROUP BY d.state
ORDER BY d.state;

-- name: count_unfinished_by_stage
SELECT due_stage(d.milestone) AS stage, stage_queue(due_stage(d.milestone)) AS queue,
    count(*) FILTER (WHERE d.state = 'queued') AS queued,
    count(*) FILTER (WHERE d.state = 'working') AS working,
    count(*) FILTER (WHERE d.state = 'retrying') AS retrying
FROM file_extractions AS d
WHERE d.state IN ('queued', 'working', 'retrying')
GROUP BY d.milestone
ORDER BY d.milestone;

-- name: count_live_jobs
SELECT j.queue_name AS queue,
    count(*) FILTER (WHERE j.status = 'todo' AND coalesce(j.scheduled_at, now()) <= now()) AS waiting,
    count(*) FILTER (WHERE j.status = 'todo' AND j.scheduled_at > now()) AS scheduled,
    count(*) FILTER (WHERE j.status = 'doing') AS running
FROM procrastinate_jobs AS j
WHERE j.status IN ('todo', 'doing')
GROUP BY j.queue_name
ORDER BY j.queue_name;

-- name: latest_batches
SELECT b.batch_id, b.source_path, b.status, b.total_files, b.pending, b.processing, b.completed, b.failed, b.created_at
FROM batch_status AS b
ORDER BY b.created_at DESC
LIMIT %(limit)s;

-- name: open_dead_letters
SELECT l.doc_id, d.file_name, l.stage, l.error_type, l.error_message, l.created_at, count(*) OVER () AS total
FROM dead_letters AS l
LEFT JOIN file_extractions AS d ON d.doc_id = l.doc_id
WHERE l.resolved_at IS NULL
ORDER BY l.id DESC
LIMIT %(limit)s;

-- name: find_documents
-- What a person may mean by a word: a whole doc_id, the name of files, or the beginning of doc_ids. The best kind of match alone counts.
WITH found AS (
    SELECT d.doc_id, d.file_name, d.state, d.created_at,
        CASE WHEN d.doc_id = %(word)s THEN 1 WHEN d.file_name = %(word)s THEN 2 ELSE 3 END AS kind
    FROM file_extractions AS d
    WHERE d.doc_id = %(word)s OR d.file_name = %(word)s OR starts_with(d.doc_id, %(word)s)
)
SELECT f.doc_id, f.file_name, f.state, f.created_at
FROM found AS f
WHERE f.kind = (SELECT min(g.kind) FROM found AS g)
ORDER BY f.created_at DESC, f.doc_id
LIMIT %(limit)s;

-- name: find_batches
WITH found AS (
    SELECT b.batch_id, b.source_path, b.status, b.created_at, CASE WHEN b.batch_id = %(word)s THEN 1 ELSE 2 END AS kind
    FROM processing_jobs AS b
    WHERE b.batch_id = %(word)s OR starts_with(b.batch_id, %(word)s)
)
SELECT f.batch_id, f.source_path, f.status, f.created_at
FROM found AS f
WHERE f.kind = (SELECT min(g.kind) FROM found AS g)
ORDER BY f.created_at DESC, f.batch_id
LIMIT %(limit)s;

-- name: show_document
SELECT s.doc_id, s.file_name, s.user_id, s.batch_id, s.status, s.state, s.milestone, s.stage_due, s.file_type, s.file_size, s.page_count,
    s.chunk_count, s.version, s.served_version, s.retry_count, s.crash_count, s.error_type, s.error_message, s.correlation_id,
    s.claimed_by, s.lease_until, s.created_at, s.processing_started_at, s.processing_completed_at, s.processing_duration_ms,
    d.source_path, d.mime_type, d.content_sha256, d.duplicate_of, d.metadata,
    (SELECT min(j.scheduled_at) FROM procrastinate_jobs AS j
        WHERE j.status = 'todo' AND j.queueing_lock = s.stage_due || ':' || s.doc_id) AS scheduled_at
FROM document_status AS s
JOIN file_extractions AS d ON d.doc_id = s.doc_id
WHERE s.doc_id = %(doc_id)s;

-- name: show_events
SELECT e.at, e.version, e.stage, e.event, e.attempt, e.duration_ms, e.cpu_ms, e.peak_memory_mb, e.worker, e.detail
FROM document_events AS e
WHERE e.doc_id = %(doc_id)s
ORDER BY e.id;

-- name: show_batch
SELECT b.batch_id, b.run_id, b.user_id, b.source_path, b.status, b.total_files, b.pending, b.processing, b.completed, b.failed,
    b.created_at, b.sealed_at, b.completed_at, b.last_progress_at, b.archives, b.archives_open, b.archives_failed, b.archive_files,
    b.unpacked_files, j.error_message, j.correlation_id
FROM batch_status AS b
JOIN processing_jobs AS j ON j.batch_id = b.batch_id
WHERE b.batch_id = %(batch_id)s;

-- name: documents_of_batch
SELECT s.doc_id, s.file_name, d.source_path, s.file_type, s.page_count, s.chunk_count, s.status, s.state, s.stage_due, s.version,
    s.error_type, s.error_message, s.processing_duration_ms
FROM document_status AS s
JOIN file_extractions AS d ON d.doc_id = s.doc_id
JOIN processing_jobs AS b ON b.batch_id = s.batch_id AND b.run_id = s.run_id
WHERE s.batch_id = %(batch_id)s
ORDER BY d.source_path, s.doc_id;

-- name: search_passages_by_vector
SELECT f.chunk_id, f.doc_id, f.file_name, f.version, f.chunk_index, f.content, f.heading_path, f.page_start, f.page_end, f.score,
    f.vector_rank, f.text_rank
FROM search_by_vector(
    query_vector => %(vector)s, embedding_model => %(embedding_model)s, limit_to => %(limit)s, user_id => %(user_id)s,
    batch_id => %(batch_id)s, file_type => %(file_type)s, metadata => %(metadata)s
) AS f;

-- name: search_passages_by_text
SELECT f.chunk_id, f.doc_id, f.file_name, f.version, f.chunk_index, f.content, f.heading_path, f.page_start, f.page_end, f.score,
    f.vector_rank, f.text_rank
FROM search_by_text(
    query_text => %(text)s, limit_to => %(limit)s, user_id => %(user_id)s, batch_id => %(batch_id)s, file_type => %(file_type)s,
    metadata => %(metadata)s
) AS f;

-- name: search_passages_hybrid
SELECT f.chunk_id, f.doc_id, f.file_name, f.version, f.chunk_index, f.content, f.heading_path, f.page_start, f.page_end, f.score,
    f.vector_rank, f.text_rank
FROM search_hybrid(
    query_text => %(text)s, query_vector => %(vector)s, embedding_model => %(embedding_model)s, limit_to => %(limit)s,
    user_id => %(user_id)s, batch_id => %(batch_id)s, file_type => %(file_type)s, metadata => %(metadata)s
) AS f;
