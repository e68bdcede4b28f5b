-- What a review of searches and views has found: a rare word beside a common one was lost, searches with a file type missed a document whose
-- new version was waiting, and builds of indexes by another login were taken for broken ones.

CREATE OR REPLACE FUNCTION matching_chunks(
    query_text text, user_id text, batch_id text, file_type text, metadata jsonb, limit_to integer, language text
) RETURNS TABLE (chunk_id uuid, score double precision) LANGUAGE plpgsql STABLE SECURITY DEFINER
SET jit = off
AS $$
-- Ranking every passage that holds any of the words would read half the table for a word like "contract". The passages that hold the rarest
-- words are ranked and, if they are too few (because of a filter, say), others that hold any beside them.
DECLARE
    ranked CONSTANT integer := 3000;
    filter text := search_filter(user_id, batch_id, file_type, metadata);
    queries tsquery[];
    weights double precision[];
    rarest text;
    everything text;
    anything text;
    first text;
    source text;
    ids uuid[];
    scores double precision[];
BEGIN
    PERFORM check_search_limit(limit_to);
    SELECT array_agg(w.query), array_agg(w.weight), string_agg(w.query::text, '|') FILTER (WHERE w.upto <= ranked),
        string_agg(format('(%s)', w.query), '&'), string_agg(w.query::text, '|')
    INTO queries, weights, rarest, everything, anything
    FROM (SELECT w.*, sum(w.passages) OVER (ORDER BY w.passages, w.query::text) AS upto FROM weigh_words(query_text, language) AS w) AS w;
    first := coalesce(rarest, everything);
    IF first IS NULL THEN
        RETURN;
    END IF;
    FOR pass IN 1..2 LOOP
        source := format(
            '(SELECT c.id, c.fulltext || '''' AS fulltext FROM document_chunks AS c WHERE c.fulltext @@ %L AND %s LIMIT %s)',
            first, filter, ranked
        );
        IF pass = 2 THEN
            source := source || format(
                ' UNION ALL (SELECT c.id, c.fulltext || '''' FROM document_chunks AS c WHERE c.fulltext @@ %L AND NOT c.fulltext @@ %L AND %s LIMIT %s)',
                anything, first, filter, ranked
            );
        END IF;
        EXECUTE format(
            'SELECT array_agg(f.id ORDER BY f.score DESC, f.id), array_agg(f.score ORDER BY f.score DESC, f.id)
             FROM (
                 SELECT c.id, (
                     SELECT sum(w.weight * ts_rank(''{1, 1, 1, 1}'', c.fulltext, w.query, 1))
                     FROM unnest($1, $2) AS w (query, weight)
                 ) AS score
                 FROM (%s) AS c
                 ORDER BY score DESC, c.id
                 LIMIT %s
             ) AS f', source, limit_to
        ) INTO ids, scores USING queries, weights;
        EXIT WHEN cardinality(ids) = limit_to OR anything = first;
    END LOOP;
    RETURN QUERY SELECT f.id, f.score FROM unnest(ids, scores) AS f (id, score);
END;
$$;

CREATE OR REPLACE FUNCTION accept_document(
    doc_id text, user_id text, file_name text, file_path text, source_path text, file_size bigint, content_sha256 text,
    metadata jsonb, priority integer, correlation_id text, batch_id text, run_id uuid, lock_timeout_ms integer,
    OUT outcome text, OUT version integer, OUT state document_state
) LANGUAGE plpgsql SET lock_timeout FROM CURRENT AS $$
-- The SET clause restores the caller's own lock_timeout on the way out.
#variable_conflict use_column
DECLARE
    known file_extractions;
    run_status text;
    tries_left integer := 10;
