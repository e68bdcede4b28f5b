-- A storage that is away is waited for. An archive that waits for it counts no attempt, as a document does, and an alert tells of both.

ALTER TABLE batch_archives ADD COLUMN waiting_since timestamptz;
COMMENT ON COLUMN batch_archives.waiting_since IS
    'When it began to wait for the storage (away, full, read-only), which counts as no attempt; MAX_WAIT_HOURS later it is failed. Null when it does not wait.';

CREATE FUNCTION end_archive_wait() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.waiting_since := NULL;
    RETURN NEW;
END;
$$;
COMMENT ON FUNCTION end_archive_wait IS 'Trigger: an archive that has got on or has ended does not wait any more.';
CREATE TRIGGER end_archive_wait BEFORE UPDATE ON batch_archives
    FOR EACH ROW WHEN (
        OLD.waiting_since IS NOT NULL AND NEW.waiting_since = OLD.waiting_since
        AND (NEW.unpacked_count > OLD.unpacked_count OR NEW.state NOT IN ('waiting', 'unpacking'))
    )
    EXECUTE FUNCTION end_archive_wait();

DROP FUNCTION put_off_archive(bigint, double precision, text);
CREATE FUNCTION put_off_archive(archive_id bigint, delay_seconds double precision, reason text DEFAULT NULL, waits boolean DEFAULT FALSE)
RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    UPDATE batch_archives AS a
    SET attempts = 0, retry_count = a.retry_count + (reason IS NOT NULL AND NOT waits)::integer, error_message = reason, updated_at = now(),
        waiting_since = CASE WHEN waits THEN coalesce(a.waiting_since, now()) WHEN reason IS NULL THEN a.waiting_since END
    WHERE a.id = archive_id AND a.state IN ('waiting', 'unpacking');
    IF FOUND THEN
        PERFORM defer_unpacking(archive_id, now() + make_interval(secs => delay_seconds));
    END IF;
END;
$$;
COMMENT ON FUNCTION put_off_archive IS
    'Has an archive gone on with later: after a stop, for a document that somebody holds, or, with a reason, after a failure that can pass. waits: it counts as no attempt.';

-- A document that waits for the storage names it in waiting_for, and somebody is told.

COMMENT ON COLUMN file_extractions.waiting_for IS
    'While retrying: the outside service, as circuit_breakers names it, whose breaker or budget it waits for, or storage; null when it does not wait for any.';
INSERT INTO alert_rules (rule, severity, threshold, unit, for_seconds, meaning) VALUES
    ('storage_away', 'critical', 120, 'seconds', 60, 'Documents or archives have waited for longer than that for the storage, because it is not there, full or read-only.');

CREATE OR REPLACE VIEW alert_findings WITH (security_invoker = true) AS
WITH oldest AS MATERIALIZED (
    SELECT d.id, d.user_id, d.content_sha256, d.state, d.milestone, d.doc_id, d.updated_at, d.not_before, d.waiting_for, d.waiting_since,
        d.error_message
    FROM file_extractions AS d WHERE d.state IN ('queued', 'retrying') ORDER BY d.id LIMIT 10000
), waiting AS MATERIALIZED (
    -- Of the ten thousand that were submitted first those that are due.
    SELECT stage_queue(due_stage(w.milestone)) AS queue, w.doc_id, greatest(w.updated_at, w.not_before) AS since
    FROM oldest AS w
    WHERE (w.not_before IS NULL OR w.not_before <= now())
        -- One that waits for an equal document is not due before that has ended.
        AND NOT (w.state = 'queued' AND w.milestone = 'upload_validated' AND EXISTS (
            SELECT FROM file_extractions AS o
            WHERE o.user_id = w.user_id AND o.content_sha256 = w.content_sha256 AND o.owns_content AND o.id <> w.id
        ))
), queues AS MATERIALIZED (
    SELECT w.queue, extract(epoch FROM now() - min(w.since))::float8 AS seconds, (array_agg(w.doc_id ORDER BY w.since))[1] AS doc_id,
        (SELECT count(*) FROM worker_registry AS r
            WHERE r.heartbeat_at > now() - interval '60 seconds' AND (r.queues IS NULL OR w.queue = ANY(r.queues))) AS workers
    FROM waiting AS w
    GROUP BY w.queue
), for_storage AS MATERIALIZED (
    SELECT count(*) AS files, extract(epoch FROM now() - min(f.waiting_since))::float8 AS seconds,
        (array_agg(f.error_message ORDER BY f.waiting_since))[1] AS error_message
    FROM (
        SELECT w.waiting_since, w.error_message FROM oldest AS w WHERE w.waiting_for = 'storage' AND w.waiting_since IS NOT NULL
        UNION ALL
        SELECT a.waiting_since, a.error_message FROM batch_archives AS a
        WHERE a.state IN ('waiting', 'unpacking') AND a.waiting_since IS NOT NULL
    ) AS f
), ended AS (
    SELECT count(*) FILTER (WHERE e.event = 'failed') AS failed, count(*) AS total
    FROM (SELECT v.event, v.at FROM document_events AS v ORDER BY v.id DESC LIMIT 10000) AS e
    WHERE e.event IN ('failed', 'completed', 'duplicate') AND e.at > now() - interval '1 hour'
)
SELECT r.rule, q.queue AS subject, q.seconds AS value,
    format('%s has been due in queue %s for %s min; %s live workers listen to it', q.doc_id, q.queue, round(q.seconds / 60), q.workers) AS message,
    jsonb_build_object('queue', q.queue, 'doc_id', q.doc_id, 'live_workers', q.workers) AS detail
