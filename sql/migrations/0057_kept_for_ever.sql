-- What was kept, or said, for ever: the summaries of all earlier runs of a batch, which one deletion rewrote in a single statement; the files of
-- deleted documents after a restore into another cluster; an alert about a service that nobody calls any more; and the name of a worker on a
-- job that was taken from it.

-- Summaries are renewed a part at a time. Nobody but renew_summaries calls the function that is dropped, and that by its name.

ALTER TABLE summaries_to_renew ADD COLUMN after_run uuid;
COMMENT ON COLUMN summaries_to_renew.after_run IS
    'The batch''s summaries up to this run_id say no more about it, and those behind it are still to be looked at; null: all are.';

DROP FUNCTION forget_deleted_documents(text);
CREATE FUNCTION forget_deleted_documents(batch_id text, runs uuid[] DEFAULT NULL) RETURNS integer LANGUAGE plpgsql AS $$
-- A summary holds names, errors and what was extracted: what is deleted must go from there too. The totals stay as they were.
DECLARE
    changed integer;
BEGIN
    UPDATE run_summaries AS r
    SET ui_json = without_deleted(r.ui_json), updated_at = now(),
        nested_summary = r.nested_summary || jsonb_build_object('folders', (
            SELECT coalesce(jsonb_agg(without_deleted(f.folder) ORDER BY f.place), '[]')
            FROM jsonb_array_elements(r.nested_summary -> 'folders') WITH ORDINALITY AS f (folder, place)
        ))
    WHERE r.batch_id = forget_deleted_documents.batch_id AND (runs IS NULL OR r.run_id = ANY(runs)) AND EXISTS (
        SELECT FROM jsonb_array_elements_text(summary_documents(r.ui_json, r.nested_summary)) AS e (doc_id)
        WHERE NOT EXISTS (SELECT FROM file_extractions AS d WHERE d.doc_id = e.doc_id)
    );
    GET DIAGNOSTICS changed = ROW_COUNT;
    RETURN changed;
END;
$$;
COMMENT ON FUNCTION forget_deleted_documents IS
    'Takes the cards of deleted documents out of the summaries of some runs of a batch, or of all (null), and returns how many changed. Call it after deletions, as a transaction of its own.';

CREATE OR REPLACE FUNCTION renew_summaries(batch_id text) RETURNS text LANGUAGE plpgsql AS $$
-- A batch may have had thousands of runs with thousands of files each, and to rewrite 10,000 cards takes a second or two. What is noted while
-- a round through the runs is under way begins the next one, so that each round ends.
#variable_conflict use_column
DECLARE
    most_cards CONSTANT integer := 10000;
    notes record;
    runs uuid[];
    last_run uuid;
    is_left boolean;
BEGIN
    PERFORM FROM processing_jobs AS b WHERE b.batch_id = renew_summaries.batch_id FOR NO KEY UPDATE SKIP LOCKED;
    IF NOT FOUND AND EXISTS (SELECT FROM processing_jobs AS b WHERE b.batch_id = renew_summaries.batch_id) THEN
        RETURN NULL;
    END IF;
    -- The notes first: what is deleted from here on makes a note of its own.
    WITH noted AS (
        DELETE FROM summaries_to_renew AS n WHERE n.batch_id = renew_summaries.batch_id RETURNING n.is_its_own, n.after_run
    )
    SELECT bool_or(n.is_its_own) AS is_due, bool_or(n.after_run IS NULL) AS has_new, max(n.after_run::text)::uuid AS after_run INTO notes
    FROM noted AS n;
    IF notes.has_new IS NULL OR NOT EXISTS (SELECT FROM processing_jobs AS b WHERE b.batch_id = renew_summaries.batch_id) THEN
        RETURN NULL;
    END IF;
    IF notes.is_due THEN
        PERFORM settle_batch(renew_summaries.batch_id);
    END IF;
    SELECT array_agg(c.run_id ORDER BY c.run_id) INTO runs
    FROM (
        SELECT r.run_id, sum(r.file_count) OVER (ORDER BY r.run_id) - r.file_count AS cards_before
        FROM run_summaries AS r
        WHERE r.batch_id = renew_summaries.batch_id AND (notes.after_run IS NULL OR r.run_id > notes.after_run)
    ) AS c
    WHERE c.cards_before < most_cards;
    -- Null would be all of them.
    PERFORM forget_deleted_documents(renew_summaries.batch_id, coalesce(runs, '{}'));
    last_run := runs[cardinality(runs)];
    is_left := EXISTS (SELECT FROM run_summaries AS r WHERE r.batch_id = renew_summaries.batch_id AND r.run_id > last_run);
    INSERT INTO summaries_to_renew (batch_id, is_its_own, after_run)
    SELECT renew_summaries.batch_id, FALSE, n.after_run
    FROM (VALUES (last_run, is_left), (NULL, notes.has_new AND notes.after_run IS NOT NULL)) AS n (after_run, is_to_do)
    WHERE n.is_to_do;
    RETURN CASE WHEN NOT FOUND THEN 'renewed' END;
