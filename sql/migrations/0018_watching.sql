-- Rules that raise alerts by themselves, and what pruning needs.
--
-- The thresholds are rows of a table and not settings: all workers must judge alike, whichever of them happens to evaluate, and whoever is
-- woken by an alert at night must be able to change it at once, with UPDATE, without restarting anything. alert_findings says what the rules
-- find now; evaluate_alerts(), called by every worker's reconciler, makes of it one open alert for each rule and subject, tells of it with
-- alert() (NOTIFY, webhook), again every so many hours, and once more when it is over.
--
-- Every rule must cost the same whatever the backlog is: each looks at a window of its table through an index.

CREATE TABLE alert_rules (
    rule text PRIMARY KEY CHECK (rule ~ '^[a-z_]{1,60}$'),
    enabled boolean NOT NULL DEFAULT TRUE,
    severity text NOT NULL CHECK (severity IN ('warning', 'critical')),
    threshold double precision NOT NULL,
    unit text NOT NULL,
    for_seconds double precision NOT NULL DEFAULT 0 CHECK (for_seconds >= 0),
    clear_seconds double precision NOT NULL DEFAULT 300 CHECK (clear_seconds >= 0),
    repeat_hours double precision NOT NULL DEFAULT 4 CHECK (repeat_hours >= 0),
    meaning text NOT NULL,
    evaluated_at timestamptz NOT NULL DEFAULT 'epoch'
) WITH (fillfactor = 50);
COMMENT ON TABLE alert_rules IS 'When an alert is raised. Change it with UPDATE; workers go by it from their next look on. docs/operations.md says what to do for each rule.';
COMMENT ON COLUMN alert_rules.rule IS 'Name of the rule, and the kind of its alerts.';
COMMENT ON COLUMN alert_rules.enabled IS 'Whether it is looked for.';
COMMENT ON COLUMN alert_rules.severity IS 'critical: wake somebody. warning: it can wait until the morning.';
COMMENT ON COLUMN alert_rules.threshold IS 'What is too much, in the unit beside it.';
COMMENT ON COLUMN alert_rules.unit IS 'Unit of the threshold and of the values that are held against it.';
COMMENT ON COLUMN alert_rules.for_seconds IS 'How long it must have been too much before the alert is raised, in seconds.';
COMMENT ON COLUMN alert_rules.clear_seconds IS 'How long it must have been all right before the alert is over, in seconds, so that what comes and goes is one alert.';
COMMENT ON COLUMN alert_rules.repeat_hours IS 'While it stays open it is told again after so many hours; 0 for never.';
COMMENT ON COLUMN alert_rules.meaning IS 'What it means, in a sentence.';
COMMENT ON COLUMN alert_rules.evaluated_at IS 'When a worker last looked. Far back: no worker runs.';

INSERT INTO alert_rules (rule, severity, threshold, unit, for_seconds, meaning) VALUES
    ('oldest_waiting', 'warning', 3600, 'seconds', 60, 'A document has been due in a queue for longer than that, and no worker has taken it up.'),
    ('no_worker', 'critical', 60, 'seconds', 60, 'Documents wait in a queue that no living worker listens to.'),
    ('dead_letter_rate', 'critical', 0.05, 'share', 0, 'Of the documents that ended within the last hour, 20 or more, a larger share than that failed for good.'),
    ('worker_dead', 'warning', 120, 'seconds', 0, 'A worker has not been heard of for longer than that, did not sign off, and nothing on its host has taken its place.'),
    ('breaker_open', 'critical', 0, 'seconds', 120, 'An outside service is not called, because it failed or refused the key; its documents wait.'),
    ('budget_exhausted', 'warning', 600, 'seconds', 120, 'A service''s rate limit is used up so far ahead that a call would wait longer than that.'),
    ('index_invalid', 'warning', 0, 'indexes', 300, 'A build of an index was cut off. It is not used, and writing pays for it.');

