-- What the reconciler looks for. Finding is a plain read that may be out of date; the repair functions look again under a lock.

-- name: find_expired_leases
-- Not before one lease length after Postgres came back: until then workers that live have had no chance to renew. What a transaction holds
-- could be neither renewed nor rescued: whole batches may be, and would hide all others.
SELECT d.doc_id
FROM file_extractions AS d
WHERE d.state = 'working' AND d.lease_until < now()
    AND pg_postmaster_start_time() < now() - make_interval(secs => %(lease_seconds)s)
    AND NOT is_held_alive(d.doc_id, d.claimed_by, %(alive_seconds)s)
ORDER BY d.lease_until
LIMIT %(most)s
FOR NO KEY UPDATE OF d SKIP LOCKED;

-- name: rescue_document
SELECT rescue_document(%(doc_id)s, %(max_crashes)s, %(alive_seconds)s) AS outcome;

-- name: find_abandoned_jobs
-- Fetched stage jobs that hold no claim and that no live worker has in hand.
SELECT j.id
FROM procrastinate_jobs AS j
WHERE j.status = 'doing' AND stage_queue(j.task_name) IS NOT NULL
    AND NOT EXISTS (
        SELECT FROM file_extractions AS d
        WHERE d.doc_id = j.args ->> 'doc_id' AND d.claim_job_id = j.id AND d.state = 'working'
    )
    AND NOT is_in_hand(j.id, %(grace_seconds)s)
LIMIT %(most)s;

-- name: end_abandoned_job
SELECT end_abandoned_job(%(job_id)s, %(grace_seconds)s) AS outcome;

-- name: find_lost_documents
-- A window of waiting documents by id, so that a pass costs the same whatever the backlog; the next pass goes on behind it. `lost`: it has no
-- job. `forgotten`: it is put off for an equal document that has ended without waking it: its job was held or not written yet at that
-- moment, or the one that was woken instead has gone too. Where there is nothing to copy only the next one is, as in `wake_equals`.
WITH looked AS MATERIALIZED (
    SELECT d.id, d.doc_id, d.milestone, d.user_id, d.content_sha256,
        d.state = 'queued' AND d.requeue_count = 0 AND d.crash_count = 0 AS puts_itself_off
    FROM file_extractions AS d
    WHERE d.state IN ('queued', 'retrying') AND d.id > %(after)s
    ORDER BY d.id
    LIMIT %(window)s
), fetched AS MATERIALIZED (
    SELECT j.args ->> 'doc_id' AS doc_id FROM procrastinate_jobs AS j WHERE j.status = 'doing' AND stage_queue(j.task_name) IS NOT NULL
)
SELECT l.id, l.doc_id, w.id IS NULL AND NOT EXISTS (SELECT FROM fetched AS f WHERE f.doc_id = l.doc_id) AS lost,
    CASE WHEN w.scheduled_at > now() AND l.milestone = 'upload_validated' AND l.puts_itself_off THEN
        NOT EXISTS (
            SELECT FROM file_extractions AS o
            WHERE o.user_id = l.user_id AND o.content_sha256 = l.content_sha256 AND o.owns_content
        ) AND (EXISTS (
            SELECT FROM file_extractions AS o
            WHERE o.user_id = l.user_id AND o.content_sha256 = l.content_sha256 AND o.state = 'complete'
        ) OR NOT EXISTS (
            SELECT FROM file_extractions AS o
            WHERE o.user_id = l.user_id AND o.content_sha256 = l.content_sha256 AND o.id < l.id
                AND o.state = 'queued' AND o.milestone = 'upload_validated' AND o.requeue_count = 0 AND o.crash_count = 0
        ))
    ELSE FALSE END AS forgotten
FROM looked AS l
-- With a limit, so that each is looked for by the index: all waiting jobs are never read.
LEFT JOIN LATERAL (
    SELECT j.id, j.scheduled_at FROM procrastinate_jobs AS j
    WHERE j.status = 'todo' AND j.queueing_lock = due_stage(l.milestone) || ':' || l.doc_id
    LIMIT 1
) AS w ON TRUE
ORDER BY l.id;

-- name: wake_forgotten_equal
-- Whether somebody owns the content meanwhile the claim asks anyway.
UPDATE procrastinate_jobs AS j SET scheduled_at = NULL
FROM (
    SELECT w.id FROM procrastinate_jobs AS w
    WHERE w.status = 'todo' AND w.queueing_lock = 'parse:' || %(doc_id)s AND w.scheduled_at > now()
    FOR UPDATE SKIP LOCKED
) AS waiting
WHERE j.id = waiting.id
RETURNING 'woken' AS outcome;

-- name: requeue_lost_document
SELECT requeue_lost_document(%(doc_id)s, %(max_requeues)s) AS outcome;

-- name: find_orphaned_duplicates
-- A window of duplicates by id, as above.
SELECT d.id, d.doc_id, NOT has_original(d) AS orphaned
FROM file_extractions AS d
WHERE d.state = 'duplicate' AND d.id > %(after)s
ORDER BY d.id
LIMIT %(window)s;

