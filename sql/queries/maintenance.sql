-- What looking after the vector indexes asks and does. {name}, {table}, {model} and {dimensions} are quoted by the caller.

-- name: vector_index_facts
SELECT
    (SELECT count(*) FROM (
        SELECT FROM {table} AS c WHERE c.embedding_model = %(model)s LIMIT %(threshold)s
    ) AS c) >= %(threshold)s AS is_large,
    (SELECT count(*) FROM (
        SELECT FROM file_extractions AS d WHERE d.state IN ('queued', 'working', 'retrying') LIMIT %(busy)s
    ) AS d) >= %(busy)s AS is_busy,
    (SELECT i.indisvalid FROM pg_index AS i WHERE i.indexrelid = to_regclass(%(name)s)) AS is_valid,
    is_index_being_built(to_regclass(%(name)s)) AS is_being_built,
    (SELECT pg_has_role(t.relowner, 'SET') FROM pg_class AS t WHERE t.oid = to_regclass(%(table)s)) AS may_build;

-- name: act_as_owner_of
-- Indexes are built and dropped by the owner of their table alone. Returns nothing where whoever is connected may not take that role on.
SELECT set_config('role', pg_get_userbyid(t.relowner), FALSE)
FROM pg_class AS t
WHERE t.oid = to_regclass(%(table)s) AND pg_has_role(t.relowner, 'SET');

-- name: vector_index_exists
SELECT to_regclass(%(name)s) IS NOT NULL AS exists;

-- name: try_lock_index
SELECT pg_try_advisory_lock(hashtextextended(%(name)s, 0)) AS locked;

-- name: unlock_index
SELECT pg_advisory_unlock(hashtextextended(%(name)s, 0));

-- name: lift_limits
-- Building and dropping take as long as they take, and wait for whoever writes. Cut off by a limit that the database or role has for other
-- sessions, a build would be begun again and again.
SELECT set_config('statement_timeout', '0', FALSE), set_config('lock_timeout', '0', FALSE), set_config('transaction_timeout', '0', FALSE);

-- name: drop_vector_index
DROP INDEX CONCURRENTLY IF EXISTS {name};

-- name: build_in_parallel
-- Postgres takes the pages of a table for the work there is, but vectors lie beside them: it would build alone what takes minutes.
SELECT set_config('min_parallel_table_scan_size', '0', FALSE);

-- name: create_vector_index
-- The expression and the condition are the ones that search_by_vector uses; anything else would not be found by the planner.
CREATE INDEX CONCURRENTLY {name} ON {table}
USING hnsw ((embedding::vector({dimensions})) vector_cosine_ops)
WHERE embedding_model = {model};
