-- What has each user cost, day by day (UTC) for a week? A call for documents of several is shared out; the first day is today.
SELECT (u.started_at AT TIME ZONE 'UTC')::date AS day, s.user_id, count(DISTINCT u.id) AS calls, count(DISTINCT s.doc_id) AS documents,
    round(sum(coalesce(u.cost, u.estimated_cost) * s.share::numeric), 4) AS cost
FROM circuit_breakers AS c
JOIN provider_usage AS u ON u.service = c.service AND u.started_at >= date_trunc('day', now(), 'UTC') - interval '6 days' AND u.outcome <> 'not_sent'
CROSS JOIN LATERAL unnest(u.doc_ids, u.user_ids, u.shares) AS s (doc_id, user_id, share)
GROUP BY 1, s.user_id
ORDER BY 1 DESC, cost DESC, s.user_id
LIMIT 200;
