-- Which stage takes the time, and did it do so an hour ago?
SELECT l.stage, l.bucket_at AS hour, l.runs, l.failures, round(l.p50_ms::numeric) AS p50_ms, round(l.p95_ms::numeric) AS p95_ms,
    round(l.max_ms::numeric) AS max_ms
FROM stage_latency_over('1 hour', '1 hour') AS l
ORDER BY array_position(ARRAY['validate', 'parse', 'check', 'chunk', 'embed', 'extract', 'finalize'], l.stage), l.bucket_at;