-- name: requeue_duplicate
SELECT requeue_duplicate(%(doc_id)s) AS outcome;

-- name: find_stragglers
-- Unfinished documents of cancelled runs: they were being written, or submitted, while the batch was cancelled.
SELECT d.doc_id
FROM processing_jobs AS b
CROSS JOIN LATERAL (
    SELECT f.doc_id FROM file_extractions AS f
    WHERE f.batch_id = b.batch_id AND f.run_id IS NOT NULL AND f.state IN ('queued', 'working', 'retrying')
    LIMIT %(most)s
) AS d
WHERE b.status = 'cancelled'
LIMIT %(most)s;

-- name: cancel_straggler
SELECT cancel_straggler(%(doc_id)s) AS outcome;

-- name: find_recovered_services
-- Services that are called again without asking, while documents wait for them for longer than until the next pass.
SELECT c.service
FROM circuit_breakers AS c
WHERE c.state = 'closed' AND coalesce(c.passes_from, '-infinity') <= now()
    AND NOT EXISTS (SELECT FROM provider_budgets AS p WHERE p.service = c.service AND p.paused_until > now())
    AND EXISTS (
        SELECT FROM file_extractions AS d
        WHERE d.waiting_for = c.service AND d.waiting_place IS NOT NULL AND d.state = 'retrying'
            AND d.not_before > now() + make_interval(secs => %(seconds)s)
    );

-- name: bring_forward
SELECT nullif(bring_forward(%(service)s, %(most)s, %(seconds)s), 0) AS brought;

-- name: find_idle_budgets
-- Those that could give out more now, although somebody was sent back until later than the next pass.
SELECT p.service
FROM provider_budgets AS p
WHERE p.overflow_at > now() + make_interval(secs => %(seconds)s) AND is_idle(p)
    AND EXISTS (
        SELECT FROM circuit_breakers AS c
        WHERE c.service = p.service AND c.state = 'closed' AND coalesce(c.passes_from, '-infinity') <= now()
    );

-- name: use_idle_budget
SELECT nullif(use_idle_budget(%(service)s, %(most)s, %(seconds)s), 0) AS brought;

-- name: find_dead_side_jobs
-- Docmill's jobs that are no stages are judged by the registry: no live worker says that it runs them.
SELECT j.id
FROM procrastinate_jobs AS j
WHERE j.status = 'doing' AND j.task_name = ANY(%(tasks)s)
    AND NOT is_in_hand(j.id, %(grace_seconds)s)
LIMIT %(most)s;

-- name: requeue_side_job
-- Never the same row: the old one is ended and a new one deferred, unless an equal one waits already.
WITH ended AS (
    UPDATE procrastinate_jobs AS j
    SET status = 'aborted', attempts = j.attempts + 1, abort_requested = FALSE, worker_id = NULL
    WHERE j.id = %(job_id)s AND j.status = 'doing'
    RETURNING j.queue_name, j.task_name, j.priority, j.lock, j.queueing_lock, j.args
)
SELECT procrastinate_defer_jobs_v1(ARRAY[ROW(
    e.queue_name, e.task_name, e.priority, e.lock, e.queueing_lock, e.args, NULL
)::procrastinate_job_to_defer_v1]) AS job_ids
FROM ended AS e
WHERE NOT EXISTS (
    SELECT FROM procrastinate_jobs AS j WHERE j.status = 'todo' AND j.queueing_lock = e.queueing_lock
);

-- name: find_unsettled_batches
-- Those that somebody holds in an open transaction are passed over: waiting for each would keep the reconciler from everything else.
SELECT b.batch_id
FROM processing_jobs AS b
WHERE b.settled_at IS NULL AND (b.sealed_at IS NOT NULL OR b.status = 'cancelled' OR b.given_up)
    -- As may_settle says it, which would cost more with many batches.
    AND NOT EXISTS (
        SELECT FROM file_extractions AS d
        WHERE d.batch_id = b.batch_id AND d.run_id = b.run_id AND d.state IN ('queued', 'working', 'retrying')
    )
    AND NOT EXISTS (SELECT FROM batch_archives AS a WHERE a.run_id = b.run_id AND a.state IN ('waiting', 'unpacking'))
LIMIT %(most)s
FOR NO KEY UPDATE OF b SKIP LOCKED;

-- name: beat
-- The registry's heartbeat; a row that somebody removed comes back.
INSERT INTO worker_registry AS w (
    worker, host, pid, queues, concurrency, stopping, active_jobs, documents, memory_mb, cpu_seconds, connections, version
) VALUES (
    %(worker)s, %(host)s, %(pid)s, %(queues)s, %(concurrency)s, %(stopping)s, %(active_jobs)s, %(documents)s, %(memory_mb)s,
    %(cpu_seconds)s, (SELECT count(*) FROM pg_stat_activity AS a WHERE a.application_name = %(application_name)s), %(version)s
)
ON CONFLICT (worker) DO UPDATE
SET heartbeat_at = now(), stopping = EXCLUDED.stopping, active_jobs = EXCLUDED.active_jobs, documents = EXCLUDED.documents,
    memory_mb = EXCLUDED.memory_mb, cpu_seconds = EXCLUDED.cpu_seconds, connections = EXCLUDED.connections, queues = EXCLUDED.queues,
    concurrency = EXCLUDED.concurrency,
    -- Less CPU time than before: another process has the same host and pid, as in a container that was started again.
    started_at = CASE WHEN EXCLUDED.cpu_seconds < w.cpu_seconds THEN now() ELSE w.started_at END,
    cpu_share = CASE WHEN EXCLUDED.cpu_seconds >= w.cpu_seconds THEN
        (EXCLUDED.cpu_seconds - w.cpu_seconds) / nullif(extract(epoch FROM now() - w.heartbeat_at)::float8, 0)
    END;

