-- What has been kept long enough goes, in windows of a table in the order in which it was written, so that no statement looks at more than
-- one window and the next one goes on behind it. Each returns how many rows went, where the next window begins, and whether there is one.

-- name: begin_pruning
-- One at a time; and from here to the end of the transaction the audit trail lets rows go.
SELECT pg_try_advisory_xact_lock(%(key)s) AS alone, set_config('docmill.prune', 'on', TRUE);

-- name: prune_jobs
-- By their events, which know the time. An application's own jobs are its own business.
WITH looked AS MATERIALIZED (
    SELECT e.id, e.job_id, e.type, e.at FROM procrastinate_events AS e WHERE e.id > %(after)s ORDER BY e.id LIMIT %(window)s
), old AS MATERIALIZED (
    SELECT DISTINCT l.job_id FROM looked AS l
    WHERE l.type IN ('succeeded', 'failed', 'cancelled', 'aborted') AND l.at < now() - make_interval(days => %(days)s)
), free AS MATERIALIZED (
    SELECT j.id
    FROM old AS o
    JOIN procrastinate_jobs AS j ON j.id = o.job_id
    WHERE j.status IN ('succeeded', 'failed', 'cancelled', 'aborted') AND j.task_name = ANY(%(tasks)s)
        AND NOT EXISTS (
            SELECT FROM procrastinate_events AS e WHERE e.job_id = j.id AND e.at >= now() - make_interval(days => %(days)s)
        )
        AND NOT EXISTS (
            SELECT FROM file_extractions AS d WHERE d.doc_id = j.args ->> 'doc_id' AND d.state IN ('queued', 'working', 'retrying')
        )
    FOR UPDATE OF j SKIP LOCKED
), gone AS (
    DELETE FROM procrastinate_jobs AS j USING free AS f WHERE j.id = f.id RETURNING j.id
)
SELECT (SELECT count(*) FROM gone) AS removed, max(l.id) AS next,
    count(*) = %(window)s AND min(l.at) < now() - make_interval(days => %(days)s) AS more
FROM looked AS l;

-- name: prune_deleted_events
-- What was written of a document until it was deleted, and after, unless a new document bears its name.
WITH looked AS MATERIALIZED (
    SELECT e.id, e.doc_id, e.at FROM document_events AS e WHERE e.event = 'deleted' AND e.id > %(after)s ORDER BY e.id LIMIT %(window)s
), old AS MATERIALIZED (
    SELECT l.doc_id, max(l.id) AS id FROM looked AS l WHERE l.at < now() - make_interval(days => %(days)s) GROUP BY l.doc_id
), gone AS (
    DELETE FROM document_events AS e USING old AS o
    WHERE e.doc_id = o.doc_id AND e.at < now() - make_interval(days => %(days)s)
        AND (e.id <= o.id OR (
            NOT EXISTS (SELECT FROM file_extractions AS d WHERE d.doc_id = o.doc_id)
            AND NOT EXISTS (SELECT FROM document_events AS m WHERE m.doc_id = o.doc_id AND m.event = 'deleted' AND m.id > o.id)
        ))
    RETURNING e.id
)
SELECT (SELECT count(*) FROM gone) AS removed, max(l.id) AS next,
    count(*) = %(window)s AND min(l.at) < now() - make_interval(days => %(days)s) AS more
FROM looked AS l;

-- name: prune_events
-- Of documents that have ended and are still there. What deletions have left is kept by a policy of its own.
WITH looked AS MATERIALIZED (
    SELECT e.id, e.doc_id, e.at, e.event FROM document_events AS e WHERE e.id > %(after)s ORDER BY e.id LIMIT %(window)s
), gone AS (
    DELETE FROM document_events AS e USING looked AS l
    WHERE e.id = l.id AND l.at < now() - make_interval(days => %(days)s) AND l.event <> 'deleted'
        AND EXISTS (
            SELECT FROM file_extractions AS d
            WHERE d.doc_id = l.doc_id AND d.state NOT IN ('queued', 'working', 'retrying')
        )
    RETURNING e.id
)
SELECT (SELECT count(*) FROM gone) AS removed, max(l.id) AS next,
    count(*) = %(window)s AND min(l.at) < now() - make_interval(days => %(days)s) AS more
