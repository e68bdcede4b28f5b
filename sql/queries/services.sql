-- The shared state of outside services: see 0013_services.sql.

-- name: begin_call
-- Asks what may be spent, breaker and budget, and writes the intent of a call that is let through, in one transaction. Sent twice, because
-- the connection broke at the commit, it takes the budget twice and writes the intent once.
WITH asked AS MATERIALIZED (
    SELECT a.granted, a.wait_seconds, a.hindrance, a.over
    FROM ask_to_pay(
        %(id)s, %(doc_ids)s::text[], %(batch_ids)s::text[], %(shares)s::float8[], %(estimated_cost)s, %(max_cost_per_document)s,
        %(max_cost_per_batch)s, %(service)s, %(admitted)s, %(requests_per_minute)s, %(tokens_per_minute)s, %(tokens)s::bigint, %(patience)s
    ) AS a
), timed AS MATERIALIZED (
    -- Where there are limits the very time, whose second they have counted the call in.
    SELECT a.*, CASE
            WHEN %(requests_per_minute)s + %(tokens_per_minute)s > 0 THEN last_send_at_of(%(service)s)
            ELSE clock_timestamp() + make_interval(secs => a.wait_seconds)
        END AS send_at
    FROM asked AS a
), noted AS (
    INSERT INTO provider_usage (
        id, service, kind, model, stage, doc_ids, batch_ids, user_ids, shares, correlation_id, worker, estimated_tokens, estimated_cost,
        started_at, give_up_at
    )
    SELECT %(id)s, %(service)s, %(kind)s, %(model)s, %(stage)s, %(doc_ids)s::text[], %(batch_ids)s::text[], %(user_ids)s::text[],
        %(shares)s::float8[], %(correlation_id)s, %(worker)s, %(tokens)s, %(estimated_cost)s,
        t.send_at, t.send_at + make_interval(secs => %(total_seconds)s)
    FROM timed AS t
    WHERE t.granted AND %(recorded)s
    ON CONFLICT (id) DO NOTHING
)
SELECT t.granted, t.wait_seconds, t.hindrance, t.over, t.send_at FROM timed AS t;

-- name: finish_call
-- Writes what became of a call, once. A call whose intent was not recorded gets its row here if it failed.
WITH finished AS (
    INSERT INTO provider_usage AS u (
        id, service, kind, model, stage, doc_ids, batch_ids, user_ids, shares, correlation_id, worker, estimated_tokens, estimated_cost,
        started_at, give_up_at, outcome, http_status, request_id, error_type, error_message, tokens_in, tokens_out, pages, cost, finished_at,
        latency_ms
    ) VALUES (
        %(id)s, %(service)s, %(kind)s, %(model)s, %(stage)s, %(doc_ids)s::text[], %(batch_ids)s::text[], %(user_ids)s::text[],
        %(shares)s::float8[], %(correlation_id)s, %(worker)s, %(tokens)s, 0, clock_timestamp() - make_interval(secs => %(seconds)s),
        clock_timestamp(), %(outcome)s, %(http_status)s, %(request_id)s, %(error_type)s::document_error_type, %(error_message)s,
        %(tokens_in)s, %(tokens_out)s, %(pages)s, %(cost)s, clock_timestamp(), %(seconds)s * 1000
    )
    ON CONFLICT (id) DO UPDATE
    SET outcome = EXCLUDED.outcome, http_status = EXCLUDED.http_status, request_id = EXCLUDED.request_id, error_type = EXCLUDED.error_type,
        error_message = EXCLUDED.error_message, tokens_in = EXCLUDED.tokens_in, tokens_out = EXCLUDED.tokens_out, pages = EXCLUDED.pages,
        cost = EXCLUDED.cost, finished_at = EXCLUDED.finished_at, latency_ms = EXCLUDED.latency_ms
    WHERE u.outcome = 'unknown'
    RETURNING u.started_at
)
SELECT CASE WHEN %(difference)s::bigint <> 0 THEN settle_tokens(%(service)s, f.started_at, %(difference)s) END
FROM finished AS f;

-- name: withdraw_call
-- Writes that a call is not sent, once, and gives back what it was granted; nothing where its intent was not written.
WITH withdrawn AS (
    UPDATE provider_usage AS u
    SET outcome = 'not_sent', error_message = %(message)s, cost = 0, finished_at = clock_timestamp()
    WHERE u.id = %(id)s AND u.outcome = 'unknown'
    RETURNING u.started_at, u.estimated_tokens
)
SELECT CASE WHEN %(tokens_per_minute)s > 0 THEN settle_tokens(%(service)s, w.started_at, -w.estimated_tokens) END,
    CASE WHEN %(requests_per_minute)s > 0 THEN give_back_request(%(service)s, w.started_at) END
FROM withdrawn AS w;

-- name: give_back_request
SELECT give_back_request(%(service)s, %(send_at)s);

-- name: settle_pages
-- Sets the price of a call right that was entered with its estimate, now that its pages are known. Asked again, it changes nothing.
UPDATE provider_usage AS u SET pages = %(pages)s, cost = %(cost)s
WHERE u.doc_ids @> ARRAY[%(doc_id)s::text] AND u.kind = %(kind)s AND u.request_id = %(request_id)s AND u.outcome = 'ok'
    AND (u.pages, u.cost) IS DISTINCT FROM (%(pages)s, %(cost)s)
RETURNING u.id;

