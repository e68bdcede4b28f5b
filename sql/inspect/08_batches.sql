-- How far are the latest batches, how quickly do they go, and when will they be through?
SELECT b.batch_id, b.source_path, b.status, b.percent, b.files_unfinished, b.files_failed, b.files_cancelled, round(b.per_second::numeric, 2) AS per_second,
    date_trunc('second', now() + make_interval(secs => b.seconds_left)) AS through_at, b.last_progress_at
FROM batch_progress AS b
WHERE b.batch_id IN (SELECT j.batch_id FROM processing_jobs AS j ORDER BY j.id DESC LIMIT 20)
ORDER BY b.started_at DESC;