BEGIN
    PERFORM set_config('lock_timeout', accept_document.lock_timeout_ms || 'ms', TRUE);
    IF accept_document.run_id IS NOT NULL THEN
        SELECT b.status INTO run_status
        FROM processing_jobs AS b WHERE b.batch_id = accept_document.batch_id AND b.run_id = accept_document.run_id;
        IF run_status IS NULL OR run_status = 'cancelled' THEN
            RAISE EXCEPTION 'batch "%": %', accept_document.batch_id, CASE
                WHEN run_status = 'cancelled' THEN 'this run of it has been cancelled'
                WHEN EXISTS (SELECT FROM processing_jobs AS b WHERE b.batch_id = accept_document.batch_id) THEN 'a newer run has begun'
                ELSE 'it has been deleted'
            END USING ERRCODE = 'object_not_in_prerequisite_state';
        END IF;
    END IF;
    LOOP
        INSERT INTO file_extractions AS d (
            doc_id, batch_id, run_id, user_id, file_name, file_path, source_path, file_size, content_sha256, priority, correlation_id, metadata
        ) VALUES (
            accept_document.doc_id, accept_document.batch_id, accept_document.run_id, accept_document.user_id,
            accept_document.file_name, accept_document.file_path, accept_document.source_path, accept_document.file_size,
            accept_document.content_sha256, accept_document.priority, accept_document.correlation_id, accept_document.metadata
        ) ON CONFLICT (doc_id) DO NOTHING
        RETURNING d.* INTO known;
        IF FOUND THEN
            outcome := 'accepted';
            EXIT;
        END IF;
        SELECT d.* INTO known FROM file_extractions AS d WHERE d.doc_id = accept_document.doc_id FOR UPDATE;
        EXIT WHEN FOUND;
        -- Deleted while this waited for the lock: then it is a new document. Or there for good, and hidden by row-level security.
        tries_left := tries_left - 1;
        EXIT WHEN tries_left = 0;
    END LOOP;
    IF outcome IS NULL THEN
        IF known.user_id IS DISTINCT FROM accept_document.user_id THEN
            RAISE EXCEPTION 'doc_id "%" is taken; choose another', accept_document.doc_id USING ERRCODE = 'unique_violation';
        END IF;
        IF known.content_sha256 = accept_document.content_sha256 THEN
            -- The same content again: nothing happens, except that a cancelled document is taken up where it was left.
            UPDATE file_extractions AS d SET batch_id = accept_document.batch_id, run_id = accept_document.run_id
            WHERE d.id = known.id AND d.run_id IS DISTINCT FROM accept_document.run_id AND accept_document.run_id IS NOT NULL;
            IF known.replaced_by IS NOT NULL THEN
                -- Its file is back where it was before it was moved.
                UPDATE file_extractions AS d SET replaced_by = NULL WHERE d.id = known.id;
            END IF;
            IF known.state <> 'cancelled' THEN
                outcome := 'unchanged';
                version := known.version;
                state := known.state;
                RETURN;
            END IF;
            UPDATE file_extractions AS d
            SET state = 'queued', claim = d.claim + 1, claim_job_id = NULL, retry_count = 0, crash_count = 0, lone_crash_count = 0,
                requeue_count = 0, alone = FALSE, not_before = NULL, processing_completed_at = NULL, updated_at = now()
            WHERE d.id = known.id RETURNING d.* INTO known;
            outcome := 'resumed';
            UPDATE dead_letters AS l SET resolved_at = now(), resolution = 'requeued'
            WHERE l.doc_id = known.doc_id AND l.resolved_at IS NULL;
        ELSE
            UPDATE file_extractions AS d
            SET version = d.version + 1, milestone = 'uploaded', state = 'queued', claim = d.claim + 1, claim_job_id = NULL,
                lease_until = NULL, batch_id = accept_document.batch_id, run_id = accept_document.run_id,
                file_name = accept_document.file_name, file_path = accept_document.file_path,
                source_path = accept_document.source_path, file_size = accept_document.file_size,
                content_sha256 = accept_document.content_sha256,
                -- What is served keeps its type, by which searches find it, until validate knows the new one.
                file_type = CASE WHEN d.served_version IS NOT NULL THEN d.file_type END,
                mime_type = CASE WHEN d.served_version IS NOT NULL THEN d.mime_type END,
                page_count = NULL, chunk_count = NULL, duplicate_of = NULL, priority = accept_document.priority,
                correlation_id = accept_document.correlation_id, metadata = accept_document.metadata, retry_count = 0,
                crash_count = 0, lone_crash_count = 0, requeue_count = 0, alone = FALSE, not_before = NULL,
                error_type = NULL, error_message = NULL, updated_at = now(),
                processing_started_at = NULL, processing_completed_at = NULL
            WHERE d.id = known.id RETURNING d.* INTO known;
            outcome := 'new_version';
            DELETE FROM chunk_buffer AS b WHERE b.doc_id = known.doc_id;
            DELETE FROM vector_buffer AS b WHERE b.doc_id = known.doc_id;
            DELETE FROM extraction_buffer AS b WHERE b.doc_id = known.doc_id;
            DELETE FROM document_markdown AS m
            WHERE m.doc_id = known.doc_id AND m.version IS DISTINCT FROM known.served_version;
            UPDATE dead_letters AS l SET resolved_at = now(), resolution = 'superseded'
            WHERE l.doc_id = known.doc_id AND l.resolved_at IS NULL;
        END IF;
        PERFORM drop_waiting_jobs(known.doc_id);
    END IF;
    PERFORM defer_stage(known.doc_id, due_stage(known.milestone), known.priority);
    INSERT INTO document_events (doc_id, version, batch_id, user_id, correlation_id, event, claim, detail)
    VALUES (known.doc_id, known.version, known.batch_id, known.user_id, known.correlation_id,
        CASE outcome WHEN 'accepted' THEN 'submitted' ELSE 'resubmitted' END, known.claim,
        jsonb_build_object('outcome', outcome, 'file_name', known.file_name, 'file_size', known.file_size));
    version := known.version;
    state := known.state;
