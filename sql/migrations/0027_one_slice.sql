-- Slices lie on the clock's round times, so that a span as long as one slice fell into two of them, and whoever asked how long stages took in
-- the last ten minutes was told every stage twice. A slice as long as the span is now the span itself.

CREATE OR REPLACE FUNCTION stage_latency_over(span interval DEFAULT '1 hour', bucket interval DEFAULT '1 hour') RETURNS TABLE (
    bucket_at timestamptz, stage text, runs bigint, failures bigint, p50_ms double precision, p95_ms double precision, max_ms double precision,
    mean_cpu_ms double precision, max_memory_mb double precision
) LANGUAGE sql STABLE
SET enable_sort = off
SET work_mem = '32MB'
SET jit = off
BEGIN ATOMIC
    -- The planner takes the groups for as many as the runs, and would sort these: hence the settings.
    -- Sorting all runs to find the middle one would take as long again as reading them. Runs that took about the same, within 4 %, are counted
    -- together, and the mean of those in the middle stands for it.
    WITH alike AS MATERIALIZED (
        SELECT CASE WHEN bucket >= span THEN now() - span ELSE date_bin(bucket, e.at, 'epoch') END AS bucket_at,
            e.stage, round(ln(greatest(e.duration_ms, 0.001)) * 25) AS size,
            count(*) AS tries, count(e.duration_ms) AS runs, sum(e.duration_ms) AS ms, max(e.duration_ms) AS max_ms,
            sum(e.cpu_ms) AS cpu_ms, max(e.peak_memory_mb) AS memory_mb
        FROM document_events AS e
        WHERE e.id >= event_id_since(CASE WHEN bucket >= span THEN now() - span ELSE date_bin(bucket, now() - span, 'epoch') END - interval '1 minute')
            AND e.at >= CASE WHEN bucket >= span THEN now() - span ELSE date_bin(bucket, now() - span, 'epoch') END
            AND e.stage IS NOT NULL AND e.event IN ('stage_completed', 'completed', 'retry_scheduled', 'failed')
        GROUP BY 1, 2, 3
    ), ranked AS (
        SELECT a.bucket_at, a.stage, a.tries, a.runs, a.ms / nullif(a.runs, 0) AS mean_ms, a.max_ms, a.cpu_ms, a.memory_mb,
            sum(a.runs) OVER sizes AS up_to, sum(a.runs) OVER (PARTITION BY a.bucket_at, a.stage) AS of_all
        FROM alike AS a
        WINDOW sizes AS (PARTITION BY a.bucket_at, a.stage ORDER BY a.size NULLS FIRST)
    )
    -- A failure has no duration.
    SELECT r.bucket_at, r.stage, sum(r.runs)::bigint, sum(r.tries - r.runs)::bigint,
        min(r.mean_ms) FILTER (WHERE r.up_to >= 0.5 * r.of_all), min(r.mean_ms) FILTER (WHERE r.up_to >= 0.95 * r.of_all),
        max(r.max_ms), sum(r.cpu_ms) / nullif(sum(r.runs)::double precision, 0), max(r.memory_mb)
    FROM ranked AS r
    GROUP BY r.bucket_at, r.stage
    ORDER BY r.bucket_at, array_position(ARRAY['validate', 'parse', 'check', 'chunk', 'embed', 'extract', 'finalize'], r.stage);
END;
COMMENT ON FUNCTION stage_latency_over IS
    'How long each stage took in each slice of the last `span`, in milliseconds, waiting not included; slices without runs are left out. A slice as long as the span is the span. Percentiles are good to 2 %.';
