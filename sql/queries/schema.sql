-- What the migration runner and the connection check ask.

-- name: lock_migrations
SELECT pg_advisory_lock(%(key)s);

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

-- name: applied_migrations
SELECT m.name FROM docmill_migrations AS m WHERE m.component = %(component)s;

-- name: record_migration
INSERT INTO docmill_migrations (component, name) VALUES (%(component)s, %(name)s);

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
    current_user AS role,
    current_database() AS database;

-- name: limit_transactions
-- Ends a session, and with it its locks, when its process falls silent in mid-transaction; local: for this transaction alone.
SELECT set_config('idle_in_transaction_session_timeout', %(idle_ms)s, %(local)s),
    set_config('transaction_timeout', %(transaction_ms)s, %(local)s);
