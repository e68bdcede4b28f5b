-- What `docmill serve` asks, each question within SERVE_QUERY_SECONDS and in a read-only transaction.

-- name: limit_look
SELECT set_config('transaction_read_only', 'on', TRUE), set_config('statement_timeout', %(statement_ms)s, TRUE),
    set_config('idle_in_transaction_session_timeout', '30000', TRUE);

-- name: limit_action
SELECT set_config('statement_timeout', %(statement_ms)s, TRUE), set_config('lock_timeout', '3000', TRUE),
    set_config('idle_in_transaction_session_timeout', '30000', TRUE);

-- name: tally_horizon
-- The highest event that is visible, and between which transactions what is not visible yet may still be written.
SELECT coalesce(max(e.id), 0) AS last_id, pg_snapshot_xmin(pg_current_snapshot())::text::bigint AS oldest_transaction,
    pg_snapshot_xmax(pg_current_snapshot())::text::bigint AS next_transaction
FROM document_events AS e;

-- name: tally_start
-- Everything visible lies before the beginning; what was written in the last minutes and is not committed yet does not. That may have lower
-- ids than anything visible of those minutes.
WITH recent AS (
    SELECT event_id_since(now() - interval '5 minutes') - 1000 AS low
)
SELECT r.low, coalesce((SELECT range_agg(int8range(e.id, e.id, '[]')) FROM document_events AS e WHERE e.id > r.low), '{}')::text AS counted
FROM recent AS r;

-- name: tally_events
-- A bucket takes what is up to its bound, inclusively, as Prometheus has it.
WITH fresh AS (
    SELECT e.event, coalesce(e.stage, '') AS stage, e.duration_ms / 1000 AS seconds, coalesce(e.cpu_ms, 0) / 1000 AS cpu_seconds,
        d.processing_duration_ms / 1000.0::float8 AS document_seconds
    FROM document_events AS e
    LEFT JOIN file_extractions AS d ON e.event = 'completed' AND d.doc_id = e.doc_id AND d.version = e.version
    WHERE e.id > %(low)s AND NOT e.id <@ %(counted)s::int8multirange
), sorted AS (
    SELECT f.event, f.stage, f.seconds, f.cpu_seconds, f.document_seconds,
        (SELECT count(*) FROM unnest(%(stage_bounds)s::float8[]) AS b WHERE f.seconds > b) AS stage_bucket,
        (SELECT count(*) FROM unnest(%(document_bounds)s::float8[]) AS b WHERE f.document_seconds > b) AS document_bucket
    FROM fresh AS f
)
SELECT s.event, s.stage, CASE WHEN s.seconds IS NOT NULL THEN s.stage_bucket END AS stage_bucket,
    CASE WHEN s.document_seconds IS NOT NULL THEN s.document_bucket END AS document_bucket, count(*) AS times,
    coalesce(sum(s.seconds), 0)::float8 AS seconds, sum(s.cpu_seconds)::float8 AS cpu_seconds,
    coalesce(sum(s.document_seconds), 0)::float8 AS document_seconds
FROM sorted AS s
GROUP BY 1, 2, 3, 4;

-- name: tally_counted
SELECT (
    (%(counted)s::int8multirange + coalesce(
        (SELECT range_agg(int8range(e.id, e.id, '[]')) FROM document_events AS e WHERE e.id > %(low)s AND NOT e.id <@ %(counted)s::int8multirange), '{}'
    )) * int8multirange(int8range(%(new_low)s, NULL, '()'))
)::text AS counted;

-- name: metric_documents
SELECT d.state, count(*) AS documents FROM file_extractions AS d GROUP BY d.state;

-- name: metric_unfinished
SELECT due_stage(d.milestone) AS stage, d.state, count(*) AS documents
FROM file_extractions AS d
WHERE d.state IN ('queued', 'working', 'retrying')
GROUP BY d.milestone, d.state;

-- name: metric_stuck
SELECT s.cause, count(*) AS documents FROM stuck_documents AS s GROUP BY s.cause;

-- name: metric_rate
SELECT sum(t.complete + t.duplicate + t.failed + t.cancelled) / 5.0::float8 AS per_minute
FROM throughput_over('5 minutes', '5 minutes') AS t;