FROM looked AS l;

-- name: prune_dead_letters
WITH looked AS MATERIALIZED (
    SELECT l.id, l.doc_id, l.created_at, l.resolved_at FROM dead_letters AS l WHERE l.id > %(after)s ORDER BY l.id LIMIT %(window)s
), free AS MATERIALIZED (
    SELECT l.id
    FROM dead_letters AS l
    WHERE l.id IN (SELECT k.id FROM looked AS k WHERE k.resolved_at < now() - make_interval(days => %(days)s))
        AND NOT EXISTS (SELECT FROM file_extractions AS d WHERE d.doc_id = l.doc_id AND d.state IN ('queued', 'working', 'retrying'))
    FOR UPDATE OF l SKIP LOCKED
), gone AS (
    DELETE FROM dead_letters AS l USING free AS f WHERE l.id = f.id RETURNING l.id
)
SELECT (SELECT count(*) FROM gone) AS removed, max(k.id) AS next,
    count(*) = %(window)s AND min(k.created_at) < now() - make_interval(days => %(days)s) AS more
FROM looked AS k;

-- name: prune_alerts
-- What a webhook may still be sent stays.
WITH looked AS MATERIALIZED (
    SELECT a.id, a.at, a.forwarded_at FROM alerts AS a WHERE a.id > %(after)s ORDER BY a.id LIMIT %(window)s
), free AS MATERIALIZED (
    SELECT a.id
    FROM alerts AS a
    WHERE a.id IN (
        SELECT l.id FROM looked AS l
        WHERE l.at < now() - make_interval(days => %(days)s)
            AND (l.forwarded_at IS NOT NULL OR l.at < now() - make_interval(days => %(give_up_days)s))
    )
    FOR UPDATE OF a SKIP LOCKED
), gone AS (
    DELETE FROM alerts AS a USING free AS f WHERE a.id = f.id RETURNING a.id
)
SELECT (SELECT count(*) FROM gone) AS removed, max(l.id) AS next,
    count(*) = %(window)s AND min(l.at) < now() - make_interval(days => %(days)s) AS more
FROM looked AS l;

-- name: prune_alert_conditions
-- One row for each rule and subject: a small table, looked at whole.
WITH free AS MATERIALIZED (
    SELECT c.rule, c.subject FROM alert_conditions AS c
    WHERE c.resolved_at < now() - make_interval(days => %(days)s)
    LIMIT %(window)s
    FOR UPDATE OF c SKIP LOCKED
), gone AS (
    DELETE FROM alert_conditions AS c USING free AS f WHERE c.rule = f.rule AND c.subject = f.subject RETURNING c.rule
)
SELECT count(*) AS removed, 0 AS next, count(*) = %(window)s AS more FROM gone;