-- name: look_at_breaker
-- The breaker with the evidence of the last calls. Only asked after a failure, and where a call did not pass. Failures in a row are looked
-- for among the last calls, further back than the window: of a service that hangs, each takes as long as that, and few lie in one window.
-- What was not sent says nothing of the service. Times are compared with now(), which can be looked for in an index as clock_timestamp() cannot.
SELECT c.state, c.reason, c.refused, c.revision, c.open_seconds, c.probe_by, c.opened_count,
    extract(epoch FROM clock_timestamp())::float8 AS now,
    extract(epoch FROM c.try_at)::float8 AS try_at,
    extract(epoch FROM c.closed_at)::float8 AS closed_at,
    extract(epoch FROM c.passes_from)::float8 AS passes_from,
    coalesce(e.failures, 0) AS failures, coalesce(e.calls, 0) AS calls, coalesce(r.in_a_row, 0) AS in_a_row
FROM circuit_breakers AS c
LEFT JOIN LATERAL (
    SELECT count(*) AS calls, count(*) FILTER (WHERE u.outcome IN ('failed', 'timeout', 'bad_answer')) AS failures
    FROM provider_usage AS u
    WHERE c.state = 'closed' AND u.service = c.service AND u.outcome <> 'not_sent'
        AND u.finished_at > greatest(c.closed_at, now() - make_interval(secs => %(window_seconds)s))
        AND u.started_at > now() - make_interval(secs => %(window_seconds)s + %(total_seconds)s)
) AS e ON TRUE
LEFT JOIN LATERAL (
    SELECT count(*) FILTER (WHERE l.failed AND l.finished_at > coalesce(l.last_good_at, 'epoch')) AS in_a_row
    FROM (
        SELECT u.finished_at, u.outcome IN ('failed', 'timeout', 'bad_answer') AS failed,
            max(u.finished_at) FILTER (WHERE u.outcome IN ('ok', 'rejected')) OVER () AS last_good_at
        FROM (
            SELECT v.finished_at, v.outcome
            FROM provider_usage AS v
            WHERE c.state = 'closed' AND v.service = c.service AND v.outcome <> 'not_sent'
                AND v.finished_at > coalesce(c.closed_at, 'epoch')
                AND v.started_at > greatest(
                    c.closed_at - make_interval(secs => %(total_seconds)s),
                    now() - 10 * make_interval(secs => %(window_seconds)s + %(total_seconds)s)
                )
            ORDER BY v.started_at DESC LIMIT greatest(200, 4 * %(failures)s)
        ) AS u
    ) AS l
) AS r ON TRUE
WHERE c.service = %(service)s;

-- name: change_breaker
-- Compare and swap: no row where somebody else has changed it since, or where the decision is old. Refusals are told once.
WITH changed AS (
    UPDATE circuit_breakers AS c
    SET state = %(state)s, reason = %(reason)s, refused = %(refused)s, open_seconds = %(open_seconds)s, probe_by = %(probe_by)s,
        try_at = to_timestamp(%(try_at)s), closed_at = to_timestamp(%(closed_at)s), passes_from = to_timestamp(%(passes_from)s),
        opened_count = %(opened_count)s, waiting = 0, revision = c.revision + 1, changed_at = clock_timestamp()
    WHERE c.service = %(service)s AND c.revision = %(revision)s
        AND clock_timestamp() < to_timestamp(%(now)s) + interval '2 seconds'
    RETURNING c.service, c.revision
)
SELECT c.revision, CASE WHEN %(tell)s THEN alert(
    'service_refused', format('%%s: %%s', c.service, %(reason)s::text), jsonb_build_object('service', c.service)
) END
FROM changed AS c;

-- name: take_place
-- A place behind all who have been told to wait since the breaker last changed, from 0. A document that asks again has its place already.
WITH kept AS MATERIALIZED (
    SELECT min(d.waiting_place) AS place
    FROM file_extractions AS d
    WHERE d.doc_id = ANY(%(doc_ids)s::text[]) AND d.waiting_for = %(service)s AND d.waiting_revision = %(revision)s
)
UPDATE circuit_breakers AS c SET waiting = c.waiting + (k.place IS NULL)::integer
FROM kept AS k
WHERE c.service = %(service)s AND c.revision = %(revision)s
RETURNING coalesce(k.place, c.waiting - 1) AS place;

-- name: pause_budget
SELECT pause_budget(%(service)s, %(seconds)s);

-- name: limit_budget
SELECT limit_budget(%(service)s, %(seconds)s) AS seconds;

-- name: still_passes
-- For a call that has waited for its time: whether nothing has come in between.
SELECT breaker_passes(%(service)s, %(admitted)s) AND NOT EXISTS (
    SELECT FROM provider_budgets AS p WHERE p.service = %(service)s AND p.paused_until > clock_timestamp()
) AS passes;

-- name: list_breakers
SELECT c.service, c.state, c.reason, c.refused, c.try_at, c.changed_at, c.closed_at, c.waiting, c.opened_count,
    greatest(0, extract(epoch FROM c.try_at - now()))::float8 AS try_in_seconds,
    b.requests_per_minute, b.tokens_per_minute, b.share, b.requests_last_minute, b.tokens_last_minute, b.paused_until
FROM circuit_breakers AS c
LEFT JOIN provider_budget_use AS b ON b.service = c.service
ORDER BY c.state = 'closed', c.service;

-- name: reset_breaker
SELECT reset_breaker(%(service)s) AS known;
