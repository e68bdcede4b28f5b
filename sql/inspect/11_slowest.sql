-- Which documents took longest at a stage in the last day?
SELECT e.doc_id, d.file_name, d.file_type, e.stage, round(e.duration_ms / 1000) AS seconds, round(e.peak_memory_mb) AS memory_mb, e.at
FROM (
    SELECT v.doc_id, v.stage, v.duration_ms, v.peak_memory_mb, v.at
    FROM document_events AS v
    WHERE v.id >= event_id_since(now() - interval '1 day 1 minute') AND v.at > now() - interval '1 day' AND v.duration_ms IS NOT NULL
    ORDER BY v.duration_ms DESC
    LIMIT 20
) AS e
LEFT JOIN file_extractions AS d ON d.doc_id = e.doc_id
ORDER BY e.duration_ms DESC;
