-- Which content is there more than once, and what does that take up?
SELECT d.user_id, d.original, d.original_name, d.documents, d.skipped, pg_size_pretty(d.extra_bytes) AS extra
FROM duplicate_documents AS d
ORDER BY d.extra_bytes DESC NULLS LAST
LIMIT 20;
