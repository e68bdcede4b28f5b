-- What is being tried again, or has killed its worker, and when is it tried next?
SELECT s.stage_due AS stage, s.error_type, count(*) AS documents, count(*) FILTER (WHERE s.crash_count > 0) AS killed_worker,
    min(s.next_try_at) AS next_try_at, left(min(s.error_message), 120) AS for_example
FROM document_status AS s
WHERE s.state IN ('queued', 'retrying') AND (s.state = 'retrying' OR s.crash_count > 0)
GROUP BY s.stage_due, s.error_type
ORDER BY count(*) DESC;
