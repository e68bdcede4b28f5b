-- What the overview and the page of queues of `docmill serve` ask. See jobs/serve/overview.py.

-- name: page_throughput
-- As throughput_over, and what else became unfinished or ceased to be, without an end of its own.
WITH since AS (
    SELECT date_bin(%(bucket)s::interval, now() - %(span)s::interval, 'epoch') AS at
), told AS (
    SELECT date_bin(%(bucket)s::interval, e.at, 'epoch') AS bucket_at, count(*) FILTER (WHERE e.event <> 'deleted') AS requeued,
        count(*) FILTER (WHERE e.event = 'deleted') AS dropped
    FROM document_events AS e
    WHERE e.id >= event_id_since((SELECT at FROM since) - interval '1 minute') AND e.at >= (SELECT at FROM since)
        AND (
            e.event = 'requeued_by_operator' OR e.event = 'deleted' AND e.detail ->> 'was' IN ('queued', 'working', 'retrying')
            -- A duplicate whose original is gone.
            OR e.event = 'requeued' AND e.detail ? 'duplicate_of'
        )
    GROUP BY 1
)
SELECT t.bucket_at, t.submitted, t.complete, t.duplicate, t.failed, t.cancelled, t.retries, t.rescues, coalesce(o.requeued, 0) AS requeued,
    coalesce(o.dropped, 0) AS dropped
FROM throughput_over(%(span)s::interval, %(bucket)s::interval) AS t
LEFT JOIN told AS o ON o.bucket_at = t.bucket_at
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
SELECT p.batch_id, p.source_path, p.status, p.files_expected, p.files_ended, p.files_failed, p.files_cancelled, p.percent, p.per_second,
    p.seconds_left, p.started_at
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
SELECT a.rule, a.severity, a.subject, a.message, a.opened_at, a.what_to_do, count(*) OVER () AS open
FROM open_alerts AS a
ORDER BY a.severity, a.opened_at
LIMIT %(limit)s;
