-- What the reconciler looks for. Finding is a plain read that may be out of date; the repair functions look again under a lock.

-- name: find_expired_leases
-- Not before one lease length after Postgres came back: until then workers that live have had no chance to renew.
SELECT d.doc_id
FROM file_extractions AS d
WHERE d.state = 'working' AND d.lease_until < now()
    AND pg_postmaster_start_time() < now() - make_interval(secs => %(lease_seconds)s)
ORDER BY d.lease_until
LIMIT %(most)s;

-- name: rescue_document
SELECT rescue_document(%(doc_id)s, %(max_crashes)s) AS outcome;

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
-- A window of waiting documents by id, so that a pass costs the same whatever the backlog; the next pass goes on behind it.
WITH looked AS MATERIALIZED (
    SELECT d.id, d.doc_id, d.milestone
    FROM file_extractions AS d
    WHERE d.state IN ('queued', 'retrying') AND d.id > %(after)s
    ORDER BY d.id
    LIMIT %(window)s
), fetched AS MATERIALIZED (
    SELECT j.args ->> 'doc_id' AS doc_id FROM procrastinate_jobs AS j WHERE j.status = 'doing'
)
SELECT l.id, l.doc_id, NOT EXISTS (
    SELECT FROM procrastinate_jobs AS j
    WHERE j.status = 'todo' AND j.queueing_lock = due_stage(l.milestone) || ':' || l.doc_id
) AND NOT EXISTS (SELECT FROM fetched AS f WHERE f.doc_id = l.doc_id) AS lost
FROM looked AS l
ORDER BY l.id;

-- name: requeue_lost_document
SELECT requeue_lost_document(%(doc_id)s, %(max_requeues)s) AS outcome;

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
    SET status = 'aborted', attempts = j.attempts + 1, abort_requested = FALSE
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
SELECT b.batch_id
FROM processing_jobs AS b
WHERE b.status IN ('pending', 'processing') AND b.sealed_at IS NOT NULL
    AND NOT EXISTS (
        SELECT FROM file_extractions AS d
        WHERE d.batch_id = b.batch_id AND d.state IN ('queued', 'working', 'retrying')
    )
    AND NOT EXISTS (SELECT FROM batch_archives AS a WHERE a.run_id = b.run_id AND a.state IN ('waiting', 'unpacking'))
LIMIT %(most)s;

-- name: find_lost_archives
SELECT a.id
FROM batch_archives AS a
WHERE a.state IN ('waiting', 'unpacking') AND NOT is_being_unpacked(a.id)
ORDER BY a.id
LIMIT %(most)s;

-- name: requeue_lost_archive
SELECT requeue_lost_archive(%(archive_id)s, %(max_requeues)s) AS outcome;

-- name: beat
-- The registry's heartbeat; a row that somebody removed comes back.
INSERT INTO worker_registry AS w (
    worker, host, pid, queues, concurrency, stopping, active_jobs, documents, memory_mb, cpu_seconds, version
) VALUES (
    %(worker)s, %(host)s, %(pid)s, %(queues)s, %(concurrency)s, %(stopping)s, %(active_jobs)s, %(documents)s, %(memory_mb)s,
    %(cpu_seconds)s, %(version)s
)
ON CONFLICT (worker) DO UPDATE
SET heartbeat_at = now(), stopping = EXCLUDED.stopping, active_jobs = EXCLUDED.active_jobs, documents = EXCLUDED.documents,
    memory_mb = EXCLUDED.memory_mb, cpu_seconds = EXCLUDED.cpu_seconds, queues = EXCLUDED.queues, concurrency = EXCLUDED.concurrency;

-- name: sign_off
DELETE FROM worker_registry AS w WHERE w.worker = %(worker)s;

-- name: forget_dead_workers
DELETE FROM worker_registry AS w WHERE w.heartbeat_at < now() - interval '7 days' RETURNING w.worker;
