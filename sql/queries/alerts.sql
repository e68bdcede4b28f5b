-- What the alert forwarder asks and writes, over a connection of its own. See jobs/alerts.py.

-- name: lead_forwarding
-- One session at a time forwards; the lock goes when its connection does.
SELECT pg_try_advisory_lock(%(key)s) AS leads;

-- name: prepare_forwarding
-- Without keepalives the server would hold the lock for hours for a host that has lost its power. The transaction waits for the webhook.
SELECT set_config('idle_in_transaction_session_timeout', '0', FALSE),
    set_config('tcp_keepalives_idle', '10', FALSE), set_config('tcp_keepalives_interval', '5', FALSE),
    set_config('tcp_keepalives_count', '3', FALSE), set_config('tcp_user_timeout', '30000', FALSE);

-- name: listen_for_alerts
LISTEN docmill_alerts;

-- name: take_alert
-- The next one that is due. next_try_at is never before at; naming it twice keeps what has been given up out of the index scan.
SELECT a.id, a.idempotency_key, a.at, a.kind, a.message, a.detail, a.attempts
FROM alerts AS a
WHERE a.forwarded_at IS NULL AND a.next_try_at <= now() AND a.next_try_at > now() - make_interval(days => %(give_up_days)s)
    AND a.at > now() - make_interval(days => %(give_up_days)s)
ORDER BY a.next_try_at, a.id
LIMIT 1
FOR UPDATE SKIP LOCKED;

-- name: look_at_next_alert
SELECT extract(epoch FROM min(a.next_try_at) - now())::float8 AS seconds
FROM alerts AS a
WHERE a.forwarded_at IS NULL AND a.next_try_at > now() - make_interval(days => %(give_up_days)s)
    AND a.at > now() - make_interval(days => %(give_up_days)s);

-- name: alert_was_forwarded
UPDATE alerts AS a SET forwarded_at = clock_timestamp(), last_error = NULL WHERE a.id = %(id)s;

-- name: alert_was_refused
UPDATE alerts AS a
SET attempts = a.attempts + 1, last_error = %(error)s, next_try_at = clock_timestamp() + make_interval(secs => %(delay)s)
WHERE a.id = %(id)s;