CREATE TABLE alert_conditions (
    rule text NOT NULL,
    subject text NOT NULL,
    value double precision,
    message text NOT NULL,
    detail jsonb NOT NULL DEFAULT '{}',
    first_seen_at timestamptz NOT NULL,
    last_seen_at timestamptz NOT NULL,
    opened_at timestamptz,
    notified_at timestamptz,
    resolved_at timestamptz,
    PRIMARY KEY (rule, subject),
    CHECK (resolved_at IS NULL OR opened_at IS NOT NULL)
) WITH (fillfactor = 50);
COMMENT ON TABLE alert_conditions IS 'What the rules have found, one row for each rule and subject: not raised yet while opened_at is null, then open, in the end resolved.';
COMMENT ON COLUMN alert_conditions.rule IS 'The rule.';
COMMENT ON COLUMN alert_conditions.subject IS 'What it is about: a queue, a worker, a service, an index, or all.';
COMMENT ON COLUMN alert_conditions.value IS 'What was found when it was last seen, in the unit of the rule.';
COMMENT ON COLUMN alert_conditions.message IS 'The same in plain words.';
COMMENT ON COLUMN alert_conditions.detail IS 'More, depending on the rule.';
COMMENT ON COLUMN alert_conditions.first_seen_at IS 'When it began, this time.';
COMMENT ON COLUMN alert_conditions.last_seen_at IS 'When it was last found to be so.';
COMMENT ON COLUMN alert_conditions.opened_at IS 'When the alert was raised, this time; null while it has not lasted for_seconds.';
COMMENT ON COLUMN alert_conditions.notified_at IS 'When it was last told.';
COMMENT ON COLUMN alert_conditions.resolved_at IS 'When it was over; null while it is not.';

COMMENT ON COLUMN alerts.kind IS 'dead_letter, the name of a rule of alert_rules, or whatever else calls alert().';

CREATE VIEW alert_findings WITH (security_invoker = true) AS
WITH waiting AS MATERIALIZED (
    -- Of the ten thousand that were submitted first those that are due.
    SELECT stage_queue(due_stage(w.milestone)) AS queue, w.doc_id, greatest(w.updated_at, w.not_before) AS since
    FROM (
        SELECT d.milestone, d.doc_id, d.updated_at, d.not_before
        FROM file_extractions AS d WHERE d.state IN ('queued', 'retrying') ORDER BY d.id LIMIT 10000
    ) AS w
    WHERE w.not_before IS NULL OR w.not_before <= now()
), queues AS MATERIALIZED (
    SELECT w.queue, extract(epoch FROM now() - min(w.since))::float8 AS seconds, (array_agg(w.doc_id ORDER BY w.since))[1] AS doc_id,
        (SELECT count(*) FROM worker_registry AS r
            WHERE r.heartbeat_at > now() - interval '60 seconds' AND (r.queues IS NULL OR w.queue = ANY(r.queues))) AS workers
    FROM waiting AS w
    GROUP BY w.queue
), ended AS (
    SELECT count(*) FILTER (WHERE e.event = 'failed') AS failed, count(*) AS total
    FROM (SELECT v.event, v.at FROM document_events AS v ORDER BY v.id DESC LIMIT 10000) AS e
    WHERE e.event IN ('failed', 'completed', 'duplicate') AND e.at > now() - interval '1 hour'
)
SELECT r.rule, q.queue AS subject, q.seconds AS value,
    format('%s has been due in queue %s for %s min; %s live workers listen to it', q.doc_id, q.queue, round(q.seconds / 60), q.workers) AS message,
    jsonb_build_object('queue', q.queue, 'doc_id', q.doc_id, 'live_workers', q.workers) AS detail
FROM alert_rules AS r, queues AS q
WHERE r.rule = 'oldest_waiting' AND r.enabled AND q.seconds > r.threshold
UNION ALL
SELECT r.rule, q.queue, q.seconds,
    format('documents wait in queue %s, for up to %s s, and no live worker listens to it', q.queue, round(q.seconds)),
    jsonb_build_object('queue', q.queue, 'doc_id', q.doc_id)
FROM alert_rules AS r, queues AS q
WHERE r.rule = 'no_worker' AND r.enabled AND q.workers = 0 AND q.seconds > r.threshold
UNION ALL
SELECT r.rule, 'all', e.failed::float8 / e.total,
    format('%s of the last %s documents failed for good (%s %%)', e.failed, e.total, round(100.0 * e.failed / e.total, 1)),
    jsonb_build_object('failed', e.failed, 'ended', e.total)
FROM alert_rules AS r, ended AS e
WHERE r.rule = 'dead_letter_rate' AND r.enabled AND e.total >= 20 AND e.failed::float8 / e.total > r.threshold
UNION ALL
SELECT r.rule, w.worker, extract(epoch FROM now() - w.heartbeat_at)::float8,
    format('worker %s was last heard of %s s ago, with %s documents in hand', w.worker,
        round(extract(epoch FROM now() - w.heartbeat_at)), cardinality(w.documents)),
    jsonb_build_object('worker', w.worker, 'host', w.host, 'heartbeat_at', w.heartbeat_at, 'documents', w.documents[1:20])
FROM alert_rules AS r, worker_registry AS w
WHERE r.rule = 'worker_dead' AND r.enabled AND w.heartbeat_at < now() - make_interval(secs => r.threshold)
    -- After a day nobody expects it any more.
    AND w.heartbeat_at > now() - interval '1 day'
    AND NOT EXISTS (
        SELECT FROM worker_registry AS n
        WHERE n.host = w.host AND n.started_at > w.heartbeat_at AND n.heartbeat_at > now() - interval '60 seconds'
    )
