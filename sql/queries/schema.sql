-- What the migration runner and the connection check ask.

-- name: try_lock_migrations
SELECT pg_try_advisory_lock(%(key)s) AS locked;

-- name: unlock_migrations
SELECT pg_advisory_unlock(%(key)s);

-- name: create_migrations_table
DO $$
BEGIN
    IF to_regclass('docmill_migrations') IS NULL THEN
        CREATE TABLE docmill_migrations (
            component text NOT NULL,
            name text NOT NULL,
            applied_at timestamptz NOT NULL DEFAULT now(),
            PRIMARY KEY (component, name)
        );
        COMMENT ON TABLE docmill_migrations IS 'Which migrations this database has seen.';
        COMMENT ON COLUMN docmill_migrations.component IS 'docmill or procrastinate.';
        COMMENT ON COLUMN docmill_migrations.name IS 'File name of the migration.';
        COMMENT ON COLUMN docmill_migrations.applied_at IS 'When it was applied.';
    END IF;
END;
$$;

-- name: load_vector
-- The settings of an extension can be stored with a function once a session has loaded it; before that, only by a superuser.
DO $$
BEGIN
    IF to_regtype('vector') IS NOT NULL THEN
        PERFORM '[1]'::vector;
    END IF;
END;
$$;

-- name: applied_migrations
SELECT m.component, m.name FROM docmill_migrations AS m;

-- name: record_migration
INSERT INTO docmill_migrations (component, name) VALUES (%(component)s, %(name)s);

-- name: notice_lost_client
-- A session that waits for a lock looks whether its client is still there: one that was killed must not keep its place in the queue.
SELECT set_config('client_connection_check_interval', '1s', FALSE);

-- name: who_is_in_the_way
-- What a session has been waiting for longer than so many seconds, and whose transactions it waits for. Not their queries, which may hold
-- somebody's text. Nobody waits behind a wait for a virtual transaction, as of CREATE INDEX CONCURRENTLY.
WITH waiting AS MATERIALIZED (
    SELECT coalesce(l.relation::regclass::text, CASE l.locktype WHEN 'transactionid' THEN 'a row' ELSE l.locktype END) AS wanted,
        pg_blocking_pids(l.pid) AS pids
    FROM pg_locks AS l
    WHERE l.pid = %(pid)s AND NOT l.granted AND l.locktype <> 'virtualxid'
        AND l.waitstart < clock_timestamp() - make_interval(secs => %(seconds)s)
    LIMIT 1
)
SELECT format('its lock on %%s waits for ', w.wanted) || coalesce(string_agg(
    CASE
        WHEN b.pid = 0 THEN 'a prepared transaction (pg_prepared_xacts)'
        WHEN b.pid > 0 THEN format(
            'pid %%s (user %%s, application "%%s", %%s, transaction open for %%s s)', b.pid, coalesce(a.usename, '?'),
            coalesce(a.application_name, ''), coalesce(a.state, 'state not visible'),
            coalesce(round(extract(epoch FROM clock_timestamp() - a.xact_start))::text, '?')
        )
    END, ', ' ORDER BY a.xact_start
), 'somebody who has just gone')
FROM waiting AS w
LEFT JOIN LATERAL (SELECT DISTINCT u.pid FROM unnest(w.pids) AS u (pid) LIMIT 5) AS b ON TRUE
LEFT JOIN pg_stat_activity AS a ON a.pid = b.pid AND b.pid <> 0
GROUP BY w.wanted;

-- name: cancel_waiting
-- Only if it still waits.
SELECT pg_cancel_backend(l.pid) FROM pg_locks AS l WHERE l.pid = %(pid)s AND NOT l.granted AND l.locktype <> 'virtualxid' LIMIT 1;

-- name: migrations_table_exists
SELECT to_regclass('docmill_migrations') IS NOT NULL;

-- name: procrastinate_exists
SELECT to_regclass('procrastinate_jobs') IS NOT NULL;

-- name: server_facts
SELECT current_setting('server_version_num')::integer AS version_number,
    current_setting('server_version') AS version,
    (SELECT e.default_version FROM pg_available_extensions AS e WHERE e.name = 'vector') AS vector_available,
    (SELECT e.extversion FROM pg_extension AS e WHERE e.extname = 'vector') AS vector_installed,
    has_database_privilege(current_database(), 'CREATE') AS may_create,
    (SELECT r.rolsuper FROM pg_roles AS r WHERE r.rolname = current_user) AS superuser,
    (SELECT e.trusted FROM pg_available_extension_versions AS e WHERE e.name = 'vector' ORDER BY e.version DESC LIMIT 1) AS vector_trusted,
    current_setting('server_encoding') AS encoding,
    current_user AS role,
    current_database() AS database;

-- name: pin_session
-- What a database or role may have other defaults for, and docmill takes for granted: how times and spans are written, that a backslash is a
-- backslash, and that a transaction that meets another goes on. A pooler would leave the last two with a connection of the server.
SELECT set_config('datestyle', 'ISO', FALSE), set_config('standard_conforming_strings', 'on', FALSE),
    CASE WHEN NOT %(pooled)s THEN set_config('intervalstyle', 'postgres', FALSE) END,
    CASE WHEN NOT %(pooled)s THEN set_config('default_transaction_isolation', 'read committed', FALSE) END;

-- name: limit_transactions
-- Ends a session, and with it its locks, when its process falls silent in mid-transaction; local: for this transaction alone.
SELECT set_config('idle_in_transaction_session_timeout', %(idle_ms)s, %(local)s),
    set_config('transaction_timeout', %(transaction_ms)s, %(local)s);