END;
$$;

CREATE FUNCTION is_index_being_built(index_id oid) RETURNS boolean LANGUAGE sql STABLE
RETURN EXISTS (SELECT FROM pg_stat_progress_create_index AS p WHERE p.index_relid = index_id)
    -- How far others' builds are only who may read all statistics is shown, but whoever builds a vector index holds the lock of its name.
    OR EXISTS (
        SELECT FROM pg_locks AS l
        JOIN pg_class AS c ON c.oid = index_id
        WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
            AND l.database = (SELECT b.oid FROM pg_database AS b WHERE b.datname = current_database())
            AND (l.classid::bigint << 32 | l.objid::bigint) = hashtextextended(c.relname, 0)
    );
COMMENT ON FUNCTION is_index_being_built IS 'Whether somebody builds an index at this moment, as far as this login can see: any vector index, others if they are its own.';

CREATE OR REPLACE VIEW index_health WITH (security_invoker = true) AS
SELECT
    t.relname::text AS table_name, c.relname::text AS index_name, m.amname::text AS kind,
    CASE WHEN b.is_being_built THEN 'building' WHEN NOT i.indisvalid OR NOT i.indisready THEN 'invalid' ELSE 'ok' END AS health,
    i.indisunique AS is_unique, pg_relation_size(c.oid) AS size_bytes, s.idx_scan AS scans, s.last_idx_scan AS last_used_at,
    round(100.0 * p.blocks_done / nullif(p.blocks_total, 0), 1) AS built_percent,
    CASE WHEN NOT b.is_being_built AND (NOT i.indisvalid OR NOT i.indisready) THEN
        CASE WHEN m.amname = 'hnsw' THEN 'a build was cut off; a worker builds it again within minutes, or: DROP INDEX ' || c.oid::regclass || ';'
            ELSE 'searches do not use it: REINDEX INDEX CONCURRENTLY ' || c.oid::regclass || ';' END
    END AS what_to_do
FROM pg_class AS t
JOIN pg_index AS i ON i.indrelid = t.oid
JOIN pg_class AS c ON c.oid = i.indexrelid AND c.relkind = 'i'
JOIN pg_am AS m ON m.oid = c.relam
LEFT JOIN pg_stat_all_indexes AS s ON s.indexrelid = c.oid
LEFT JOIN pg_stat_progress_create_index AS p ON p.index_relid = c.oid
CROSS JOIN LATERAL (SELECT (NOT i.indisvalid OR NOT i.indisready OR p.pid IS NOT NULL) AND is_index_being_built(c.oid) AS is_being_built) AS b
WHERE t.relnamespace = (SELECT o.relnamespace FROM pg_class AS o WHERE o.oid = 'file_extractions'::regclass) AND t.relkind IN ('r', 'm')
ORDER BY NOT b.is_being_built AND i.indisvalid AND i.indisready, pg_relation_size(c.oid) DESC;

CREATE OR REPLACE VIEW alert_findings WITH (security_invoker = true) AS
WITH waiting AS MATERIALIZED (
    -- Of the ten thousand that were submitted first those that are due.
    SELECT stage_queue(due_stage(w.milestone)) AS queue, w.doc_id, greatest(w.updated_at, w.not_before) AS since
    FROM (
        SELECT d.id, d.user_id, d.content_sha256, d.state, d.milestone, d.doc_id, d.updated_at, d.not_before
        FROM file_extractions AS d WHERE d.state IN ('queued', 'retrying') ORDER BY d.id LIMIT 10000
    ) AS w
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
    AND NOT is_index_being_built(i.indexrelid);

CALL pin_search_path();
