-- A document whose row an application's transaction held for longer than a lease was taken from its worker, which lives, as soon as that transaction
-- ended: the lease could not be renewed meanwhile. What was made of it was dropped, and it counted as a crash. A worker that lives says which
-- documents it holds, and renews their leases a few seconds later.

CREATE FUNCTION is_held_alive(doc_id text, worker text, alive_seconds double precision) RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT EXISTS (
        SELECT FROM worker_registry AS w
        WHERE w.worker = is_held_alive.worker AND is_held_alive.doc_id = ANY(w.documents)
            AND w.heartbeat_at > now() - make_interval(secs => alive_seconds)
    );
$$;
COMMENT ON FUNCTION is_held_alive IS 'Whether a worker that was heard of within so many seconds says that it holds the lease of a document.';

-- Workers of the release before call it without alive_seconds.
DROP FUNCTION rescue_document(text, integer);
CREATE FUNCTION rescue_document(doc_id text, max_crashes integer, alive_seconds double precision DEFAULT 0) RETURNS text LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    d file_extractions;
BEGIN
    SELECT f.* INTO d FROM file_extractions AS f WHERE f.doc_id = rescue_document.doc_id FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    SELECT f.* INTO d FROM file_extractions AS f WHERE f.id = d.id;
    IF d.state <> 'working' OR d.lease_until >= clock_timestamp() OR is_held_alive(d.doc_id, d.claimed_by, rescue_document.alive_seconds) THEN
        RETURN NULL;
    END IF;
    -- A checkpoint that moves the milestone sets the counts back, so they speak of this milestone only.
    d.crash_count := d.crash_count + 1;
    d.lone_crash_count := d.lone_crash_count + d.alone::integer;
    UPDATE file_extractions AS f SET crash_count = d.crash_count, lone_crash_count = d.lone_crash_count WHERE f.id = d.id;
    IF d.claim_job_id IS NOT NULL THEN
        PERFORM end_job(d.claim_job_id);
    END IF;
    IF d.lone_crash_count >= max_crashes THEN
        PERFORM fail_document(d, 'UNKNOWN', format(
            '%s: the worker died or hung %s times while %s had it to itself (MAX_CRASHES).', d.file_name, d.lone_crash_count, due_stage(d.milestone)),
            jsonb_build_object('crash_count', d.crash_count, 'lone_crash_count', d.lone_crash_count, 'worker', d.claimed_by, 'milestone', d.milestone));
        RETURN 'failed';
    END IF;
    UPDATE file_extractions AS f
    SET state = 'queued', claim = f.claim + 1, claim_job_id = NULL, lease_until = NULL, updated_at = now()
    WHERE f.id = d.id;
    PERFORM defer_stage(d.doc_id, due_stage(d.milestone), d.priority,
        now() + make_interval(secs => CASE d.crash_count WHEN 1 THEN 0 ELSE least(300, 2.0 ^ least(d.crash_count, 10)) END));
    INSERT INTO document_events (doc_id, version, batch_id, user_id, correlation_id, stage, event, worker, claim, detail)
    VALUES (d.doc_id, d.version, d.batch_id, d.user_id, d.correlation_id, due_stage(d.milestone), 'rescued', d.claimed_by, d.claim,
        jsonb_build_object('reason', 'lease expired', 'crash_count', d.crash_count, 'lone_crash_count', d.lone_crash_count));
    RETURN 'rescued';
END;
$$;
COMMENT ON FUNCTION rescue_document IS 'Takes a document from a worker whose lease has expired and that was not heard of for alive_seconds: queued again, or failed after MAX_CRASHES crashes alone.';

-- And whoever asks is told so: it was said of such a worker that it had fallen silent, with the advice to restart it. A duplicate is one of
-- what is there now, as document_status has it.

CREATE OR REPLACE FUNCTION document_outlook(d file_extractions, OUT standing text, OUT next_at timestamptz, OUT next text) LANGUAGE plpgsql STABLE AS $$
DECLARE
    stage CONSTANT text := due_stage(d.milestone);
    letter dead_letters;
    original text;
BEGIN
    CASE d.state
        WHEN 'working' THEN
            IF d.lease_until < now() AND EXISTS (
                SELECT FROM worker_health AS w
                WHERE w.worker = d.claimed_by AND d.doc_id = ANY(w.documents) AND w.health IN ('alive', 'stopping')
            ) THEN
                standing := format('in the hands of %s, which lives, for %s; an open transaction holds it', d.claimed_by, stage);
                next := 'it goes on when that transaction ends: sql/inspect/22_blocked.sql says whose it is; to restart the worker would lose its work';
            ELSIF d.lease_until < now() THEN
                standing := format('was in the hands of %s for %s, which has fallen silent', d.claimed_by, stage);
                next := 'any worker alive takes it over within seconds; if there is none: docmill worker';
                next_at := greatest(now(), d.lease_until);
            ELSE
                standing := format('in the hands of %s since %s, for %s', d.claimed_by, date_trunc('second', d.updated_at), stage);
                next := 'its result, or its failure, is written; stages that take less than CHECKPOINT_SECONDS are written together';
            END IF;
        WHEN 'complete' THEN
            standing := format('complete, version %s', d.version);
            next := 'nothing; submitting changed content makes a new version';
        WHEN 'duplicate' THEN
            original := original_of(d.doc_id, d.user_id, d.content_sha256, d.duplicate_of);
            IF original IS NULL THEN
                standing := 'a duplicate of a document that is gone, or has other content by now';
                next := 'any worker alive queues it, to be worked on itself';
            ELSE
                standing := format('a duplicate of %s, whose passages stand for it', original);
                next := 'nothing, while that one is there; if it is deleted, this one is worked on';
            END IF;
        WHEN 'cancelled' THEN
            standing := 'cancelled';
            next := 'nothing; submitting it again takes it up where it was left';
        WHEN 'failed' THEN
            SELECT l.* INTO letter FROM dead_letters AS l WHERE l.doc_id = d.doc_id AND l.resolved_at IS NULL;
            standing := format('failed at %s (%s): %s', stage, d.error_type, d.error_message);
            next := CASE WHEN letter.id IS NULL THEN 'nothing; its dead letter has been put away. Submit new content'
                ELSE format('nothing by itself; dead letter %s: SELECT requeue_dead_letter(%1$s); or SELECT discard_dead_letter(%1$s);', letter.id)
            END;
        ELSE
            SELECT w.standing, w.next_at, w.next INTO standing, next_at, next FROM waiting_outlook(d) AS w;
    END CASE;
    IF d.served_version < d.version THEN
        standing := format('%s; searches see version %s meanwhile', standing, d.served_version);
    END IF;