-- name: metric_queues
SELECT q.queue, sum(q.waiting)::bigint AS waiting, sum(q.scheduled)::bigint AS scheduled, sum(q.running)::bigint AS running,
    coalesce(max(extract(epoch FROM q.oldest_age)), 0)::float8 AS oldest_seconds, max(q.listeners) AS listeners
FROM queue_depth AS q
GROUP BY q.queue;

-- name: metric_batches
SELECT b.status, count(*) AS batches FROM processing_jobs AS b GROUP BY b.status;

-- name: metric_dead_letters
SELECT l.stage, l.error_type, count(*) AS letters, extract(epoch FROM now() - min(l.created_at))::float8 AS oldest_seconds
FROM dead_letters AS l
WHERE l.resolved_at IS NULL
GROUP BY l.stage, l.error_type;

-- name: metric_workers
SELECT w.worker, w.health, w.concurrency, w.jobs, w.memory_mb, w.cpu_seconds, w.connections, w.version,
    extract(epoch FROM w.started_at)::float8 AS started, greatest(0, extract(epoch FROM now() - w.heartbeat_at))::float8 AS silent_seconds
FROM worker_health AS w;

-- name: metric_providers
SELECT c.service, c.state, c.waiting, b.share, b.requests_per_minute, b.requests_last_minute
FROM circuit_breakers AS c
LEFT JOIN provider_budget_use AS b ON b.service = c.service;

-- name: metric_provider_calls
SELECT u.service, u.kind, u.outcome, count(*) AS calls
FROM circuit_breakers AS c
JOIN provider_usage AS u ON u.service = c.service AND u.started_at > now() - interval '5 minutes'
GROUP BY u.service, u.kind, u.outcome;

-- name: metric_provider_cost
SELECT u.service, u.kind, sum(coalesce(u.cost, u.estimated_cost))::float8 AS cost
FROM circuit_breakers AS c
JOIN provider_usage AS u ON u.service = c.service AND u.started_at > now() - interval '1 day'
GROUP BY u.service, u.kind;

-- name: metric_database
SELECT current_setting('max_connections')::integer AS max_connections, pg_database_size(current_database()) AS size_bytes,
    rows_about('document_chunks') AS chunks;

-- name: metric_connections
SELECT CASE WHEN a.state IN ('active', 'idle', 'idle in transaction') THEN a.state ELSE 'other' END AS state, count(*) AS connections
FROM pg_stat_activity AS a
WHERE a.datname = current_database()
GROUP BY 1;

-- name: metric_indexes
SELECT count(*) AS invalid FROM index_health AS i WHERE i.health = 'invalid';

-- name: metric_open_alerts
SELECT a.rule, a.severity, count(*) AS alerts FROM open_alerts AS a GROUP BY a.rule, a.severity;

-- name: metric_alerts
SELECT count(*) AS unforwarded FROM alerts AS a WHERE a.forwarded_at IS NULL;

-- name: page_throughput
SELECT t.bucket_at, t.submitted, t.complete, t.duplicate, t.failed, t.cancelled, t.retries, t.rescues
FROM throughput_over(%(span)s::interval, %(bucket)s::interval) AS t
ORDER BY t.bucket_at;

-- name: page_latency
SELECT l.bucket_at, l.stage, l.runs, l.failures, l.p50_ms, l.p95_ms, l.max_ms, l.mean_cpu_ms, l.max_memory_mb
FROM stage_latency_over(%(span)s::interval, %(bucket)s::interval) AS l
ORDER BY l.bucket_at;

-- name: page_stages
SELECT due_stage(d.milestone) AS stage, count(*) FILTER (WHERE d.state = 'queued') AS queued,
    count(*) FILTER (WHERE d.state = 'working') AS working, count(*) FILTER (WHERE d.state = 'retrying') AS retrying
FROM file_extractions AS d
WHERE d.state IN ('queued', 'working', 'retrying')
GROUP BY d.milestone
ORDER BY d.milestone;

-- name: page_queues
SELECT q.queue, q.stage, q.waiting, q.scheduled, q.running, q.oldest_since, q.next_scheduled_at, q.listeners
FROM queue_depth AS q;