FROM alert_rules AS r, queues AS q
WHERE r.rule = 'oldest_waiting' AND r.enabled AND q.seconds > r.threshold
UNION ALL
SELECT r.rule, q.queue, q.seconds,
    format('documents wait in queue %s, for up to %s s, and no live worker listens to it', q.queue, round(q.seconds)),
    jsonb_build_object('queue', q.queue, 'doc_id', q.doc_id)
FROM alert_rules AS r, queues AS q
WHERE r.rule = 'no_worker' AND r.enabled AND q.workers = 0 AND q.seconds > r.threshold
UNION ALL
SELECT r.rule, 'all', e.failed::float8 / e.total,
    format('%s of the last %s documents failed for good (%s %%)', e.failed, e.total, round(100.0 * e.failed / e.total, 1)),
    jsonb_build_object('failed', e.failed, 'ended', e.total)
FROM alert_rules AS r, ended AS e
WHERE r.rule = 'dead_letter_rate' AND r.enabled AND e.total >= 20 AND e.failed::float8 / e.total > r.threshold
UNION ALL
SELECT r.rule, w.worker, extract(epoch FROM now() - w.heartbeat_at)::float8,
    format('worker %s was last heard of %s s ago, with %s documents in hand', w.worker,
        round(extract(epoch FROM now() - w.heartbeat_at)), cardinality(w.documents)),
    jsonb_build_object('worker', w.worker, 'host', w.host, 'heartbeat_at', w.heartbeat_at, 'documents', w.documents[1:20])
FROM alert_rules AS r, worker_registry AS w
WHERE r.rule = 'worker_dead' AND r.enabled AND w.heartbeat_at < now() - make_interval(secs => r.threshold)
    -- After a day nobody expects it any more.
    AND w.heartbeat_at > now() - interval '1 day'
    AND NOT EXISTS (
        SELECT FROM worker_registry AS n
        WHERE n.host = w.host AND n.started_at > w.heartbeat_at AND n.heartbeat_at > now() - interval '60 seconds'
    )
UNION ALL
SELECT r.rule, c.service, extract(epoch FROM now() - c.changed_at)::float8,
    format('%s is not called: %s', c.service, c.reason),
    jsonb_build_object('service', c.service, 'state', c.state, 'refused', c.refused, 'waiting', c.waiting, 'try_at', c.try_at)
FROM alert_rules AS r, circuit_breakers AS c
WHERE r.rule = 'breaker_open' AND r.enabled AND c.state <> 'closed'
UNION ALL
SELECT r.rule, b.service, b.seconds,
    format('a call to %s would wait for %s min: its rate limit is used up', b.service, round(b.seconds / 60)),
    jsonb_build_object('service', b.service, 'requests_per_minute', b.requests_per_minute, 'tokens_per_minute', b.tokens_per_minute)
FROM alert_rules AS r, (
    SELECT p.service, p.requests_per_minute, p.tokens_per_minute,
        extract(epoch FROM greatest(p.paused_until, p.last_send_at, p.overflow_at) - now())::float8 AS seconds
    FROM provider_budgets AS p
) AS b
WHERE r.rule = 'budget_exhausted' AND r.enabled AND b.seconds > r.threshold
UNION ALL
SELECT r.rule, c.relname::text, 1,
    format('index %s of %s is not valid', c.relname, i.indrelid::regclass),
    jsonb_build_object('index', c.relname, 'table', i.indrelid::regclass::text)
