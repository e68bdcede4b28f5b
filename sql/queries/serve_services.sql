-- What the pages of dead letters, workers and services of `docmill serve` ask.

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
SELECT (d.day AT TIME ZONE 'UTC')::date AS day, coalesce(sum(c.calls), 0)::bigint AS calls, coalesce(sum(c.cost), 0)::float8 AS cost
FROM generate_series(date_trunc('day', now(), 'UTC') - interval '13 days', now(), interval '1 day', 'UTC') AS d (day)
LEFT JOIN (
    SELECT date_trunc('day', u.started_at, 'UTC') AS day, count(*) AS calls, sum(coalesce(u.cost, u.estimated_cost)) AS cost
    FROM circuit_breakers AS s
    JOIN provider_usage AS u ON u.service = s.service AND u.started_at >= date_trunc('day', now(), 'UTC') - interval '13 days'
        AND u.outcome <> 'not_sent'
    GROUP BY 1
) AS c ON c.day = d.day
GROUP BY d.day
ORDER BY d.day;

-- name: page_dearest_documents
SELECT x.doc_id, f.file_name, count(*) AS calls, sum(coalesce(u.cost, u.estimated_cost) * x.share::numeric) AS cost
FROM circuit_breakers AS s
JOIN provider_usage AS u ON u.service = s.service AND u.started_at > now() - interval '1 day' AND u.outcome <> 'not_sent',
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
