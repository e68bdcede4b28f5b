-- Documents that a budget had sent back waited for the times that they were told, whatever became of those before them. Where those were
-- cancelled or deleted, the limit was raised, or the share that a 429 had lowered grew back, the budget lay idle for hours, while those behind,
-- and whoever came after them, went on waiting. Now workers bring them forward as far as the even rate allows.

CREATE INDEX file_extractions_waiting_for_budget ON file_extractions (waiting_for, not_before)
    WHERE state = 'retrying' AND waiting_for IS NOT NULL AND waiting_place IS NULL;
COMMENT ON INDEX file_extractions_waiting_for_budget IS 'Who waits for the budget of a service, in the order of their times.';

CREATE FUNCTION is_idle(b provider_budgets) RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT b.requests_per_minute + b.tokens_per_minute > 0
        AND greatest(b.paused_until, b.last_send_at, b.next_request_at, b.next_token_at) <= now();
$$;
COMMENT ON FUNCTION is_idle(provider_budgets) IS 'Whether a limited budget could give out more now, even without a burst.';

CREATE FUNCTION use_idle_budget(service text, at_most integer, seconds double precision) RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
    b provider_budgets;
    horizon CONSTANT timestamptz := now() + make_interval(secs => seconds);
    part float8;
    tokens float8;
    room integer;
    brought integer := 0;
BEGIN
    SELECT p.* INTO b FROM provider_budgets AS p WHERE p.service = use_idle_budget.service;
    IF NOT FOUND OR NOT is_idle(b) THEN
        RETURN 0;
    END IF;
    part := budget_share(b.share, b.share_at, now()) * seconds / 66;
    SELECT avg(u.estimated_tokens)::float8 INTO tokens
    FROM (
        SELECT l.estimated_tokens FROM provider_usage AS l WHERE l.service = use_idle_budget.service ORDER BY l.started_at DESC LIMIT 20
    ) AS u;
    room := greatest(1, floor(least(
        at_most, part * nullif(b.requests_per_minute, 0), part * nullif(b.tokens_per_minute, 0) / nullif(tokens, 0)
    ))) - (
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

CALL pin_search_path();