-- name: page_stuck
SELECT s.doc_id, s.file_name, s.stage, s.state, s.cause, s.reason, s.since, s.what_to_do, count(*) OVER () AS total
FROM stuck_documents AS s
ORDER BY s.since
LIMIT %(limit)s;

-- name: page_letter_count
SELECT count(*) AS letters FROM dead_letters AS l WHERE l.resolved_at IS NULL;

-- name: page_newest_letters
SELECT q.id, q.doc_id, q.file_name, q.stage, q.error_type, q.error_message, q.created_at
FROM dead_letter_queue AS q
ORDER BY q.id DESC
LIMIT %(limit)s;

-- name: page_newest_batches
SELECT p.batch_id, p.source_path, p.status, p.total_files, p.ended, p.failed, p.percent, p.per_second, p.seconds_left, p.started_at
FROM batch_progress AS p
JOIN (SELECT b.id, b.batch_id FROM processing_jobs AS b ORDER BY b.id DESC LIMIT %(limit)s) AS n ON n.batch_id = p.batch_id
ORDER BY n.id DESC;

-- name: page_worker_healths
SELECT w.health, count(*) AS workers, sum(w.jobs) AS jobs, sum(w.concurrency) AS slots
FROM worker_health AS w
WHERE w.heartbeat_at > now() - interval '1 hour'
GROUP BY w.health;

-- name: page_knows_alerts
SELECT coalesce(has_table_privilege(to_regclass('open_alerts'), 'SELECT'), FALSE) AS known;

-- name: page_alerts
SELECT a.rule, a.severity, a.subject, a.message, a.opened_at, a.what_to_do
FROM open_alerts AS a
ORDER BY a.severity, a.opened_at
LIMIT %(limit)s;

-- name: page_batches
SELECT n.id, p.batch_id, p.user_id, p.source_path, p.status, p.total_files, p.ended, p.complete, p.duplicate, p.failed, p.cancelled,
    p.unfinished, p.percent, p.per_second, p.seconds_left, p.started_at, p.completed_at
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
SELECT p.batch_id, p.user_id, p.source_path, p.status, p.total_files, p.queued, p.working, p.retrying, p.complete, p.duplicate, p.failed,
    p.cancelled, p.archives_open, p.ended, p.unfinished, p.percent, p.per_second, p.seconds_left, p.last_progress_at, p.started_at,
    p.sealed_at, p.completed_at, p.error_message, p.run_id, b.correlation_id, b.metadata, cost_of_batch(p.batch_id) AS cost
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
    d.source_path, d.mime_type, d.content_sha256, d.metadata, d.raw_extraction, m.parser, length(m.markdown) AS characters
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
    WHERE u.doc_ids @> ARRAY[%(doc_id)s::text] AND s.doc_id = %(doc_id)s
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

-- name: page_letters
SELECT q.id, q.doc_id, q.file_name, q.batch_id, q.stage, q.error_type, q.error_message, q.created_at, q.may_pass, q.what_to_do,
    q.how_to_requeue IS NOT NULL AS can_be_requeued
FROM dead_letter_queue AS q
WHERE (%(error_type)s::document_error_type IS NULL OR q.error_type = %(error_type)s::document_error_type)
    AND (%(stage)s::text IS NULL OR q.stage = %(stage)s) AND (%(before)s::bigint IS NULL OR q.id < %(before)s::bigint)
ORDER BY q.id DESC
LIMIT %(limit)s;

-- name: page_letter_advice
SELECT q.may_pass, q.what_to_do, q.how_to_requeue IS NOT NULL AS can_be_requeued FROM dead_letter_queue AS q WHERE q.id = %(id)s;

-- name: page_workers
SELECT w.worker, w.health, w.queues, w.concurrency, w.jobs, w.documents, w.memory_mb, w.cpu_share, w.cpu_seconds, w.connections,
    w.started_at, w.heartbeat_at, w.version
FROM worker_health AS w
ORDER BY w.health = 'dead', w.started_at DESC
LIMIT 500;

