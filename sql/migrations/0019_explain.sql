-- The story of one document in sentences: what has happened, where it stands, and what will happen next and when.

CREATE FUNCTION detail_in_words(detail jsonb) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE
BEGIN ATOMIC
    SELECT string_agg(replace(e.key, '_', ' ') || ' ' || coalesce(e.value #>> '{}', ''), ', ')
    FROM jsonb_each(detail) AS e
    WHERE jsonb_typeof(e.value) IN ('string', 'number', 'boolean') AND e.value #>> '{}' <> '';
END;
COMMENT ON FUNCTION detail_in_words IS 'The facts of an event''s detail in a line: `pages 3, characters 4211`; null if there are none.';

CREATE FUNCTION event_in_words(event text, stage text, attempt integer, detail jsonb) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE
BEGIN ATOMIC
    SELECT CASE event
        WHEN 'submitted' THEN concat_ws(', ', 'submitted' || coalesce(' as ' || (detail ->> 'file_name'), ''), (detail ->> 'file_size') || ' bytes')
        WHEN 'resubmitted' THEN CASE detail ->> 'outcome'
            WHEN 'new_version' THEN 'new content was submitted'
            WHEN 'resumed' THEN 'submitted again, and so taken up where it had been cancelled'
            ELSE concat_ws(': ', 'submitted again', detail ->> 'outcome')
        END
        WHEN 'stage_completed' THEN f.done || coalesce(' (' || detail_in_words(detail) || ')', '')
        WHEN 'completed' THEN 'complete: searches see it'
        WHEN 'handed_on' THEN format('handed on to the next free worker for %s: %s', stage, detail ->> 'reason')
        WHEN 'retry_scheduled' THEN format('%s failed (%s): %s; to be tried again %s s later%s', stage, detail ->> 'error_type',
            detail ->> 'error_message', round((detail ->> 'delay_seconds')::numeric, 1),
            CASE detail ->> 'counts' WHEN 'true' THEN format(', failure number %s', attempt + 1) ELSE ', which does not count' END)
        WHEN 'failed' THEN format('failed for good at %s (%s): %s', stage, detail ->> 'error_type', detail ->> 'error_message')
        WHEN 'extraction_failed' THEN format('extract failed (%s): %s; goes on without', detail ->> 'error_type', detail ->> 'error_message')
        WHEN 'duplicate' THEN format('ended as a duplicate of %s', detail ->> 'duplicate_of')
        WHEN 'fenced_off' THEN format('a worker that no longer had the claim dropped its work on %s', coalesce(stage, 'it'))
        WHEN 'rescued' THEN format('taken from a worker that had died or hung during %s (crash number %s)', stage, detail ->> 'crash_count')
        WHEN 'requeued' THEN format('queued again for %s: %s', stage, detail ->> 'reason')
        WHEN 'requeued_by_operator' THEN format('dead letter %s requeued by %s', detail ->> 'dead_letter', detail ->> 'role')
        WHEN 'discarded_by_operator' THEN format('dead letter %s discarded by %s', detail ->> 'dead_letter', detail ->> 'role')
        WHEN 'updated_by_operator' THEN concat_ws(': ', format('changed by %s', detail ->> 'role'), detail_in_words(detail - 'role'))
        WHEN 'cancelled' THEN format('cancelled by %s while %s', detail ->> 'role', detail ->> 'was')
        WHEN 'deleted' THEN format('deleted by %s while %s', detail ->> 'role', detail ->> 'was')
        WHEN 'replaced' THEN format('its file was moved; %s stands for it now', detail ->> 'replaced_by')
        ELSE concat_ws(': ', replace(event, '_', ' '), detail_in_words(detail))
    END
    FROM (VALUES (CASE stage
        WHEN 'validate' THEN 'validated'
        WHEN 'parse' THEN 'parsed'
        WHEN 'check' THEN 'text checked'
        WHEN 'chunk' THEN 'cut into passages'
        WHEN 'embed' THEN 'passages embedded'
        WHEN 'extract' THEN 'data extracted'
        ELSE concat_ws(' ', stage, 'done')
    END)) AS f (done);
END;
COMMENT ON FUNCTION event_in_words IS 'What an event of document_events says, as a sentence for people.';

CREATE FUNCTION document_story(doc_id text) RETURNS TABLE (
    at timestamptz, stage text, what text, took_ms double precision, worker text, detail jsonb
) LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT s.at, s.stage, s.what, s.took_ms, s.worker, s.detail
    FROM (
        SELECT e.at, e.id AS place, e.stage, event_in_words(e.event, e.stage, e.attempt, e.detail) AS what, e.duration_ms AS took_ms,
            e.worker, e.detail
        FROM document_events AS e
        WHERE e.doc_id = document_story.doc_id
        UNION ALL
        SELECT max(u.started_at), 0, u.stage,
            format('%s %s to %s: %s', count(*), CASE count(*) WHEN 1 THEN 'call' ELSE 'calls' END, u.service,
                concat_ws(', ', u.outcome, CASE WHEN u.outcome = 'unknown' THEN 'no answer yet or ever' END, u.error_message)),
            sum(u.latency_ms), NULL,
            jsonb_strip_nulls(jsonb_build_object('tokens_in', sum(u.tokens_in), 'tokens_out', sum(u.tokens_out), 'pages', sum(u.pages),
                'cost', sum(coalesce(u.cost, u.estimated_cost)), 'http_status', u.http_status))
        FROM provider_usage AS u
        WHERE u.doc_ids @> ARRAY[document_story.doc_id]
        GROUP BY u.service, u.stage, u.outcome, u.http_status, u.error_message
    ) AS s
    ORDER BY s.at, s.place;
END;
COMMENT ON FUNCTION document_story IS
    'What has happened to a document, oldest first: its events, and its calls to outside services, those alike as one line at the time of the last.';

CREATE FUNCTION turn_of(queue text, job_id bigint, priority integer, OUT ahead bigint, OUT expected_at timestamptz) LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT a.ahead, CASE WHEN r.per_second > 0 THEN now() + make_interval(secs => a.ahead / r.per_second) END
    FROM (
        SELECT count(*) AS ahead
        FROM (
            SELECT FROM procrastinate_jobs AS j
            WHERE j.status = 'todo' AND j.scheduled_at IS NULL AND j.queue_name = turn_of.queue
                AND (j.priority > turn_of.priority OR j.priority = turn_of.priority AND j.id < turn_of.job_id)
            LIMIT 10000
        ) AS j
    ) AS a
    CROSS JOIN (SELECT avg(t.per_second) AS per_second FROM throughput_over('10 minutes', '1 minute') AS t) AS r;
END;
COMMENT ON FUNCTION turn_of IS
    'How many jobs of its queue go before a waiting job, 10,000 at most, and when its turn comes at the rate of the last 10 minutes; null without one. Users take turns, so a user with few documents waits less.';

CREATE FUNCTION waiting_outlook(d file_extractions, OUT standing text, OUT next_at timestamptz, OUT next text) LANGUAGE plpgsql STABLE AS $$
DECLARE
    stage CONSTANT text := due_stage(d.milestone);
    queue CONSTANT text := stage_queue(stage);
    listeners bigint;
    job procrastinate_jobs;
    owner text;
    turn record;
BEGIN
    SELECT count(*) INTO listeners FROM worker_health AS w WHERE w.health = 'alive' AND (w.queues IS NULL OR queue = ANY(w.queues));
    SELECT j.* INTO job FROM procrastinate_jobs AS j WHERE j.status = 'todo' AND j.queueing_lock = stage || ':' || d.doc_id;
    SELECT o.doc_id INTO owner FROM file_extractions AS o
    WHERE d.milestone = 'upload_validated' AND o.user_id = d.user_id AND o.content_sha256 = d.content_sha256 AND o.owns_content AND o.id <> d.id;
    next_at := greatest(d.not_before, job.scheduled_at);
    standing := CASE WHEN d.state = 'retrying'
        THEN format('waits to be tried again at %s after %s: %s', stage, d.error_type, d.error_message)
        ELSE format('waits in the queue %s for %s', queue, stage)
    END || CASE WHEN d.crash_count > 0 THEN format('; its worker died or hung %s times there', d.crash_count) ELSE '' END;
    IF listeners = 0 THEN
        next := format('nothing before a worker is started that listens to the queue %s: docmill worker', queue);
        next_at := NULL;
    ELSIF next_at > now() THEN
        next := format('the next free worker of %s tries %s again', listeners, stage);
    ELSIF owner IS NOT NULL THEN
        next := format('it goes on when %s, which has the same content, has ended', owner);
    ELSIF job.id IS NOT NULL THEN
        turn := turn_of(queue, job.id, job.priority);
        next_at := turn.expected_at;
        next := format('the next free worker of %s takes it up; %s jobs of the queue go before it', listeners,
            CASE WHEN turn.ahead >= 10000 THEN '10,000 or more' ELSE turn.ahead::text END);
    ELSIF has_live_job(d.doc_id) THEN
        next := 'a worker has fetched its job and takes it up';
        next_at := now();
    ELSE
        next := 'it has lost its job; any worker alive queues it again';
        next_at := now() + interval '1 minute';
    END IF;
END;
$$;
COMMENT ON FUNCTION waiting_outlook IS 'Where a document that waits stands, and what comes next and when; next_at is null where nobody can tell.';

CREATE FUNCTION document_outlook(d file_extractions, OUT standing text, OUT next_at timestamptz, OUT next text) LANGUAGE plpgsql STABLE AS $$
DECLARE
    stage CONSTANT text := due_stage(d.milestone);
    letter dead_letters;
BEGIN
    CASE d.state
        WHEN 'working' THEN
            IF d.lease_until < now() THEN
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
            standing := format('a duplicate of %s, whose passages stand for it', d.duplicate_of);
            next := 'nothing, while that one is there; if it is deleted, this one is worked on';
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
COMMENT ON FUNCTION document_outlook IS 'Where a document stands, and what comes next and when; next_at is null where nothing is to come or nobody can tell.';

CREATE FUNCTION explain_document(doc_id text) RETURNS TABLE (
    tense text, at timestamptz, stage text, what text, took_ms double precision, worker text, detail jsonb
) LANGUAGE plpgsql STABLE AS $$
#variable_conflict use_column
DECLARE
    d file_extractions;
    outlook record;
BEGIN
    RETURN QUERY SELECT 'past', s.at, s.stage, s.what, s.took_ms, s.worker, s.detail FROM document_story(explain_document.doc_id) AS s;
    IF FOUND THEN
        SELECT f.* INTO d FROM file_extractions AS f WHERE f.doc_id = explain_document.doc_id;
    ELSE
        SELECT f.* INTO d FROM file_extractions AS f WHERE f.doc_id = explain_document.doc_id;
        IF NOT FOUND THEN
            RAISE EXCEPTION 'there is no document "%"', coalesce(explain_document.doc_id, 'null') USING ERRCODE = 'no_data_found';
        END IF;
    END IF;
    IF d.id IS NULL THEN
        RETURN QUERY SELECT 'now', now(), NULL, 'gone; its events are all that is left', NULL::float8, NULL, '{}'::jsonb;
        RETURN;
    END IF;
    outlook := document_outlook(d);
    RETURN QUERY SELECT 'now', now(), due_stage(d.milestone), outlook.standing, NULL::float8,
        CASE d.state WHEN 'working' THEN d.claimed_by END, jsonb_strip_nulls(jsonb_build_object(
            'milestone', d.milestone, 'state', d.state, 'version', d.version, 'served_version', d.served_version, 'retry_count', d.retry_count,
            'crash_count', d.crash_count, 'lease_until', d.lease_until));
    RETURN QUERY SELECT 'next', outlook.next_at, CASE WHEN d.state IN ('queued', 'working', 'retrying') THEN due_stage(d.milestone) END,
        outlook.next, NULL::float8, NULL, '{}'::jsonb;
END;
$$;
COMMENT ON FUNCTION explain_document IS
    'The whole story of a document: a line for each thing that happened (tense past), where it stands (now) and what comes next (next; at is null where nobody can tell).';

CALL pin_search_path();