-- name: prune_archives
-- Of earlier runs, once a later one has unpacked what took their place. One that nothing has taken the place of still says what was last found
-- under its path. Files go that docmill has stored; what an application submitted where it lay is the application's.
WITH looked AS MATERIALIZED (
    SELECT a.id FROM batch_archives AS a WHERE a.id > %(after)s ORDER BY a.id LIMIT %(window)s
), free AS MATERIALIZED (
    SELECT a.id
    FROM batch_archives AS a
    WHERE a.id IN (
        SELECT l.id FROM looked AS l
    )
        AND EXISTS (
            SELECT FROM batch_archives AS n
            WHERE n.batch_id = a.batch_id AND md5(n.entry_path) = md5(a.entry_path) AND n.entry_path = a.entry_path
                AND n.state = 'unpacked' AND n.ended_at < now() - make_interval(days => %(days)s) AND n.id > a.id
            -- So that it is asked for each row, by the index, and no window reads the whole table for a join; the last one first, which answers
            -- for all before it.
            ORDER BY n.ended_at DESC
            OFFSET 0
        )
        AND a.state NOT IN ('waiting', 'unpacking')
        AND EXISTS (SELECT FROM processing_jobs AS b WHERE b.batch_id = a.batch_id AND b.run_id <> a.run_id)
    FOR UPDATE OF a SKIP LOCKED
), inside AS (
    SELECT f.id FROM free AS f
    UNION
    SELECT a.id
    FROM free AS f
    JOIN batch_archives AS p ON p.parent_id = f.id
    JOIN batch_archives AS a ON a.id = p.id OR a.parent_id = p.id
), gone AS (
    DELETE FROM batch_archives AS a USING inside AS i WHERE a.id = i.id RETURNING a.batch_id, a.entry_path, a.file_path
), left_over AS (
    SELECT DISTINCT g.file_path FROM gone AS g WHERE is_stored_archive(g.file_path, g.batch_id, g.entry_path)
)
SELECT (SELECT count(*) FROM gone) AS removed,
    (SELECT count(note_file(o.file_path)) FROM left_over AS o) AS noted,
    max(l.id) AS next, count(*) = %(window)s AS more
FROM looked AS l;

-- name: prune_summaries
-- Of earlier runs, once a later one's has been there for so long. While the present run has none yet, that of the last one stays.
WITH looked AS MATERIALIZED (
    SELECT r.id, r.batch_id FROM run_summaries AS r WHERE r.id > %(after)s ORDER BY r.id LIMIT %(window)s
), latest AS MATERIALIZED (
    SELECT r.batch_id, max(r.id) AS id
    FROM run_summaries AS r
    WHERE r.batch_id IN (SELECT l.batch_id FROM looked AS l) AND r.created_at < now() - make_interval(days => %(days)s)
    GROUP BY r.batch_id
), free AS MATERIALIZED (
    SELECT r.id
    FROM looked AS k
    JOIN latest AS l ON l.batch_id = k.batch_id AND l.id > k.id
    JOIN run_summaries AS r ON r.id = k.id
    JOIN processing_jobs AS b ON b.batch_id = r.batch_id AND b.run_id <> r.run_id
    FOR UPDATE OF r SKIP LOCKED
), gone AS (
    DELETE FROM run_summaries AS r USING free AS f WHERE r.id = f.id RETURNING r.id
)
SELECT (SELECT count(*) FROM gone) AS removed, max(k.id) AS next, count(*) = %(window)s AS more FROM looked AS k;

-- name: usage_services
-- From service to service by the index, not from call to call.
WITH RECURSIVE services (service) AS (
    (SELECT u.service FROM provider_usage AS u ORDER BY u.service LIMIT 1)
    UNION ALL
    SELECT (SELECT u.service FROM provider_usage AS u WHERE u.service > s.service ORDER BY u.service LIMIT 1)
    FROM services AS s WHERE s.service IS NOT NULL
)
SELECT s.service FROM services AS s WHERE s.service IS NOT NULL;

-- name: prune_usage
WITH looked AS MATERIALIZED (
    SELECT u.id, u.started_at, u.doc_ids, u.give_up_at
    FROM provider_usage AS u
    WHERE u.service = %(service)s AND u.started_at >= %(after)s AND u.started_at < now() - make_interval(days => %(days)s)
    ORDER BY u.started_at
    LIMIT %(window)s
), free AS MATERIALIZED (
    SELECT u.id
    FROM provider_usage AS u
    WHERE u.id IN (SELECT l.id FROM looked AS l WHERE l.give_up_at < now() - interval '1 day')
        AND NOT EXISTS (
            SELECT FROM file_extractions AS d WHERE d.doc_id = ANY(u.doc_ids) AND d.state IN ('queued', 'working', 'retrying')
        )
    FOR UPDATE OF u SKIP LOCKED
), gone AS (
    DELETE FROM provider_usage AS u USING free AS f WHERE u.id = f.id RETURNING u.id
)
-- Those of the very last moment are looked at once more, should they be more than a window holds.
SELECT (SELECT count(*) FROM gone) AS removed, max(l.started_at) AS next, count(*) = %(window)s AND min(l.started_at) < max(l.started_at) AS more
FROM looked AS l;

