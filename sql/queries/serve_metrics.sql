-- What `docmill serve` asks for /metrics and its charts: events as they come, and gauges. See jobs/serve/tally.py and metrics.py.

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

-- name: metric_archives
-- Of the batches' current runs. Those that are unpacked are their entries' documents.
SELECT a.state, count(*) AS archives
FROM batch_archives AS a
JOIN processing_jobs AS b ON b.batch_id = a.batch_id AND b.run_id = a.run_id
WHERE a.state <> 'unpacked'
GROUP BY a.state;

-- name: metric_unfinished
SELECT due_stage(d.milestone) AS stage, d.state, count(*) AS documents
FROM file_extractions AS d
WHERE d.state IN ('queued', 'working', 'retrying')
GROUP BY d.milestone, d.state;

-- name: metric_stuck
SELECT s.cause, count(*) AS documents FROM stuck_documents AS s GROUP BY s.cause;

-- name: metric_rate
-- The first slice is whole, so that they cover up to a minute more than five.
SELECT sum(t.complete + t.duplicate + t.failed + t.cancelled) / (extract(epoch FROM now() - min(t.bucket_at)) / 60)::float8 AS per_minute
FROM throughput_over('5 minutes', '1 minute') AS t;

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
SELECT c.service, CASE WHEN is_called_no_more(c) THEN 'idle' ELSE c.state END AS state, c.waiting, b.share, b.requests_per_minute, b.requests_last_minute
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
