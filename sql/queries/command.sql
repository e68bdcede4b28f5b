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

-- name: count_incomplete_documents
-- Two versions of one may be incomplete. Of a cancelled one, what searches see counts.
SELECT count(DISTINCT i.doc_id) AS documents FROM incomplete_documents AS i WHERE i.state <> 'cancelled' OR i.is_served;

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
-- By id, so that only the documents of these are counted.
SELECT b.batch_id, b.source_path, b.status, b.files_expected AS total_files, b.files_succeeded AS completed, b.files_failed AS failed,
    b.files_cancelled AS cancelled, b.files_unfinished AS unfinished, b.archives_open, b.queued, b.working, b.retrying,
    b.percent::float8 AS percent, b.per_second, b.seconds_left, b.started_at AS created_at
FROM batch_progress AS b
WHERE b.batch_id IN (SELECT j.batch_id FROM processing_jobs AS j ORDER BY j.id DESC LIMIT %(limit)s)
ORDER BY b.started_at DESC;

-- name: stuck_causes
SELECT s.cause, min(s.reason) AS reason, count(*) AS documents, min(s.since) AS since, min(s.doc_id) AS for_example,
    min(s.what_to_do) AS what_to_do
FROM stuck_documents AS s
GROUP BY s.cause, s.queue
ORDER BY count(*) DESC, s.cause;

-- name: was_document
SELECT EXISTS (SELECT FROM document_events AS e WHERE e.doc_id = %(doc_id)s) AS was;

-- name: explain_document
SELECT e.tense, e.at, e.stage, e.what, e.took_ms, e.worker, e.detail FROM explain_document(%(doc_id)s) AS e;

-- name: events_since
-- A document's events behind one, for people who follow it; a few at a time.
SELECT e.id, e.at, e.stage, e.event, e.attempt, e.duration_ms, e.worker, e.correlation_id, e.detail,
    event_in_words(e.event, e.stage, e.attempt, e.detail) AS what
FROM document_events AS e
WHERE e.doc_id = %(doc_id)s AND e.id > %(after)s
ORDER BY e.id
LIMIT %(limit)s;

-- name: watch_queues
SELECT q.queue, q.stage, q.waiting, q.scheduled, q.running, extract(epoch FROM q.oldest_age)::float8 AS oldest_seconds, q.listeners
FROM queue_depth AS q
WHERE q.waiting + q.scheduled + q.running > 0 OR q.queue IN ('cpu', 'embed', 'extract');

-- name: watch_stages
SELECT l.stage, l.runs, l.failures, l.p50_ms, l.p95_ms, l.max_ms
FROM stage_latency_over('10 minutes', '10 minutes') AS l;

-- name: watch_rates
SELECT t.bucket_at, t.submitted, t.complete + t.duplicate AS complete, t.failed, t.retries, t.rescues, t.per_second
FROM throughput_over('15 minutes', '1 minute') AS t
ORDER BY t.bucket_at;

-- name: watch_workers
SELECT w.worker, w.health, w.jobs, w.concurrency, w.memory_mb, w.cpu_share, w.connections, extract(epoch FROM w.silent_for)::float8 AS silent_seconds
FROM worker_health AS w
ORDER BY w.health = 'dead', w.worker;

-- name: watch_services
SELECT p.service, p.health, coalesce(p.reason, p.last_error) AS trouble, p.next_try_at, p.calls_last_hour, p.failed_last_hour
FROM provider_health AS p;

-- name: open_dead_letters
SELECT l.doc_id, d.file_name, l.stage, l.error_type, l.error_message, l.created_at, count(*) OVER () AS total
FROM dead_letters AS l
LEFT JOIN file_extractions AS d ON d.doc_id = l.doc_id
WHERE l.resolved_at IS NULL
ORDER BY l.id DESC
LIMIT %(limit)s;

-- name: find_documents
-- What a person may mean by a word: a whole doc_id, the name of files, or the beginning of doc_ids. The best kind of match alone counts;
-- a whole doc_id is found by its index, and all documents are read only where there is none.
WITH whole AS MATERIALIZED (
    SELECT d.doc_id, d.file_name, d.state, d.created_at, 1 AS kind FROM file_extractions AS d WHERE d.doc_id = %(word)s
), found AS (
    SELECT w.doc_id, w.file_name, w.state, w.created_at, w.kind FROM whole AS w
    UNION ALL
    SELECT d.doc_id, d.file_name, d.state, d.created_at, CASE WHEN d.file_name = %(file_name)s THEN 2 ELSE 3 END
    FROM file_extractions AS d
    WHERE NOT EXISTS (SELECT FROM whole) AND (d.file_name = %(file_name)s OR starts_with(d.doc_id, %(word)s))
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
    d.source_path, d.mime_type, d.content_sha256, s.duplicate_of, d.metadata,
    (SELECT m.markdown_sha256 FROM document_markdown AS m WHERE m.doc_id = d.doc_id AND m.version = d.served_version) AS served_text_sha256,
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
SELECT b.batch_id, b.run_id, b.user_id, b.source_path, b.status, b.files_expected AS total_files, b.files, b.files_succeeded AS completed,
    b.files_failed AS failed, b.files_cancelled AS cancelled, b.files_unfinished AS unfinished, b.documents, b.queued, b.working, b.retrying,
    b.archives, b.archives_open, b.archives_failed, b.archives_cancelled, b.archive_files, b.unpacked_files, b.percent::float8 AS percent,
    b.per_second, b.seconds_left, b.last_progress_at, j.created_at, b.sealed_at, b.completed_at, b.error_message, j.correlation_id
FROM batch_progress AS b
JOIN processing_jobs AS j ON j.batch_id = b.batch_id
WHERE b.batch_id = %(batch_id)s;

-- name: documents_of_batch
-- All of a run's, or those that were not completed, the first so many.
SELECT s.doc_id, s.file_name, d.source_path, s.file_type, s.page_count, s.chunk_count, s.status, s.state, s.stage_due, s.version,
    s.error_type, s.error_message, s.processing_duration_ms
FROM document_status AS s
JOIN file_extractions AS d ON d.doc_id = s.doc_id
JOIN processing_jobs AS b ON b.batch_id = s.batch_id AND b.run_id = s.run_id
WHERE s.batch_id = %(batch_id)s AND (NOT %(only_failed)s OR s.state IN ('failed', 'cancelled'))
ORDER BY d.source_path, s.doc_id
LIMIT %(limit)s;

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
