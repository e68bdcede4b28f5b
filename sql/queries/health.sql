-- What `docmill health` asks, each answered by indexes and small tables however much there is to do: containers ask every few seconds.

-- name: limit_check
SELECT set_config('statement_timeout', %(statement_ms)s, TRUE);

-- name: database_facts
SELECT current_setting('server_version') AS version, pg_is_in_recovery() AS is_replica,
    current_setting('default_transaction_read_only')::boolean AS is_read_only,
    extract(epoch FROM clock_timestamp() - pg_last_xact_replay_timestamp())::float8 AS newest_change_seconds,
    -- What kind a process is is hidden where it is another login's; most of Postgres' own have no user or no database.
    (SELECT count(*) FROM pg_stat_activity AS a
        WHERE a.usesysid IS NOT NULL AND a.datid IS NOT NULL AND coalesce(a.backend_type, 'client backend') = 'client backend') AS connections,
    current_setting('max_connections')::integer AS max_connections;

-- name: workers_by_health
SELECT w.worker, w.host, w.health, w.silent_for, w.concurrency, w.jobs FROM worker_health AS w ORDER BY w.heartbeat_at DESC;

-- name: unheard_queues
-- Queues with jobs that could be run and nobody who listens.
SELECT q.queue
FROM unnest(ARRAY['cpu', 'embed', 'extract', 'maintenance']) AS q (queue)
WHERE EXISTS (
    SELECT FROM procrastinate_jobs AS j WHERE j.status = 'todo' AND coalesce(j.scheduled_at <= now(), TRUE) AND j.queue_name = q.queue
) AND NOT EXISTS (
    SELECT FROM worker_health AS w WHERE w.health IN ('alive', 'stopping') AND (w.queues IS NULL OR q.queue = ANY(w.queues))
)
ORDER BY q.queue;

-- name: troubled_services
SELECT p.service, p.health, p.reason, p.last_error, p.next_try_at, p.what_to_do
FROM provider_health AS p
WHERE p.health NOT IN ('up', 'idle');

-- name: troubled_indexes
SELECT i.index_name, i.health, i.what_to_do FROM index_health AS i WHERE i.health = 'invalid';

-- name: failing_embeddings
SELECT c.embedding_model, c.failing_documents, c.error_message FROM embedding_coverage AS c WHERE c.failing_documents > 0;