UNION ALL
SELECT r.rule, c.service, extract(epoch FROM now() - c.changed_at)::float8,
    format('%s is not called: %s', c.service, c.reason),
    jsonb_build_object('service', c.service, 'state', c.state, 'refused', c.refused, 'waiting', c.waiting, 'try_at', c.try_at)
FROM alert_rules AS r, circuit_breakers AS c
WHERE r.rule = 'breaker_open' AND r.enabled AND c.state <> 'closed'
UNION ALL
SELECT r.rule, b.service, b.seconds,
    format('a call to %s would wait for %s min: its rate limit is used up', b.service, round(b.seconds / 60)),
    jsonb_build_object('service', b.service, 'requests_per_minute', b.requests_per_minute, 'tokens_per_minute', b.tokens_per_minute)
FROM alert_rules AS r, (
    SELECT p.service, p.requests_per_minute, p.tokens_per_minute,
        extract(epoch FROM greatest(p.paused_until, p.last_send_at, p.overflow_at) - now())::float8 AS seconds
    FROM provider_budgets AS p
) AS b
WHERE r.rule = 'budget_exhausted' AND r.enabled AND b.seconds > r.threshold
UNION ALL
SELECT r.rule, c.relname::text, 1,
    format('index %s of %s is not valid', c.relname, i.indrelid::regclass),
    jsonb_build_object('index', c.relname, 'table', i.indrelid::regclass::text)
FROM alert_rules AS r, pg_index AS i
JOIN pg_class AS c ON c.oid = i.indexrelid
WHERE r.rule = 'index_invalid' AND r.enabled AND NOT i.indisvalid
    AND c.relnamespace = (SELECT t.relnamespace FROM pg_class AS t WHERE t.oid = 'file_extractions'::regclass)
    AND NOT EXISTS (SELECT FROM pg_stat_progress_create_index AS p WHERE p.index_relid = i.indexrelid);
COMMENT ON VIEW alert_findings IS 'What the rules of alert_rules find at this moment, whether or not it has been told.';
COMMENT ON COLUMN alert_findings.rule IS 'The rule.';
COMMENT ON COLUMN alert_findings.subject IS 'What it is about: a queue, a worker, a service, an index, or all.';
COMMENT ON COLUMN alert_findings.value IS 'What was found, in the unit of the rule.';
COMMENT ON COLUMN alert_findings.message IS 'The same in plain words.';
COMMENT ON COLUMN alert_findings.detail IS 'More, depending on the rule.';

CREATE VIEW open_alerts WITH (security_invoker = true) AS
SELECT r.severity, c.rule, c.subject, c.message, c.value, r.threshold, r.unit, c.opened_at, c.last_seen_at, c.notified_at,
    date_trunc('second', now() - c.first_seen_at) AS lasts, 'docs/operations.md#' || replace(c.rule, '_', '-') AS what_to_do
FROM alert_conditions AS c
JOIN alert_rules AS r ON r.rule = c.rule
WHERE c.opened_at IS NOT NULL AND c.resolved_at IS NULL
ORDER BY r.severity, c.opened_at;
COMMENT ON VIEW open_alerts IS 'Alerts that are open, critical ones first, the oldest first.';
COMMENT ON COLUMN open_alerts.severity IS 'critical or warning.';
COMMENT ON COLUMN open_alerts.rule IS 'The rule.';
COMMENT ON COLUMN open_alerts.subject IS 'What it is about: a queue, a worker, a service, an index, or all.';
COMMENT ON COLUMN open_alerts.message IS 'What was last found, in plain words.';
COMMENT ON COLUMN open_alerts.value IS 'The same as a number.';
COMMENT ON COLUMN open_alerts.threshold IS 'What is too much.';
COMMENT ON COLUMN open_alerts.unit IS 'Unit of value and threshold.';
COMMENT ON COLUMN open_alerts.opened_at IS 'When it was raised.';
COMMENT ON COLUMN open_alerts.last_seen_at IS 'When a worker last found it so.';
COMMENT ON COLUMN open_alerts.notified_at IS 'When it was last told.';
COMMENT ON COLUMN open_alerts.lasts IS 'For how long it has been so.';
COMMENT ON COLUMN open_alerts.what_to_do IS 'Where to read on.';

CREATE FUNCTION evaluate_alerts(every_seconds double precision DEFAULT 30)
RETURNS TABLE (change text, rule text, subject text, severity text, message text) LANGUAGE plpgsql AS $$
-- Whoever locks the rules looks; all others, and rules that somebody is changing, are passed over. After the lock the time is looked at again.
#variable_conflict use_column
DECLARE
    moment timestamptz := clock_timestamp();
    due text[];
    found record;