FROM alert_rules AS r, pg_index AS i
JOIN pg_class AS c ON c.oid = i.indexrelid
WHERE r.rule = 'index_invalid' AND r.enabled AND NOT i.indisvalid
    AND c.relnamespace = (SELECT t.relnamespace FROM pg_class AS t WHERE t.oid = 'file_extractions'::regclass)
    AND NOT is_index_being_built(i.indexrelid)
UNION ALL
SELECT r.rule, 'storage', s.seconds,
    format('%s documents and archives wait for the storage, for up to %s min: %s', s.files, round(s.seconds / 60), s.error_message),
    jsonb_build_object('waiting', s.files)
FROM alert_rules AS r, for_storage AS s
WHERE r.rule = 'storage_away' AND r.enabled AND s.seconds > r.threshold;

CREATE OR REPLACE VIEW stuck_documents WITH (security_invoker = true) AS
WITH candidates AS MATERIALIZED (
    (
        SELECT d.id FROM file_extractions AS d WHERE d.state IN ('queued', 'retrying') ORDER BY d.id LIMIT 10000
    )
    UNION
    SELECT d.id
    FROM (
        SELECT j.args ->> 'doc_id' AS doc_id
        FROM procrastinate_jobs AS j
        WHERE j.status = 'todo' AND j.scheduled_at IS NOT NULL AND stage_queue(j.task_name) IS NOT NULL
        ORDER BY j.scheduled_at DESC
        LIMIT 10000
    ) AS s
    JOIN file_extractions AS d ON d.doc_id = s.doc_id
    UNION
    SELECT d.id
    FROM file_extractions AS d
    WHERE d.state = 'working' AND (d.lease_until < now() - interval '1 minute' OR d.updated_at < now() - interval '30 minutes')
), fetched AS MATERIALIZED (
    SELECT j.args ->> 'doc_id' AS doc_id, bool_or(EXISTS (
        SELECT FROM worker_health AS w JOIN worker_registry AS r USING (worker) WHERE w.health IN ('alive', 'stopping') AND j.id = ANY(r.active_jobs)
    )) AS in_hand
    FROM procrastinate_jobs AS j
    WHERE j.status = 'doing' AND stage_queue(j.task_name) IS NOT NULL
    GROUP BY 1
), queues AS MATERIALIZED (
    SELECT q.queue,
        (SELECT count(*) FROM worker_health AS w WHERE w.health = 'alive' AND (w.queues IS NULL OR q.queue = ANY(w.queues))) AS listeners,
        EXISTS (
            SELECT FROM document_events AS e
            WHERE e.id >= event_id_since(now() - interval '11 minutes') AND e.at > now() - interval '10 minutes' AND e.worker IS NOT NULL
                AND stage_queue(e.stage) = q.queue
        ) AS moves
    FROM unnest(ARRAY['cpu', 'embed', 'extract']) AS q (queue)
), looked AS (
    SELECT d.id, d.doc_id, d.file_name, d.batch_id, d.user_id, d.content_sha256, d.milestone, d.state, due_stage(d.milestone) AS stage,
        stage_queue(due_stage(d.milestone)) AS queue, d.updated_at, d.created_at, d.not_before, d.lease_until, d.claimed_by, d.crash_count,
        d.requeue_count, d.retry_count, d.error_type, d.error_message, d.waiting_for, f.in_hand,
        f.doc_id IS NOT NULL OR EXISTS (
            SELECT FROM procrastinate_jobs AS j
            WHERE j.status = 'todo' AND j.queueing_lock = due_stage(d.milestone) || ':' || d.doc_id
        ) AS has_job
    FROM candidates AS c
    JOIN file_extractions AS d ON d.id = c.id
    LEFT JOIN fetched AS f ON f.doc_id = d.doc_id
    WHERE d.state IN ('queued', 'retrying', 'working')
)
SELECT
    l.doc_id, l.file_name, l.batch_id, l.user_id, l.stage, l.queue, l.state, r.cause, r.reason, r.since,
    date_trunc('second', now() - r.since) AS stuck_for, l.not_before AS next_try_at, r.what_to_do, l.claimed_by AS worker
