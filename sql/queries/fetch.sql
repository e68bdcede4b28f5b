-- Taking jobs; see sql/migrations/0011_fair_share.sql.

-- name: fetch_job
-- The columns of procrastinate's own query, and whose job it is. Its commit does not wait for the disk: a fetch that a crash of the server
-- undoes leaves the job waiting, and the claim that follows is what gives the right to work. That one waits, and with it this one.
SELECT j.id, j.status, j.task_name, j.priority, j.lock, j.queueing_lock, j.args, j.scheduled_at, j.queue_name, j.attempts, j.worker_id,
    j.docmill_user
FROM set_config('synchronous_commit', 'off', TRUE) AS quick
CROSS JOIN docmill_fetch_job(
    %(queues)s::varchar[], %(worker_id)s, %(after_user)s, %(others_first)s, %(max_documents)s
) AS j;