BEGIN
    SELECT array_agg(l.rule) INTO due
    FROM (
        SELECT r.rule FROM alert_rules AS r
        WHERE r.evaluated_at NOT BETWEEN moment - make_interval(secs => every_seconds) AND moment + interval '1 minute'
        ORDER BY r.rule FOR UPDATE SKIP LOCKED
    ) AS l;
    IF due IS NULL THEN
        RETURN;
    END IF;
    UPDATE alert_rules AS r SET evaluated_at = moment WHERE r.rule = ANY(due);
    INSERT INTO alert_conditions AS c (rule, subject, value, message, detail, first_seen_at, last_seen_at)
    SELECT f.rule, f.subject, f.value, f.message, f.detail, moment, moment FROM alert_findings AS f WHERE f.rule = ANY(due)
    ON CONFLICT ON CONSTRAINT alert_conditions_pkey DO UPDATE
    SET value = EXCLUDED.value, message = EXCLUDED.message, detail = EXCLUDED.detail, last_seen_at = moment,
        first_seen_at = CASE WHEN c.resolved_at IS NULL THEN c.first_seen_at ELSE moment END,
        opened_at = CASE WHEN c.resolved_at IS NULL THEN c.opened_at END,
        resolved_at = NULL;
    -- What went away before it was raised.
    DELETE FROM alert_conditions AS c
    WHERE c.rule = ANY(due) AND c.last_seen_at < moment AND c.opened_at IS NULL;
    FOR found IN
        UPDATE alert_conditions AS c
        SET opened_at = CASE WHEN n.change = 'open' THEN moment ELSE c.opened_at END,
            resolved_at = CASE WHEN n.change = 'resolved' THEN moment END,
            notified_at = moment
        FROM (
            SELECT o.rule, o.subject, r.severity, r.threshold, r.unit,
                CASE
                    WHEN o.last_seen_at < moment THEN
                        CASE WHEN o.opened_at IS NOT NULL AND o.last_seen_at <= moment - make_interval(secs => r.clear_seconds) THEN 'resolved' END
                    WHEN o.opened_at IS NULL THEN
                        CASE WHEN o.first_seen_at <= moment - make_interval(secs => r.for_seconds) THEN 'open' END
                    WHEN r.repeat_hours > 0 AND o.notified_at <= moment - make_interval(secs => 3600 * r.repeat_hours) THEN 'repeated'
                END AS change
            FROM alert_conditions AS o
            JOIN alert_rules AS r ON r.rule = o.rule
            WHERE o.rule = ANY(due) AND o.resolved_at IS NULL
        ) AS n
        WHERE c.rule = n.rule AND c.subject = n.subject AND n.change IS NOT NULL
        RETURNING n.change, c.rule, c.subject, n.severity, c.message, c.detail, c.value, c.first_seen_at, n.threshold, n.unit
    LOOP
        change := found.change;
        rule := found.rule;
        subject := found.subject;
        severity := found.severity;
        message := CASE found.change WHEN 'open' THEN '' WHEN 'repeated' THEN 'still so: ' ELSE 'over: ' END || found.message;
        PERFORM alert(found.rule, message, found.detail || jsonb_build_object(
            'status', found.change, 'subject', found.subject, 'severity', found.severity, 'value', found.value,
            'threshold', found.threshold, 'unit', found.unit, 'since', found.first_seen_at,
            'what_to_do', 'docs/operations.md#' || replace(found.rule, '_', '-')));
        RETURN NEXT;
    END LOOP;
END;
$$;
COMMENT ON FUNCTION evaluate_alerts IS
    'Looks at the rules that nobody has looked at for so many seconds, raises, repeats and resolves their alerts, and returns what changed: open, repeated or resolved.';

-- The audit trail is append-only, but for what policy says may go. It guards against a slip, not against who may change the table.
CREATE FUNCTION refuse_deletion() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF current_setting('docmill.prune', TRUE) IS DISTINCT FROM 'on' THEN
        RAISE EXCEPTION '% is append-only', TG_TABLE_NAME
            USING ERRCODE = 'insufficient_privilege', HINT = 'docmill prune removes what the settings *_RETENTION_DAYS let go.';
    END IF;
    RETURN NULL;
END;
$$;
COMMENT ON FUNCTION refuse_deletion IS 'Trigger: rows go only in a transaction that has said SET LOCAL docmill.prune = on, as pruning does.';
CREATE TRIGGER document_events_keep BEFORE DELETE ON document_events FOR EACH STATEMENT EXECUTE FUNCTION refuse_deletion();

CREATE INDEX document_events_deletions ON document_events (id) WHERE event = 'deleted';
COMMENT ON INDEX document_events_deletions IS 'Whose events outlive their document, the oldest first.';

CALL pin_search_path();