END;
$$;

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
), held AS MATERIALIZED (
    SELECT w.worker, h.doc_id FROM worker_health AS w, unnest(w.documents) AS h (doc_id) WHERE w.health IN ('alive', 'stopping')
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
        EXISTS (SELECT FROM held AS h WHERE h.worker = d.claimed_by AND h.doc_id = d.doc_id) AS is_held,
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
        (1, l.state = 'working' AND l.lease_until < now() - interval '1 minute' AND l.is_held, 'held', l.lease_until,
            format('%s has it in hand and lives, but an open transaction holds it: neither its lease nor a result can be written', l.claimed_by),
            'it goes on when that transaction ends: sql/inspect/22_blocked.sql says whose it is; to restart the worker would lose its work'),
        (2, l.state = 'working' AND l.lease_until < now() - interval '1 minute', 'worker_lost', l.lease_until,
            format('the worker that had it, %s, has fallen silent and nobody has taken the document over', l.claimed_by),
            CASE WHEN (SELECT max(a.listeners) FROM queues AS a) = 0 THEN 'start a worker: any one takes it over within seconds'
                ELSE 'the workers alive should take it over within seconds: look at their logs, restart them' END),
        (3, l.state = 'working', 'slow', l.updated_at,
            format('%s has been at %s for a long time without a result', l.claimed_by, l.stage),
            'it is cut off and tried again at STAGE_TIMEOUT_SECONDS; to end it now: SELECT fail_document_by_operator(doc_id, reason);'),
        (4, q.listeners = 0 AND l.updated_at < now() - interval '1 minute', 'no_worker', l.updated_at,
            format('no worker alive listens to the queue %s', l.queue),
            format('start one: docmill worker, or docmill worker --queues %s', l.queue)),
        (5, NOT l.has_job AND l.updated_at < now() - interval '1 minute', 'job_lost', l.updated_at,
            'it waits, but has no job in the queue',
            'the workers alive queue it again within a minute; if they do not, look at their logs: do all run the present version of docmill?'),
        (6, NOT l.in_hand AND l.updated_at < now() - interval '2 minutes', 'job_lost', l.updated_at,
            'its job was fetched by a worker that no longer knows of it',
            'the workers alive end that job and queue the document again within a minute; if they do not, look at their logs'),
        (7, l.crash_count > 0, 'crashing', l.updated_at,
            format('its worker died or hung %s times during %s', l.crash_count, l.stage),
            'it is tried again alone in its worker and becomes a dead letter at MAX_CRASHES; look at worker memory and the file'),
        (8, l.requeue_count > 1, 'job_lost', l.updated_at,
            format('its job was lost %s times before a worker began it', l.requeue_count),
            'do all workers run the present version of docmill, and does anything delete from procrastinate_jobs?'),
        (9, t.waits AND l.waiting_for = 'storage' AND t.since < now() - interval '10 minutes', 'storage', t.since,
            format('it waits for the storage: %s', l.error_message),
            'it goes on by itself when the storage is back: mount it, or free some space; docmill health on the worker''s host says how it is'),
        (10, t.waits AND l.waiting_for IS NOT NULL AND t.since < now() - interval '10 minutes', 'service', t.since,
            format('it waits for an outside service: %s', l.error_message),
            'it goes on by itself when the service is back; look at provider_health, SELECT reset_breaker(service) tries at once'),
        (11, l.state = 'retrying' AND t.since < now() - interval '10 minutes', 'failing', t.since,
            format('%s keeps failing (%s times): %s', l.stage, l.retry_count, l.error_message),
            'it is tried again by itself and becomes a dead letter after MAX_RETRY_ATTEMPTS retries'),
        (12, o.doc_id IS NOT NULL AND l.updated_at < now() - interval '10 minutes', 'equal', l.updated_at,
            format('it waits for %s, which has the same content and is due for %s', o.doc_id, o.stage),
            'nothing, if that one gets on: SELECT * FROM explain_document(' || quote_literal(o.doc_id) || ');'),
        (13, NOT q.moves AND l.not_before IS NULL AND l.updated_at < now() - interval '10 minutes', 'queue_stands', l.updated_at,
            format('workers listen to the queue %s, but none has brought anything to an end for 10 minutes', l.queue),
            'look at worker_health: busy with long documents, or hung? Their logs say; restarting a worker loses nothing')
    ) AS v (place, holds, cause, since, reason, what_to_do)
    WHERE v.holds
    ORDER BY v.place
    LIMIT 1
) AS r
ORDER BY r.since;
COMMENT ON COLUMN stuck_documents.cause IS
    'To group by: held (by a transaction), worker_lost, slow, no_worker, job_lost, crashing, storage, service, failing, equal (waits for the same content) or queue_stands.';

CALL pin_search_path();
