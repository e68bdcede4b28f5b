-- Which documents have cost most in the last day?
SELECT s.doc_id, d.file_name, count(*) AS calls, round(sum(coalesce(u.cost, u.estimated_cost) * s.share::numeric), 4) AS cost
FROM circuit_breakers AS c
JOIN provider_usage AS u ON u.service = c.service AND u.started_at > now() - interval '1 day' AND u.outcome <> 'not_sent'
CROSS JOIN LATERAL unnest(u.doc_ids, u.shares) AS s (doc_id, share)
LEFT JOIN file_extractions AS d ON d.doc_id = s.doc_id
GROUP BY s.doc_id, d.file_name
ORDER BY cost DESC, s.doc_id
LIMIT 20;