-- name: sign_off
DELETE FROM worker_registry AS w WHERE w.worker = %(worker)s;

-- name: forget_dead_workers
DELETE FROM worker_registry AS w WHERE w.heartbeat_at < now() - interval '7 days' RETURNING w.worker;

-- name: find_stalled_batches
WITH working AS (
    SELECT d.run_id
    FROM file_extractions AS d
    WHERE d.state = 'working' AND d.run_id IS NOT NULL
    GROUP BY d.run_id
    HAVING max(d.updated_at) < now() - make_interval(secs => %(timeout_seconds)s)
    UNION
    SELECT a.run_id
    FROM batch_archives AS a
    WHERE a.state = 'unpacking' AND a.updated_at < now() - make_interval(secs => %(timeout_seconds)s) AND NOT waits_to_be_unpacked(a.id)
)
SELECT b.batch_id
FROM processing_jobs AS b
WHERE b.settled_at IS NULL AND b.completed_at IS NULL AND b.updated_at < now() - make_interval(secs => %(timeout_seconds)s)
    AND (b.sealed_at IS NULL OR b.run_id IN (SELECT w.run_id FROM working AS w))
    AND stall_of(b, %(timeout_seconds)s, %(undisturbed_seconds)s) IS NOT NULL
LIMIT %(most)s;

-- name: fail_stalled_batch
SELECT fail_stalled_batch(%(batch_id)s, %(timeout_seconds)s, %(undisturbed_seconds)s) AS outcome;

-- name: find_batches_to_reopen
-- Ended batches of which a document goes on again and nobody said so. From batch to batch of the unfinished documents, not from document to
-- document, and a window of them, so that a pass costs the same whatever the backlog; the next pass goes on behind it. The order is that of
-- the one index that has unfinished documents alone.
WITH RECURSIVE unfinished (batch_id, place) AS (
    (SELECT d.batch_id, 1 FROM file_extractions AS d
        WHERE d.batch_id > %(after)s AND d.state IN ('queued', 'working', 'retrying')
        ORDER BY d.batch_id, d.run_id, d.id DESC LIMIT 1)
    UNION ALL
    SELECT (SELECT d.batch_id FROM file_extractions AS d
        WHERE d.batch_id > u.batch_id AND d.state IN ('queued', 'working', 'retrying')
        ORDER BY d.batch_id, d.run_id, d.id DESC LIMIT 1), u.place + 1
    FROM unfinished AS u
    WHERE u.batch_id IS NOT NULL AND u.place < %(window)s
), free AS (
    SELECT b.batch_id
    FROM processing_jobs AS b
    WHERE b.batch_id IN (SELECT u.batch_id FROM unfinished AS u)
        AND b.settled_at IS NOT NULL AND b.sealed_at IS NOT NULL AND b.status <> 'cancelled' AND NOT b.given_up
        AND run_is_open(b.batch_id, b.run_id)
    FOR NO KEY UPDATE SKIP LOCKED
)
SELECT u.batch_id, f.batch_id IS NOT NULL AS reopen
FROM unfinished AS u
LEFT JOIN free AS f ON f.batch_id = u.batch_id
WHERE u.batch_id IS NOT NULL
ORDER BY u.place;

-- name: reopen_batch
SELECT reopen_batch(%(batch_id)s) AS outcome;

-- name: find_lost_archives
-- A window of open archives by id, as of waiting documents.
WITH looked AS MATERIALIZED (
    SELECT a.id
    FROM batch_archives AS a
    WHERE a.state IN ('waiting', 'unpacking') AND a.id > %(after)s
    ORDER BY a.id
    LIMIT %(window)s
)
SELECT l.id, NOT is_being_unpacked(l.id) AS lost
FROM looked AS l
ORDER BY l.id;

-- name: requeue_lost_archive
SELECT requeue_lost_archive(%(archive_id)s, %(max_requeues)s) AS outcome;

-- name: find_summaries_to_renew
-- In any order: a pass may end after the first, and a batch that takes many calls, or fails in each, would stand before the same others in all.
SELECT n.batch_id FROM summaries_to_renew AS n GROUP BY n.batch_id ORDER BY random() LIMIT %(most)s;

-- name: renew_summaries
SELECT renew_summaries(%(batch_id)s) AS outcome;

-- name: evaluate_alerts
SELECT e.change, e.rule, e.subject, e.severity, e.message FROM evaluate_alerts(%(every_seconds)s) AS e;