END;
$$;
COMMENT ON FUNCTION renew_summaries IS
    'Brings the summaries of a batch up to date after documents of it have been deleted, of some runs a call; null while runs are left, which a note says, where nothing is noted, or while somebody holds the batch.';

-- As before, and it knows a transaction number of another cluster, which a dump has brought along: there may be a billion until it is reached.
CREATE OR REPLACE FUNCTION judge_file(path text) RETURNS text LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    note files_to_remove;
BEGIN
    SELECT n.* INTO note FROM files_to_remove AS n WHERE n.path = judge_file.path FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    IF note.settled_at_xid > pg_snapshot_xmax(pg_current_snapshot()) THEN
        note.settled_at_xid := NULL;
    END IF;
    IF note.settled_at_xid IS NULL AND EXISTS (
        SELECT FROM pg_snapshot_xip(pg_current_snapshot()) AS x WHERE x <> pg_current_xact_id()
    ) THEN
        UPDATE files_to_remove AS n SET settled_at_xid = pg_snapshot_xmax(pg_current_snapshot()) WHERE n.path = note.path;
        RETURN 'wait';
    END IF;
    IF note.settled_at_xid > pg_snapshot_xmin(pg_current_snapshot()) THEN
        RETURN 'wait';
    END IF;
    -- A statement of its own: it sees what those transactions have left.
    IF EXISTS (SELECT FROM file_extractions AS d WHERE d.file_path = note.path)
        OR EXISTS (SELECT FROM batch_archives AS a WHERE a.file_path = note.path)
        OR EXISTS (SELECT FROM processing_jobs AS b WHERE b.zip_path = note.path) THEN
        DELETE FROM files_to_remove AS n WHERE n.path = note.path;
        RETURN 'needed';
    END IF;
    RETURN 'free';
END;
$$;

-- As before, and the job names no worker, as all that have finished.
CREATE OR REPLACE FUNCTION end_job(job_id bigint) RETURNS void LANGUAGE sql AS $$
    UPDATE procrastinate_jobs AS j SET status = 'aborted', attempts = j.attempts + 1, abort_requested = FALSE, worker_id = NULL
    WHERE j.id = end_job.job_id AND j.status = 'doing';
$$;

CREATE FUNCTION is_called_no_more(breaker circuit_breakers) RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT breaker.state <> 'closed' AND breaker.try_at < now() - interval '1 hour'
        -- For a breaker, and for a budget: an index for each.
        AND NOT EXISTS (
            SELECT FROM file_extractions AS d
            WHERE d.state = 'retrying' AND d.waiting_for = breaker.service AND d.waiting_place IS NOT NULL
        )
        AND NOT EXISTS (
            SELECT FROM file_extractions AS d
            WHERE d.state = 'retrying' AND d.waiting_for = breaker.service AND d.waiting_place IS NULL
        );
$$;
COMMENT ON FUNCTION is_called_no_more IS
    'Whether a service that was down has not been called for an hour after it might have been, and no document waits for it: its key or address has been replaced, say.';

