-- Who holds documents or other rows in an open transaction, since when, doing what, and who waits for it? A holder shows also while nobody waits.
-- Of other users' sessions only members of pg_read_all_stats see more than the pid, user and application; end one: SELECT pg_terminate_backend(pid).
WITH held AS (
    -- A lock on a row shows as one on its table, of whoever has written or locked rows there in a transaction that is still open.
    SELECT l.pid, string_agg(DISTINCT c.relname, ', ' ORDER BY c.relname) AS tables
    FROM pg_locks AS l
    JOIN pg_database AS b ON b.oid = l.database AND b.datname = current_database()
    JOIN pg_class AS c ON c.oid = l.relation AND c.relkind IN ('r', 'p') AND c.relnamespace <> 'pg_catalog'::regnamespace
    WHERE l.granted AND l.mode NOT IN ('AccessShareLock', 'ShareUpdateExclusiveLock') AND l.pid IS DISTINCT FROM pg_backend_pid()
    GROUP BY l.pid, l.virtualtransaction
), blocked AS (
    SELECT u.pid, string_agg(w.pid || ' (' || w.usename || ', ' || w.application_name || ')', ', ' ORDER BY w.pid) AS waiters, count(*) AS waiting
    FROM (SELECT DISTINCT l.pid FROM pg_locks AS l WHERE NOT l.granted) AS l
    JOIN pg_stat_activity AS w ON w.pid = l.pid AND w.datname = current_database()
    CROSS JOIN LATERAL (SELECT DISTINCT p.pid FROM unnest(pg_blocking_pids(l.pid)) AS p (pid)) AS u
    GROUP BY u.pid
)
SELECT p.pid, a.usename AS user_name, CASE WHEN p.pid = 0 THEN 'a prepared transaction (pg_prepared_xacts)' ELSE a.application_name END AS application,
    date_trunc('second', a.xact_start) AS since, p.tables AS holds, p.waiters AS blocks,
    CASE WHEN a.state = 'active' THEN left(regexp_replace(a.query, '\s+', ' ', 'g'), 80) ELSE coalesce(a.state, 'not visible') END AS does
FROM (
    SELECT coalesce(h.pid, b.pid, 0) AS pid, h.tables, b.waiters, b.waiting
    FROM held AS h
    FULL JOIN blocked AS b ON b.pid = coalesce(h.pid, 0)
) AS p
LEFT JOIN pg_stat_activity AS a ON a.pid = p.pid AND p.pid <> 0
ORDER BY p.waiting DESC NULLS LAST, a.xact_start
LIMIT 50;
