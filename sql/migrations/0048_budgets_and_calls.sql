-- Documents that a budget had sent back waited for the times that they were told, whatever became of those before them. Where those were
-- cancelled or deleted, the limit was raised, or the share that a 429 had lowered grew back, the budget lay idle for hours, while those behind,
-- and whoever came after them, went on waiting. Now workers bring them forward as far as the even rate allows.
--
-- And calls that were let through and not sent after all counted as calls in the views, where many of them made a service look better than it was.

CREATE INDEX file_extractions_waiting_for_budget ON file_extractions (waiting_for, not_before)
    WHERE state = 'retrying' AND waiting_for IS NOT NULL AND waiting_place IS NULL;
COMMENT ON INDEX file_extractions_waiting_for_budget IS 'Who waits for the budget of a service, in the order of their times.';

CREATE FUNCTION is_idle(b provider_budgets) RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT greatest(b.paused_until, b.last_send_at, b.next_request_at, b.next_token_at) <= now();
$$;
COMMENT ON FUNCTION is_idle(provider_budgets) IS 'Whether a budget could give out more now, even without a burst.';

CREATE FUNCTION use_idle_budget(service text, at_most integer, seconds double precision) RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
    b provider_budgets;
    horizon CONSTANT timestamptz := now() + make_interval(secs => seconds);
    part float8;
    documents float8;
    tokens float8;
    requests float8;
    room integer;
    brought integer := 0;
BEGIN
    -- Two at once would each bring as many as there is room for.
    IF NOT pg_try_advisory_xact_lock(hashtextextended('docmill idle budget ' || use_idle_budget.service, 0)) THEN
        RETURN 0;
    END IF;
    SELECT p.* INTO b FROM provider_budgets AS p WHERE p.service = use_idle_budget.service;
    IF NOT FOUND OR NOT is_idle(b) THEN
        RETURN 0;
    END IF;
    part := budget_share(b.share, b.share_at, now()) * seconds / 66;
    -- A request may hold many documents.
    SELECT greatest(1, avg(cardinality(u.doc_ids))), avg(u.estimated_tokens)::float8 INTO documents, tokens
    FROM (
        SELECT l.doc_ids, l.estimated_tokens
        FROM provider_usage AS l
        WHERE l.service = use_idle_budget.service
        ORDER BY l.started_at DESC
        LIMIT 20
    ) AS u;
    requests := least(part * nullif(b.requests_per_minute, 0), part * nullif(b.tokens_per_minute, 0) / nullif(tokens, 0));
    -- One may always be sent where nothing is under way; without limits any number.
    room := least(at_most, coalesce(documents * CASE WHEN requests < 1 THEN 1 ELSE floor(requests) END, at_most)) - (
        -- Others may have brought some forward just now.
        SELECT count(*) FROM (
            SELECT FROM file_extractions AS d
            WHERE d.waiting_for = use_idle_budget.service AND d.state = 'retrying' AND d.not_before <= horizon
                AND (d.waiting_place IS NULL OR d.waiting_place = 0)
            LIMIT at_most
        ) AS due
    );
    IF room > 0 THEN
        WITH free AS MATERIALIZED (
            SELECT d.id FROM file_extractions AS d
            WHERE d.waiting_for = use_idle_budget.service AND d.state = 'retrying' AND d.waiting_place IS NULL AND d.not_before > horizon
            ORDER BY d.not_before
            LIMIT room
            FOR NO KEY UPDATE SKIP LOCKED
        )
        UPDATE file_extractions AS d SET waiting_place = 0 FROM free AS f WHERE d.id = f.id;
        GET DIAGNOSTICS brought = ROW_COUNT;
        IF brought > 0 THEN
            brought := bring_forward(use_idle_budget.service, brought, seconds);
        END IF;
    END IF;
    -- Whoever is sent back from now on comes after those who wait, and not after those who did.
    UPDATE provider_budgets AS p
    SET overflow_at = least(p.overflow_at, greatest(now(), (
            SELECT max(d.not_before) FROM file_extractions AS d
            WHERE d.waiting_for = use_idle_budget.service AND d.state = 'retrying' AND d.waiting_place IS NULL
        )))
    WHERE p.service = use_idle_budget.service;
    RETURN brought;
END;
$$;
COMMENT ON FUNCTION use_idle_budget IS
    'Where a service''s budget lies idle: has as many of the documents that wait for it as fit into so many seconds start within them, at most so many, and returns how many. Every worker does so every few seconds.';

COMMENT ON COLUMN file_extractions.waiting_place IS
    'Its place among those that wait for the breaker. Once the service is up, the document is brought forward in this order; null: it waits for the service''s budget, and is brought forward where that lies idle.';
COMMENT ON COLUMN provider_budgets.overflow_at IS
    'The time given to the last call that was sent back to the queue, or of the last that still waits.';
COMMENT ON FUNCTION bring_forward IS
    'Has at most so many documents with a place among those that wait for a service for longer than `seconds` start within them, evenly spread, and returns how many. Every worker does so every few seconds.';

CREATE OR REPLACE VIEW cost_by_document WITH (security_invoker = true) AS
SELECT
    s.doc_id, s.batch_id, s.user_id, u.kind,
    count(*) AS calls,
    count(*) FILTER (WHERE u.outcome = 'ok') AS calls_ok,
    count(*) FILTER (WHERE u.outcome = 'unknown' AND u.give_up_at < now()) AS calls_unknown,
    round(sum(u.tokens_in * s.share)) AS tokens_in,
    round(sum(u.tokens_out * s.share)) AS tokens_out,
    sum(u.pages * s.share) AS pages,
    sum(coalesce(u.cost, u.estimated_cost) * s.share::numeric) AS cost,
    min(u.started_at) AS first_call_at,
    max(u.started_at) AS last_call_at
FROM provider_usage AS u, unnest(u.doc_ids, u.batch_ids, u.user_ids, u.shares) AS s (doc_id, batch_id, user_id, share)
WHERE u.outcome <> 'not_sent'
GROUP BY s.doc_id, s.batch_id, s.user_id, u.kind;

CREATE OR REPLACE VIEW cost_by_batch WITH (security_invoker = true) AS
SELECT
    s.batch_id, u.kind, u.model,
    count(DISTINCT u.id) AS calls,
    count(DISTINCT u.id) FILTER (WHERE u.outcome = 'ok') AS calls_ok,
    count(DISTINCT u.id) FILTER (WHERE u.outcome = 'unknown' AND u.give_up_at < now()) AS calls_unknown,
    count(DISTINCT s.doc_id) AS documents,
    round(sum(u.tokens_in * s.share)) AS tokens_in,
    round(sum(u.tokens_out * s.share)) AS tokens_out,
    sum(u.pages * s.share) AS pages,
    sum(coalesce(u.cost, u.estimated_cost) * s.share::numeric) AS cost,
    min(u.started_at) AS first_call_at,
    max(u.started_at) AS last_call_at
FROM provider_usage AS u, unnest(u.doc_ids, u.batch_ids, u.shares) AS s (doc_id, batch_id, share)
WHERE s.batch_id IS NOT NULL AND u.outcome <> 'not_sent'
GROUP BY s.batch_id, u.kind, u.model;

CREATE OR REPLACE VIEW provider_health WITH (security_invoker = true) AS
SELECT
    c.service,
    CASE
        WHEN c.state <> 'closed' AND c.try_at < now() - interval '1 hour' THEN 'idle'
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
        WHEN c.state <> 'closed' AND c.try_at < now() - interval '1 hour' THEN NULL
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

CALL pin_search_path();
