-- Which tables are large, and are they looked after? Many dead rows with no vacuum for long mean an old transaction or a busy autovacuum.
SELECT t.relname AS table_name, pg_size_pretty(pg_total_relation_size(t.relid)) AS size, t.n_live_tup AS rows, t.n_dead_tup AS dead_rows,
    greatest(t.last_vacuum, t.last_autovacuum) AS vacuumed, greatest(t.last_analyze, t.last_autoanalyze) AS analyzed
FROM pg_stat_user_tables AS t
ORDER BY pg_total_relation_size(t.relid) DESC
LIMIT 20;
