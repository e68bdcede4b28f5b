-- What fails most? Open dead letters by stage and kind, with the beginning of one message.
SELECT l.stage, l.error_type, count(*) AS documents, max(l.created_at) AS latest, left(min(l.error_message), 120) AS for_example
FROM dead_letters AS l
WHERE l.resolved_at IS NULL
GROUP BY l.stage, l.error_type
ORDER BY count(*) DESC;