FROM looked AS l
JOIN queues AS q ON q.queue = l.queue
LEFT JOIN LATERAL (
    SELECT e.at AS last_try_at, NOT coalesce((e.detail ->> 'counts')::boolean, TRUE) AS waits,
        coalesce((
            SELECT max(p.at) FROM document_events AS p WHERE p.doc_id = l.doc_id AND p.event NOT IN ('retry_scheduled', 'handed_on', 'rescued', 'requeued')
        ), l.created_at) AS since
    FROM document_events AS e
    WHERE l.state = 'retrying' AND e.doc_id = l.doc_id AND e.event = 'retry_scheduled'
    ORDER BY e.id DESC
    LIMIT 1
) AS t ON TRUE
LEFT JOIN LATERAL (
    SELECT o.doc_id, due_stage(o.milestone) AS stage
    FROM file_extractions AS o
    WHERE l.state = 'queued' AND l.milestone = 'upload_validated' AND o.user_id = l.user_id AND o.content_sha256 = l.content_sha256
        AND o.owns_content AND o.id <> l.id
) AS o ON TRUE
CROSS JOIN LATERAL (
    SELECT v.cause, v.reason, v.since, v.what_to_do
    FROM (VALUES
        (1, l.state = 'working' AND l.lease_until < now() - interval '1 minute', 'worker_lost', l.lease_until,
            format('the worker that had it, %s, has fallen silent and nobody has taken the document over', l.claimed_by),
            CASE WHEN (SELECT max(a.listeners) FROM queues AS a) = 0 THEN 'start a worker: any one takes it over within seconds'
                ELSE 'the workers alive should take it over within seconds: look at their logs, restart them' END),
        (2, l.state = 'working', 'slow', l.updated_at,
            format('%s has been at %s for a long time without a result', l.claimed_by, l.stage),
            'it is cut off and tried again at STAGE_TIMEOUT_SECONDS; to end it now: SELECT fail_document_by_operator(doc_id, reason);'),
        (3, q.listeners = 0 AND l.updated_at < now() - interval '1 minute', 'no_worker', l.updated_at,
            format('no worker alive listens to the queue %s', l.queue),
            format('start one: docmill worker, or docmill worker --queues %s', l.queue)),
        (4, NOT l.has_job AND l.updated_at < now() - interval '1 minute', 'job_lost', l.updated_at,
            'it waits, but has no job in the queue',
            'the workers alive queue it again within a minute; if they do not, look at their logs: do all run the present version of docmill?'),
        (5, NOT l.in_hand AND l.updated_at < now() - interval '2 minutes', 'job_lost', l.updated_at,
            'its job was fetched by a worker that no longer knows of it',
            'the workers alive end that job and queue the document again within a minute; if they do not, look at their logs'),
        (6, l.crash_count > 0, 'crashing', l.updated_at,
            format('its worker died or hung %s times during %s', l.crash_count, l.stage),
            'it is tried again alone in its worker and becomes a dead letter at MAX_CRASHES; look at worker memory and the file'),
        (7, l.requeue_count > 1, 'job_lost', l.updated_at,
            format('its job was lost %s times before a worker began it', l.requeue_count),
            'do all workers run the present version of docmill, and does anything delete from procrastinate_jobs?'),
        (8, t.waits AND l.waiting_for = 'storage' AND t.since < now() - interval '10 minutes', 'storage', t.since,
            format('it waits for the storage: %s', l.error_message),
            'it goes on by itself when the storage is back: mount it, or free some space; docmill health on the worker''s host says how it is'),
        (9, t.waits AND l.waiting_for IS NOT NULL AND t.since < now() - interval '10 minutes', 'service', t.since,
            format('it waits for an outside service: %s', l.error_message),
            'it goes on by itself when the service is back; look at provider_health, SELECT reset_breaker(service) tries at once'),
        (10, l.state = 'retrying' AND t.since < now() - interval '10 minutes', 'failing', t.since,
            format('%s keeps failing (%s times): %s', l.stage, l.retry_count, l.error_message),
            'it is tried again by itself and becomes a dead letter after MAX_RETRY_ATTEMPTS retries'),
        (11, o.doc_id IS NOT NULL AND l.updated_at < now() - interval '10 minutes', 'equal', l.updated_at,
            format('it waits for %s, which has the same content and is due for %s', o.doc_id, o.stage),
            'nothing, if that one gets on: SELECT * FROM explain_document(' || quote_literal(o.doc_id) || ');'),
        (12, NOT q.moves AND l.not_before IS NULL AND l.updated_at < now() - interval '10 minutes', 'queue_stands', l.updated_at,
            format('workers listen to the queue %s, but none has brought anything to an end for 10 minutes', l.queue),
            'look at worker_health: busy with long documents, or hung? Their logs say; restarting a worker loses nothing')
    ) AS v (place, holds, cause, since, reason, what_to_do)
    WHERE v.holds
    ORDER BY v.place
    LIMIT 1
) AS r
ORDER BY r.since;
COMMENT ON COLUMN stuck_documents.cause IS
    'To group by: worker_lost, slow, no_worker, job_lost, crashing, storage, service, failing, equal (waits for the same content) or queue_stands.';

CALL pin_search_path();