CREATE OR REPLACE VIEW provider_health WITH (security_invoker = true) AS
SELECT
    c.service,
    CASE
        WHEN is_called_no_more(c) THEN 'idle'
        WHEN c.refused AND c.state <> 'closed' THEN 'refused'
        WHEN c.state = 'open' THEN 'down'
        WHEN c.state = 'half_open' OR c.passes_from > now() THEN 'recovering'
        WHEN b.paused_until IS NOT NULL THEN 'paused'
        WHEN u.failed_last_hour > 0 AND u.failed_last_hour >= u.calls_last_hour * 0.1 THEN 'shaky'
        ELSE 'up'
    END AS health,
    c.state AS breaker, c.reason, c.changed_at AS since, c.try_at AS next_try_at, c.waiting, c.opened_count,
    u.calls_last_hour, u.ok_last_hour, u.failed_last_hour, u.limited_last_hour, u.p50_ms, u.p95_ms, u.cost_last_hour,
    g.last_ok_at, f.last_failure_at, f.last_error,
    b.requests_per_minute, b.requests_last_minute, b.tokens_per_minute, b.tokens_last_minute, b.share, b.paused_until,
    CASE
        WHEN is_called_no_more(c) THEN NULL
        WHEN c.refused AND c.state <> 'closed' THEN 'mend the key or the quota, then: SELECT reset_breaker(' || quote_literal(c.service) || ');'
        WHEN c.state = 'open' THEN 'it is tried again by itself; if you know that it is back: SELECT reset_breaker(' || quote_literal(c.service) || ');'
        WHEN b.paused_until IS NOT NULL THEN 'the service asked for a pause; if it does so often, lower its requests or tokens per minute'
    END AS what_to_do
FROM circuit_breakers AS c
LEFT JOIN provider_budget_use AS b ON b.service = c.service
CROSS JOIN LATERAL (
    SELECT count(*) AS calls_last_hour, count(*) FILTER (WHERE u.outcome IN ('ok', 'rejected')) AS ok_last_hour,
        count(*) FILTER (WHERE u.outcome IN ('failed', 'timeout', 'bad_answer', 'refused')) AS failed_last_hour,
        count(*) FILTER (WHERE u.outcome = 'rate_limited') AS limited_last_hour,
        percentile_cont(0.5) WITHIN GROUP (ORDER BY u.latency_ms) AS p50_ms,
        percentile_cont(0.95) WITHIN GROUP (ORDER BY u.latency_ms) AS p95_ms,
        coalesce(sum(coalesce(u.cost, u.estimated_cost)), 0) AS cost_last_hour
    FROM provider_usage AS u
    WHERE u.service = c.service AND u.started_at > now() - interval '1 hour' AND u.outcome <> 'not_sent'
) AS u
LEFT JOIN LATERAL (
    SELECT u.finished_at AS last_ok_at
    FROM provider_usage AS u
    WHERE u.service = c.service AND u.started_at > now() - interval '1 day' AND u.outcome IN ('ok', 'rejected')
    ORDER BY u.started_at DESC
    LIMIT 1
) AS g ON TRUE
LEFT JOIN LATERAL (
    SELECT l.finished_at AS last_failure_at, l.error_message AS last_error
    FROM (
        SELECT u.finished_at, u.error_message, u.outcome
        FROM provider_usage AS u
        WHERE u.service = c.service AND u.started_at > now() - interval '1 day'
        ORDER BY u.started_at DESC
        LIMIT 10000
    ) AS l
    WHERE l.outcome IN ('failed', 'timeout', 'bad_answer', 'refused', 'rate_limited')
    LIMIT 1
) AS f ON TRUE
ORDER BY c.state = 'closed', c.service;
COMMENT ON COLUMN provider_health.health IS
    'up; shaky: a tenth of the calls or more failed; paused: it asked for a pause; recovering: calls are let in one by one; down: not called for now; refused: it takes neither key nor quota; idle: it was down or refused, nobody has called it for an hour after that might have been, and no document waits for it.';

-- As before, but for services that nobody calls any more.
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
WHERE r.rule = 'breaker_open' AND r.enabled AND c.state <> 'closed' AND NOT is_called_no_more(c)
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

CALL pin_search_path();
