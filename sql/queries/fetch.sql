-- Taking jobs; see sql/migrations/0011_fair_share.sql.

-- name: fetch_job
-- The columns of procrastinate's own query, and whose job it is. The commit of a stage's job does not wait for the disk: a fetch that a crash
-- of the server undoes leaves the job waiting, and the claim that follows is what gives the right to work. That one waits, and with it this
-- one. Nothing of the kind follows for other tasks, an application's own among them, which a fetch that was undone would have run twice.
SELECT j.id, j.status, j.task_name, j.priority, j.lock, j.queueing_lock, j.args, j.scheduled_at, j.queue_name, j.attempts, j.worker_id,
    j.docmill_user
FROM docmill_fetch_job(
    %(queues)s::varchar[], %(worker_id)s, %(after_user)s, %(others_first)s, %(max_documents)s
) AS j
CROSS JOIN LATERAL set_config(
    'synchronous_commit',
    CASE WHEN stage_queue(j.task_name) IS NULL THEN current_setting('synchronous_commit') ELSE 'off' END,
    TRUE
) AS quick;