-- name: page_providers
SELECT p.service, p.health, p.breaker, p.reason, p.since, p.next_try_at, p.waiting, p.opened_count, p.calls_last_hour, p.ok_last_hour,
    p.failed_last_hour, p.limited_last_hour, p.p50_ms, p.p95_ms, p.cost_last_hour, p.last_ok_at, p.last_failure_at, p.last_error,
    p.requests_per_minute, p.requests_last_minute, p.tokens_per_minute, p.tokens_last_minute, p.share, p.paused_until, p.what_to_do
FROM provider_health AS p;

-- name: page_cost_by_day
SELECT d.day::date AS day, coalesce(sum(c.calls), 0)::bigint AS calls, coalesce(sum(c.cost), 0)::float8 AS cost
FROM generate_series(date_trunc('day', now()) - interval '13 days', now(), interval '1 day') AS d (day)
LEFT JOIN (
    SELECT date_trunc('day', u.started_at) AS day, count(*) AS calls, sum(coalesce(u.cost, u.estimated_cost)) AS cost
    FROM circuit_breakers AS s
    JOIN provider_usage AS u ON u.service = s.service AND u.started_at >= date_trunc('day', now()) - interval '13 days'
    GROUP BY 1
) AS c ON c.day = d.day
GROUP BY d.day
ORDER BY d.day;

-- name: page_dearest_documents
SELECT x.doc_id, f.file_name, count(*) AS calls, sum(coalesce(u.cost, u.estimated_cost) * x.share::numeric) AS cost
FROM circuit_breakers AS s
JOIN provider_usage AS u ON u.service = s.service AND u.started_at > now() - interval '1 day',
    unnest(u.doc_ids, u.shares) AS x (doc_id, share)
LEFT JOIN file_extractions AS f ON f.doc_id = x.doc_id
GROUP BY x.doc_id, f.file_name
ORDER BY cost DESC, x.doc_id
LIMIT %(limit)s;

-- name: page_failed_calls
SELECT l.service, l.stage, l.doc_id, l.outcome, l.http_status, l.request_id, l.error_message, l.started_at, l.latency_ms
FROM circuit_breakers AS s
CROSS JOIN LATERAL (
    SELECT u.service, u.stage, u.doc_id, u.outcome, u.http_status, u.request_id, u.error_message, u.started_at, u.latency_ms
    FROM provider_usage AS u
    WHERE u.service = s.service AND u.started_at > now() - interval '1 day'
        AND u.outcome IN ('failed', 'timeout', 'bad_answer', 'rate_limited', 'refused')
    ORDER BY u.started_at DESC
    LIMIT %(limit)s
) AS l
ORDER BY l.started_at DESC
LIMIT %(limit)s;

-- name: page_find_documents
-- A whole doc_id first; then what was submitted last, among the newest of all documents: a name may stand anywhere in a file name.
SELECT f.doc_id, f.file_name, f.state, f.stage_due, f.updated_at, f.batch_id
FROM (
    SELECT d.id, d.doc_id, d.file_name, d.state, due_stage(d.milestone) AS stage_due, d.updated_at, d.batch_id, 1 AS kind
    FROM file_extractions AS d
    WHERE d.doc_id = %(words)s
    UNION ALL
    (
        SELECT d.id, d.doc_id, d.file_name, d.state, due_stage(d.milestone), d.updated_at, d.batch_id, 2
        FROM file_extractions AS d
        WHERE (d.file_name ILIKE %(pattern)s OR d.doc_id ILIKE %(pattern)s) AND d.doc_id <> %(words)s
        ORDER BY d.id DESC
        LIMIT %(limit)s
    )
) AS f
ORDER BY f.kind, f.id DESC
LIMIT %(limit)s;

-- name: page_find_batches
SELECT b.batch_id, b.source_path, b.status, b.created_at
FROM processing_jobs AS b
WHERE b.batch_id ILIKE %(pattern)s OR b.source_path ILIKE %(pattern)s OR b.correlation_id = %(words)s
ORDER BY b.id DESC
LIMIT %(limit)s;

-- name: page_find_passages
SELECT s.doc_id, s.file_name, s.chunk_index, s.content, s.page_start, s.heading_path
FROM search_by_text(query_text => %(words)s, limit_to => %(limit)s) AS s;