-- name: prune_cost_totals
-- Of documents and batches that are gone, once the ledger has forgotten them too: until then a name that comes back goes on counting.
WITH looked AS MATERIALIZED (
    SELECT DISTINCT t.name FROM cost_totals AS t WHERE t.scope = %(scope)s AND t.name > %(after)s ORDER BY t.name LIMIT %(window)s
), old AS MATERIALIZED (
    SELECT l.name FROM looked AS l
    WHERE CASE %(scope)s WHEN 'document' THEN
        NOT EXISTS (SELECT FROM file_extractions AS d WHERE d.doc_id = l.name)
            AND NOT EXISTS (SELECT FROM provider_usage AS u WHERE u.doc_ids @> ARRAY[l.name])
    ELSE
        NOT EXISTS (SELECT FROM processing_jobs AS b WHERE b.batch_id = l.name)
            AND NOT EXISTS (SELECT FROM provider_usage AS u WHERE u.batch_ids @> ARRAY[l.name])
    END
), free AS MATERIALIZED (
    SELECT t.name, t.stripe FROM cost_totals AS t JOIN old AS o ON o.name = t.name WHERE t.scope = %(scope)s FOR UPDATE OF t SKIP LOCKED
), gone AS (
    DELETE FROM cost_totals AS t USING free AS f WHERE t.scope = %(scope)s AND t.name = f.name AND t.stripe = f.stripe RETURNING t.name
)
SELECT (SELECT count(*) FROM gone) AS removed, max(l.name) AS next, count(*) = %(window)s AS more FROM looked AS l;

-- name: find_referenced_files
-- Which of these paths anything in the database speaks of.
SELECT p.path
FROM unnest(%(paths)s::text[]) AS p (path)
WHERE EXISTS (SELECT FROM file_extractions AS d WHERE d.file_path = p.path)
    OR EXISTS (SELECT FROM batch_archives AS a WHERE a.file_path = p.path)
    OR EXISTS (SELECT FROM processing_jobs AS b WHERE b.zip_path = p.path)
    OR EXISTS (SELECT FROM files_to_remove AS n WHERE n.path = p.path);

-- name: users_who_deleted
-- Whoever has deleted documents in the last days.
SELECT DISTINCT v.user_id
FROM document_events AS v
WHERE v.id >= event_id_since(now() - interval '3 days') AND v.event = 'deleted' AND v.at > now() - interval '3 days';

-- name: note_missed_summaries
-- Summaries that still speak of documents that their users have deleted, as of batches that had found them unchanged. Nothing is removed here.
WITH looked AS MATERIALIZED (
    SELECT r.id, r.user_id FROM run_summaries AS r WHERE r.id > %(after)s ORDER BY r.id LIMIT %(window)s
), noted AS (
    INSERT INTO summaries_to_renew (batch_id, is_its_own)
    SELECT DISTINCT r.batch_id, FALSE
    FROM looked AS l
    JOIN run_summaries AS r ON r.id = l.id
    CROSS JOIN LATERAL jsonb_array_elements_text(summary_documents(r.ui_json, r.nested_summary)) AS e (doc_id)
    WHERE l.user_id = ANY(%(users)s) AND NOT EXISTS (SELECT FROM file_extractions AS d WHERE d.doc_id = e.doc_id)
)
SELECT 0 AS removed, max(l.id) AS next, count(*) = %(window)s AS more FROM looked AS l;
