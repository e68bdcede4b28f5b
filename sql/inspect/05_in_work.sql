-- What is being worked on right now, by whom, and since when?
SELECT s.doc_id, s.file_name, s.stage_due AS stage, date_trunc('second', now() - s.updated_at) AS since_last_result, s.claimed_by AS worker,
    NOT EXISTS (
        SELECT FROM worker_health AS w WHERE w.worker = s.claimed_by AND w.health IN ('alive', 'stopping')
    ) AS worker_silent
FROM document_status AS s
WHERE s.state = 'working'
ORDER BY s.updated_at
LIMIT 100;
