-- What have outside services cost, day by day (UTC, as in docmill serve) for a week? The first day is today.
SELECT u.day, c.service, u.calls, u.tokens_in, u.tokens_out, u.pages, round(u.cost, 4) AS cost
FROM circuit_breakers AS c
CROSS JOIN LATERAL (
    SELECT (u.started_at AT TIME ZONE 'UTC')::date AS day, count(*) AS calls, sum(u.tokens_in) AS tokens_in, sum(u.tokens_out) AS tokens_out,
        sum(u.pages) AS pages, sum(coalesce(u.cost, u.estimated_cost)) AS cost
    FROM provider_usage AS u
    WHERE u.service = c.service AND u.started_at >= date_trunc('day', now(), 'UTC') - interval '6 days' AND u.outcome <> 'not_sent'
    GROUP BY 1
) AS u
ORDER BY u.day DESC, u.cost DESC;
